"""Singular values of Jacobians: against matrices that are known, and the two methods against each other."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused.analysis import jacobian
from resnet_fused.analysis.blocks import settle_statistics
from resnet_fused.models import BasicBlock

TIGHT = 1e-10  # relative: singular values of float64 matrices of order 100, and the 40 products behind each


def block(skip: bool = True) -> BasicBlock:
    torch.manual_seed(0)
    made = BasicBlock(6, 6).double()
    settle_statistics(made, torch.randn(8, 6, 4, 4, dtype=torch.float64))
    return resnet_fused.fuse(made).eval()


def test_of_a_matrix_it_finds_its_singular_values() -> None:
    torch.manual_seed(1)
    matrix = torch.randn(30, 20, dtype=torch.float64)
    x = torch.randn(1, 20, dtype=torch.float64)
    wanted = torch.linalg.svdvals(matrix).tolist()
    for f in (lambda x: x @ matrix.T, lambda x: (x @ matrix.T).reshape(5, 6)):
        found = jacobian.spectrum(f, x)
        assert found.values == pytest.approx(wanted, rel=TIGHT)
        assert found.condition == pytest.approx(wanted[0] / wanted[-1], rel=TIGHT)
    pytest.importorskip("scipy")
    some = jacobian.spectrum(lambda x: x @ matrix.T, x, largest=5, dense=False)
    assert some.values == pytest.approx(wanted[:5], rel=TIGHT) and some.condition is None


def test_the_sum_adds_the_identity_to_the_branch() -> None:
    b = block()
    x = torch.randn(1, 6, 4, 4, dtype=torch.float64)
    maps = jacobian.block_maps(b)
    assert list(maps) == ["branch, J", "sum, I + J", "block, relu behind the sum"]

    def matrix(f: jacobian.Map) -> Tensor:
        return torch.func.jacrev(f)(x).reshape(96, 96)

    branch, total, whole = map(matrix, maps.values())
    torch.testing.assert_close(total, torch.eye(96, dtype=torch.float64) + branch, rtol=TIGHT, atol=1e-12)
    on = (b(x) > 0).flatten().double()
    torch.testing.assert_close(whole, on[:, None] * total, rtol=TIGHT, atol=1e-12)

    found = jacobian.block_spectra(b, x)
    for row, wanted in zip(found.rows, (branch, total, whole), strict=True):
        assert row.values == pytest.approx(torch.linalg.svdvals(wanted).tolist(), rel=TIGHT, abs=1e-12)
    assert found.rows[2].zeros == int((on == 0).sum()) > 0  # a row for each unit that ReLU switches off
    assert found.rows[1].zeros == 0 and found.rows[1].condition == found.rows[1].condition_on_range
    held = torch.linalg.svdvals(whole).detach()[: int(on.sum())]
    assert found.rows[2].condition_on_range == pytest.approx(float(held[0] / held[-1]), rel=1e-8)
    assert "infinite" in found.table() and json.loads(json.dumps(found.to_dict()))["spectra"][1]["zeros"] == 0


def test_a_branch_at_zero_leaves_the_identity() -> None:
    b = block()
    torch.nn.init.zeros_(b.bn2.weight)
    rows = jacobian.block_spectra(b, torch.randn(1, 6, 4, 4, dtype=torch.float64)).rows
    assert set(rows[0].values) == {0.0} and rows[0].condition is None
    assert set(rows[1].values) == {1.0} and rows[1].condition == 1.0


def test_of_a_whole_network_both_methods_agree() -> None:
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    model = resnet_fused.models.resnet18(num_classes=7).double()
    settle_statistics(model, torch.randn(4, 3, 32, 32, dtype=torch.float64))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    dense = jacobian.model_spectra({"net": model.eval()}, x).rows[0]
    some = jacobian.model_spectra({"net": model}, x, dense=False, largest=3).rows[0]
    assert (dense.outputs, dense.inputs, len(dense.values)) == (7, 3072, 7)
    assert some.values == pytest.approx(dense.values[:3], rel=1e-8)  # Lanczos stops at its own tolerance


def test_what_reaches_a_block() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1).double(), block())
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(jacobian.input_of(model, model[1], x), model[0](x))


def test_bad_input() -> None:
    x = torch.randn(1, 6, 4, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"x is torch.float32; accepted: float64"):
        jacobian.block_spectra(block(), x.float())
    with pytest.raises(ValueError, match="batch norm bn1 is in training mode"):
        jacobian.block_spectra(block().train(), x)
    pytest.importorskip("scipy")
    with pytest.raises(ValueError, match="largest is 96, accepted: 1 to 95 for"):
        jacobian.block_spectra(block(), x, dense=False, largest=96)
