"""Is a fused model as exact as PyTorch? Every quantity against a float64 run, beside eager's own error.

Compared are outputs, gradients of inputs and parameters, and buffers (running statistics), of each block alone and of
the whole model, over several seeds (`resnet_fused.tools.comparison`). Where a ReLU may flip, a single tensor's ratio of
errors is chance; so the claim is about many tensors, and about single ones where nothing flips:

distribution  For each kind of quantity, over all tensors and seeds: the geometric mean of fused error / eager's error
              is at most `Bounds.mean`, and tensors beyond `Bounds.limit` times eager's error are at most
              `EXCESS` more than those with which it is the other way round. Either may be passed by twice its standard
              error, where the tensors of one part under one seed are one draw, for a flip moves them together.
elements      In each block, of outputs and buffers, and with the activations replaced by the identity of gradients too:
              no element is further from exact than `Bounds.limit` times the furthest of eager's of the same tensor
              over the seeds (or a few ulp of the tensor's largest).
flips         Gradients of each block as it is: their error in the 2-norm is at most `Bounds.limit` times eager's
              largest over the seeds, or what `FLIPS` flipped masks explain.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.backends import dispatch
from resnet_fused.errors import NotFusable
from resnet_fused.modules.candidates import candidates
from resnet_fused.modules.fuse import MatchBy, fuse, unfuse
from resnet_fused.modules.fused_block import FusedBlock, FusedModule
from resnet_fused.modules.plan import Described
from resnet_fused.modules.structure import FusedByStructure
from resnet_fused.ops import gated_block
from resnet_fused.spec import Memory
from resnet_fused.tools.comparison import (
    GRADIENTS,
    KINDS,
    WHOLE,
    Comparison,
    Error,
    Inputs,
    Kind,
    Part,
    Progress,
    Quantity,
    Source,
    call,
    capture,
    map_inputs,
)
from resnet_fused.tools.info import machine
from resnet_fused.tools.tables import table

SEEDS = 5
EXCESS = 0.03
FLOOR_ULP = 2  # of `Quantity.dtype`, relative to the tensor's largest value
FEW = 16  # a tensor of fewer values is too small a sample of eager's error: its siblings' counts as well
FLIPS = 8  # masks, each of a gradient three times as large as the root mean square
NOISE = 0.1  # of the further seeds' inputs, relative to the root mean square
DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Bounds:
    """mean: of the ratios' geometric mean; limit: of single ratios."""

    mean: float
    limit: float


CLAIM = Bounds(mean=1.15, limit=2.0)

# Evaluation without autograd in float32, whose convolutions oneDNN runs with folded weights, bias, skip path and ReLU
# at once. Geometric means of 1.17 (ResNet-50) and 1.35 (ResNeXt-50) were measured, and 3.3 for single tensors; folding
# in float64 instead makes them no smaller.
FOLDED_FLOAT32 = Bounds(mean=1.5, limit=5.0)

# float32 in PyTorch's contiguous layout on a CPU. The fused operators compute in channels_last, where oneDNN's 3x3
# kernel (brg_conv) has 1.9 to 4.9 times the rounding error of the one it has for the contiguous layout
# (jit:avx512_core), growing with the channels; those for 1x1 are alike. Means up to 2.9 and single ratios up to 7.7
# were measured.
CONTIGUOUS_FLOAT32 = Bounds(mean=3.5, limit=10.0)


def verify(
    model: nn.Module,
    x: Inputs | Source,
    *,
    dtype: torch.dtype | None = None,
    train: bool = True,
    backend: str = "auto",
    memory: Memory = "default",
    match: MatchBy | None = None,
    seeds: int = SEEDS,
    min_fused: float = 0.0,
    progress: Progress | None = None,
) -> Report:
    """Compare the fused form of `model` with the model itself and with float64, in the layout that both arguments have.

    model:    fused or not, on x's device, with parameters in float32, bfloat16 or float16; left untouched. It returns a
              floating tensor, or a tuple, list, mapping or dataclass with some: all are compared.
    x:        what the model takes: a tensor, a tuple of positional or a mapping of keyword arguments. Seed 0 takes it
              as it is, further seeds with normal noise of a tenth of each floating tensor's root mean square. Or a
              function from a seed to such inputs.
    dtype:    torch.bfloat16 or torch.float16 runs both under autocast; None or torch.float32 as they are.
    train:    training mode (batch statistics) or evaluation, where the output without autograd is compared too.
    backend, memory: as for `resnet_fused.fuse`.
    match:    likewise; None: "structure" for a model that is fused by it, otherwise "class".
    seeds:    how many inputs, each with random upstream gradients of its own.
    min_fused: the share of the model's blocks that a fused backend has to run, 0 to 1. Blocks are modules of a known
              class, and others that hold a convolution and a batch norm; a ResNet's stem is one.
    progress: called with (what runs now, steps done, steps in all).

    Raises ValueError for arguments or a model that cannot be compared, TypeError if the model returns no floating
    tensor, BackendError for a backend that cannot run.
    """
    if seeds < 1 or not 0 <= min_fused <= 1:
        raise ValueError(f"got seeds={seeds}, min_fused={min_fused}; accepted: at least one seed, a share from 0 to 1")
    dispatch.check_name(backend)
    source = x if callable(x) else _near(x)
    first = source(0)
    tensors = _tensors(first)
    if dtype not in DTYPES or any(t.dtype == torch.float64 for t in (*tensors, *model.parameters())):
        given = ", ".join(str(t.dtype).removeprefix("torch.") for t in tensors)
        raise ValueError(
            f"got dtype={dtype} and an input in {given}; accepted: None, float32, bfloat16 or float16 with tensors "
            "below float64, which the exact run needs for itself"
        )
    eager = unfuse(copy.deepcopy(model))
    if match is None:
        match = "structure" if any(isinstance(m, FusedByStructure) for m in model.modules()) else "class"
    fused = fuse(copy.deepcopy(eager), backend=backend, memory=memory, match=match)
    names = [name for name, module in fused.named_modules() if isinstance(module, FusedBlock)]
    if not any(isinstance(module, FusedModule) for module in fused.modules()):
        raise ValueError("no block of this model is fused; resnet_fused.explain(model) gives the reasons")
    comparison = Comparison(dtype, train, seeds, progress or (lambda *_: None))
    computed = dtype or next(model.parameters()).dtype
    device = next((t.device for t in (*tensors, *model.parameters())), torch.device("cpu"))
    layout = _layout([*tensors, *model.parameters()])
    bounds = folded = CLAIM
    if computed == torch.float32:
        folded = FOLDED_FLOAT32
        if layout == "contiguous" and device.type == "cpu":
            bounds = folded = CONTIGUOUS_FLOAT32
    return Report(
        model=type(model).__name__,
        layout=layout,
        device=str(device),
        dtype=str(computed).removeprefix("torch."),
        train=train,
        backend=backend,
        memory=memory,
        seeds=seeds,
        bounds=bounds,
        folded=folded,
        runs_fused=_runs_fused(fused, comparison, first),
        min_fused=min_fused,
        parts=comparison.compare(eager, fused, names, source),
    )


@dataclass(frozen=True)
class Distribution:
    """The ratios of one kind of quantity over tensors and seeds.

    mean: geometric; beyond, behind: the shares of tensors with more than `limit` times eager's error, and the other way
    round; the slacks are twice the standard errors of log(mean) and of beyond - behind.
    """

    kind: Kind
    linear: bool
    count: int
    mean: float
    beyond: float
    behind: float
    mean_slack: float
    excess_slack: float
    ok: bool


@dataclass(frozen=True)
class Single:
    """One tensor: `ratio` is its largest error over the seeds by eager's (or what is allowed for it), or inf."""

    part: str
    quantity: str
    linear: bool
    fused_error: float
    eager_error: float
    ratio: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.ratio <= self.limit

    def __str__(self) -> str:
        return self.quantity + (", activations replaced" if self.linear else "")


@dataclass(frozen=True)
class Report:
    """The outcome of `verify`.

    folded: the bounds of outputs without autograd, bounds: of everything else.
    runs_fused: for each block of the model, whether a fused backend runs it.
    """

    model: str
    layout: str
    device: str
    dtype: str
    train: bool
    backend: str
    memory: str
    seeds: int
    bounds: Bounds
    folded: Bounds
    runs_fused: dict[str, bool]
    min_fused: float
    parts: tuple[Part, ...]

    def bounds_of(self, kind: Kind) -> Bounds:
        return self.folded if kind == "output without autograd" else self.bounds

    @property
    def title(self) -> str:
        """What was compared, in words."""
        mode = "training" if self.train else "evaluation"
        what = f"{self.model}, {mode}, {self.dtype}, {self.layout}, {self.device}"
        return f"{what}, backend {self.backend}, memory {self.memory}, {self.seeds} seeds"

    @property
    def ok(self) -> bool:
        """Whether the distributions and all single tensors keep their bounds, and blocks enough are fused."""
        return not self.wrong and all(d.ok for d in self.distributions) and self.fused_share >= self.min_fused

    @property
    def fused_share(self) -> float:
        return sum(self.runs_fused.values()) / max(len(self.runs_fused), 1)

    @cached_property
    def distributions(self) -> tuple[Distribution, ...]:
        """One for each kind of quantity, gradients of blocks with activations replaced apart."""
        asked = [(kind, linear) for linear in (False, True) for kind in (GRADIENTS if linear else KINDS)]
        found = (_distribution(self.parts, kind, linear, self.bounds_of(kind)) for kind, linear in asked)
        return tuple(d for d in found if d is not None)

    @cached_property
    def singles(self) -> tuple[Single, ...]:
        """Every tensor that has a bound of its own, in the order of the parts."""
        return tuple(single for part in self.parts for single in _singles(part, self.bounds_of))

    @property
    def wrong(self) -> tuple[Single, ...]:
        """Those that pass their bound, the worst first."""
        found = (single for single in self.singles if not single.ok)
        return tuple(sorted(found, key=lambda single: -single.ratio))

    def worst(self, part: str) -> Single:
        """Of this part's tensors, the one that is nearest to its bound or furthest beyond it."""
        found = (single for single in self.singles if single.part == part)
        return max(found, key=lambda single: single.ratio / single.limit)

    def to_json(self) -> str:
        """Verdicts, every error of every tensor, machine and versions; what is not finite is null."""
        derived = {
            "ok": self.ok,
            "machine": machine(),
            "fused_share": self.fused_share,
            "distributions": [asdict(d) for d in self.distributions],
            "wrong": [asdict(single) for single in self.wrong],
        }
        return json.dumps(_plain(derived | asdict(self)), indent=1, allow_nan=False)

    def table(self) -> str:
        """Each part's worst tensor, the distributions, and how many blocks run fused, as text."""
        rows = []
        for name in dict.fromkeys(single.part for single in self.singles):
            worst = self.worst(name)
            errors = [f"{error:.2e}" for error in (worst.fused_error, worst.eager_error)]
            ratio = f"{worst.ratio:.2f}", f"{worst.limit:g}"
            rows.append([name, str(worst), *errors, *ratio, "ok" if worst.ok else "WRONG"])
        parts = table(
            f"{self.title}\nEach part's worst tensor of those with a bound of their own",
            ("part", "worst tensor", "fused error", "eager error", "ratio", "limit", ""),
            rows,
        )
        return "\n\n".join([parts, self.distribution_table(), self.share])

    def distribution_table(self) -> str:
        """The distributions as text."""
        rows = [
            [
                d.kind + (", activations replaced" if d.linear else ""),
                str(d.count),
                f"{d.mean:.2f}",
                f"{math.exp(d.mean_slack):.2f}",
                f"{self.bounds_of(d.kind).mean:g}",
                f"{100 * d.beyond:.1f} %",
                f"{100 * d.behind:.1f} %",
                f"{self.bounds_of(d.kind).limit:g}",
                "ok" if d.ok else "WRONG",
            ]
            for d in self.distributions
        ]
        header = ("", "tensors", "mean", "slack", "limit", "beyond", "behind", "of", "")
        return table("Fused error / eager's error over tensors and seeds", header, rows)

    @property
    def share(self) -> str:
        """How many blocks run fused, in words."""
        text = f"{sum(self.runs_fused.values())} of {len(self.runs_fused)} blocks run fused"
        left = [name or "(model)" for name, runs in self.runs_fused.items() if not runs]
        if left:
            text += f"; not {', '.join(left)} (resnet_fused.explain gives the reasons)"
        return text if self.fused_share >= self.min_fused else f"{text}: fewer than {100 * self.min_fused:g} %, WRONG"


def _distribution(parts: tuple[Part, ...], kind: Kind, linear: bool, bounds: Bounds) -> Distribution | None:
    draws = []
    for part in parts:
        chosen = [q for q in (part.linear if linear else part.quantities) if q.kind == kind]
        for pairs in zip(*(_ratios(q) for q in chosen), strict=True):  # of one seed
            ratios = [ratio for ratio in pairs if ratio is not None]
            if ratios:
                draws.append(ratios)
    count = sum(map(len, draws))
    if not count:
        return None
    logs = [[math.log(ratio) for ratio in ratios] for ratios in draws]
    beyond = [[float(ratio > bounds.limit) for ratio in ratios] for ratios in draws]
    behind = [[float(ratio < 1 / bounds.limit) for ratio in ratios] for ratios in draws]
    excesses = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(behind, beyond, strict=True)]
    (mean, mean_slack), (excess, excess_slack) = _mean_and_slack(logs), _mean_and_slack(excesses)
    within = mean <= math.log(bounds.mean) + mean_slack and excess <= EXCESS + excess_slack
    far, near = (sum(map(sum, each)) / count for each in (beyond, behind))
    return Distribution(kind, linear, count, math.exp(mean), far, near, mean_slack, excess_slack, within)


def _ratios(quantity: Quantity) -> list[float | None]:
    """Of the errors in the 2-norm, at least that of rounding the exact tensor; None where both are zero or infinite."""
    if not quantity.dtype.is_floating_point:
        return [None] * len(quantity.ours)
    floor = torch.finfo(quantity.dtype).eps / 4
    found: list[float | None] = []
    for ours, eager in zip(quantity.ours, quantity.eager, strict=True):
        counts = all(map(math.isfinite, (ours.norm, eager.norm))) and ours.norm + eager.norm > 0
        found.append(max(ours.norm, floor) / max(eager.norm, floor) if counts else None)
    return found


def _mean_and_slack(draws: list[list[float]]) -> tuple[float, float]:
    """The mean of all values, and twice its standard error where each draw's values move together."""
    count = sum(map(len, draws))
    mean = sum(map(sum, draws)) / count
    free = len(draws) - 1
    if not free:
        return mean, math.inf
    variance = sum((sum(values) - len(values) * mean) ** 2 for values in draws) / count**2 * len(draws) / free
    return mean, 2 * (1 + 5 / free**2) * math.sqrt(variance)  # Student's t at 97.5 %, within a tenth


def _singles(part: Part, bounds_of: Callable[[Kind], Bounds]) -> list[Single]:
    found = []
    # what the smallest activation of the known blocks holds, of a bottleneck's output
    masks = max(min((q.elements for q in part.quantities if q.kind == "output"), default=1) / 4, 1)
    for quantities, linear in ((part.quantities, False), (part.linear, True)):
        siblings = {
            kind: max((_largest(q, True)[1] for q in quantities if q.kind == kind), default=0) for kind in KINDS
        }
        for q in quantities:
            gradient, limit = q.kind in GRADIENTS, bounds_of(q.kind).limit
            elements = part.name != WHOLE and (linear or not gradient)
            ours, eager = _largest(q, elements)
            allowed = max(eager, FLOOR_ULP * torch.finfo(q.dtype).eps if q.dtype.is_floating_point else 0.0)
            if q.elements < FEW and q.dtype.is_floating_point:
                allowed = max(allowed, siblings[q.kind])
            if gradient and not linear:
                if part.name == WHOLE and math.isfinite(ours):
                    continue  # whose flips nobody counts: the distribution has it
                allowed = max(allowed, 3 * math.sqrt(FLIPS / masks) / limit)
            ratio = math.inf if math.isinf(ours) else ours / allowed if allowed else 0.0
            found.append(Single(part.name, q.name, linear, ours, eager, ratio, limit))
    return found


def _largest(quantity: Quantity, of_elements: bool) -> tuple[float, float]:
    """(ours, eager's) over the seeds, but for those in which eager is infinitely wrong, too, as when it overflows."""
    pairs = [pair for pair in zip(quantity.ours, quantity.eager, strict=True) if math.isfinite(pair[1].norm)]

    def largest(errors: Iterable[Error]) -> float:
        return max((error.largest if of_elements else error.norm for error in errors), default=0.0)

    return largest(ours for ours, _ in pairs), largest(eager for _, eager in pairs)


def _near(x: Inputs) -> Source:
    """x for seed 0, x with noise for the others."""

    def source(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def noisy(_: str, t: Tensor) -> Tensor:
            if seed == 0 or not t.is_floating_point():
                return t
            size = NOISE * t.detach().float().square().mean().sqrt()
            return t + (size * torch.randn(t.shape, generator=generator).to(t.device)).to(t.dtype)

        return map_inputs(x, noisy)

    return source


def _tensors(given: Inputs) -> list[Tensor]:
    found: list[Tensor] = []

    def note(_: str, t: Tensor) -> Tensor:
        if t.is_floating_point():
            found.append(t)
        return t

    map_inputs(given, note)
    return found


def _layout(tensors: Iterable[Tensor]) -> str:
    """PyTorch convolves in channels_last if the input or the weights are."""
    images = [t for t in tensors if t.dim() == 4]
    last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in images)
    return "channels_last" if last else "contiguous"


def _runs_fused(fused: nn.Module, comparison: Comparison, given: Inputs) -> dict[str, bool]:
    """For each block of the model, whether a fused backend runs it on this input; False if it is never called."""
    blocks = {name: module for name, module, _ in candidates(fused)}
    seen: dict[str, Inputs] = {}
    with capture(fused, list(blocks), seen) as watched, torch.no_grad(), comparison.autocast(given):
        call(watched.train(comparison.train), given)
        return {name: name in seen and _is_taken(block, seen[name]) for name, block in blocks.items()}


def _is_taken(block: nn.Module, given: Inputs) -> bool:
    if not isinstance(block, FusedModule):
        return False
    x = given if isinstance(given, Tensor) else block.fused_input(*given)
    try:
        described = block.fused_describe()
    except NotFusable:
        return False
    whole = isinstance(described, Described)
    backend = block._fused_settings.backend
    return all(_call_is_taken(backend, call, x if whole else _stand_in(call, x)) for call in described.calls)


def _stand_in(call: Described, x: Tensor) -> Tensor:
    """For the input of one fused call of a plan: its channels, and what x has of the rest."""
    channels = call.params.stages[0].weight.shape[1] * call.spec.stages[0].groups
    return x.new_empty(len(x), channels, *x.shape[2:])


def _call_is_taken(backend: str, call: Described, x: Tensor) -> bool:
    params, spec, gate = call
    refusal = functional.refuses(x, params, spec, gate)
    params, spec = gated_block.chosen_for(params, spec, gate)
    return dispatch.select(backend, functional.as_convolved(x), params, spec, refusal) is not None


def _plain(value: Any) -> Any:
    """For JSON: named tuples as mappings, dtypes as names, null for what is not finite."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Error):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
