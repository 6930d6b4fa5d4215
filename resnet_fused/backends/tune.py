"""`tune`: measures on the GPU at hand how each block of a model runs fastest, for backend "auto" to follow.

Blocks are timed through the functional operators, on inputs of the shapes that the model gives them: no running
statistic, parameter or gradient of the model changes. Contestants take turns in every round, and medians are compared.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from resnet_fused import functional, triton_kernels  # type: ignore[attr-defined, unused-ignore]
from resnet_fused.backends import dispatch, measured, native
from resnet_fused.backends.how import Way, launch_mode, library_convolutions
from resnet_fused.backends.measured import BackendName, Decision
from resnet_fused.errors import BackendError, NotFusable
from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.modules.plan import Plan
from resnet_fused.ops import gated_block
from resnet_fused.params import BlockParams, is_wrapper, map_tensors
from resnet_fused.spec import BlockSpec
from resnet_fused.tools.tables import table

Run = Callable[[], object]
Timer = Callable[[Sequence[Run]], list[float]]  # seconds of each, measured in turns
ROUNDS = 15


@dataclass(frozen=True)
class Measured:
    """One kind of block: the name of its first occurrence, our fastest way to run it, and PyTorch's time over ours."""

    name: str
    shape: tuple[int, ...]
    workload: str
    backend: str
    mode: str
    library: str
    speedup: float


class Tuning(list[Measured]):
    """One row for each kind of block; ``str()`` gives the table."""

    def to_json(self) -> str:
        return json.dumps([asdict(row) for row in self], indent=1)

    def __str__(self) -> str:
        header = ("block", "input", "workload", "backend", "launch", "library convolutions", "PyTorch's time / ours")
        rows = [
            (m.name, "x".join(map(str, m.shape)), m.workload, m.backend, m.mode, m.library, f"{m.speedup:.2f}")
            for m in self
        ]
        return table("Measured here", header, rows)


class TunedBlock(NamedTuple):
    """train: forward and backward are timed, else forward alone."""

    x: Tensor
    params: BlockParams
    spec: BlockSpec
    train: bool


class Contestant(NamedTuple):
    backend: BackendName
    way: Way


def tune(model: nn.Module, x: Tensor, *, tiles: bool = False, timer: Timer | None = None) -> Tuning:
    """Measure each kind of fused block of `model` on inputs as `model(x)` gives them, and keep the result on disk.

    From then on backend "auto" takes, at that shape and dtype, the fastest kernels that were measured, if they were
    faster than PyTorch: native or Triton, in one launch or phase by phase, and with the same convolutions left to the
    library. Call it as the model will be used: in training or in evaluation mode, x and weights in their
    dtype and memory format, and within ``torch.autocast`` if the model will run there. The results are in
    ``$XDG_CACHE_HOME/resnet_fused/tuning.json``; other devices, versions and shapes do not see them.

    tiles: also search the tile sizes of every Triton phase, which takes minutes, mostly for compiling.
    timer: how to time calls; for tests.

    A block in training mode is measured forward and backward, whether its norms are frozen or not; one in evaluation
    mode forward alone, as without autograd.

    Raises BackendError where neither backend can run, x is on no GPU, or a block's parameters are sharded.
    """
    reason = nothing_to_tune(x.device)
    if reason is not None:
        raise BackendError(f"there is nothing to tune: {reason}")
    timer = timer or time_on_gpu
    result, decisions = Tuning(), {}
    for name, module, block_input in block_inputs(model, x):
        try:
            described = module.fused_describe()
        except NotFusable:
            continue
        if isinstance(described, Plan):  # the inputs of its calls are not known here
            continue
        if any(map(is_wrapper, described.params.tensors)):
            raise BackendError(f"the parameters of {name} are sharded: tune the model before fully_shard")
        params, spec = gated_block.chosen_for(*described)
        block = TunedBlock(block_input, params, spec, train=spec.batch_stats or module.training)
        key = measured.key(spec, block_input, [p.weight for p in params.convs], block.train)
        field = contestants(block_input, params, spec)
        if key in decisions or not field:
            continue
        with torch.cuda.device_of(block_input):  # whose streams time it
            if tiles and any(backend == "triton" for backend, _ in field):
                measured.record({}, fastest_tiles(block, timer))
            decision = decisions[key] = fastest_way(block, field, timer)
        workload = "train" if block.train else "infer"
        shape = tuple(block_input.shape)
        result.append(
            Measured(name, shape, workload, decision.backend, decision.mode, decision.library, decision.speedup)
        )
    measured.record(decisions, {})
    return result


def nothing_to_tune(device: torch.device) -> str | None:
    """Why no backend has a choice on this device, or None."""
    why_not = {"native": native.why_not_on_gpu(device), "triton": triton_kernels.why_not(device)}
    return None if None in why_not.values() else "; ".join(f"{name}: {why}" for name, why in why_not.items())


def contestants(x: Tensor, params: BlockParams, spec: BlockSpec) -> list[Contestant]:
    """Every way of every backend that can run this block."""
    return [
        Contestant(cast("BackendName", name), way)
        for name, backend in dispatch.BACKENDS.items()
        if (backend.unavailable() or backend.unsupported(x, params, spec)) is None
        for way in backend.ways(x, params, spec)
    ]


@torch.no_grad()
def block_inputs(model: nn.Module, x: Tensor) -> list[tuple[str, FusedModule, Tensor]]:
    """(name, module, input) of each fused block when the model runs on x, in evaluation mode so that nothing changes.

    Under autocast the inputs come in the dtype that the block's convolutions will see.
    """
    seen: list[tuple[str, FusedModule, Tensor]] = []
    handles, modes = [], {module: module.training for module in model.modules()}
    for name, module in model.named_modules():
        if isinstance(module, FusedModule):

            def note(m: FusedModule, given: tuple[Any, ...], name: str = name) -> None:
                seen.append((name, m, functional.as_convolved(m.fused_input(*given))))

            handles.append(module.register_forward_pre_hook(note))
    try:
        model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return seen


def fastest_way(block: TunedBlock, contestants: Sequence[Contestant], timer: Timer) -> Decision:
    """The contestant that runs the block fastest, and its time against PyTorch's."""

    def forced(contestant: Contestant) -> Run:
        run, (mode, library) = once(block, contestant.backend), contestant.way

        def within() -> None:
            with launch_mode(mode), library_convolutions(library):
                run()

        return within

    *ours, eager = timer([*map(forced, contestants), once(block, "eager")])
    best: dict[str, tuple[float, Way]] = {}
    for seconds, (backend, way) in zip(ours, contestants, strict=True):
        if backend not in best or seconds < best[backend][0]:
            best[backend] = seconds, way
    speedups = {backend: eager / seconds for backend, (seconds, _) in best.items()}
    fastest = cast("BackendName", max(speedups, key=speedups.__getitem__))
    return Decision(fastest, *best[fastest][1], speedups.pop(fastest), speedups)


def fastest_tiles(block: TunedBlock, timer: Timer) -> dict[measured.TileKey, dict[str, int]]:
    """The fastest tile of each of the block's Triton phases, run phase by phase and searched one after the other."""
    from triton.runtime.errors import OutOfResources

    from resnet_fused.triton_kernels.host import tuning

    chosen: dict[measured.TileKey, dict[str, int]] = {}
    run = once(block, "triton")
    with launch_mode("phased"), library_convolutions("none"):
        with tuning.asked() as keys:
            run()
        for key, start in keys.items():
            fitting, runs = [], []
            for tile in (start, *tuning.candidates(key[1], start)):

                def attempt(tile: tuning.Tile = tile, key: measured.TileKey = key) -> None:
                    with tuning.trying(key, tile):
                        run()

                try:
                    attempt()  # compiles it, and shows whether it fits
                except OutOfResources:
                    continue
                fitting.append(tile)
                runs.append(attempt)
            times = timer(runs)
            chosen[key] = asdict(fitting[min(range(len(times)), key=times.__getitem__)])
    return chosen


def once(block: TunedBlock, backend: str) -> Run:
    """One step of the block, forward and backward for training, on copies: nothing of the caller's is written."""
    x, params, spec, train = block
    mine = x.detach().requires_grad_(train)

    def own(name: str, t: Tensor) -> Tensor:
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            return t.clone()
        if t.dim() == 4:
            t = t.to(x.dtype)
        return t.detach().requires_grad_(train)

    copies = map_tensors(params, own)

    def run() -> None:
        with torch.set_grad_enabled(train), torch.autocast(x.device.type, enabled=False):
            out = functional.residual_block(mine, copies, spec, backend=backend)
            if train:
                out.backward(out.detach())

    return run


def time_on_gpu(runs: Sequence[Run]) -> list[float]:
    """Median seconds of each, from CUDA events, over rounds in which all take turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(3):
        for run in runs:
            run()
    for _ in range(ROUNDS):
        for run, mine in zip(runs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            mine.append(begin.elapsed_time(end) / 1000)
    return [statistics.median(each) for each in times]
