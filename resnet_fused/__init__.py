"""Residual blocks, forward and backward, as single operators: drop-in for torchvision's and timm's ResNets.

    model = resnet_fused.fuse(torchvision.models.resnet50())

`fuse` and `unfuse` switch a model in place, `explain` says what runs where, `verify` compares with PyTorch.
`backends()` has for each backend why it cannot run on this machine, or None; `tune` measures on a GPU what backend
"auto" then follows. `register_block` teaches a new block class, `functional` has the operators, `models` the ResNet
family. Exported graphs run without this package; `export_fused` keeps its operators.
"""

from __future__ import annotations

from resnet_fused import functional, models
from resnet_fused.backends import dispatch
from resnet_fused.backends.tune import tune
from resnet_fused.errors import BackendError, NotFusable
from resnet_fused.modules.adapters import register_block
from resnet_fused.modules.block_modules import (
    BlockModules,
    CompositeModules,
    DenseModules,
    SplitModules,
    StageModules,
)
from resnet_fused.modules.fuse import fuse, unfuse
from resnet_fused.ops.export import export_fused
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import BlockSpec, StageSpec
from resnet_fused.tools.explain import explain
from resnet_fused.tools.verification import verify

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BlockModules",
    "BlockParams",
    "BlockSpec",
    "CompositeModules",
    "DenseModules",
    "NotFusable",
    "SplitModules",
    "StageModules",
    "StageParams",
    "StageSpec",
    "backends",
    "explain",
    "export_fused",
    "functional",
    "fuse",
    "models",
    "register_block",
    "tune",
    "unfuse",
    "verify",
]


def backends() -> dict[str, str | None]:
    """Every backend by name, and why it cannot run on this machine (None: it can)."""
    kernels = {name: backend.unavailable() for name, backend in dispatch.BACKENDS.items()}
    return kernels | {"eager": None}
