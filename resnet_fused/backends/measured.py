"""What `resnet_fused.tune` has measured: the fastest way to run each block, and tiles of Triton's phases, on disk.

One JSON file, ``$XDG_CACHE_HOME/resnet_fused/tuning.json`` (by default under ``~/.cache``), with a section for each
kind of GPU. The section's name has the GPU's name, the versions and both kinds of kernels, so that no result outlives
what it was measured with. Every key begins with the GPU that it is about, so two GPUs in one machine never answer for
each other. What cannot be read, or was written in another form, counts as not measured. Processes add to the file one
at a time, and the file is replaced whole.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from resnet_fused import triton_kernels  # type: ignore[attr-defined, unused-ignore]
from resnet_fused.backends import how
from resnet_fused.backends.how import Library, Mode, Wish
from resnet_fused.ops import operators
from resnet_fused.ops.encoding import encode
from resnet_fused.spec import BlockSpec

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

BackendName = Literal["native", "triton"]
GPU = int | None  # its index; None is none, where the tests' emulator and Triton's interpreter run

# the GPU, training or not, the spec as `ops.encoding` writes it, the input's shape, its dtype, output channels of each
# convolution; a plain tuple, because torch.compile passes it on as a constant
Key = tuple[GPU, bool, tuple[int, ...], tuple[int, ...], str, tuple[int, ...]]
TileKey = tuple[Any, ...]  # the GPU, and what triton_kernels/host/tuning.py chooses the tile of a phase by


@dataclass(frozen=True)
class Decision:
    """The fastest way to run one block at one shape.

    speedup: PyTorch's time over ours, in the same run. others: the same for the other backends at their fastest.
    """

    backend: BackendName
    mode: Mode
    library: Library
    speedup: float
    others: dict[str, float] = field(default_factory=dict)


def gpu_of(x: Tensor) -> GPU:
    return x.device.index if x.device.type == "cuda" else None


def key(spec: BlockSpec, x: Tensor, weights: Sequence[Tensor], train: bool) -> Key:
    """The key of a decision. weights: of the block's convolutions. train: as `autograd.trains` says."""
    return (
        gpu_of(x),
        train,
        _numbers([*encode(spec).ints, spec.memory == "low"]),
        _numbers(x.shape),
        str(x.dtype),
        _numbers([w.shape[0] for w in weights]),
    )


def lookup(spec: BlockSpec, x: Tensor, weights: Sequence[Tensor], train: bool) -> Key | None:
    """The key; None where nothing was measured on x's GPU. Then no traced graph has to depend on x's sizes."""
    return key(spec, x, weights, train) if _anything(gpu_of(x)) else None


def decision(key: Key | None) -> Decision | None:
    """What was decided for this block and input on its GPU; None where nothing was measured."""
    return None if key is None else _decision(key, how.precision())


@torch.compiler.assume_constant_result  # as `declines`
def wish(backend: BackendName, key: Key | None) -> Wish:
    """How a backend is to run this block: as asked for (`how.asked`), else as measured if it then was the fastest."""
    asked, found = how.asked(), decision(key)
    if found is None or found.backend != backend:
        return asked
    return Wish(asked.mode or found.mode, asked.library or found.library)


@torch.compiler.assume_constant_result  # a graph keeps what was true when it was traced
def declines(backend: BackendName, key: Key | None) -> str | None:
    """Why "auto" should pass over this backend on a GPU: it takes only what was measured to be the fastest of all."""
    found = decision(key)
    where = "" if key is None else f" for {'training' if key[1] else 'evaluation'} with inputs {key[3]}"
    if found is None:
        return f"not measured on this GPU{where}; resnet_fused.tune(model, x) measures"
    figure = f"{found.speedup:.2f} times PyTorch's speed"
    if found.backend == backend:
        return None if found.speedup >= 1 else f"measured at {figure}{where}"
    if backend not in found.others:
        return f"not measured{where}, {found.backend} at {figure}"
    return f"measured at {found.others[backend]:.2f}, {found.backend} at {figure}{where}"


@lru_cache(maxsize=4096)
def tile(key: TileKey) -> dict[str, int] | None:
    """The tile measured for a phase, as its fields."""
    gpu, *phase = key
    found = _section(gpu)["tiles"].get(json.dumps(phase))
    return found if isinstance(found, dict) else None


def record(blocks: dict[Key, Decision], tiles: dict[TileKey, dict[str, int]]) -> Path:
    """Adds to the sections of the GPUs in the keys and returns the file."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        everything = _read(path)

        def part(name: str, gpu: GPU) -> dict[str, Any]:
            section = everything[machine(gpu)] = _checked(everything.get(machine(gpu)))
            return section[name]

        for key, decision in blocks.items():
            part("blocks", key[0])[_text(key, how.precision())] = asdict(decision)
        for (gpu, *phase), fields in tiles.items():
            part("tiles", gpu)[json.dumps(phase)] = fields
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump(everything, file, indent=1, sort_keys=True)
        Path(file.name).replace(path)
    forget()
    return path


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; where the system or the file system has no locks, the last to write wins."""
    with path.with_suffix(".lock").open("w") as file:  # not the file itself, which is replaced
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def forget() -> None:
    """Read the file again when next asked."""
    for known in (_section, _decision, tile):
        known.cache_clear()


@lru_cache(maxsize=64)
def machine(gpu: GPU = None) -> str:
    """The GPU's name, versions, the source of Triton's kernels, and the compiled extension."""
    known = gpu is not None and torch.cuda.is_available()  # a fake tensor may be on a GPU that is not here
    return f"{torch.cuda.get_device_name(gpu) if known else 'no GPU'}, {_kernels()}"


@cache
def _kernels() -> str:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    folder = Path(triton_kernels.__file__).parent
    source = b"".join(p.read_bytes() for p in sorted(folder.rglob("*.py")))
    binary = operators.binary()
    return ", ".join(
        [
            f"torch {torch.__version__}",
            f"triton {version} {_digest(source)}",
            f"extension {'none' if binary is None else _digest(binary.read_bytes())}",
        ]
    )


def _numbers(sizes: Sequence[int]) -> tuple[int, ...]:
    """Under torch.compile a size may be symbolic; its index is a number, on which the graph then depends."""
    return tuple([operator.index(size) for size in sizes])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


@torch.compiler.assume_constant_result
def _anything(gpu: GPU) -> bool:
    return bool(_section(gpu)["blocks"])


@lru_cache(maxsize=4096)
def _decision(key: Key, precision: str) -> Decision | None:
    found = _section(key[0])["blocks"].get(_text(key, precision))
    match found:
        case {
            "backend": "native" | "triton" as backend,
            "mode": "single" | "phased" as mode,
            "library": "none" | "spatial" | "all" as library,
            "speedup": float(speedup),
            "others": dict(others),
            **rest,
        } if not rest and all(isinstance(value, float) for value in others.values()):
            return Decision(backend, mode, library, speedup, others)
    return None


def _text(key: Key, precision: str) -> str:
    _, train, *rest = key
    return json.dumps(["train" if train else "infer", *rest, *([precision] if key[4] == "torch.float32" else [])])


@lru_cache(maxsize=64)
def _section(gpu: GPU) -> dict[str, dict[str, Any]]:
    return _checked(_read(_path()).get(machine(gpu)))


def _checked(section: Any) -> dict[str, dict[str, Any]]:
    """The two parts of a section; empty where they are missing or malformed."""
    given = section if isinstance(section, dict) else {}
    return {part: given[part] if isinstance(given.get(part), dict) else {} for part in ("blocks", "tiles")}


def _path() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache_home) / "resnet_fused" / "tuning.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
