"""transformers' models, fused: small configurations, without weights from a hub."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse, unfuse
from resnet_fused.modules.fused_block import FusedModule

transformers = pytest.importorskip("transformers")
rt_detr = pytest.importorskip("transformers.models.rt_detr.modeling_rt_detr")
rt_detr_resnet = pytest.importorskip("transformers.models.rt_detr.modeling_rt_detr_resnet")
d_fine = pytest.importorskip("transformers.models.d_fine.modeling_d_fine")
uvdoc = pytest.importorskip("transformers.models.uvdoc.modeling_uvdoc")


class Logits(nn.Module):
    """A classifier that returns a tensor, as `support.training` wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


class LastMap(nn.Module):
    """A backbone's last feature map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).feature_maps[-1]


SMALL: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1]}


def resnet(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**SMALL, num_labels=5, **arguments))


def regnet(layer_type: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.RegNetConfig(**SMALL, num_labels=5, layer_type=layer_type, groups_width=8)
    return transformers.RegNetForImageClassification(config)


def rt_detr_backbone(layer_type: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = SMALL | {"embedding_size": 16}  # as the first stage, whose basic layers cannot change it
    config = transformers.RTDetrResNetConfig(**sizes, layer_type=layer_type, out_features=["stage2"])
    return rt_detr_resnet.RTDetrResNetBackbone(config)


def pictures(n: int = 4, size: int = 33) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def unfused(model: nn.Module) -> dict[str, str]:
    return {
        row.name: row.reason for row in explain(model) if not isinstance(model.get_submodule(row.name), FusedModule)
    }


MODELS: dict[str, Any] = {
    "basic": lambda: Logits(resnet(layer_type="basic")),
    "bottleneck": lambda: Logits(resnet(layer_type="bottleneck")),
    "bottleneck, downsampling early": lambda: Logits(resnet(downsample_in_bottleneck=True)),
    "regnet x": lambda: Logits(regnet("x")),
    "regnet y": lambda: Logits(regnet("y")),
    "rt-detr basic": lambda: LastMap(rt_detr_backbone("basic")),
    "rt-detr bottleneck": lambda: LastMap(rt_detr_backbone("bottleneck")),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models_are_fused_whole_and_train_as_eager(make: Any) -> None:
    model = make()
    assert_trains_as_eager(model, pictures())
    before = {name: type(module) for name, module in model.named_modules()}
    fuse(model)
    blocks = [m for m in model.modules() if hasattr(type(m), "_fused_from")]
    assert sum("ConvLayer" not in type(m).__name__ and type(m).__name__.endswith("Layer") for m in blocks) == 3
    assert any("Embeddings" in type(m).__name__ or "ConvLayer" in type(m).__name__ for m in blocks)  # the stem
    assert unfused(model) == {}
    assert {name: type(module) for name, module in unfuse(model).named_modules()} == before


def test_autocast() -> None:
    assert_trains_as_eager(Logits(resnet()), pictures(), autocast=torch.bfloat16)


def test_hidden_states_are_eagers() -> None:
    model = resnet().eval()
    fused = fuse(copy.deepcopy(model))
    expected = model(pictures(), output_hidden_states=True)
    got = fused(pictures(), output_hidden_states=True)
    assert len(got.hidden_states) == 3
    torch.testing.assert_close(got.hidden_states, expected.hidden_states)


def test_a_fused_model_is_saved_as_its_unfused_self(tmp_path: Path) -> None:
    model = fuse(resnet())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is transformers.ResNetForImageClassification
    assert not any(isinstance(module, FusedModule) for module in loaded.modules())
    for each in (model, loaded):
        each.eval()
    torch.testing.assert_close(fuse(loaded)(pictures()).logits, model(pictures()).logits)
    torch.testing.assert_close(unfuse(loaded)(pictures()).logits, model(pictures()).logits)


def test_compiled() -> None:
    stage = resnet().eval().resnet.encoder.stages[0]
    compiled = torch.compile(fuse(copy.deepcopy(stage)), backend="eager", fullgraph=True)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), stage(x))


def test_frozen_norms_of_detectors() -> None:
    """DETR replaces every batch norm of its backbone by its own frozen class."""
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    backbone = transformers.ResNetBackbone(transformers.ResNetConfig(**SMALL, out_features=["stage2"]))
    with torch.no_grad():
        detr.replace_batch_norm(backbone)
    assert_trains_as_eager(LastMap(backbone), pictures())
    assert unfused(fuse(backbone)) == {}


def test_hooks_on_a_part_leave_the_block_alone() -> None:
    model = regnet("y")
    layer = model.regnet.encoder.stages[0].layers[1]
    seen: list[Tensor] = []
    layer.layer[2].pooler.register_forward_hook(lambda module, inputs, output: seen.append(output))
    fuse(model)
    model(pictures())
    assert len(seen) == 1
    assert "hooks" in unfused(model)["regnet.encoder.stages.0.layers.1"]


class _Config:
    """What a RepVGG block reads of its model's configuration."""

    encoder_hidden_dim, hidden_expansion, activation_function, batch_norm_eps = 16, 1.0, "silu", 1e-5


class _Gelu(_Config):
    activation_function = "gelu"


LAYERS: dict[str, Any] = {
    "rt-detr's RepVGG block": lambda: rt_detr.RTDetrRepVggBlock(_Config()),
    "another activation": lambda: rt_detr.RTDetrRepVggBlock(_Gelu()),
    "d-fine's RepVGG block": lambda: d_fine.DFineRepVggBlock(_Config(), 16, 24),
    "uvdoc's block": lambda: uvdoc.UVDocResidualBlock(16, 16, 3, padding=2, dilation=2),
    "uvdoc's projection": lambda: uvdoc.UVDocResidualBlock(16, 24, 5, stride=2, padding=2, downsample=True),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_of_other_models(make: Any) -> None:
    torch.manual_seed(0)
    layer = make()
    for name, parameter in layer.named_parameters():
        if "convolution.bias" in name:  # before a batch norm: its gradient is zero, and what is computed is rounding
            parameter.requires_grad_(False)
    assert_trains_as_eager(layer, torch.randn(3, 16, 9, 9))
    assert isinstance(fuse(layer), FusedModule)
