"""A block of one's own, fused: a ReZero residual x + alpha * F(x) with a learnable alpha (arXiv:2003.04887).

python examples/own_block.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import BlockModules, StageModules


class ReZeroBlock(nn.Module):
    """x + alpha * bn2(conv2(relu(bn1(conv1(x))))); alpha starts at 0, so that the block starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return x + self.alpha * self.bn2(self.conv2(y))


def describe(block: ReZeroBlock) -> BlockModules:
    """Which child plays which part; called at every forward, so that it sees the block as it is then."""
    stages = (
        StageModules(block.conv1, block.bn1, block.relu),
        StageModules(block.conv2, block.bn2, None),  # no activation after the sum
    )
    return BlockModules(stages, skip="identity", branch_scale=block.alpha)


def main() -> None:
    resnet_fused.register_block(ReZeroBlock, describe)
    torch.manual_seed(0)
    model = nn.Sequential(*(ReZeroBlock(32) for _ in range(4))).to(memory_format=torch.channels_last)
    resnet_fused.fuse(model)
    resnet_fused.explain(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 32, 28, 28).to(memory_format=torch.channels_last)
    for step in range(3):
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, 3)).square().mean()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}, alphas {[round(b.alpha.item(), 4) for b in model]}")


if __name__ == "__main__":
    main()
