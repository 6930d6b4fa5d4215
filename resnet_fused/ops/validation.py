"""Checks before anything is computed: a bad call's error says what was given and what is accepted; nothing changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, bfloat16, dtype, float16, float32, float64

from resnet_fused.ops import operators
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import Activation, BlockSpec, IntPair, StageSpec
from resnet_fused.spec.batch_norm import BatchNorm

DTYPES = (float32, float64, bfloat16, float16)
Shape = tuple[int, int, int]  # channels, height, width


def check(x: Tensor, params: BlockParams, spec: BlockSpec, autocast: dtype | None = None) -> list[Shape]:
    """Hold x and params against spec; returns the (C, H, W) of every convolution's output, projection last.

    autocast: the dtype into which convolution weights narrower than float64 will be cast.

    Raises ValueError for shapes, devices and counts, TypeError for dtypes.
    """
    check_input(x)
    if len(params.convs) != len(spec.convs) or (params.projection is None) != (spec.projection is None):
        raise ValueError(
            f"params hold {len(params.stages)} stages {_with(params.projection)}, "
            f"the spec has {len(spec.stages)} {_with(spec.projection)}; give one StageParams for each StageSpec"
        )
    pre = spec.order == "pre"
    source: Shape = (x.shape[1], x.shape[2], x.shape[3])
    shapes: list[Shape] = []
    shape = source
    for i, (stage, tensors) in enumerate(zip(spec.stages, params.stages, strict=True)):
        out = _check_stage(f"stages[{i}]", x, shape, stage, tensors, autocast)
        _check_norm(f"stages[{i}]", x, shape if pre else out, stage, tensors)
        _check_slope(f"stages[{i}]", x, (shape if pre else out)[0], stage, tensors)
        shapes.append(out)
        shape = out
    if spec.projection is not None and params.projection is not None:
        out = _check_stage("projection", x, source, spec.projection, params.projection, autocast)
        _check_norm("projection", x, out, spec.projection, params.projection)
        shapes.append(out)
    if spec.skip != "none":
        skip = source if spec.skip == "identity" else shapes[-1]
        if skip != shape:
            raise ValueError(
                f"the skip path gives {_chw(skip)} but the branch gives {_chw(shape)}; they are added, so they must "
                "agree: use a projection, or change its stride or width"
            )
    elif isinstance(params.skip_scale, Tensor) or params.skip_scale != 1.0:
        raise ValueError(f"skip_scale is {params.skip_scale!r} but the spec has skip='none': leave it at 1.0")
    _check_scale("branch_scale", params.branch_scale, shape[0], x)
    _check_scale("skip_scale", params.skip_scale, shape[0], x)
    return shapes


@dataclass
class Checked:
    """What has passed `check_once` with one spec and these tensors: the counts, by input."""

    spec: BlockSpec
    metadata: int
    counts: dict[Any, list[int]] = field(default_factory=dict)


MOST_INPUTS = 64  # of different shapes, dtypes or devices


def check_once(x: Tensor, params: BlockParams, spec: BlockSpec, autocast: dtype | None) -> list[int]:
    """`check`, then `values_per_channel`; kept with params until the shape or dtype of x or of a parameter changes."""
    plain = type(x) is Tensor and not torch.compiler.is_compiling()  # a traced graph keeps nothing
    metadata = operators.fingerprint(params.tensors, "metadata") if plain else None
    if metadata is None:
        return values_per_channel(x, check(x, params, spec, autocast), spec)
    known: Checked | None = params.kept.checked
    if known is None or known.metadata != metadata or known.spec is not spec or len(known.counts) > MOST_INPUTS:
        known = params.kept.checked = Checked(spec, metadata)
    key = (x.shape, x.dtype, x.device, autocast)
    counts = known.counts.get(key)
    if counts is None:
        counts = known.counts[key] = values_per_channel(x, check(x, params, spec, autocast), spec)
    return counts


def values_per_channel(x: Tensor, shapes: list[Shape], spec: BlockSpec) -> list[int]:
    """How many values stand behind each batch statistic, for the stages with `batch_stats`, in order."""
    normed = [(x.shape[1], x.shape[2], x.shape[3]), *shapes] if spec.order == "pre" else shapes
    return [x.shape[0] * h * w for s, (_, h, w) in zip(spec.convs, normed, strict=False) if s.norm and s.batch_stats]


def check_pool(x: Tensor, kernel_size: int, stride: int, padding: int) -> None:
    """Raises ValueError or TypeError for an input or a window that `max_pool2d` does not take."""
    check_input(x)
    check_window(tuple(x.shape), kernel_size, stride, padding)


def check_window(shape: tuple[int, ...], kernel_size: int, stride: int, padding: int) -> None:
    """`check_pool` of an input [N, C, H, W] that is yet to be computed."""
    if not 1 <= kernel_size <= 15 or stride < 1 or not 0 <= padding <= kernel_size // 2:
        raise ValueError(
            f"got kernel_size={kernel_size}, stride={stride}, padding={padding}; accepted: a kernel of 1 to 15, "
            "a positive stride, padding of at most half the kernel"
        )
    if min(shape[2], shape[3]) + 2 * padding < kernel_size:
        raise ValueError(f"a {kernel_size}x{kernel_size} window does not fit the input {shape}")


def check_batch_norm_act(x: Tensor, norm: BatchNorm, residual: Tensor | None, act: Activation) -> None:
    """Raises ValueError or TypeError for what `batch_norm_act` does not take."""
    check_input(x)
    if act.kind.learned:
        raise ValueError(f"act is {act.name!r}, whose slope is learned; accepted: any other activation")
    if x.shape[1] != norm.channels:
        raise ValueError(f"x {tuple(x.shape)} has {x.shape[1]} channels, bn takes {norm.channels}")
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"residual must be a tensor or None, got {type(residual).__name__}")
        if residual.shape != x.shape:
            raise ValueError(f"residual is {tuple(residual.shape)}, x is {tuple(x.shape)}; they must be of one shape")
        if residual.dtype not in DTYPES:
            raise TypeError(f"residual is {residual.dtype}; accepted: {', '.join(map(str, DTYPES))}")
        if residual.device != x.device:
            raise ValueError(f"x is on {x.device} but residual is on {residual.device}; move one of them")
    if not 0 <= norm.eps < float("inf") or (norm.batch_stats and norm.eps == 0):
        raise ValueError(f"bn.eps is {norm.eps!r}; accepted: a finite number >= 0, in training > 0")
    if norm.batch_stats and norm.group is None and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(_one_value("bn", list(x.shape)))
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError("bn has only one of running_mean and running_var; accepted: both or neither")
    for part in ("weight", "bias", "running_mean", "running_var"):
        _check_vector(f"bn.{part}", getattr(norm, part), norm.channels, x)


def check_input(x: Tensor) -> None:
    """Raises TypeError or ValueError for an x that no block takes, whatever its parameters."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"x must be 4-d [N, C, H, W], got {x.dim()}-d {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; accepted: {', '.join(map(str, DTYPES))}")


def _check_stage(
    name: str, x: Tensor, shape: Shape, stage: StageSpec, tensors: StageParams, autocast: dtype | None
) -> Shape:
    weight, (channels, height, width) = tensors.weight, shape
    if weight.dim() != 4:
        raise ValueError(f"{name}.weight must be 4-d [C_out, C_in / groups, R, S], got {tuple(weight.shape)}")
    if weight.shape[1] * stage.groups != channels or weight.shape[0] % stage.groups:
        raise ValueError(
            f"{name} receives {channels} channels, but its weight {tuple(weight.shape)} with groups={stage.groups} "
            f"takes {weight.shape[1] * stage.groups} and gives {weight.shape[0]}"
        )
    if tensors.bias is not None and tensors.bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}.bias must be [{weight.shape[0]}], got {list(tensors.bias.shape)}")
    for part in (weight, tensors.bias):
        if part is not None and part.dtype != x.dtype and (autocast is None or part.dtype == float64):
            raise TypeError(
                f"x is {x.dtype} but the convolution of {name} is {part.dtype}; convert one of them, or run under "
                "torch.autocast"
            )
        if part is not None and part.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {part.device}; move one of them")
    kernel: IntPair = (weight.shape[2], weight.shape[3])
    _check_padding(name, (height, width), stage)
    h, w = stage.output_size((height, width), kernel)
    if h < 1 or w < 1:
        raise ValueError(
            f"{name}: a kernel of {kernel} (dilation {stage.dilation}, padding {stage.padding}) does not fit an input "
            f"of {height}x{width}"
        )
    return weight.shape[0], h, w


def _check_padding(name: str, size: IntPair, stage: StageSpec) -> None:
    """PyTorch's own limits: a border has no more rows than there are to be copied; a reflection leaves out the edge."""
    most = {"circular": size, "reflect": (size[0] - 1, size[1] - 1)}.get(stage.padding_mode)
    _, (height, width), _ = stage.geometry
    if most is not None and (height > most[0] or width > most[1]):
        raise ValueError(
            f"{name}: padding_mode={stage.padding_mode!r} takes at most {most} from an input of {size[0]}x{size[1]}, "
            f"got padding {stage.padding}"
        )


def _check_norm(name: str, x: Tensor, shape: Shape, stage: StageSpec, tensors: StageParams) -> None:
    if not stage.norm:
        return
    channels, height, width = shape
    shared = tensors.processes is not None and tensors.processes.group is not None  # all count together, later
    if stage.batch_stats and not shared and x.shape[0] * height * width == 1:
        raise ValueError(_one_value(name, [x.shape[0], channels, height, width]))
    if stage.batch_stats and stage.eps == 0:
        raise ValueError(f"the eps of {name} is 0 in training; accepted: a finite number > 0, or running statistics")
    if not stage.batch_stats and (tensors.running_mean is None or tensors.running_var is None):
        raise ValueError(f"{name} normalises with running statistics (batch_stats=False) but has none")
    for part in ("norm_weight", "norm_bias", "running_mean", "running_var"):
        _check_vector(f"{name}.{part}", getattr(tensors, part), channels, x)


def _check_vector(name: str, tensor: Tensor | None, channels: int, x: Tensor) -> None:
    """One of a norm's tensors."""
    if tensor is None:
        return
    accepted = (x.dtype, float32) if x.dtype in (bfloat16, float16) else (x.dtype,)
    if tensor.shape != (channels,):
        raise ValueError(f"{name} must be [{channels}], got {list(tensor.shape)}")
    if tensor.dtype not in accepted:
        raise TypeError(
            f"{name} is {tensor.dtype} for an input of {x.dtype}; accepted: {', '.join(map(str, accepted))}"
        )
    if tensor.device != x.device:
        raise ValueError(f"x is on {x.device} but {name} is on {tensor.device}; move one of them")


def _check_slope(name: str, x: Tensor, channels: int, stage: StageSpec, tensors: StageParams) -> None:
    slope, act = tensors.slope, stage.activation
    if (slope is not None) != act.kind.learned:
        given = "none" if slope is None else f"a slope {list(slope.shape)}"
        raise ValueError(
            f"the activation of {name} is {act.name!r} and params hold {given}; give a slope for prelu only"
        )
    if slope is None:
        return
    if slope.dim() != 1 or slope.numel() not in (1, channels):
        raise ValueError(f"{name}.slope must be [1] or [{channels}], got {list(slope.shape)}")
    if not slope.is_floating_point():
        raise TypeError(f"{name}.slope must be floating point, got {slope.dtype}")
    if slope.device != x.device:
        raise ValueError(f"x is on {x.device} but {name}.slope is on {slope.device}; move one of them")


def _one_value(name: str, size: list[int]) -> str:
    return (
        f"{name}: expected more than 1 value per channel when training, got input size {size}; use a larger batch or "
        "picture, or eval()"
    )


def _check_scale(name: str, scale: float | Tensor, channels: int, x: Tensor) -> None:
    if not isinstance(scale, Tensor):
        return
    if scale.numel() not in (1, channels) or max(scale.shape, default=1) != scale.numel():
        raise ValueError(f"{name} must hold one value or one per channel ({channels}), got {tuple(scale.shape)}")
    if not scale.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {scale.dtype}")
    if scale.device != x.device:
        raise ValueError(f"x is on {x.device} but {name} is on {scale.device}; move one of them")


def _with(projection: object) -> str:
    return "without a projection" if projection is None else "with a projection"


def _chw(shape: Shape) -> str:
    return "x".join(map(str, shape))
