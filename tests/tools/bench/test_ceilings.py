"""Ceilings on a machine that multiplies 16 bits slowly."""

from __future__ import annotations

import pytest
import torch

from resnet_fused.tools.bench import ceilings as measured
from resnet_fused.tools.bench.plots import roofline


@pytest.mark.parametrize(("longest", "sides"), [(float("inf"), [8, 16]), (0.0, [8])])
def test_products_that_take_too_long_are_left_out(
    longest: float, sides: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "LONGEST", longest)
    rows = measured.ceilings(sides=(8, 16), copied=64).rows
    for dtype in (torch.float32, torch.bfloat16):
        name = f"{dtype} product".removeprefix("torch.")
        assert [row.bytes for row in rows if row.what == name] == [3 * side**2 * dtype.itemsize for side in sides]


@pytest.mark.parametrize(
    ("dtype", "narrow", "roof"),
    [
        ("float32", 100e9, "float32 product 50"),
        ("autocast", 100e9, "bfloat16 product 100"),
        ("autocast", 1e9, "float32 product 50"),
    ],
)
def test_the_roof_is_the_faster_product_of_the_values(dtype: str, narrow: float, roof: str) -> None:
    rates = {"float32 product": 50e9, "bfloat16 product": narrow, "copy": 10e9}
    side = {"bytes": 1e6, "seconds": 1e-3}
    block = {"name": "layer1.0", "flops": 1e7, "eager": side, "fused": side, "ratio": {"p50": 1.0}}
    run = {"dtype": dtype, "title": "a run", "blocks": [block]}
    assert f"{roof} GFLOP/s" in roofline(run, [{"what": what, "rate": rate} for what, rate in rates.items()])
