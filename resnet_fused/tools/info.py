"""What this installation is and can do, as text; works without the C++ extension, too."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import resnet_fused
from resnet_fused.ops import operators
from resnet_fused.tools.tables import table

# what the speed of convolutions depends on, by the names of /proc/cpuinfo
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16")


def info() -> str:
    """Versions, device and threads, how the extension was built, and why each backend can or cannot run."""
    parts = [table("resnet_fused", ("what", "value"), list(machine().items()))]
    parts.append(table("C++ extension", ("what", "value"), list(extension().items())))
    parts.append(table("Backends", ("backend", "state"), list(_backends().items())))
    return "\n\n".join(parts)


def about() -> dict[str, dict[str, str | None]]:
    """What `info` shows, as values; of a backend the reason why it cannot run, or None."""
    return {"resnet_fused": {**machine()}, "extension": {**extension()}, "backends": resnet_fused.backends()}


def machine() -> dict[str, str]:
    """Versions, processor and threads: what a measurement has to be read with."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "resnet_fused": resnet_fused.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": ", ".join(gpus) or "CPU only (torch sees no GPU)",
        "cpu": f"{_cpu_name()}, torch uses {torch.backends.cpu.get_cpu_capability()}",
        "instructions": ", ".join(flag for flag in INSTRUCTIONS if flag in _cpu("flags").split()) or "unknown",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }


def extension() -> dict[str, str]:
    """`operators.build_info`, or why there is none."""
    reason = operators.load_error()
    return operators.build_info() if reason is None else {"missing": reason}


def _backends() -> dict[str, str]:
    reasons = resnet_fused.backends()
    return {name: "available" if why is None else f"unavailable: {why}" for name, why in reasons.items()}


def _cpu_name() -> str:
    return _cpu("model name") or platform.processor() or platform.machine()


def _cpu(field: str) -> str:
    """What /proc/cpuinfo says of the first processor, "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")
