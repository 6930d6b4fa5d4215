"""benches/training.py at a small size: every way learns from the same start, pieces join, the picture is written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
SMALL = ["--width", "8", "--epochs", "2", "--steps", "2", "--processes", "0"]


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    file = Path(__file__).parents[2] / "benches" / "training.py"
    spec = importlib.util.spec_from_file_location("training_bench", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_pieces_make_a_picture(training: ModuleType, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "training.json"), "--out", str(tmp_path / "training.png")]
    ways = ["--ways", "fused", "eager"]
    for seed in ("0", "1"):
        training.main([*SMALL, *files, *ways, "--parts", "learn", "--seeds", seed])
    before = json.loads((tmp_path / "training.json").read_text())["accuracy"]
    record = training.main([*SMALL, *files, *ways, "--parts", "time", "draw", "--rounds", "2"])
    assert {way: {seed: len(each) for seed, each in seeds.items()} for way, seeds in record["accuracy"].items()} == {
        way: {"0": 2, "1": 2} for way in ("fused", "eager")
    }
    (piece,) = record["timed"]
    assert {way: len(each) for way, each in piece["epoch_seconds"].items()} == {"fused": 2, "eager": 2}
    assert piece["first_epoch_seconds"].keys() == {"fused", "eager"}
    assert record["accuracy"] == before
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="name another --json"):
        training.main([*SMALL, *files, "--depth", "14"])


def test_a_training_in_turns_is_the_one_alone(training: ModuleType) -> None:
    setting = training.Setting(depth=8, width=8, epochs=3, steps=2)
    _, accuracy = training.measure(setting, ["fused", "eager"], seed=1, rounds=2)
    for way in ("fused", "eager"):
        assert accuracy[way] == training.learn(setting, way, 1)[2]


def test_ways_see_the_same(training: ModuleType) -> None:
    """The same weights and batches, other batches for another seed; nothing that is held out is trained on."""
    setting = training.Setting(depth=8, width=8, epochs=1, steps=2)
    seen: dict[tuple[str, int], list[list[int]]] = {}
    starts = {}
    for way, seed in (("fused", 0), ("eager", 0), ("eager", 1)):
        one = training.Training(setting, way, seed)
        starts[way, seed] = [p.sum().item() for p in one.model.parameters()]
        batches = seen[way, seed] = []
        one.step = lambda which, crops, batches=batches: batches.append([*which.tolist(), *crops.tolist()])
        one.optimizer.step()
        one.epoch()
    assert seen["fused", 0] == seen["eager", 0] != seen["eager", 1]
    assert starts["fused", 0] == starts["eager", 0] != starts["eager", 1]
    assert min(min(batch) for batches in seen.values() for batch in batches) >= training.HELD_OUT
