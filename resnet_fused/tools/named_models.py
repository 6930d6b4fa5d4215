"""Models by name, for the command line and the demo: torchvision's, this package's own, and timm's."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

import torch
from torch import Tensor, nn

from resnet_fused import models

FAMILY = tuple(name for name in models.__all__ if name[0].islower() and name != "small_resnet")  # it takes a depth
TIMM, TORCHVISION = "timm:", "torchvision:"


def add_option(parser: argparse.ArgumentParser, default: str = "resnet50") -> None:
    """Adds ``--model``, a name for `build`."""
    parser.add_argument(
        "--model", default=default, help=f"e.g. resnet50, {TORCHVISION}NAME, {TIMM}NAME (default: %(default)s)"
    )


def build(name: str, *, zero_init_residual: bool = False) -> nn.Module:
    """An unfused model with random weights: a ResNet of torchvision if installed, else ours, or ``timm:NAME``.

    ``torchvision:NAME`` is torchvision's, and an error without it.

    zero_init_residual: start each branch's last norm at zero, as torchvision's argument does; timm's models always do.

    Raises ValueError for a name that is not accepted, ImportError where the library of a prefix is missing.
    """
    if name.startswith(TIMM):
        return _timm_model(name.removeprefix(TIMM))
    given, name = name, name.removeprefix(TORCHVISION)
    if name not in FAMILY:
        raise ValueError(
            f"unknown model {given!r}; accepted: {', '.join(FAMILY)}, also as {TORCHVISION}NAME, and {TIMM}NAME for a "
            "model of timm"
        )
    torchvision = import_torchvision()
    if torchvision is None and given != name:
        raise ImportError(f"{given} needs torchvision: `pip install torchvision`")
    family = torchvision.models if torchvision is not None and hasattr(torchvision.models, name) else None
    if family is None and given != name:
        raise ValueError(f"torchvision has no {name}; accepted: {name}, which is this package's")
    if family is None:
        return getattr(models, name)(fused=False, zero_init_residual=zero_init_residual)
    return getattr(family, name)(zero_init_residual=zero_init_residual)


def known(pattern: str) -> list[str]:
    """Every name of the library that the pattern's prefix names, prefix included: classification, and for torchvision
    segmentation and detection, without its quantized models. Raises ValueError without a prefix, ImportError without
    the library.
    """
    torchvision = import_torchvision()
    if pattern.startswith(TIMM):
        return [f"{TIMM}{name}" for name in _import_timm(pattern).list_models()]
    if not pattern.startswith(TORCHVISION):
        raise ValueError(f"{pattern!r} names no library; accepted: {TIMM}PATTERN, {TORCHVISION}PATTERN")
    if torchvision is None:
        raise ImportError(f"{pattern} needs torchvision: `pip install torchvision`")
    return [f"{TORCHVISION}{name}" for name in torchvision.models.list_models() if not name.startswith("quantized")]


def build_any(name: str) -> nn.Module:
    """A model of `known`, of any family, with random weights."""
    if name.startswith(TIMM):
        return _timm_model(name.removeprefix(TIMM))
    torchvision = import_torchvision()
    if torchvision is None or not name.startswith(TORCHVISION):
        return build(name)  # which says what is accepted
    name = name.removeprefix(TORCHVISION)
    classifies = name in torchvision.models.list_models(module=torchvision.models)
    backbone = {} if classifies else {"weights_backbone": None}  # which would be downloaded
    return torchvision.models.get_model(name, weights=None, **backbone)


@torch.no_grad()
def settle_norms(model: nn.Module, x: Tensor) -> None:
    """Give fresh batch norms weights, biases and running statistics of their own, in place.

    Fresh ones are all ones and zeros, which would hide a swapped or forgotten tensor.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.1)
    training = model.training
    model.train()(x)
    model.train(training)


def import_torchvision() -> ModuleType | None:
    """torchvision, or None if it is not installed.

    Beside a CPU torch its CUDA build does not load its operators, and then fails to describe two that are missing. The
    models need neither, so the schemas of the two are declared and the import is tried again.
    """
    try:
        return _import()
    except ImportError:
        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in ("nms", "qnms"):
        _SCHEMAS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return _import()


# what a Library defines lives as long as it does
_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")


def _import() -> ModuleType:
    import torchvision

    return torchvision


def _import_timm(name: str) -> ModuleType:
    import_torchvision()  # timm imports it, too
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{name} needs timm: `pip install timm` (import said: {error})") from error
    return timm


def _timm_model(name: str) -> nn.Module:
    timm = _import_timm(f"{TIMM}{name}")
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; timm.list_models() gives the names")
    return timm.create_model(name, pretrained=False)
