"""`verify` passes what is right, catches what is wrong, and leaves the model alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.small_net import picture, small_net
from support.wrong_formulas import WRONG, Formula, no_statistics, not_a_number, right, twice_the_noise
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models
from resnet_fused.ops import reference
from resnet_fused.tools.comparison import WHOLE, Comparison


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_the_formula_passes(dtype: torch.dtype | None, train: bool) -> None:
    report = resnet_fused.verify(small_net(), picture(), dtype=dtype, train=train, backend="eager", seeds=2)
    assert report.ok, report.table()
    assert [part.name for part in report.parts] == ["0", "1", WHOLE]
    compared = {quantity.name for quantity in report.parts[0].quantities}
    assert {"output", "input gradient", "gradient of conv1.weight", "gradient of downsample.1.bias"} <= compared
    assert {"bn2.running_mean", "bn2.running_var", "bn2.num_batches_tracked"} <= compared
    assert ("output without autograd" in compared) is not train


def test_the_model_is_left_alone() -> None:
    net = small_net().eval()
    before = copy.deepcopy(net.state_dict())
    resnet_fused.verify(net, picture(), backend="eager", seeds=1)
    assert not net.training and type(net[0]) is models.BasicBlock  # type: ignore[index]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_block_is_caught(monkeypatch: pytest.MonkeyPatch, wrong: Formula, seeds: int) -> None:
    """In a layout and dtype that has the widest bounds, too, whatever the distributions say."""
    monkeypatch.setattr(reference, "residual_block", wrong)
    report = resnet_fused.verify(small_net(), picture(), backend="eager", seeds=seeds)
    assert not report.ok
    assert "0" in {single.part for single in report.wrong}
    assert "WRONG" in report.table()


def test_the_worst_tensors_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "residual_block", no_statistics)
    report = resnet_fused.verify(small_net(), picture(), backend="eager", seeds=1)
    assert all(report.worst(name).quantity.split(".")[-1] in ("running_mean", "running_var") for name in ("0", "1"))


def test_many_slightly_wrong_tensors_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "residual_block", twice_the_noise)
    net = small_net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    report = resnet_fused.verify(net, picture(), train=False, backend="eager", seeds=3)
    assert not report.ok
    assert [d.kind for d in report.distributions if not d.ok] == ["output", "output without autograd"]


def nudged(x: Tensor) -> Tensor:
    """One value of 64 moved by an ulp: what is right stays right, and what follows rounds differently."""
    chosen = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 1 / 64
    return x + torch.where(chosen, x.detach() * torch.finfo(x.dtype).eps, 0)


def in_other_layout(x: Tensor) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("change", [nudged, in_other_layout])
def test_eager_passes_beside_itself(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], train: bool, dtype: torch.dtype | None
) -> None:
    """The rule must not fail an implementation that is equal but for how it rounds, flipped masks included."""
    monkeypatch.setattr(reference, "residual_block", lambda x, params, spec: right(change(x), params, spec))
    report = resnet_fused.verify(small_net(), picture(), dtype=dtype, train=train, backend="eager")
    assert report.ok, report.table()
    assert any(q.ours != q.eager for part in report.parts for q in part.quantities)


def test_json_is_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "residual_block", not_a_number)

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    report = resnet_fused.verify(small_net(), picture(), backend="eager", seeds=2)
    found = json.loads(report.to_json(), parse_constant=refuse)
    assert found["ok"] is False and found["layout"] == "contiguous" and found["seeds"] == 2
    assert {"torch", "cpu", "threads"} <= found["machine"].keys()
    (output,) = [q for q in found["parts"][-1]["quantities"] if q["name"] == "output"]
    assert [error["norm"] for error in output["ours"]] == [None, None] and None not in output["eager"]


def test_the_stem_is_compared() -> None:
    torch.manual_seed(0)
    net = models.resnet18(fused=True)
    report = resnet_fused.verify(net, torch.randn(2, 3, 32, 32), train=False, backend="eager", seeds=1)
    assert report.ok, report.table()
    assert [part.name for part in report.parts][:2] == ["stem", "layer1.0"]
    assert all(part.linear for part in report.parts[:-1])


def test_rounding_at_the_kink_is_no_fault() -> None:
    """A mask that flips under rounding moves a gradient by far more than eager's error, and is excused."""

    class Shifted(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, x: Tensor) -> Tensor:
            shift = 0.0 if x.dtype == torch.float64 else self.shift
            return torch.relu(x * 3.1 + shift)

    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    x[0, 0, 0, 0] = 1e-9

    def wrong(shift: float) -> set[str]:
        net = small_net()
        report = resnet_fused.verify(net, picture(), backend="eager", seeds=1)
        parts = Comparison(seeds=1).compare(
            nn.Sequential(Shifted(1e-7)), nn.Sequential(Shifted(shift)), ["0"], lambda _: x
        )
        return {single.quantity for single in replace(report, parts=parts).wrong if single.part == "0"}

    assert "input gradient" not in wrong(-1e-7)
    assert "input gradient" in wrong(-2.0)


class Loose(nn.Module):
    """A model of two inputs, with several outputs in the given container."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.pack = small_net(), pack

    def forward(self, image: Tensor, scale: Tensor, labels: Tensor | None = None) -> Any:
        out = self.net(image) * scale
        return self.pack(out, out.sum(1) if labels is None else out.gather(1, labels[:, None]))


@dataclass
class Prediction:
    logits: Tensor
    loss: Tensor
    chosen: Tensor | None = None


@pytest.mark.parametrize(
    ("pack", "names"),
    [
        (lambda a, b: (a, [b, a.argmax(1)]), {"output[0]", "output[1][0]"}),
        (lambda a, b: {"logits": a, "loss": b}, {"output['logits']", "output['loss']"}),
        (Prediction, {"output.logits", "output.loss"}),
    ],
    ids=["tuple", "dict", "dataclass"],
)
def test_several_inputs_and_outputs(pack: Callable[[Tensor, Tensor], Any], names: set[str]) -> None:
    scale, labels = torch.rand(4, 1), torch.arange(4)
    by_place = resnet_fused.verify(Loose(pack), (picture(), scale), backend="eager", seeds=2)
    by_name = resnet_fused.verify(
        Loose(pack), {"image": picture(), "scale": scale, "labels": labels}, backend="eager", seeds=2
    )
    for report, inputs in ((by_place, {" 0", " 1"}), (by_name, {" of image", " of scale"})):
        assert report.ok, report.table()
        compared = {quantity.name for quantity in report.parts[-1].quantities}
        assert names | {f"input gradient{name}" for name in inputs} <= compared
        assert not any("argmax" in name or name.endswith("chosen") or "[1][1]" in name for name in compared)


def test_seeds_differ_and_repeat() -> None:
    given: list[Tensor] = []

    def source(seed: int) -> Tensor:
        given.append(picture() + seed)
        return given[-1]

    resnet_fused.verify(small_net(), source, backend="eager", seeds=2)
    assert torch.equal(given[0], given[1] - 1) or len(given) == 3
    one, two = (resnet_fused.verify(small_net(), picture(), backend="eager", seeds=3) for _ in range(2))
    assert one == two
    errors = one.parts[0].quantities[0].eager
    assert len(set(errors)) == 3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_is_the_users_own(layout: torch.memory_format) -> None:
    seen = []

    class Watched(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float32:
                seen.append(x.is_contiguous(memory_format=layout))
            return super().forward(x)

    net = Watched(*small_net()).to(memory_format=layout)  # type: ignore[call-overload]
    report = resnet_fused.verify(net, picture().to(memory_format=layout), backend="eager", seeds=2)
    assert all(seen) and report.layout == ("contiguous" if layout == torch.contiguous_format else "channels_last")


def test_the_share_that_runs_fused() -> None:
    net = nn.Sequential(*small_net()[:2], nn.Flatten())  # type: ignore[index]
    net[1].bn1 = nn.GroupNorm(2, 8)
    net.eval()
    for share, ok in ((0.5, True), (0.6, False)):
        report = resnet_fused.verify(net, picture(), train=False, backend="native", seeds=1, min_fused=share)
        assert report.runs_fused == {"0": True, "1": False} and report.ok is ok
        assert ("1 of 2 blocks run fused; not 1" in report.table()) and (("WRONG" in report.share) is not ok)


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[str, int, int]] = []
    resnet_fused.verify(small_net(), picture(), backend="eager", seeds=2, progress=lambda *step: seen.append(step))
    assert [step[1:] for step in seen] == [(done, 6) for done in range(7)]


def test_refusals_say_what_is_accepted() -> None:
    net, x = small_net(), picture()
    with pytest.raises(ValueError, match="accepted: None, float32, bfloat16 or float16"):
        resnet_fused.verify(net, x, dtype=torch.float64)
    with pytest.raises(ValueError, match="below float64"):
        resnet_fused.verify(net.double(), x.double())
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        resnet_fused.verify(small_net(), x, backend="fast")
    with pytest.raises(ValueError, match="explain"):
        resnet_fused.verify(nn.Sequential(nn.Conv2d(3, 3, 1)), x)
    with pytest.raises(ValueError, match="at least one seed"):
        resnet_fused.verify(small_net(), x, seeds=0)
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        resnet_fused.verify(small_net(), x, min_fused=90)
    with pytest.raises(TypeError, match="returned str; accepted: a floating tensor"):
        resnet_fused.verify(Loose(lambda *_: "text"), (x, torch.rand(4, 1)), backend="eager")
