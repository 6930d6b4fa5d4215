"""The ResNet family with fused blocks, v1 and v2, and plain networks of the same shapes.

    resnet50(fused=True, backend="auto", memory="default", branch_scale=scaling.depth_scale)

So are called resnet18, 34, 50, 101 and 152, resnext50_32x4d, resnext101_32x8d and _64x4d, wide_resnet50_2 and 101_2,
and plain18, 34 and 50, which have no skip paths: `fused`, then `fuse`'s arguments, then those of `ResNet`.
torchvision's `state_dict`s load with ``strict=True`` where the arguments are torchvision's.
"""

from resnet_fused.models.resnet import (
    BasicBlock,
    Bottleneck,
    PreBasicBlock,
    PreBottleneck,
    ResNet,
    plain18,
    plain34,
    plain50,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    small_resnet,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "PreBasicBlock",
    "PreBottleneck",
    "ResNet",
    "plain18",
    "plain34",
    "plain50",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "small_resnet",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
