"""pytorchcv's own units, fused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.stand_ins import pictures, settled
from support.training import assert_trains_as_eager
from torch import nn

from resnet_fused import explain, fuse
from resnet_fused.modules.fuse import why_not

pytest.importorskip("pytorchcv")
from pytorchcv.models import (
    cbamresnet,
    preresnet,
    regnet,
    resnet,
    resneta,
    resnext,
    senet,
    sepreresnet,
    seresnet,
    seresnext,
)

# name: (what makes the units, how many fused calls each of them takes)
UNITS: dict[str, tuple[Callable[[], list[nn.Module]], list[int]]] = {
    "ResNet": (
        lambda: [resnet.ResUnit(8, 12, 2, bottleneck=False), resnet.ResUnit(12, 12), resneta.ResAUnit(12, 16, 2)],
        [1, 1, 2],
    ),
    "squeeze-excitation": (
        lambda: [seresnet.SEResUnit(8, 32, 2, True, True), seresnet.SEResUnit(32, 32, 1, False, False)],
        [1, 1],
    ),
    "ResNeXt": (
        lambda: [
            resnext.ResNeXtUnit(8, 64, 2, 16, 4),
            seresnext.SEResNeXtUnit(64, 64, 1, 16, 4),
            senet.SENetUnit(64, 64, 2, 4, 16, True),
        ],
        [1, 1, 1],
    ),
    "RegNet": (lambda: [regnet.RegNetUnit(8, 16, 2, 8, True), regnet.RegNetUnit(16, 16, 1, 8, False)], [3, 1]),
    "ResNet v2": (
        lambda: [preresnet.PreResUnit(8, 16, 2), preresnet.PreResUnit(16, 16, 1, bottleneck=False), nn.ReLU()],
        [1, 1],
    ),
    "ResNet v2, squeeze-excitation": (
        lambda: [sepreresnet.SEPreResUnit(8, 32, 2, True, False), sepreresnet.SEPreResUnit(32, 32, 1, False, False)],
        [2, 1],
    ),
}


@pytest.mark.parametrize("name", UNITS)
def test_units_train_as_eager(name: str) -> None:
    make, calls = UNITS[name]
    torch.manual_seed(0)
    model = settled(nn.Sequential(*make()))
    assert_trains_as_eager(model, pictures())
    rows = explain(fuse(model))
    assert {row.backend for row in rows} == {"native"}
    assert [len(unit.fused_describe().calls) for unit in model if not isinstance(unit, nn.ReLU)] == calls


def test_a_whole_model_is_fused() -> None:
    """With its stem."""
    model = fuse(resnet.get_resnet(blocks=10, width_scale=0.125))
    rows = explain(model)
    assert [row.block for row in rows] == ["ResInitBlock"] + ["ResUnit"] * 4
    assert {row.backend for row in rows} == {"native"}


def test_a_preactivated_stem_is_a_block() -> None:
    torch.manual_seed(0)
    model = settled(nn.Sequential(preresnet.PreResInitBlock(3, 8), preresnet.PreResUnit(8, 8, 1)))
    assert_trains_as_eager(model, pictures(3, 33))
    assert [row.backend for row in explain(fuse(model))] == ["native"] * 2


def test_the_body_of_an_unknown_unit_is_fused() -> None:
    model = fuse(nn.Sequential(cbamresnet.CbamResUnit(16, 32, 2, False)))
    fused = {row.name: row.backend for row in explain(model)}
    assert fused["0"] == "eager" and fused["0.body"] == "native"


def pads(unit: nn.Module) -> None:
    unit.body.conv1.use_pad = True


def activates(unit: nn.Module) -> None:
    unit.body.conv2.activate, unit.body.conv2.activ = True, nn.ReLU()


def attends(unit: nn.Module) -> None:
    unit.se = nn.Identity()


def replaces(unit: nn.Module) -> None:
    unit.body = nn.Sequential(*unit.body.children())


def normalises(unit: nn.Module) -> None:
    unit.body.conv1.bn = nn.GroupNorm(1, 8)


REFUSED = {
    "padding": (pads, "body.conv1 pads each side"),
    "activation before the addition": (activates, "body ends in ReLU"),
    "attention": (attends, "se is Identity; accepted: SEBlock"),
    "body": (replaces, "body is Sequential; accepted: ResBlock"),
    "norm": (normalises, "stages[0].norm is GroupNorm"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_parts_without_a_fused_form_are_named(change: Callable[[nn.Module], None], reason: str) -> None:
    unit = resnet.ResUnit(8, 8, bottleneck=False)
    change(unit)
    assert reason in str(why_not(unit))
