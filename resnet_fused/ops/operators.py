"""The operators of the C++ extension, ``torch.ops.resnet_fused.*``: loading, typed calls, fake kernels.

The schemas are in csrc/ops/operators.h, in the order of `spec.tensors.BlockTensors`. The operators are functional:
nothing is written in place, no output aliases an input.

conv_outputs: the y_i that backward needs and cannot recompute cheaply, see `spec.facts` (saved).
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

from resnet_fused.backends.how import CHOSEN, How
from resnet_fused.errors import BackendError
from resnet_fused.ops.encoding import decode, encode
from resnet_fused.spec import BlockSpec, StageSpec
from resnet_fused.spec.facts import Needs
from resnet_fused.spec.tensors import BlockTensors, convolution_places

Tensors = BlockTensors[Tensor | None]
# Overloads: csrc's kernels for the tensors' device; csrc/cuda's, which also take CPU tensors for the tests' emulator;
# or those that backends/triton.py registers.
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
    spec: BlockSpec, tensors: Tensors, needs: Needs, kernels: Kernels = "default", how: How = CHOSEN
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(out, conv_outputs, batch_stats).

    needs: the tensors whose gradients backward will give; conv_outputs depend on it.
    how:   how kernels for a GPU run.
    """
    require()
    return _overload("residual_block_forward", kernels)(*tensors.arguments, *encode(spec, needs, how))


def residual_block_backward(
    spec: BlockSpec,
    dout: Tensor,
    out: Tensor | None,
    conv_outputs: Sequence[Tensor],
    batch_stats: Sequence[Tensor],
    tensors: Tensors,
    needs: Needs,
    kernels: Kernels = "default",
    how: How = CHOSEN,
    master: torch.dtype | None = None,
) -> Tensors:
    """The gradient of each of `tensors`, None where `needs` is false (running statistics never need one).

    out: forward's, where `facts(spec).join` is "output"; else it may be None. needs: as forward was given them.
    master: the dtype of the gradients of convolutions' weights and biases; None: theirs.
    """
    require()
    wanted = needs.flat
    grads = iter(
        _overload("residual_block_backward", kernels)(
            dout,
            out,
            list(conv_outputs),
            list(batch_stats),
            *tensors.arguments,
            wanted,
            *encode(spec, needs, how),
            master=master,
        )
    )
    return BlockTensors.of([next(grads) if need else None for need in wanted])


def residual_block_infer(
    x: Tensor,
    pre: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    skip_scale: Tensor | None,
    slopes: Sequence[Tensor | None],
    spec: BlockSpec,
    branch_scale: Tensor | None = None,
    kernels: Kernels = "default",
    how: How = CHOSEN,
    residual: Tensor | None = None,
) -> Tensor:
    """The block with its normalisations folded into `weights` and `biases`.

    pre:          scale and shift [C] of the normalisation that precedes the first convolution, in pre-activation order.
    branch_scale: where an activation stands before it, which keeps it from being folded.
    slopes:       of activations that learn one, in the order of `BlockSpec.convs`.
    residual:     added in place of a skip path, as the block's result in shape and x's dtype; "default" kernels only.
    """
    require()
    a, b = pre if pre is not None else (None, None)
    operator = _overload("residual_block_infer", kernels)
    scales = branch_scale, skip_scale
    return operator(x, a, b, list(weights), list(biases), *scales, list(slopes), residual, *encode(spec, None, how))


def residual_block_prepared(x: Tensor, block: Any, residual: Tensor | None = None) -> Tensor | None:
    """The block as `backends.prepared` made it ready; residual: added in place of a skip path.

    None where PyTorch has to compute it: the input of a grouped convolution, or of one with padded channels, is not
    finite.
    """
    require()
    return torch.ops.resnet_fused.residual_block_prepared.default(x, block, residual)


def residual_blocks_prepared(x: Tensor, blocks: Any) -> tuple[Tensor, int]:
    """What the first of several blocks (a torch.classes.resnet_fused.PreparedBlocks) compute one after the other, and
    how many they are: fewer than all where the next one would answer `residual_block_prepared` with None. A head counts
    as one.
    """
    require()
    return torch.ops.resnet_fused.residual_blocks_prepared.default(x, blocks)


def engine_reason_against(spec: BlockSpec, weights: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """Why the CPU's own engine has no kernels for such a block, or None (csrc/cpu/engine/prepared_block.h)."""
    if _C is None:
        return _load_error
    return _C.engine_reason_against(*encode(spec), [list(w.shape) for w in weights], dtype)


def engine_faster_elsewhere(spec: BlockSpec, weights: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """Why oneDNN's convolutions run such a block faster than the engine's on this machine, or None."""
    return _C.engine_faster_elsewhere(*encode(spec), [list(w.shape) for w in weights], dtype)


def engine_reasons_against_training(
    spec: BlockSpec, weights: Sequence[Tensor], dtype: torch.dtype
) -> list[list[str | None]]:
    """Why the CPU's own engine does not compute these in a training step, or None where it does: of each convolution
    forward, the data gradient and the weight gradient (csrc/cpu/engine/training.h, weight_gradient.h).
    """
    require()
    return _C.engine_reasons_against_training(*encode(spec), list(weights), dtype)


def max_pool2d(x: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """(maxima, their positions within the window as uint8)."""
    require()
    return torch.ops.resnet_fused.max_pool2d(x, kernel_size, stride, padding)


def max_pool2d_backward(
    dout: Tensor, positions: Tensor, height: int, width: int, kernel_size: int, stride: int, padding: int
) -> Tensor:
    require()
    return torch.ops.resnet_fused.max_pool2d_backward(dout, positions, height, width, kernel_size, stride, padding)


def unchanged(snapshot: tuple[Any, ...]) -> bool:
    """`module_state.unchanged`; False without the extension."""
    return _C is not None and _C.unchanged(snapshot)


def fingerprint(tensors: Sequence[Tensor], reads: Literal["metadata", "samples", "everything"]) -> int | None:
    """A hash that changes when tensors change (csrc/python/fingerprint.h); None: it cannot be computed."""
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


def too_large_for_cuda(
    batch: int, channels: int, size: Sequence[int], out: Sequence[int], stage: StageSpec
) -> str | None:
    """Why csrc/cuda cannot count the pixels and values of a convolution, or None; channels: the wider of its sides."""
    stride, padding, _ = stage.geometry
    reason = _C.too_large_for_cuda(batch, channels, list(size), list(out), list(stride), list(padding))
    return None if reason is None else f"the native backend's CUDA kernels {reason}"


def has_cuda_kernel(output_channels: int, channels_in_group: int, groups: int) -> bool:
    """Whether csrc/cuda has a kernel for such a convolution; otherwise the vendor's library runs it."""
    return _C is not None and _C.has_cuda_kernel(output_channels, channels_in_group, groups)


def has_post_ops(x: Tensor) -> bool:
    """Whether oneDNN runs convolutions of x (csrc/cpu/convolution.h)."""
    return _C is not None and _C.has_post_ops(x)


def widens(dtype: torch.dtype) -> bool:
    """Whether the CPU's convolutions outside the engine multiply this dtype as float32 (csrc/cpu/convolution.h)."""
    require()
    return _C.widens(dtype)


def few_pixels() -> int:
    """The number of pixels up to which small 1x1 convolutions are matrix products (csrc/cpu/convolution.h)."""
    return _C.FEW_PIXELS


def require() -> None:
    """Raises BackendError without the extension."""
    if _load_error is not None:
        raise BackendError(_load_error)


def _overload(name: str, kernels: Kernels) -> Callable[..., Any]:
    return getattr(getattr(torch.ops.resnet_fused, name), kernels)


# --- fakes: shapes, dtypes and strides of the real kernels -----------------------------------------------------------


def _conv_shapes(x: Tensor, weights: Sequence[Tensor], spec: BlockSpec) -> list[tuple[int, int, int, int]]:
    shapes, size = [], (x.shape[2], x.shape[3])
    for i, (stage, weight) in enumerate(zip(spec.convs, weights, strict=True)):
        source = (x.shape[2], x.shape[3]) if i == len(spec.stages) else size
        h, w = stage.output_size(source, (weight.shape[2], weight.shape[3]))
        size = (h, w)
        shapes.append((x.shape[0], weight.shape[0], h, w))
    return shapes


def output_shape(x: Tensor, weights: Sequence[Tensor], spec: BlockSpec) -> tuple[int, int, int, int]:
    """Of the block's result."""
    return _conv_shapes(x, weights, spec)[len(spec.stages) - 1]


def pooled(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """A tensor without values as max pooling of x gives it."""
    n, c, h, w = x.shape
    size = (n, c, *((length + 2 * padding - kernel_size) // stride + 1 for length in (h, w)))
    return x.new_empty(size).contiguous(memory_format=suggest_memory_format(x))


def _suggests_channels_last(t: Tensor) -> bool:
    if type(t) in (Tensor, torch.nn.Parameter):
        return _C.suggests_channels_last(t)
    return suggest_memory_format(t) == torch.channels_last  # of tensors without memory; 12 microseconds of Python


def result_format(x: Tensor, weights: Sequence[Tensor], spec: BlockSpec) -> torch.memory_format:
    """The memory format of a block's result, as PyTorch's own operations would give it (csrc/block/result_format.h)."""
    sizes = _conv_shapes(x, weights, spec)[: len(spec.stages)]
    last = _C.is_channels_last(
        [spec.order == "pre", _suggests_channels_last(x), int(x.shape[1])],
        [stage.processes for stage in spec.stages],
        [stage.padding_mode == "circular" for stage in spec.stages],
        [_suggests_channels_last(weight) for weight in weights],
        [int(width) for _, width, _, _ in sizes],
        [bool(h * w == 1) for _, _, h, w in sizes],
    )
    return torch.channels_last if last else torch.contiguous_format


def _register_fakes() -> None:
    def forward(x, branch, skip, weights, *rest):  # type: ignore[no-untyped-def]
        spec, facts = decode(*rest[-2:])
        shapes = _conv_shapes(x, weights, spec)
        out = x.new_empty(shapes[len(spec.stages) - 1]).contiguous(memory_format=result_format(x, weights, spec))
        saved = [x.new_empty(shapes[i]).contiguous(memory_format=torch.channels_last) for i in facts.saved]
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        widths = [x.shape[1], *(s[1] for s in shapes)] if spec.order == "pre" else [s[1] for s in shapes]
        stats = [
            x.new_empty((2, width), dtype=acc)
            for stage, width in zip(spec.convs, widths, strict=False)
            if stage.norm and stage.batch_stats
        ]
        return out, saved, stats

    def backward(dout, out, ys, stats, *rest, master=None):  # type: ignore[no-untyped-def]
        *tensors, needs, _, _ = rest
        inputs = [*tensors[:3], *(t for each in tensors[3:] for t in each)]
        keeps_format = BlockTensors.filled(False, len(tensors[3]))
        keeps_format.x, keeps_format.weights = True, [True] * len(tensors[3])
        convs = convolution_places(len(tensors[3]))
        grads = []
        for place, (t, need, keeps) in enumerate(zip(inputs, needs, keeps_format.flat, strict=True)):
            if need:
                grad = t.new_empty(t.shape, dtype=master if place in convs else None)
                grads.append(grad.contiguous(memory_format=suggest_memory_format(t)) if keeps else grad)
        return grads

    def infer(x, a, b, weights, *rest):  # type: ignore[no-untyped-def]
        spec, _ = decode(*rest[-2:])
        return x.new_empty(output_shape(x, weights, spec)).contiguous(memory_format=result_format(x, weights, spec))

    for name, fake in {"forward": forward, "backward": backward, "infer": infer}.items():
        for overload in ("", ".cuda", ".triton"):
            torch.library.register_fake(f"resnet_fused::residual_block_{name}{overload}", fake)

    @torch.library.register_fake("resnet_fused::max_pool2d")
    def _(x, kernel_size, stride, padding):  # type: ignore[no-untyped-def]
        out = pooled(x, kernel_size, stride, padding)
        return out, x.new_empty(out.shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)

    @torch.library.register_fake("resnet_fused::max_pool2d_backward")
    def _(dout, positions, height, width, kernel_size, stride, padding):  # type: ignore[no-untyped-def]
        dx = dout.new_empty((*dout.shape[:2], height, width))
        return dx.contiguous(memory_format=suggest_memory_format(dout))


if _load_error is None:
    _register_fakes()
