"""What tests are run over: backends, memory formats, dtypes, and how many examples hypothesis draws."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

BACKENDS = ["native"]
FORMATS = [torch.contiguous_format, torch.channels_last]
LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]

family = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
