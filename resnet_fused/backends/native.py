"""The C++ backend: csrc/cpu for CPU tensors, csrc/cuda for CUDA tensors where the extension was built with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from resnet_fused import how, measured, operators
from resnet_fused.backends import folding
from resnet_fused.how import Way
from resnet_fused.operators import TensorList
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec, IntPair

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_ARCHITECTURE = 80  # compute capability 8.0
# What csrc/cuda/block.cpp counts with: 14 bits for a padded picture's rows, 31 for an image's values and all pixels.
LARGEST_PICTURE, LARGEST_IMAGE, LARGEST_BATCH = (1 << 14) - 1, 1 << 29, 1 << 30


class NativeBackend:
    name = "native"

    def unavailable(self) -> str | None:
        return operators.load_error()

    def unsupported(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
        if x.device.type == "cpu":
            return None
        reason = _why_not_on(x.device)
        if reason is not None:
            return reason
        if x.dtype not in CUDA_DTYPES:
            return f"the native backend's CUDA kernels compute in float32 and narrower, x is {x.dtype}"
        return _too_large(x, params, spec)

    def declines(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
        if x.device.type == "cpu":
            return None
        return measured.declines("native", measured.lookup(spec, x, [p.weight for p in params.convs]))

    def ways(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> list[Way]:
        if x.device.type == "cpu":
            return []
        return how.ways([p.weight for p in params.convs], always=how.grouped(spec))

    def forward(self, spec: BlockSpec, tensors: TensorList) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return operators.residual_block_forward(spec, tensors, how=_how(spec, *_x_and_weights(tensors)))

    def backward(
        self,
        spec: BlockSpec,
        dout: Tensor,
        out: Tensor | None,
        conv_outputs: list[Tensor],
        batch_stats: list[Tensor],
        tensors: TensorList,
        needs: list[bool],
    ) -> list[Tensor | None]:
        return operators.residual_block_backward(
            spec, dout, out, conv_outputs, batch_stats, tensors, needs, how=_how(spec, *_x_and_weights(tensors))
        )

    def infer(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
        folded = folding.folded(params, x, spec)
        out = operators.residual_block_infer(
            x, folded.pre, folded.weights, folded.biases, folded.skip_scale, spec, how=_how(spec, x, folded.weights)
        )
        # a packed weight has lost the memory format that, with x's, decides on the output's
        return out.contiguous(memory_format=torch.channels_last) if folded.channels_last else out


def why_not_on_gpu(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on this device, or None."""
    if operators.load_error() is not None:
        return operators.load_error()
    if device.type != "cuda":
        return f"the native backend runs on CPU and CUDA tensors, x is on {device}"
    built = operators.build_info()
    if built["cuda"] == "no":
        return (
            "the C++ extension was built without CUDA kernels: where nvcc 12.1 or newer is in CUDA_HOME or on PATH, run "
            "`pip install --no-build-isolation -e .` in the source folder again"
        )
    if not torch.cuda.is_available():
        return "the native backend's CUDA kernels need a CUDA device, torch sees none"
    major, minor = torch.cuda.get_device_capability(device)
    arch, archs = 10 * major + minor, built["cuda architectures"]
    if arch < OLDEST_ARCHITECTURE:
        return f"the native backend's CUDA kernels need sm_{OLDEST_ARCHITECTURE} or newer, this GPU is sm_{arch}"
    if not _runs_on(arch, archs):
        return (
            f"the C++ extension was built for the architectures {archs}, this GPU is sm_{arch}: build it again with "
            f"RESNET_FUSED_ARCHS={arch}"
        )
    return None


def _runs_on(arch: int, built: str) -> bool:
    """built: as in "80, 90 + PTX". Code runs within its generation on what is as new or newer, PTX on all of that."""
    codes = [int(code) for code in re.findall(r"\d+", built)]
    return any(code // 10 == arch // 10 and code <= arch for code in codes) or ("PTX" in built and max(codes) <= arch)


@torch.compiler.assume_constant_result
def _why_not_on(device: torch.device) -> str | None:
    return _known(device)


@cache
def _known(device: torch.device) -> str | None:
    return why_not_on_gpu(device)


def _too_large(x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
    """csrc/cuda/block.cpp says the same."""
    given: IntPair = (x.shape[2], x.shape[3])
    size = given
    for i, (stage, tensors) in enumerate(zip(spec.convs, params.convs, strict=True)):
        weight, source = tensors.weight, given if i == len(spec.stages) else size
        padding: IntPair = stage.geometry[1]
        size = stage.output_size(source, (weight.shape[2], weight.shape[3]))
        if max(source[0] + 2 * padding[0], source[1] + 2 * padding[1]) > LARGEST_PICTURE:
            return f"the native backend's CUDA kernels take up to {LARGEST_PICTURE} rows and columns with their padding"
        pixels = max(source[0] * source[1], size[0] * size[1])
        channels = max(weight.shape[0], weight.shape[1] * stage.groups)
        if pixels * channels > LARGEST_IMAGE or x.shape[0] * pixels > LARGEST_BATCH:
            return "the native backend's CUDA kernels count up to 2^29 values an image and 2^30 pixels a batch"
    return None


def _x_and_weights(tensors: TensorList) -> tuple[Tensor, list[Tensor]]:
    x, _, _, *flat = tensors
    assert x is not None
    return x, [weight for weight in flat[::6] if weight is not None]


def _how(spec: BlockSpec, x: Tensor, weights: Sequence[Tensor]) -> int:
    """How the kernels are to run, for the same x and weights the same in both directions."""
    return 0 if x.device.type == "cpu" else _encoded(measured.lookup(spec, x, weights))


@torch.compiler.assume_constant_result  # as `measured.declines`
def _encoded(key: measured.Key | None) -> int:
    return how.encode(measured.wish("native", key))
