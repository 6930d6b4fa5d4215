"""Which convolutions' outputs forward keeps, for every place of a stride and every order."""

from __future__ import annotations

import pytest

from resnet_fused.spec import BlockSpec, IntPair, Memory, Order, Skip, StageSpec
from resnet_fused.spec.block import ORDERS
from resnet_fused.spec.facts import facts
from resnet_fused.spec.tensors import BlockTensors

ONE, TWO = (1, 1), (2, 2)


def kept(order: Order, memory: Memory, skip: Skip, *strides: IntPair) -> list[int]:
    """Where every gradient is wanted."""
    projection = StageSpec(act="identity", norm=order != "pre") if skip == "projection" else None
    spec = BlockSpec(tuple(StageSpec(stride) for stride in strides), skip, projection, order, memory)
    known = facts(spec, BlockTensors.filled(True, len(spec.convs)))
    assert all(conv.read for conv in known.convs)
    return known.saved


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ((ONE,), []),
        ((TWO,), []),
        ((ONE, ONE), [0]),
        ((TWO, ONE), [0]),
        ((TWO, TWO), [0]),
        ((ONE, TWO), []),
        ((ONE, (1, 2)), []),
        (((1, 2), TWO), [0]),
        ((ONE, ONE, ONE), [0, 1]),
        ((TWO, ONE, ONE), [0, 1]),
        ((ONE, TWO, ONE), [1]),
        ((ONE, ONE, TWO), [0, 1]),
        ((ONE, TWO, TWO, ONE), [1, 2]),
    ],
)
def test_low_memory_keeps(strides: tuple[IntPair, ...], expected: list[int], skip: Skip, order: Order) -> None:
    """Neither the last output, nor the projection's, nor the first before a stride, if it has none itself."""
    assert kept(order, "low", skip, *strides) == expected
    assert kept(order, "default", skip, *strides) == list(range(len(strides) + (skip == "projection")))
