"""Other runtimes, where they are installed, compute what the model says."""

from __future__ import annotations

import pytest

from resnet_fused.tools.bench.contenders import CONTENDERS
from resnet_fused.tools.bench.reference import Reference
from resnet_fused.tools.bench.task import DTYPES, DType, Task


@pytest.mark.parametrize("key", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_is_eagers(key: str, dtype: DType) -> None:
    (contender,) = (c for c in CONTENDERS if c.key == key)
    task = Task(dtype=dtype, batch=2, size=64, threads=1)
    if (reason := contender.absent(task)) is not None:
        pytest.skip(reason)
    built = task.build()
    reference = Reference.of(*built, task)
    try:
        prepared = contender.prepare(*built, task)
    except RuntimeError as error:
        if "computes in" in str(error):  # no bfloat16 on this processor
            pytest.skip(str(error))
        raise
    errors = reference.errors(prepared)
    assert reference.refusal(errors) is None and errors.gradients is None
