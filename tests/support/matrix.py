"""What tests are run over: backends, memory formats, dtypes, and how many examples hypothesis draws."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

BACKENDS = ["native"]
FORMATS = [torch.contiguous_format, torch.channels_last]
LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]

SOAK = "RESNET_FUSED_SOAK" in os.environ  # `make soak` draws other blocks in each round
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]

family = settings(
    max_examples=200,
    derandomize=not SOAK,
    deadline=None,
    database=None,
    # of other blocks in each round many may be filtered out by chance
    suppress_health_check=[*CHECKS, HealthCheck.filter_too_much] if SOAK else CHECKS,
)
