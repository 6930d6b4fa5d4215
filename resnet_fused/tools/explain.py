"""`explain`: which backend each block of a model runs on, and why not another."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.backends import dispatch, how, prepared
from resnet_fused.backends.folding import folded
from resnet_fused.backends.tune import block_inputs
from resnet_fused.errors import NotFusable
from resnet_fused.modules.candidates import candidates
from resnet_fused.modules.fuse import require_module, why_not
from resnet_fused.modules.fused_block import FusedModule, original_class
from resnet_fused.modules.overlay import is_gathered
from resnet_fused.modules.plan import Described, Plan, require_plain
from resnet_fused.modules.stem import FusedStem, joint_note, pool_note
from resnet_fused.modules.structure import FusedByStructure, matched_words
from resnet_fused.ops import gated_block, operators
from resnet_fused.params import BlockParams, is_wrapper
from resnet_fused.spec import BlockSpec
from resnet_fused.tools.tables import table


class Row(NamedTuple):
    """name: qualified, "" for the model itself; block: its original class; backend: "eager" is plain PyTorch."""

    name: str
    block: str
    backend: str
    reason: str


class Explanation(list[Row]):
    """One `Row` for each block, in the order of ``model.named_modules()``; ``str()`` gives the table."""

    def __init__(self, rows: Iterable[Row], fused: Iterable[str]) -> None:
        """fused: the names of those that `fuse` has switched."""
        super().__init__(rows)
        self.fused = frozenset(fused)

    @property
    def summary(self) -> str:
        """As in "13 of 17 blocks fused"; and of these how many run in plain PyTorch all the same."""
        plain = sum(row.backend == "eager" for row in self if row.name in self.fused)
        text = f"{len(self.fused)} of {len(self)} blocks fused"
        return f"{text}, {plain} of them in plain PyTorch" if plain else text

    def to_json(self) -> str:
        """The summary's counts, and every row with "fused"."""
        blocks = [row._asdict() | {"fused": row.name in self.fused} for row in self]
        counts = {"blocks": len(self), "fused": len(self.fused), "summary": self.summary}
        return json.dumps(counts | {"rows": blocks}, indent=1)

    def __str__(self) -> str:
        rows = [(row.name or "(model)", *row[1:]) for row in self]
        return table("Residual blocks", Row._fields, rows) + f"\n{self.summary}"

    def __repr__(self) -> str:
        return f"<Explanation of {len(self)} blocks>"


def explain(model: nn.Module, x: Tensor | None = None) -> Explanation:
    """Print and return, for each block of the model, the backend that it runs on now and the reason.

    x: an input of the model. On a GPU the choice depends on each block's input shape, and x tells it; without x a small
    input stands in. Given x the model runs once in evaluation mode, and nothing in it changes; one that is in
    evaluation runs a second time, without autograd, to see which blocks are one call of the CPU's engine.

    Fused blocks: what `auto` takes for the block's present state, dtype and device, and why it passed over others. In
    training on the CPU, given x or in bfloat16: who computes the convolutions and their gradients, and why.
    The rest: why they are not fused. `candidates` says which modules of unknown classes are listed.
    A ResNet's own row is its stem. The last line printed is the summary. Raises TypeError if model is not a module.
    """
    require_module(model)
    inputs: dict[nn.Module, Tensor] = {}
    if x is not None:
        inputs = {module: given for _, module, given in block_inputs(model, x)}
        if not model.training and any(isinstance(module, FusedStem) for module in inputs):
            with torch.no_grad():
                model(x)
    blocks = candidates(model)
    rows = [
        Row(name, original_class(module).__name__, *_backend_and_reason(module, inputs.get(module)))
        for name, module, _ in blocks
    ]
    explanation = Explanation(rows, [name for name, module, _ in blocks if isinstance(module, FusedModule)])
    print(explanation)
    return explanation


def _backend_and_reason(module: nn.Module, x: Tensor | None) -> tuple[str, str]:
    if not isinstance(module, FusedModule):
        return "eager", why_not(module) or "not fused; call fuse(model)"
    try:
        described = module.fused_describe()
        if not is_gathered(module):
            require_plain(described)
    except NotFusable as reason:
        return "eager", str(reason)
    if any(conv.weight.dim() != 4 for call in described.calls for conv in call.params.convs):
        flat = "parameters are flattened outside of forward (FullyShardedDataParallel); explain the unwrapped model"
        return module._fused_settings.backend, flat
    found = [f"matched by structure: {matched_words(module)}"] if isinstance(module, FusedByStructure) else []
    if isinstance(described, Plan):
        backend, note = _of_plan(module, described, x)
        return backend, "; ".join([*found, note])
    backend, notes = _of_call(module, described, x)
    notes = [*found, *notes]
    if isinstance(module, FusedStem):
        notes += [pool] if (pool := pool_note(module)) is not None else []
        if x is not None and not module.training and (joint := joint_note(module)) is not None:
            notes.append(joint)
    return backend, "; ".join(notes)


def _of_plan(module: FusedModule, plan: Plan, x: Tensor | None) -> tuple[str, str]:
    """The backend of those calls that are fused; where they differ, the reasons of each."""
    like = None if x is None else x[:1, :1, :8, :8]
    answers = [
        _of_call(module, call, None if like is None else _stand_in(call.params, call.spec, like)) for call in plan.calls
    ]
    backends = [backend for backend, _ in answers]
    fused = next((backend for backend in backends if backend != "eager"), "eager")
    notes = [
        note if backend == fused else f"a part runs in plain PyTorch: {note}"
        for backend, notes in answers
        for note in notes
        if not note.startswith("engine: ")  # of an input that only stands for the part's own
    ]
    calls = "one fused call" if len(plan.calls) == 1 else f"{len(plan.calls)} fused calls"
    return fused, "; ".join([f"{calls} beside PyTorch's own modules", *dict.fromkeys(notes)])


def _stand_in(params: BlockParams, spec: BlockSpec, like: Tensor) -> Tensor:
    """For the input of a fused call: its channels, `like`'s device and dtype."""
    return like.new_empty(1, params.stages[0].weight.shape[1] * spec.stages[0].groups, 8, 8)


def _of_call(module: FusedModule, call: Described, x: Tensor | None) -> tuple[str, list[str]]:
    params, spec, gate = call
    given = x is not None
    if x is None:
        x = _stand_in(params, spec, params.stages[0].weight)
    asked = module._fused_settings.backend
    split = functional.splits(x, params, spec)
    if split is not None or gate is not None:
        if (refusal := functional.refuses(x, params, spec, gate)) is not None:
            return "eager", [refusal]
        params, spec = gated_block.chosen_for(params, spec, gate)
    with torch.set_grad_enabled(module.training):  # evaluation is taken to be without autograd, as `tune` takes it
        backend, notes = _dispatched(asked, dispatch.reasons(asked, x, params, spec))
    if x.device.type == "cuda" and x.dtype == torch.float32 and backend != "eager":
        notes.append(f"float32 products in {how.precision()}, as PyTorch's convolutions")
    if (wrapper := next((type(t).__name__ for t in params.tensors if is_wrapper(t)), None)) is not None:
        gathered = f"parameters are sharded ({wrapper}); fully_shard gathers them for forward"
        return backend, [*notes, gathered]
    evaluates = not (module.training or spec.batch_stats)
    if split is not None:
        return backend, notes if backend == "eager" else [*notes, split]
    if backend == "native" and x.device.type == "cpu" and evaluates:
        against = prepared.reason_against(x, params, spec)
        finite = prepared.prepared(params, x, spec).finite if against is None else folded(params, x, spec).finite
        if not finite:
            return "eager", ["in evaluation: a parameter or buffer is not finite, or is not once norms are folded in"]
        if against is not None:
            notes.append(f"evaluation runs oneDNN's convolutions{_form(x.dtype)}: {against}")
        elif given:
            notes.append(f"engine: {prepared.prepared(params, x, spec).describe(x)}")
    if backend == "native" and x.device.type == "cpu" and not evaluates and (given or x.dtype == torch.bfloat16):
        notes.append(_who_trains(x, params, spec))
    if gate is not None and backend != "eager":
        notes += gated_block.notes(x, gate, evaluates)
    return backend, notes


def _who_trains(x: Tensor, params: BlockParams, spec: BlockSpec) -> str:
    """Who computes the convolutions of a training step: the engine, or oneDNN (for few pixels a matrix product, for
    depthwise gradients kernels of our own) and why.
    """
    weights = [p.weight.to(x.dtype) for p in params.convs]  # as autocast, where it is on, casts them
    reasons = operators.engine_reasons_against_training(spec, weights, x.dtype)
    left: dict[str, list[str]] = {}
    for i, of_parts in enumerate(reasons):
        conv = "the projection" if i == len(spec.stages) else f"convolution {i + 1}"
        for part, reason in zip(("forward", "data gradient", "weight gradient"), of_parts, strict=True):
            if reason is not None:
                left.setdefault(reason, []).append(f"{part} of {conv}")
    if not left:
        return "training runs the engine's convolutions"
    form = _form(x.dtype)
    if sum(map(len, left.values())) == 3 * len(reasons):
        return f"training runs oneDNN's convolutions{form}: {'; '.join(left)}"
    others = ", ".join(f"{' and '.join(parts)} ({reason})" for reason, parts in left.items())
    return f"training runs the engine's convolutions, and oneDNN's{form} for {others}"


def _form(dtype: torch.dtype) -> str:
    """In which type oneDNN convolves 16 bits that it does not multiply here (csrc/cpu/convolution.h)."""
    return " in float32" if operators.widens(dtype) else ""


def _dispatched(asked: str, against: dict[str, str | None]) -> tuple[str, list[str]]:
    """(backend, notes): for "auto" the first without a reason against it, and the reasons before it."""
    if asked != "auto":
        reason = against.get(asked)
        return asked, ["asked for by name" if reason is None else f"forward raises: {reason}"]
    notes: list[str] = []
    for name, reason in against.items():
        if reason is None:
            return name, notes
        notes.append(f"{name}: {reason}")
    return "eager", notes
