"""Classes that stand for those of a library that the tests do not install.

They have the library's class path, by which adapters recognise them, and compute the same from children of the same
names; they are written for these tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Class = TypeVar("Class", bound=type)


def stands_for(path: str) -> Callable[[Class], Class]:
    """Gives a class the dotted name of the library's."""

    def named(cls: Class) -> Class:
        cls.__module__, _, cls.__name__ = path.rpartition(".")
        cls.__qualname__ = cls.__name__
        return cls

    return named


def copy_of(cls: type[nn.Module], path: str) -> type[nn.Module]:
    """A class that computes as `cls` does, under the library's name."""
    return stands_for(path)(type(cls.__name__, (cls,), {}))


def settled(model: nn.Module) -> nn.Module:
    """With norms whose values are not those of a fresh one, which would hide a swapped tensor."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if "running_var" in tensors:
            with torch.no_grad():
                for name in ("weight", "running_var"):
                    tensors[name].uniform_(0.5, 1.5, generator=generator)
                for name in ("bias", "running_mean"):
                    tensors[name].normal_(0, 0.3, generator=generator)
    return model


def pictures(channels: int = 8, size: int = 9) -> Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(2))


def projection(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


def pooled_projection(channels: int, out: int, stride: int) -> nn.Sequential:
    """ResNet-D's: the pooling has the stride."""
    pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, *projection(channels, out))


def conv(channels: int, out: int, size: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = dilation * (size // 2)
    return nn.Conv2d(channels, out, size, stride, padding, dilation, groups, bias=False)
