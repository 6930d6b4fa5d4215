"""The C++ backend: csrc/cpu for CPU tensors, csrc/cuda for CUDA tensors where the extension was built with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from resnet_fused.backends import folding, how, measured, prepared
from resnet_fused.backends.how import How, Way
from resnet_fused.ops import autograd, operators
from resnet_fused.ops.operators import Tensors
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec
from resnet_fused.spec.facts import Needs

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_ARCHITECTURE = 80  # compute capability 8.0


class NativeBackend:
    name = "native"

    def unavailable(self) -> str | None:
        return operators.load_error()

    def unsupported(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
        if x.device.type == "cpu":
            return None
        padding = how.refuses_padding("the native backend's CUDA kernels", spec)
        return refuses(x) or padding or _too_large(x, params, spec)

    def declines(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
        if x.device.type == "cpu":
            return None
        weights = [p.weight for p in params.convs]
        return measured.declines("native", measured.lookup(spec, x, weights, autograd.trains(spec, x, params)))

    def ways(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> list[Way]:
        if x.device.type == "cpu":
            return []
        return how.ways(
            [p.weight for p in params.convs], always=_always_library([p.weight for p in params.convs], spec)
        )

    def forward(self, spec: BlockSpec, tensors: Tensors, needs: Needs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return operators.residual_block_forward(spec, tensors, needs, how=_how_of(spec, tensors))

    def backward(
        self,
        spec: BlockSpec,
        dout: Tensor,
        out: Tensor | None,
        conv_outputs: list[Tensor],
        batch_stats: list[Tensor],
        tensors: Tensors,
        needs: Needs,
        master: torch.dtype | None = None,
    ) -> Tensors:
        return operators.residual_block_backward(
            spec, dout, out, conv_outputs, batch_stats, tensors, needs, how=_how_of(spec, tensors), master=master
        )

    def infer(self, x: Tensor, params: BlockParams, spec: BlockSpec, residual: Tensor | None = None) -> Tensor | None:
        """residual: on the CPU, of x's dtype; added in place of a skip path."""
        if prepared.reason_against(x, params, spec) is None:
            return prepared.prepared(params, x, spec).run(x, residual)
        folded = folding.folded(params, x, spec)
        if not folded.finite:
            return None
        out = operators.residual_block_infer(
            x,
            folded.pre,
            folded.weights,
            folded.biases,
            folded.skip_scale,
            [p.slope for p in params.convs],
            spec,
            folded.branch_scale,
            how=_how(spec, x, folded.weights, train=False),
            residual=residual,
        )
        # the output's memory format follows from x's and the weight's, and a packed weight has lost its own
        return out.contiguous(memory_format=torch.channels_last) if folded.channels_last else out

    def infer_pooled(self, x: Tensor, params: BlockParams, spec: BlockSpec, pool: Sequence[int]) -> Tensor | None:
        """`infer` and max pooling (kernel, stride, padding) behind it, where the engine has both; else None."""
        if prepared.reason_against(x, params, spec) is not None:
            return None
        return prepared.prepared(params, x, spec, pool).run(x)


def refuses(x: Tensor) -> str | None:
    """Why no native kernel takes a tensor of this device and dtype, or None."""
    if x.device.type == "cpu":
        return None
    reason = _why_not_on(x.device)
    if reason is None and x.dtype not in CUDA_DTYPES:
        return f"the native backend's CUDA kernels compute in float32 and narrower, x is {x.dtype}"
    return reason


def why_not_on_gpu(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on this device, or None."""
    if operators.load_error() is not None:
        return operators.load_error()
    if device.type != "cuda":
        return f"the native backend's CUDA kernels run on CUDA tensors, x is on {device}"
    built = operators.build_info()
    if built["cuda"] == "no":
        return (
            "the C++ extension was built without CUDA kernels: with nvcc 12.1 or newer in CUDA_HOME or on PATH, run "
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
    """built: as in "80, 90 + PTX". Code runs on its generation's GPUs from its own number on, PTX on all newer GPUs."""
    codes = [int(code) for code in re.findall(r"\d+", built)]
    return any(code // 10 == arch // 10 and code <= arch for code in codes) or ("PTX" in built and max(codes) <= arch)


@torch.compiler.assume_constant_result
def _why_not_on(device: torch.device) -> str | None:
    return _known(device)


@lru_cache(maxsize=64)
def _known(device: torch.device) -> str | None:
    return why_not_on_gpu(device)


def _too_large(x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
    """What csrc/cuda/plan/limits.h says of every convolution."""
    if torch.compiler.is_compiling():  # where sizes may be symbolic; the operator itself refuses
        return None
    batch, _, *given = x.shape
    size = given
    for i, (stage, tensors) in enumerate(zip(spec.convs, params.convs, strict=True)):
        if i == len(spec.stages):
            size = given
        kernel = (tensors.weight.shape[2], tensors.weight.shape[3])
        out = stage.output_size((size[0], size[1]), kernel)
        channels = max(tensors.weight.shape[0], tensors.weight.shape[1] * stage.groups)
        reason = operators.too_large_for_cuda(batch, channels, size, out, stage)
        if reason is not None:
            return reason
        size = list(out)
    return None


def _always_library(weights: Sequence[Tensor], spec: BlockSpec) -> frozenset[int]:
    """The convolutions that csrc/cuda has no kernel for, and leaves to the library without being told."""
    return frozenset(
        i
        for i, (stage, w) in enumerate(zip(spec.convs, weights, strict=True))
        if not operators.has_cuda_kernel(w.shape[0], w.shape[1], stage.groups)
    )


def _how_of(spec: BlockSpec, tensors: Tensors) -> How:
    assert tensors.x is not None
    return _how(spec, tensors.x, [w for w in tensors.weights if w is not None])


def _how(spec: BlockSpec, x: Tensor, weights: Sequence[Tensor], train: bool = True) -> How:
    """How the kernels are to run, for the same x and weights the same in both directions of training."""
    if x.device.type == "cpu":
        return how.CHOSEN
    wish = measured.wish("native", measured.lookup(spec, x, weights, train))
    return how.choose(wish, spec, x, weights)
