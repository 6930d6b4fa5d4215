"""segmentation_models_pytorch: encoders with their stems, and decoders."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from resnet_fused import explain, fuse, unfuse
from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.modules.stem import FusedStem

smp = pytest.importorskip("segmentation_models_pytorch")
encoders = pytest.importorskip("segmentation_models_pytorch.encoders.senet")

NARROW = {"encoder_weights": None, "classes": 2}


def senet() -> nn.Module:
    return encoders.SENetEncoder(
        out_channels=[3, 64, 256, 512, 1024, 2048],
        depth=2,
        block=encoders.SEResNetBottleneck,
        layers=[1, 1, 1, 1],
        groups=1,
        reduction=16,
        dropout_p=None,
        inplanes=64,
        input_3x3=False,
    )


# the model, and how many of which classes are fused besides the encoder's blocks
MODELS: dict[str, tuple[Any, dict[str, int]]] = {
    "unet": (
        lambda: smp.Unet("resnet18", encoder_depth=3, decoder_channels=(16, 16, 8), **NARROW),
        {"ResNetEncoder": 1, "BasicBlock": 8, "UnetDecoderBlock": 3},
    ),
    "deeplab": (
        lambda: smp.DeepLabV3("resnet18", decoder_channels=16, decoder_aspp_dropout=0.0, **NARROW),
        {"ResNetEncoder": 1, "BasicBlock": 8, "ASPPConv": 3},
    ),
    "timm's encoder": (
        lambda: smp.Unet("tu-resnet10t", encoder_depth=3, decoder_channels=(16, 16, 8), **NARROW),
        {"BasicBlock": 2, "UnetDecoderBlock": 3},
    ),
    "se-resnet": (senet, {"SEResNetBottleneck": 4, "Sequential": 1}),
}


@pytest.mark.parametrize(("make", "fused"), MODELS.values(), ids=MODELS)
def test_outputs_gradients_and_statistics_are_eagers(make: Any, fused: dict[str, int]) -> None:
    """In float64, where only the order of sums differs."""
    torch.manual_seed(0)
    eager = make().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = fuse(copy.deepcopy(eager))
    for each in (eager, model):
        out = each(x)
        out = out if isinstance(out, torch.Tensor) else out[-1]
        torch.sin(out).sum().backward()
    for (name, expected), got in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert (expected.grad is None) is (got.grad is None), name
        if expected.grad is not None:
            scale = float(expected.grad.abs().max())
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-7, atol=1e-8 * max(scale, 1e-3))
    torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), eager.eval()(x), rtol=1e-8, atol=1e-8)
    found = Counter(type(m)._fused_from.__name__ for m in model.modules() if isinstance(m, FusedModule))
    assert {name: found[name] for name in fused} == fused
    assert not any(isinstance(m, FusedModule) for m in unfuse(model).modules())


def test_the_stem_is_a_row_of_its_encoder() -> None:
    model = fuse(smp.Unet("resnet18", encoder_depth=3, decoder_channels=(16, 16, 8), **NARROW))
    assert isinstance(model.encoder, FusedStem)
    assert ("encoder", "ResNetEncoder", "native", "") in explain(model)
