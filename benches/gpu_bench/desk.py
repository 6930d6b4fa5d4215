"""The contestants of one process, which answers requests for them."""

from __future__ import annotations

import gc
from typing import Any

import torch
from gpu_bench.block_work import BlockWork
from gpu_bench.clock import Clock, Sample, Step
from gpu_bench.network_work import NetworkWork
from gpu_bench.pass_work import PassWork
from gpu_bench.setting import NETWORK, Key, Setting


class Desk:
    """The contestants of one process; one work at a time."""

    def __init__(self, setting: Setting) -> None:
        if setting.dry:
            torch.set_num_threads(1)
        self.setting, self.clock = setting, Clock(setting.device)
        self.work: tuple[Key, BlockWork | NetworkWork | PassWork] | None = None
        self.tuned: set[tuple[int, str]] = set()
        self.steps: dict[str, Step] = {}

    def __call__(self, method: str, *args: Any) -> Any:
        return getattr(self, method)(*args)

    def open(self, key: Key, contestant: str, direction: str) -> None:
        if self.work is None or self.work[0] != key:
            self.close()
            self.work = key, self._made(*key)
        self.steps[contestant] = self.work[1].step(contestant, direction)

    def _made(self, name: str, batch: int) -> BlockWork | NetworkWork | PassWork:
        if name == NETWORK:
            return NetworkWork(batch, self.setting, self.tuned)
        passes = self.setting.passes()
        if name in passes:
            return PassWork(passes[name], batch, self.setting)
        return BlockWork(self.setting.shapes()[name], batch, self.setting)

    def warm(self, contestant: str) -> None:
        """Compiles, searches and allocates what the first calls do."""
        for _ in range(1 if self.setting.dry else 3):
            self.steps[contestant]()
        self.clock.synchronize()

    def sample(self, contestant: str) -> Sample:
        return self.clock.sample(self.steps[contestant])

    def peak(self, contestant: str) -> int | None:
        """Bytes that a call holds at most, beyond weights, their gradients and the input."""
        if not self.clock.cuda:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.steps[contestant]()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, contestant: str) -> tuple[int, int]:
        """(kernels, launches of our own)"""
        activity = torch.profiler.ProfilerActivity.CUDA if self.clock.cuda else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            self.steps[contestant]()
            self.clock.synchronize()
        names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
        return len(kernels), sum("run_phases" in name for name in kernels)

    def finish(self) -> None:
        """Forgets the steps, keeps the work."""
        self.steps.clear()
        torch.compiler.reset()

    def close(self) -> None:
        self.finish()
        self.work = None
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()
