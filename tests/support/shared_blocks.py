"""Processes that share a batch in whole models: each trains on its part and writes what it got to a file.

A module of its own, because a spawned process has to import it by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_fused import BlockModules, CompositeModules, StageModules, explain, fuse, register_block
from resnet_fused.models.resnet import BasicBlock, Bottleneck, PreBasicBlock, ResNet

WORLD = 2
BLOCKS: dict[str, Any] = {
    "basic": lambda: BasicBlock(6, 6),
    "bottleneck with projection": lambda: Bottleneck(6, 3, stride=2, downsample=projection()),
    "pre-activation": lambda: PreBasicBlock(6, 6),
    "scaled": lambda: scaled(),
    "gated": lambda: Gated(),
    "several calls": lambda: SeveralCalls(),
    "network": lambda: network("post"),
    "network, pre-activation": lambda: network("pre"),
}


def projection() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(6, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))


def scaled() -> nn.Module:
    block = BasicBlock(6, 6)
    block.branch_scale = nn.Parameter(torch.tensor(0.7))
    block.skip_scale = 0.5
    return block


def network(order: Literal["post", "pre"]) -> nn.Module:
    """With the stem and its pooling, and what stands behind the blocks."""
    return ResNet(BasicBlock, (1, 1, 0, 0), num_classes=3, order=order, in_channels=6)


class Gated(nn.Module):
    """relu(gate(mean of branch) * branch + x), as squeeze-excitation."""

    def __init__(self, channels: int = 6, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), norm(channels)
        self.fc = nn.Linear(channels, channels)

    def gate(self, means: Tensor) -> Tensor:
        return self.fc(means).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        z = self.bn(self.conv(x))
        return (z * self.gate(z.mean((2, 3)))[:, :, None, None] + x).relu()


register_block(
    Gated,
    lambda block: BlockModules((StageModules(block.conv, block.bn, "relu"),), "identity", gate=block.gate),  # type: ignore[arg-type]
)


class SeveralCalls(nn.Module):
    """relu(bn2(conv2(gate(relu(bn1(conv1(x)))))) + bn3(conv3(pool(x)))): a gate in the branch, a pooling beside it."""

    def __init__(self, channels: int = 6, width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid())
        self.conv2, self.bn2 = nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.pool = nn.AvgPool2d(2)
        self.conv3, self.bn3 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def factors(self, means: Tensor) -> Tensor:
        return self.gate(means[:, :, None, None])[:, :, 0, 0]

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(self.gate(inner) * inner)) + self.bn3(self.conv3(self.pool(x)))).relu()


register_block(
    SeveralCalls,
    lambda block: CompositeModules(  # type: ignore[arg-type]
        (BlockModules((StageModules(block.conv1, block.bn1, "relu"),), "none", order="branch", gate=block.factors),),
        BlockModules((StageModules(block.conv2, block.bn2, "relu"),), "none"),
        (block.pool, BlockModules((StageModules(block.conv3, block.bn3, None),), "none")),
    ),
)


@dataclass(frozen=True)
class Shared:
    """One run: which block, and how many pictures each process has.

    converted: "before" or "after" fuse to SyncBatchNorm. only: the one norm that is converted, or all. ddp: wrapped in
    DistributedDataParallel, which refuses SyncBatchNorm on the CPU when it is made, so norms are converted behind that.
    """

    block: str
    batches: tuple[int, int] = (3, 1)
    dtype: torch.dtype = torch.float32
    converted: str = "before"
    only: str | None = None
    ddp: bool = False
    autocast: bool = False
    size: int = 4
    seed: int = 0

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        torch.manual_seed(self.seed)
        block = BLOCKS[self.block]()
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
        return nn.Sequential(block).to(dtype or self.dtype)

    def synchronised(self) -> nn.Module:
        model = self.model()
        if self.converted == "after":
            model = fuse(model)
        wrapped = DistributedDataParallel(model) if self.ddp else model
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
        if self.only is None:
            convert(model)
        else:
            setattr(model[0], self.only, convert(getattr(model[0], self.only)))  # type: ignore[index]
        fuse(model)
        return wrapped

    def pictures(self, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(2 + 2 * self.seed)
        shape = (sum(self.batches), 6, self.size, self.size)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
        return x.to(self.dtype).to(dtype or self.dtype).contiguous(memory_format=torch.channels_last)

    def part(self, rank: int) -> slice:
        start = sum(self.batches[:rank])
        return slice(start, start + self.batches[rank])


def gradient_above(out: Tensor, part: slice, call: Shared) -> Tensor:
    """Of this part's outputs, drawn for all pictures."""
    generator = torch.Generator().manual_seed(3 + 2 * call.seed)
    return torch.randn((sum(call.batches), *out.shape[1:]), generator=generator, dtype=torch.float64)[part].to(
        out.dtype
    )


def results(call: Shared, model: nn.Module, x: Tensor, part: slice) -> dict[str, Tensor]:
    """The output, every gradient, every buffer after a step, and the output in evaluation."""
    x = x[part].detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=call.autocast):
        out = model(x)
    out.backward(gradient_above(out, part, call))
    gradients = {"x": x, **dict(model.named_parameters())}
    found = {"out": out.detach()} | {f"grad of {n}": t.grad for n, t in gradients.items()} | dict(model.named_buffers())
    with torch.no_grad():
        found["evaluated"] = model.eval()(x.detach())
    return {name.replace("module.", ""): t.detach() for name, t in found.items() if t is not None}


def compute(rank: int, calls: list[Shared], folder: str) -> None:
    """One process's part of every call; an error is a result too."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    got: list[dict[str, Any]] = []
    for call in calls:
        model = call.synchronised()
        before = {n: t.clone() for n, t in model.named_buffers()}
        explained = [(row.backend, row.reason) for row in explain(model)]
        try:
            got.append(results(call, model, call.pictures(), call.part(rank)))
            if not call.ddp and not call.autocast and call.dtype == torch.float32:
                got[-1]["explained"] = explained
        except ValueError as error:
            moved = [n for n, t in model.named_buffers() if not torch.equal(t, before[n])]
            got.append({"error": str(error), "moved": moved})
    torch.save(got, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
