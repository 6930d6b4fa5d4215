"""What is timed: a pass between convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from gpu_bench.clock import Step
from gpu_bench.contestants import COMPILED, PASS, compiled
from gpu_bench.pass_shape import PassShape
from gpu_bench.setting import DTYPE, LAST, Setting
from torch import Tensor, nn

from resnet_fused import functional


class PassWork:
    """act(bn(x) + residual) in bfloat16, channels_last, the norm in float32."""

    def __init__(self, shape: PassShape, batch: int, setting: Setting) -> None:
        torch.manual_seed(0)
        self.bn = nn.BatchNorm2d(shape.channels, device=setting.device)

        def activation() -> Tensor:
            t = torch.randn(batch, shape.channels, *shape.size, device=setting.device)
            return t.to(DTYPE).contiguous(memory_format=LAST)

        self.x, self.dout, self.dry = activation().requires_grad_(), activation(), setting.dry
        self.residual = activation().requires_grad_() if shape.residual else None

    def step(self, contestant: str, direction: str) -> Step:
        self.bn.train(direction != "evaluation")
        x, bn, residual = self.x, self.bn, self.residual

        def plain() -> Tensor:
            y = bn(x)
            return F.relu(y if residual is None else y + residual)

        def fused() -> Tensor:
            return functional.batch_norm_act(x, bn, residual=residual, backend="native")

        call = fused if contestant == PASS else plain
        if contestant in COMPILED:
            call = compiled(plain, contestant, self.dry)
        if direction == "evaluation":
            return torch.no_grad()(call)
        if direction == "forward":
            return call
        leaves = [t for t in (x, residual, *bn.parameters()) if t is not None]
        return lambda: torch.autograd.grad(call(), leaves, self.dout)
