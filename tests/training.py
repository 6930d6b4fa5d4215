"""A few training steps of a model, recorded, and the comparison of a fused model's steps with eager's."""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
import torch.nn.functional as F
from equivalence import assert_all_as_accurate
from torch import Tensor, nn

from resnet_fused import fuse, unfuse
from resnet_fused.spec import Memory

Record = dict[str, Tensor | None]


def train(
    model: nn.Module, pictures: Tensor, *, steps: int = 1, autocast: torch.dtype | None = None, lr: float = 1e-3
) -> Record:
    """SGD with momentum on the same labelled pictures: outputs, all gradients and all buffers, stacked over steps.

    A feature map stands for its channels' means. `evaluation` is the output of the trained model in eval mode.
    """
    labels = torch.arange(len(pictures)) % 5
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9) if parameters else None
    seen: dict[str, list[Tensor | None]] = defaultdict(list)
    for _ in range(steps):
        model.zero_grad()
        x = pictures.clone().requires_grad_()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = model(x)
        logits = out if out.dim() == 2 else out.mean((2, 3))
        F.cross_entropy(logits.to(x.dtype), labels).backward()
        seen["output"].append(out.detach())
        seen["gradient of the input"].append(x.grad)
        for name, parameter in model.named_parameters():
            seen[f"gradient of {name}"].append(None if parameter.grad is None else parameter.grad.clone())
        for name, buffer in model.named_buffers():
            seen[name].append(buffer.clone())
        if optimizer is not None:
            optimizer.step()
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
        seen["evaluation"].append(model.eval()(pictures))
    for module, mode in modes.items():
        module.training = mode
    return {name: _stack(values) for name, values in seen.items()}


def assert_trains_as_eager(
    model: nn.Module,
    pictures: Tensor,
    *,
    steps: int = 1,
    autocast: torch.dtype | None = None,
    memory: Memory = "default",
    factor: float = 2,
) -> None:
    """Copies of `model`, fused, eager and in fp64, train alike, by the rule of `equivalence`."""
    eager = unfuse(copy.deepcopy(model))
    fused = fuse(copy.deepcopy(eager), memory=memory)
    exact = copy.deepcopy(eager).double()
    assert_all_as_accurate(
        train(fused, pictures, steps=steps, autocast=autocast),
        train(eager, pictures, steps=steps, autocast=autocast),
        train(exact, pictures.double(), steps=steps),
        factor,
    )


def _stack(values: list[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    assert len(present) in (0, len(values)), "a gradient came and went between steps"
    return torch.stack(present) if present else None
