"""What an exported graph holds: PyTorch's own operations, which run anywhere, or the fused operators where asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_keeps_fused = False


@contextmanager
def export_fused() -> Iterator[None]:
    """Within it ``torch.export.export`` keeps the fused operators of fused modules and of `functional`.

    Such a program is for inference: its operators have no gradients. It loads and runs where ``resnet_fused`` has been
    imported, and ``torch.onnx.export`` refuses it. Without this context an exported graph holds the operations of the
    unfused model. As ``torch.export`` itself, it is not for several threads at once.
    """
    global _keeps_fused
    before, _keeps_fused = _keeps_fused, True
    try:
        yield
    finally:
        _keeps_fused = before


def exports_plain() -> bool:
    """Whether a graph is being made that has to run without this package: by torch.export or torch.jit.trace."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return torch.compiler.is_exporting() and not _keeps_fused
