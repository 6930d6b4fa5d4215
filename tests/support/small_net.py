"""A network of two blocks that takes no time, and a picture for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resnet_fused import models


def small_net() -> nn.Module:
    """Two blocks of 8 channels on small pictures; norms with values of their own."""
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(3, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    net = nn.Sequential(models.BasicBlock(3, 8, 2, downsample), models.BasicBlock(8, 8), nn.Flatten())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return net


def picture(size: int = 17) -> Tensor:
    """Of an odd size: at even ones oneDNN 3.12 by AVX2 computes a strided 1x1 weight's gradient out of bounds."""
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
