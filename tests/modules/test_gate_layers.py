"""Gates of the libraries in evaluation: one call where their layers are known, and today's path where they are not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.equivalence import assert_as_accurate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import explain, fuse
from resnet_fused.modules.gate_layers import layered
from resnet_fused.ops import operators
from resnet_fused.ops.gate import LayeredGate

if operators.load_error() is not None:
    pytest.skip("the extension is not built", allow_module_level=True)
timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision.models")


def se_resnet() -> nn.Module:
    return timm.models.resnet.Bottleneck(32, 8, attn_layer="se")


def eca_resnet() -> nn.Module:
    return timm.models.resnet.Bottleneck(32, 8, attn_layer="eca")


def regnet_y() -> nn.Module:
    block = models.regnet.ResBottleneckBlock
    return block(32, 32, 1, nn.BatchNorm2d, nn.ReLU, group_width=8, bottleneck_multiplier=1.0, se_ratio=0.25)


def mobilenet_v3() -> nn.Module:
    config = models.mobilenetv3.InvertedResidualConfig(16, 3, 32, 16, True, "HS", 1, 1, 1.0)
    return models.mobilenetv3.InvertedResidual(config, nn.BatchNorm2d)


def efficientnet() -> nn.Module:
    return timm.models._efficientnet_blocks.InvertedResidual(
        16, 16, exp_ratio=2.0, se_layer=timm.models._efficientnet_blocks.SqueezeExcite, act_layer=nn.SiLU
    )


BLOCKS = {made.__name__: made for made in (se_resnet, eca_resnet, regnet_y, mobilenet_v3, efficientnet)}
blocks = pytest.mark.parametrize("name", BLOCKS)


def block_of(name: str) -> nn.Module:
    """In evaluation, with statistics that change something."""
    torch.manual_seed(0)
    made = BLOCKS[name]().eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
            nn.init.uniform_(module.weight, 0.5, 1.5)  # timm makes the last one zero
    return made


def pictures(channels: int) -> Tensor:
    return torch.randn(3, channels, 7, 6, generator=torch.Generator().manual_seed(1))


def input_of(block: nn.Module) -> Tensor:
    conv = next(module for module in block.modules() if isinstance(module, nn.Conv2d))
    return pictures(conv.in_channels)


class Gates(TorchDispatchMode):
    """How often `gate_` is called."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() == "resnet_fused::gate_"
        return func(*args, **(kwargs or {}))


def gates_of(model: nn.Module, x: Tensor) -> int:
    with Gates() as gates:
        model(x)
    return gates.count


@blocks
@torch.no_grad()
def test_one_call_as_accurate_as_eager(name: str) -> None:
    block = block_of(name)
    fused, x = fuse(copy.deepcopy(block)), input_of(block)
    assert gates_of(fused, x) == 1
    assert_as_accurate("out", fused(x), block(x), copy.deepcopy(block).double()(x.double()))


def gate_parts(block: nn.Module) -> list[nn.Module]:
    """The layers and activations of the gate."""
    known = ("SEModule", "SqueezeExcite", "SqueezeExcitation", "EcaModule")
    (gate,) = (module for module in block.modules() if type(module).__name__ in known)
    pools = (nn.AdaptiveAvgPool2d, nn.Identity)
    return [child for child in gate.children() if not isinstance(child, pools)]


@blocks
@torch.no_grad()
def test_hooks_on_the_gates_children_run(name: str) -> None:
    """Registered after the first call; the block runs as it did before there was one call for all."""
    block = block_of(name)
    fused, x = fuse(copy.deepcopy(block)), input_of(block)
    fused(x)
    for i in range(len(gate_parts(block))):
        seen: list[Tensor] = []
        handle = gate_parts(fused)[i].register_forward_hook(lambda module, given, out, seen=seen: seen.append(out))
        out = fused(x)
        assert len(seen) == 1 and gates_of(fused, x) == 0
        torch.testing.assert_close(out, block(x))
        handle.remove()
        assert gates_of(fused, x) == 1


@blocks
@torch.no_grad()
def test_changed_layers_are_seen(name: str) -> None:
    block = block_of(name)
    fused, x = fuse(copy.deepcopy(block)), input_of(block)
    before = fused(x)
    for model in (block, fused):
        layer = next(part for part in gate_parts(model) if isinstance(part, (nn.Conv1d, nn.Conv2d)))
        layer.weight.data.mul_(-2)  # type: ignore[operator]
    assert not torch.equal(fused(x), before)
    torch.testing.assert_close(fused(x), block(x))
    for model in (block, fused):
        layer = next(part for part in gate_parts(model) if isinstance(part, (nn.Conv1d, nn.Conv2d)))
        layer.weight = nn.Parameter(layer.weight.detach() * 3)
    torch.testing.assert_close(fused(x), block(x))


@torch.no_grad()
def test_explain_says_where_the_gate_runs() -> None:
    block = nn.Sequential(block_of("se_resnet"))
    x = input_of(block)
    assert "the gate's mean, layers and product are one call" in explain(fuse(block), x)[0].reason
    block[0].se.gate = nn.Tanh()  # type: ignore[union-attr, assignment]
    assert "the gate's layers are PyTorch's own operations" in explain(block, x)[0].reason


def linear(act: nn.Module | None = None, **changes: Any) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(**({"in_channels": 4, "out_channels": 4, "kernel_size": 1} | changes)), act or nn.Sigmoid()


def near(**changes: Any) -> tuple[nn.Module, nn.Module]:
    return nn.Conv1d(**({"in_channels": 1, "out_channels": 1, "kernel_size": 3, "padding": 1} | changes)), nn.Sigmoid()


class OwnConv(nn.Conv2d):
    """It may compute anything."""


def test_which_layers_are_known() -> None:
    known = [linear(), (nn.Linear(4, 4), nn.ReLU()), near(), near(kernel_size=5, padding=2)]
    unknown = [
        linear(nn.Tanh()),
        linear(groups=2),
        linear(kernel_size=3, padding=1),
        linear(padding=1),
        linear(stride=2),
        (OwnConv(4, 4, 1), nn.Sigmoid()),
        near(padding=0),
        near(padding="same"),
        near(padding_mode="circular"),
        near(kernel_size=2),
        near(out_channels=2),
        near(dilation=2),
    ]
    for layers, expected in ((known, LayeredGate), (unknown, type(lambda: None))):
        for layer in layers:
            assert type(layered(lambda pooled: pooled, layer)) is expected, layer
    norm = nn.BatchNorm2d(4)
    assert type(layered(lambda pooled: pooled, linear(), unused=(norm,))) is not LayeredGate
