"""What `resnet_fused.tune` has measured: tiles of phases and policies of blocks, kept on disk.

One JSON file, ``$XDG_CACHE_HOME/resnet_fused/tuning.json`` (by default under ``~/.cache``), with a section for each
machine: device, versions and the kernels' source make its name, so that nothing outlives what it was measured with.
A file that cannot be read counts as empty; it is replaced whole, so that two processes never mix half a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

Mode = Literal["single", "phased"]
Library = Literal["none", "spatial", "all"]


@dataclass(frozen=True)
class Decision:
    """The fastest way to run one block at one shape. speedup: PyTorch's time over ours, in the same run."""

    mode: Mode
    library: Library
    speedup: float


def decision(
    train: bool, ints: tuple[int, ...], shape: tuple[int, ...], dtype: str, widths: tuple[int, ...]
) -> Decision | None:
    """What was decided for this block and input on the current device; None where nothing was measured.

    ints: of `BlockSpec.encode`. shape: of the input. widths: output channels of the block's convolutions.
    """
    found = _section().get("blocks", {}).get(block_key(train, ints, shape, dtype, widths))
    return None if found is None else Decision(**found)


def block_key(train: bool, ints: tuple[int, ...], shape: tuple[int, ...], dtype: str, widths: tuple[int, ...]) -> str:
    return json.dumps(["train" if train else "infer", ints, shape, dtype, widths])


def tile(key: tuple[Any, ...]) -> dict[str, int] | None:
    """The tile measured for a phase (tuning.py makes the key), as its fields."""
    return _section().get("tiles", {}).get(json.dumps(key))


def record(blocks: dict[str, Decision], tiles: dict[tuple[Any, ...], dict[str, int]]) -> Path:
    """Adds to the section of this machine and returns the file."""
    path = _path()
    everything = _read(path)
    section = everything.setdefault(machine(), {"blocks": {}, "tiles": {}})
    section["blocks"].update({key: asdict(value) for key, value in blocks.items()})
    section["tiles"].update({json.dumps(key): value for key, value in tiles.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(everything, file, indent=1, sort_keys=True)
    Path(file.name).replace(path)
    forget()
    return path


def forget() -> None:
    """Read the file again when next asked."""
    _section.cache_clear()


@cache
def machine() -> str:
    """Device, versions and kernels' source."""
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    source = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))))
    return f"{device}, torch {torch.__version__}, triton {triton.__version__}, kernels {source.hexdigest()[:12]}"


@cache
def _section() -> dict[str, Any]:
    return _read(_path()).get(machine(), {})


def _path() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache_home) / "resnet_fused" / "tuning.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
