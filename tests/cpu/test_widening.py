"""16 bits that oneDNN does not multiply: convolved as float32 in training, and rounded once."""

from __future__ import annotations

import pytest
import torch
from support.engine_runs import in_process

from resnet_fused.ops import operators


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_product_of_16_bits_and_the_claim(dtype: str) -> None:
    done = in_process("baseline", ["-m", "support.widened_blocks", dtype])
    assert done.returncode == 0 and done.stdout.strip() == "all", done.stderr[-4000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_other_types_stay(dtype: torch.dtype) -> None:
    assert not operators.widens(dtype)
