"""Any block that the specs can express, drawn by hypothesis."""

from __future__ import annotations

from itertools import product

import hypothesis.strategies as st
from hypothesis import assume
from support.blocks import Case, ScaleKind

from resnet_fused.spec import BlockSpec, Order, Skip, StageSpec
from resnet_fused.spec.activations import KINDS
from resnet_fused.spec.block import ORDERS

EVERY = {"acts": tuple(KINDS), "orders": ORDERS}
# PyTorch's hardsigmoid has a derivative of float32's sixth in float64, too
EXACT = EVERY | {"acts": tuple(name for name in KINDS if name != "hardsigmoid")}


@st.composite
def cases(
    draw: st.DrawFn,
    channels: tuple[int, ...] = (1, 2, 3, 4, 6, 8),
    values: int = 6,
    acts: tuple[str, ...] = ("identity", "relu"),
    orders: tuple[Order, ...] = ("post", "pre"),
) -> Case:
    """Any block that the specs can express, small, with at least `values` values behind each batch statistic."""
    count = draw(st.integers(1, 3))
    skip: Skip = draw(st.sampled_from(["none", "identity", "projection"]))
    order: Order = draw(st.sampled_from(orders))
    source = given = draw(st.sampled_from(channels))
    size = (draw(st.integers(3, 8)), draw(st.integers(3, 8)))
    pairs = list(product((1, 2), repeat=2))
    norms = st.sampled_from([(True, True), (True, True), (True, False), (False, False)])
    stages, kernels, widths, total = [], [], [], (1, 1)
    for i in range(count):
        groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 6, 8) if source % g == 0]))
        kernel = (draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 2, 3, 5])))
        dilation = draw(st.sampled_from(pairs))
        stride = (1, 1) if skip == "identity" else draw(st.sampled_from(pairs))
        padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
        if skip != "none":  # "same" padding of an odd kernel keeps the paths' sizes equal
            kernel = (kernel[0] | 1, kernel[1] | 1)
            padding = (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))
        total = (total[0] * stride[0], total[1] * stride[1])
        width = groups * draw(st.integers(1, 3))
        if i == count - 1 and skip == "identity":
            groups, width = (groups if given % groups == 0 else 1), given
        norm, batch_stats = draw(norms)
        act = draw(st.sampled_from(acts))
        eps = draw(st.sampled_from([1e-5, 1e-3]))
        stages.append(StageSpec(stride, padding, dilation, groups, norm, batch_stats, eps, act))
        kernels.append(kernel)
        widths.append(width)
        source = width
    projection = None
    if skip == "projection":
        norm, batch_stats = draw(norms)
        pad = draw(st.integers(0, 1))
        projection = StageSpec(total, pad, norm=norm and order != "pre", batch_stats=batch_stats, act="identity")
        kernels.append((2 * pad + 1,) * 2)
        widths.append(widths[-1])
    kinds: list[ScaleKind] = ["one", "float", "0-d", "[1]", "[C]", "[C,1,1]"]
    case = Case(
        BlockSpec(tuple(stages), skip, projection, order, draw(st.sampled_from(["default", "low"]))),
        given,
        tuple(widths),
        tuple(kernels),
        size,
        draw(st.integers(1, 3)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([0.1, 0.9, 0.0, None])),
        draw(st.sampled_from(kinds)),
        "one" if skip == "none" else draw(st.sampled_from(kinds)),
    )
    assume(all(min(s) >= 1 for s in case.sizes))
    assume(all(case.batch * h * w >= values for h, w in (case.size, *case.sizes)))
    return case
