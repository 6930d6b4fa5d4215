"""How setup.py calls nvcc, and what nvcc made of the kernels, read from the extension: no GPU takes part."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution

from resnet_fused.ops import operators

ROOT = Path(__file__).parents[2]


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


build = load("setup_py", ROOT / "setup.py")
resources = load("cuda_resources", ROOT / "benches" / "cuda_resources.py")

# --- setup.py --------------------------------------------------------------------------------------------------------

NVCC = build.Nvcc("/cuda/bin/nvcc", "13.0.88", (75, 80, 86, 87, 89, 90, 100, 120, 121), ())


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("", [80, 86, 89, 90, 100, 120]), ("90", [90]), ("90, 80,90", [80, 90]), ("87,121", [87, 121]), ("none", [])],
)
def test_architectures(wanted: str, expected: list[int]) -> None:
    assert build.architectures(wanted, NVCC) == expected


def test_architectures_that_nvcc_does_not_know() -> None:
    older = replace(NVCC, version="12.4.131", offered=(50, 75, 80, 86, 89, 90))
    assert build.architectures("", older) == [80, 86, 89, 90]
    with pytest.raises(ValueError, match=r"'100' cannot be compiled for; accepted by .*nvcc 12.4.131: 80, 86, 89, 90,"):
        build.architectures("90,100", older)


@pytest.mark.parametrize(
    ("wanted", "given"), [("75,90", "'75'"), ("sm_90", "'sm_90'"), ("90,", "''"), ("9.0", "'9.0'")]
)
def test_architectures_refused(wanted: str, given: str) -> None:
    with pytest.raises(ValueError, match=f'{given} cannot be compiled for; accepted .*80, 86, .* or "none"'):
        build.architectures(wanted, NVCC)


@pytest.mark.parametrize("nvcc", [None, replace(NVCC, version="12.0.140")], ids=["missing", "old"])
def test_without_a_usable_nvcc(nvcc: object) -> None:
    """Silently without CUDA, unless CUDA was asked for."""
    assert build.architectures("", nvcc) == build.architectures("none", nvcc) == []
    with pytest.raises(ValueError, match=r'RESNET_FUSED_ARCHS="90" needs nvcc 12.1 or newer.*accepted here: "none"'):
        build.architectures("90", nvcc)


def test_ptx_of_the_newest() -> None:
    command = build.nvcc_command(NVCC, [80, 90])
    code = [flag.removeprefix("-gencode=arch=") for flag in command if flag.startswith("-gencode")]
    assert code == ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]
    assert not any("fast_math" in flag for flag in command)


# Tells what the real one tells; compiles by noting the source and copying it.
FAKE_NVCC = """#!/bin/sh
case "$*" in
  *-dryrun*)
    echo '#$ TOP=/cuda/bin/..' >&2
    echo '#$ LIBRARIES=  "-L/cuda/bin/../lib/stubs" "-L/cuda/bin/../lib"' >&2 ;;
  --version) echo 'Cuda compilation tools, release 12.8, V12.8.61' ;;
  --list-gpu-arch) echo compute_90; echo compute_80 ;;
  *)
    for argument; do
      case "$before" in -c) source=$argument ;; -o) object=$argument ;; esac
      before=$argument
    done
    echo "$source" >> compiled
    grep -q '#error' "$source" && exit 1
    cp "$source" "$object" ;;
esac
"""


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with bin/nvcc, the current one and at the head of PATH."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("NVCC_APPEND_FLAGS", raising=False)
    environment = Path(sys.executable).parent  # ninja's
    monkeypatch.setenv("PATH", os.pathsep.join([str(nvcc.parent), os.environ["PATH"], str(environment)]))
    return tmp_path


def test_nvcc_tells_where_its_toolkit_is(toolkit: Path) -> None:
    nvcc = build.find_nvcc()
    assert nvcc == build.Nvcc(
        path=str(toolkit / "bin" / "nvcc"),
        version="12.8.61",
        offered=(80, 90),
        library_dirs=("/cuda/bin/../lib/stubs", "/cuda/bin/../lib"),
    )


def test_cuda_home_goes_before_path(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = toolkit / "other"
    (other / "bin").mkdir(parents=True)
    (other / "bin" / "nvcc").write_text(FAKE_NVCC.replace("V12.8.61", "V13.0.88"))
    (other / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(other))
    assert build.find_nvcc().version == "13.0.88"
    monkeypatch.setenv("CUDA_HOME", str(toolkit / "nothing"))
    assert build.find_nvcc().version == "12.8.61"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(toolkit / "nothing"))
    assert build.find_nvcc() is None


def test_compiles_again_what_changed(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else, nor what was there before: names hold the content."""
    one, two, header = Path("one.cu"), Path("two.cu"), Path("csrc", "kernels", "two.cuh")
    header.parent.mkdir(parents=True)
    one.touch()
    two.write_text('#include "csrc/kernels/two.cuh"\n')
    header.touch()
    nvcc = build.find_nvcc()

    def compiled(archs: tuple[int, ...] = (80, 90)) -> list[str]:
        Path("compiled").write_text("")
        objects = build.compile_cuda(nvcc, archs, [one, two], Path("objects"))
        assert [Path(o).read_bytes() for o in objects] == [one.read_bytes(), two.read_bytes()]
        return sorted(Path("compiled").read_text().split())

    both = ["one.cu", "two.cu"]
    assert compiled() == both and compiled() == []
    one.write_text("// another\n")
    assert compiled() == ["one.cu"]
    one.write_text("")
    assert compiled() == []
    header.write_text("// another\n")
    assert compiled() == both
    assert compiled((80,)) == both and compiled((80,)) == [] and compiled() == []
    nvcc = replace(nvcc, version="12.9.0")
    assert compiled((80,)) == both
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert compiled((80,)) == both and compiled((80,)) == []


@pytest.mark.usefixtures("toolkit")
def test_outdated_objects_are_forgotten() -> None:
    source = Path("one.cu")
    source.touch()
    (old,) = build.compile_cuda(build.find_nvcc(), [80], [source], Path("objects"))
    month_ago = time.time() - 31 * 86400
    os.utime(old, (month_ago, month_ago))
    build.compile_cuda(build.find_nvcc(), [80], [source], Path("objects"))
    (new,) = build.compile_cuda(build.find_nvcc(), [90], [source], Path("objects"))
    assert Path(old).exists() and Path(new).exists(), "used a moment ago"
    os.utime(old, (month_ago, month_ago))
    build.compile_cuda(build.find_nvcc(), [90], [source], Path("objects"))
    assert not Path(old).exists() and Path(new).exists()


def test_where_objects_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RESNET_FUSED_CACHE", raising=False)
    assert build.kept_objects() == tmp_path / "resnet_fused" / "build"
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path / "here"))
    assert build.kept_objects() == tmp_path / "here"
    monkeypatch.setenv("RESNET_FUSED_CACHE", "none")
    assert build.kept_objects() == Path("build", "cuda")


@pytest.mark.usefixtures("toolkit")
def test_a_failure_tells_the_way_out() -> None:
    source = Path("wrong.cu")
    source.write_text("#error\n")
    with pytest.raises(build.CompileError, match="RESNET_FUSED_ARCHS=none builds without CUDA"):
        build.compile_cuda(build.find_nvcc(), [80], [source], Path("objects"))
    assert not list(Path("objects").iterdir())


# --- what a build needs ----------------------------------------------------------------------------------------------


def test_without_torch_a_build_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot import it (No module named 'torch')" in done.stderr
    assert "pip install 'torch>=2.11,<2.16' setuptools wheel ninja pybind11" in done.stderr


def test_without_ninja_a_build_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "is_ninja_available", lambda: False)
    monkeypatch.setenv("PATH", "")
    command = build.BuildWithCuda(Distribution())
    with pytest.raises(build.CompileError, match=r"ninja, which is not on PATH: `pip install 'torch.* ninja pybind11`"):
        command.build_extensions()


# --- reading binaries ------------------------------------------------------------------------------------------------

USAGE = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN12resnet_fused4cuda14run_phases_f32ENS0_7ProgramE:
  REG:126 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:364 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
	code for sm_90
		Function : _ZN12resnet_fused4cuda14run_phases_f32ENS0_7ProgramE
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"
        /*0000*/                   HMMA.1688.F32.TF32 R4, R8, R6, R4 ;    /* 0x0000000608047240 */
                                                                          /* 0x000fe400000810ff */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R2], [R4] ;       /* 0x0000000004027fae */
        /*0020*/             @!UP1 UMOV UR4, 0x400 ;                      /* 0x0000040000047882 */
        /*0030*/                   HMMA.16816.F32 R4, R8, R6, R4 ;        /* 0x0000000608047240 */
        /*0040*/                   STL [R1], R4 ;                         /* 0x0000000401007387 */
        /*0050*/              @!P1 BRA 0x10 ;                             /* 0x0000000000047547 */
        /*0060*/                   LDL R4, [R1] ;                         /* 0x0000000001047983 */
        /*0070*/                   BRA 0x0 ;                              /* 0xfffffffc00fc7947 */
        /*10040*/                  REDG.E.ADD.F32.FTZ.RN.STRONG.GPU [R2], R4 ;
        /*10050*/             @P0  ATOMG.E.ADD.STRONG.GPU R5, [R2], R4 ;
        /*10060*/                  ATOMG.E.ADD.S32.STRONG.GPU R5, [R2], R4 ;
        /*10070*/                  ATOMS.CAST.SPIN R5, [R2], R4, R6 ;
        /*10080*/                  ATOM.E.ADD.BF16x2.RN.STRONG.GPU R5, [R2], R4 ;
        /*10090*/                  REDUX.SUM UR4, R4 ;
"""


def test_reads_what_cuobjdump_prints() -> None:
    (kernel,) = resources.parse_usage(USAGE.splitlines())
    assert resources.short(kernel.name) == "run_phases_f32"
    assert (kernel.arch, kernel.registers, kernel.stack, kernel.shared, kernel.local) == (90, 126, 8, 1024, 0)
    ((arch, name, kernel.code),) = list(resources.parse_code(USAGE.splitlines()[:5] + SASS.splitlines()))
    assert (arch, name) == (90, kernel.name)
    assert kernel.code.instructions.total() == 14 and kernel.count("HMMA") == 2 and kernel.count("LDGSTS", "UMOV") == 2
    assert [opcode.split(".")[0] for opcode in kernel.unordered] == ["REDG", "ATOMS", "ATOM"]
    assert kernel.spills_in_products == 1  # what is in the loop around that one does not count
    assert kernel.spills_in_steps == 1 and kernel.spills_in_passes == 0
    assert "| `run_phases_f32` | 90 | 126 | 8 | 1024 | 14 | 2 | 0 | 1 | 2 | 1 | 1 | 0 |" in resources.markdown([kernel])


# --- the kernels of the extension ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def binary() -> Path:
    reason = operators.load_error()
    if reason is not None:
        pytest.skip(f"there is no extension to read: {reason}")
    if operators.build_info()["cuda"] == "no":
        pytest.skip("the extension was built without CUDA")
    if resources.find_cuobjdump() is None:
        pytest.skip("cuobjdump is neither on PATH nor in an installed Triton")
    from resnet_fused import _C

    return Path(_C.__file__)


@pytest.fixture(scope="module")
def kernels(binary: Path) -> list[resources.Kernel]:
    """The kernels that walk phases, each on every architecture."""
    return [k for k in resources.read(binary, resources.find_cuobjdump()) if "run_phases" in k.name]


def test_every_architecture_has_every_kernel(binary: Path, kernels: list[resources.Kernel]) -> None:
    names, _, ptx = operators.build_info()["cuda architectures"].partition(" + ")
    archs = {int(name) for name in names.split(", ")}
    assert ptx == "PTX" and resources.architectures_of_ptx(binary, resources.find_cuobjdump()) == {max(archs)}
    assert kernels
    for name in {k.name for k in kernels}:
        assert {k.arch for k in kernels if k.name == name} == archs, name


def test_no_spills_where_it_multiplies(kernels: list[resources.Kernel]) -> None:
    """Not in the innermost loops; in a step around them float32 reloads a few addresses on one architecture."""
    for k in kernels:
        where = (resources.short(k.name), k.arch)
        assert k.spills_in_products == 0, where
        assert k.spills_in_steps <= (4 if "f32" in k.name else 0), where


def test_passes_hardly_spill(kernels: list[resources.Kernel]) -> None:
    """16 bits reload one address, on Blackwell ten values. The join of float32 keeps 24 sums in double registers."""
    for k in kernels:
        in_16_bits = 1 if k.arch < 100 else 10
        assert k.spills_in_passes <= (24 if "f32" in k.name else in_16_bits), (resources.short(k.name), k.arch)


def test_stack_holds_little_else(kernels: list[resources.Kernel]) -> None:
    """Phases are functions: each saves registers once when it begins, which is no spill."""
    bad = {(resources.short(k.name), k.arch): k.stack + k.local for k in kernels if k.stack + k.local > 256}
    assert not bad, f"bytes of local memory a thread: {bad}"


def test_two_workers_a_multiprocessor(kernels: list[resources.Kernel]) -> None:
    """65536 registers for two thread blocks of 256."""
    bad = {(resources.short(k.name), k.arch): k.registers for k in kernels if k.registers > 128}
    assert not bad, f"registers a thread: {bad}"


def test_tensor_cores_and_asynchronous_copies(kernels: list[resources.Kernel]) -> None:
    for k in kernels:
        assert k.count("HMMA") > 0 and k.count("LDGSTS") > 0, (resources.short(k.name), k.arch)


def test_sums_have_an_order(kernels: list[resources.Kernel]) -> None:
    """Bitwise equal results: atomics count workers at a barrier and nothing else."""
    bad = {(resources.short(k.name), k.arch): k.unordered for k in kernels if k.unordered}
    assert not bad, bad
