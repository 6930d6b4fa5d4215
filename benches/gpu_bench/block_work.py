"""What is timed: one kind of block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_bench.clock import Step
from gpu_bench.contestants import COMPILED, FUSED, compiled, forced
from gpu_bench.setting import DTYPE, LAST, Setting
from torch import Tensor, nn

from resnet_fused import functional, models
from resnet_fused.modules import adapters
from resnet_fused.modules.block_modules import BlockModules, StageModules, describe
from resnet_fused.triton_kernels.offline import resnet50


class BlockWork:
    """One kind of block: bfloat16 channels_last, norms in float32."""

    def __init__(self, shape: resnet50.BlockShape, batch: int, setting: Setting) -> None:
        torch.manual_seed(0)
        module, self.parts = plain_block(shape)
        module.to(setting.device, DTYPE, memory_format=LAST)  # type: ignore[call-overload]
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.float()
        self.module, self.dry = module, setting.dry
        x = torch.randn(batch, shape.channels, *shape.size, device=setting.device).relu()  # it has passed a ReLU
        self.x = x.to(DTYPE).contiguous(memory_format=LAST).requires_grad_(shape.name != "stem")
        with torch.no_grad():
            self.dout = torch.randn_like(module(self.x))  # keeps the strides

    def step(self, contestant: str, direction: str) -> Step:
        self.module.train(direction != "evaluation")
        x, call = self.x, self._call(contestant)
        if direction == "evaluation":
            return torch.no_grad()(lambda: call(x))
        if direction == "forward":
            return lambda: call(x)
        leaves = [t for t in (x, *self.module.parameters()) if t.requires_grad]
        return lambda: torch.autograd.grad(call(x), leaves, self.dout)

    def _call(self, contestant: str) -> Callable[[Tensor], Tensor]:
        if contestant in COMPILED:
            return compiled(self.module, contestant, self.dry)
        if contestant not in FUSED:
            return self.module
        params, spec = describe(self.parts, "default")
        backend, mode, library = FUSED[contestant]

        def fused(x: Tensor) -> Tensor:
            with forced(mode, library):
                return functional.residual_block(x, params, spec, backend=backend)

        return fused


def plain_block(shape: resnet50.BlockShape) -> tuple[nn.Module, BlockModules]:
    """A block in plain PyTorch, and which child plays which part."""
    k, c, r = shape.convs[0]
    if shape.spec.skip == "none":
        (stage,) = shape.spec.stages
        conv = nn.Conv2d(c, k, r, stage.stride, stage.padding, bias=False)
        parts = (conv, nn.BatchNorm2d(k), nn.ReLU(inplace=True))
        return nn.Sequential(*parts), BlockModules((StageModules(*parts),), "none")
    stride, downsample = shape.spec.stages[1].stride, None
    if shape.spec.skip == "projection":
        out = shape.convs[-1][0]
        downsample = nn.Sequential(nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    block = models.Bottleneck(c, k, stride, downsample)  # type: ignore[arg-type]
    adapter = adapters.find(models.Bottleneck)
    assert adapter is not None
    return block, adapter(block)
