"""timm's ResNet parts, as torchvision's; attention and stochastic depth are a gate, other slots must be empty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import resnet
from resnet_fused.modules.block_modules import BlockModules, StageModules, class_path, require_no_hooks

EMPTY_SLOTS = ("drop_block", "aa")  # dropped regions, anti-aliasing


def basic_block(block: nn.Module) -> BlockModules:
    return _chain(block, acts=("act1", "act2"))


def bottleneck(block: nn.Module) -> BlockModules:
    return _chain(block, acts=("act1", "act2", "act3"))


def stem(model: nn.Module) -> BlockModules:
    """conv1, bn1 and act1. A deep stem's conv1 is a Sequential, which `describe` refuses."""
    return BlockModules((StageModules(model.conv1, model.bn1, model.act1),), skip="none")  # type: ignore[arg-type]


def _chain(block: nn.Module, acts: tuple[str, ...]) -> BlockModules:
    for slot in EMPTY_SLOTS:
        module = getattr(block, slot, None)
        if module is not None:
            _require(slot, module, "nn.Identity" if type(module) is not nn.Identity else None)
    return replace(resnet.chain(block, acts), gate=_gate(block))


def _require(slot: str, module: nn.Module, instead: str | None) -> None:
    if instead is not None:
        raise NotFusable(f"{slot} is {type(module).__name__}; accepted: none, or {instead}")
    require_no_hooks(slot, module)


def _gate(block: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """se(x), then drop_path(x): the factors that they multiply x with."""
    attention, drop_path = _attention(block.se), _drop_path(block.drop_path)  # type: ignore[arg-type]
    if attention is None or drop_path is None:
        return attention or drop_path
    return lambda pooled: attention(pooled) * drop_path(pooled)


def _attention(se: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """pooled [N, C] -> [N, C]."""
    if se is None or type(se) is nn.Identity:
        return None
    gate = ATTENTION.get(class_path(type(se)))
    fits = gate is not None and not getattr(se, "add_maxpool", False) and getattr(se, "mlp", None) is None
    accepted = "SEModule, EffectiveSEModule, EcaModule of the mean alone, nn.Identity"
    _require("se", se, None if fits else accepted)
    return lambda pooled: gate(se, pooled)  # type: ignore[misc]


def _squeeze_excitation(se: nn.Module, pooled: Tensor) -> Tensor:
    squeezed = se.act(se.bn(se.fc1(pooled[:, :, None, None])))  # type: ignore[operator]
    return se.gate(se.fc2(squeezed)).flatten(1)  # type: ignore[operator]


def _effective(se: nn.Module, pooled: Tensor) -> Tensor:
    return se.gate(se.fc(pooled[:, :, None, None])).flatten(1)  # type: ignore[operator]


def _efficient(eca: nn.Module, pooled: Tensor) -> Tensor:
    y = eca.conv(pooled[:, None])  # type: ignore[operator]
    if eca.conv2 is not None:
        y = eca.conv2(eca.act(y))  # type: ignore[operator]
    return eca.gate(y).flatten(1)  # type: ignore[operator]


ATTENTION: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "timm.layers.squeeze_excite.SEModule": _squeeze_excitation,
    "timm.layers.squeeze_excite.EffectiveSEModule": _effective,
    "timm.layers.eca.EcaModule": _efficient,
}


def _drop_path(drop_path: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """pooled [N, C] -> [N, 1], by the module itself and so with its random numbers."""
    if drop_path is None or type(drop_path) is nn.Identity:
        return None
    known = class_path(type(drop_path)) == "timm.layers.drop.DropPath"
    _require("drop_path", drop_path, None if known else "DropPath, nn.Identity")
    if not drop_path.training or drop_path.drop_prob == 0:
        return None
    return lambda pooled: drop_path(pooled.new_ones(len(pooled), 1))
