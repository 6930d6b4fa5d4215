"""The blocks of ResNet-50 as specs and meta tensors: what is compiled ahead of time, costed and timed.

He et al. 2015 (arXiv:1512.03385) with the stride on the 3x3 convolution (v1.5), as torchvision has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from resnet_fused.ops.operators import Tensors
from resnet_fused.spec import BlockSpec, IntPair, StageSpec
from resnet_fused.spec.facts import Needs, facts
from resnet_fused.spec.tensors import BlockTensors

from ..host.backward import backward
from ..host.block import BlockPlan, given
from ..host.forward import forward
from ..host.infer import infer
from ..host.policies import Policy

Direction = Literal["forward", "backward", "infer"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "infer")


@dataclass(frozen=True)
class BlockShape:
    """count: how often the block occurs. convs: (out channels, in channels, kernel) in the order of spec.convs."""

    name: str
    count: int
    spec: BlockSpec
    channels: int
    size: IntPair
    convs: tuple[tuple[int, int, int], ...]

    def tensors(self, batch: int, dtype: torch.dtype, device: str = "meta") -> Tensors:
        """As the operators take them, channels_last, norms in float32; values are undefined."""
        tensors: Tensors = BlockTensors.filled(None, len(self.convs))
        tensors.x = _activation(batch, self.channels, self.size, dtype, device)
        tensors.weights = [_activation(k, c, (r, r), dtype, device) for k, c, r in self.convs]
        for vectors in (tensors.norm_weights, tensors.norm_biases, tensors.running_means, tensors.running_vars):
            vectors[:] = [
                torch.empty(k, device=device) if stage.norm else None
                for (k, _, _), stage in zip(self.convs, self.spec.convs, strict=True)
            ]
        return tensors

    def needs(self) -> Needs:
        """As training wants them: the picture needs no gradient."""
        needs = BlockTensors.filled(False, len(self.convs))
        needs.x = self.name != "stem"
        needs.weights = needs.norm_weights = needs.norm_biases = [True] * len(self.convs)
        return needs


def resnet50(image: int = 224) -> Iterator[BlockShape]:
    """Each kind of block once, from the stem on."""
    size = (image + 1) // 2
    yield BlockShape("stem", 1, BlockSpec((StageSpec(2, 3),)), 3, (image, image), ((64, 3, 7),))
    size, channels = (size + 1) // 2, 64
    for layer, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        stride = 1 if layer == 1 else 2
        out = 4 * width
        chain = ((width, channels, 1), (width, width, 3), (out, width, 1))
        stages = (StageSpec(), StageSpec(stride, 1), StageSpec())
        projection = StageSpec(stride, act="identity")
        spec = BlockSpec(stages, "projection", projection)
        yield BlockShape(f"layer{layer}.0", 1, spec, channels, (size, size), (*chain, (out, channels, 1)))
        size, channels = (size + stride - 1) // stride, out
        spec = BlockSpec((StageSpec(), StageSpec(1, 1), StageSpec()), "identity")
        chain = ((width, out, 1), (width, width, 3), (out, width, 1))
        yield BlockShape(f"layer{layer}.1", blocks - 1, spec, out, (size, size), chain)


def plan(shape: BlockShape, direction: Direction, batch: int, dtype: torch.dtype, policy: Policy) -> None:
    """Hands the launches of one direction to `policy.submit`; nothing is computed."""
    tensors, needs = shape.tensors(batch, dtype), shape.needs()
    spec, known = shape.spec, facts(shape.spec, needs)
    if direction == "forward":
        forward(spec, known, tensors, policy)
    elif direction == "infer":
        weights = [given(t) for t in tensors.weights]
        biases = [torch.empty(w.shape[0], dtype=dtype, device="meta") for w in weights]
        infer(spec, facts(spec), given(tensors.x), None, weights, biases, None, None, [None] * len(weights), policy)
    else:
        block = BlockPlan(spec, known, tensors, policy)
        outputs = [block.new(i) for i in known.saved]
        statistics = [torch.empty((2, block.width(i)), device="meta") for i in range(len(shape.convs))]
        out = block.new(block.last)
        backward(spec, known, out, out, outputs, statistics, tensors, needs, policy)


def _activation(n: int, c: int, size: IntPair, dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty((n, c, *size), dtype=dtype, device=device, memory_format=torch.channels_last)
