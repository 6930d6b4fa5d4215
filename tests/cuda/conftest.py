"""The emulated device: compiled, installed as the backend "emulated", and compiled again with faults in its kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from emulator.emulated import EmulatedBackend, Emulator, compiled, installed, outdated
from emulator.faults import FAULTS, OVERRUN, planted
from support.emulated_checks import Checks

SANITIZED = ("-O1", "-fsanitize=address")


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    reason = outdated()
    assert reason is None, reason
    try:
        return Emulator(compiled("launcher", "-O2"))
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def faulty(
    request: pytest.FixtureRequest, emulator: Emulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Path]]]:
    """Launchers that the tests of the tests need: compiled beside the other tests, where any of them will run.

    `backend` asks for them, so that this begins with the first test on the emulator and not with the first of theirs.
    """

    def build(name: str) -> Path:
        if name == "sanitized":
            return compiled(name, *SANITIZED)
        fault = OVERRUN if name == "overrun" else FAULTS[name]
        cuda = planted(fault, tmp_path_factory.mktemp("fault") / "cuda")
        flags = SANITIZED if name == "overrun" else ("-O1",)
        return compiled(f"fault-{name.replace(' ', '-')}", *flags, "-DRESNET_FUSED_EMULATOR_TYPE=bf16", cuda=cuda)

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as jobs:
        wanted = any("launcher_of" in getattr(item, "fixturenames", ()) for item in request.session.items)
        yield {name: jobs.submit(build, name) for name in [*FAULTS, "sanitized", "overrun"] if wanted}
        jobs.shutdown(cancel_futures=True)


@pytest.fixture
def launcher_of(faulty: dict[str, Future[Path]]) -> Callable[[str], Path]:
    return lambda name: faulty[name].result()


@pytest.fixture
def backend(emulator: Emulator, faulty: dict[str, Future[Path]]) -> Iterator[EmulatedBackend]:
    """ "emulated", single launches, nothing left to the library; on one thread, because the reference runs are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    emulator.configure()
    with installed(emulator) as backend:
        backend.set_how("single", "none")
        yield backend
    torch.set_num_threads(threads)


@pytest.fixture
def check(emulator: Emulator, backend: EmulatedBackend) -> Checks:
    return Checks(emulator, backend)
