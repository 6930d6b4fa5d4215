"""The network that the trials run, its batches, and one step of training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models

Bits = list[Tensor]


def network(fused: bool = True) -> nn.Module:
    """A stem with pooling, basic blocks and bottlenecks, with projections and without."""
    torch.manual_seed(0)
    net = models.ResNet(models.Bottleneck, [2, 1, 1, 1], width=16, num_classes=10)
    net.to(memory_format=torch.channels_last)
    return resnet_fused.fuse(net) if fused else net


def batch(images: int = 2, size: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, size, size, generator=generator).to(memory_format=torch.channels_last)


def step(net: nn.Module, x: Tensor) -> Bits:
    """The output, every gradient and every buffer after forward and backward in the network's mode."""
    net.zero_grad(set_to_none=True)
    out = net(x)
    out.square().mean().backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return [out.detach(), *gradients, *(b.clone() for b in net.buffers())]


def differing(a: Bits, b: Bits) -> int:
    """How many tensors are not the same to the last bit."""
    return abs(len(a) - len(b)) + sum(not torch.equal(x, y) for x, y in zip(a, b, strict=False))
