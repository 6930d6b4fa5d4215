"""The counts of fused pairs: against models that are counted by hand, and against what is really called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fused import fuse, models
from resnet_fused.tools import coverage, named_models
from resnet_fused.tools.cli import main

pytest.importorskip("torchvision")


def test_pairs_are_what_a_norm_reads() -> None:
    class Odd(nn.Module):
        """A convolution behind which a pooling stands, one whose norm is called by another name, and one alone."""

        def __init__(self) -> None:
            super().__init__()
            self.pooled, self.followed, self.alone = (nn.Conv2d(4, 4, 1) for _ in range(3))
            self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(nn.functional.avg_pool2d(self.pooled(x), 2))
            return self.alone(self.second(self.followed(x)))

    assert coverage.pairs(Odd().eval(), torch.randn(1, 4, 4, 4)) == ["followed"]


def test_a_model_is_built_without_values() -> None:
    with coverage.without_values():
        model = named_models.build_any("torchvision:resnet18")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in models.small_resnet(8).parameters())  # and nothing else is


def test_what_is_counted_as_fused_is_not_called() -> None:
    """The convolutions that a fused model calls itself are those that are counted as not fused."""
    torch.manual_seed(0)
    block, strange = models.BasicBlock(8, 8), nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model = nn.Sequential(block, strange).eval()
    x = torch.randn(1, 8, 6, 6)
    found = coverage.pairs(model, x)
    assert found == ["0.conv1", "0.conv2", "1.0"]
    fuse(model)
    called: list[str] = []
    names = {conv: name for name, conv in model.named_modules()}
    original = nn.Conv2d.forward

    def note(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        called.append(names[self])
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.Conv2d, "forward", note)
        model(x)
    assert list(coverage.unfused(model, found)) == called == ["1.0"]


def test_reasons_and_totals() -> None:
    found = coverage.coverage(["torchvision:resnet18", "torchvision:shufflenet_v2_x0_5", "torchvision:nothing"])
    whole, foreign, failed = found
    assert (whole.pairs, whole.fused, whole.reasons, whole.share) == (20, 20, {}, 1.0)
    assert foreign.pairs == 56 and foreign.fused == 2  # its first and its last layer, an nn.Sequential each
    assert any(reason.startswith("InvertedResidual: its branches are depthwise") for reason in foreign.reasons)
    assert sum(foreign.reasons.values()) == 54
    assert failed.error is not None and "nothing" in failed.error
    assert "22 of 76 convolution + batch norm pairs run fused (28.9%), all of them in 1 of 2 models" in found.summary
    assert "1 models could not be called" in found.summary
    assert "InvertedResidual" in str(found)


def test_the_command_writes_both_files_and_judges_the_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, data = tmp_path / "page.md", tmp_path / "data.json"
    arguments = ["coverage", "torchvision:resnet18", "--markdown", str(page), "--json", str(data)]
    assert main([*arguments, "--min-share", "1"]) == 0
    assert "20 of 20" in capsys.readouterr().out
    assert "| torchvision:resnet18 | 20 | 20 | 100% |" in page.read_text()
    assert json.loads(data.read_text())["fused"] == 20
    assert main([*arguments, "--min-share", "1", "--further", "torchvision:shufflenet_v2_x0_5"]) == 0
    totals, further = page.read_text().split("# Further families")
    assert "20 of 20" in totals and "shufflenet" not in totals.split("## Models")[1]
    assert "2 of 56" in further and "| torchvision:shufflenet_v2_x0_5 | 56 | 2 | 4% |" in further
    assert json.loads(data.read_text())["fused"] == 20
    assert main(["coverage", "torchvision:shufflenet_v2_x0_5", "--min-share", "0.5"]) == 1
    assert main(["coverage", "torchvision:nothing*"]) == 2
    assert "no model matches" in capsys.readouterr().err
    assert main(["coverage", "resnet*"]) == 2
    assert "names no library" in capsys.readouterr().err
