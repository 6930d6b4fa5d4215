"""Stride, receptive field and alignment of every layer of a model, with skip paths merged.

The model runs once on an input of zeros while every operation is watched below autograd (TorchDispatchMode), so any
module that runs can be followed, and functional calls, too. Hooks give the names; because of them fused blocks run
their own forward here. Of each tensor and axis we keep the field of unit 0, [low, high] in input pixels, and the jump,
the distance of neighbouring units:

    convolution, pooling:  jump' = stride jump
                           low'  = low - padding jump
                           high' = high + (dilation (k - 1) - padding) jump
    addition and others:   low' = min, high' = max over the paths; their jumps have to be equal

The receptive field is high - low + 1 (Araujo et al., Distill 2019, doi 10.23915/distill.00021). A layer keeps the
picture's centre where it is if both sides are padded alike and no units are left over: it moves the grid's centre by

    (padding_after - padding_before - r) / 2 of its input's units,  r = (n + paddings - dilation (k - 1) - 1) mod stride
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused.analysis import panels
from resnet_fused.analysis.blocks import named
from resnet_fused.tools.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pair = tuple[int, int]
CLOSE = 1e-6  # pixels: sums of halves are exact in float64


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor's grid: unit i sees the pixels low + i jump ... high + i jump, and padding beyond."""

    size: int
    jump: float
    low: float
    high: float

    @property
    def field(self) -> int:
        return round(self.high - self.low) + 1

    @property
    def centre(self) -> float:
        """Of the whole grid, in pixels of the input, whose first is at 0."""
        return (self.low + self.high) / 2 + self.jump * (self.size - 1) / 2

    def unit(self, i: int) -> float:
        """The pixel that unit i is centred on."""
        return (self.low + self.high) / 2 + self.jump * i


Grid = tuple[Axis, Axis]  # height, width


@dataclass(frozen=True)
class Layer:
    """A convolution, pooling or padding that changes the grid; pairs are (height, width).

    shift:  how far this layer alone moves the grid's centre, in input pixels; offset: how far it is from the input's.
    fix:    what would keep the centre, "" where it is kept.
    torchscan: the receptive field (height) by torchscan's numbers, each call's own, chained in the order of the calls.
    """

    name: str
    kind: str
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    size: Pair
    jump: tuple[float, float]
    field: Pair
    shift: tuple[float, float]
    offset: tuple[float, float]
    fix: str
    torchscan: int | None = None


@dataclass(frozen=True)
class Meeting:
    """Paths that are joined with their centres apart, in input pixels."""

    name: str
    operation: str
    apart: tuple[float, float]


@dataclass(frozen=True)
class Geometry:
    """outputs: the grid of every module's last output that has one. notes: what was left out or could not be followed.

    aligned_size: a size near the given one at which every layer keeps the centre; None: none was found.
    """

    size: int
    layers: tuple[Layer, ...]
    meetings: tuple[Meeting, ...]
    notes: tuple[str, ...]
    aligned_size: int | None
    outputs: dict[str, Grid]

    @property
    def aligned(self) -> bool:
        return not self.meetings and all(max(map(abs, layer.shift)) < CLOSE for layer in self.layers)

    @property
    def stride(self) -> float:
        return max(max(layer.jump) for layer in self.layers)

    def output(self, name: str) -> Grid:
        """The grid of a module's output. Raises ValueError with near names."""
        return self.outputs[named(name, self.outputs, "layer with a grid")]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"aligned": self.aligned, "stride": self.stride}

    def table(self) -> str:
        scanned = any(layer.torchscan is not None for layer in self.layers)
        header = ["layer", "kind", "k, s, p, d", "size", "jump", "field", "shift px", "offset px"]
        rows = [
            [
                each.name,
                each.kind,
                ", ".join(_either(pair) for pair in (each.kernel, each.stride, each.padding, each.dilation)),
                *map(_either, (each.size, each.jump, each.field, each.shift, each.offset)),
                *([str(each.torchscan or "")] if scanned else []),
            ]
            for each in self.layers
        ]
        told = [table(f"Geometry at {self.size} x {self.size}", [*header, *(["torchscan"] if scanned else [])], rows)]
        shifted = [each for each in self.layers if each.fix]
        if shifted:
            told.append(f"{len(shifted)} layers move the centre of the picture:")
            for fix in dict.fromkeys(each.fix for each in shifted):
                moved = [f"{each.name} {_either(each.shift)} px" for each in shifted if each.fix == fix]
                told += [f"  {', '.join(moved)}", f"    instead: {fix}"]
            if self.aligned_size is not None:
                told.append(f"  or an input of {self.aligned_size} pixels, at which every layer keeps the centre")
        told += [
            f"{each.name} ({each.operation}) joins paths whose centres are {_either(each.apart)} px apart"
            for each in self.meetings
        ]
        differ = [each for each in self.layers if each.torchscan not in (None, each.field[0])]
        if differ:
            told.append(
                f"torchscan's numbers differ from {differ[0].name} on: it gives each call its own kernel and stride. "
                "Chained in the order of the calls, a projection's stride counts as if it lay behind the branch; in "
                "truth both leave from the block's input, and the field of their sum is the larger of the two"
            )
        return "\n".join([*told, *self.notes])


@torch.no_grad()
def geometry(model: nn.Module, size: int = 224, channels: int = 3, *, compare: bool = True) -> Geometry:
    """Follow a square input through the model, which runs in evaluation mode and is left as it was.

    compare: put torchscan's receptive fields beside, where it is installed.

    Raises ValueError for a model without a convolution or pooling, a size that is smaller than the model's total stride
    or that the model refuses, and paths of unequal strides that are joined.
    """
    found = _follow(model, size, channels)
    if max(max(layer.jump) for layer in found.layers) > size:
        worst = max(found.layers, key=lambda layer: max(layer.jump))
        raise ValueError(
            f"the input is {size} x {size}, smaller than the total stride {max(worst.jump):g} of {worst.name}; "
            f"accepted: {max(worst.jump):g} or more"
        )
    if not found.aligned:
        candidate = _candidate(size, round(found.stride))
        with contextlib.suppress(ValueError):
            if all(max(map(abs, layer.shift)) < CLOSE for layer in _follow(model, candidate, channels).layers):
                found = replace(found, aligned_size=candidate)
    if compare and (fields := _torchscan_fields(model, size, channels)):
        found = replace(found, layers=tuple(replace(layer, torchscan=fields.get(layer.name)) for layer in found.layers))
    return found


def figure(found: Geometry, title: str = "") -> Figure:
    """Receptive field and jump by layer, and how far each layer's centre is from the picture's."""
    drawn, (left, right) = panels.side_by_side(2, 5.6, 4.2, title)
    names, places = [layer.name for layer in found.layers], range(len(found.layers))
    left.plot(
        places,
        [layer.field[0] for layer in found.layers],
        "o-",
        markersize=3,
        color=panels.RESIDUAL,
        label="receptive field",
    )
    left.plot(
        places,
        [layer.jump[0] for layer in found.layers],
        "s-",
        markersize=3,
        color=panels.PLAIN,
        label="total stride (jump)",
    )
    if any(layer.torchscan for layer in found.layers):
        scanned = [(i, layer.torchscan) for i, layer in enumerate(found.layers) if layer.torchscan]
        left.plot(*zip(*scanned, strict=True), ":", color=panels.SOFT, label="torchscan, chained in call order")
    left.axhline(found.size, color=panels.SOFT, linewidth=0.8, linestyle="--", label=f"input, {found.size} px")
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:g}")
    left.set(ylabel="pixels of the input")
    left.legend(fontsize=8)
    right.bar(places, [layer.shift[0] for layer in found.layers], color=panels.PLAIN, label="this layer's shift")
    right.plot(
        places,
        [layer.offset[0] for layer in found.layers],
        "o-",
        markersize=3,
        color=panels.RESIDUAL,
        label="offset so far",
    )
    right.axhline(0, color=panels.SOFT, linewidth=0.8)
    right.set(ylabel="grid's centre less the input's, px")
    right.legend(fontsize=8)
    for axis in (left, right):
        panels.thin_labels(axis, names)
    return drawn


class _Window(NamedTuple):
    kind: str
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair


class _Follower(TorchDispatchMode):
    """Keeps the grid of every tensor that comes from the input; None for those whose grid is lost."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        axes = tuple(Axis(n, 1.0, 0.0, 0.0) for n in x.shape[2:])
        self.grids: dict[int, tuple[Tensor, Grid | None]] = {id(x): (x, axes)}  # type: ignore[dict-item]
        self.image = axes
        self.names: list[str] = [""]
        self.layers: list[Layer] = []
        self.meetings: list[Meeting] = []
        self.notes: list[str] = []
        self.gated: list[str] = []  # modules that multiply by, or add, what has no grid

    def grid(self, t: object) -> Grid | None:
        kept = self.grids.get(id(t))
        return None if kept is None else kept[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        out = result[0] if isinstance(result, (tuple, list)) and result else result
        given = [t for t in _tensors(args) if id(t) in self.grids]
        if isinstance(out, Tensor) and given:
            self.grids[id(out)] = out, self._next(func.overloadpacket._qualified_op_name, args, given, out)
        return result

    def _next(self, operation: str, args: Any, given: list[Tensor], out: Tensor) -> Grid | None:
        grids = [grid for t in given if (grid := self.grid(t)) is not None]
        if not grids:
            return None
        name, short = self.names[-1], operation.split("::")[-1]
        if short.endswith("pad_nd") or short in ("reflection_pad2d", "replication_pad2d"):
            return self._pad(name, short, list(args[1]), grids[0], out)
        window = _window(short, args)
        if window is not None:
            return self._slide(name, window, grids[0], out)
        sizes = {(grid[0].size, grid[1].size) for grid in grids}
        if out.ndim != 4 or sizes != {tuple(out.shape[2:])}:
            if not any(note.startswith("followed up to") for note in self.notes):
                self.notes.append(
                    f"followed up to {name or 'the model'} ({short}), whose output has no grid of its own"
                )
            return None
        if any(self.grid(t) is None for t in given):
            self.gated.append(name)
        return self._join(name, short, grids)

    def _slide(self, name: str, window: _Window, grid: Grid, out: Tensor) -> Grid:
        axes, shift = [], []
        for i, axis in enumerate(grid):
            k, s, p, d = (getattr(window, part)[i] for part in ("kernel", "stride", "padding", "dilation"))
            low, high = axis.low - p * axis.jump, axis.high + (d * (k - 1) - p) * axis.jump
            axes.append(Axis(out.shape[2 + i], s * axis.jump, low, high))
            shift.append(axes[i].centre - axis.centre)
        new = (axes[0], axes[1])
        if max(*window.kernel, *window.stride) > 1 or any(window.padding):
            self._record(name, window, new, (shift[0], shift[1]), _fix(window, grid, shift))
        return new

    def _pad(self, name: str, kind: str, pad: list[int], grid: Grid, out: Tensor) -> Grid:
        before = (pad[2] if len(pad) > 2 else 0, pad[0])
        axes = [
            replace(axis, size=out.shape[2 + i], low=axis.low - p * axis.jump, high=axis.high - p * axis.jump)
            for i, (axis, p) in enumerate(zip(grid, before, strict=True))
        ]
        new, shift = (axes[0], axes[1]), [axes[i].centre - grid[i].centre for i in (0, 1)]
        fix = "pad both sides alike, with an odd kernel behind it" if max(map(abs, shift)) > CLOSE else ""
        window = _Window("pad", (1, 1), (1, 1), before, (1, 1))
        self._record(name, window, new, (shift[0], shift[1]), fix)
        return new

    def _join(self, name: str, operation: str, grids: list[Grid]) -> Grid:
        joined, apart = [], []
        for axes in zip(*grids, strict=True):
            jumps = {axis.jump for axis in axes}
            if len(jumps) > 1:
                raise ValueError(
                    f"{name} ({operation}) joins paths with total strides "
                    f"{', '.join(f'{jump:g}' for jump in sorted(jumps))}; accepted: paths of one stride"
                )
            low, high = min(axis.low for axis in axes), max(axis.high for axis in axes)
            joined.append(replace(axes[0], low=low, high=high))
            centres = [axis.centre for axis in axes]
            apart.append(max(centres) - min(centres))
        if max(apart) > CLOSE:
            self.meetings.append(Meeting(name, operation, (apart[0], apart[1])))
        return joined[0], joined[1]

    def _record(self, name: str, window: _Window, grid: Grid, shift: tuple[float, float], fix: str) -> None:
        offset = tuple(axis.centre - image.centre for axis, image in zip(grid, self.image, strict=True))
        pairs = [(getattr(grid[0], part), getattr(grid[1], part)) for part in ("size", "jump", "field")]
        kind, *numbers = window
        self.layers.append(Layer(name, kind, *numbers, *pairs, shift, offset, fix))  # type: ignore[arg-type, call-arg]


def _window(operation: str, args: Any) -> _Window | None:
    if operation in ("convolution", "_convolution", "mkldnn_convolution"):
        if operation != "mkldnn_convolution" and args[6]:
            raise ValueError("the model has a transposed convolution; accepted: convolutions, pooling, padding")
        where = (3, 4, 5) if operation != "mkldnn_convolution" else (4, 3, 5)
        stride, padding, dilation = (_pair(args[i]) for i in where)
        return _Window("conv", _pair(list(args[1].shape[2:])), stride, padding, dilation)
    if operation in ("max_pool2d_with_indices", "max_pool2d", "mkldnn_max_pool2d", "avg_pool2d"):
        kernel = _pair(args[1])
        stride = _pair(args[2]) if len(args) > 2 and args[2] else kernel
        padding = _pair(args[3]) if len(args) > 3 else (0, 0)
        pool = operation != "avg_pool2d"
        dilation = _pair(args[4]) if pool and len(args) > 4 else (1, 1)
        return _Window("max pool" if pool else "mean pool", kernel, stride, padding, dilation)
    return None


def _fix(window: _Window, grid: Grid, shift: list[float]) -> str:
    """What would keep the centre where it is."""
    if max(map(abs, shift)) < CLOSE:
        return ""
    i = 0 if abs(shift[0]) > CLOSE else 1
    k, s, p, d = (getattr(window, part)[i] for part in ("kernel", "stride", "padding", "dilation"))
    n = grid[i].size
    if s == 1 or (n + 2 * p - k) % s != 1 or d != 1:
        return (
            f"an odd kernel, padded by d (k - 1) / 2 on both sides, on a size from which no unit is left over, not {n}"
        )
    blur = f"stride 1 and a blur of 4 taps, padded by 1 and 2, at stride {s}" if s == 2 else ""
    return f"a kernel of {k + 1} x {k + 1} with padding {p}, so that no unit is left over" + (
        f", or {blur}" if blur else ""
    )


def _candidate(size: int, stride: int) -> int:
    """The nearest size of the form 1 + a multiple of the stride: no odd kernel with even padding leaves units over."""
    lower = (size - 1) // stride * stride + 1
    return lower if lower >= stride and size - lower <= lower + stride - size else lower + stride


def _follow(model: nn.Module, size: int, channels: int) -> Geometry:
    parameter = next(model.parameters(), torch.zeros(()))
    x = torch.zeros(1, channels, size, size, dtype=parameter.dtype, device=parameter.device)
    follower = _Follower(x)
    outputs: dict[str, Grid] = {}
    with _named_calls(model, follower, outputs), follower:
        try:
            model(x)
        except RuntimeError as error:
            raise ValueError(
                f"the model refuses an input of {channels} x {size} x {size}: {str(error).splitlines()[0]}"
            ) from error
    if not follower.layers:
        raise ValueError(
            f"this {type(model).__name__} has no convolution or pooling of more than one pixel; accepted: a network "
            "that has one"
        )
    if follower.gated:
        follower.notes.append(
            "left out: a path without a grid, which sees the whole picture (squeeze and excitation, say), ends in "
            + ", ".join(dict.fromkeys(follower.gated))
        )
    return Geometry(size, tuple(follower.layers), tuple(follower.meetings), tuple(follower.notes), None, outputs)


@contextlib.contextmanager
def _named_calls(model: nn.Module, follower: _Follower, outputs: dict[str, Grid]) -> Iterator[None]:
    """Evaluation mode, and hooks on every module that tell the follower whose call it is in."""
    modes = [(module, module.training) for module in model.modules()]
    handles = []

    def enter(name: str) -> Any:
        return lambda module, inputs: follower.names.append(name)

    def leave(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            follower.names.pop()
            grid = follower.grid(output)
            if grid is not None:
                outputs[name] = grid

        return hook

    try:
        for name, module in model.named_modules():
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode


def _torchscan_fields(model: nn.Module, size: int, channels: int) -> dict[str, int]:
    """Receptive field behind each module's first call, chained in the order of the calls; empty without torchscan."""
    try:
        import torchscan
    except ImportError:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules that it does not know; they count as pointwise
        layers = torchscan.crawl_module(model, (channels, size, size))["layers"]
    fields: dict[str, int] = {}
    field, jump = 1.0, 1.0
    for layer in layers:
        metrics = layer["metrics"]
        values = [metrics.get(name, {}).get("value") for name in ("receptive_field", "effective_stride")]
        if None in values or len(layer["output"].get("shape", [])) != 4:
            continue
        kernel, stride = values
        field, jump = field + (kernel - 1) * jump, jump * stride
        fields.setdefault(layer["path"], round(field))
    return fields


def _tensors(args: Any) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def _pair(value: Any) -> Pair:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values[0], values[-1]


def _either(pair: tuple[float, float]) -> str:
    """One number where both axes agree."""
    first, second = (f"{value:g}" for value in pair)
    return first if first == second else f"{first}/{second}"
