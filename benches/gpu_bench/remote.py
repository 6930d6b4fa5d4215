"""A desk in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
from typing import Any

import torch
from gpu_bench.desk import Desk
from gpu_bench.error_text import error_text
from gpu_bench.setting import Setting


class Remote:
    """A desk in a process of its own, with cudnn.benchmark on.

    PyTorch keeps one cache of convolution plans a process, and what was chosen without the search is found there
    with it, too: two contestants that differ in this flag alone cannot share a process.
    """

    def __init__(self, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setting), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, method: str, *args: Any) -> Any:
        self.pipe.send((method, args))
        done, value = self.pipe.recv()
        if not done:
            raise RuntimeError(value)
        return value

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)


def _serve(pipe: Any, setting: Setting) -> None:
    torch.backends.cudnn.benchmark = True
    desk = Desk(setting)
    while (request := pipe.recv()) is not None:
        method, args = request
        try:
            pipe.send((True, desk(method, *args)))
        except Exception as error:
            pipe.send((False, error_text(error)))
