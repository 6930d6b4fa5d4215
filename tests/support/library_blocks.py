"""Blocks of timm and torchvision as the tests train them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """The block within a model, whose norms are away from one and zero."""
    torch.manual_seed(0)
    block = make()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # whose random numbers would follow those of another order of calls
    return nn.Sequential(block)
