"""What is run here: blocks, passes, networks, batches and directions, by the device and the backends at hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpu_bench.contestants import FUSED, NETWORKS
from gpu_bench.pass_shape import PassShape

from resnet_fused.spec import BlockSpec, StageSpec
from resnet_fused.triton_kernels.offline import resnet50

DIRECTIONS = {"forward": ("forward",), "training": ("forward", "backward"), "evaluation": ("infer",)}
LAST = torch.channels_last
DTYPE = torch.bfloat16
Key = tuple[str, int]  # a block's name or NETWORK, and the batch
NETWORK = "resnet50"


@dataclass(frozen=True)
class Setting:
    """backends: those that can run here."""

    device: str
    dry: bool
    batches: tuple[int, ...]
    image: int
    backends: tuple[str, ...] = ("native", "triton")

    @property
    def main_batch(self) -> int:
        """Comes first, and has its launches counted, which hardly depend on the batch."""
        return 32 if 32 in self.batches else self.batches[0]

    @property
    def small_batches(self) -> tuple[int, ...]:
        """Where launches take most of an evaluation's time."""
        return self.batches if self.dry else (1, 8)

    def fused(self) -> list[str]:
        return [name for name, (backend, *_) in FUSED.items() if backend in self.backends]

    def networks(self) -> list[str]:
        return [name for name, backend in NETWORKS.items() if backend in ("auto", *self.backends)]

    def passes(self) -> dict[str, PassShape]:
        """The two kinds of normalisation that a ResNet has, on its largest activations; none without their kernels."""
        if "native" not in self.backends:
            return {}
        sizes = [(16, 4)] if self.dry else [(64, 56), (256, 56), (1024, 14)]
        each = [PassShape(c, (size, size), residual) for c, size in sizes for residual in (False, True)]
        return {str(shape): shape for shape in each}

    def shapes(self) -> dict[str, resnet50.BlockShape]:
        if not self.dry:
            return {shape.name: shape for shape in resnet50.resnet50(self.image)}
        spec = BlockSpec((StageSpec(), StageSpec(1, 1), StageSpec()), "identity")
        return {"tiny": resnet50.BlockShape("tiny", 1, spec, 16, (4, 4), ((4, 16, 1), (4, 4, 3), (16, 4, 1)))}
