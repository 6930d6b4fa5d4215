"""Two implementations of one model run beside a float64 run of it; how far each is from exact, tensor by tensor.

The whole model runs, and each named block alone on the input that it really sees there, for every seed. Only errors are
kept, no tensors. A block runs twice: as it is, and with its activations (and the stem's pooling) replaced by the
identity. Rounding may put a pre-activation on the other side of ReLU's kink, or choose another maximum, and one such
flip moves a gradient by far more than rounding does, in either implementation. In the linear block nothing can flip,
so there every gradient is comparable to the last element; it is computed by the same kernels.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules import adapters
from resnet_fused.modules.block_modules import stages_of
from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.modules.stem import FusedStem

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Source = Callable[[int], Inputs]  # the inputs of a seed
Progress = Callable[[str, int, int], None]
Kind = Literal["output", "output without autograd", "input gradient", "parameter gradient", "buffer"]
KINDS: tuple[Kind, ...] = ("output", "output without autograd", "input gradient", "parameter gradient", "buffer")
GRADIENTS: tuple[Kind, ...] = ("input gradient", "parameter gradient")
WHOLE = "the whole model"

Values = dict[str, tuple[Kind, Tensor]]


class Error(NamedTuple):
    """Of one tensor in one run, relative to the exact tensor's size; inf for a wrong shape, dtype or for NaN."""

    largest: float  # of any element, relative to the largest exact one
    norm: float  # the 2-norm's


@dataclass(frozen=True)
class Quantity:
    """One compared tensor: its errors in both implementations, one for each seed.

    dtype: whose rounding no implementation can do without: the tensor's own, of gradients under autocast the latter's.
    """

    name: str
    kind: Kind
    dtype: torch.dtype
    elements: int
    ours: tuple[Error, ...]
    eager: tuple[Error, ...]


@dataclass(frozen=True)
class Part:
    """A block alone, or the whole model. linear: with identities for activations, empty where that cannot be made."""

    name: str
    quantities: tuple[Quantity, ...]
    linear: tuple[Quantity, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """dtype: bfloat16 or float16 for autocast; train: the mode; seeds: how many inputs and upstream gradients."""

    dtype: torch.dtype | None = None
    train: bool = True
    seeds: int = 5
    progress: Progress = lambda *_: None

    def compare(self, eager: nn.Module, ours: nn.Module, names: list[str], source: Source) -> tuple[Part, ...]:
        """A `Part` for each submodule in `names`, which both models have and which is called, and the whole model last.

        A `FusedStem` of `ours` is a part, too, called "stem".
        """
        parts = {name: _Record() for name in (*(["stem"] if isinstance(ours, FusedStem) else []), *names, WHOLE)}
        steps, done = self.seeds * len(parts), 0

        def step(name: str) -> None:
            nonlocal done
            self.progress(name or "(model)", done, steps)
            done += 1

        for seed in range(self.seeds):
            given = source(seed)
            seen: dict[str, Inputs] = {}
            step(WHOLE)
            with capture(eager, names, seen) as watched:
                self._compare(parts[WHOLE], seed, watched, ours, given)
            for name in parts:
                if name == WHOLE:
                    continue
                step(name)
                if name == "stem" and name not in names:
                    self._compare_block(parts[name], seed, Stem(eager), Stem(ours), given)
                elif name in seen:
                    pair = eager.get_submodule(name), ours.get_submodule(name)
                    self._compare_block(parts[name], seed, *pair, seen.pop(name))
        self.progress("done", steps, steps)
        return tuple(record.part(name or "(model)") for name, record in parts.items() if record.as_it_is)

    def autocast(self, given: Inputs, enabled: bool = True) -> contextlib.AbstractContextManager[Any]:
        """Where `dtype` asks for it, on the device of the first tensor of `given`."""
        if self.dtype in (None, torch.float32) or not enabled:
            return contextlib.nullcontext()
        devices: list[str] = []
        map_inputs(given, lambda _, t: devices.append(t.device.type) or t)  # type: ignore[func-returns-value]
        return torch.autocast(next(iter(devices), "cpu"), self.dtype)

    def _compare_block(self, record: _Record, seed: int, eager: nn.Module, ours: nn.Module, given: Inputs) -> None:
        self._compare(record, seed, eager, ours, given)
        straight = _straightened(eager), _straightened(ours)
        if straight[0] is not None and straight[1] is not None:
            self._compare(record, seed, straight[0], straight[1], given, linear=True)

    def _compare(
        self, record: _Record, seed: int, eager: nn.Module, ours: nn.Module, given: Inputs, linear: bool = False
    ) -> None:
        expected = self._run(eager, given, seed)
        exact = self._run(copy.deepcopy(eager).double(), map_inputs(given, _double), seed, exact=True)
        record.add(self._run(ours, given, seed), expected, exact, self.dtype, linear)

    def _run(self, module: nn.Module, given: Inputs, seed: int, exact: bool = False) -> Values:
        """One forward and backward of a copy of `module`; `exact` leaves autocast off."""
        module = copy.deepcopy(module).train(self.train)
        leaves: dict[str, Tensor] = {}

        def leaf(name: str, t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            leaves[name] = t.detach().clone().requires_grad_()
            return leaves[name].clone()  # a module may write to its input, and to a leaf it may not

        inputs = map_inputs(given, leaf)
        found: Values = {}
        if not self.train:
            with torch.no_grad(), self.autocast(inputs, not exact):
                outputs = _outputs(module, call(module, map_inputs(inputs, lambda _, t: t.detach().clone())))
            found |= {f"{name} without autograd": ("output without autograd", t) for name, t in outputs.items()}
        with self.autocast(inputs, not exact):
            outputs = _outputs(module, call(module, inputs))
        found |= {name: ("output", t.detach()) for name, t in outputs.items()}
        generator = torch.Generator().manual_seed(seed)
        upstream = [_upstream(t, generator) for t in outputs.values()]
        pairs = [(t, dt) for t, dt in zip(outputs.values(), upstream, strict=True) if t.requires_grad]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [dt for _, dt in pairs])
        found |= {f"input gradient{n}": ("input gradient", t.grad) for n, t in leaves.items() if t.grad is not None}
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = ("parameter gradient", parameter.grad)
        return found | {name: ("buffer", buffer) for name, buffer in module.named_buffers()}


class _Record:
    """What `Part` holds, while it is gathered."""

    def __init__(self) -> None:
        self.as_it_is: dict[str, list[tuple[Error, Error]]] = {}
        self.linear: dict[str, list[tuple[Error, Error]]] = {}
        self._about: dict[str, tuple[Kind, torch.dtype, int]] = {}

    def add(self, ours: Values, eager: Values, exact: Values, dtype: torch.dtype | None, linear: bool) -> None:
        into = self.linear if linear else self.as_it_is
        sizes = {name: Error(_max(t), _norm(t)) for name, (_, t) in exact.items()}
        largest = _larger(*(sizes[name] for name, (kind, _) in exact.items() if kind == "parameter gradient"))
        for name, (kind, truth) in exact.items():
            size = sizes[name]
            if kind == "parameter gradient":
                module, _, own = name.rpartition(".")
                partner = f"{module}.{'weight' if own == 'bias' else 'bias'}"
                if partner in exact and exact[partner][1].shape == truth.shape:
                    size = _larger(size, sizes[partner])  # a norm's: sums of like terms, of which one may cancel
                if size.norm < torch.finfo(torch.float32).eps * largest.norm:
                    size = largest  # zero but for rounding, as a convolution's bias before a norm
            mine, theirs = ours.get(name), eager[name][1]
            wrong = mine is None or mine[1].dtype != theirs.dtype
            error = Error(math.inf, math.inf) if wrong or mine is None else _error(mine[1], truth, size)
            into.setdefault(name, []).append((error, _error(theirs, truth, size)))
            at_work = dtype if dtype is not None and kind in GRADIENTS else theirs.dtype
            self._about[name] = kind, at_work, truth.numel()

    def part(self, name: str) -> Part:
        def quantities(errors: dict[str, list[tuple[Error, Error]]]) -> tuple[Quantity, ...]:
            return tuple(
                Quantity(name, *self._about[name], tuple(ours for ours, _ in pairs), tuple(eager for _, eager in pairs))
                for name, pairs in errors.items()
            )

        return Part(name, quantities(self.as_it_is), quantities(self.linear))


def _error(value: Tensor, exact: Tensor, size: Error) -> Error:
    """Counters must be equal, and so must values whose exact ones vanish."""
    if value.shape != exact.shape:
        return Error(math.inf, math.inf)
    difference = value.detach().double() - exact.detach().double()
    pairs = ((_max(difference), size.largest), (_norm(difference), size.norm))
    return Error(*(_relative(d, s if exact.is_floating_point() else 0.0) for d, s in pairs))


def _larger(*errors: Error) -> Error:
    return Error(max((e.largest for e in errors), default=0.0), max((e.norm for e in errors), default=0.0))


def _relative(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return difference / size if size > 0 and math.isfinite(difference) else math.inf


def _max(t: Tensor) -> float:
    return float(t.detach().double().abs().max()) if t.numel() else 0.0


def _norm(t: Tensor) -> float:
    return float(t.detach().double().norm())


def _upstream(out: Tensor, generator: torch.Generator) -> Tensor:
    """Random, the same for every run of a seed, exact in every dtype, and laid out as `out` is."""
    return torch.empty_like(out).copy_(torch.randn(out.shape, generator=generator).to(torch.bfloat16))


def _double(_: str, t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def map_inputs(given: Inputs, change: Callable[[str, Tensor], Tensor]) -> Inputs:
    """`given` with every tensor changed; the name is "" for a lone tensor, else " 1", " 1 0" in a list, " of mask"."""

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [changed(f"{name} {i}", v) for i, v in enumerate(value)]
        return change(name, value) if isinstance(value, Tensor) else value

    if isinstance(given, Tensor):
        return change("", given)
    if isinstance(given, Mapping):
        return {k: changed(f" of {k}", v) for k, v in given.items()}
    return tuple(changed(f" {i}", v) for i, v in enumerate(given))


def call(module: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def _outputs(module: nn.Module, out: Any) -> dict[str, Tensor]:
    """Every floating tensor that `module` returned, by its place there. Raises TypeError if there is none."""
    found = {"output" + place: t for place, t in _tensors(out)}
    if not found:
        raise TypeError(
            f"{type(module).__name__} returned {type(out).__name__}; accepted: a floating tensor, or a tuple, list, "
            "mapping or dataclass that holds one"
        )
    return found


def _tensors(out: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield "", out
        return
    items: list[tuple[str, Any]] = []
    if isinstance(out, Mapping):
        items = [(f"[{key!r}]", value) for key, value in out.items()]
    elif isinstance(out, (tuple, list)):
        items = [(f"[{i}]", value) for i, value in enumerate(out)]
    elif is_dataclass(out):
        items = [(f".{field.name}", getattr(out, field.name)) for field in fields(out)]
    for place, value in items:
        yield from ((place + inner, t) for inner, t in _tensors(value))


def _straightened(module: nn.Module) -> nn.Module | None:
    """A copy of a block, or stem, with nn.Identity in place of its activations and pooling; None where it has its own.

    An adapter names the activations; one that is no child of the block cannot be replaced.
    """
    if isinstance(module, Stem):
        model = _straightened(module.model)
        if model is None:
            return None
        model.maxpool = nn.Identity()
        return Stem(model)
    adapter = adapters.find(module._fused_from if isinstance(module, FusedModule) else type(module))
    if adapter is None:
        return None
    module = copy.deepcopy(module)
    acts = [stage.act for stage in stages_of(adapter(module)) if stage.act is not None]
    for name, child in list(module.named_children()):
        if any(child is act for act in acts):
            setattr(module, name, nn.Identity())
    try:
        stages = stages_of(adapter(module))
    except NotFusable:  # a layer on its own, which is worth fusing with its activation only
        return None
    curved = [stage for stage in stages if not (stage.act is None or type(stage.act) is nn.Identity)]
    own = [stage for stage in stages if type(getattr(stage.norm, "act", None)) not in (type(None), nn.Identity)]
    return None if curved or own else module


@contextlib.contextmanager
def capture(model: nn.Module, names: list[str], inputs: dict[str, Inputs]) -> Iterator[nn.Module]:
    """A copy of `model` that notes the inputs of each named submodule, in its first run only."""
    watched = copy.deepcopy(model)

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in inputs:
                given = args or (next(iter(kwargs.values())),)
                lone = len(given) == 1 and isinstance(given[0], Tensor)
                inputs[name] = map_inputs(given[0] if lone else given, lambda _, t: t.detach().clone())

        return hook

    for name in names:
        watched.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
    yield watched


class Stem(nn.Module):
    """What a ResNet computes before layer1, which is part of the model's own forward: run until there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        def leave(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _Reached(args[0])

        hook = self.model.get_submodule("layer1").register_forward_pre_hook(leave)
        try:
            self.model(*args, **kwargs)
        except _Reached as reached:
            return reached.stem
        finally:
            hook.remove()
        raise RuntimeError(f"{type(self.model).__name__} never called its layer1")


class _Reached(Exception):  # noqa: N818 - it carries a result, not an error
    def __init__(self, stem: Tensor) -> None:
        super().__init__()
        self.stem = stem
