"""Memory that training frees stays in the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from resnet_fused.ops import operators

if operators.load_error() is not None:
    pytest.skip("the extension is not built", allow_module_level=True)

# Whether a block of 31 MiB is mapped on its own, to be given back when it is freed: before and after a training step.
# And whether the heap then keeps 124 MiB that are freed at its end.
SCRIPT = """
import ctypes
import torch
from resnet_fused import functional
from resnet_fused.params import StageParams
from resnet_fused.spec import StageSpec

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
# the first field is the heap's size, the fourth the number of mapped blocks
fields = [(f"_{i}", ctypes.c_int) for i in range(10)]
libc.mallinfo.restype = type("Mallinfo", (ctypes.Structure,), {"_fields_": fields})

def is_mapped():
    mapped = libc.mallinfo()._3
    block = libc.malloc(31 << 20)
    more = libc.mallinfo()._3 - mapped
    if more == 0:
        libc.free(block)  # a mapped one would raise the threshold itself
    return more == 1

def keeps():
    blocks = [libc.malloc(31 << 20) for _ in range(4)]
    size = libc.mallinfo()._0
    for block in blocks:
        libc.free(block)
    return libc.mallinfo()._0 == size

before = is_mapped()
weight = torch.randn(4, 4, 1, 1, requires_grad=True)
functional.conv_bn_act(torch.randn(2, 4, 3, 3), StageParams(weight), StageSpec(norm=False), backend="native")
print(before, is_mapped(), keeps())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, "True False True"),
        ({"MALLOC_MMAP_THRESHOLD_": "131072"}, "True True True"),  # nothing of 31 MiB is in the heap
        ({"MALLOC_MMAP_THRESHOLD_": str(32 << 20)}, "False False False"),
    ],
)
def test_training_raises_the_threshold_unless_it_is_set(setting: dict[str, str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | setting
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
