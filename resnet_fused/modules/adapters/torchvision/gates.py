"""torchvision's squeeze-excitation and stochastic depth as gates: the factors that a branch is multiplied with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import class_path, require_no_hooks
from resnet_fused.modules.gate_layers import layered

SQUEEZE_EXCITATION = "torchvision.ops.misc.SqueezeExcitation"


def squeeze_excitation(name: str, se: Any) -> Callable[[Tensor], Tensor]:
    """pooled [N, C] -> [N, C]."""
    if class_path(type(se)) != SQUEEZE_EXCITATION:
        raise NotFusable(f"{name} is {type(se).__name__}; accepted: SqueezeExcitation itself")
    require_no_hooks(name, se)
    require_no_hooks(f"{name}.avgpool", se.avgpool)

    def gate(pooled: Tensor) -> Tensor:
        squeezed = se.activation(se.fc1(pooled[:, :, None, None]))
        return se.scale_activation(se.fc2(squeezed)).flatten(1)

    return layered(gate, (se.fc1, se.activation), (se.fc2, se.scale_activation))


def stochastic_depth(name: str, module: Any) -> Callable[[Tensor], Tensor] | None:
    """pooled [N, C] -> [N, 1], by the module itself and so with its random numbers."""
    if class_path(type(module)) != "torchvision.ops.stochastic_depth.StochasticDepth":
        raise NotFusable(f"{name} is {type(module).__name__}; accepted: StochasticDepth itself")
    require_no_hooks(name, module)
    if not module.training or module.p == 0:
        return None
    return lambda pooled: module(pooled.new_ones(len(pooled), 1))
