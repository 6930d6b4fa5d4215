"""Fused calls that follow one another, in evaluation on the CPU: one call of the engine, without Python between them.

The steps of a stem's run (`stem`) are first taken one by one. From then on it is known which of the engine's blocks
each of them is: the stem, and the blocks of plain nn.Sequentials behind it. Later calls hand all of these to the engine
at once, as long as nobody could tell: the modules are as they were (children, hooks, a replaced forward), the tensors
hold the same values, and no mode, trace or transform watches what is called. Otherwise the steps are taken one by one.

ResNet-50, batch 1, bfloat16, two threads of an Intel Xeon (Sapphire Rapids): MEASURED.
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
from resnet_fused.modules.plan import POOL, Described, Pooled, Step, take
from resnet_fused.ops import operators

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
        if not plain or functional.refuses(given, params, spec) is not None or self.backend not in ("auto", "native"):
            return None
        return prepared.last(params, spec, dtype, self.pool)


class Known(NamedTuple):
    """The calls that the engine takes together, and for which state of modules and tensors."""

    dtype: torch.dtype  # of the convolutions
    calls: list[Call]
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
        steps = (*(call.step for call in self.calls[count:]), *self.rest)
        return take(steps, out if count else x, backend)


class Together:
    """The steps of a run, taken together where that is known to give the same."""

    __slots__ = ("_backend", "_known", "_refused", "_steps")

    def __init__(self, steps: tuple[Step, ...], backend: str) -> None:
        self._steps, self._backend = steps, backend
        self._known: Known | None = None
        self._refused: dict[Any, module_state.Snapshot] = {}  # inputs with which fewer than two are known

    def run(self, x: Tensor) -> Tensor:
        if not _unwatched(x):
            return take(self._steps, x, self._backend)
        autocast = functional.autocast_dtype(x)
        given = (x.shape, x.dtype, autocast)
        known = self._known
        if known is not None and given in known.inputs and known.holds():
            return known.run(x, self._backend)
        out = take(self._steps, x, self._backend)
        self._learn(given, autocast or x.dtype)
        return out

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
    """Of as many steps as the engine takes one after the other; None for a single call."""
    calls: list[Call] = []
    made: list[Any] = []
    modules: list[nn.Module] = []
    taken = 0
    for step in steps:
        found = _calls(step, backend)
        blocks = [call.prepared(dtype) for call in found]
        if not found or not all(block is not None and block.finite for block in blocks):
            break
        calls += found
        made += [block.handle for block in blocks if block is not None]
        modules += step.modules() if isinstance(step, nn.Module) else ()
        taken += 1
    if len(calls) < 2:
        return None
    tensors = [tensor for call in calls for tensor in call.described.params.tensors]
    return Known(
        dtype,
        calls,
        steps[taken:],
        prepared.together(made),
        [(call.step, call.step._fused_description._last) for call in calls if isinstance(call.step, FusedBlock)],
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
    )
