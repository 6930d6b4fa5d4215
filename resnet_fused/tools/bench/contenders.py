"""Who takes turns: what a contender is called, what makes it run, and why it may be absent."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.modules.fuse import fuse
from resnet_fused.tools.bench import engines
from resnet_fused.tools.bench.task import DTYPES, MODES, DType, Mode, Task
from resnet_fused.tools.saved_bytes import saved_bytes

OURS = "resnet_fused"


class Prepared(NamedTuple):
    """step: once, returns the output [N, classes]; in training gradients are left in `parameters`.

    saved: counts the bytes that autograd saves; None where nothing is saved or nobody can count.
    """

    step: Callable[[], Tensor]
    parameters: list[nn.Parameter]
    saved: Callable[[], int] | None = None


Prepare = Callable[[nn.Module, Tensor, Tensor, Task], Prepared]


@dataclass(frozen=True)
class Contender:
    """prepare: (float32 model in channels_last, which it may change, x, labels, task) -> `Prepared`.

    key:   what ``--peers`` calls it. about: one line for the reader.
    needs: packages, by the name that both import and pip know.
    apart: takes a process of its own always, for it and PyTorch disturb each other's threads.
    """

    name: str
    key: str
    about: str
    prepare: Prepare
    modes: tuple[Mode, ...] = MODES
    dtypes: tuple[DType, ...] = tuple(DTYPES)
    device: str | None = None
    needs: tuple[str, ...] = ()
    apart: bool = False

    def absent(self, task: Task) -> str | None:
        """Why it cannot run the task here, or None."""
        if task.mode not in self.modes:
            return f"runs --mode {' and '.join(self.modes)} only"
        if task.dtype not in self.dtypes:
            return f"runs --dtype {' and '.join(self.dtypes)} only"
        if self.device not in (None, torch.device(task.device).type):
            return f"runs with --device {self.device} only"
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"pip install {' '.join(missing)}" if missing else None


def chosen(keys: list[str]) -> list[Contender]:
    """Those of `CONTENDERS`, ours first; "all" is everybody. Raises ValueError for an unknown key."""
    known = [contender.key for contender in CONTENDERS if contender.name != OURS]
    unknown = [key for key in keys if key not in (*known, "all")]
    if unknown:
        raise ValueError(f"unknown peer {', '.join(map(repr, unknown))}; accepted: all, {', '.join(known)}")
    return [c for c in CONTENDERS if c.name == OURS or "all" in keys or c.key in keys]


def on_torch(model: nn.Module, x: Tensor, labels: Tensor, task: Task, compiled: bool = False) -> Prepared:
    """A step of a module as it is: see `Task` for what that is."""

    def forward() -> Tensor:
        with task.context():
            return model(x)

    def training() -> Tensor:
        model.zero_grad(set_to_none=True)
        out = forward()
        torch.autograd.backward(F.cross_entropy(out.float(), labels))
        return out.detach()

    parameters = list(model.parameters())
    if task.mode == "eval":
        return Prepared(torch.no_grad()(forward), parameters)
    loss = lambda: F.cross_entropy(forward().float(), labels)  # noqa: E731
    count = None if compiled else lambda: saved_bytes(loss, model.buffers())
    return Prepared(training, parameters, count)


def _fused(memory: str) -> Prepare:
    def prepare(model: nn.Module, x: Tensor, labels: Tensor, task: Task) -> Prepared:
        model, x = task.cast(model, x)
        return on_torch(fuse(model, backend=task.backend, memory=memory), x, labels, task)  # type: ignore[arg-type]

    return prepare


def _eager(layout: torch.memory_format) -> Prepare:
    def prepare(model: nn.Module, x: Tensor, labels: Tensor, task: Task) -> Prepared:
        model, x = task.cast(model.to(memory_format=layout), x.contiguous(memory_format=layout))  # type: ignore[call-overload]
        return on_torch(model, x, labels, task)

    return prepare


def _compiled(mode: str | None = None, freezing: bool = False) -> Prepare:
    def prepare(model: nn.Module, x: Tensor, labels: Tensor, task: Task) -> Prepared:
        import torch._inductor.config as inductor

        model, x = task.cast(model, x)
        prepared = on_torch(torch.compile(model, mode=mode), x, labels, task, compiled=True)  # type: ignore[arg-type]
        with inductor.patch(freezing=True) if freezing else contextlib.nullcontext():
            prepared.step()  # compiles
        return prepared

    return prepare


def _fused_compiled(model: nn.Module, x: Tensor, labels: Tensor, task: Task) -> Prepared:
    model, x = task.cast(model, x)
    fused = torch.compile(fuse(model, backend=task.backend))
    prepared = on_torch(fused, x, labels, task, compiled=True)  # type: ignore[arg-type]
    prepared.step()  # compiles
    return prepared


def _graphed(prepare: Prepare) -> Prepare:
    def captured(model: nn.Module, x: Tensor, labels: Tensor, task: Task) -> Prepared:
        step, parameters, _ = prepare(model, x, labels, task)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return Prepared(replay, parameters)

    return captured


LAST = torch.channels_last
CONTENDERS = (
    Contender(OURS, OURS, "fuse(model)", _fused("default")),
    Contender("resnet_fused low memory", "low-memory", 'fuse(model, memory="low")', _fused("low"), modes=("train",)),
    Contender("eager", "eager", "PyTorch, channels_last", _eager(LAST)),
    Contender("eager contiguous", "contiguous", "PyTorch, NCHW", _eager(torch.contiguous_format)),
    Contender("torch.compile", "compile", "default mode", _compiled()),
    Contender("resnet_fused, torch.compile", "fused-compile", "torch.compile(fuse(model))", _fused_compiled),
    Contender(
        "torch.compile freezing",
        "freezing",
        "with torch._inductor.config.freezing, weights as constants",
        _compiled(freezing=True),
        modes=("eval",),
    ),
    Contender(
        "ONNX Runtime",
        "onnxruntime",
        "CPUExecutionProvider, float32",
        lambda *given: Prepared(engines.onnxruntime(*given), []),
        modes=("eval",),
        dtypes=("float32",),
        device="cpu",
        needs=("onnxruntime", "onnx"),
        apart=True,
    ),
    Contender(
        "OpenVINO",
        "openvino",
        "latency hint, one stream; bfloat16 by INFERENCE_PRECISION_HINT on the float32 model",
        lambda *given: Prepared(engines.openvino(*given), []),
        modes=("eval",),
        device="cpu",
        needs=("openvino",),
        apart=True,
    ),
    Contender(
        "resnet_fused, CUDA graph",
        "fused-graph",
        "fuse(model), captured",
        _graphed(_fused("default")),
        modes=("eval",),
        device="cuda",
    ),
    Contender(
        "eager, CUDA graph", "eager-graph", "PyTorch, captured", _graphed(_eager(LAST)), modes=("eval",), device="cuda"
    ),
    Contender(
        "torch.compile max-autotune", "max-autotune", "with CUDA graphs", _compiled("max-autotune"), device="cuda"
    ),
)
