"""Turns and their ratios."""

from __future__ import annotations

import pytest

from resnet_fused.tools.bench.rounds import Spread, interleaved, ratios, timed


def test_everyone_runs_once_a_round_and_the_order_rotates() -> None:
    order: list[str] = []

    def turn(name: str) -> float:
        order.append(name)
        return float(len(order))

    seconds = interleaved({name: lambda name=name: turn(name) for name in "abc"}, 3)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"  # the first does not count
    assert seconds == {"a": [6.0, 8.0, 10.0], "b": [4.0, 9.0, 11.0], "c": [5.0, 7.0, 12.0]}


def test_ratios_are_of_the_same_round() -> None:
    assert ratios([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == Spread(*(pytest.approx(v) for v in (2.4, 3.0, 3.6)))


def test_one_round_has_no_spread() -> None:
    with pytest.raises(ValueError, match="got rounds=1; accepted: at least 2"):
        interleaved({"a": lambda: 1.0}, 1)


def test_a_turn_is_told_by_the_clock() -> None:
    times = iter([3.0, 5.5])
    assert timed(lambda: None, lambda: next(times))() == 2.5
