"""For your own tests: is my fused model as exact as PyTorch?

    from resnet_fused.testing import assert_equivalent

    def test_fusing_changes_no_number() -> None:
        assert_equivalent(my_model(), torch.randn(4, 3, 64, 64), min_fused=1.0)

It raises an AssertionError that names the worst tensors.
"""

from __future__ import annotations

import torch
from torch import nn

from resnet_fused.modules.fuse import MatchBy
from resnet_fused.spec import Memory
from resnet_fused.tools.comparison import Inputs, Source
from resnet_fused.tools.verification import SEEDS, Report, verify

SHOWN = 8


def assert_equivalent(
    model: nn.Module,
    x: Inputs | Source,
    *,
    dtype: torch.dtype | None = None,
    train: bool | None = None,
    backend: str = "auto",
    memory: Memory = "default",
    match: MatchBy | None = None,
    seeds: int = SEEDS,
    min_fused: float = 0.0,
) -> None:
    """Raises AssertionError, naming the worst tensors, unless `resnet_fused.verify` finds its claim kept.

    train: training or evaluation; None checks both. The other arguments and errors are those of `verify`.
    """
    for mode in (True, False) if train is None else (train,):
        report = verify(
            model,
            x,
            dtype=dtype,
            train=mode,
            backend=backend,
            memory=memory,
            match=match,
            seeds=seeds,
            min_fused=min_fused,
        )
        if not report.ok:
            raise AssertionError(_message(report))


def _message(report: Report) -> str:
    lines = [f"{report.title}: the fused model is not as exact as PyTorch"]
    for single in report.wrong[:SHOWN]:
        lines.append(
            f"  {single.part}: {single}: error {single.fused_error:.2e} against float64, eager's is "
            f"{single.eager_error:.2e}: ratio {single.ratio:.3g}, at most {single.limit:g}"
        )
    if len(report.wrong) > SHOWN:
        lines.append(f"  and {len(report.wrong) - SHOWN} more tensors")
    if not all(d.ok for d in report.distributions):
        lines.append(report.distribution_table())
    return "\n".join([*lines, f"  {report.share}"])
