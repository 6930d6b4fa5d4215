"""Blocks as the tests train them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def made(make: Callable[[], nn.Module], *, drop: bool = False) -> nn.Module:
    """The block within a model, whose norms and slopes are away from one and zero.

    drop: keep dropout, whose random numbers follow the order of calls.
    """
    torch.manual_seed(0)
    block = make()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.4)
        if isinstance(module, nn.Dropout) and not drop:
            module.p = 0.0
    return nn.Sequential(block)
