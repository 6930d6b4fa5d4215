"""timm's ResNeSts, arXiv:2004.08955."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters.resnet import SkipPath, added, skip_parts
from resnet_fused.modules.adapters.timm.attention import drop_path_of
from resnet_fused.modules.adapters.timm.layers import Part, branch_and_end
from resnet_fused.modules.adapters.timm.resnet import does_nothing
from resnet_fused.modules.block_modules import Adapter, Modules, StageModules, class_path, require_no_hooks


def bottleneck(block: Any) -> Modules:
    """Split attention's convolution belongs to the chain; what weighs its shares is PyTorch's."""
    for name in ("bn2", "drop_block", "act2"):
        require_no_hooks(name, getattr(block, name))
    if not does_nothing(block.drop_block):
        raise NotFusable("drop_block drops regions between a norm and its activation; accepted in training: none")
    middle = _split_attention(block.conv2) if block.radix >= 1 else (StageModules(block.conv2, block.bn2, block.act2),)
    first, last = (StageModules(*(getattr(block, f"{kind}{i}") for kind in ("conv", "bn", "act"))) for i in (1, 3))
    branch, end = branch_and_end((first, block.avd_first, *middle, block.avd_last, last))
    return added(end, _skip_path(block), branch=branch, in_place_add=True)


def _skip_path(block: Any) -> SkipPath:
    """Stochastic depth drops the input of `downsample`, not the branch."""
    if block.downsample is None:
        return (), None
    pools, projection = skip_parts(block.downsample)
    return (pools if drop_path_of(block.drop_path) is None else (block.drop_path, *pools)), projection


def _split_attention(attention: Any) -> tuple[Part, ...]:
    if class_path(type(attention)) != "timm.layers.split_attn.SplitAttn":
        raise NotFusable(f"conv2 is {type(attention).__name__}; accepted: SplitAttn, or a convolution and radix=0")
    require_no_hooks("conv2", attention)
    if not does_nothing(attention.drop):
        raise NotFusable("conv2 drops regions between its norm and its activation; accepted in training: none")
    return StageModules(attention.conv, attention.bn0, attention.act0), _weighed(attention)


def _weighed(attention: Any) -> Callable[[Tensor], Tensor]:
    """The shares of the channels, of which there are `radix`, each times its weight, and added.

    The mean over pixels comes before the sum over shares, so that no sum of whole maps is written for it.
    """

    def weigh(x: Tensor) -> Tensor:
        shares = x.unflatten(1, (attention.radix, -1))
        pooled = shares.mean((3, 4)).sum(1)[:, :, None, None]
        logits = attention.fc2(attention.act1(attention.bn1(attention.fc1(pooled))))
        weights = attention.rsoftmax(logits).view(*shares.shape[:3], 1, 1)
        return (shares * weights).sum(1)

    return weigh


BLOCKS: dict[str, Adapter] = {"timm.models.resnest.ResNestBottleneck": bottleneck}
