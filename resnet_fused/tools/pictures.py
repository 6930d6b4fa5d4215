"""Photographs as network input: scikit-learn's two samples, or a folder of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def photographs(batch: int, size: int = 224, folder: str | Path | None = None, seed: int = 0) -> Tensor:
    """`batch` different square crops, normalised as ImageNet: float32 [batch, 3, size, size], channels_last.

    folder: a folder of pictures (.jpg, .png, ...), cropped in turn; None takes scikit-learn's sample photographs.
    seed:   of the crops' places and sizes (half to the whole of a picture's short side).

    Raises ValueError for a bad size or an empty folder, ImportError if the optional packages are missing.
    """
    if batch < 1 or size < 1:
        raise ValueError(f"batch and size must be positive, got batch={batch}, size={size}")
    pictures = _samples() if folder is None else _read(Path(folder))
    generator = torch.Generator().manual_seed(seed)
    crops = torch.cat([_crop(pictures[i % len(pictures)], size, generator) for i in range(batch)])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((crops - mean) / std).contiguous(memory_format=torch.channels_last)


def _crop(picture: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random square of a [3, H, W] picture in [0, 1], resized to [1, 3, size, size]."""
    _, height, width = picture.shape
    short = min(height, width)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    side = draw((short + 1) // 2, short)
    top, left = draw(0, height - side), draw(0, width - side)
    square = picture[None, :, top : top + side, left : left + side]
    return F.interpolate(square, (size, size), mode="bilinear", antialias=True)


def _samples() -> list[Tensor]:
    try:
        from sklearn.datasets import load_sample_images

        images = load_sample_images().images
    except ImportError as error:
        raise ImportError(_missing("the sample photographs need scikit-learn and pillow", error)) from error
    return [_tensor(image) for image in images]


def _read(folder: Path) -> list[Tensor]:
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"no pictures in {folder}; accepted: a folder with {', '.join(SUFFIXES)} files")
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise ImportError(_missing("reading pictures needs pillow and numpy", error)) from error
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            pictures.append(_tensor(np.array(image.convert("RGB"))))
    return pictures


def _tensor(image: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [0, 1]."""
    return torch.tensor(image).permute(2, 0, 1).float() / 255


def _missing(what: str, error: ImportError) -> str:
    return (
        f"{what}: `pip install resnet_fused[pictures]`; on the command line --images DIR takes a folder of your own "
        f"pictures instead (import said: {error})"
    )
