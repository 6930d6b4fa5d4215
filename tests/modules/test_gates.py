"""Modules with a gate: the documented block of one's own, what changes in it is seen, explain, verify, copies."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.training import assert_trains_as_eager
from torch import Tensor, nn

import resnet_fused
from resnet_fused import explain, fuse, register_block
from resnet_fused.tools.verification import verify

EXAMPLE = Path(__file__).parents[2] / "examples" / "squeeze_excitation.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("squeeze_excitation", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    register_block(module.SqueezeExcitationBlock, module.describe)
    return module


def model_of(example: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(example.SqueezeExcitationBlock(8) for _ in range(2)))


def pictures() -> Tensor:
    return torch.randn(4, 8, 6, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_the_documented_block_trains_as_eager(example: ModuleType, autocast: torch.dtype | None) -> None:
    assert_trains_as_eager(model_of(example), pictures(), steps=3, autocast=autocast)


def test_the_example_runs(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    assert "3 of 3 blocks fused" in capsys.readouterr().out


def test_changes_are_seen(example: ModuleType) -> None:
    """A gate's weight in evaluation, whose folded convolutions stay; another layer; both modes."""
    model = fuse(model_of(example)).eval()
    with torch.no_grad():
        model(pictures())
        model[0].up.bias.add_(1)
        model[1].down = nn.Linear(8, 2)
        expected = resnet_fused.unfuse(copy.deepcopy(model))(pictures())
        torch.testing.assert_close(model(pictures()), expected)


def test_what_is_folded_is_kept_between_calls(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although a registered adapter gives a new gate at every call."""
    model = fuse(model_of(example)).eval()
    with torch.no_grad():
        model(pictures())
        kept = [block._fused_description.block.params.kept.gated for block in model]
        model(pictures())
        assert [block._fused_description.block.params.kept.gated for block in model] == kept


def test_explain_and_verify(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(example).eval()
    assert verify(model, pictures()).ok
    rows = explain(fuse(model), pictures())
    assert [row.backend for row in rows] == ["native", "native"]


def test_copies_keep_their_own_gate(example: ModuleType) -> None:
    model = fuse(model_of(example)).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model[0].up.bias.add_(1)
        assert not torch.allclose(model(pictures()), twin(pictures()))
        torch.testing.assert_close(twin(pictures()), resnet_fused.unfuse(copy.deepcopy(twin))(pictures()))
