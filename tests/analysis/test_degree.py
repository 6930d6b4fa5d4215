"""Degrees and coefficients of polynomial networks, against the polynomials composed by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial

from resnet_fused.analysis import degree


def composed(power: int, depth: int, kind: degree.Kind) -> np.ndarray:
    """Integer coefficients, exact in float64 at these degrees."""
    x = Polynomial([0.0, 1.0])
    for _ in range(depth):
        x = x**power if kind == "plain" else x + x**power
    return x.coef


@pytest.mark.parametrize(("power", "depth"), [(2, 1), (2, 4), (3, 2), (3, 3), (4, 2), (5, 2)])
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_degree_and_coefficients(power: int, depth: int, kind: degree.Kind) -> None:
    found = degree.degree(power, depth, kind)
    wanted = composed(power, depth, kind)
    assert found.degree == power**depth
    # the transform of values up to |p(1)| rounds each coefficient by eps |p(1)|, with a factor of ten for their sum
    tolerance = 10 * np.finfo(np.float64).eps * wanted.sum() * power**depth
    assert np.abs(np.array(found.coefficients) - wanted).max() < tolerance
    assert found.powers == tuple(np.flatnonzero(wanted))


def test_a_plain_network_holds_one_power_and_a_residual_one_all() -> None:
    assert degree.degree(2, 4, "plain").powers == (16,)
    assert degree.degree(2, 4, "residual").powers == tuple(range(1, 17))
    assert degree.degree(3, 3, "residual").powers == tuple(range(1, 28, 2))  # x + x^3 is odd


def test_the_fused_network_computes_the_formula() -> None:
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    fused = degree.network(x, 3, 2, "residual")
    once = x + x**3
    torch.testing.assert_close(fused, once + once**3, rtol=1e-14, atol=0)  # a dozen roundings of 1.1e-16


def test_table_and_json() -> None:
    found = degree.degrees([(2, 2)])
    assert "1 x^1, 2 x^2, 2 x^3, 1 x^4" in found.table()
    assert json.loads(json.dumps(found.to_dict()))["rows"][1]["powers"] == [1, 2, 3, 4]


def test_bad_input() -> None:
    with pytest.raises(
        ValueError, match=r"got power 2, depth 6, kind 'residual': degree 2\^6; accepted: .*27 residual"
    ):
        degree.degree(2, 6, "residual")
    with pytest.raises(ValueError, match="accepted: power >= 2"):
        degree.degree(1, 3, "plain")
