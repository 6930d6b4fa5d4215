"""What every contender of one table runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from resnet_fused.tools import named_models
from resnet_fused.tools.bench.side import calm
from resnet_fused.tools.pictures import photographs

Mode = Literal["eval", "train"]
DType = Literal["float32", "bfloat16", "autocast"]
MODES: tuple[Mode, ...] = ("eval", "train")
DTYPES: dict[DType, str] = {
    "float32": "float32",
    "bfloat16": "bfloat16 throughout",
    "autocast": "bfloat16 autocast",
}


@dataclass(frozen=True)
class Task:
    """model: a name of `named_models`; size: of the square pictures; images: a folder of them, None for noise.

    mode:    "eval" is the forward without autograd, "train" forward and backward of the cross entropy.
    dtype:   "bfloat16" has parameters and input in it, "autocast" casts float32 ones.
    backend: of the fused model.
    """

    model: str = "resnet50"
    mode: Mode = "eval"
    dtype: DType = "float32"
    batch: int = 16
    size: int = 224
    threads: int = 1
    device: str = "cpu"
    backend: str = "auto"
    images: str | None = None

    @property
    def title(self) -> str:
        mode = {"eval": "evaluation", "train": "training"}[self.mode]
        return f"{self.model}, {mode}, {DTYPES[self.dtype]}, batch {self.batch}, {self.size}x{self.size}"

    def build(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The float32 model, x [batch, 3, size, size] and labels [batch], the same in every process; channels_last."""
        torch.manual_seed(0)
        last = torch.channels_last
        model = named_models.build(self.model).to(self.device, memory_format=last)  # type: ignore[call-overload]
        if self.images is None:
            x = torch.randn(self.batch, 3, self.size, self.size)
        else:
            x = photographs(self.batch, self.size, Path(self.images))
        x = x.to(self.device).contiguous(memory_format=last)
        named_models.settle_norms(model, x)
        calm(model)
        return model.train(self.mode == "train"), x, torch.arange(self.batch, device=self.device) % 1000

    def cast(self, model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
        """Model (in place) and x in the dtype that they are kept in."""
        return (model.bfloat16(), x.bfloat16()) if self.dtype == "bfloat16" else (model, x)

    @property
    def context(self) -> Callable[[], AbstractContextManager[object]]:
        """What the forward runs in."""
        device = torch.device(self.device).type
        return (lambda: torch.autocast(device, torch.bfloat16)) if self.dtype == "autocast" else nullcontext


def cores(threads: int | None = None) -> list[int]:
    """As many cores as threads, of those this process may use: all by default. Raises ValueError for too many."""
    allowed = sorted(os.sched_getaffinity(0))
    if threads is not None and not 1 <= threads <= len(allowed):
        raise ValueError(f"--threads {threads}: accepted is 1 to {len(allowed)}, the cores that this process may use")
    return allowed[:threads]
