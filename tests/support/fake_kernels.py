"""What a fake kernel promises of an operator's results, against what the real one returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def assert_fake_agrees(operator: Callable, given: Sequence[object]) -> None:
    with FakeTensorMode() as mode:
        faked = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, given)
        fake = description(operator(*faked))
    assert fake == description(operator(*given))


def description(results: object) -> list[tuple]:
    """(shape, strides, dtype) of each tensor of an operator's results, without the strides of single steps."""
    flat = torch.utils._pytree.tree_leaves(results)
    return [(tuple(t.shape), [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1], t.dtype) for t in flat]
