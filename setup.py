"""Builds the extension `resnet_fused._C` (csrc/) against the installed torch; pyproject.toml holds everything else.

    pip install --no-build-isolation -e .

No build isolation: the extension must be compiled against the torch that will load it. The kernels of csrc/cuda are
part of it where there is nvcc, in CUDA_HOME or on PATH, whether that torch knows CUDA or not. RESNET_FUSED_ARCHS names
the GPUs to compile them for, as in "80,90"; "none" leaves them out. What nvcc made is kept in RESNET_FUSED_CACHE
(default: ~/.cache/resnet_fused/build), named by the content it was made of; "none": in build/cuda.
RESNET_FUSED_RELEASE=1 makes a wheel to hand on (`make wheels`): its version and its needs name this torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

TORCH = "torch>=2.11,<2.16"
NEEDED = f"pip install '{TORCH}' setuptools wheel ninja pybind11"

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, is_ninja_available
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"resnet_fused is compiled against torch, and {sys.executable} cannot import it ({missing}). "
        f"First `{NEEDED}` there, then `pip install --no-build-isolation .`"
    ) from None

ROOT = Path(__file__).parent
BUILT_WITH = Path("resnet_fused", "_built_with.py")  # operators.py reads it before it loads the extension
SOURCES = Path("csrc")

ARCHS = "RESNET_FUSED_ARCHS"
CACHE = "RESNET_FUSED_CACHE"
RELEASE = "RESNET_FUSED_RELEASE"
KEPT_DAYS = 30
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


def kept_objects() -> Path:
    """The folder of what nvcc made: beyond this checkout, unless told otherwise."""
    wanted = os.environ.get(CACHE, "").strip()
    if wanted == "none":
        return Path("build", "cuda")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(wanted) if wanted else caches / "resnet_fused" / "build"


def content_key(command: str, source: Path) -> str:
    """Of all that decides an object: the command, the source, and every header that it might include."""
    digest = hashlib.sha256(command.encode())
    for file in (source, *sorted(p for p in SOURCES.rglob("*") if p.suffix in (".h", ".cuh") and "cpu" not in p.parts)):
        digest.update(f" {file} ".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:32]


def compile_cuda(nvcc: Nvcc, archs: Sequence[int], sources: Sequence[Path], folder: Path) -> list[str]:
    """The objects of `sources` in `folder`: those that are there already, by their content, and the others made now."""
    command = nvcc_command(nvcc, archs)
    also = [os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    told = shlex.join([*command, nvcc.version, *also])
    objects = {source: folder / f"{source.stem}-{content_key(told, source)}.o" for source in sources}
    missing = [source for source in sources if not objects[source].exists()]
    folder.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    # Of one nvcc, over its architectures: two where there are cores, so that the last file does not leave them idle.
    threads = os.environ.get("NVCC_THREADS") or str(max(min(2, jobs), jobs // max(1, len(missing))))

    def compile_one(source: Path) -> int:
        fresh = objects[source].with_suffix(f".{os.getpid()}.o")
        run = [*command, "--threads", threads, "-c", str(source), "-o", str(fresh)]
        print(shlex.join(run), flush=True)
        status = subprocess.run(run).returncode
        if status == 0:
            fresh.replace(objects[source])  # at once: a build beside this one sees all of it or nothing
        return status

    with ThreadPoolExecutor(min(jobs, len(missing)) or 1) as pool:
        if any(list(pool.map(compile_one, missing))):
            raise CompileError(f"{nvcc.path} failed, see above; {ARCHS}=none builds without CUDA")
    forget_outdated(folder, set(objects.values()))
    return [str(made) for made in objects.values()]


def forget_outdated(folder: Path, used: Set[Path]) -> None:
    """Leave what some checkout has used within KEPT_DAYS."""
    for file in used:
        file.touch()
    for file in folder.glob("*.o"):
        if file not in used and time.time() - file.stat().st_mtime > KEPT_DAYS * 86400:
            file.unlink(missing_ok=True)


class BuildWithCuda(BuildExtension):
    """Calls nvcc itself, where there is one: `CUDAExtension` needs a torch that was built with CUDA."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(Path("build", "objects"))  # one for every way to build, so that all share the objects
        self.force = True  # links always; ninja compiles what has changed, and sees more of it than setuptools does

    def run(self) -> None:
        super().run()
        for folder in {self.build_lib, *([""] if self.inplace else [])}:
            target = Path(folder) / BUILT_WITH
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(f'TORCH = "{torch.__version__}"\n')

    def build_extensions(self) -> None:
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # ninja's, where no one activated the venv
        if not is_ninja_available():
            raise CompileError(f"the extension is compiled by ninja, which is not on PATH: `{NEEDED}`")
        (extension,) = self.extensions
        wanted = os.environ.get(ARCHS, "").strip()
        nvcc = None if wanted == "none" else find_nvcc()
        archs = architectures(wanted, nvcc)
        sources = sorted(SOURCES.rglob("*.cu"))
        if nvcc and archs and sources:
            # Nothing of Python or torch is in these objects.
            extension.extra_objects += compile_cuda(nvcc, archs, sources, kept_objects())
            extension.library_dirs += nvcc.library_dirs
            extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        else:
            print(f"the kernels of csrc/cuda are left out: no nvcc {OLDEST} or newer, or {ARCHS}=none")
        super().build_extensions()


def files(*suffixes: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in suffixes)


def packages(folder: str) -> list[str]:
    """The dotted names of a folder's packages, its own first."""
    return sorted(".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / folder).rglob("__init__.py"))


def readme() -> str:
    """README.md for a package index, where pictures by a relative path do not show: their captions remain."""
    return re.sub(r"!\[[^]]*\]\((?!https://)[^)]*\) ?", "", (ROOT / "README.md").read_text())


def release(version: str, torch_version: str, archs: str) -> tuple[str, str]:
    """(version, need of torch) of a wheel to hand on: the extension loads under this minor version of torch alone, and
    the wheels for several of them stand side by side."""
    minor = found(r"^(\d+\.\d+)", torch_version)
    return f"{version}+torch{minor}{'.cpu' if archs == 'none' else ''}", f"torch=={minor}.*"


VERSION = found(r'__version__ = "(.+)"', (ROOT / "resnet_fused" / "__init__.py").read_text())

extension = CppExtension(
    "resnet_fused._C",
    sources=files(".cpp"),
    depends=files(".h", ".cu", ".cuh"),
    # torch's version, so that ninja compiles again for another torch in the place of this one
    define_macros=[("RESNET_FUSED_VERSION", f'"{VERSION}"'), ("RESNET_FUSED_BUILT_WITH", f'"{torch.__version__}"')],
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
    version, needs = VERSION, TORCH
    if os.environ.get(RELEASE, "").strip() not in ("", "0"):
        version, needs = release(VERSION, torch.__version__, os.environ.get(ARCHS, "").strip())
    setup(
        version=version,
        install_requires=[needs],
        long_description=readme(),
        long_description_content_type="text/markdown",
        packages=[*packages("resnet_fused"), *(f"resnet_fused.{name}" for name in packages("triton_kernels"))],
        # The folder stays at the top, the package does not: a top-level `triton_kernels` would shadow Triton's own.
        package_dir={"resnet_fused.triton_kernels": "triton_kernels"},
        package_data={"resnet_fused": ["py.typed"]},
        ext_modules=[extension],
        cmdclass={"build_ext": BuildWithCuda},
    )
