"""batch_norm_act for the tests: a `Case` says what to compute, `check` holds a backend against eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.equivalence import Results, assert_runs_as_accurate, pooled
from support.kinks import MANY, RARE, Kinks
from support.matrix import FORMATS
from support.shared_batch import results
from torch import Tensor, nn

from resnet_fused.spec.activations import KINDS

SEEDS = range(8)  # pooled, so that one lucky eager rounding does not set the bar


@dataclass(frozen=True)
class Case:
    """What to compute; `build` makes its tensors."""

    channels: int = 5
    size: tuple[int, int] = (5, 6)
    batch: int = 3
    residual: bool = True
    act: str = "relu"
    training: bool = True
    affine: bool = True
    tracked: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    mean: float = 0.3

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels, *self.size)

    def build(
        self,
        dtype: torch.dtype = torch.float64,
        memory_format: torch.memory_format = torch.contiguous_format,
        seed: int = 0,
        norm_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None, nn.BatchNorm2d, Tensor]:
        """x, residual, bn and the gradient from above. Drawn in fp64 and rounded, so every dtype sees the same."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(to)

        bn = nn.BatchNorm2d(self.channels, self.eps, self.momentum, self.affine, self.tracked).to(norm_dtype or dtype)
        with torch.no_grad():
            for tensor in bn.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(normal(self.channels).abs() + 0.5)
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.fill_(3)
        x = (normal(*self.shape, to=torch.float64) * 1.5 + self.mean).to(dtype)
        residual = normal(*self.shape).contiguous(memory_format=memory_format) if self.residual else None
        return x.contiguous(memory_format=memory_format), residual, bn.train(self.training), normal(*self.shape)


def check(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    memory_format: torch.memory_format = torch.channels_last,
    norm_dtype: torch.dtype | None = None,
    given_as: Callable[[Tensor], Tensor] = lambda t: t,
) -> None:
    """Every result, pooled over seeds. given_as: x as the backend gets it, with the same values."""
    runs: dict[str, list[Results]] = {"got": [], "eager": [], "other": [], "flipped": [], "exact": []}
    for seed in SEEDS:
        x, residual, bn, dout = case.build(dtype, memory_format, seed, norm_dtype)
        kinks = Kinks(dtype, MANY if dtype == torch.bfloat16 else RARE)
        runs["got"].append(run(given_as(x), residual, bn, dout, case.act, backend))
        with kinks.record():
            runs["eager"].append(run(x, residual, bn, dout, case.act, "eager"))
        with kinks.measure():
            runs["exact"].append(run(*double(x, residual, bn, dout), case.act, "eager"))
        with kinks.flip():
            runs["flipped"].append(run(*double(x, residual, bn, dout), case.act, "eager"))
        other = x.contiguous(memory_format=FORMATS[x.is_contiguous()])
        runs["other"].append(run(other, residual, bn, dout, case.act, "eager"))
    assert_runs_as_accurate({kind: pooled(each) for kind, each in runs.items()}, dtype, bool(KINDS[case.act].kinks))


def run(
    x: Tensor, residual: Tensor | None, bn: nn.Module, dout: Tensor, act: str = "relu", backend: str = "native"
) -> Results:
    """The output, every gradient and the buffers afterwards; the module given is left as it is."""
    return results(x, residual, dout, copy.deepcopy(bn), act, backend)


def double(*given: Tensor | nn.Module | None) -> list:
    return [copy.deepcopy(t).double() if t is not None else None for t in given]
