"""Other runtimes, each an optional peer: a float32 module becomes theirs, its step returns the output [N, classes]."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from resnet_fused.tools.bench.task import Task

Step = Callable[[], Tensor]


def openvino(model: nn.Module, x: Tensor, labels: Tensor, task: Task) -> Step:
    """On `task.threads` threads, in float32 or bfloat16. Raises RuntimeError if it will not compute in that."""
    import openvino as ov

    wanted = "f32" if task.dtype == "float32" else "bf16"
    x = x.contiguous()
    network = ov.convert_model(model, example_input=x, input=list(x.shape))
    settings = {
        "INFERENCE_PRECISION_HINT": wanted,
        "INFERENCE_NUM_THREADS": task.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
    }
    compiled = ov.Core().compile_model(network, "CPU", settings)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if taken != wanted:
        raise RuntimeError(f"OpenVINO was asked for {wanted} and computes in {taken} on this processor")
    request, array = compiled.create_infer_request(), x.numpy()

    def step() -> Tensor:
        return torch.from_numpy(request.infer([array], share_inputs=True, share_outputs=True)[0])

    return step


def onnxruntime(model: nn.Module, x: Tensor, labels: Tensor, task: Task) -> Step:
    """On `task.threads` threads, with all of its graph optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = task.threads, 1
    x = x.contiguous()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its age: the newer exporter needs onnxscript, too
            torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"])
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])
