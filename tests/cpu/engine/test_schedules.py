"""Who computes what when: that the table of blocks meets each kind of schedule and of layout."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from support.engine_blocks import TABLE, THREADS
from support.engine_runs import on_engine, schedule_of, threads

WIDENED, WINOGRAD = "products of floatN, ", "NxN by Winograd, "
SIDE_BY_SIDE, SHARED = "image by image", "threads share the outputs of each convolution"


@torch.no_grad()
def schedules(dtype: torch.dtype) -> set[str]:
    """Of the whole table, with numbers as N."""
    found = set()
    for entry in TABLE.values():
        for batch in (entry.batches[0], entry.batches[-1]):
            x, params, spec = replace(entry.case, batch=batch).build(dtype)
            for count in THREADS:
                with threads(count):
                    found.add(re.sub(r"\d+", "N", schedule_of(x, params, spec, entry.pool)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_table_meets_every_schedule(dtype: torch.dtype) -> None:
    every = {SIDE_BY_SIDE, "image by image, each in N parts", "groups of N images", SHARED}
    found = schedules(dtype)
    widened = {schedule for schedule in found if schedule.startswith(WIDENED)}
    some = [set(), found] if dtype == torch.bfloat16 else [found] if dtype == torch.float16 else [set()]
    assert widened in some  # bfloat16: as the processor has it
    found = {schedule.removeprefix(WIDENED) for schedule in found}
    by_winograd = {schedule.removeprefix(WINOGRAD) for schedule in found if schedule.startswith(WINOGRAD)}
    assert found - {WINOGRAD + schedule for schedule in by_winograd} == every
    assert by_winograd == (every if dtype == torch.float32 or widened else set())


@torch.no_grad()
def test_a_schedule_is_made_for_the_threads_there_are() -> None:
    """The same prepared block on one thread, on several, and on one again."""
    x, params, spec = replace(TABLE["wide"].case, batch=1).build(torch.float32, torch.channels_last)
    found, outputs = [], []
    for count in (1, 7, 1):
        with threads(count):
            outputs.append(on_engine(x, params, spec))
            found.append(schedule_of(x, params, spec))
    assert found == [SIDE_BY_SIDE, SHARED, SIDE_BY_SIDE]
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", [name for name in TABLE if "patches" in name])
@torch.no_grad()
def test_threads_change_no_bit(name: str) -> None:
    """Wherever a thread begins, and whoever shares outputs with whom; repeated, since threads may miss each other."""
    x, params, spec = replace(TABLE[name].case, batch=3).build(torch.float32, torch.channels_last)
    with threads(1):
        expected = on_engine(x, params, spec)
    for count in (2, 7) * 8:
        with threads(count):
            assert torch.equal(on_engine(x, params, spec), expected), f"{count} threads"


@torch.no_grad()
def test_sizes_by_the_hundred() -> None:
    """More than are kept: each of them as when it came alone."""
    case = TABLE["basic"].case
    _, params, spec = case.build(torch.float32, torch.channels_last)
    pictures = [torch.randn(1, 32, h, w) for h in range(1, 8) for w in range(1, 7)]
    first = [on_engine(x, params, spec) for x in pictures]
    assert all(torch.equal(out, on_engine(x, params, spec)) for x, out in zip(pictures, first, strict=True))
