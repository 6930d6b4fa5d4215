"""timm's attention and stochastic depth as gates: the factors that a branch is multiplied with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import class_path, require_no_hooks
from resnet_fused.modules.gate_layers import layered

Gated = Callable[[Tensor], Tensor]  # pooled [N, C] -> [N, C] or [N, 1]


def require(slot: str, module: nn.Module, instead: str | None) -> None:
    if instead is not None:
        raise NotFusable(f"{slot} is {type(module).__name__}; accepted: none, or {instead}")
    require_no_hooks(slot, module)


class Factor(NamedTuple):
    """What multiplies a branch: a function of its mean over pixels, and the module that computes the product."""

    gate: Gated
    module: nn.Module


def factor_or_module(se: nn.Module | None, name: str) -> Factor | nn.Module | None:
    """A factor where the mean is all that `se` reads; else `se` itself, to be called."""
    if se is None or type(se) is nn.Identity:
        return None
    compute = _of_the_mean(se)
    if compute is None:
        return se
    require_no_hooks(name, se)
    return Factor(compute(se), se)


def gate_and_tail(
    attention: nn.Module | None, drop_path: nn.Module | None, name: str
) -> tuple[Gated | None, tuple[nn.Module, ...]]:
    """attention(x), then drop_path(x), at a branch's end: (their common gate, ()), or (None, what is called)."""
    found = factor_or_module(attention, name)
    dropped = drop_path_of(drop_path)
    if isinstance(found, nn.Module):
        return None, (found,) if dropped is None or drop_path is None else (found, drop_path)
    return both(None if found is None else found.gate, dropped), ()


def both(attention: Gated | None, drop_path: Gated | None) -> Gated | None:
    if attention is None or drop_path is None:
        return attention or drop_path
    return lambda pooled: attention(pooled) * drop_path(pooled)


def attention_of(se: nn.Module | None, name: str = "se") -> Gated | None:
    """pooled [N, C] -> [N, C]; raises NotFusable where `se` reads more than the mean."""
    found = factor_or_module(se, name)
    if isinstance(found, nn.Module):
        require(name, found, "SEModule, SqueezeExcite, EffectiveSEModule, EcaModule of the mean alone, nn.Identity")
        raise AssertionError  # it has raised
    return None if found is None else found.gate


def _of_the_mean(se: nn.Module) -> Callable[[nn.Module], Gated] | None:
    mean_alone = not getattr(se, "add_maxpool", False) and getattr(se, "mlp", None) is None
    return ATTENTION.get(class_path(type(se))) if mean_alone else None


def _squeeze_excitation(se: Any) -> Gated:
    def gate(pooled: Tensor) -> Tensor:
        return se.gate(se.fc2(se.act(se.bn(se.fc1(pooled[:, :, None, None]))))).flatten(1)

    return layered(gate, (se.fc1, se.act), (se.fc2, se.gate), unused=(se.bn,))


def _of_inverted_residuals(se: Any) -> Gated:
    def gate(pooled: Tensor) -> Tensor:
        return se.gate(se.conv_expand(se.act1(se.conv_reduce(pooled[:, :, None, None])))).flatten(1)

    return layered(gate, (se.conv_reduce, se.act1), (se.conv_expand, se.gate))


def _effective(se: Any) -> Gated:
    def gate(pooled: Tensor) -> Tensor:
        return se.gate(se.fc(pooled[:, :, None, None])).flatten(1)

    return layered(gate, (se.fc, se.gate))


def _legacy(se: Any) -> Gated:
    def gate(pooled: Tensor) -> Tensor:
        return se.sigmoid(se.fc2(se.relu(se.fc1(pooled[:, :, None, None])))).flatten(1)

    return layered(gate, (se.fc1, se.relu), (se.fc2, se.sigmoid))


def _efficient(eca: Any) -> Gated:
    def gate(pooled: Tensor) -> Tensor:
        y = eca.conv(pooled[:, None])
        if eca.conv2 is not None:
            y = eca.conv2(eca.act(y))
        return eca.gate(y).flatten(1)

    return gate if eca.conv2 is not None else layered(gate, (eca.conv, eca.gate))


ATTENTION: dict[str, Callable[[nn.Module], Gated]] = {
    "timm.layers.squeeze_excite.SEModule": _squeeze_excitation,
    "timm.layers.squeeze_excite.EffectiveSEModule": _effective,
    "timm.layers.eca.EcaModule": _efficient,
    "timm.models.senet.SEModule": _legacy,
    "segmentation_models_pytorch.encoders._senet.SEModule": _legacy,
    "timm.models._efficientnet_blocks.SqueezeExcite": _of_inverted_residuals,
}


def drop_path_of(drop_path: nn.Module | None) -> Gated | None:
    """pooled [N, C] -> [N, 1], by the module itself and so with its random numbers."""
    if drop_path is None or type(drop_path) is nn.Identity:
        return None
    known = class_path(type(drop_path)) == "timm.layers.drop.DropPath"
    require("drop_path", drop_path, None if known else "DropPath, nn.Identity")
    if not drop_path.training or drop_path.drop_prob == 0:
        return None
    return lambda pooled: drop_path(pooled.new_ones(len(pooled), 1))
