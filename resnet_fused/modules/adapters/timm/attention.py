"""timm's attention and stochastic depth as gates: the factors that a branch is multiplied with."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import class_path, require_no_hooks


def require(slot: str, module: nn.Module, instead: str | None) -> None:
    if instead is not None:
        raise NotFusable(f"{slot} is {type(module).__name__}; accepted: none, or {instead}")
    require_no_hooks(slot, module)


def gate_of(block: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """se(x), then drop_path(x): the factors that they multiply x with."""
    return both(attention_of(block.se), drop_path_of(block.drop_path))  # type: ignore[arg-type]


def both(
    attention: Callable[[Tensor], Tensor] | None, drop_path: Callable[[Tensor], Tensor] | None
) -> Callable[[Tensor], Tensor] | None:
    if attention is None or drop_path is None:
        return attention or drop_path
    return lambda pooled: attention(pooled) * drop_path(pooled)


def attention_of(se: nn.Module | None, name: str = "se") -> Callable[[Tensor], Tensor] | None:
    """pooled [N, C] -> [N, C]."""
    if se is None or type(se) is nn.Identity:
        return None
    gate = ATTENTION.get(class_path(type(se)))
    fits = gate is not None and not getattr(se, "add_maxpool", False) and getattr(se, "mlp", None) is None
    accepted = "SEModule, SqueezeExcite, EffectiveSEModule, EcaModule of the mean alone, nn.Identity"
    require(name, se, None if fits else accepted)
    return lambda pooled: gate(se, pooled)  # type: ignore[misc]


def _squeeze_excitation(se: nn.Module, pooled: Tensor) -> Tensor:
    squeezed = se.act(se.bn(se.fc1(pooled[:, :, None, None])))  # type: ignore[operator]
    return se.gate(se.fc2(squeezed)).flatten(1)  # type: ignore[operator]


def _of_inverted_residuals(se: nn.Module, pooled: Tensor) -> Tensor:
    squeezed = se.act1(se.conv_reduce(pooled[:, :, None, None]))  # type: ignore[operator]
    return se.gate(se.conv_expand(squeezed)).flatten(1)  # type: ignore[operator]


def _effective(se: nn.Module, pooled: Tensor) -> Tensor:
    return se.gate(se.fc(pooled[:, :, None, None])).flatten(1)  # type: ignore[operator]


def _legacy(se: nn.Module, pooled: Tensor) -> Tensor:
    squeezed = se.relu(se.fc1(pooled[:, :, None, None]))  # type: ignore[operator]
    return se.sigmoid(se.fc2(squeezed)).flatten(1)  # type: ignore[operator]


def _efficient(eca: nn.Module, pooled: Tensor) -> Tensor:
    y = eca.conv(pooled[:, None])  # type: ignore[operator]
    if eca.conv2 is not None:
        y = eca.conv2(eca.act(y))  # type: ignore[operator]
    return eca.gate(y).flatten(1)  # type: ignore[operator]


ATTENTION: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "timm.layers.squeeze_excite.SEModule": _squeeze_excitation,
    "timm.layers.squeeze_excite.EffectiveSEModule": _effective,
    "timm.layers.eca.EcaModule": _efficient,
    "timm.models.senet.SEModule": _legacy,
    "timm.models._efficientnet_blocks.SqueezeExcite": _of_inverted_residuals,
}


def drop_path_of(drop_path: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """pooled [N, C] -> [N, 1], by the module itself and so with its random numbers."""
    if drop_path is None or type(drop_path) is nn.Identity:
        return None
    known = class_path(type(drop_path)) == "timm.layers.drop.DropPath"
    require("drop_path", drop_path, None if known else "DropPath, nn.Identity")
    if not drop_path.training or drop_path.drop_prob == 0:
        return None
    return lambda pooled: drop_path(pooled.new_ones(len(pooled), 1))
