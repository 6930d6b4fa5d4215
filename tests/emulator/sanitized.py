"""A program that runs blocks on an emulator compiled with AddressSanitizer: ``python sanitized.py launcher.so``.

PyTorch's memory is under its eye when libasan is preloaded; test_cuda_sanitizer.py starts it so.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from emulator.emulated import Emulator, installed
from support.blocks import Case, block
from support.runs import run

TRAINED = [
    block(3, "projection", channels=5, width=3, out_channels=7, stride=2, size=(9, 6), bias=True, memory="low"),
    block(2, "identity", channels=18, width=24, order="pre", branch_scale="[C]", skip_scale="0-d"),
    block(2, "none", channels=8, width=72, dilation=2, size=(7, 5), kernel=3),
    block(1, "identity", channels=136, kernel=1, size=(5, 5), batch_stats=False),
]
EVALUATED = [
    block(3, "projection", channels=6, width=5, out_channels=9, stride=2, size=(17, 9), batch_stats=False, bias=True),
    block(2, "identity", channels=24, width=72, order="pre", size=(9, 7), batch_stats=False),
]


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """The same values at the very end of their memory, one value behind an aligned address."""
    n, c, h, w = t.shape
    flat = torch.empty(t.numel() + 1, dtype=t.dtype)
    return flat[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


def compute(case: Case, dtype: torch.dtype, trains: bool) -> None:
    x, params, spec = case.build(dtype, torch.channels_last)
    dout = case.upstream(dtype) if trains else None
    for given in (x, misaligned(x)):
        for value in run(given, params, spec, "emulated", dout).values():
            assert value is None or value.isfinite().all()


def main() -> None:
    torch.set_num_threads(1)
    emulator = Emulator(Path(sys.argv[1]))
    dtypes = [getattr(torch, name) for name in sys.argv[2:]]
    with installed(emulator) as backend:
        # a chain and large tiles; phases, small tiles; launches that library convolutions end
        for mode, library, processors, workers in (
            ("single", "none", 1, 2),
            ("phased", "none", 64, 3),
            ("single", "all", 1, 2),
        ):
            emulator.configure(processors, workers)
            backend.set_how(mode, library)  # type: ignore[arg-type]
            for dtype in dtypes:
                for case in TRAINED:
                    compute(case, dtype, True)
                for case in EVALUATED:
                    compute(case, dtype, False)
            assert any("chain" in line for line in emulator.launched()) == ((mode, library) == ("single", "none"))
    print("clean")


if __name__ == "__main__":
    main()
