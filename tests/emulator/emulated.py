"""The CUDA kernels as a backend for CPU tensors: launcher.cpp compiled, loaded, and installed under "emulated"."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from resnet_fused import _C  # type: ignore[attr-defined]
from resnet_fused.backends import dispatch, folding, how
from resnet_fused.backends.how import How, Wish
from resnet_fused.ops import operators
from resnet_fused.ops.operators import Tensors
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec
from resnet_fused.spec.facts import Needs

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CUDA = ROOT / "csrc" / "cuda"
# What the kernels include from beside csrc/cuda; copies of them find it through the kernels' own folder.
BESIDE = [ROOT / "csrc" / "block" / name for name in ("activations.h", "activation_functions.h")]
KEPT_DAYS = 30
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden")

NAME = "emulated"


def sources(cuda: Path) -> list[Path]:
    mine, kernels = sorted(HERE.glob("*.h")), sorted((cuda / "kernels").iterdir())
    return [*mine, HERE / "launcher.cpp", cuda / "launch" / "launch.h", *kernels, *BESIDE]


def built() -> Path:
    """The folder of what was compiled, beyond this checkout; RESNET_FUSED_CACHE says where as for setup.py."""
    wanted = os.environ.get("RESNET_FUSED_CACHE", "").strip()
    if wanted == "none":
        return ROOT / "build" / "emulator"
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(wanted) if wanted else caches / "resnet_fused" / "build"


def compiled(name: str, *flags: str, cuda: Path = CUDA) -> Path:
    """launcher.cpp as a shared library over the kernels in `cuda`, from an earlier run where nothing has changed.

    Of processes that ask for the same at once, one compiles. Raises FileNotFoundError without g++, RuntimeError with
    what it said where it failed.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("the emulator is compiled with g++, which is not here")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((compiler, version, FLAGS, flags)).encode())
    for source in sources(cuda):
        digest.update(f" {source.name} ".encode() + hashlib.sha256(source.read_bytes()).digest())
    folder = built()
    target = folder / f"{name}-{digest.hexdigest()[:32]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            fresh = target.with_suffix(".fresh")
            include = [f"-I{place}" for place in (HERE, cuda, CUDA / "kernels")]
            command = [compiler, *FLAGS, *flags, *include, str(HERE / "launcher.cpp"), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            fresh.replace(target)
        target.touch()
    for other in folder.glob("*.so"):
        if time.time() - other.stat().st_mtime > KEPT_DAYS * 86400:
            other.unlink(missing_ok=True)
            other.with_suffix(".lock").unlink(missing_ok=True)
    return target


def outdated() -> str | None:
    """Why the extension and a launcher compiled now would not understand each other, or None."""
    extension = Path(_C.__file__)
    kernels = CUDA / "kernels"
    for header in (CUDA / "launch" / "launch.h", kernels / "phase.h", kernels / "scalars.cuh", BESIDE[0]):
        if header.stat().st_mtime > extension.stat().st_mtime:
            return f"{extension.name} is older than {header.name}: build it again"
    return None


class Emulator:
    """The device: a compiled launcher.cpp."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.launcher.restype = ctypes.c_void_p
        self.library.launched.restype = ctypes.c_char_p
        self.configure()

    def configure(self, processors: int = 1, workers: int = 2, seed: int = 0) -> None:
        """processors: what planning sees, and twice which workers run at most. Forgets earlier launches."""
        self.library.configure(processors, workers, ctypes.c_uint64(seed))

    def set_shared_memory(self, size: int) -> None:
        self.library.set_shared_memory(size)

    def set_capturing(self, capturing: bool) -> None:
        self.library.set_capturing(ctypes.c_bool(capturing))

    def fail_at(self, launch: int, text: str) -> None:
        """This launch, counted from `configure` on, reports `text` and runs nothing."""
        self.library.fail_at(launch, text.encode())

    def leave_out_barrier(self, launch: int, phase: int) -> None:
        self.library.leave_out_barrier(launch, phase)

    def launched(self) -> list[str]:
        """Workers and phases: "3 cooperative: table; pass | convolution of 64 rows, 4 buffers"; | is a barrier."""
        text: bytes = self.library.launched()
        return text.decode().splitlines()

    def install(self) -> None:
        _C.install_emulator(self.library.launcher())


class EmulatedBackend:
    """The `cuda` overloads of the operators, run as `set_how` says."""

    name = NAME

    def __init__(self) -> None:
        self.wish, self.tf32 = Wish(None, None), False

    def set_how(
        self,
        launch: Literal["choose", "single", "phased"] = "choose",
        library: Literal["choose", "none", "spatial", "all"] = "choose",
        tf32: bool = False,
    ) -> None:
        self.wish = Wish(None if launch == "choose" else launch, None if library == "choose" else library)
        self.tf32 = tf32

    def how(self, spec: BlockSpec, x: Tensor | None, weights: Sequence[Tensor | None]) -> How:
        assert x is not None
        given = [w for w in weights if w is not None]
        return how.choose(self.wish, spec, x, given)._replace(tf32=self.tf32)

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
        return None

    def declines(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
        return "the emulator is for tests"

    def forward(self, spec: BlockSpec, tensors: Tensors, needs: Needs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return operators.residual_block_forward(
            spec, tensors, needs, "cuda", self.how(spec, tensors.x, tensors.weights)
        )

    def backward(
        self,
        spec: BlockSpec,
        dout: Tensor,
        out: Tensor | None,
        conv_outputs: list[Tensor],
        batch_stats: list[Tensor],
        tensors: Tensors,
        needs: Needs,
        master: torch.dtype | None = None,
    ) -> Tensors:
        return operators.residual_block_backward(
            spec,
            dout,
            out,
            conv_outputs,
            batch_stats,
            tensors,
            needs,
            "cuda",
            self.how(spec, tensors.x, tensors.weights),
            master,
        )

    def infer(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
        folded = folding.folded(params, x, spec, pack=False)
        return operators.residual_block_infer(
            x,
            folded.pre,
            folded.weights,
            folded.biases,
            folded.skip_scale,
            [p.slope for p in params.convs],
            spec,
            folded.branch_scale,
            "cuda",
            self.how(spec, x, folded.weights),
        )


@contextmanager
def installed(emulator: Emulator) -> Iterator[EmulatedBackend]:
    """The backend "emulated", on this emulator, for as long as this lasts."""
    backend, names = EmulatedBackend(), dispatch.NAMES
    dispatch.BACKENDS[NAME] = backend
    dispatch.NAMES = (*names, NAME)
    emulator.install()
    try:
        yield backend
    finally:
        _C.install_emulator(0)
        del dispatch.BACKENDS[NAME]
        dispatch.NAMES = names
