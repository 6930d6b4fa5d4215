"""One of two installations of resnet_fused, held by a worker whose import path begins with it.

Only what every version of the package has is imported: `fuse`, `models`.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused

CHECKED = (4, 64)  # batch and size of what is checked
SEEDS = 2
Values = dict[str, Tensor]


class Side:
    """model: a name of `resnet_fused.models`; batch, size: of what is timed; threads: of torch."""

    def __init__(self, model: str, batch: int, size: int, threads: int) -> None:
        torch.set_num_threads(threads)
        if not hasattr(resnet_fused.models, model):
            known = ", ".join(sorted(name for name in dir(resnet_fused.models) if name.startswith("resnet")))
            raise ValueError(f"resnet_fused.models has no {model!r}; accepted: {known}")
        torch.manual_seed(0)
        self.model = getattr(resnet_fused.models, model)(fused=False).to(memory_format=torch.channels_last)
        self.batch, self.size = batch, size
        with torch.no_grad():
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(std=0.1)
            calm(self.model)
            self.model(_noise(*CHECKED, seed=0))  # running statistics

    def where(self) -> str:
        """The package's file."""
        return str(resnet_fused.__file__)

    def errors(self, mode: str, dtype: str) -> dict[str, tuple[float, float]]:
        """(fused, eager) for each quantity: the relative error against eager float64, the larger of two seeds.

        "output", and in training "statistics" (running), "gradients" (of all parameters and x together), "worst
        gradient" (of a single one of them). The same as "output, timed shape" etc. against eager float32.
        """
        found: dict[str, tuple[float, float]] = {}
        cases = [("", torch.float64, _noise(*CHECKED, seed)) for seed in range(SEEDS)]
        cases.append((", timed shape", torch.float32, _noise(self.batch, self.size, 0)))
        for where, exactly, x in cases:
            exact = _run(copy.deepcopy(self.model).to(exactly), x.to(exactly), mode, "as it is")
            fused = _errors(_run(resnet_fused.fuse(copy.deepcopy(self.model)), x, mode, dtype), exact)
            eager = _errors(_run(copy.deepcopy(self.model), x, mode, dtype), exact)
            for what in fused:
                worst = found.get(what + where, (0.0, 0.0))
                found[what + where] = max(fused[what], worst[0]), max(eager[what], worst[1])
        return found

    def ready(self, mode: str, dtype: str) -> None:
        """Gets the fused model ready for `turn`."""
        x = _noise(self.batch, self.size, 0)
        self.step, _ = _step(resnet_fused.fuse(copy.deepcopy(self.model)), x, mode, dtype)
        self.step()

    def turn(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start


@torch.no_grad()
def calm(model: nn.Module, share: float = 0.2) -> None:
    """Scales the weight of each residual branch's last norm, where ResNets begin with zero, in place.

    At random weights a deep network amplifies rounding until 16-bit gradients are noise, whoever computes them, and
    nothing can be compared. So calmed, ResNet-50's are a third off instead of more than their own size.
    """
    for module in model.modules():
        last = getattr(module, "bn3", getattr(module, "bn2", None))
        if hasattr(module, "downsample") and isinstance(last, nn.BatchNorm2d) and last.affine:
            last.weight.mul_(share)


def _noise(batch: int, size: int, seed: int) -> Tensor:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def _step(model: nn.Module, x: Tensor, mode: str, dtype: str) -> tuple[Callable[[], Tensor], Tensor]:
    """A step, whose result is the output, and the leaf x that it differentiates."""
    if dtype == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    model.train(mode == "train")
    x.requires_grad_(mode == "train")
    labels = torch.arange(len(x)) % 1000

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext():
            return model(x)

    def training() -> Tensor:
        model.zero_grad(set_to_none=True)
        x.grad = None
        out = forward()
        torch.autograd.backward(F.cross_entropy(out if out.dtype == torch.float64 else out.float(), labels))
        return out.detach()

    return (training if mode == "train" else torch.no_grad()(forward)), x


def _run(model: nn.Module, x: Tensor, mode: str, dtype: str) -> dict[str, Values]:
    step, x = _step(model, x.detach().clone(), mode, dtype)
    values: dict[str, Values] = {"output": {"output": step()}}
    if mode == "train":
        gradients: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
        values["gradients"] = {name: grad for name, grad in gradients.items() if grad is not None}
        values["statistics"] = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return values


def _errors(given: dict[str, Values], exact: dict[str, Values]) -> dict[str, float]:
    found = {}
    for what, values in exact.items():
        if given[what].keys() != values.keys():
            found[what] = float("inf")
            continue
        off = {name: float((given[what][name].double() - value).norm()) for name, value in values.items()}
        size = {name: float(value.norm()) for name, value in values.items()}
        whole = sum(each**2 for each in size.values()) ** 0.5
        found[what] = sum(each**2 for each in off.values()) ** 0.5 / whole
        if what == "gradients":
            least = 1e-3 * whole / len(size) ** 0.5  # of one that is nothing but rounding, as a bias's before a norm
            found["worst gradient"] = max(off[name] / max(size[name], least) for name in size)
    # max() passes over a NaN
    return {what: error if error == error else float("inf") for what, error in found.items()}
