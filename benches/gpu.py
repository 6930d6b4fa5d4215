"""ResNet-50 on a GPU: each kind of block, the whole network and passes alone, every way to run them, in turns.

    python benches/gpu.py --minutes 5
    python benches/gpu.py --dry-run  # the same paths on the CPU, in Triton's interpreter: tiny, says nothing of speed

Two times a call. "device": its launches queue behind a wait, so that the GPU's work alone counts. "call": from an idle
GPU until it is idle again, as a caller sees it; for small batches that is mostly Python and launches. Every ratio is
eager's time over the contestant's within the same round. README.md beside this file tells how to read the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import functional, fuse, models, triton_kernels, tune
from resnet_fused.backends import how, native
from resnet_fused.modules import adapters
from resnet_fused.modules.block_modules import BlockModules, StageModules, describe
from resnet_fused.spec import BlockSpec, StageSpec
from resnet_fused.tools import named_models
from resnet_fused.tools.info import extension, machine
from resnet_fused.triton_kernels.host import chips, policies
from resnet_fused.triton_kernels.offline import resnet50

PEER = "eager"
BENCHMARKED = "eager, cudnn.benchmark"
FUSED = {
    f"{backend} {name}": (backend, *way)
    for backend in ("native", "triton")
    for name, way in {
        "single": ("single", "none"),
        "phased": ("phased", "none"),
        "hybrid": ("phased", "spatial"),
    }.items()
}
GRAPH = ", CUDA graph"
COMPILED = {
    "torch.compile": None,
    f"torch.compile{GRAPH}": "reduce-overhead",
    "torch.compile, max-autotune": "max-autotune",
}
NETWORKS = {"fused auto": "auto", "fused native": "native", "fused triton": "triton"}
GRAPHED = ("fused auto", f"fused auto{GRAPH}", "torch.compile", f"torch.compile{GRAPH}")
PASS = "batch_norm_act"
DIRECTIONS = {"forward": ("forward",), "training": ("forward", "backward"), "evaluation": ("infer",)}
FLUSHED = 256 << 20  # bytes: more than any L2
LAST = torch.channels_last
DTYPE = torch.bfloat16
Step = Callable[[], object]
Key = tuple[str, int]  # a block's name or NETWORK, and the batch
NETWORK = "resnet50"


@dataclass(frozen=True)
class PassShape:
    channels: int
    size: tuple[int, int]
    residual: bool

    def __str__(self) -> str:
        return f"bn{' + residual' if self.residual else ''} + ReLU, {self.channels}x{self.size[0]}x{self.size[1]}"

    def bytes(self, direction: str, batch: int) -> float:
        """What the fused passes must move: 16-bit activations, and a mask of one bit a value that training keeps.

        Statistics read x; normalising reads x and the residual and writes the output. Backward reads dout, x and the
        mask for its sums, and again to write the gradients of x and of the residual.
        """
        values = batch * self.channels * self.size[0] * self.size[1]
        evaluation, forward, backward = 2 + self.residual, 3 + self.residual, 5 + self.residual
        if direction == "evaluation":
            return 2 * values * evaluation
        both = direction == "training"
        return values * (2 * (forward + both * backward) + (1 + 2 * both) / 8)


@dataclass(frozen=True)
class Setting:
    """backends: those that can run here."""

    device: str
    dry: bool
    batches: tuple[int, ...]
    image: int
    backends: tuple[str, ...] = ("native", "triton")

    @property
    def main_batch(self) -> int:
        """Comes first, and has its launches counted, which hardly depend on the batch."""
        return 32 if 32 in self.batches else self.batches[0]

    @property
    def small_batches(self) -> tuple[int, ...]:
        """Where launches take most of an evaluation's time."""
        return self.batches if self.dry else (1, 8)

    def fused(self) -> list[str]:
        return [name for name, (backend, *_) in FUSED.items() if backend in self.backends]

    def networks(self) -> list[str]:
        return [name for name, backend in NETWORKS.items() if backend in ("auto", *self.backends)]

    def passes(self) -> dict[str, PassShape]:
        """The two kinds of normalisation that a ResNet has, on its largest activations; none without their kernels."""
        if "native" not in self.backends:
            return {}
        sizes = [(16, 4)] if self.dry else [(64, 56), (256, 56), (1024, 14)]
        each = [PassShape(c, (size, size), residual) for c, size in sizes for residual in (False, True)]
        return {str(shape): shape for shape in each}

    def shapes(self) -> dict[str, resnet50.BlockShape]:
        if not self.dry:
            return {shape.name: shape for shape in resnet50.resnet50(self.image)}
        spec = BlockSpec((StageSpec(), StageSpec(1, 1), StageSpec()), "identity")
        return {"tiny": resnet50.BlockShape("tiny", 1, spec, 16, (4, 4), ((4, 16, 1), (4, 4, 3), (16, 4, 1)))}


@dataclass(frozen=True)
class Sample:
    device: float
    call: float


@dataclass
class Figures:
    """Of one contestant; what was not found out is None."""

    samples: list[Sample] = field(default_factory=list)
    peak_bytes: int | None = None
    kernels: int | None = None
    own_launches: int | None = None


# --- one timing ------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.scratch = torch.empty(FLUSHED if self.cuda else 1, dtype=torch.int8, device=device)
        if self.cuda:
            waits = [self._between(lambda: torch.cuda._sleep(10_000_000)) for _ in range(10)]
            self.cycles_per_second = 1e7 / min(waits)  # the first ones wait for the clock to rise from idle

    def sample(self, step: Step) -> Sample:
        self.scratch.zero_()
        self.synchronize()
        start = time.perf_counter()
        step()
        host = time.perf_counter() - start
        self.synchronize()
        call = time.perf_counter() - start
        if not self.cuda:
            return Sample(call, call)
        self.scratch.zero_()
        torch.cuda._sleep(int(2 * min(host, 0.1) * self.cycles_per_second))  # the GPU waits until everything is queued
        return Sample(self._between(step), call)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _between(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


# --- what is timed ---------------------------------------------------------------------------------------------------


class BlockWork:
    """One kind of block: bfloat16 channels_last, norms in float32."""

    def __init__(self, shape: resnet50.BlockShape, batch: int, setting: Setting) -> None:
        torch.manual_seed(0)
        module, self.parts = _modules(shape)
        module.to(setting.device, DTYPE, memory_format=LAST)  # type: ignore[call-overload]
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.float()
        self.module, self.dry = module, setting.dry
        x = torch.randn(batch, shape.channels, *shape.size, device=setting.device).relu()  # it has passed a ReLU
        self.x = x.to(DTYPE).contiguous(memory_format=LAST).requires_grad_(shape.name != "stem")
        with torch.no_grad():
            self.dout = torch.randn_like(module(self.x))  # keeps the strides

    def step(self, contestant: str, direction: str) -> Step:
        self.module.train(direction != "evaluation")
        x, call = self.x, self._call(contestant)
        if direction == "evaluation":
            return torch.no_grad()(lambda: call(x))
        if direction == "forward":
            return lambda: call(x)
        leaves = [t for t in (x, *self.module.parameters()) if t.requires_grad]
        return lambda: torch.autograd.grad(call(x), leaves, self.dout)

    def _call(self, contestant: str) -> Callable[[Tensor], Tensor]:
        if contestant in COMPILED:
            return _compiled(self.module, contestant, self.dry)
        if contestant not in FUSED:
            return self.module
        params, spec = describe(self.parts, "default")
        backend, mode, library = FUSED[contestant]

        def fused(x: Tensor) -> Tensor:
            with _forced(mode, library):
                return functional.residual_block(x, params, spec, backend=backend)

        return fused


class NetworkWork:
    """ResNet-50 under bfloat16 autocast, float32 weights. Training: forward and backward of the cross entropy."""

    def __init__(self, batch: int, setting: Setting, tuned: set[tuple[int, str]]) -> None:
        """tuned: batches and directions for which somebody has called `tune` already."""
        self.batch, self.tuned = batch, tuned
        torch.manual_seed(0)
        model = _tiny_network() if setting.dry else models.resnet50(fused=False)
        self.model = model.to(setting.device, memory_format=LAST)  # type: ignore[call-overload]
        x = torch.randn(batch, 3, setting.image, setting.image, device=setting.device)
        self.x, self.dry = x.contiguous(memory_format=LAST), setting.dry
        self.labels = torch.arange(batch, device=setting.device) % 10
        with torch.autocast(setting.device, DTYPE):  # in the dtype of the steps, for the search of cudnn.benchmark
            named_models.settle_norms(self.model, self.x)

    def step(self, contestant: str, direction: str) -> Step:
        model = copy.deepcopy(self.model).train(direction != "evaluation")
        backend = NETWORKS.get(contestant.removesuffix(GRAPH))
        if backend is not None:
            fuse(model, backend=backend)
        if backend == "auto" and not self.dry and (self.batch, direction) not in self.tuned:
            self.tuned.add((self.batch, direction))
            with torch.autocast(self.x.device.type, DTYPE):  # auto follows what was measured, and nothing else
                tune(model, self.x)
        run = _compiled(model, contestant, self.dry) if contestant in COMPILED else model

        def loss() -> Tensor:
            with torch.autocast(self.x.device.type, DTYPE):
                return F.cross_entropy(run(self.x).float(), self.labels)

        def train() -> None:
            model.zero_grad(set_to_none=True)
            loss().backward()

        if direction == "training":
            return train
        evaluate = torch.no_grad()(loss)
        return _captured(evaluate) if backend and contestant.endswith(GRAPH) and not self.dry else evaluate


class PassWork:
    """act(bn(x) + residual) in bfloat16, channels_last, the norm in float32."""

    def __init__(self, shape: PassShape, batch: int, setting: Setting) -> None:
        torch.manual_seed(0)
        self.bn = nn.BatchNorm2d(shape.channels, device=setting.device)

        def activation() -> Tensor:
            t = torch.randn(batch, shape.channels, *shape.size, device=setting.device)
            return t.to(DTYPE).contiguous(memory_format=LAST)

        self.x, self.dout, self.dry = activation().requires_grad_(), activation(), setting.dry
        self.residual = activation().requires_grad_() if shape.residual else None

    def step(self, contestant: str, direction: str) -> Step:
        self.bn.train(direction != "evaluation")
        x, bn, residual = self.x, self.bn, self.residual

        def plain() -> Tensor:
            y = bn(x)
            return F.relu(y if residual is None else y + residual)

        def fused() -> Tensor:
            return functional.batch_norm_act(x, bn, residual=residual, backend="native")

        call = fused if contestant == PASS else plain
        if contestant in COMPILED:
            call = _compiled(plain, contestant, self.dry)
        if direction == "evaluation":
            return torch.no_grad()(call)
        if direction == "forward":
            return call
        leaves = [t for t in (x, residual, *bn.parameters()) if t is not None]
        return lambda: torch.autograd.grad(call(), leaves, self.dout)


def _captured(step: Step) -> Step:
    """The step as a CUDA graph; its results stay where they were captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def _modules(shape: resnet50.BlockShape) -> tuple[nn.Module, BlockModules]:
    """A block in plain PyTorch, and which child plays which part."""
    k, c, r = shape.convs[0]
    if shape.spec.skip == "none":
        (stage,) = shape.spec.stages
        conv = nn.Conv2d(c, k, r, stage.stride, stage.padding, bias=False)
        parts = (conv, nn.BatchNorm2d(k), nn.ReLU(inplace=True))
        return nn.Sequential(*parts), BlockModules((StageModules(*parts),), "none")
    stride, downsample = shape.spec.stages[1].stride, None
    if shape.spec.skip == "projection":
        out = shape.convs[-1][0]
        downsample = nn.Sequential(nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    block = models.Bottleneck(c, k, stride, downsample)  # type: ignore[arg-type]
    adapter = adapters.find(models.Bottleneck)
    assert adapter is not None
    return block, adapter(block)


def _tiny_network() -> nn.Module:
    layers = (nn.Conv2d(3, 16, 3), models.Bottleneck(16, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(*layers)


def _compiled(module: nn.Module | Step, contestant: str, dry: bool) -> Any:
    if dry:
        return torch.compile(module, dynamic=False, backend="aot_eager")  # a dry run compiles no C++
    return torch.compile(module, dynamic=False, mode=COMPILED[contestant])


@contextlib.contextmanager
def _forced(mode: str | None, library: str | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if mode is not None:
            stack.enter_context(how.launch_mode(mode))  # type: ignore[arg-type]
        if library is not None:
            stack.enter_context(how.library_convolutions(library))  # type: ignore[arg-type]
        yield


# --- where it runs ---------------------------------------------------------------------------------------------------


class Desk:
    """The contestants of one process; one work at a time."""

    def __init__(self, setting: Setting) -> None:
        if setting.dry:
            torch.set_num_threads(1)
        self.setting, self.clock = setting, Clock(setting.device)
        self.work: tuple[Key, BlockWork | NetworkWork | PassWork] | None = None
        self.tuned: set[tuple[int, str]] = set()
        self.steps: dict[str, Step] = {}

    def __call__(self, method: str, *args: Any) -> Any:
        return getattr(self, method)(*args)

    def open(self, key: Key, contestant: str, direction: str) -> None:
        if self.work is None or self.work[0] != key:
            self.close()
            self.work = key, self._made(*key)
        self.steps[contestant] = self.work[1].step(contestant, direction)

    def _made(self, name: str, batch: int) -> BlockWork | NetworkWork | PassWork:
        if name == NETWORK:
            return NetworkWork(batch, self.setting, self.tuned)
        passes = self.setting.passes()
        if name in passes:
            return PassWork(passes[name], batch, self.setting)
        return BlockWork(self.setting.shapes()[name], batch, self.setting)

    def warm(self, contestant: str) -> None:
        """Compiles, searches and allocates what the first calls do."""
        for _ in range(1 if self.setting.dry else 3):
            self.steps[contestant]()
        self.clock.synchronize()

    def sample(self, contestant: str) -> Sample:
        return self.clock.sample(self.steps[contestant])

    def peak(self, contestant: str) -> int | None:
        """Bytes that a call holds at most, beyond weights, their gradients and the input."""
        if not self.clock.cuda:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.steps[contestant]()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, contestant: str) -> tuple[int, int]:
        """(kernels, launches of our own)"""
        activity = torch.profiler.ProfilerActivity.CUDA if self.clock.cuda else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            self.steps[contestant]()
            self.clock.synchronize()
        names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
        return len(kernels), sum("run_phases" in name for name in kernels)

    def finish(self) -> None:
        """Forgets the steps, keeps the work."""
        self.steps.clear()
        torch.compiler.reset()

    def close(self) -> None:
        self.finish()
        self.work = None
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()


class Remote:
    """A desk in a process of its own, with cudnn.benchmark on.

    PyTorch keeps one cache of convolution plans a process, and what was chosen without the search is found there
    with it, too: two contestants that differ in this flag alone cannot share a process.
    """

    def __init__(self, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setting), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, method: str, *args: Any) -> Any:
        self.pipe.send((method, args))
        done, value = self.pipe.recv()
        if not done:
            raise RuntimeError(value)
        return value

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)


def _serve(pipe: Any, setting: Setting) -> None:
    torch.backends.cudnn.benchmark = True
    desk = Desk(setting)
    while (request := pipe.recv()) is not None:
        method, args = request
        try:
            pipe.send((True, desk(method, *args)))
        except Exception as error:
            pipe.send((False, _text(error)))


# --- rounds ----------------------------------------------------------------------------------------------------------


class Budget:
    """A piece may start if there is time for the longest of its kind so far; for the first, a fifth of all time."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.unknown = 60 * minutes / 5
        self.longest: dict[Any, float] = {}

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def affords(self, kind: Any) -> bool:
        return self.left > self.longest.get(kind, self.unknown)

    @contextlib.contextmanager
    def spend(self, kind: Any) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.longest[kind] = max(self.longest.get(kind, 0.0), time.monotonic() - start)


@dataclass
class Bench:
    setting: Setting
    budget: Budget
    seconds: float  # of timing for one group, after warm-up
    local: Desk
    remote: Remote
    groups: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def desk(self, contestant: str) -> Desk | Remote:
        return self.remote if contestant == BENCHMARKED else self.local

    def run(self, key: Key, direction: str, contestants: Sequence[str], tier: str) -> None:
        """One group: these contestants in turns with eager."""
        title = f"{key[0]}, batch {key[1]}, {direction}"
        kind = (tier, key[0] == NETWORK, key[0] in self.setting.passes())
        if not self.budget.affords(kind):
            self.dropped.append(f"{title}: {', '.join(contestants)}")
            return
        print(f"{title}: {', '.join(contestants)} ({self.budget.left:.0f} s left)", flush=True)
        with self.budget.spend(kind):
            figures = self._interleaved(key, direction, (PEER, *contestants), title)
        for desk in (self.local, self.remote):
            self._guarded(f"{title}, cleaning up", desk, "finish")
        entry = {name: asdict(f) for name, f in figures.items() if f.samples}
        self.groups.append({"block": key[0], "batch": key[1], "direction": direction, "contestants": entry})

    def _interleaved(self, key: Key, direction: str, contestants: Sequence[str], title: str) -> dict[str, Figures]:
        figures: dict[str, Figures] = {}
        for name in contestants:
            desk, what = self.desk(name), f"{title}, {name}"
            if self._guarded(what, desk, "open", key, name, direction) and self._guarded(what, desk, "warm", name):
                figures[name] = Figures()
                if key[0] == NETWORK and (peak := self._guarded(what, desk, "peak", name)):
                    figures[name].peak_bytes = peak[0]
                if key[1] == self.setting.main_batch and (seen := self._guarded(what, desk, "launches", name)):
                    figures[name].kernels, figures[name].own_launches = seen[0]
        names, rounds, turn, start = list(figures), 1, 0, time.monotonic()
        while turn < rounds and names:
            first = turn % len(names)
            taken = {
                name: self._guarded(f"{title}, {name}", self.desk(name), "sample", name)
                for name in names[first:] + names[:first]
            }
            if not all(taken.values()):  # the round counts for nobody
                names = [name for name in names if taken[name]]
                continue
            for name in names:
                figures[name].samples += taken[name] or ()
            turn += 1
            if turn == 1 and not self.setting.dry:
                rounds = min(max(ceil(self.seconds / (time.monotonic() - start)), 5), 25)
        return {name: figures[name] for name in names}

    def _guarded(self, what: str, desk: Desk | Remote, *request: Any) -> tuple[Any] | None:
        """(what the desk answered,), or None after noting the error."""
        try:
            return (desk(*request),)
        except Exception as error:
            self.errors.append(f"{what}: {_text(error)}")
            print(f"FAILED {self.errors[-1]}", file=sys.stderr, flush=True)
            return None


def _text(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" ({Path(f.filename).name}:{f.lineno})" for f in where)
    return f"{type(error).__name__}: {str(error)[:2000]}{place}"


# --- compiled beforehand ---------------------------------------------------------------------------------------------


def precompile(setting: Setting, seconds: float) -> dict[str, float]:
    """Fills Triton's cache on all cores, from meta tensors; what is left over compiles when it is first called."""
    start = time.monotonic()
    ways = [*(way for backend, *way in FUSED.values() if backend == "triton"), (None, None)]
    batches = sorted(setting.batches, key=lambda batch: batch != setting.main_batch)
    jobs = list(product(batches, ways, setting.shapes().values(), resnet50.DIRECTIONS))
    context = multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(os.cpu_count(), context)
    waiting = [pool.submit(_compile, shape, direction, batch, *way) for batch, way, shape, direction in jobs]
    done, _ = futures.wait(waiting, seconds)
    pool.shutdown(cancel_futures=True)
    failed = [text for future in done if (text := str(future.exception() or ""))]
    for text in sorted(set(failed)):
        print(f"not compiled beforehand: {text}", file=sys.stderr)
    return {"seconds": time.monotonic() - start, "jobs": len(jobs), "done": len(done), "failed": len(failed)}


def _compile(
    shape: resnet50.BlockShape, direction: resnet50.Direction, batch: int, mode: str | None, library: str | None
) -> None:
    from resnet_fused.triton_kernels.offline import ahead_of_time

    launches: list[Any] = []
    x, _, _, *flat = shape.tensors(batch, DTYPE)
    weights = [t for t in flat[::6] if t is not None]
    assert x is not None
    with _forced(mode, library):
        policy = replace(policies.choose(shape.spec, x, weights), submit=launches.append)
    resnet50.plan(shape, direction, batch, DTYPE, policy)
    for launch in launches:
        ahead_of_time.compile_launch(launch, policy.chip)


# --- the device ------------------------------------------------------------------------------------------------------


def measured_chip(chip: chips.Chip, clock: Clock, device: str, dry: bool) -> chips.Chip:
    """The chip with the rates that a copy and a matrix product reach here instead of the data sheet's."""
    elements, side = (1 << 16, 64) if dry else (1 << 29, 8192)
    source = torch.zeros(elements, dtype=DTYPE, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(DTYPE) for _ in range(2))
    copying, product_ = (
        [clock.sample(step).device for _ in range(8)] for step in (lambda: target.copy_(source), lambda: a @ b)
    )
    bandwidth = 2 * source.element_size() * elements / _quantiles(copying[2:])[1]
    return replace(chip, bandwidth=bandwidth, half_peak=2 * side**3 / _quantiles(product_[2:])[1])


def described(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {**machine(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    asked = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        found |= dict(zip(asked, (part.strip() for part in answer.strip().split(",")), strict=False))
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu, dry run"
    return found


# --- the report ------------------------------------------------------------------------------------------------------


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    low, middle, high = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double()
    )
    return float(low), float(middle), float(high)


def summarize(group: dict[str, Any], costs: Callable[[str, int, str], dict[str, float]]) -> None:
    """Adds percentiles, ratios to eager round by round, and rates to a group's contestants."""
    contestants = group["contestants"]
    peer = contestants.get(PEER)
    for name, figures in contestants.items():
        for kind in ("device", "call"):
            times = [s[kind] for s in figures["samples"]]
            figures[f"{kind}_seconds"] = _quantiles(times)
            if peer is not None:
                theirs = [s[kind] for s in peer["samples"]]
                figures[f"{kind}_ratio"] = _quantiles([t / own for t, own in zip(theirs, times, strict=True)])
        seconds = figures["device_seconds"][1]
        if group["block"] == NETWORK:
            figures["images_per_second"] = group["batch"] / figures["call_seconds"][1]
            continue
        cost = costs(group["block"], group["batch"], group["direction"])
        if "pass_bytes" in cost:
            if name == PASS:
                figures["gbytes"] = cost["pass_bytes"] / seconds / 1e9
                figures["of_copy"] = cost["pass_bytes"] / seconds / cost["bandwidth"]
            continue
        if not cost:
            continue
        figures["tflops"] = cost["flops"] / seconds / 1e12
        if name in FUSED or name in (PEER, BENCHMARKED):
            figures["gbytes"] = cost["fused_bytes" if name in FUSED else "eager_bytes"] / seconds / 1e9
        for floor in ("floor", "measured_floor"):
            if floor in cost:
                figures[f"of_{floor}"] = cost[floor] / seconds


def counted_costs(
    setting: Setting, chip: chips.Chip, measured: chips.Chip
) -> Callable[[str, int, str], dict[str, float]]:
    """Flops, bytes and floors of a block, empty without the cost model; bytes of a pass, and a copy's bandwidth."""
    try:
        from resnet_fused.triton_kernels.offline import cost_model
    except ImportError:
        cost_model = None  # type: ignore[assignment]
    passes = setting.passes()

    def costs(name: str, batch: int, direction: str) -> dict[str, float]:
        if name in passes:
            return {"pass_bytes": passes[name].bytes(direction, batch), "bandwidth": measured.bandwidth}
        if cost_model is None:
            return {}
        shape = setting.shapes()[name]
        fused = [p for d in DIRECTIONS[direction] for p in cost_model.fused(shape, d, batch, DTYPE, chip)]
        eager = [p for d in DIRECTIONS[direction] for p in cost_model.eager(shape, d, batch, DTYPE)]
        found: dict[str, float] = {
            "flops": sum(p.flops for p in fused),
            "fused_bytes": sum(p.bytes for p in fused),
            "eager_bytes": sum(p.bytes for p in eager),
            "measured_floor": cost_model.floor(fused, measured, DTYPE),
        }
        if chip.bandwidth and chip.half_peak:
            found["floor"] = cost_model.floor(fused, chip, DTYPE)
        return found

    return costs


def markdown(record: dict[str, Any]) -> str:
    lines = [f"# {record['machine']['device']}", ""]
    lines += [f"- {key}: {value}" for key, value in record["machine"].items()]
    rates = record["measured"]
    lines += [
        f"- reached here: {rates['bandwidth'] / 1e9:.0f} GB/s by a copy, "
        f"{rates['half_peak'] / 1e12:.1f} TFLOP/s by a bfloat16 product",
        "",
        "Ratios: eager's time over the contestant's in the same round, median (20th to 80th percentile); eager stands",
        "once for each set of contestants that took turns. GB/s counts the bytes that its own phases or operations",
        "must move; the floors are the fused phases', by data sheet and by the rates reached above.",
        *(f"Left out: {reason}" for reason in record.get("left_out", [])),
    ]
    for title, texts in (("Failed", record["errors"]), ("Dropped for lack of time", record["dropped"])):
        if texts:
            lines += ["", f"## {title}", "", *(f"- {text.splitlines()[0]}" for text in texts)]
    networks = [g for g in record["groups"] if g["block"] == NETWORK]
    header = ["batch", "", "contestant", "images/s", "call ratio", "device ratio", "peak MiB beyond weights", "kernels"]
    rows = [
        [str(g["batch"]), g["direction"], name, *_network_row(f)]
        for g in networks
        for name, f in g["contestants"].items()
    ]
    lines += ["", "## ResNet-50, bfloat16 autocast", "", *_table(header, rows)]
    passes = [g for g in record["groups"] if any("of_copy" in f for f in g["contestants"].values())]
    header = ["pass", "batch", "", "contestant", "device us", "device ratio", "call ratio", "GB/s", "% of the copy's"]
    rows = [
        [g["block"], str(g["batch"]), g["direction"], name, *_pass_row(f)]
        for g in passes
        for name, f in g["contestants"].items()
    ]
    lines += ["", "## Passes between convolutions, bfloat16 channels_last", "", *_table(header, rows)]
    blocks = [g for g in record["groups"] if g["block"] != NETWORK and g not in passes]
    lines += ["", "## The best of ours and torch.compile", "", *_table(BEST, _best_rows(blocks))]
    columns = ["block", "contestant", "device us", "device ratio", "call us", "call ratio", "TFLOP/s", "GB/s"]
    columns += ["% of floor", "% of measured floor", "kernels", "our launches"]
    for batch, direction in dict.fromkeys((g["batch"], g["direction"]) for g in blocks):
        same = [g for g in blocks if (g["batch"], g["direction"]) == (batch, direction)]
        rows = [[g["block"], name, *_block_row(f)] for g in same for name, f in g["contestants"].items()]
        lines += ["", f"## Blocks, {direction}, batch {batch}, bfloat16 channels_last", "", *_table(columns, rows)]
    return "\n".join(lines) + "\n"


BEST = ["block", "batch", "", "best of ours", "device ratio", "torch.compile's", "call ratio", "torch.compile's"]


def _best_rows(blocks: Sequence[dict[str, Any]]) -> list[list[str]]:
    """For each block, batch and direction: our fastest on the device and torch.compile, each against its eager."""
    rows = []
    for where in dict.fromkeys((g["block"], g["batch"], g["direction"]) for g in blocks):
        found: dict[str, Any] = {}
        for g in blocks:
            if (g["block"], g["batch"], g["direction"]) == where:
                found |= {name: f for name, f in g["contestants"].items() if "device_ratio" in f}
        ours = [name for name in found if name in FUSED]
        if ours and "torch.compile" in found:
            best = max(ours, key=lambda name: found[name]["device_ratio"][1])
            pairs = [found[name][f"{kind}_ratio"] for kind in ("device", "call") for name in (best, "torch.compile")]
            rows.append([where[0], str(where[1]), where[2], best, *map(_spread, pairs)])
    return rows


def _network_row(f: dict[str, Any]) -> list[str]:
    peak = "" if f["peak_bytes"] is None else f"{f['peak_bytes'] / 2**20:.0f}"
    ratios = [_spread(f.get(f"{kind}_ratio")) for kind in ("call", "device")]
    speed = f"{f['images_per_second']:.1f}" if f.get("call_ratio") else ""  # no figure without its peer
    return [speed, *ratios, peak, _number(f["kernels"], "d")]


def _pass_row(f: dict[str, Any]) -> list[str]:
    ratios = [_spread(f.get(f"{kind}_ratio")) for kind in ("device", "call")]
    share = _number(f.get("of_copy"), ".0%").rstrip("%")
    return [f"{f['device_seconds'][1] * 1e6:.1f}", *ratios, _number(f.get("gbytes"), ".0f"), share]


def _block_row(f: dict[str, Any]) -> list[str]:
    cells = []
    for kind in ("device", "call"):
        ratio = f.get(f"{kind}_ratio")
        cells += [f"{f[f'{kind}_seconds'][1] * 1e6:.1f}" if ratio else "", _spread(ratio)]
    cells += [_number(f.get("tflops"), ".1f"), _number(f.get("gbytes"), ".0f")]
    cells += [_number(f.get(name), ".0%").rstrip("%") for name in ("of_floor", "of_measured_floor")]
    return [*cells, _number(f["kernels"], "d"), _number(f["own_launches"], "d")]


def _spread(ratio: tuple[float, float, float] | None) -> str:
    return "" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


# --- in order --------------------------------------------------------------------------------------------------------


def main() -> int:
    args = _arguments()
    if args.dry_run and not triton_kernels.interpreted():  # Triton looks at this when it is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})
    left_out = {} if args.dry_run else _left_out()
    if len(left_out) == 2:
        print(f"{'; '.join(left_out.values())}; --dry-run needs no GPU", file=sys.stderr)
        return 2
    for reason in left_out.values():
        print(f"left out: {reason}", file=sys.stderr)
    out = args.out or (Path(tempfile.mkdtemp()) if args.dry_run else Path(__file__).parent / "results")
    out.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # what is tuned here stays here
    budget = Budget(args.minutes)
    backends = tuple(name for name in ("native", "triton") if name not in left_out)
    setting = (
        Setting("cpu", True, (2,), 6) if args.dry_run else Setting("cuda", False, tuple(args.batches), 224, backends)
    )
    compiles = "triton" in backends and not args.dry_run
    compiled = precompile(setting, 60 * args.minutes / 3) if compiles else {"seconds": 0.0}
    local, remote = Desk(setting), Remote(setting)
    chip = chips.INTERPRETER if args.dry_run else chips.of_device(0)
    measured = measured_chip(chip, local.clock, setting.device, args.dry_run)
    bench = Bench(setting, budget, args.seconds, local, remote)
    record: dict[str, Any] = {
        "machine": described(setting.device),
        "extension": extension(),
        "minutes": args.minutes,
        "left_out": list(left_out.values()),
        "precompiled": compiled,
        "measured": {"bandwidth": measured.bandwidth, "half_peak": measured.half_peak},
    }
    slug = re.sub(r"[^a-z0-9]+", "-", record["machine"]["device"].lower()).strip("-")
    costs = counted_costs(setting, chip, measured)
    for tier, key, directions, contestants in _plan(setting, args.max_autotune):
        for direction in directions:
            bench.run(key, direction, contestants, tier)
        _write(out / slug, record, bench, costs)
    remote.stop()
    if not args.dry_run:
        print(markdown(record))
    print(f"{out / slug}.json and .md; {len(bench.errors)} failed, {len(bench.dropped)} groups dropped")
    return 1 if bench.errors else 0


def _left_out() -> dict[str, str]:
    """The backends that cannot run here, and why."""
    reasons = {"native": native.why_not_on_gpu(torch.device("cuda")), "triton": triton_kernels.why_not("cuda")}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _plan(setting: Setting, autotune: bool) -> Iterator[tuple[str, Key, tuple[str, ...], list[str]]]:
    """(tier, key, directions, contestants), the quickest to prepare first: the last are dropped first."""
    batches = sorted(setting.batches, key=lambda batch: batch != setting.main_batch)
    both = ("training", "evaluation")

    def tier(name: str, network: list[str], block: list[str]) -> Iterator[tuple[str, Key, tuple[str, ...], list[str]]]:
        yield from ((name, (NETWORK, batch), both, network) for batch in batches)
        yield from ((name, (shape, batch), tuple(DIRECTIONS), block) for batch in batches for shape in setting.shapes())

    yield from tier("launches", [BENCHMARKED, *setting.networks()], [BENCHMARKED, *setting.fused()])
    yield from (("passes", (name, setting.main_batch), tuple(DIRECTIONS), [PASS]) for name in setting.passes())
    yield from (("graphs", (NETWORK, batch), ("evaluation",), list(GRAPHED)) for batch in setting.small_batches)
    for name in ("torch.compile", *(["torch.compile, max-autotune"] if autotune else [])):
        yield from tier(name, ["fused auto", name], [name])


def _write(
    path: Path, record: dict[str, Any], bench: Bench, costs: Callable[[str, int, str], dict[str, float]]
) -> None:
    """After every piece, so that an interrupted run leaves what it has."""
    for group in bench.groups:
        if not all("device_seconds" in f for f in group["contestants"].values()):
            summarize(group, costs)
    record |= {"groups": bench.groups, "errors": bench.errors, "dropped": bench.dropped}
    path.with_name(path.name + ".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_name(path.name + ".md").write_text(markdown(record))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5, help="in all; what finds no time is dropped and named")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing for each group, after warm-up")
    parser.add_argument("--max-autotune", action="store_true", help="torch.compile with it, too, after the rest")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: results/ beside this file; a new folder if dry"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny, one round")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
