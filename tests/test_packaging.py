"""What gets installed: one top-level package, complete, and an error that helps where the extension is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from resnet_fused import operators

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built in the source folder, with the architectures of the installed extension, whose objects are at hand."""
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    built = {} if operators.load_error() else operators.build_info()
    archs = built.get("cuda architectures", "none").removesuffix(" + PTX")
    environment = os.environ | {"RESNET_FUSED_ARCHS": archs}
    subprocess.run([*pip, "-w", str(target), str(ROOT)], check=True, timeout=900, env=environment)
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_has_one_top_level(wheel: zipfile.ZipFile) -> None:
    """A top-level `triton_kernels` would shadow Triton's own package of that name."""
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"resnet_fused"}


def test_wheel_is_complete(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    modules = [p.relative_to(ROOT) for p in (ROOT / "resnet_fused").rglob("*.py")]
    sources = {str(p) for p in modules if "triton_kernels" not in p.parts}
    kernels = {f"resnet_fused/triton_kernels/{p.name}" for p in (ROOT / "triton_kernels").glob("*.py")}
    assert sources | kernels <= names
    assert any(name.startswith("resnet_fused/_C") and name.endswith(".so") for name in names)


def test_wheel_works_without_the_extension(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked without `_C`: "auto" runs plain PyTorch, "native" says how to build it."""
    wheel.extractall(tmp_path, [name for name in wheel.namelist() if not name.endswith(".so")])
    script = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import torch, resnet_fused
model = resnet_fused.models.resnet18(num_classes=3)
print(model(torch.randn(2, 3, 32, 32)).shape)
resnet_fused.fuse(model, backend="native")
try:
    model(torch.randn(2, 3, 32, 32))
except resnet_fused.BackendError as error:
    print(error)
"""
    run = [sys.executable, "-P", "-c", script] if sys.version_info >= (3, 11) else [sys.executable, "-c", script]
    done = subprocess.run(
        run, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=300
    )
    assert "torch.Size([2, 3])" in done.stdout, done.stderr
    assert "pip install --no-build-isolation" in done.stdout
