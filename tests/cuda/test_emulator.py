"""The emulator that runs the CUDA kernels on a CPU: its primitives against NumPy, and what it notices."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

PROBES = Path(__file__).parents[1] / "emulator" / "probes.cpp"
Array = np.ndarray[Any, Any]


def compiled(target: Path, *flags: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulator is compiled with g++, which is not here")
    command = [compiler, "-std=c++20", "-Wall", "-Wextra", f"-I{PROBES.parent}", *flags, str(PROBES), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


def address(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def aligned(size: int, kind: type) -> Array:
    """Zeros of 4 bytes each from a multiple of 16 bytes on, for asynchronous copies."""
    store: Array = np.zeros(size + 4, kind)
    start = -store.ctypes.data // 4 % 4
    return store[start : start + size]


class Probes:
    """probes.cpp as a library: arrays go by address, numbers as C's int unless wrapped."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def launch(self, name: str, *arguments: Any) -> str:
        """The error of the launch, or an empty string."""
        function = self.library[name]
        function.restype = ctypes.c_char_p
        error: bytes = function(*(address(a) if isinstance(a, np.ndarray) else a for a in arguments))
        return error.decode()

    def check(self, name: str, *arguments: Any) -> None:
        assert self.launch(name, *arguments) == ""

    def convert(self, name: str, values: Array, result: type) -> Array:
        out: Array = np.empty(values.size, result)
        function = self.library[name]
        function.restype = None
        function(address(values), address(out), values.size)
        return out


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Probes:
    return Probes(compiled(tmp_path_factory.mktemp("probes") / "assembly.so", "-O2", "-fPIC", "-shared"))


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Probes:
    flags = ["-O1", "-fPIC", "-shared", "-DRESNET_FUSED_EMULATOR_UCONTEXT"]
    return Probes(compiled(tmp_path_factory.mktemp("probes") / "ucontext.so", *flags))


@pytest.fixture(params=["probes", "portable"])
def every(request: pytest.FixtureRequest) -> Probes:
    """With either way of switching from fiber to fiber."""
    found: Probes = request.getfixturevalue(request.param)
    return found


def seed(number: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(number)


# --- one primitive each -----------------------------------------------------------------------------------------------


def test_indices(probes: Probes) -> None:
    place, total = np.zeros((3, 80), np.int32), np.zeros(1, np.int32)
    probes.check("indices", 3, 80, place, total)
    assert np.array_equal(place, 1000 * np.arange(3)[:, None] + np.arange(80))
    assert total[0] == 3 * 3 * 80


def same_numbers(bits: Array, expected: Array, exponent: int) -> None:
    """Equal, bit for bit, but for what a NaN's mantissa holds; `exponent` is infinity."""
    both_nan = ((bits & 0x7FFF) > exponent) & ((expected & 0x7FFF) > exponent)
    assert np.array_equal(bits[~both_nan], expected[~both_nan])


def edge_floats() -> Array:
    """Floats near every rounding boundary of the narrow types, special ones, and random bits."""
    tops = np.arange(1 << 16, dtype=np.uint32) << 16
    ties = [tops + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    eighths = (np.arange(1 << 16, dtype=np.uint32) << 13) + 0x33000000  # f16's subnormals, to its overflow
    ties += [eighths + low for low in (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF)]
    random = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint32)
    return np.concatenate([*ties, random]).view(np.float32)


@pytest.mark.parametrize(
    ("name", "kind", "infinity"), [("bf16", torch.bfloat16, 0x7F80), ("f16", torch.float16, 0x7C00)]
)
def test_16_bit_conversions(probes: Probes, name: str, kind: torch.dtype, infinity: int) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    wide = probes.convert(f"{name}_to_float", patterns, np.float32)
    expected = torch.from_numpy(patterns.view(np.int16)).view(kind).float().numpy()
    assert np.array_equal(wide, expected, equal_nan=True)
    assert np.array_equal(np.signbit(wide), np.signbit(expected))

    values = edge_floats()
    narrow = probes.convert(f"float_to_{name}", values, np.uint16)
    reference = torch.from_numpy(values).to(kind).view(torch.int16).numpy().view(np.uint16)
    same_numbers(narrow, reference, infinity)


def test_tf32_conversion(probes: Probes) -> None:
    """To the nearest of 10 bits of mantissa, in 64-bit numbers; ties away from zero."""
    values = edge_floats()
    values = values[np.isfinite(values) & (np.abs(values) >= np.finfo(np.float32).tiny)]
    mantissa, exponent = np.frexp(values.astype(np.float64))
    expected = np.copysign(np.ldexp(np.floor(np.abs(mantissa) * 2**11 + 0.5), exponent - 11), values)
    with np.errstate(over="ignore"):
        rounded = expected.astype(np.float32)
    assert np.array_equal(probes.convert("float_to_tf32", values, np.uint32), rounded.view(np.uint32))

    special = np.array([np.inf, -np.inf, 0.0, -0.0, np.nan, -np.nan], np.float32)
    assert np.array_equal(probes.convert("float_to_tf32", special, np.uint32).view(np.float32), special, equal_nan=True)


def test_integers(probes: Probes) -> None:
    probes.library.product.restype = ctypes.c_uint64
    probes.library.there_and_back.restype = ctypes.c_uint32
    assert probes.library.product(ctypes.c_uint32(0xFFFFFFFF), ctypes.c_uint32(0xFFFFFFFE)) == 0xFFFFFFFF * 0xFFFFFFFE
    assert probes.library.there_and_back(ctypes.c_uint32(0x40490FDB)) == 0x40490FDB


def matrix(kind: str, shape: tuple[int, int], generator: np.random.Generator) -> tuple[Array, Array]:
    """Random elements as bits and as the numbers that a tensor core sees."""
    values = generator.standard_normal(shape).astype(np.float32)
    if kind == "tf32":
        bits = values.view(np.uint32)  # the low bits are there, and ignored
        return bits, (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    values.flat[::7] *= 2.0**-20  # among them subnormals of f16
    narrow = torch.from_numpy(values).to(torch.bfloat16 if kind == "bf16" else torch.float16)
    return narrow.view(torch.int16).numpy().view(np.uint16), narrow.double().numpy()


KINDS = {"bf16": 16, "f16": 16, "tf32": 8}


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_product(every: Probes, kind: str) -> None:
    k = KINDS[kind]
    generator = np.random.default_rng(1)
    for number in range(20):
        a, left = matrix(kind, (16, k), generator)
        b, right = matrix(kind, (k, 8), generator)
        c = generator.standard_normal((16, 8)).astype(np.float32)
        out = np.zeros_like(c)
        every.check("matrix_product", list(KINDS).index(kind), a, b, c, out, seed(number))
        np.testing.assert_array_max_ulp(out, (left @ right + c).astype(np.float32), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_product_rounds_once(probes: Probes, kind: str) -> None:
    """Added to 2^24 one after the other, ones would all be lost; infinities and NaN go through."""
    k = KINDS[kind]
    one = {"bf16": 0x3F80, "f16": 0x3C00, "tf32": 0x3F800000}[kind]
    element = np.uint32 if kind == "tf32" else np.uint16
    a, b = np.full((16, k), one, element), np.full((k, 8), one, element)
    c = np.full((16, 8), 2.0**24, np.float32)
    c[3, 5] = np.inf
    a[7, 2] = ~element(0)  # the poison
    out = np.zeros_like(c)
    probes.check("matrix_product", list(KINDS).index(kind), a, b, c, out, seed(1))
    expected = np.full((16, 8), 2.0**24 + k, np.float32)
    expected[3, 5] = np.inf
    expected[7] = np.nan
    assert np.array_equal(out, expected, equal_nan=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(every: Probes, transposed: bool) -> None:
    matrices = np.random.default_rng(2).integers(0, 1 << 16, (4, 8, 8), np.uint16)
    registers = np.zeros((32, 4), np.uint32)
    every.check("load_matrices", ctypes.c_bool(transposed), matrices, registers, seed(3))
    held = matrices.transpose(0, 2, 1) if transposed else matrices
    pairs = np.ascontiguousarray(held).view(np.uint32).reshape(4, 32)  # lane 4 g + t: row g, elements 2 t and 2 t + 1
    assert np.array_equal(registers, pairs.T)


def test_asynchronous_copies(probes: Probes) -> None:
    """Poison until waited for; a copy from outside is zeros and never reads; one that is not committed stays away."""
    source = aligned(8, np.uint32)
    source[:] = np.arange(1, 9)
    poison: Array = np.full(4, 0xFFFFFFFF, np.uint32)
    zeros: Array = np.zeros(4, np.uint32)
    seen = np.zeros((3, 3, 4), np.uint32)
    for number in range(8):  # whether the source is read early or late is up to the seed
        probes.check("copies", source, seen, seed(number))
        assert np.array_equal(seen[0], np.stack([poison, poison, poison]))
        assert np.array_equal(seen[1], np.stack([source[:4], poison, poison]))
        assert np.array_equal(seen[2], np.stack([source[:4], zeros, poison]))


def test_shared_memory_is_poisoned(probes: Probes) -> None:
    for size in (1, 100, 4096, 4096):
        found = np.zeros(size, np.uint8)
        probes.check("fresh_shared_memory", found, size)
        assert (found == 0xFF).all()


def test_order(probes: Probes) -> None:
    """The same for the same seed, another for another."""

    def order(number: int) -> list[int]:
        place = np.zeros(2 * 64, np.int32)
        probes.check("order", 2, 64, seed(number), place)
        return [int(p) for p in place]

    orders = [order(number) for number in range(4)]
    assert orders == [order(number) for number in range(4)]
    assert all(sorted(o) == list(range(128)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4


# --- barriers, there and left out ------------------------------------------------------------------------------------


def test_reduction(every: Probes) -> None:
    values = np.arange(256, dtype=np.float32)
    for number in range(20):
        out = np.zeros(1, np.float32)
        every.check("reduction", values, out, seed(number), -1)
        assert out[0] == values.sum()


@pytest.mark.parametrize("left_out", range(8))
def test_reduction_without_a_barrier_shows(probes: Probes, left_out: int) -> None:
    values = np.arange(256, dtype=np.float32)
    wrong = 0
    for number in range(8):
        out = np.zeros(1, np.float32)
        probes.check("reduction", values, out, seed(number), left_out)
        wrong += out[0] != values.sum()
    assert wrong > 0


@pytest.mark.parametrize("barrier", [True, False])
def test_double_buffer(probes: Probes, barrier: bool) -> None:
    values = aligned(8 * 128, np.int32).reshape(8, 128)
    values[:] = np.random.default_rng(3).integers(1, 1000, values.shape)
    right = 0
    for number in range(8):
        out = np.zeros(8, np.int32)
        probes.check("double_buffer", 8, values, out, seed(number), ctypes.c_bool(barrier))
        right += np.array_equal(out, values.sum(1))
    assert right == 8 if barrier else right < 8


@pytest.mark.parametrize("barrier", ["grid", "worker", "none"])
def test_grid_barrier(every: Probes, barrier: str) -> None:
    workers, threads, rounds = 3, 128, 6
    right = 0
    for number in range(6):
        values = np.zeros((2, workers, threads), np.int32)
        values[0] = np.arange(workers * threads).reshape(workers, threads)
        expected = values[0].sum(0) * workers ** (rounds - 1)
        every.check("grid", workers, threads, rounds, values, seed(number), ["grid", "worker", "none"].index(barrier))
        right += np.array_equal(values[rounds % 2], np.broadcast_to(expected, (workers, threads)))
    assert right == 6 if barrier == "grid" else right < 6


@pytest.mark.parametrize("barrier", [True, False])
def test_ticket(probes: Probes, barrier: bool) -> None:
    """Taken before all threads of the worker have written, it lets the last one read too early."""
    workers, threads = 3, 64
    right = 0
    for number in range(8):
        partials, total = np.zeros(workers * threads, np.int32), np.zeros(1, np.int32)
        probes.check("ticket", workers, threads, partials, total, seed(number), ctypes.c_bool(barrier))
        right += int(total[0]) == sum(range(1, workers * threads + 1))
    assert right == 8 if barrier else right < 8


def test_copy_before_its_source_is_written_shows(probes: Probes) -> None:
    source, out = aligned(128, np.float32), np.zeros(32, np.float32)
    probes.check("early_copy", source, out, seed(0))
    assert 0 < out.sum() < 32


# --- what ends a launch ----------------------------------------------------------------------------------------------

MISTAKES = {
    "returned before": "sync_threads",
    "divergent barrier": "no thread can go on",
    "divergent warp": "not all at the same warp operation",
    "absent lane": "not all at the same warp operation",
    "partial warp": "fewer than 32 threads",
    "spin": "spins for ever",
    "misaligned source": "global memory is not a multiple of 16",
    "misaligned destination": "shared memory is not a multiple of 16",
    "misaligned row": "shared memory is not a multiple of 16",
    "row outside": "not in the worker's shared memory",
    "exception": "a telling message",
    "overrun": "beyond its shared memory",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(every: Probes, name: str) -> None:
    """And the next launch is as if nothing had been."""
    for number in range(3):
        assert MISTAKES[name] in every.launch("mistake", name.encode(), seed(number))
        every.check("mistake", b"none", seed(number))


def test_address_sanitizer(tmp_path: Path) -> None:
    """Follows the fibers from stack to stack: it reports nothing that is right, and what is not."""
    program = compiled(tmp_path / "probes", "-O1", "-g", "-fsanitize=address")
    right = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert right.returncode == 0, right.stdout + right.stderr
    wrong = subprocess.run([program, "overrun"], capture_output=True, text=True, timeout=120)
    assert "AddressSanitizer: heap-buffer-overflow" in wrong.stderr


FAKE_COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then cat "$(dirname "$0")/version"; exit; fi
while [ "$1" != -o ]; do shift; done
echo compiled >> "$(dirname "$0")/log"
sleep 0.1
echo "$2" > "$2"
"""


def test_launchers_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks, at whatever time; and again for other flags, another compiler, other sources."""
    from emulator import emulated  # needs the extension, which the other tests here do not

    compiler = tmp_path / "g++"
    compiler.write_text(FAKE_COMPILER)
    compiler.chmod(0o755)
    (tmp_path / "version").write_text("1")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path / "kept"))

    def compilations() -> int:
        return len((tmp_path / "log").read_text().splitlines())

    with ThreadPoolExecutor(3) as pool:
        made = set(pool.map(lambda _: emulated.compiled("launcher", "-O2"), range(3)))
    assert compilations() == 1 and {path.parent for path in made} == {tmp_path / "kept"} and made.pop().exists()
    emulated.compiled("launcher", "-O1")
    (tmp_path / "version").write_text("2")
    emulated.compiled("launcher", "-O2")
    assert compilations() == 3
    cuda = shutil.copytree(emulated.CUDA, tmp_path / "cuda")
    emulated.compiled("launcher", "-O2", cuda=cuda)
    assert compilations() == 3
    with (cuda / "kernels" / "tile.cuh").open("a") as header:
        header.write("// changed")
    emulated.compiled("launcher", "-O2", cuda=cuda)
    assert compilations() == 4
