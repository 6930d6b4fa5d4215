"""Builds the extension `resnet_fused._C` (csrc/) against the installed torch; pyproject.toml holds everything else.

    pip install --no-build-isolation -e .

No build isolation: the extension must be compiled against the torch that will load it. The kernels of csrc/cuda are
part of it where there is nvcc, in CUDA_HOME or on PATH, whether that torch knows CUDA or not. RESNET_FUSED_ARCHS names
the GPUs to compile them for, as in "80,90"; "none" leaves them out.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
CUDA = Path("csrc", "cuda")

ARCHS = "RESNET_FUSED_ARCHS"
DEFAULT_ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # code for 80 and 86 also runs on 87, for 100 on 103, and so on
OLDEST_ARCHITECTURE = 80  # cp.async, and mma on bf16 and tf32
OLDEST_NVCC = (12, 1)  # C++20; parameters of a kernel larger than 4 KiB
OLDEST = ".".join(map(str, OLDEST_NVCC))
NVCC_FLAGS = (
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xfatbin=-compress-all",  # the PTX and every architecture's code
)


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern} is not in {text!r}")
    return match[1]


@dataclass(frozen=True)
class Nvcc:
    """A compiler, what it can compile for (80 is sm_80), and where its toolkit's libraries are."""

    path: str
    version: str
    offered: tuple[int, ...]
    library_dirs: tuple[str, ...]


def find_nvcc() -> Nvcc | None:
    home = os.environ.get("CUDA_HOME")
    path = (home and shutil.which("nvcc", path=Path(home, "bin"))) or shutil.which("nvcc")
    if path is None:
        return None

    def ask(*arguments: str) -> str:
        command = [path, *arguments]
        return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout

    # What is on PATH may be a script or a link to a toolkit elsewhere, so nvcc itself has to tell its folder.
    plan = ask("-dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    return Nvcc(
        path=path,
        version=found(r"V(\d+(?:\.\d+)+)", ask("--version")),
        offered=tuple(sorted(int(a) for a in re.findall(r"^compute_(\d+)$", ask("--list-gpu-arch"), re.M))),
        library_dirs=tuple(re.findall(r'"-L(.+?)"', found(r"#\$ LIBRARIES=(.*)", plan))),
    )


def architectures(wanted: str, nvcc: Nvcc | None) -> list[int]:
    """What to compile the kernels for, given the value of RESNET_FUSED_ARCHS; nothing: leave them out."""
    if wanted == "none":
        return []
    if nvcc is None or tuple(map(int, nvcc.version.split("."))) < OLDEST_NVCC:
        if wanted:
            here = f"{nvcc.path} is {nvcc.version}" if nvcc else "there is none in CUDA_HOME/bin or on PATH"
            raise ValueError(f'{ARCHS}="{wanted}" needs nvcc {OLDEST} or newer, {here}; accepted here: "none"')
        return []
    accepted = [a for a in nvcc.offered if a >= OLDEST_ARCHITECTURE]
    if not wanted:
        return [a for a in DEFAULT_ARCHITECTURES if a in accepted]
    names = [name.strip() for name in wanted.split(",")]
    refused = [name for name in names if name not in map(str, accepted)]
    if refused:
        raise ValueError(
            f'{ARCHS}="{wanted}": {", ".join(map(repr, refused))} cannot be compiled for; accepted by {nvcc.path} '
            f'{nvcc.version}: {", ".join(map(str, accepted))}, separated by commas, or "none"'
        )
    return sorted({int(name) for name in names})


def nvcc_command(nvcc: Nvcc, archs: Sequence[int]) -> list[str]:
    """Machine code for each architecture, and PTX of the newest for those that come after it."""
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    newest = max(archs)
    told = f'-DRESNET_FUSED_ARCHITECTURES="{", ".join(map(str, archs))} + PTX"'
    return [nvcc.path, *NVCC_FLAGS, told, *code, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def compile_cuda(nvcc: Nvcc, archs: Sequence[int], sources: Sequence[Path], folder: Path) -> list[str]:
    """The objects of `sources`, made again where the command, nvcc or a file they include has changed."""
    objects = {source: folder / f"{source.name}.o" for source in sources}
    command = shlex.join(nvcc_command(nvcc, archs)).replace("$", "$$")
    also = " ".join([nvcc.version, *(os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"))])
    rules = [
        f"builddir = {folder}",
        "rule nvcc",
        # What nvcc takes from elsewhere is a comment of the shell's: ninja compares the line.
        f"  command = {command} --threads $$NVCC_THREADS -MD -MF $out.d -c $in -o $out  # {also}",
        "  depfile = $out.d",
        "  deps = gcc",
        *(f"build {made}: nvcc {source}" for source, made in objects.items()),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "build.ninja"
    plan.write_text("\n".join([*rules, ""]))
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    threads = str(max(1, jobs // len(objects)))  # of one nvcc, over its architectures
    run = ["ninja", "-v", "-j", str(jobs), "-f", str(plan)]
    if subprocess.run(run, env={"NVCC_THREADS": threads} | os.environ).returncode:
        raise CompileError(f"{nvcc.path} failed, see above; {ARCHS}=none builds without CUDA")
    return [str(made) for made in objects.values()]


class BuildWithCuda(BuildExtension):
    """Calls nvcc itself, where there is one: `CUDAExtension` needs a torch that was built with CUDA."""

    def build_extensions(self) -> None:
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # ninja's, where no one activated the venv
        (extension,) = self.extensions
        wanted = os.environ.get(ARCHS, "").strip()
        nvcc = None if wanted == "none" else find_nvcc()
        archs = architectures(wanted, nvcc)
        sources = sorted(CUDA.glob("*.cu"))
        if nvcc and archs and sources:
            # Nothing of Python or torch is in these objects, so all ways to build share them.
            extension.extra_objects += compile_cuda(nvcc, archs, sources, Path("build", "cuda"))
            extension.library_dirs += nvcc.library_dirs
            extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        else:
            print(f"the kernels of csrc/cuda are left out: no nvcc {OLDEST} or newer, or {ARCHS}=none")
        super().build_extensions()


def files(*suffixes: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in suffixes)


VERSION = found(r'__version__ = "(.+)"', (ROOT / "resnet_fused" / "__init__.py").read_text())

extension = CppExtension(
    "resnet_fused._C",
    sources=files(".cpp"),
    depends=files(".h", ".cu", ".cuh"),
    define_macros=[("RESNET_FUSED_VERSION", f'"{VERSION}"')],
    extra_compile_args=[
        "-O3",
        "-g0",
        "-std=c++20",
        "-fopenmp",  # at::parallel_for is a header: without it, it compiles to a plain loop
        "-fno-trapping-math",  # lets the vectoriser turn branches around float operations into selects
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-unknown-pragmas",
    ],
    extra_link_args=["-fopenmp"],
)

if __name__ == "__main__":
    setup(
        version=VERSION,
        packages=[
            "resnet_fused",
            "resnet_fused.adapters",
            "resnet_fused.backends",
            "resnet_fused.models",
            "resnet_fused.triton_kernels",
        ],
        # The folder stays at the top, the package does not: a top-level `triton_kernels` would shadow Triton's own.
        package_dir={"resnet_fused.triton_kernels": "triton_kernels"},
        ext_modules=[extension],
        cmdclass={"build_ext": BuildWithCuda},
    )
