"""A network small enough to time in a test."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from resnet_fused import models
from resnet_fused.tools import named_models
from resnet_fused.tools.bench import command, desk
from resnet_fused.tools.bench.ceilings import ceilings


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every model name stands for a ResNet of four blocks; ceilings are of small matrices, turns of one step."""

    def build(name: str) -> nn.Module:
        return models.ResNet(models.BasicBlock, (1, 1, 1, 1), num_classes=10)

    monkeypatch.setattr(named_models, "build", build)
    monkeypatch.setattr(command, "ceilings", functools.partial(ceilings, sides=(32, 64), copied=1 << 16))
    monkeypatch.setattr(desk, "TURN", 0.0)
    monkeypatch.setattr("resnet_fused.tools.bench.ceilings.SECONDS", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
