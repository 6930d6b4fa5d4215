"""The engine on any block: against fp64, between numbers of threads, and from run to run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.blocks import Case, frozen
from support.engine_runs import LIMIT, in_eager, threads
from support.equivalence import FLOOR_ULPS, relative_error
from support.matrix import FORMATS, family
from support.named_tensors import to_double
from support.random_blocks import EVERY, cases
from torch import Tensor

from resnet_fused import functional
from resnet_fused.backends import prepared
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec

SEEDS = range(4)
COUNTS = (1, 2, 7)


def refused(x: Tensor, params: BlockParams, spec: BlockSpec) -> bool:
    """Whether the engine leaves the block to others, as its sentences say it does."""
    reason = prepared.reason_against(x, params, spec)
    window = params.projection is not None and params.projection.weight.shape[2:].numel() > 1
    grouped = spec.projection is not None and spec.projection.groups > 1 and window
    active = spec.order == "branch" and spec.skip == "projection" and spec.stages[-1].activation.name != "identity"
    assert (reason is not None) == (grouped or active), reason
    return reason is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(case=cases(channels=(1, 2, 3, 5, 8, 33), **EVERY), last=st.booleans())
@settings(family, max_examples=60)
@torch.no_grad()
def test_any_block(case: Case, last: bool, dtype: torch.dtype) -> None:
    blocks = [frozen(case).build(dtype, FORMATS[last], seed) for seed in SEEDS]
    assume(not refused(*blocks[0]))
    exact = torch.stack([in_eager(x.double(), to_double(params), spec) for x, params, spec in blocks])
    eager = relative_error(torch.stack([in_eager(*b) for b in blocks]), exact)
    assume(eager < 0.1)  # oneDNN 3.12 reads out of bounds in some strided convolutions of bfloat16
    runs = {}
    for count in COUNTS:
        with threads(count):
            runs[count], again = (
                torch.stack([functional.residual_block(*b, backend="native") for b in blocks]) for _ in range(2)
            )
        assert torch.equal(runs[count], again), f"two runs on {count} threads differ"
    allowed = max(LIMIT[dtype] * eager, FLOOR_ULPS * torch.finfo(dtype).eps)
    for count, got in runs.items():
        assert got.dtype == dtype
        assert relative_error(got, exact) <= allowed, f"{count} threads, eager's error is {eager:.3g}"
        # threads change which rows are computed together, and a sum of products does not know of it
        assert torch.equal(got, runs[1]), f"{count} threads and one differ"
