"""Evaluation keeps folded weights: writes to parameters and buffers are seen, what is not finite is not lost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from resnet_fused import explain, functional, fuse, models
from resnet_fused.models.resnet import Bottleneck
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import BlockSpec, StageSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def projection(inplanes: int, planes: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, 2, bias=False), nn.BatchNorm2d(planes))


def block(seed: int = 0) -> nn.Module:
    """A bottleneck with a projection, whose 3x3 weights are larger than what a fingerprint reads whole."""
    torch.manual_seed(seed)
    module = Bottleneck(64, 32, 2, projection(64, 128)).eval()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.running_mean, std=0.3)
            nn.init.uniform_(child.running_var, 0.5, 1.5)
    return module


def pictures() -> Tensor:
    return torch.randn(2, 64, 9, 7, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_fresh(eager: nn.Module, fused: nn.Module, x: Tensor) -> None:
    expected, got = eager(x), fused(x)
    scale = expected.abs().max()
    assert float((got - expected).abs().max() / scale) < 1e-5, "evaluation used weights of before"


def both() -> tuple[nn.Module, nn.Module]:
    """A block and its fused copy, which has evaluated once and so has folded its weights."""
    eager = block()
    fused = fuse(copy.deepcopy(eager))
    assert_fresh(eager, fused, pictures())
    return eager, fused


# --- writes that move no version counter -----------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1, fused=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.1, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_steps_in_evaluation_mode(name: str) -> None:
    """Also one that changes only values which a fingerprint does not sample."""
    eager, fused = both()
    for sparse in (False, True):
        for module in (eager, fused):
            for i, parameter in enumerate(module.parameters()):
                generator = torch.Generator().manual_seed(i)
                gradient = torch.randn(parameter.shape, generator=generator)
                if sparse:
                    keep = torch.zeros(parameter.numel())
                    keep[33::1021] = 1  # no multiple of 16 floats, which are a cache line
                    gradient = gradient * keep.view_as(gradient)
                parameter.grad = gradient
            OPTIMIZERS[name](list(module.parameters())).step()
        assert_fresh(eager, fused, pictures())


def write_through_data(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(tensor.data * 1.25 + 0.01)


def write_through_numpy(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            shared = tensor.detach().numpy()
            shared *= 1.25


def replace_data(module: nn.Module) -> None:
    for tensor in module.parameters():
        tensor.data = tensor.data * 1.25


def average(module: nn.Module) -> None:
    """An exponential moving average, as training loops keep one for evaluation."""
    other = block(seed=3)
    for mine, its in zip(module.parameters(), other.parameters(), strict=True):
        mine.data.mul_(0.9).add_(its.data, alpha=0.1)
    for mine, its in zip(module.buffers(), other.buffers(), strict=True):
        mine.data.copy_(its.data)


def one_norm(module: nn.Module) -> None:
    """A single value of a norm, behind PyTorch's back: norms are read whole."""
    module.bn2.running_var.data[5] = 3.0  # type: ignore[union-attr, index]


@pytest.mark.parametrize("write", [write_through_data, write_through_numpy, replace_data, average, one_norm])
def test_writes_behind_pytorchs_back(write: Callable[[nn.Module], None]) -> None:
    eager, fused = both()
    for _ in range(2):
        write(eager)
        write(fused)
        assert_fresh(eager, fused, pictures())


def test_a_single_value_of_a_wide_norm() -> None:
    bn = nn.BatchNorm2d(4096).eval()
    params = BlockParams(
        (StageParams(torch.ones(4096, 1, 1, 1), None, bn.weight, bn.bias, bn.running_mean, bn.running_var),)
    )
    spec = BlockSpec((StageSpec(groups=4096, batch_stats=False, act="identity"),))
    x = torch.ones(1, 4096, 1, 1)
    with torch.no_grad():
        functional.residual_block(x, params, spec)
        bn.running_mean.data[33] = 5.0  # type: ignore[index]
        assert float(functional.residual_block(x, params, spec)[0, 33]) < -3


def test_averaged_models() -> None:
    eager, fused = both()
    models = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5)).eval() for m in (eager, fused)]
    for step in range(3):
        for module, averaged in zip((eager, fused), models, strict=True):
            write_through_data(module)
            averaged.update_parameters(module)
            if step == 2:
                update_bn([pictures()], averaged)
                averaged.eval()
        assert_fresh(*models, pictures())


def test_collectives(tmp_path: Path) -> None:
    """dist.broadcast and all_reduce write weights without moving a version counter."""
    torch.multiprocessing.spawn(_collectives, args=(str(tmp_path / "store"),), nprocs=2, join=True)


def _collectives(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    eager = block(seed=rank)
    fused = fuse(copy.deepcopy(eager))
    with torch.no_grad():
        fused(pictures())
        for collective in (lambda t: dist.broadcast(t, 0), dist.all_reduce):
            for module in (eager, fused):
                for parameter in module.parameters():
                    collective(parameter)  # type: ignore[operator]
            assert_fresh(eager, fused, pictures())
    dist.destroy_process_group()


def test_tensors_made_in_inference_mode() -> None:
    """They have no version counter, so all of them is read at every call."""
    with torch.inference_mode():
        eager = block()
        fused = fuse(copy.deepcopy(eager))
        for _ in range(2):
            for module in (eager, fused):
                module.conv2.weight.view(-1)[33] += 1.0  # type: ignore[union-attr, index]
            assert_fresh(eager, fused, pictures())


def test_swapped_and_converted_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.utils.swap_tensors`` refuses a tensor that has weak references."""
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    eager, fused = both()
    for module in (eager, fused):
        module.to(torch.bfloat16).to(torch.float32).double().float()
    assert_fresh(eager, fused, pictures())
    state = {name: tensor * 1.25 for name, tensor in eager.state_dict().items()}
    for module in (eager, fused):
        module.load_state_dict(state)
    assert_fresh(eager, fused, pictures())


def test_copies_fold_for_themselves() -> None:
    eager, fused = both()
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_fresh(eager, copied, pictures())
        write_through_data(copied)
        assert_fresh(eager, fused, pictures())


def test_what_was_folded_goes_with_the_module() -> None:
    _, fused = both()
    kept = fused._fused_description.block[0].kept
    assert kept.folded is not None
    fused.train()
    assert fused._fused_description.block is None
    fused.eval()
    with torch.no_grad():
        fused(pictures())
    assert fused._fused_description.block[0].kept is not kept


# --- values that are not finite --------------------------------------------------------------------------------------

PARTS = ["conv1.weight", "conv2.weight", "conv3.weight", "downsample.0.weight"]
NORMS = ["bn1", "bn2", "bn3", "downsample.1"]
PARTS += [f"{n}.{part}" for n in NORMS for part in ("weight", "bias", "running_mean", "running_var")]


@pytest.mark.parametrize("late", [False, True], ids=["before folding", "after folding"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_that_are_not_finite(dtype: torch.dtype, late: bool) -> None:
    """-1 in a variance is a NaN, too."""
    cases = [(part, bad) for part in PARTS for bad in (float("nan"), float("inf"))]
    cases += [(part, -1.0) for part in PARTS if part.endswith("running_var")]
    for part, bad in cases:
        eager = block().to(dtype)
        fused = fuse(copy.deepcopy(eager))
        assert_same_values_are_lost(eager, fused, pictures().to(dtype), part, bad, late)


@pytest.mark.parametrize("part", ["conv1.weight", "bn1.running_var", "layer1.0.conv1.weight"])
def test_a_network_that_is_not_finite(part: str) -> None:
    """The stem, too, and under autocast."""
    torch.manual_seed(0)
    eager = models.resnet18(fused=False).eval()
    fused = fuse(copy.deepcopy(eager))
    x = torch.randn(2, 3, 32, 32)
    assert_same_values_are_lost(eager, fused, x, part, float("nan"), late=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert bool(eager(x).isnan().all()) and bool(fused(x).isnan().all())


@torch.no_grad()
def assert_same_values_are_lost(
    eager: nn.Module, fused: nn.Module, x: Tensor, part: str, bad: float, late: bool
) -> None:
    if late:
        fused(x)
    for module in (eager, fused):
        owner, _, attribute = part.rpartition(".")
        getattr(module.get_submodule(owner), attribute).data.view(-1)[3] = bad
    expected, got = eager(x), fused(x)
    for lost in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(lost(got), lost(expected)), f"{part} of {bad}: other values are lost than in eager"


def test_weights_that_only_folding_makes_infinite() -> None:
    """In float16 a weight times a large scale overflows where PyTorch's order of operations does not."""
    eager = block().half()
    with torch.no_grad():
        eager.bn3.running_var.fill_(1e-8)  # of the last convolution: the engine folds it, too
        eager.bn3.eps = 1e-7
        eager.bn3.running_mean.zero_()
        eager.conv3.weight.mul_(1000.0)
        eager.bn2.weight.fill_(1e-4)
        eager.bn2.bias.zero_()
    fused = fuse(copy.deepcopy(eager))
    x = pictures().half()
    with torch.no_grad():
        expected, got = eager(x), fused(x)
    assert bool(expected.isfinite().all()) and bool(got.isfinite().all())
    (row,) = explain(fused)
    assert row.backend == "eager" and "not finite" in row.reason
    assert explain(fuse(block()))[0].backend == "native"
