"""The kernels of ResNet-50 compile for chips that are not here: without spills, within the chip, on tensor cores.

Triton decides at import whether it interprets, and the other tests' process does, so the compiler gets its own. What
it has compiled before comes from its cache, which names kernels by all that they are made of.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


def compile_command(folder: Path, *arguments: str) -> tuple[int, str, list[dict[str, Any]]]:
    """(exit status, output, kernels) of ``resnet-fused compile``."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    file = folder / "kernels.json"
    command = [sys.executable, "-m", "resnet_fused", "compile", *arguments, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    kernels = json.loads(file.read_text()) if file.exists() else []
    return done.returncode, done.stdout + done.stderr, kernels


@pytest.mark.parametrize(
    ("arch", "instruction"), [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05")], ids=str
)
def test_every_phase_of_resnet50(arch: str, instruction: str, tmp_path: Path) -> None:
    status, text, kernels = compile_command(tmp_path, "--arch", arch, "--launch", "phased", "--batch", "256")
    assert status == 0, text
    assert len(kernels) > 40 and not any(k["spills"] or k["fault"] for k in kernels)
    on_tensor_cores = [k["dots"][instruction] for k in kernels if k["multiplies"]]
    assert sum(count > 0 for count in on_tensor_cores) > len(on_tensor_cores) / 2, f"{instruction} is rare: {text}"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_whole_blocks_in_one_launch(arch: str, tmp_path: Path) -> None:
    blocks = ("layer1.0", "layer3.1")
    status, text, kernels = compile_command(
        tmp_path, "--arch", arch, "--launch", "single", "--batch", "8", "--block", *blocks
    )
    assert status == 0, text
    assert len(kernels) == 6 and all(len(k["names"]) > 1 and k["workers"] >= 1 for k in kernels)


def test_tf32_runs_on_tensor_cores(tmp_path: Path) -> None:
    arguments = ("--arch", "sm_90", "--launch", "phased", "--dtype", "tf32", "--block", "layer2.1")
    status, text, kernels = compile_command(tmp_path, *arguments)
    assert status == 0, text
    assert all(sum(k["dots"].values()) > 0 for k in kernels if k["multiplies"])


def test_unknown_names_are_usage_errors(tmp_path: Path) -> None:
    status, text, _ = compile_command(tmp_path, "--arch", "sm_12345")
    assert status == 2 and "accepted: sm_80" in text
    status, text, _ = compile_command(tmp_path, "--block", "layer9.9")
    assert status == 2 and "accepted: stem" in text


FAULTY = """
import sys
from dataclasses import replace
import torch
from resnet_fused.triton_kernels.offline import ahead_of_time as aot
from resnet_fused.triton_kernels.host import tuning

job = aot.jobs([90], ["phased"], 256, torch.bfloat16, blocks=["layer3.1"])[0]
launch = job.launches()[1]
(config,) = launch.arguments[3]

def fault(**changes):
    arguments = (*launch.arguments[:3], (replace(config, **changes),), *launch.arguments[4:])
    return aot.fault(job, aot.compile_launch(replace(launch, arguments=arguments), aot.BY_ARCH[90]))

print(fault(rows=256, columns=256), "|", fault(buffers=8, rows=128, columns=128))
"""


def test_a_bad_tile_is_found() -> None:
    """A test of the test: a tile too big for the registers, and one too deep for shared memory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", FAULTY], capture_output=True, text=True, env=environment)
    registers, _, shared = done.stdout.partition("|")
    assert "local memory" in registers and "shared memory" in shared, done.stdout + done.stderr
