"""Processes that share a batch, for SyncBatchNorm: each computes its part and writes what it got to a file.

A module of its own, because a spawned process has to import it by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_fused import functional

WORLD = 2


@dataclass(frozen=True)
class Shared:
    """One call: how many pictures each process has, and of what."""

    batches: tuple[int, int]
    channels: int = 5
    size: tuple[int, int] = (4, 3)
    dtype: torch.dtype = torch.float32
    residual: bool = True
    act: str = "relu"
    affine: bool = True
    momentum: float | None = 0.1
    own_group: bool = False
    mean: float = 0.3

    def tensors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """x, residual and the gradient from above, of all processes together; drawn in fp64 and rounded."""
        generator = torch.Generator().manual_seed(sum(self.batches) + self.channels)
        shape = (sum(self.batches), self.channels, *self.size)
        x, residual, dout = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
        x = (x * 1.5 + self.mean).to(self.dtype).to(dtype or self.dtype)
        residual, dout = (t.to(self.dtype).to(dtype or self.dtype) for t in (residual, dout))
        return x.contiguous(memory_format=torch.channels_last), residual if self.residual else None, dout

    def norm(self, kind: type[nn.BatchNorm2d] | type[nn.SyncBatchNorm], group: object = None) -> nn.Module:
        arguments = {} if kind is nn.BatchNorm2d else {"process_group": group}
        bn = kind(self.channels, momentum=self.momentum, affine=self.affine, **arguments)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in bn.parameters():
                parameter.copy_(torch.rand(self.channels, generator=generator) + 0.5)
        return bn.double() if self.dtype == torch.float64 else bn

    def part(self, rank: int) -> slice:
        start = sum(self.batches[:rank])
        return slice(start, start + self.batches[rank])


def results(x: Tensor, residual: Tensor | None, dout: Tensor, bn: nn.Module, act: str, backend: str) -> dict:
    """The output, every gradient, every buffer."""
    leaves = {"x": x.detach().requires_grad_()}
    if residual is not None:
        leaves["residual"] = residual.detach().requires_grad_()
    out = functional.batch_norm_act(leaves["x"], bn, residual=leaves.get("residual"), act=act, backend=backend)  # type: ignore[arg-type]
    out.backward(dout)
    gradients = leaves | dict(bn.named_parameters())
    return {"out": out.detach()} | {f"grad of {n}": t.grad for n, t in gradients.items()} | dict(bn.named_buffers())


def compute(rank: int, calls: list[Shared], folder: str) -> None:
    """One process's part of every call; an error is a result too."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    group = dist.new_group([0, 1])
    got: list[dict] = []
    for call in calls:
        part = call.part(rank)
        x, residual, dout = call.tensors()
        bn = call.norm(nn.SyncBatchNorm, group if call.own_group else None)
        before = {n: t.clone() for n, t in bn.named_buffers()}
        try:
            got.append(
                results(x[part], None if residual is None else residual[part], dout[part], bn, call.act, "native")
            )
        except ValueError as error:
            moved = [n for n, t in bn.named_buffers() if not torch.equal(t, before[n])]
            got.append({"error": str(error), "moved": moved})
    torch.save(got, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
