"""Fused calls that follow one another, in evaluation on the CPU: one call of the engine, without Python between them.

The steps of a stem's run (`stem`) are first taken one by one. From then on it is known which of the engine's blocks
each of them is: the stem, the blocks of plain nn.Sequentials behind it, and the head. Later calls hand all of these to
the engine at once, as long as nobody could tell: modules are as they were (children, hooks, a replaced forward), the
tensors hold the same values, and no mode, trace or transform watches what is called. Otherwise the steps are taken one
by one.

A head is global average pooling, torch.flatten and nn.Linear. Its weights are packed, and under autocast cast, once.

ResNet-50, batch 1, two threads of an Intel Xeon (Sapphire Rapids), one by one with PyTorch's head / together: 1.37 in
bfloat16 at 224 x 224, 1.62 at 32 x 32 (docs/performance.md). Python between blocks costs more than its instructions:
each block's weights drive the interpreter out of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from resnet_fused import functional
from resnet_fused.backends import prepared
from resnet_fused.backends.folding import Steps
from resnet_fused.modules import module_state
from resnet_fused.modules.block_modules import has_hooks
from resnet_fused.modules.fused_block import FusedBlock
from resnet_fused.modules.plan import FUSED, POOL, Described, Pooled, Step, take
from resnet_fused.ops import operators
from resnet_fused.ops.export import exports_plain
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import BlockSpec, StageSpec

ENGINES = ("auto", "native")  # backends with the engine
MOST_INPUTS = 64  # of different shapes or dtypes


class Call(NamedTuple):
    """One fused call: what it computes, and what takes it when it is called by itself."""

    described: Described
    pool: tuple[int, ...]
    backend: str
    step: Step

    def prepared(self, dtype: torch.dtype) -> prepared.Prepared | None:
        """The engine's block, if its last call ran one for inputs of this dtype."""
        params, spec, gate = self.described
        given = torch.empty(0, dtype=dtype)
        plain = gate is None and functional.splits(given, params, spec) is None
        if not plain or functional.refuses(given, params, spec) is not None or self.backend not in ENGINES:
            return None
        return prepared.last(params, spec, dtype, self.pool)


class _Flatten(nn.Module):
    """torch.flatten(x, 1) as a step; no module of the model, so no hooks run."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x, 1)

    __call__ = forward


FLATTENED = _Flatten()
LINEAR = BlockSpec((StageSpec(norm=False, batch_stats=False, act="identity"),))


class Head:
    """Global average pooling, flattened, and a linear layer: for the engine a pointwise convolution of one pixel."""

    def __init__(self, pool: nn.AdaptiveAvgPool2d, linear: nn.Linear) -> None:
        self.pool, self.linear = pool, linear
        self._params: tuple[list[tuple[Tensor, int]], BlockParams] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        handle = self.prepared(x.dtype) if _unwatched(x) else None
        if handle is not None:
            out, count = operators.residual_blocks_prepared(x, prepared.together([], handle))
            if count == 1:
                return out.flatten(1)
        return self.linear(torch.flatten(self.pool(x), 1))

    def prepared(self, dtype: torch.dtype) -> Any:
        """The engine's block for inputs of this dtype; None where PyTorch runs the head."""
        weight, given = self.linear.weight, torch.empty(0, dtype=dtype)
        plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in self.tensors)
        if not plain or weight.dim() != 2 or weight.numel() == 0 or self.pool.output_size not in (1, (1, 1)):
            return None
        if weight.dtype not in (dtype, torch.float32) or not (_is_bare(self.pool) and _is_bare(self.linear)):
            return None
        params = self._of_block()
        if prepared.reason_against(given, params, LINEAR) is not None:
            return None
        made = prepared.prepared(params, given, LINEAR)
        return made.handle if made.finite else None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.linear.weight, self.linear.bias) if t is not None]

    def _of_block(self) -> BlockParams:
        """The layer's tensors as a convolution's: the same ones, with what is kept of them, until they are replaced."""
        now = [(t, t.data_ptr()) for t in self.tensors]
        if self._params is not None:
            last, params = self._params
            if len(last) == len(now) and all(a is b and p == q for (a, p), (b, q) in zip(last, now, strict=True)):
                return params
        weight, bias = self.linear.weight.detach(), self.linear.bias
        stage = StageParams(weight[:, :, None, None], None if bias is None else bias.detach())
        self._params = now, BlockParams((stage,))
        return self._params[1]


def with_head(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Steps of which a head is one."""
    for i, (pool, flatten, linear) in enumerate(zip(steps, steps[1:], steps[2:], strict=False)):
        if type(pool) is nn.AdaptiveAvgPool2d and flatten is FLATTENED and type(linear) is nn.Linear:
            return (*steps[:i], Head(pool, linear), *steps[i + 3 :])
    return steps


class Known(NamedTuple):
    """The steps that the engine takes together, and for which state of modules and tensors."""

    dtype: torch.dtype  # of the convolutions
    steps: list[Step]  # one for each of the engine's blocks
    rest: tuple[Step, ...]  # what follows
    blocks: Any  # a torch.classes.resnet_fused.PreparedBlocks
    descriptions: list[tuple[FusedBlock, Any]]
    snapshot: module_state.Snapshot
    tensors: list[Tensor]
    samples: int | None
    optimizer_steps: int
    inputs: set[Any]

    def holds(self) -> bool:
        return (
            self.optimizer_steps == Steps.taken
            and all(block._fused_description._last is last for block, last in self.descriptions)
            and module_state.unchanged(self.snapshot)
            and self.samples is not None
            and self.samples == operators.fingerprint(self.tensors, "samples")
        )

    def run(self, x: Tensor, backend: str) -> Tensor:
        out, count = operators.residual_blocks_prepared(x.to(self.dtype), self.blocks)
        if count == len(self.steps) and isinstance(self.steps[-1], Head):
            out = out.flatten(1)
        return take((*self.steps[count:], *self.rest), out if count else x, backend)


class Together:
    """The steps of a run, taken together where that is known to give the same."""

    __slots__ = ("_backend", "_known", "_refused", "_steps")

    def __init__(self, steps: tuple[Step, ...], backend: str) -> None:
        self._steps, self._backend = steps, backend
        self._known: Known | None = None
        self._refused: dict[Any, module_state.Snapshot] = {}  # inputs with which fewer than two are known

    @staticmethod
    def of(steps: tuple[Step, ...], backend: str) -> Together | None:
        """None where the engine has nothing to do with them."""
        if backend not in ENGINES:
            return None
        steps = with_head(steps)
        return Together(steps, backend) if any(isinstance(step, (*FUSED, Head)) for step in steps) else None

    def run(self, x: Tensor) -> Tensor:
        if len(self._steps) == 1 or not _unwatched(x):
            return take(self._steps, x, self._backend)
        autocast = functional.autocast_dtype(x)
        given = (x.shape, x.dtype, autocast)
        known = self._known
        if known is not None and given in known.inputs and known.holds():
            return known.run(x, self._backend)
        out = take(self._steps, x, self._backend)
        self._learn(given, autocast or x.dtype)
        return out

    def note(self) -> str | None:
        """What the engine takes together now, for `explain`; None where it takes the steps one by one."""
        known = self._known
        if known is None or not known.holds():
            return None
        head = isinstance(known.steps[-1], Head)
        blocks = len(known.steps) - 1 - head
        behind = f"{blocks} {'block' if blocks == 1 else 'blocks'} behind it"
        parts = ["it", *[behind] * (blocks > 0), *["the head"] * head]
        left = "" if head or not isinstance(self._steps[-1], Head) else "; PyTorch computes the head"
        return f"{', '.join(parts[:-1])} and {parts[-1]} are one call of the engine{left}"

    def _learn(self, given: Any, dtype: torch.dtype) -> None:
        """From a call of the steps one by one with such an input."""
        known = self._known
        if known is not None and known.dtype == dtype and len(known.inputs) < MOST_INPUTS and known.holds():
            known.inputs.add(given)
            return
        refused = self._refused.get(given)
        if refused is not None and module_state.unchanged(refused):
            return
        self._known = _known(self._steps, self._backend, dtype, given)
        if self._known is not None:
            self._refused.clear()
            return
        sequentials = [step for step in self._steps if isinstance(step, nn.Sequential)]
        watched = (module for each in sequentials for module in (each, *each.children()))
        self._refused = {given: module_state.snapshot(watched)}


def _known(steps: tuple[Step, ...], backend: str, dtype: torch.dtype, given: Any) -> Known | None:
    """Of as many steps as the engine takes one after the other; None for a single one."""
    together: list[Step] = []
    handles: list[Any] = []
    modules: list[nn.Module] = []
    tensors: list[Tensor] = []
    taken, head = 0, None
    for step in steps:
        if isinstance(step, Head):
            head = step.prepared(dtype)
            if head is not None:
                together.append(step)
                modules += [step.pool, step.linear]
                tensors += step.tensors
                taken += 1
            break
        calls = _calls(step, backend)
        blocks = [call.prepared(dtype) for call in calls]
        if not calls or not all(block is not None and block.finite for block in blocks):
            break
        together += [call.step for call in calls]
        handles += [block.handle for block in blocks if block is not None]
        modules += step.modules() if isinstance(step, nn.Module) else ()
        tensors += [tensor for call in calls for tensor in call.described.params.tensors]
        taken += 1
    if len(together) < 2:
        return None
    return Known(
        dtype,
        together,
        steps[taken:],
        prepared.together(handles, head),
        [(step, step._fused_description._last) for step in together if isinstance(step, FusedBlock)],
        module_state.snapshot(modules),
        tensors,
        operators.fingerprint(tensors, "samples"),
        Steps.taken,
        {given},
    )


def _calls(step: Step, backend: str) -> list[Call]:
    """The fused calls of a step; none where it does more, as hooks do."""
    if isinstance(step, Described):
        return [Call(step, (), backend, step)]
    if isinstance(step, Pooled):
        return [Call(step.call, POOL, backend, step)]
    if type(step) is not nn.Sequential or not _is_bare(step):
        return []
    calls: list[Call] = []
    for block in step:
        if not (isinstance(block, FusedBlock) and type(block).forward is FusedBlock.forward and _is_bare(block)):
            return []
        described, snapshot = block._fused_description._last
        if not isinstance(described, Described) or snapshot is None:
            return []
        calls.append(Call(described, (), block._fused_settings.backend, block))
    return calls


def _is_bare(module: nn.Module) -> bool:
    """Whether calling it runs its class's forward and nothing else."""
    called: Callable[..., Any] = type(module).__call__
    return called is nn.Module.__call__ and not has_hooks(module) and module._compiled_call_impl is None


def _unwatched(x: Tensor) -> bool:
    """Whether this is plain evaluation, in which nothing sees the operations that are called."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not any(module_state.GLOBAL_HOOKS)
        and not exports_plain()
    )
