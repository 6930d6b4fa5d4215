"""One thread for each of several workers; Triton's interpreter where there is no GPU; torchvision beside another torch.

torchvision's Python side needs the schemas of two detection operators, which its binary defines where that loads. The
tests use the models only, so the schemas without kernels are enough.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; before torch reads it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # more threads than cores must not wait for each other spinning

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels run on the CPU

with contextlib.suppress(ModuleNotFoundError):
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        _schemas = torch.library.Library("torchvision", "FRAGMENT")  # kept: the schemas go with it
        for _name in ("nms", "qnms"):
            _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a user's machine: Triton kernels run on CUDA tensors only."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what splits its work among threads; a worker of several has one otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every tensor from at::empty starts as NaN."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
