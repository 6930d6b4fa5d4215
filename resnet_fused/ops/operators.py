"""The operators of the C++ extension, ``torch.ops.resnet_fused.*``: loading, typed calls, fake kernels.

Schemas stand in csrc/ops/operators.cpp. `tensors` is always `autograd.flatten`: (x, branch_scale, skip_scale), then
(weight, bias, norm_weight, norm_bias, running_mean, running_var) for each convolution of the spec. The operators are
functional: nothing is written in place, no output aliases an input.

conv_outputs: the y_i that backward needs and cannot have cheaply, see `saved_convs`.
batch_stats:  [2, C] (mean, biased variance), float32 (float64 for float64), for each norm with batch statistics.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from resnet_fused.errors import BackendError
from resnet_fused.spec import ACTIVATIONS, BlockSpec, StageSpec

TensorList = tuple[Tensor | None, ...]
# Overloads: csrc's kernels for the tensors' device; csrc/cuda's, for the tests' emulator on CPU tensors, too; or those
# that backends/triton.py registers.
Kernels = Literal["default", "cuda", "triton"]
BUILD = "in the source folder run `pip install --no-build-isolation -e .` with the torch that will run it"


def built_for_another(built_with: str | None, installed: str) -> str | None:
    """Why torch `installed` cannot load an extension built with torch `built_with` (None: unknown), or None.

    PyTorch keeps its C++ interface within a minor version only; its CPU and CUDA builds share it. Beyond that an import
    may fail over a symbol, or succeed and crash later.
    """
    if built_with is None or built_with.split(".")[:2] == installed.split(".")[:2]:
        return None
    return f"resnet_fused._C was built with torch {built_with}, and torch {installed} is installed; {BUILD}"


try:
    _built_with: str | None = importlib.import_module("resnet_fused._built_with").TORCH  # setup.py writes it
except ImportError:
    _built_with = None

_C: Any = None
_load_error = built_for_another(_built_with, torch.__version__)
if _load_error is None:
    try:
        from resnet_fused import _C  # type: ignore[attr-defined, no-redef]  # importing it registers the operators
    except ImportError as error:
        _load_error = f"the C++ extension resnet_fused._C is not built or does not load; {BUILD} (import said: {error})"


def load_error() -> str | None:
    """Why the extension is missing and how to build it, or None."""
    return _load_error


def build_info() -> dict[str, str]:
    """What the extension was built with and which instruction set it picked; raises BackendError without it."""
    require()
    return dict(_C.build_info())


def binary() -> Path | None:
    """The extension's file, or None."""
    return None if _C is None else Path(_C.__file__)


def residual_block_forward(
    spec: BlockSpec, tensors: TensorList, needs: Sequence[bool], kernels: Kernels = "default", how: int = 0
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(out, conv_outputs, batch_stats).

    needs: of which of `tensors` backward will give the gradient; it decides on conv_outputs.
    how:   see `BlockSpec.encode`.
    """
    require()
    return _overload("residual_block_forward", kernels)(*_lists(tensors), list(needs), *spec.encode(how))


def residual_block_backward(
    spec: BlockSpec,
    dout: Tensor,
    out: Tensor | None,
    conv_outputs: Sequence[Tensor],
    batch_stats: Sequence[Tensor],
    tensors: TensorList,
    needs: Sequence[bool],
    kernels: Kernels = "default",
    how: int = 0,
) -> list[Tensor | None]:
    """The gradient of every entry of `tensors`, None where `needs` is false (running statistics never need one).

    needs: as forward was given them.
    """
    require()
    needs = list(needs)
    grads = iter(
        _overload("residual_block_backward", kernels)(
            dout, out, list(conv_outputs), list(batch_stats), *_lists(tensors), needs, *spec.encode(how)
        )
    )
    return [next(grads) if need else None for need in needs]


def residual_block_infer(
    x: Tensor,
    pre: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    skip_scale: Tensor | None,
    spec: BlockSpec,
    kernels: Kernels = "default",
    how: int = 0,
) -> Tensor:
    """The block with its normalisations folded into `weights` and `biases`.

    pre: scale and shift [C] of the normalisation that precedes the first convolution, in pre-activation order.
    """
    require()
    ints, _ = spec.encode(how)
    a, b = pre if pre is not None else (None, None)
    operator = _overload("residual_block_infer", kernels)
    return operator(x, a, b, list(weights), list(biases), skip_scale, ints)


def max_pool2d(x: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """(maxima, their positions within the window as uint8)."""
    require()
    return torch.ops.resnet_fused.max_pool2d(x, kernel_size, stride, padding)


def max_pool2d_backward(
    dout: Tensor, positions: Tensor, height: int, width: int, kernel_size: int, stride: int, padding: int
) -> Tensor:
    require()
    return torch.ops.resnet_fused.max_pool2d_backward(dout, positions, height, width, kernel_size, stride, padding)


def saved_convs(spec: BlockSpec, needs: Sequence[bool]) -> list[int]:
    """Indices into `spec.convs` whose outputs are saved for backward (csrc/block/spec.h says the same).

    At the end of the block y is read by the gradient of a scale, and behind a norm by those of its gamma and beta and
    through the batch's statistics; without any of them dy is dz times a constant. memory="low" recomputes the last
    stage's and the projection's.

    needs: which gradients are wanted, in the order of `tensors`.
    """
    last = len(spec.stages) - 1
    saved = []
    for i, stage in enumerate(spec.convs):
        if i < last:
            saved.append(i)
        elif spec.memory == "default":
            through_norm = stage.norm and (stage.batch_stats or any(needs[5 + 6 * i : 7 + 6 * i]))
            masked_by_y = spec.skip == "none" and stage.act == "relu"
            if needs[1 if i == last else 2] or (spec.order == "post" and (through_norm or masked_by_y)):
                saved.append(i)
    return saved


def unchanged(snapshot: tuple[Any, ...]) -> bool:
    """`module_state.unchanged`; False without the extension."""
    return _C is not None and _C.unchanged(snapshot)


def fingerprint(tensors: Sequence[Tensor], reads: Literal["metadata", "samples", "everything"]) -> int | None:
    """A hash that tells whether tensors are as they were (csrc/python/fingerprint.h); None: nobody can tell."""
    return None if _C is None else _C.fingerprint(tensors, ("metadata", "samples", "everything").index(reads))


def update_running_stats(
    means: Sequence[Tensor | None],
    variances: Sequence[Tensor | None],
    counters: Sequence[Tensor | None],
    batch_stats: Sequence[Tensor],
    factors: Sequence[float],
    counts: Sequence[int],
) -> bool:
    """What `running_stats.update` does, in one call; False, with nothing written, where it cannot."""
    return _C is not None and _C.update_running_stats(means, variances, counters, batch_stats, factors, counts)


def require() -> None:
    """Raises BackendError without the extension."""
    if _load_error is not None:
        raise BackendError(_load_error)


def _overload(name: str, kernels: Kernels) -> Callable[..., Any]:
    return getattr(getattr(torch.ops.resnet_fused, name), kernels)


def _lists(tensors: TensorList) -> tuple[object, ...]:
    x, branch_scale, skip_scale, *flat = tensors
    return (x, branch_scale, skip_scale, *(flat[i::6] for i in range(6)))


# --- fakes: shapes, dtypes and strides of the real kernels -----------------------------------------------------------


def decode(ints: Sequence[int], eps: Sequence[float]) -> BlockSpec:
    """The inverse of `BlockSpec.encode`."""
    count, skip, pre, low, _ = ints[:5]
    stages = []
    for i in range(len(ints) // 9):
        sh, sw, ph, pw, dh, dw, groups, norm, act = ints[5 + 9 * i : 14 + 9 * i]
        each_eps = eps[i] if eps else 0.0
        stages.append(StageSpec((sh, sw), (ph, pw), (dh, dw), groups, norm > 0, norm == 2, each_eps, ACTIVATIONS[act]))
    return BlockSpec(
        tuple(stages[:count]),
        ("none", "identity", "projection")[skip],
        stages[count] if skip == 2 else None,
        "pre" if pre else "post",
        "low" if low else "default",
    )


def _conv_shapes(x: Tensor, weights: Sequence[Tensor], spec: BlockSpec) -> list[tuple[int, int, int, int]]:
    shapes, size = [], (x.shape[2], x.shape[3])
    for i, (stage, weight) in enumerate(zip(spec.convs, weights, strict=True)):
        source = (x.shape[2], x.shape[3]) if i == len(spec.stages) else size
        h, w = stage.output_size(source, (weight.shape[2], weight.shape[3]))
        size = (h, w)
        shapes.append((x.shape[0], weight.shape[0], h, w))
    return shapes


def output_format(x: Tensor, weights: Sequence[Tensor], spec: BlockSpec) -> torch.memory_format:
    """The memory format of a block's result, as PyTorch's own operations would give it one after another.

    A convolution's result is channels_last where its input or its weight is, but for a single pixel; a norm or an
    activation of a single channel forgets it (csrc/block/result_format.h says the same). PyTorch itself departs from this
    where x has one channel and is a slice.
    """
    last, channels = suggest_memory_format(x) == torch.channels_last, x.shape[1]
    for stage, weight, (_, width, h, w) in zip(spec.stages, weights, _conv_shapes(x, weights, spec), strict=False):
        passes = stage.norm or stage.act == "relu"
        if spec.order == "pre" and passes and channels == 1:
            last = False
        last, channels = last or suggest_memory_format(weight) == torch.channels_last, width
        if h * w == 1 or (spec.order == "post" and passes and channels == 1):
            last = False
    return torch.channels_last if last else torch.contiguous_format


def _register_fakes() -> None:
    def forward(x, branch, skip, weights, biases, gammas, betas, means, variances, needs, ints, eps):  # type: ignore[no-untyped-def]
        spec = decode(ints, eps)
        shapes = _conv_shapes(x, weights, spec)
        out = x.new_empty(shapes[len(spec.stages) - 1]).contiguous(memory_format=output_format(x, weights, spec))
        saved = [x.new_empty(shapes[i]).contiguous(memory_format=torch.channels_last) for i in saved_convs(spec, needs)]
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        widths = [x.shape[1], *(s[1] for s in shapes)] if spec.order == "pre" else [s[1] for s in shapes]
        stats = [
            x.new_empty((2, width), dtype=acc)
            for stage, width in zip(spec.convs, widths, strict=False)
            if stage.norm and stage.batch_stats
        ]
        return out, saved, stats

    def backward(  # type: ignore[no-untyped-def]
        dout, out, ys, stats, x, branch, skip, weights, biases, gammas, betas, means, variances, needs, ints, eps
    ):
        inputs = [x, branch, skip]
        for six in zip(weights, biases, gammas, betas, means, variances, strict=True):
            inputs += six
        grads = []
        for i, (t, need) in enumerate(zip(inputs, needs, strict=True)):
            if need and (i == 0 or (i >= 3 and (i - 3) % 6 == 0)):
                grads.append(t.new_empty(t.shape).contiguous(memory_format=suggest_memory_format(t)))
            elif need:
                grads.append(t.new_empty(t.shape))
        return grads

    def infer(x, a, b, weights, biases, skip_scale, ints):  # type: ignore[no-untyped-def]
        spec = decode(ints, [])
        shape = _conv_shapes(x, weights, spec)[len(spec.stages) - 1]
        return x.new_empty(shape).contiguous(memory_format=output_format(x, weights, spec))

    for name, fake in {"forward": forward, "backward": backward, "infer": infer}.items():
        for overload in ("", ".cuda", ".triton"):
            torch.library.register_fake(f"resnet_fused::residual_block_{name}{overload}", fake)  # type: ignore[arg-type]

    @torch.library.register_fake("resnet_fused::max_pool2d")
    def _(x, kernel_size, stride, padding):  # type: ignore[no-untyped-def]
        n, c, h, w = x.shape
        size = (n, c, *((length + 2 * padding - kernel_size) // stride + 1 for length in (h, w)))
        out = x.new_empty(size).contiguous(memory_format=suggest_memory_format(x))
        return out, x.new_empty(size, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)

    @torch.library.register_fake("resnet_fused::max_pool2d_backward")
    def _(dout, positions, height, width, kernel_size, stride, padding):  # type: ignore[no-untyped-def]
        dx = dout.new_empty((*dout.shape[:2], height, width))
        return dx.contiguous(memory_format=suggest_memory_format(dout))


if _load_error is None:
    _register_fakes()
