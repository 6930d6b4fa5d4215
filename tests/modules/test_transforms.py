"""What takes a model apart or differentiates it in other ways: torch.func, forward mode, fx, jit, export, autocast."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import resnet_fused
from resnet_fused import BackendError, functional, fuse
from resnet_fused.models.resnet import BasicBlock, Bottleneck
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import BlockSpec, StageSpec

ATOL = 1e-12


def net() -> nn.Sequential:
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    return nn.Sequential(Bottleneck(4, 2, 2, downsample), BasicBlock(8, 8)).double().eval()


def both() -> tuple[nn.Module, nn.Module]:
    eager = net()
    return eager, fuse(copy.deepcopy(eager))


def picture(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 4, 7, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradient(model: nn.Module) -> object:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (picture(),)).square().sum()

    return torch.func.grad(loss)(dict(model.named_parameters()))


TRANSFORMS: dict[str, Callable[[nn.Module], object]] = {
    "grad": gradient,
    "vmap": lambda model: torch.func.vmap(model)(picture(3, 2, 4, 7, 6)),
    "jvp": lambda model: torch.func.jvp(model, (picture(),), (picture(2, 4, 7, 6) + 1,)),
    "hessian": lambda model: torch.func.hessian(lambda x: model(x).square().sum())(picture(1, 4, 3, 3)),
    "per-sample gradients": lambda model: torch.func.vmap(torch.func.grad(lambda x: model(x[None]).sum()))(picture()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name: str) -> None:
    eager, fused = both()
    torch.testing.assert_close(TRANSFORMS[name](fused), TRANSFORMS[name](eager), rtol=ATOL, atol=ATOL)


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode(grad: bool) -> None:
    """A tangent is never dropped, with autograd or without."""
    tangents = []
    for model in both():
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            out = model(forward_ad.make_dual(picture(), picture() + 1))
            tangents.append(forward_ad.unpack_dual(out).tangent)
    torch.testing.assert_close(tangents[1], tangents[0], rtol=ATOL, atol=ATOL)


def test_forward_mode_of_the_functions() -> None:
    weight = picture(4, 4, 1, 1)
    params = BlockParams((StageParams(weight),))
    bn = nn.BatchNorm2d(4).double().eval()
    spec = BlockSpec((StageSpec(norm=False, act="identity"),))
    x, tangent = picture(), picture() + 1
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        out = functional.residual_block(dual, params, spec)
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, torch.conv2d(tangent, weight))
        with pytest.raises(BackendError, match="forward-mode"):
            functional.residual_block(dual, params, spec, backend="native")
        by_weight = BlockParams((StageParams(forward_ad.make_dual(weight, weight)),))
        assert forward_ad.unpack_dual(functional.residual_block(x, by_weight, spec)).tangent is not None
        normed = functional.batch_norm_act(dual, bn, act="identity")
        torch.testing.assert_close(forward_ad.unpack_dual(normed).tangent, tangent / (1 + bn.eps) ** 0.5)
        assert forward_ad.unpack_dual(functional.max_pool2d(dual, 3, 2, 1)).tangent is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_jit() -> None:
    _, fused = both()
    with pytest.raises(RuntimeError, match="unfuse\\(model\\) first"):
        torch.jit.script(fused)
    assert all(type(m).__name__.startswith("Fused") for m in fused)  # type: ignore[attr-defined]
    traced = torch.jit.trace(fused, picture())
    torch.testing.assert_close(traced(picture()), fused(picture()), rtol=ATOL, atol=ATOL)


def test_fx_traces_the_blocks_own_forward() -> None:
    _, fused = both()
    traced = torch.fx.symbolic_trace(fused)
    torch.testing.assert_close(traced(picture()), fused(picture()), rtol=ATOL, atol=ATOL)


def test_feature_extractor_of_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    fused = fuse(models.resnet18(num_classes=4).double().eval())
    nodes, x = ["layer1", "layer2.0.relu", "layer3"], picture(1, 3, 33, 32)
    found = create_feature_extractor(fused, nodes)(x)
    expected = create_feature_extractor(resnet_fused.unfuse(fused), nodes)(x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=ATOL, atol=ATOL)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_exported_programs_with_fused_operators_can_be_saved(grad: bool, train: bool) -> None:
    eager, fused = (model.train(train) for model in both())
    with torch.set_grad_enabled(grad), resnet_fused.export_fused():
        program = torch.export.export(fused, (picture(),))
        assert any("resnet_fused" in str(node.target) for node in program.graph.nodes)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        torch.testing.assert_close(loaded(picture()), eager(picture()), rtol=ATOL, atol=ATOL)
    torch.testing.assert_close(dict(loaded.named_buffers()), dict(eager.named_buffers()), rtol=ATOL, atol=ATOL)


@pytest.mark.parametrize("train", [True, False])
def test_a_float32_skip_path_under_autocast(train: bool) -> None:
    """``out += identity`` keeps the branch's 16 bits; so does the fused block, whose gradient comes back in float32."""
    torch.manual_seed(0)
    eager = BasicBlock(8, 8).train(train)
    fused = fuse(copy.deepcopy(eager))
    results = []
    for model in (eager, fused):
        x = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.float().square().sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            results.append((out, x.grad, copy.deepcopy(model).eval()(x)))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).detach().float().norm() / theirs.detach().float().norm()) < 2**-6
    assert results[1][0].dtype == torch.bfloat16 and results[1][1].dtype == torch.float32
    assert resnet_fused.explain(fused)[0].backend == "native"
