"""A ResNet's stem: conv1, bn1, act and max pooling, fused in the model's own forward, where they are called.

Each mixin repeats its original's few lines around the stem. Without a fusable stem the original runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters.timm.resnet import pools_with_convolution
from resnet_fused.modules.block_modules import has_hooks, require_no_hooks
from resnet_fused.modules.fused_block import FusedModule

STEM_PARTS = ("conv1", "bn1", "relu", "maxpool")  # torchvision's names


class FusedStem(FusedModule):
    """What the two mixins share."""

    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def _fused_parts(self) -> Iterable[nn.Module]:
        parts = [getattr(self, name, None) for name in ("conv1", "bn1", "act1", "relu", "maxpool")]
        return [self, *(module for part in parts if isinstance(part, nn.Module) for module in part.modules())]

    def _fused_stem(self, x: Tensor) -> Tensor | None:
        """The pooled stem, or None if it is not fusable."""
        described = self._fused_or_none(x)
        if described is None:
            return None
        params, spec, _ = described.calls[0]
        backend = self._fused_settings.backend
        if pools_with_convolution(self):  # a stage of the chain
            return functional.residual_block(x, params, spec, backend=backend)
        if pool_reason(self.maxpool) is None:
            return functional.residual_block_max_pool2d(x, params, spec, 3, 2, 1, backend=backend)
        return self.maxpool(functional.residual_block(x, params, spec, backend=backend))


class FusedResNet(FusedStem):
    """For torchvision's ResNet."""

    avgpool: nn.Module
    fc: nn.Module

    def _forward_impl(self, x: Tensor) -> Tensor:
        stem = self._fused_stem(x)
        if stem is None:
            return super()._forward_impl(x)  # type: ignore[misc]
        features = self.layer4(self.layer3(self.layer2(self.layer1(stem))))
        return self.fc(torch.flatten(self.avgpool(self._fused_end(features)), 1))

    def _fused_end(self, features: Tensor) -> Tensor:
        """What stands between the blocks and the pooling."""
        return features


class FusedOwnResNet(FusedResNet):
    """For this package's ResNet, which in pre-activation order ends in a norm and a ReLU."""

    norm: nn.Module | None
    relu: nn.Module

    def _fused_end(self, features: Tensor) -> Tensor:
        if self.norm is None:
            return features
        if (
            type(self.norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm)
            or type(self.relu) is not nn.ReLU
            or has_hooks(self.relu)
        ):
            return self.relu(self.norm(features))
        # a backend asked for by name may have no batch norm on its own
        backend = "eager" if self._fused_settings.backend == "eager" else "auto"
        return functional.batch_norm_act(features, self.norm, backend=backend)


class FusedLayerGetter(FusedStem):
    """For torchvision's IntermediateLayerGetter around a ResNet, the backbone of its segmentation and detection."""

    return_layers: dict[str, str]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        stem = None if self.return_layers.keys() & set(STEM_PARTS) else self._fused_stem(x)
        if stem is None:
            return super().forward(x)
        out = OrderedDict()
        for name, module in self.items():  # type: ignore[operator]
            if name not in STEM_PARTS:
                stem = module(stem)
            if name in self.return_layers:
                out[self.return_layers[name]] = stem
        return out


class FusedTimmResNet(FusedStem):
    """For timm's ResNet, with its gradient checkpointing."""

    grad_checkpointing: bool

    def forward_features(self, x: Tensor) -> Tensor:
        stem = self._fused_stem(x)
        if stem is None:
            return super().forward_features(x)  # type: ignore[misc]
        layers = [self.layer1, self.layer2, self.layer3, self.layer4]
        if self.grad_checkpointing:
            from timm.models import checkpoint_seq

            return checkpoint_seq(layers, stem, flatten=True)
        for layer in layers:
            stem = layer(stem)
        return stem


STEMS: dict[str, type[FusedModule]] = {
    "resnet_fused.models.resnet.ResNet": FusedOwnResNet,
    "torchvision.models.resnet.ResNet": FusedResNet,
    "torchvision.models._utils.IntermediateLayerGetter": FusedLayerGetter,
    "timm.models.resnet.ResNet": FusedTimmResNet,
}


def pool_reason(pool: nn.Module) -> str | None:
    """Why this module is not the max pooling that `functional.max_pool2d` computes, or None."""
    if type(pool) is not nn.MaxPool2d:
        return f"maxpool is {type(pool).__name__}; accepted: nn.MaxPool2d itself"
    window = [v if isinstance(v, int) else tuple(v) for v in (pool.kernel_size, pool.stride, pool.padding)]
    plain = all(v in (wanted, (wanted, wanted)) for v, wanted in zip(window, (3, 2, 1), strict=True))
    if not plain or pool.dilation not in (1, (1, 1)) or pool.ceil_mode or pool.return_indices:
        return f"maxpool is {pool}; accepted: a 3x3 window, stride 2, padding 1"
    try:
        require_no_hooks("maxpool", pool)
    except NotFusable as reason:
        return str(reason)
    return None
