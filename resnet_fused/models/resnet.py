"""ResNet (arXiv:1512.03385, v1.5: stride on the 3x3), ResNeXt (arXiv:1611.05431), Wide ResNet (arXiv:1605.07146),
pre-activation ResNets (v2, arXiv:1603.05027), and the plain networks that they are compared with.

Plain PyTorch modules with torchvision's arguments and state names; the factories at the end fuse them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from resnet_fused.modules.fuse import fuse
from resnet_fused.params import Scale
from resnet_fused.scaling import Learnable, ModelScale, scale_of_depth
from resnet_fused.spec import Memory

NormLayer = Callable[[int], nn.Module]


class Block(nn.Module):
    """What the four blocks share: the skip path, and its sum with the branch.

    downsample:   the projection of the skip path; None: x itself.
    skip:         False leaves the skip path out, as in a plain network.
    branch_scale, skip_scale: alpha and 1 - beta of (1 - beta) S(x) + alpha g(x): a number, or `scaling.Learnable`,
                  which becomes a parameter of the block. Both are attributes that may be written later.
    """

    expansion: int
    branch_scale: Scale
    skip_scale: Scale

    def _set_paths(
        self,
        channels: int,
        stride: int,
        downsample: nn.Module | None,
        skip: bool,
        branch_scale: float | Learnable,
        skip_scale: float | Learnable,
    ) -> None:
        if not skip and (downsample is not None or skip_scale != 1.0):
            raise ValueError(
                f"skip=False leaves no path for downsample={downsample}, skip_scale={skip_scale!r}; "
                "accepted with it: None and 1.0"
            )
        self.downsample = downsample
        self.stride = stride
        self.skip = skip
        self.branch_scale = _attribute(branch_scale, channels)
        self.skip_scale = _attribute(skip_scale, channels)

    def _join(self, branch: Tensor, x: Tensor) -> Tensor:
        """branch_scale * branch + skip_scale * S(x)."""
        out = _scaled(branch, self.branch_scale)
        if self.skip:
            out += _scaled(x if self.downsample is None else self.downsample(x), self.skip_scale)
        return out

    @property
    def last(self) -> nn.Module:
        """The branch's last layer: with zeros as its weight, the branch is zero."""
        raise NotImplementedError


class BasicBlock(Block):
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
        skip: bool = True,
        branch_scale: float | Learnable = 1.0,
        skip_scale: float | Learnable = 1.0,
    ) -> None:
        super().__init__()
        _require_basic(groups, base_width, dilation)
        self.conv1 = _conv(inplanes, planes, 3, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = norm_layer(planes)
        self._set_paths(planes, stride, downsample, skip, branch_scale, skip_scale)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(self._join(out, x))

    @property
    def last(self) -> nn.Module:
        return self.bn2


class Bottleneck(Block):
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
        skip: bool = True,
        branch_scale: float | Learnable = 1.0,
        skip_scale: float | Learnable = 1.0,
    ) -> None:
        super().__init__()
        width = planes * base_width // 64 * groups
        outplanes = planes * self.expansion
        self.conv1 = _conv(inplanes, width, 1)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv(width, width, 3, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv(width, outplanes, 1)
        self.bn3 = norm_layer(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self._set_paths(outplanes, stride, downsample, skip, branch_scale, skip_scale)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(self._join(out, x))

    @property
    def last(self) -> nn.Module:
        return self.bn3


class PreBasicBlock(Block):
    """`BasicBlock` with norm and ReLU before each convolution, nothing behind the sum (arXiv:1603.05027, fig. 4e).

    downsample: a convolution without a norm, which reads the activated input.
    activated:  x has been normalised and activated before the paths part, as behind the stem: the block has no `bn1`.
    """

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
        skip: bool = True,
        branch_scale: float | Learnable = 1.0,
        skip_scale: float | Learnable = 1.0,
        activated: bool = False,
    ) -> None:
        super().__init__()
        _require_basic(groups, base_width, dilation)
        self.bn1 = None if activated else norm_layer(inplanes)
        self.conv1 = _conv(inplanes, planes, 3, stride)
        self.bn2 = norm_layer(planes)
        self.conv2 = _conv(planes, planes, 3)
        self.relu = nn.ReLU()  # in place it would write x where the norm is nn.Identity
        self._set_paths(planes, stride, downsample, skip, branch_scale, skip_scale)

    def forward(self, x: Tensor) -> Tensor:
        activated = x if self.bn1 is None else self.relu(self.bn1(x))
        out = self.conv1(activated)
        out = self.conv2(self.relu(self.bn2(out)))
        return self._join(out, x if self.downsample is None else activated)

    @property
    def last(self) -> nn.Module:
        return self.conv2


class PreBottleneck(Block):
    """`Bottleneck` with each norm and ReLU before its convolution; arguments as `PreBasicBlock`."""

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
        skip: bool = True,
        branch_scale: float | Learnable = 1.0,
        skip_scale: float | Learnable = 1.0,
        activated: bool = False,
    ) -> None:
        super().__init__()
        width = planes * base_width // 64 * groups
        outplanes = planes * self.expansion
        self.bn1 = None if activated else norm_layer(inplanes)
        self.conv1 = _conv(inplanes, width, 1)
        self.bn2 = norm_layer(width)
        self.conv2 = _conv(width, width, 3, stride, groups, dilation)
        self.bn3 = norm_layer(width)
        self.conv3 = _conv(width, outplanes, 1)
        self.relu = nn.ReLU()  # in place it would write x where the norm is nn.Identity
        self._set_paths(outplanes, stride, downsample, skip, branch_scale, skip_scale)

    def forward(self, x: Tensor) -> Tensor:
        activated = x if self.bn1 is None else self.relu(self.bn1(x))
        out = self.conv1(activated)
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        return self._join(out, x if self.downsample is None else activated)

    @property
    def last(self) -> nn.Module:
        return self.conv3


PRE_ACTIVATION: dict[type[Block], type[Block]] = {BasicBlock: PreBasicBlock, Bottleneck: PreBottleneck}


class ResNet(nn.Module):
    """[N, in_channels, H, W] -> [N, num_classes]; the first arguments as ``torchvision.models.ResNet``.

    layers: how many blocks each of the four layers has; 0 leaves a layer out.
    zero_init_residual: let each branch start at zero (arXiv:1706.02677): zeros as the weight of its last norm, in
            pre-activation order of its last convolution.
    replace_stride_with_dilation: for the last three layers, keep the resolution and dilate instead.
    order:  "post": v1. "pre": v2 (arXiv:1603.05027). The activation of the first block stands before its paths part,
            where it is the stem's `bn1` and `relu`, so that block has no `bn1`; the last sum is followed by one more
            batch norm, `norm`, and a ReLU; `downsample.0` is a convolution alone. timm and TensorFlow's models differ:
            their stem has no norm, and each of their blocks has all of its own.
    skip:   False: the plain network of the same shapes, without any skip path or projection.
    stem:   "large": 7x7 convolution of stride 2 and max pooling. "small": a 3x3 convolution alone, for pictures of 8 to
            64 pixels.
    width:  channels of the stem and the first layer, doubled by each layer that follows.
    branch_scale, skip_scale: of every block (`Block`): a number, a `scaling.Learnable`, or a function that is called
            with the number of blocks L and returns one of them, as ``branch_scale=scaling.depth_scale`` for 1 /
            sqrt(L).

    State names are torchvision's, with `norm` where order is "pre", and `branch_scale` and `skip_scale` in each block
    where these are learnable.
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
        *,
        order: Literal["post", "pre"] = "post",
        skip: bool = True,
        stem: Literal["large", "small"] = "large",
        width: int = 64,
        in_channels: int = 3,
        branch_scale: ModelScale = 1.0,
        skip_scale: ModelScale = 1.0,
    ) -> None:
        super().__init__()
        dilate = (False, *(replace_stride_with_dilation or (False, False, False)))
        if len(layers) != 4 or len(dilate) != 4:
            raise ValueError(
                f"got layers={layers!r}, replace_stride_with_dilation={replace_stride_with_dilation!r}; "
                "accepted: four counts, and None or three bools"
            )
        if order not in ("post", "pre") or stem not in ("large", "small"):
            raise ValueError(f"got order={order!r}, stem={stem!r}; accepted: 'post' or 'pre', 'large' or 'small'")
        if zero_init_residual and not skip:
            raise ValueError("zero_init_residual=True with skip=False: without a skip path the output would be zero")
        norm_layer = norm_layer or nn.BatchNorm2d
        small = stem == "small"
        self.conv1 = _conv(in_channels, width, 3) if small else _conv(in_channels, width, 7, 2)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)

        pre = order == "pre"
        cls = PRE_ACTIVATION[block] if pre else block
        scales: dict[str, Any] = {
            "skip": skip,
            "branch_scale": scale_of_depth(branch_scale, sum(layers)),
            "skip_scale": scale_of_depth(skip_scale, sum(layers)),
        }
        inplanes, dilation = width, 1
        for i, count in enumerate(layers):
            planes, stride = width * 2**i, 1 if i == 0 else 2
            first_dilation = dilation
            if dilate[i]:
                dilation, stride = dilation * stride, 1
            blocks: list[nn.Module] = []
            for j in range(count):
                first, outplanes = j == 0, planes * block.expansion
                downsample = None
                if skip and first and (stride != 1 or inplanes != outplanes):
                    conv = _conv(inplanes, outplanes, 1, stride)
                    downsample = nn.Sequential(conv) if pre else nn.Sequential(conv, norm_layer(outplanes))
                shape = (groups, width_per_group, first_dilation if first else dilation)
                activated = {"activated": first and i == 0} if pre else {}
                given = (inplanes, planes, stride if first else 1, downsample, *shape, norm_layer)
                blocks.append(cls(*given, **scales, **activated))
                inplanes = outplanes
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))

        self.norm = norm_layer(inplanes) if pre else None
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        self._initialise(zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:  # torchvision's name; fusing replaces it
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if self.norm is not None:
            x = self.relu(self.norm(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, Block) and isinstance(module.last.weight, Tensor):
                    nn.init.zeros_(module.last.weight)


def _conv(inplanes: int, planes: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(inplanes, planes, kernel, stride, padding, dilation, groups, bias=False)


def _require_basic(groups: int, base_width: int, dilation: int) -> None:
    if (groups, base_width, dilation) != (1, 64, 1):
        raise ValueError(
            f"BasicBlock has groups=1, base_width=64, dilation=1, got {groups}, {base_width}, {dilation}; "
            "use Bottleneck"
        )


def _attribute(scale: float | Learnable, channels: int) -> Scale:
    return scale.parameter(channels) if isinstance(scale, Learnable) else float(scale)


def _scaled(t: Tensor, scale: Scale) -> Tensor:
    if isinstance(scale, (int, float)):
        return t if scale == 1.0 else t * scale
    return t * scale.to(t.dtype).view(-1, 1, 1)


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
plain18 = _factory("plain18", BasicBlock, (2, 2, 2, 2), skip=False)
plain34 = _factory("plain34", BasicBlock, (3, 4, 6, 3), skip=False)
plain50 = _factory("plain50", Bottleneck, (3, 4, 6, 3), skip=False)


def small_resnet(
    depth: int, *, fused: bool = True, backend: str = "auto", memory: Memory = "default", **kwargs: Any
) -> ResNet:
    """The ResNet for small pictures (arXiv:1512.03385, 4.2): three layers of 16, 32 and 64 channels, 10 classes.

    depth: 6 n + 2 convolutional and linear layers, as in 20, 32, 44, 50, 56. kwargs as `ResNet`: ``skip=False`` for the
    plain network. Where the shape changes the skip path is a projection; the paper's has zeros for the new channels.
    Raises ValueError for another depth.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth={depth}; accepted: 6 n + 2, as in 8, 14, 20, 32, 44, 50, 56")
    shape = {"layers": (blocks, blocks, blocks, 0), "stem": "small", "width": 16, "num_classes": 10}
    model = ResNet(**{"block": BasicBlock} | shape | kwargs)  # type: ignore[arg-type]
    return fuse(model, backend=backend, memory=memory) if fused else model
