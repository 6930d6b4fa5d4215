"""batch_norm_act's operators by the CUDA kernels, run thread by thread on a CPU (tests/emulator)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulator.emulated import Emulator, compiled
from support.batch_norm_act import Case, check

from resnet_fused import _C  # type: ignore[attr-defined]
from resnet_fused.ops import norm_operators

OPERATORS = (
    "batch_statistics",
    "normalize_act",
    "normalize_act_backward_reduce",
    "normalize_act_backward_apply",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def library() -> Emulator:
    try:
        return Emulator(compiled("launcher", "-O2"))
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def emulator(library: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """The `cuda` overloads in place of the CPU's kernels."""
    for name in OPERATORS:
        monkeypatch.setattr(norm_operators, name, getattr(torch.ops.resnet_fused, name).cuda)
    library.install()
    yield library
    _C.install_emulator(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "size", "batch", "residual", "act", "training", "mean"),
    [
        (1, (5, 6), 3, True, "relu", True, 0.3),
        (5, (7, 9), 3, False, "identity", True, 30.0),
        (17, (3, 4), 2, False, "relu", False, 0.3),
        (40, (6, 6), 4, True, "relu", True, 30.0),
        (136, (5, 5), 2, True, "identity", True, 0.3),
        (264, (3, 3), 3, True, "relu", False, 0.3),
    ],
)
def test_as_accurate_as_eager(
    channels: int,
    size: tuple[int, int],
    batch: int,
    residual: bool,
    act: str,
    training: bool,
    mean: float,
    dtype: torch.dtype,
    emulator: Emulator,
) -> None:
    """Rows that can be read 16 bytes at a time and rows that cannot; one worker and several."""
    processors, workers = (1, 1) if channels == 5 else (8, 5)
    emulator.configure(processors, workers, seed=channels)
    layout = torch.contiguous_format if channels == 40 else torch.channels_last
    check(Case(channels, size, batch, residual, act, training, mean=mean), dtype, "native", layout)
    launched = emulator.launched()
    assert launched and all("pass" in line for line in launched)


@pytest.mark.parametrize("channels", [5, 8])
def test_unaligned_slices(channels: int, emulator: Emulator) -> None:
    """Values that begin at no multiple of 16 bytes."""
    emulator.configure(2, 3, seed=1)

    def slice_of_a_wider_tensor(t: torch.Tensor) -> torch.Tensor:
        wide = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
        wide[1:] = t.permute(0, 2, 3, 1).reshape(-1)
        n, c, h, w = t.shape
        return wide[1:].view(n, h, w, c).permute(0, 3, 1, 2)

    check(Case(channels), torch.bfloat16, "native", given_as=slice_of_a_wider_tensor)


def test_order_of_threads_does_not_matter(emulator: Emulator) -> None:
    x, dout = (torch.randn(3, 24, 9, 7, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    mean, var = torch.randn(24), torch.rand(24)
    results = []
    for seed in range(4):
        emulator.configure(4, 5, seed=100 * seed)
        out, mask = norm_operators.normalize_act(x, mean, var, None, None, None, 1e-5, True, True)
        sums = norm_operators.normalize_act_backward_reduce(dout, mask, x, mean)
        apply = norm_operators.normalize_act_backward_apply
        results.append([norm_operators.batch_statistics(x), out, mask, sums])
        results[-1] += apply(dout, mask, x, mean, var, None, sums, 3 * 63, 1e-5, True)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
