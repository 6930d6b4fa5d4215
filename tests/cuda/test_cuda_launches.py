"""Which phases share a launch, and the counters that a launch under graph capture brings along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.blocks import bottleneck
from support.emulated_blocks import block
from support.emulated_checks import SEEDS, Checks
from support.launch_lines import phases
from support.runs import run
from support.same_bits import assert_same_bits


@pytest.mark.parametrize(
    ("skip", "memory"), [("identity", "default"), ("projection", "default"), ("identity", "low"), ("projection", "low")]
)
def test_launches(skip: str, memory: str, check: Checks) -> None:
    """One per direction in single mode; one per phase in phased mode; the library's convolutions in between."""
    case = bottleneck(skip, memory=memory, channels=24, width=16)
    given, dout = case.build(torch.bfloat16, torch.channels_last), case.upstream(torch.bfloat16)
    projects = int(skip == "projection")
    again = (memory == "low") * (3 if projects else 1)
    gradients = ["weight gradient", "data gradient"]

    def launched(**how: Any) -> list[str]:
        check.set(**how)
        run(*given, "emulated", dout)
        return check.emulator.launched()

    single = launched()
    assert all("cooperative" in line for line in single)
    forward, backward = map(phases, single)
    assert forward == ["convolution"] * (3 + projects) + ["pass"]
    middle = ["pass", *gradients]  # the 3x3 has its dy written out
    before = ["table", "table", *["convolution"] * again]
    assert backward == [*before, "pass", *gradients * projects, *gradients, *middle, *gradients]
    phased = launched(mode="phased")
    assert not any("cooperative" in line for line in phased)
    assert [phases(line) for line in phased] == [[phase] for phase in forward + backward]
    assert len(launched(library="spatial")) == 2 + 2, "each direction stops for the 3x3"


def test_a_block_of_more_phases_than_a_launch_holds(check: Checks) -> None:
    """It takes two."""
    scales: Any = {"branch_scale": "[C]", "skip_scale": "[C]"}
    case = block(3, "projection", order="pre", memory="low", out_channels=16, **scales)
    launched = check.trains(case)
    assert len(launched) == 3 * len(SEEDS) and max(len(phases(line)) for line in launched) == 16


def test_whatever_is_chosen(check: Checks) -> None:
    """Left to itself the library has a picture's channels and the kernels the rest."""
    case = block(2, "projection", channels=3, width=16, out_channels=16)
    launched = check.trains(case, "choose", library="choose")
    once = [phases(line) for line in launched[:5]]
    gradients = ["weight gradient", "data gradient"]
    assert once == [
        ["pass"],
        ["pass", "convolution", "pass"],
        ["table", "pass", "pass"],
        ["pass", *gradients, "pass"],
        ["pass"],
    ]


def test_workspaces_of_graphs(check: Checks) -> None:
    """Under capture a call brings counters of its own."""
    check.set()
    given, dout = bottleneck("identity").build(torch.float32), bottleneck("identity").upstream(torch.float32)
    expected = run(*given, "emulated", dout)
    check.emulator.set_capturing(True)
    assert_same_bits(run(*given, "emulated", dout), expected)
