"""A child process that holds one object and calls its methods when it is told to.

    worker = Worker("resnet_fused.tools.bench.desk:open_desk", ("eager", task), cores=[0, 1])
    worker("turn")

Contenders do not share a process where one could disturb another: threads pinned by one library confine the next one's,
settings of a compiler and the peak of memory belong to a process. Only one works at a time; the others wait on a pipe.
This file is also what the child runs, and then it imports nothing of this package: `compare` gives it another one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class BenchError(RuntimeError):
    """A measurement cannot go on; the message says whose fault it is."""


class Worker:
    """what:  "module:function" or "/path/to/file.py:function", which makes the object from `given`.

    cores: for its threads, as many as cores. pin: gives each OpenMP thread a core of its own.
    path:  folders before all others of the child's import path.

    Raises BenchError, as every call does, with what the child raised, or that it has died.
    """

    def __init__(
        self, what: str, given: Sequence[Any], cores: Sequence[int], pin: bool = True, path: Sequence[str] = ()
    ) -> None:
        self.what = what
        self.pipe, theirs = Pipe()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(len(cores)),
            "PYTHONPATH": os.pathsep.join([*path, *filter(None, sys.path)]),
        }
        if pin:
            environment |= {"OMP_PROC_BIND": "true", "OMP_PLACES": ",".join(f"{{{core}}}" for core in cores)}
        command = [sys.executable, __file__, str(theirs.fileno()), *map(str, cores)]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        try:
            self._ask((what, tuple(given)))
        except BenchError:
            self.close()
            raise

    def __call__(self, method: str, *given: Any) -> Any:
        return self._ask((method, given))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _ask(self, request: object) -> Any:
        try:
            self.pipe.send(request)
            good, answer = self.pipe.recv()
        except (EOFError, OSError):
            status = self.process.wait()
            raise BenchError(
                f"the process of {self.what} ended with status {status}" + (": out of memory?" if status == -9 else "")
            ) from None
        if not good:
            raise BenchError(answer)
        return answer


def serve(pipe: Connection) -> None:
    """The child's side: makes the object, then calls one method per message until None comes."""
    what, given = pipe.recv()
    held: Any = None

    def make() -> None:
        nonlocal held
        held = _function(what)(*given)

    _answer(pipe, make)
    while held is not None and (request := pipe.recv()) is not None:
        method, arguments = request
        _answer(pipe, lambda method=method, arguments=arguments: getattr(held, method)(*arguments))  # type: ignore[misc]


def _answer(pipe: Connection, ask: Callable[[], Any]) -> None:
    try:
        answer = True, ask()
    except Exception as error:  # whatever it is, the parent tells
        answer = False, f"{type(error).__name__}: {error}".strip()
    pipe.send(answer)


def _function(what: str) -> Any:
    source, name = what.rsplit(":", 1)
    if not source.endswith(".py"):
        return getattr(importlib.import_module(source), name)
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose files are modules of a package
    os.sched_setaffinity(0, list(map(int, sys.argv[2:])))  # before anything loads OpenMP, which narrows it further
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the parent has gone
        serve(Connection(int(sys.argv[1])))
