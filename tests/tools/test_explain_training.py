"""What `explain` says of the convolutions of a training step on the CPU: who computes them, and why not the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support.engine_runs import in_process
from torch import nn

from resnet_fused import explain, fuse
from resnet_fused.models.resnet import Bottleneck
from resnet_fused.ops import operators

# Prints the reasons of one convolution for each line of arguments: forward, data gradient, weight gradient.
PROGRAM = """
import json, sys
import torch
from resnet_fused.ops import operators
from resnet_fused.spec import BlockSpec, StageSpec
for shape, changes, dtype in json.loads(sys.argv[1]):
    dtype = getattr(torch, dtype)
    spec = BlockSpec((StageSpec(**changes),))
    print(json.dumps(operators.engine_reasons_against_training(spec, [torch.empty(shape, dtype=dtype)], dtype)[0]))
"""
ISAS = {
    "baseline": "the engine trains by AMX or AVX512-BF16, which this processor lacks",
    "amx_portable": None,
}
OTHERS = "the engine trains in bfloat16, and convolves 3x3 of float32 with stride 1 and padding 1; x is "
QUESTIONS: dict[str, tuple[list[int], dict[str, Any], str, list[str | None]]] = {
    "none": ([64, 32, 3, 3], {"padding": 1, "stride": 2}, "bfloat16", [None] * 3),
    "float32": ([64, 32, 3, 3], {"padding": 1}, "float32", [None] * 3),
    "float32, another window": ([64, 32, 3, 3], {}, "float32", [OTHERS + "Float"] * 3),
    "float64": ([64, 32, 3, 3], {"padding": 1}, "float64", [OTHERS + "Double"] * 3),
    "groups": ([64, 32, 3, 3], {"groups": 2}, "bfloat16", ["groups", "groups", None]),
    "channels": ([64, 24, 1, 1], {}, "bfloat16", [*["24 to 64 channels, no multiples of 32"] * 2, None]),
    "padding": (
        [64, 64, 3, 3],
        {"padding": 1, "padding_mode": "circular"},
        "bfloat16",
        ["the engine pads with zeros only"] * 3,
    ),
    "stride and dilation": (
        [64, 64, 3, 3],
        {"stride": 2, "dilation": 2},
        "bfloat16",
        [None, "a stride and a dilation", None],
    ),
    "stride and dilation of other dimensions": (
        [64, 64, 3, 3],
        {"stride": (2, 1), "dilation": (1, 2)},
        "bfloat16",
        [None] * 3,
    ),
}


@pytest.mark.parametrize("isa", ISAS)
def test_the_reasons(isa: str) -> None:
    asked = [question[:3] for question in QUESTIONS.values()]
    done = in_process(isa, ["-c", PROGRAM, json.dumps(asked)])
    assert done.returncode == 0, done.stderr[-4000:]
    for (name, (_, _, dtype, expected)), line in zip(QUESTIONS.items(), done.stdout.splitlines(), strict=True):
        missing = ISAS[isa]
        assert json.loads(line) == ([missing] * 3 if missing and dtype == "bfloat16" else expected), name


MODEL = """
import torch
from torch import nn
from resnet_fused import explain, fuse
from resnet_fused.models.resnet import Bottleneck

projection = nn.Sequential(nn.Conv2d({channels}, 128, 1, stride=2, bias=False), nn.BatchNorm2d(128))
explain(fuse(nn.Sequential(Bottleneck({channels}, 32, stride=2, downsample=projection)).bfloat16()))
"""


@pytest.mark.parametrize(
    ("isa", "channels", "said"),
    [
        ("amx_portable", 64, "training runs the engine's convolutions"),
        (
            "amx_portable",
            24,
            "training runs the engine's convolutions, and oneDNN's{form} for forward of convolution 1 and data "
            "gradient of convolution 1 (24 to 32 channels, no multiples of 32), forward of the projection and data "
            "gradient of the projection (24 to 128 channels, no multiples of 32)",
        ),
        (
            "baseline",
            64,
            "training runs oneDNN's convolutions{form}: the engine trains by AMX or AVX512-BF16, which this processor "
            "lacks",
        ),
    ],
)
def test_a_block_in_training(isa: str, channels: int, said: str) -> None:
    done = in_process(isa, ["-c", MODEL.format(channels=channels)])
    assert done.returncode == 0, done.stderr[-4000:]
    form = " in float32" if isa == "baseline" or operators.widens(torch.bfloat16) else ""
    assert said.format(form=form) in " ".join(done.stdout.replace("|", " ").split())


def test_float32_is_told_where_x_is_given() -> None:
    model = fuse(nn.Sequential(Bottleneck(16, 4)))
    (row,) = explain(model)
    assert row.reason == ""
    (row,) = explain(model, torch.zeros(1, 16, 4, 4))
    assert row.reason == (f"training runs oneDNN's convolutions: {OTHERS}Float; 4 to 4 channels, no multiples of 32")
    (row,) = explain(model.eval(), torch.zeros(1, 16, 4, 4))
    assert "training" not in row.reason


def test_float32_weights_under_autocast() -> None:
    """What is said of them holds for what they are cast to."""
    program = """
import torch
from torch import nn
from resnet_fused import explain, fuse
from resnet_fused.models.resnet import Bottleneck

with torch.autocast("cpu", torch.bfloat16):
    explain(fuse(nn.Sequential(Bottleneck(128, 32))), torch.randn(1, 128, 8, 8))
"""
    done = in_process("amx_portable", ["-c", program])
    assert "training runs the engine's convolutions" in done.stdout and "oneDNN" not in done.stdout, done.stderr[-4000:]
