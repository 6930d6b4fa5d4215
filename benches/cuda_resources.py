"""What the CUDA kernels need of each architecture, read from the built extension; no GPU takes part.

    python benches/cuda_resources.py                      # the installed extension, as a Markdown table
    python benches/cuda_resources.py OBJECT...            # before they are linked: ~/.cache/resnet_fused/build/*.o

Needs cuobjdump, from a CUDA toolkit or from Triton's wheel.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ARCH = re.compile(r"arch = sm_(\d+)")
FUNCTION = re.compile(r"\s*Function\s*:?\s*(\w+)")
USAGE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*)")
TARGET = re.compile(r"0x([0-9a-f]+)")
ATOMIC = re.compile(r"(ATOM|RED)[GS]?\.")
COUNTER = re.compile(r"(ATOM|RED)[GS]?\.(E\.)?ADD(\.64|\.[SU]32|\.STRONG|\.GPU)*$")


@dataclass
class Code:
    """The instructions of a kernel by name; its loops; and where its matrix products are, its copies and loads of 16
    bytes, and its accesses to local memory.

    Addresses are in bytes; a loop is from the target of a branch backwards to the branch.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    products: list[int] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)
    local: list[int] = field(default_factory=list)
    loops: list[tuple[int, int]] = field(default_factory=list)

    def add(self, address: int, name: str, operands: str) -> None:
        self.instructions[name] += 1
        if name.startswith("HMMA"):
            self.products.append(address)
        elif name.startswith("LDGSTS"):
            self.copies.append(address)
        elif name.startswith("LDG") and ".128" in name:
            self.loads.append(address)
        elif name.startswith(("LDL", "STL")):
            self.local.append(address)
        elif name.startswith("BRA") and (target := TARGET.search(operands)) and int(target[1], 16) < address:
            self.loops.append((int(target[1], 16), address))


@dataclass
class Kernel:
    """A kernel on one architecture.

    registers: of a thread. stack, local: bytes of a thread; registers that ptxas spilled are in `stack`. shared: static
    bytes of a thread block, with the KiB that CUDA keeps for itself from sm_90 on.
    """

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    local: int
    code: Code = field(default_factory=Code)

    def count(self, *mnemonics: str) -> int:
        """Instructions of these names, whatever their modifiers."""
        return sum(n for name, n in self.code.instructions.items() if name.partition(".")[0] in mnemonics)

    @property
    def unordered(self) -> list[str]:
        """Atomics that do more than count in integers: sums of floats in any order, or the loops that make them up."""
        return [name for name in self.code.instructions if ATOMIC.match(name) and not COUNTER.match(name)]

    @property
    def spills_in_products(self) -> int:
        """Accesses to local memory in the innermost loops that multiply."""
        return self._spills(self.code.products)

    @property
    def spills_in_steps(self) -> int:
        """Most of them in one of the innermost loops that copy operands and multiply: a step of a product."""
        return self._spills(self.code.products, self.code.copies)

    @property
    def spills_in_passes(self) -> int:
        """Most of them in one of the innermost loops that load 16 bytes per thread, and do not multiply."""
        return self._spills(self.code.loads, but=self.code.products)

    def _spills(self, *holds: list[int], but: Sequence[int] = ()) -> int:
        def within(loop: tuple[int, int], addresses: Sequence[int]) -> int:
            return sum(loop[0] <= address <= loop[1] for address in addresses)

        loops = {loop for loop in self.code.loops if all(within(loop, each) for each in holds)}
        inner = [(a, z) for a, z in loops if not any(a <= b and y <= z for b, y in loops - {(a, z)})]
        return max((within(loop, self.code.local) for loop in inner if not within(loop, but)), default=0)


def find_cuobjdump() -> Path | None:
    if on_path := shutil.which("cuobjdump"):
        return Path(on_path)
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    in_wheel = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return in_wheel if in_wheel.exists() else None


def read(binary: Path, cuobjdump: Path) -> list[Kernel]:
    """Every kernel in the binary, once per architecture."""
    kernels = {(k.arch, k.name): k for k in parse_usage(_lines(cuobjdump, "-res-usage", binary))}
    for arch, name, code in parse_code(_lines(cuobjdump, "-sass", binary)):
        kernels[arch, name].code = code
    return sorted(kernels.values(), key=lambda k: (k.name, k.arch))


def parse_usage(lines: Iterable[str]) -> Iterator[Kernel]:
    """Of the output of ``cuobjdump -res-usage``."""
    arch, name = 0, ""
    for line in lines:
        if found := ARCH.match(line):
            arch = int(found[1])
        elif found := FUNCTION.match(line):
            name = found[1]
        elif usage := dict(USAGE.findall(line)):
            registers, stack, shared, local = (int(usage[key]) for key in ("REG", "STACK", "SHARED", "LOCAL"))
            yield Kernel(name, arch, registers, stack, shared, local)


def parse_code(lines: Iterable[str]) -> Iterator[tuple[int, str, Code]]:
    """(architecture, kernel, code) of the output of ``cuobjdump -sass``, which runs to millions of lines."""
    arch, code = 0, Code()
    for line in lines:
        if found := INSTRUCTION.match(line):
            code.add(int(found[1], 16), found[2], found[3])
        elif found := ARCH.match(line):
            arch = int(found[1])
        elif found := FUNCTION.match(line):
            code = Code()
            yield arch, found[1], code  # filled before the next is asked for


def architectures_of_ptx(binary: Path, cuobjdump: Path) -> set[int]:
    return {int(arch) for line in _lines(cuobjdump, "-lptx", binary) for arch in re.findall(r"sm_(\d+)\.ptx", line)}


def short(name: str) -> str:
    """`run_phases_f32` of `_ZN12resnet_fused4cuda14run_phases_f32ENS0_7ProgramE`."""
    rest, last = name.removeprefix("_ZN").removeprefix("_Z"), name
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        last, rest = rest[length.end() : end], rest[end:]
    return last


def _lines(cuobjdump: Path, what: str, binary: Path) -> Iterator[str]:
    command = [str(cuobjdump), what, str(binary)]
    # an older cuobjdump notes its formats on stderr, once per kernel
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def markdown(kernels: Iterable[Kernel]) -> str:
    header = ["kernel", "sm", "registers", "stack", "shared", "instructions", "HMMA", "LDSM", "LDGSTS", "LDL, STL"]
    header += ["in products", "in steps", "in passes"]
    rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for k in kernels:
        counts = (k.code.instructions.total(), k.count("HMMA"), k.count("LDSM"), k.count("LDGSTS"))
        local = (k.count("LDL", "STL"), k.spills_in_products, k.spills_in_steps, k.spills_in_passes)
        cells = (f"`{short(k.name)}`", k.arch, k.registers, k.stack + k.local, k.shared, *counts, *local)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="The resources of the CUDA kernels in a binary, as a Markdown table.")
    parser.add_argument("binaries", type=Path, nargs="*", help="extensions or objects (default: resnet_fused._C)")
    args = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        parser.error("cuobjdump is neither on PATH nor in an installed Triton (pip install triton)")
    if not args.binaries:
        extension = find_spec("resnet_fused._C")
        if extension is None or extension.origin is None:
            parser.error("resnet_fused._C is not built; pip install --no-build-isolation -e .")
        args.binaries = [Path(extension.origin)]
    kernels = [kernel for binary in args.binaries for kernel in read(binary, cuobjdump)]
    if not kernels:
        parser.error(f"no CUDA kernel in {', '.join(map(str, args.binaries))}; build the extension where there is nvcc")
    print(markdown(kernels))


if __name__ == "__main__":
    main()
