"""Where plain PyTorch may crash, and so cannot set the bar."""

from __future__ import annotations

from resnet_fused.spec import StageSpec


def eager_may_crash(stage: StageSpec, kernel: tuple[int, int]) -> bool:
    """oneDNN 3.12 writes out of bounds in the weight gradient of strided 1x1 convolutions, and reads out of bounds in a
    bfloat16 convolution whose only tap in a row is dilated."""
    (rows, columns), _, (_, dilation) = stage.geometry
    return (kernel == (1, 1) and (rows, columns) != (1, 1)) or (kernel[1] == 1 and dilation > 1 and columns > 1)
