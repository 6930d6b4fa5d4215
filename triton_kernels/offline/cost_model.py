"""What ResNet-50's blocks cost by counting: products, bytes, and the floor these set on a chip; a prediction.

Fused counts come from the planner: meta tensors go through `resnet50.plan`, and each phase it lists names the tensors
that it reads and writes. Eager's come from the operations that torchvision's Bottleneck runs (`eager`). A floor is
max(bytes / bandwidth, flops / peak) of each phase or operation, added up, with the data-sheet rates of chips.py
(Williams et al. 2009, "Roofline"). The ratio of two floors is the speed-up if every kernel reached its floor.

Flops: 2 per multiply-add of the convolutions, taps in the padding included, and nothing else. Bytes: every phase counts
each operand that it reads once, as if a cache served repeated reads within a phase and kept nothing between phases; of
a strided convolution's source only the pixels that some tap meets count. Split-K partials of weight gradients count
twice, written and read. Not counted: tensors of a few values per channel (norms, biases, tables, partial sums),
launches, barriers, and the time of repeated reads from a cache. Float32 products are IEEE's on both sides, although
both take tf32 by default. The plan has every convolution in a phase; `policies.choose` leaves some to cuDNN, with
passes that move more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from resnet_fused.spec import IntPair
from resnet_fused.spec.facts import facts
from resnet_fused.tools.tables import table

from ..device.chained import Chained, ChainedConfig
from ..device.convolution import Convolution, ConvolutionConfig
from ..device.epilogue import BY_OUT, Epilogue, EpilogueConfig
from ..device.operands import GRADIENT, Operand
from ..device.pointwise import Pointwise
from ..device.weight_gradient import WeightGradient, WeightGradientConfig
from ..host.block import BlockPlan
from ..host.chips import CHIPS, Chip
from ..host.launch import Launch
from ..host.policies import Policy
from .resnet50 import DIRECTIONS, BlockShape, Direction, plan, resnet50

NOTE = """\
Predicted from counts; nothing was timed. A floor is max(bytes / bandwidth, flops / peak) of each fused phase or eager
operation, added up; the ratio, eager's floor / fused floor, is the speed-up if every kernel reached its floor.
network: stem and blocks, each as often as it occurs; max pool and head are left out. train: forward and backward."""


@dataclass(frozen=True)
class PhaseCost:
    """One fused phase, or one operation of eager."""

    name: str
    flops: int
    bytes: int

    def floor(self, chip: Chip, dtype: torch.dtype) -> float:
        """The seconds that a kernel takes at least, by the chip's data sheet."""
        return max(self.bytes / chip.bandwidth, self.flops / chip.peak(dtype))


@dataclass(frozen=True)
class BlockCost:
    """The phases and eager's operations of one direction of a block that occurs `count` times in the network."""

    name: str
    direction: str
    count: int
    fused: tuple[PhaseCost, ...]
    eager: tuple[PhaseCost, ...]

    @property
    def flops(self) -> int:
        return sum(phase.flops for phase in self.fused)

    def speedup(self, chip: Chip, dtype: torch.dtype) -> float:
        """The ratio of the floors: a prediction of the speed-up over eager."""
        return floor(self.eager, chip, dtype) / floor(self.fused, chip, dtype)


@dataclass(frozen=True)
class Prediction:
    """Every block of ResNet-50 in every direction, on one chip: its number of SMs decides the split-K partials."""

    chip: Chip
    batch: int
    dtype: torch.dtype
    blocks: tuple[BlockCost, ...]

    def network(self) -> list[BlockCost]:
        """The whole network without max pool and head: each direction, and training."""
        parts: dict[str, tuple[str, ...]] = {direction: (direction,) for direction in DIRECTIONS}
        parts["train"] = ("forward", "backward")
        rows = []
        for name, directions in parts.items():
            blocks = [block for block in self.blocks if block.direction in directions]
            fused = tuple(phase for block in blocks for phase in block.fused * block.count)
            eager = tuple(phase for block in blocks for phase in block.eager * block.count)
            rows.append(BlockCost("network", name, 1, fused, eager))
        return rows

    def table(self, per_phase: bool = False) -> str:
        title = f"{self.chip.name}, batch {self.batch}, {str(self.dtype).removeprefix('torch.')}: predicted floors"
        rows = [self._row(block) for block in (*self.blocks, *self.network())]
        header = ("block", "direction", "count", "GFLOP", "fused MB", "eager MB", "fused us", "eager us", "ratio")
        text = table(title, header, rows)
        if per_phase:
            rows = [row for block in self.blocks for row in self._phase_rows(block)]
            columns = ("block", "direction", "by", "phase", "GFLOP", "MB", "us", "bound by")
            text += "\n\n" + table(f"{title}, phase by phase", columns, rows)
        return text

    def to_dict(self) -> dict[str, Any]:
        """Bytes, flops and seconds: each block with its phases, and the network's sums."""
        return {
            "chip": self.chip.name,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "blocks": [self._entry(block, phases=True) for block in self.blocks],
            "network": [self._entry(block, phases=False) for block in self.network()],
        }

    def _row(self, block: BlockCost) -> list[str]:
        sides = (block.fused, block.eager)
        return [
            block.name,
            block.direction,
            str(block.count),
            f"{block.flops / 1e9:.1f}",
            *(f"{_total(side) / 1e6:.0f}" for side in sides),
            *(f"{floor(side, self.chip, self.dtype) * 1e6:.1f}" for side in sides),
            f"{block.speedup(self.chip, self.dtype):.2f}",
        ]

    def _phase_rows(self, block: BlockCost) -> Iterator[list[str]]:
        for by, side in (("fused", block.fused), ("eager", block.eager)):
            for phase in side:
                seconds = phase.floor(self.chip, self.dtype)
                yield [
                    block.name,
                    block.direction,
                    by,
                    phase.name,
                    f"{phase.flops / 1e9:.1f}",
                    f"{phase.bytes / 1e6:.1f}",
                    f"{seconds * 1e6:.1f}",
                    "products" if seconds > phase.bytes / self.chip.bandwidth else "bytes",
                ]

    def _entry(self, block: BlockCost, phases: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": block.name, "direction": block.direction, "count": block.count}
        entry |= {"flops": block.flops, "predicted_speedup": block.speedup(self.chip, self.dtype)}
        for by, side in (("fused", block.fused), ("eager", block.eager)):
            entry[by] = {"bytes": _total(side), "floor_seconds": floor(side, self.chip, self.dtype)}
            if phases:
                entry[by]["phases"] = [
                    asdict(phase) | {"floor_seconds": phase.floor(self.chip, self.dtype)} for phase in side
                ]
        return entry


def predict(chip: Chip, batch: int, dtype: torch.dtype) -> Prediction:
    if batch < 1:
        raise ValueError(f"a batch has at least one image, got {batch}")
    blocks = []
    for shape, direction in product(resnet50(), DIRECTIONS):
        phases = fused(shape, direction, batch, dtype, chip)
        blocks.append(BlockCost(shape.name, direction, shape.count, phases, eager(shape, direction, batch, dtype)))
    return Prediction(chip, batch, dtype, tuple(blocks))


def floor(phases: Iterable[PhaseCost], chip: Chip, dtype: torch.dtype) -> float:
    """Seconds, the phases one after another without overlap."""
    return sum(phase.floor(chip, dtype) for phase in phases)


# --- fused -----------------------------------------------------------------------------------------------------------


def fused(shape: BlockShape, direction: Direction, batch: int, dtype: torch.dtype, chip: Chip) -> tuple[PhaseCost, ...]:
    """The phases that the planner lists, with no convolution left to the vendor's library."""
    launches: list[Launch] = []
    plan(shape, direction, batch, dtype, Policy(chip, "phased", frozenset(), launches.append))
    return tuple(phase_cost(launch) for launch in launches)


def phase_cost(launch: Launch) -> PhaseCost:
    """Of a launch with one phase, as "phased" plans have it."""
    (name,), ((arguments,), _, _, (config,), _) = launch.names, launch.arguments
    flops, size = 0, 0
    if isinstance(arguments, Convolution):
        flops, size = _convolution(arguments, config)
    elif isinstance(arguments, WeightGradient):
        flops, size = _weight_gradient(arguments, config)
    elif isinstance(arguments, Chained):
        flops, size = _chained(arguments, config)
    elif isinstance(arguments, Pointwise):
        size = _operand(arguments.source, config.source) + _epilogue(arguments.epilogue, config.epilogue)
    return PhaseCost(name, flops, size)


def _convolution(args: Convolution, config: ConvolutionConfig) -> tuple[int, int]:
    """(flops, bytes). A data gradient has its convolution's multiplications: only the taps that meet the grid."""
    source, result = (args.source_height, args.source_width), (args.height, args.width)
    outputs, met = result, _met(source, result, *_window(config))
    if config.transposed:
        outputs, met = source, source[0] * source[1]
    taps = config.kernel[0] * config.kernel[1]
    flops = 2 * args.batch * outputs[0] * outputs[1] * taps * args.groups * args.source_group * args.result_group
    read = _operand(args.source, config.source) * met // (source[0] * source[1])
    return flops, read + _size(args.weight) + _epilogue(args.epilogue, config.epilogue)


def _chained(args: Chained, config: ChainedConfig) -> tuple[int, int]:
    """(flops, bytes); the tensor between the two convolutions is not moved."""
    flops, size = _convolution(args.first, config.first)
    flops += 2 * args.first.batch * args.first.height * args.first.width * args.weight.numel()
    return flops, size + _size(args.weight) + _epilogue(args.epilogue, config.epilogue)


def _weight_gradient(args: WeightGradient, config: WeightGradientConfig) -> tuple[int, int]:
    """(flops, bytes)"""
    source, outputs = (args.source_height, args.source_width), (args.height, args.width)
    flops = 2 * args.batch * outputs[0] * outputs[1] * args.dweight.numel()
    read = _operand(args.source, config.source) * _met(source, outputs, *_window(config)) // (source[0] * source[1])
    partials = 0 if args.partials is None else 2 * _size(args.partials)
    return flops, _operand(args.dy, config.dy) + read + partials + _size(args.dweight)


def _epilogue(args: Epilogue, config: EpilogueConfig) -> int:
    """Bytes; `epilogue.apply` says which part reads what."""
    size = 0 if args.out is None else _size(args.out)
    if config.residual is not None:
        size += _operand(args.residual, config.residual)
    if config.mask == int(BY_OUT):
        size += _size(args.mask_by)
    if config.reads_y:
        size += _size(args.y.x)
    if config.reads_s:
        size += _size(args.s.x)
    return size


def _window(config: ConvolutionConfig | WeightGradientConfig) -> tuple[IntPair, IntPair, IntPair, IntPair]:
    return config.kernel, config.stride, config.padding, config.dilation


def _operand(operand: Operand, kind: int) -> int:
    """Bytes of the stored tensor and, where a gradient is made from it, of y."""
    return _size(operand.x) + (_size(operand.y) if kind == int(GRADIENT) and operand.y is not None else 0)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _total(phases: Iterable[PhaseCost]) -> int:
    """Bytes."""
    return sum(phase.bytes for phase in phases)


def _met(
    source: IntPair, result: IntPair, kernel: IntPair, stride: IntPair, padding: IntPair, dilation: IntPair
) -> int:
    """How many pixels of an image some tap meets: every fourth for a 1x1 convolution with stride 2."""
    count = 1
    for axis in range(2):
        starts = [i * stride[axis] - padding[axis] for i in range(result[axis])]
        met = {start + tap * dilation[axis] for start in starts for tap in range(kernel[axis])}
        count *= len(met & set(range(source[axis])))
    return count


# --- eager -----------------------------------------------------------------------------------------------------------


def eager(shape: BlockShape, direction: Direction, batch: int, dtype: torch.dtype) -> tuple[PhaseCost, ...]:
    """What PyTorch runs for the block, as torchvision's Bottleneck is written. Bytes of each operation:

        operation                       reads               writes
        convolution                     x, w                y
        batch_norm, training            y, again y          z        the second time to normalise
        batch_norm, evaluation          y                   z
        relu, in place                  z                   z
        add, in place                   z, skip             z
        backward of relu                dz, out             dz       threshold_backward
        backward of batch_norm          y, dz, twice        dy       the second time for dy
        data gradient                   dy, w               dx
        weight gradient                 dy, x               dw       without the partials that cuDNN may write
        sum of the skip's gradients     two                 dx

    Operations are in the order of the forward pass, also the backward ones: sums do not depend on it.
    """
    # for its sizes; no plan is made
    block = BlockPlan(shape.spec, facts(shape.spec), shape.tensors(batch, dtype), Policy(CHIPS["a100"]))
    wants_dx = shape.name != "stem"  # as `plan` has it
    costs = []
    for conv, stage in enumerate(shape.spec.convs):
        name, weight, (h, w) = block.name(conv), block.weights[conv], block.input_size(conv)
        y, w_bytes = _size(block.new(conv)), _size(weight)
        flops = 2 * batch * block.sizes[conv][0] * block.sizes[conv][1] * weight.numel()
        pixel = batch * weight.shape[1] * stage.groups * weight.element_size()
        x = pixel * _met((h, w), block.sizes[conv], (weight.shape[2], weight.shape[3]), *stage.geometry)
        relu = conv < block.last
        if direction == "backward":
            costs.append(PhaseCost(f"{name}: batch_norm backward", 0, 5 * y))
            costs.append(PhaseCost(f"{name}: weight gradient", flops, y + x + w_bytes))
            if wants_dx or conv > 0:
                costs.append(PhaseCost(f"{name}: data gradient", flops, y + w_bytes + pixel * h * w))
            if relu:
                costs.append(PhaseCost(f"{name}: relu backward", 0, 3 * y))
        else:
            costs.append(PhaseCost(f"{name}: convolution", flops, x + w_bytes + y))
            costs.append(PhaseCost(f"{name}: batch_norm", 0, (3 if direction == "forward" else 2) * y))
            if relu:
                costs.append(PhaseCost(f"{name}: relu", 0, 2 * y))
    out, skip = _size(block.new(block.last)), shape.spec.skip != "none"
    if direction == "backward":
        costs.append(PhaseCost("relu backward", 0, 3 * out))
        if skip and wants_dx:
            costs.append(PhaseCost("sum of gradients", 0, 3 * _size(block.x)))
    else:
        if skip:
            costs.append(PhaseCost("add", 0, 3 * out))
        costs.append(PhaseCost("relu", 0, 2 * out))
    return tuple(costs)
