"""Is a fused model as exact as PyTorch? Every quantity against a float64 run, beside eager's own error.

Each fused block runs alone, on the input it really sees in the model, and then the whole model runs once. Compared
are the output, the gradient of the input and of every parameter, and the buffers (running statistics). The exact
values come from the unfused model in float64. A quantity passes if

    fused error <= LIMIT * max(eager's own error in the same dtype, kink error, a few ulp)

Errors are relative to the exact tensor's own size. Blocks are held to the largest deviation (max-norm), where no wrong
border pixel can hide. Whole models are held to the 2-norm: a deep network multiplies rounding, and the largest of
millions of deviations is then the luck of one of them, while their sum of squares repeats within percents. The kink
error (`resnet_fused.kinks`) is the part of a gradient that rounding alone decides, through ReLU's mask.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resnet_fused import dispatch
from resnet_fused.fuse import fuse, unfuse
from resnet_fused.fused_block import FusedBlock
from resnet_fused.kinks import Kinks
from resnet_fused.spec import Memory
from resnet_fused.stem import FusedStem
from resnet_fused.tables import table

LIMIT = 2.0
FLOOR_ULP = 2  # of the quantity's own dtype, relative to its largest value
FEW = 16  # a tensor of fewer values is too small a sample of eager's error: its siblings' counts as well
DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)

Progress = Callable[[str, int, int], None]
Norm = Literal["max", "2"]
Quantities = dict[str, Tensor]


def verify(
    model: nn.Module,
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    train: bool = True,
    backend: str = "auto",
    memory: Memory = "default",
    progress: Progress | None = None,
) -> Report:
    """Compare the fused form of `model` with the model itself and with float64.

    model:    fused or not, on x's device, with parameters in float32, bfloat16 or float16; left untouched.
    x:        [N, C, H, W], what the model takes; its first output must be one tensor.
    dtype:    torch.bfloat16 or torch.float16 runs both under autocast; None or torch.float32 as they are.
    train:    training mode (batch statistics) or evaluation, where the output without autograd is compared too.
    backend, memory: as for `resnet_fused.fuse`.
    progress: called with (what runs now, steps done, steps in all).

    The upstream gradients are random but fixed. Raises ValueError for a dtype or model that cannot be compared,
    TypeError if the model's output is no tensor, BackendError for a backend that cannot run.
    """
    if dtype not in DTYPES or any(t.dtype == torch.float64 for t in (x, *model.parameters())):
        raise ValueError(
            f"got dtype={dtype} and an input in {x.dtype}; accepted: None, float32, bfloat16 or float16 with tensors "
            "below float64, which the exact run needs for itself"
        )
    dispatch.check_name(backend)
    eager = unfuse(copy.deepcopy(model))
    fused = fuse(copy.deepcopy(eager), backend=backend, memory=memory)
    names = [name for name, module in fused.named_modules() if isinstance(module, FusedBlock)]
    if not names and not isinstance(fused, FusedStem):
        raise ValueError("no block of this model is fused; resnet_fused.explain(model) gives the reasons")
    comparison = Comparison(dtype=dtype, train=train, progress=progress or (lambda *_: None))
    blocks, whole = comparison.compare(eager, fused, names, x)
    shown = str(dtype or next(model.parameters()).dtype).removeprefix("torch.")
    return Report(type(model).__name__, shown, train, backend, memory, whole, blocks)


@dataclass(frozen=True)
class Quantity:
    """One compared tensor; errors relative to the exact tensor's size, inf for a wrong shape, dtype or non-finite."""

    name: str
    fused_error: float
    eager_error: float
    kink_error: float
    ratio: float


@dataclass(frozen=True)
class ModuleReport:
    """Everything compared in one block, or in the whole model."""

    name: str
    quantities: tuple[Quantity, ...]

    @property
    def worst(self) -> Quantity:
        return max(self.quantities, key=lambda q: q.ratio)


@dataclass(frozen=True)
class Report:
    """The outcome of `verify`."""

    model: str
    dtype: str
    train: bool
    backend: str
    memory: str
    whole: ModuleReport
    blocks: tuple[ModuleReport, ...]
    limit: float = LIMIT

    @property
    def ok(self) -> bool:
        """Whether no ratio passes the limit."""
        return all(part.worst.ratio <= self.limit for part in (*self.blocks, self.whole))

    def to_json(self) -> str:
        """Every quantity of every block; an error or ratio that is not finite is null."""
        return json.dumps({"ok": self.ok} | _finite(asdict(self)), indent=1, allow_nan=False)

    def table(self) -> str:
        """The worst quantity of each block and of the model, as text."""
        rows = []
        for part in (*self.blocks, self.whole):
            worst = part.worst
            errors = (worst.fused_error, worst.eager_error, worst.kink_error)
            verdict = "ok" if worst.ratio <= self.limit else "WRONG"
            rows.append([part.name, worst.name, *(f"{e:.2e}" for e in errors), f"{worst.ratio:.2f}", verdict])
        mode = "training" if self.train else "evaluation"
        return table(
            f"{self.model}, {mode}, {self.dtype}, backend {self.backend}, memory {self.memory}: "
            f"worst ratio of each part, at most {self.limit:g}",
            ("part", "worst quantity", "fused error", "eager error", "kinks", "ratio", ""),
            rows,
        )


@dataclass(frozen=True)
class Comparison:
    """How two implementations of one model are run and compared; the machinery behind `verify`."""

    dtype: torch.dtype | None = None
    train: bool = True
    progress: Progress = lambda *_: None
    seed: int = 0

    def compare(
        self, eager: nn.Module, fused: nn.Module, names: list[str], x: Tensor
    ) -> tuple[tuple[ModuleReport, ...], ModuleReport]:
        """A report for each submodule in `names`, which both models have, and one for the whole model."""
        inputs: dict[str, Tensor] = {}
        steps = len(names) + 1
        self.progress("the whole model", 0, steps)
        with _capture(eager, names, inputs) as watched:
            whole = self._compare_one("the whole model", watched, fused, x, "2")
        blocks = []
        if isinstance(fused, FusedStem):
            blocks.append(self._compare_one("stem", _Stem(eager), _Stem(fused), x, "max"))
        for done, name in enumerate(names, start=1):
            self.progress(name, done, steps)
            if name not in inputs:
                continue  # never called on this input
            pair = eager.get_submodule(name), fused.get_submodule(name)
            blocks.append(self._compare_one(name or "(model)", *pair, inputs.pop(name), "max"))
        self.progress("done", steps, steps)
        return tuple(blocks), whole

    def _compare_one(self, name: str, eager: nn.Module, fused: nn.Module, x: Tensor, norm: Norm) -> ModuleReport:
        kinks = Kinks(self.dtype or x.dtype)
        with kinks.record():
            ours = self._run(eager, x)
        double = copy.deepcopy(eager).double()
        with kinks.measure():
            exact = self._run(double, x.double(), exact=True)
        with kinks.flip():
            flipped = self._run(double, x.double(), exact=True)
        del double
        return ModuleReport(name, tuple(_quantities(self._run(fused, x), ours, flipped, exact, norm)))

    def _run(self, module: nn.Module, x: Tensor, exact: bool = False) -> Quantities:
        """One forward and backward of a copy of `module` on x; `exact` leaves autocast off."""
        module = copy.deepcopy(module).train(self.train)
        leaf = x.detach().requires_grad_()
        x = leaf.clone()  # a module may write to its input, and to a leaf it may not
        device = x.device.type
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        if self.dtype not in (None, torch.float32) and not exact:
            autocast = lambda: torch.autocast(device, self.dtype)  # noqa: E731
        found: Quantities = {}
        if not self.train:
            with torch.no_grad(), autocast():
                found["output without autograd"] = module(x.clone())
        with autocast():
            out = module(x)
        if not isinstance(out, Tensor):
            raise TypeError(f"{type(module).__name__} returned {type(out).__name__}; verify compares single tensors")
        found["output"] = out.detach()
        torch.autograd.backward(out, self._upstream(out))
        gradients = {"input gradient": leaf.grad}
        gradients |= {f"gradient of {name}": parameter.grad for name, parameter in module.named_parameters()}
        found |= {name: gradient for name, gradient in gradients.items() if gradient is not None}
        return found | dict(module.named_buffers())

    def _upstream(self, out: Tensor) -> Tensor:
        """Random, the same for every run, and exact in every dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(out)


@contextlib.contextmanager
def _capture(model: nn.Module, names: list[str], inputs: dict[str, Tensor]) -> Any:
    """A copy of `model` that notes the first input of each named submodule, in its first run only."""
    watched = copy.deepcopy(model)

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in inputs:
                inputs[name] = args[0].detach().clone()

        return hook

    for name in names:
        watched.get_submodule(name).register_forward_pre_hook(note(name))
    yield watched


class _Stem(nn.Module):
    """What a ResNet computes before layer1, which is part of the model's own forward: run until there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        def leave(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _Reached(args[0])

        hook = self.model.get_submodule("layer1").register_forward_pre_hook(leave)
        try:
            self.model(x)
        except _Reached as reached:
            return reached.stem
        finally:
            hook.remove()
        raise RuntimeError(f"{type(self.model).__name__} never called its layer1")


class _Reached(Exception):  # noqa: N818 - it carries a result, not an error
    def __init__(self, stem: Tensor) -> None:
        super().__init__()
        self.stem = stem


def _quantities(
    fused: Quantities, eager: Quantities, flipped: Quantities, exact: Quantities, norm: Norm
) -> list[Quantity]:
    gradients = [name for name in exact if name.startswith("gradient of ")]
    largest = max((_size(exact[name], norm) for name in gradients), default=0.0)

    def scale(name: str) -> float:
        # a convolution's bias before a norm has gradient zero: what rounding leaves is measured by its siblings
        size = _size(exact[name], norm)
        vanishing = name in gradients and size < torch.finfo(torch.float32).eps * largest
        return largest if vanishing else size

    errors = {name: _error(eager[name], exact[name], scale(name), norm) for name in exact}
    siblings = max((errors[name] for name in gradients), default=0.0)
    found = []
    for name, truth in exact.items():
        if name not in fused:
            found.append(Quantity(name, math.inf, errors[name], 0.0, math.inf))
            continue
        same_kind = fused[name].dtype == eager[name].dtype
        error = _error(fused[name], truth, scale(name), norm) if same_kind else math.inf
        kink = _error(flipped[name], truth, scale(name), norm)
        allowed = max(errors[name], kink, _floor(eager[name]))
        if name in gradients and truth.numel() < FEW:
            allowed = max(allowed, siblings)
        found.append(Quantity(name, error, errors[name], kink, _ratio(error, allowed)))
    return found


def _size(exact: Tensor, norm: Norm) -> float:
    exact = exact.detach().double()
    return float(exact.abs().max() if norm == "max" else exact.norm()) if exact.numel() else 0.0


def _error(value: Tensor, exact: Tensor, scale: float, norm: Norm) -> float:
    """The norm of value - exact over `scale`; counters must be equal, and so must values whose exact ones vanish."""
    if value.shape != exact.shape:
        return math.inf
    difference = _size(value.detach().double() - exact.detach().double(), norm)
    if difference == 0:
        return 0.0
    if not exact.is_floating_point() or scale == 0 or not math.isfinite(difference):
        return math.inf
    return difference / scale


def _floor(value: Tensor) -> float:
    return FLOOR_ULP * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0


def _ratio(error: float, allowed: float) -> float:
    if math.isinf(error):
        return 1.0 if math.isinf(allowed) else math.inf  # where eager overflows too, fused is no worse
    return error / allowed if allowed else 0.0


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
