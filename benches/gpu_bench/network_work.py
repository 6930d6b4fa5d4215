"""What is timed: the whole of ResNet-50."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from gpu_bench.clock import Step
from gpu_bench.contestants import COMPILED, GRAPH, NETWORKS, compiled
from gpu_bench.setting import DTYPE, LAST, Setting
from torch import Tensor, nn

from resnet_fused import fuse, models, tune
from resnet_fused.tools import named_models


class NetworkWork:
    """ResNet-50 under bfloat16 autocast, float32 weights. Training: forward and backward of the cross entropy."""

    def __init__(self, batch: int, setting: Setting, tuned: set[tuple[int, str]]) -> None:
        """tuned: batches and directions for which somebody has called `tune` already."""
        self.batch, self.tuned = batch, tuned
        torch.manual_seed(0)
        model = _tiny_network() if setting.dry else models.resnet50(fused=False)
        self.model = model.to(setting.device, memory_format=LAST)  # type: ignore[call-overload]
        x = torch.randn(batch, 3, setting.image, setting.image, device=setting.device)
        self.x, self.dry = x.contiguous(memory_format=LAST), setting.dry
        self.labels = torch.arange(batch, device=setting.device) % 10
        with torch.autocast(setting.device, DTYPE):  # in the dtype of the steps, for the search of cudnn.benchmark
            named_models.settle_norms(self.model, self.x)

    def step(self, contestant: str, direction: str) -> Step:
        model = copy.deepcopy(self.model).train(direction != "evaluation")
        backend = NETWORKS.get(contestant.removesuffix(GRAPH))
        if backend is not None:
            fuse(model, backend=backend)
        if backend == "auto" and not self.dry and (self.batch, direction) not in self.tuned:
            self.tuned.add((self.batch, direction))
            with torch.autocast(self.x.device.type, DTYPE):  # auto follows what was measured, and nothing else
                tune(model, self.x)
        run = compiled(model, contestant, self.dry) if contestant in COMPILED else model

        def loss() -> Tensor:
            with torch.autocast(self.x.device.type, DTYPE):
                return F.cross_entropy(run(self.x).float(), self.labels)

        def train() -> None:
            model.zero_grad(set_to_none=True)
            loss().backward()

        if direction == "training":
            return train
        evaluate = torch.no_grad()(loss)
        return _captured(evaluate) if backend and contestant.endswith(GRAPH) and not self.dry else evaluate


def _captured(step: Step) -> Step:
    """The step as a CUDA graph; its results stay where they were captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def _tiny_network() -> nn.Module:
    layers = (nn.Conv2d(3, 16, 3), models.Bottleneck(16, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(*layers)
