"""The ResNets of WeSpeaker and pyannote.audio, by stand-ins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.stand_ins import conv, copy_of, pictures, projection, settled
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse
from resnet_fused.modules.fuse import why_not


class Block(nn.Module):
    def __init__(self, convs: list[nn.Module], shortcut: nn.Module | None = None) -> None:
        super().__init__()
        for i, layer in enumerate(convs, start=1):
            setattr(self, f"conv{i}", layer)
            setattr(self, f"bn{i}", nn.BatchNorm2d(layer.out_channels))
        self.count = len(convs)
        self.shortcut = nn.Sequential() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.count + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(F.relu(out) if i > 1 else out))
        out += self.shortcut(x)
        return F.relu(out)


@pytest.mark.parametrize("module", ["wespeaker.models.resnet", "pyannote.audio.models.embedding.wespeaker.resnet"])
def test_a_model_trains_as_eager(module: str) -> None:
    basic, bottleneck = copy_of(Block, f"{module}.BasicBlock"), copy_of(Block, f"{module}.Bottleneck")
    torch.manual_seed(0)
    model = nn.Sequential(
        basic([conv(8, 8, 3), conv(8, 8, 3)]),
        basic([conv(8, 12, 3, 2), conv(12, 12, 3)], projection(8, 12, 2)),
        bottleneck([conv(12, 4, 1), conv(4, 4, 3), conv(4, 12, 1)]),
        bottleneck([conv(12, 4, 1), conv(4, 4, 3, 2), conv(4, 16, 1)], projection(12, 16, 2)),
    )
    assert_trains_as_eager(settled(model), pictures())
    rows = explain(fuse(model))
    assert len(rows) == len(model)
    assert {row.backend for row in rows} == {"native"}


def test_a_hook_on_an_empty_shortcut_is_named() -> None:
    block = copy_of(Block, "wespeaker.models.resnet.BasicBlock")([conv(8, 8, 3), conv(8, 8, 3)])
    block.shortcut.register_forward_hook(lambda *_: None)
    assert "shortcut (Sequential) has hooks" in str(why_not(block))
