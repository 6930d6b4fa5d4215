"""A block of one's own with squeeze-excitation (arXiv:1709.01507), fused by the five lines of `describe`.

python examples/squeeze_excitation.py

The branch is multiplied with a factor for each image and channel, which the block's own small layers compute from the
branch's mean over pixels. Fused, that mean comes out of the pass that gathers the last norm's statistics, and the pass
that adds the skip path takes the product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import BlockModules, StageModules


class SqueezeExcitationBlock(nn.Module):
    """relu(x + gate * bn2(conv2(relu(bn1(conv1(x)))))) with gate = sigmoid(up(relu(down(mean over pixels))))."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.down = nn.Linear(channels, channels // reduction)
        self.up = nn.Linear(channels // reduction, channels)

    def gate(self, pooled: Tensor) -> Tensor:
        """[N, C] -> [N, C]."""
        return torch.sigmoid(self.up(torch.relu(self.down(pooled))))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(x + self.gate(y.mean((2, 3)))[:, :, None, None] * y)


def describe(block: SqueezeExcitationBlock) -> BlockModules:
    """Which child plays which part."""
    first = StageModules(block.conv1, block.bn1, block.relu)
    second = StageModules(block.conv2, block.bn2, block.relu)
    return BlockModules((first, second), skip="identity", gate=block.gate)


def main() -> None:
    resnet_fused.register_block(SqueezeExcitationBlock, describe)
    torch.manual_seed(0)
    # in float64, where no rounding takes a value to the other side of ReLU's kink
    model = (
        nn.Sequential(*(SqueezeExcitationBlock(32) for _ in range(3))).double().to(memory_format=torch.channels_last)
    )
    x = torch.randn(8, 32, 28, 28).double().to(memory_format=torch.channels_last)
    for mode in (True, False):
        results = []
        for change in (resnet_fused.unfuse, resnet_fused.fuse):
            change(model.train(mode)).zero_grad()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.reset_running_stats()
            out = model(x)
            out.square().mean().backward()
            results.append((out.detach(), model[0].conv1.weight.grad.clone(), model[0].down.weight.grad.clone()))
        errors = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True)]
        print(
            f"{'training' if mode else 'evaluation'}: fused against eager, largest difference over largest value: "
            f"output {errors[0]:.1e}, a convolution's gradient {errors[1]:.1e}, the gate's {errors[2]:.1e}"
        )
    resnet_fused.explain(model)


if __name__ == "__main__":
    main()
