"""Which modules are layers of a gate that the kernels know, so that evaluation computes them in one call."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from resnet_fused.modules.block_modules import class_path, has_hooks
from resnet_fused.ops.gate import GateLayer, LayerActivation, LayeredGate

ACTIVATIONS: dict[type[nn.Module], LayerActivation] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
}
OF_LIBRARIES: dict[str, LayerActivation] = {"timm.layers.activations.Sigmoid": "sigmoid"}


def layered(
    compute: Callable[[Tensor], Tensor], *layers: tuple[nn.Module, nn.Module], unused: tuple[nn.Module, ...] = ()
) -> Callable[[Tensor], Tensor]:
    """`compute`, with its layers where the kernels know every one of them.

    layers: each a layer and the activation behind it. unused: modules that `compute` calls as well, known only where
    they do nothing.
    """
    known = [_layer(*pair) for pair in layers]
    idle = all(type(module) is nn.Identity and not has_hooks(module) for module in unused)
    if not idle or any(layer is None for layer in known):
        return compute
    return LayeredGate(compute, tuple(layer for layer in known if layer is not None))


def _layer(module: nn.Module, act: nn.Module) -> GateLayer | None:
    name = ACTIVATIONS.get(type(act)) or OF_LIBRARIES.get(class_path(type(act)))
    if name is None or has_hooks(module) or has_hooks(act) or not _is_known(module):
        return None
    return GateLayer(module.weight, module.bias, name)  # type: ignore[arg-type]


def _is_known(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)) or type(module) not in (nn.Conv1d, nn.Conv2d):
        return False
    plain = module.groups == 1 and set(module.stride) == {1} and not isinstance(module.padding, str)
    if type(module) is nn.Conv2d:
        return plain and module.kernel_size == (1, 1) and module.padding == (0, 0)
    width = module.kernel_size[0]  # over the channels
    one = module.in_channels == module.out_channels == 1 and module.dilation == (1,) and module.padding_mode == "zeros"
    return plain and one and width % 2 == 1 and module.padding == (width // 2,)
