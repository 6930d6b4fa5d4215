"""The engine in every instruction set that this machine has: README's claim over the whole table of blocks."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from support.engine_blocks import TABLE
from support.engine_runs import INSTRUCTION_SETS, Report, in_process, report_of

# Those with products of float32 of their own, as which float16 is multiplied; of the others these are AVX-512's.
FLOAT32 = ("baseline", "avx2", "avx512")
# Against eager's error, geometric mean over the table. Measured: bfloat16 0.75 in all of them; float32 1.14 with fused
# multiply-add and 1.17 without: the engine adds the products of an output one by one where oneDNN adds partial sums.
MEAN = {"bfloat16": 1.0, "float16": 1.0, "float32": 1.25}


PROGRAM = """
import torch
from support.engine_blocks import TABLE
from support.engine_runs import on_engine
torch.set_grad_enabled(False)
on_engine(*TABLE["no norm"].case.build(torch.float32))
print("computed")
"""


@cache
def ask(isa: str) -> subprocess.CompletedProcess[str]:
    """A process that is told to use `isa` and computes a block."""
    return in_process(isa, ["-c", PROGRAM])


@cache
def accepted() -> tuple[str, ...]:
    """The names that this machine accepts, as the error for another one tells."""
    told = re.search(r"accepted on this processor: (.*), or leave it unset", ask("sse9").stderr)
    assert told is not None
    return tuple(told[1].split(", "))


def test_an_unknown_name_is_refused_with_the_accepted_ones() -> None:
    done = ask("sse9")
    assert done.returncode != 0 and 'ValueError: RESNET_FUSED_ISA is "sse9"; accepted on this processor' in done.stderr
    assert "baseline" in accepted() and "amx_portable" in accepted()
    assert set(accepted()) <= set(INSTRUCTION_SETS)
    # ascending: what a processor has, it has with all before it
    own = [isa for isa in accepted() if isa != "amx_portable"]
    assert own == list(INSTRUCTION_SETS[: len(own)])


def test_a_name_this_machine_lacks_is_refused() -> None:
    for isa in set(INSTRUCTION_SETS) - set(accepted()):
        assert f'ValueError: RESNET_FUSED_ISA is "{isa}"; accepted on this processor' in ask(isa).stderr


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_as_exact_as_eager(isa: str, tmp_path: Path) -> None:
    if isa not in accepted():
        pytest.skip(f"this machine has no {isa}")
    dtypes = ("float32", "bfloat16", "float16") if isa in FLOAT32 else ("bfloat16",)
    slow = ("bands", "wide", "large") if isa == "amx_portable" else ()  # a hundred times slower, by amx's schedules
    names = [name for name in TABLE if not name.startswith(slow)] if slow else list(TABLE)
    report = report_of(isa, dtypes, tmp_path, *names)
    assert not report.wrong
    assert len(report.ratios) == len(names) * len(dtypes)
    for dtype in dtypes:
        ratios = {name: ratio for name, ratio in report.ratios.items() if name.endswith(dtype)}
        mean = Report(ratios=ratios).mean_ratio
        assert mean <= MEAN[dtype], f"{isa}, {dtype}: on average {mean:.3f} times eager's error"


EVERY_FLOAT16 = """
import torch
from support.engine_runs import on_engine
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import BlockSpec, StageSpec
torch.set_grad_enabled(False)
every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
x = every[every.isfinite()].reshape(1, 62, 32, 32).permute(0, 3, 1, 2)
bare = StageSpec(norm=False, act="identity")
for skip in ("none", "identity"):
    for factor in (1.0, 0.5, 0.375, 1.5, 4.0):
        weight = (torch.eye(32) * factor).half()[:, :, None, None]
        got = on_engine(x, BlockParams((StageParams(weight),)), BlockSpec((bare,), skip))
        exact = x.double() * factor + (x.double() if skip == "identity" else 0)
        assert torch.equal(got, exact.half()), (skip, factor)
        assert got.isinf().any() == (exact.abs().max() >= 65520)
print("computed")
"""


@pytest.mark.parametrize("isa", FLOAT32)
def test_every_float16(isa: str) -> None:
    """Subnormal, rounded to even or beyond the largest: a product, and its sum with the skip path, rounded once."""
    if isa not in accepted():
        pytest.skip(f"this machine has no {isa}")
    done = in_process(isa, ["-c", EVERY_FLOAT16])
    assert done.stdout == "computed\n", done.stderr[-4000:]


def test_portable_tiles_compute_what_the_processor_does(tmp_path: Path) -> None:
    """The sums are the same bits: AMX adds, for each 32 channels, the even and the odd products apart and their sums to
    the tile's. What is behind them rounds once more without fused multiply-add, so after a norm a value may differ.
    """
    if "amx" not in accepted():
        pytest.skip("this machine has no amx")
    blocks = (
        "no norm",
        "bottleneck with projection",
        "stem",
        "groups of 4",
        "33 channels",
        "pre order",
        "gelu, branch",
    )
    ours, portable = (report_of(isa, ["bfloat16"], tmp_path, *blocks).outputs for isa in ("amx", "amx_portable"))
    assert ours.keys() == portable.keys()
    for name, value in ours.items():
        differs = int(value.ne(portable[name]).sum())
        assert differs <= (0 if name.startswith("no norm") else max(1, value.numel() // 200)), name
