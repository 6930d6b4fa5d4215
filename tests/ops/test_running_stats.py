"""Running statistics against nn.BatchNorm2d itself, which sees the convolution outputs one stage at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.blocks import Case, block
from support.matrix import BACKENDS, FORMATS, LOW_PRECISION
from support.named_tensors import leaves, named_tensors
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.params import BlockParams, StageParams, map_tensors
from resnet_fused.spec import BlockSpec, StageSpec

backends = pytest.mark.parametrize("backend", ["eager", *BACKENDS])
momenta = pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])

CASE = block(3, "projection", channels=4, width=5, out_channels=6, stride=2, size=(7, 6))


def batch_norm(stage: StageSpec, tensors: StageParams) -> nn.BatchNorm2d:
    """PyTorch's own module with the stage's parameters and copies of its buffers."""
    assert tensors.norm_weight is not None
    bn = nn.BatchNorm2d(tensors.norm_weight.numel(), stage.eps, tensors.momentum).to(tensors.norm_weight.dtype)
    bn.load_state_dict(
        {
            "weight": tensors.norm_weight,
            "bias": tensors.norm_bias,
            "running_mean": tensors.running_mean,
            "running_var": tensors.running_var,
            "num_batches_tracked": tensors.num_batches_tracked,
        }
    )
    return bn.train(stage.batch_stats)


class ModuleChain:
    """The post-activation chain and its projection out of modules; `buffers` are what they end up with."""

    def __init__(self, params: BlockParams, spec: BlockSpec) -> None:
        self.norms = [batch_norm(stage, tensors) for stage, tensors in zip(spec.convs, params.convs, strict=True)]
        self.params, self.spec = params, spec

    def __call__(self, x: Tensor) -> None:
        u = x
        for i, (stage, tensors) in enumerate(zip(self.spec.convs, self.params.convs, strict=True)):
            source = x if i == len(self.spec.stages) else u
            y = F.conv2d(source, tensors.weight, None, *stage.geometry, stage.groups)
            u = torch.relu(self.norms[i](y))

    @property
    def buffers(self) -> dict[str, Tensor]:
        names = [*(f"stages.{i}" for i in range(len(self.spec.stages))), "projection"]
        return {f"{n}.{b}": t for n, bn in zip(names, self.norms, strict=False) for b, t in bn.named_buffers()}


def buffers_after(
    case: Case, backend: str, steps: int = 3, dtype: torch.dtype = torch.float64, **build: object
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The block's buffers and the modules', after `steps` batches."""
    x, params, spec = case.build(dtype, **build)  # type: ignore[arg-type]
    params = leaves(params)
    modules = ModuleChain(params, spec)
    for step in range(steps):
        batch = x * (step + 1) - step
        modules(batch)
        functional.residual_block(batch, params, spec, backend=backend)
    named = named_tensors(params)
    return {name: named[name] for name in modules.buffers}, modules.buffers


@backends
@momenta
@pytest.mark.parametrize("memory_format", FORMATS)
def test_like_batch_norm(memory_format: torch.memory_format, momentum: float | None, backend: str) -> None:
    """Unbiased variance, cumulative average for None, nothing for 0."""
    got, expected = buffers_after(replace(CASE, momentum=momentum), backend, memory_format=memory_format)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert all(t == 6 for name, t in got.items() if name.endswith("num_batches_tracked"))


@backends
def test_momentum_zero_changes_nothing(backend: str) -> None:
    x, params, spec = replace(CASE, momentum=0.0).build()
    before = {name: t.clone() for name, t in named_tensors(params).items() if "running" in name}
    functional.residual_block(x, params, spec, backend=backend)
    for name, t in before.items():
        assert torch.equal(named_tensors(params)[name], t), name


@backends
def test_two_values_per_channel(backend: str) -> None:
    """The unbiased variance is twice the biased one there, the largest difference that the two can have."""
    case = block(2, "none", kernel=1, channels=3, width=3, size=(1, 1), batch=2, momentum=1.0)
    got, expected = buffers_after(case, backend, steps=1)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@backends
def test_frozen_norms_keep_their_statistics(backend: str) -> None:
    case = block(3, "projection", channels=4, width=5, out_channels=6, stride=2, batch_stats=(True, False, True, False))
    before = named_tensors(case.build()[1])
    got, expected = buffers_after(case, backend)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    for name in got:
        moved = name.startswith(("stages.0", "stages.2"))
        assert torch.equal(got[name], before[name]) != moved, name


@backends
def test_without_tracking(backend: str) -> None:
    x, params, spec = block(2, tracked=False).build()
    functional.residual_block(x, params, spec, backend=backend)
    assert not any("running" in name for name in named_tensors(params))


@backends
def test_without_counter(backend: str) -> None:
    """momentum=None and no counter: the average cannot move, as in nn.BatchNorm2d. A momentum needs no counter."""
    for momentum, moves in ((None, False), (0.1, True)):
        x, params, spec = replace(CASE, momentum=momentum).build()
        stages = tuple(replace(s, num_batches_tracked=None) for s in params.stages)
        params = leaves(replace(params, stages=stages))
        before = params.stages[0].running_mean.clone()  # type: ignore[union-attr]
        functional.residual_block(x, params, spec, backend=backend)
        assert torch.equal(before, params.stages[0].running_mean) != moves  # type: ignore[arg-type]


@backends
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("norm_dtype", [None, torch.float32])
@momenta
def test_low_precision(
    momentum: float | None, norm_dtype: torch.dtype | None, dtype: torch.dtype, backend: str
) -> None:
    """Buffers keep their dtype, and are as near to fp64's as PyTorch's."""
    case = block(1, "none", channels=6, out_channels=8, size=(9, 8), momentum=momentum)
    x, params, spec = case.build(dtype, torch.channels_last, norm_dtype=norm_dtype)
    exact = map_tensors(params, lambda n, t: t.double() if t.is_floating_point() else t.clone())
    eager, got = leaves(params), leaves(params)
    functional.residual_block(x.double(), exact, spec, backend="eager")
    functional.residual_block(x, eager, spec, backend="eager")
    functional.residual_block(x, got, spec, backend=backend)
    for name in ("running_mean", "running_var"):
        true, theirs, ours = (getattr(p.stages[0], name) for p in (exact, eager, got))
        assert ours.dtype == theirs.dtype == (norm_dtype or dtype)
        error, peer = ((t.double() - true).abs().max() for t in (ours, theirs))
        assert error <= max(2 * peer, 4 * torch.finfo(theirs.dtype).eps * true.abs().max()), name


@backends
def test_pre_activation_normalises_the_input(backend: str) -> None:
    """The first norm's statistics are x's own."""
    x, params, spec = block(2, order="pre", channels=3, width=4, momentum=1.0).build()
    functional.residual_block(x, params, spec, backend=backend)
    torch.testing.assert_close(params.stages[0].running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(params.stages[0].running_var, x.var((0, 2, 3)))


@backends
def test_gradient_does_not_reach_the_buffers(backend: str) -> None:
    x, params, spec = CASE.build()
    params = leaves(params)
    functional.residual_block(x, params, spec, backend=backend).sum().backward()
    for name, t in named_tensors(params).items():
        if "running" in name:
            assert not t.requires_grad and t.grad_fn is None, name
