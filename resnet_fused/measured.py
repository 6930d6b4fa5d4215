"""What `resnet_fused.tune` has measured: the fastest way to run each block, and tiles of Triton's phases, on disk.

One JSON file, ``$XDG_CACHE_HOME/resnet_fused/tuning.json`` (by default under ``~/.cache``), with a section for each
machine: device, versions and both kinds of kernels make its name, so that nothing outlives what it was measured with.
What cannot be read, or was written in another form, counts as not measured; the file is replaced whole, so that two
processes never mix half a file.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from resnet_fused import how, operators, triton_kernels  # type: ignore[attr-defined, unused-ignore]
from resnet_fused.how import Library, Mode, Wish
from resnet_fused.spec import BlockSpec

BackendName = Literal["native", "triton"]
# training or not, `BlockSpec.encode`, the input's shape, its dtype, output channels of each convolution
Key = tuple[bool, tuple[int, ...], tuple[int, ...], str, tuple[int, ...]]


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


def key(spec: BlockSpec, x: Tensor, weights: Sequence[Tensor]) -> Key:
    """What a decision is found by. weights: of the block's convolutions."""
    return (
        spec.batch_stats,
        _numbers(spec.encode()[0]),
        _numbers(x.shape),
        str(x.dtype),
        _numbers([w.shape[0] for w in weights]),
    )


def lookup(spec: BlockSpec, x: Tensor, weights: Sequence[Tensor]) -> Key | None:
    """The key; None on a machine on which nothing was measured, where no graph need depend on its sizes."""
    return key(spec, x, weights) if _anything() else None


def decision(key: Key | None) -> Decision | None:
    """What was decided for this block and input on the current device; None where nothing was measured."""
    return None if key is None else _decision(key, how.precision())


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
    where = "" if key is None else f" for inputs {key[2]}"
    if found is None:
        return f"not measured on this GPU{where}; resnet_fused.tune(model, x) measures"
    figure = f"{found.speedup:.2f} times PyTorch's speed"
    if found.backend == backend:
        return None if found.speedup >= 1 else f"measured at {figure}{where}"
    if backend not in found.others:
        return f"not measured{where}, {found.backend} at {figure}"
    return f"measured at {found.others[backend]:.2f}, {found.backend} at {figure}{where}"


def tile(key: tuple[Any, ...]) -> dict[str, int] | None:
    """The tile measured for a phase (triton_kernels/tuning.py makes the key), as its fields."""
    found = _section()["tiles"].get(json.dumps(key))
    return found if isinstance(found, dict) else None


def record(blocks: dict[Key, Decision], tiles: dict[tuple[Any, ...], dict[str, int]]) -> Path:
    """Adds to the section of this machine and returns the file."""
    path = _path()
    everything = _read(path)
    section = everything[machine()] = _checked(everything.get(machine()))
    section["blocks"].update({_text(k, how.precision()): asdict(value) for k, value in blocks.items()})
    section["tiles"].update({json.dumps(k): value for k, value in tiles.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(everything, file, indent=1, sort_keys=True)
    Path(file.name).replace(path)
    forget()
    return path


def forget() -> None:
    """Read the file again when next asked."""
    _section.cache_clear()
    _decision.cache_clear()


@cache
def machine() -> str:
    """Device, versions, the source of Triton's kernels, and the compiled extension."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    folder = Path(triton_kernels.__file__).parent
    source = b"".join(p.read_bytes() for p in sorted(folder.glob("*.py")))
    binary = operators.binary()
    return ", ".join(
        [
            device,
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
def _anything() -> bool:
    return bool(_section()["blocks"])


@lru_cache(maxsize=4096)
def _decision(key: Key, precision: str) -> Decision | None:
    found = _section()["blocks"].get(_text(key, precision))
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
    train, *rest = key
    return json.dumps(["train" if train else "infer", *rest, *([precision] if key[3] == "torch.float32" else [])])


@cache
def _section() -> dict[str, dict[str, Any]]:
    return _checked(_read(_path()).get(machine()))


def _checked(section: Any) -> dict[str, dict[str, Any]]:
    """The two parts of a section, empty where they are none."""
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
