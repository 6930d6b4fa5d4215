"""How much memory autograd keeps between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(fn: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd saves for backward while `fn` runs.

    fn:      called once, e.g. ``lambda: model(x)``.
    exclude: tensors whose storages do not count; give ``model.buffers()``, which autograd does not mark.

    Parameters (leaves that require a gradient) never count, and neither does a leaf input that requires one. A
    storage that several nodes save, or of which only a view is saved, counts once and whole.
    """
    saved: list[Tensor] = []  # kept alive, so that no two storages share an address

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()

    left_out = [*exclude, *(t for t in saved if t.is_leaf and t.requires_grad)]
    addresses = {t.untyped_storage().data_ptr() for t in left_out}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(size for address, size in sizes.items() if address not in addresses)
