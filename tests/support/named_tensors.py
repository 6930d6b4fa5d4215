"""The tensors of a block's parameters by name, and copies of them to differentiate by."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from resnet_fused.params import BlockParams, map_tensors


def named_tensors(params: BlockParams) -> dict[str, Tensor]:
    """Every tensor of params by name, e.g. "stages.0.weight"."""
    named: dict[str, Tensor] = {}
    map_tensors(params, lambda name, t: named.setdefault(name, t))
    return named


def is_buffer(name: str) -> bool:
    """Whether the tensor of this name is a statistic or a counter, which receives no gradient."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def leaves(params: BlockParams, requires_grad: Callable[[str], bool] = lambda name: True) -> BlockParams:
    """Leaf views of the parameters, which require a gradient where asked, and copies of the buffers."""
    return map_tensors(
        params, lambda name, t: t.clone() if is_buffer(name) else t.detach().requires_grad_(requires_grad(name))
    )


def to_double(params: BlockParams) -> BlockParams:
    return map_tensors(params, lambda name, t: t.double() if t.is_floating_point() else t)
