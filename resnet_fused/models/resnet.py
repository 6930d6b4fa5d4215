"""ResNet (arXiv:1512.03385, v1.5: stride on the 3x3), ResNeXt (arXiv:1611.05431), Wide ResNet (arXiv:1605.07146).

Plain PyTorch modules with torchvision's arguments and state names; the factories at the end fuse them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resnet_fused.modules.fuse import fuse
from resnet_fused.spec import Memory

NormLayer = Callable[[int], nn.Module]


class BasicBlock(nn.Module):
    """3x3, 3x3: [N, inplanes, H, W] -> [N, planes, H / stride, W / stride]."""

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if (groups, base_width, dilation) != (1, 64, 1):
            raise ValueError(
                f"BasicBlock has groups=1, base_width=64, dilation=1, got {groups}, {base_width}, {dilation}; "
                "use Bottleneck"
            )
        self.conv1 = _conv(inplanes, planes, 3, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1: [N, inplanes, H, W] -> [N, 4 * planes, H / stride, W / stride]."""

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        width = planes * base_width // 64 * groups
        self.conv1 = _conv(inplanes, width, 1)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv(width, width, 3, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv(width, planes * self.expansion, 1)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3


class ResNet(nn.Module):
    """[N, 3, H, W] -> [N, num_classes]; arguments as ``torchvision.models.ResNet``.

    layers: how many blocks each of the four layers has.
    zero_init_residual: let each block start as the identity (arXiv:1706.02677).
    replace_stride_with_dilation: for the last three layers, keep the resolution and dilate instead.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        dilate = (False, *(replace_stride_with_dilation or (False, False, False)))
        if len(layers) != 4 or len(dilate) != 4:
            raise ValueError(
                f"got layers={layers!r}, replace_stride_with_dilation={replace_stride_with_dilation!r}; "
                "accepted: four counts, and None or three bools"
            )
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        inplanes, dilation = 64, 1
        for i, count in enumerate(layers):
            planes, stride = 64 * 2**i, 1 if i == 0 else 2
            first_dilation = dilation
            if dilate[i]:
                dilation, stride = dilation * stride, 1
            outplanes = planes * block.expansion
            downsample = None
            if stride != 1 or inplanes != outplanes:
                downsample = nn.Sequential(_conv(inplanes, outplanes, 1, stride), norm_layer(outplanes))
            blocks = [block(inplanes, planes, stride, downsample, groups, width_per_group, first_dilation, norm_layer)]
            for _ in range(1, count):
                blocks.append(block(outplanes, planes, 1, None, groups, width_per_group, dilation, norm_layer))
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            inplanes = outplanes

        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        self._initialise(zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:  # torchvision's name; fusing replaces it
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)) and isinstance(module.last_norm.weight, Tensor):
                    nn.init.zeros_(module.last_norm.weight)


def _conv(inplanes: int, planes: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(inplanes, planes, kernel, stride, padding, dilation, groups, bias=False)


class Factory(Protocol):
    """Builds one member of the family; `kwargs` are `ResNet`'s, the rest is `resnet_fused.fuse`'s."""

    __name__: str

    def __call__(
        self, *, fused: bool = True, backend: str = "auto", memory: Memory = "default", **kwargs: Any
    ) -> ResNet: ...


def _factory(
    name: str, block: type[BasicBlock | Bottleneck], layers: tuple[int, int, int, int], **defaults: int
) -> Factory:
    def build(*, fused: bool = True, backend: str = "auto", memory: Memory = "default", **kwargs: Any) -> ResNet:
        model = ResNet(**{"block": block, "layers": layers} | defaults | kwargs)
        return fuse(model, backend=backend, memory=memory) if fused else model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name}, freshly initialised; `kwargs` as `ResNet`, the rest as `resnet_fused.fuse`."
    return build


resnet18 = _factory("resnet18", BasicBlock, (2, 2, 2, 2))
resnet34 = _factory("resnet34", BasicBlock, (3, 4, 6, 3))
resnet50 = _factory("resnet50", Bottleneck, (3, 4, 6, 3))
resnet101 = _factory("resnet101", Bottleneck, (3, 4, 23, 3))
resnet152 = _factory("resnet152", Bottleneck, (3, 8, 36, 3))
resnext50_32x4d = _factory("resnext50_32x4d", Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4)
resnext101_32x8d = _factory("resnext101_32x8d", Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8)
resnext101_64x4d = _factory("resnext101_64x4d", Bottleneck, (3, 4, 23, 3), groups=64, width_per_group=4)
wide_resnet50_2 = _factory("wide_resnet50_2", Bottleneck, (3, 4, 6, 3), width_per_group=128)
wide_resnet101_2 = _factory("wide_resnet101_2", Bottleneck, (3, 4, 23, 3), width_per_group=128)
