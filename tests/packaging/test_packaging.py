"""What gets installed: one top-level package, complete, and an error that helps where the extension is missing."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from resnet_fused.ops import operators

ROOT = Path(__file__).parents[2]


def built_for() -> str:
    """The value of RESNET_FUSED_ARCHS that gives the installed extension."""
    built = {} if operators.load_error() else operators.build_info()
    return built.get("cuda architectures", "none").removesuffix(" + PTX")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built in the source folder, with the architectures of the installed extension, whose objects are at hand."""
    (ROOT / "build").mkdir(exist_ok=True)
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    environment = os.environ | {"RESNET_FUSED_ARCHS": built_for()}
    with (ROOT / "build" / "wheel.lock").open("w") as lock:  # of test workers that build in the same folder
        fcntl.flock(lock, fcntl.LOCK_EX)
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
    kernels = {f"resnet_fused/{p.relative_to(ROOT)}" for p in (ROOT / "triton_kernels").rglob("*.py")}
    assert sources | kernels <= names
    assert any(name.startswith("resnet_fused/_C") and name.endswith(".so") for name in names)
    assert "resnet_fused/py.typed" in names
    assert wheel.read("resnet_fused/_built_with.py").decode() == f'TORCH = "{torch.__version__}"\n'


def test_wheel_is_small(wheel: zipfile.ZipFile) -> None:
    """3 MB without CUDA kernels, and in any case what PyPI takes."""
    limit = 3e6 if built_for() == "none" else 100e6
    assert Path(str(wheel.filename)).stat().st_size < limit


def test_a_wheel_to_hand_on_names_its_torch() -> None:
    """Wheels for several versions of torch lie side by side, and an installer takes the one that fits."""
    script = "import sys, setup; print(*setup.release(*sys.argv[1:]))"
    for archs, expected in (("none", "0.1.0+torch2.13.cpu torch==2.13.*"), ("90", "0.1.0+torch2.13 torch==2.13.*")):
        command = [sys.executable, "-c", script, "0.1.0", "2.13.1+cu130", archs]
        told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert told.strip() == expected


def test_metadata_can_be_shown_by_an_index(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    assert "Classifier: Typing :: Typed" in metadata and "Requires-Dist: torch<2.16,>=2.11" in metadata
    assert not re.search(r"!\[[^]]*\]\((?!https://)", metadata), "a picture by a relative path does not show there"


RUN = [sys.executable, "-P", "-c"] if sys.version_info >= (3, 11) else [sys.executable, "-c"]
WITHOUT_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""


def run_installed(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """The script in a process that finds the package in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [*RUN, WITHOUT_EDITABLE + script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_wheel_of_another_torch_says_so(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """In one line with both versions, from `fuse` and from the backend, without loading what could crash."""
    wheel.extractall(tmp_path)
    (tmp_path / "resnet_fused" / "_built_with.py").write_text('TORCH = "2.10.1+cu126"\n')
    done = run_installed(
        tmp_path,
        """
import sys, torch, resnet_fused
resnet_fused.fuse(resnet_fused.models.resnet18(fused=False, num_classes=3))
print(resnet_fused.backends()["native"])
print("loaded" if "resnet_fused._C" in sys.modules else "not loaded")
""",
    )
    told = (
        f"resnet_fused._C was built with torch 2.10.1+cu126, and torch {torch.__version__} is installed; in the source"
    )
    assert f"UserWarning: fused blocks run in plain PyTorch: {told}" in done.stderr
    reason, loaded = done.stdout.splitlines()
    assert reason.startswith(told) and loaded == "not loaded"


@pytest.mark.parametrize(
    ("built_with", "installed", "fits"),
    [
        ("2.13.0+cpu", "2.13.1+cu130", True),
        (None, "2.13.0", True),
        ("2.13.0", "2.1.0", False),
        ("2.14.0a0+git1", "2.13.0", False),
    ],
)
def test_which_torch_an_extension_fits(built_with: str | None, installed: str, fits: bool) -> None:
    assert (operators.built_for_another(built_with, installed) is None) is fits


def test_source_distribution_holds_all_that_builds_and_tests_it(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, cwd=ROOT)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = {"csrc": "*", "tests": "*", "benches": "*.py", "docs": "*", "examples": "*", "triton_kernels": "*.py"}
    for folder, pattern in folders.items():
        files = [p for p in (ROOT / folder).rglob(pattern) if p.is_file() and "__pycache__" not in p.parts]
        assert files and {str(p.relative_to(ROOT)) for p in files} <= names
    assert {"Makefile", ".ci/run", "README.md", "LICENSE", "pyproject.toml", "setup.py"} <= names
    assert "resnet_fused/_built_with.py" not in names and not any(name.endswith((".so", ".pyc")) for name in names)


def test_wheel_works_without_the_extension(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked without `_C`: "auto" runs plain PyTorch, "native" says how to build it."""
    wheel.extractall(tmp_path, [name for name in wheel.namelist() if not name.endswith(".so")])
    done = run_installed(
        tmp_path,
        """
import torch, resnet_fused
model = resnet_fused.models.resnet18(num_classes=3)
print(model(torch.randn(2, 3, 32, 32)).shape)
resnet_fused.fuse(model, backend="native")
try:
    model(torch.randn(2, 3, 32, 32))
except resnet_fused.BackendError as error:
    print(error)
""",
    )
    assert "torch.Size([2, 3])" in done.stdout, done.stderr
    assert "pip install --no-build-isolation" in done.stdout
