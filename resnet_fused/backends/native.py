"""The C++ backend: csrc/cpu for CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused import operators
from resnet_fused.backends import folding
from resnet_fused.operators import TensorList
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec


class NativeBackend:
    name = "native"

    def unavailable(self) -> str | None:
        return operators.load_error()

    def unsupported(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
        if x.device.type != "cpu":
            return f"the native backend runs on CPU tensors, x is on {x.device}"
        return None

    def declines(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
        return None

    def forward(self, spec: BlockSpec, tensors: TensorList) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return operators.residual_block_forward(spec, tensors)

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
        return operators.residual_block_backward(spec, dout, out, conv_outputs, batch_stats, tensors, needs)

    def infer(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
        folded = folding.folded(params, x, spec)
        out = operators.residual_block_infer(x, folded.pre, folded.weights, folded.biases, folded.skip_scale, spec)
        # a packed weight has lost the memory format that, with x's, decides on the output's
        return out.contiguous(memory_format=torch.channels_last) if folded.channels_last else out
