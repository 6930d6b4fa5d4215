"""Results that must not differ in a bit."""

from __future__ import annotations

import torch
from support.equivalence import Results


def assert_same_bits(got: Results, expected: Results) -> None:
    for name, value in expected.items():
        assert value is None or torch.equal(got[name], value), name  # type: ignore[arg-type]
