"""Lets torchvision, where it is installed, be imported beside a torch that it was not built for.

Its Python side needs the schemas of two detection operators, which its binary defines where that loads. The tests use
the models only, so the schemas without kernels are enough.
"""

import contextlib
import importlib

import torch

with contextlib.suppress(ModuleNotFoundError):
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        _schemas = torch.library.Library("torchvision", "FRAGMENT")  # kept: the schemas go with it
        for _name in ("nms", "qnms"):
            _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
