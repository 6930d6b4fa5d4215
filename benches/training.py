"""A whole training, fused beside eager and torch.compile: accuracy over epochs and over seconds, in one picture.

python benches/training.py                             # everything; about half an hour on two cores
python benches/training.py --parts learn --seeds 3     # a piece of it: what is measured joins what is there
python benches/training.py --parts time --rounds 29    # a whole training in turns: times, and accuracies as well

A small ResNet (32, 64 and 128 channels) under bfloat16 autocast learns scikit-learn's digits, 32x32 in colour: a digit
turns a crop of the sample photographs into its negative, and every epoch puts the digits on other crops. Every way to
run starts from the same weights and sees the same batches. "learn" trains in processes of one thread. "time" trains in
turns, epoch by epoch, on one thread, and takes processor time without evaluation; torch.compile's evaluation is
eager's, so that it compiles one graph only.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import models
from resnet_fused.tools.bench.rounds import Spread, interleaved, ratios, timed
from resnet_fused.tools.figures import new_figure, save
from resnet_fused.tools.info import extension, machine
from resnet_fused.tools.pictures import photographs
from resnet_fused.tools.tables import table

WAYS = {"fused": "tab:blue", "eager": "tab:orange", "compile": "tab:green"}
BATCH = 64
HELD_OUT = 7 * BATCH  # of 1,797 digits
SIZE = 32  # pixels


class Setting(NamedTuple):
    depth: int
    width: int
    epochs: int
    steps: int  # of an epoch


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8, help="6 n + 2 layers (default: %(default)s)")
    parser.add_argument("--width", type=int, default=32, help="channels of the first layer (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=21, help=f"of an epoch, {BATCH} digits each")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--rounds", type=int, default=15, help="timed epochs of each way, after one that is not; of the first seed"
    )
    parser.add_argument("--parts", nargs="+", choices=("time", "learn", "draw"), default=["time", "learn", "draw"])
    parser.add_argument("--processes", type=int, default=2, help="trainings at once; 0: in this process")
    parser.add_argument("--json", type=Path, default=Path("benches/results/training.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/training.png"))
    args = parser.parse_args(argv)

    setting = Setting(args.depth, args.width, args.epochs, args.steps)
    record = begin(args.json, setting)
    if "time" in args.parts:
        record |= {"machine": machine(), "extension": extension()}
        seed = args.seeds[0]
        epochs, accuracy = measure(setting, args.ways, seed, args.rounds)
        record["timed"].append(epochs)
        for way in args.ways if args.rounds + 1 == args.epochs else ():
            record["accuracy"].setdefault(way, {})[str(seed)] = accuracy[way]
        write(record, args.json)
    if "learn" in args.parts:
        for way, seed, accuracy in trainings(setting, args.ways, args.seeds, args.processes):
            record["accuracy"].setdefault(way, {})[str(seed)] = accuracy
            write(record, args.json)
            print(f"{way}, seed {seed}: {accuracy[-1]:.2%}", flush=True)
    if "draw" in args.parts:
        report(record)
        draw(record, args.out)
        print(f"saved {args.out}")
    return record


def begin(file: Path, setting: Setting) -> dict[str, Any]:
    """What is measured already, or an empty record. Raises ValueError where it was measured in another setting."""
    if not file.exists():
        return {"setting": setting._asdict(), "accuracy": {}, "timed": []}
    record: dict[str, Any] = json.loads(file.read_text())
    if record["setting"] != setting._asdict():
        raise ValueError(f"{file} holds {record['setting']}, asked for {setting._asdict()}; name another --json")
    return record


def write(record: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


# --- data ------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """digits: [1797, 1, 32, 32] from 0 (paper) to 1 (ink). crops: of the photographs, as many, [..., 3, 32, 32]."""

    digits: Tensor
    labels: Tensor
    crops: Tensor

    def pictures(self, which: Tensor, crops: Tensor) -> Tensor:
        """The crops, of mean about 0, negative where there is ink."""
        x = self.crops[crops] * (1 - 2 * self.digits[which])
        return x.contiguous(memory_format=torch.channels_last)


@functools.cache
def data() -> Data:
    """Raises ImportError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install resnet_fused[pictures]") from error
    images, labels = load_digits(return_X_y=True)
    digits = F.interpolate(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, SIZE, mode="bilinear")
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return Data(digits[order], torch.tensor(labels)[order], photographs(len(digits), SIZE))


# --- training --------------------------------------------------------------------------------------------------------


class Training:
    """SGD with momentum; the rate rises to 0.05 and falls again (arXiv:1708.07120). The first digits are held out."""

    def __init__(self, setting: Setting, way: str, seed: int) -> None:
        self.steps, self.data = setting.steps, data()
        torch.manual_seed(seed)
        model = models.small_resnet(setting.depth, width=setting.width, fused=way == "fused")
        self.model = model.to(memory_format=torch.channels_last)
        self.run: Callable[[Tensor], Tensor] = torch.compile(self.model) if way == "compile" else self.model
        self.draws = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        self.rate = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, 0.05, total_steps=setting.epochs * setting.steps
        )

    def epoch(self) -> None:
        free = len(self.data.digits) - HELD_OUT
        which, crops = (HELD_OUT + torch.randperm(free, generator=self.draws) for _ in range(2))
        for step in range(self.steps):
            batch = slice(step * BATCH, (step + 1) * BATCH)
            self.step(which[batch], crops[batch])
            self.rate.step()

    def step(self, which: Tensor, crops: Tensor) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(self.run(self.data.pictures(which, crops)), self.data.labels[which])
        loss.backward()
        self.optimizer.step()

    def accuracy(self) -> float:
        """On the digits held out, on crops held out."""
        self.model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            each = [self.model(self.data.pictures(i, i)).argmax(1) for i in torch.arange(HELD_OUT).split(BATCH)]
        return (torch.cat(each) == self.data.labels[:HELD_OUT]).float().mean().item()


def learn(setting: Setting, way: str, seed: int) -> tuple[str, int, list[float]]:
    """The accuracy after each epoch."""
    torch.compiler.reset()
    training = Training(setting, way, seed)
    accuracy = []
    for _ in range(setting.epochs):
        training.epoch()
        accuracy.append(training.accuracy())
    return way, seed, accuracy


def trainings(setting: Setting, ways: Sequence[str], seeds: Sequence[int], processes: int) -> Any:
    """`learn` of every seed and way, in the order in which they end."""
    each = [(setting, way, seed) for seed in seeds for way in ways]
    if not processes:
        yield from (learn(*one) for one in each)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        for done in as_completed([pool.submit(learn, *one) for one in each]):
            yield done.result()


def measure(
    setting: Setting, ways: Sequence[str], seed: int, rounds: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Seconds of each way's epochs, in turns, the first apart, in which torch.compile compiles; and accuracies.

    Processor time of one thread, which other processes lengthen less than the time that passes.
    """
    setting = setting._replace(epochs=max(setting.epochs, rounds + 1))
    accuracy: dict[str, list[float]] = {way: [] for way in ways}
    first: dict[str, float] = {}

    def turn(way: str, training: Training) -> float:
        seconds = timed(training.epoch, clock)()
        first.setdefault(way, seconds)
        accuracy[way].append(training.accuracy())
        return seconds

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch._inductor.config.patch(
        force_disable_caches=True, compile_threads=1
    ):  # one: in this process, to be counted
        each = {way: functools.partial(turn, way, Training(setting, way, seed)) for way in ways}
        seconds = interleaved(each, rounds)
    torch.set_num_threads(threads)
    return {"first_epoch_seconds": first, "epoch_seconds": seconds}, accuracy


def clock() -> float:
    """Processor seconds of this process and of the compilers that it has run."""
    compilers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + compilers.ru_utime + compilers.ru_stime


# --- what came out ---------------------------------------------------------------------------------------------------


def of_epochs(record: dict[str, Any], way: str) -> list[list[float]]:
    """Of each epoch, every seed's accuracy."""
    return [list(each) for each in zip(*record["accuracy"][way].values(), strict=True)]


def beside_fused(record: dict[str, Any], way: str) -> Spread:
    """Of epochs in the same round."""
    both = [piece["epoch_seconds"] for piece in record["timed"] if {way, "fused"} <= piece["epoch_seconds"].keys()]
    above, below = ([seconds for piece in both for seconds in piece[name]] for name in (way, "fused"))
    return ratios(above, below)


def epoch(record: dict[str, Any], way: str) -> float:
    """Seconds: fused's median, times the ratio to it, which does not change with what else the machine does."""
    fused = [seconds for piece in record["timed"] for seconds in piece["epoch_seconds"]["fused"]]
    return statistics.median(fused) * beside_fused(record, way).middle


def compilation(record: dict[str, Any]) -> float:
    """Seconds that torch.compile's first epoch takes longer than the others."""
    pieces = [piece for piece in record["timed"] if "compile" in piece["first_epoch_seconds"]]
    return statistics.median(
        piece["first_epoch_seconds"]["compile"] - statistics.median(piece["epoch_seconds"]["compile"])
        for piece in pieces
    )


def report(record: dict[str, Any]) -> None:
    """Final accuracies, and how long each way takes to what the worst of them has in the end."""
    ends = {way: of_epochs(record, way)[-1] for way in record["accuracy"]}
    goal = min(statistics.median(end) for end in ends.values())
    rows = []
    for way, end in ends.items():
        middles = [statistics.median(each) for each in of_epochs(record, way)]
        epochs = next(i for i, middle in enumerate(middles, 1) if middle >= goal)
        ratio = beside_fused(record, way)
        rows.append(
            [
                way,
                str(len(end)),
                f"{statistics.mean(end):.2%}",
                f"{statistics.stdev(end):.2%}" if len(end) > 1 else "",
                f"{ratio.middle:.2f} ({ratio})",
                str(epochs),
                f"{epochs * epoch(record, way):.1f}",
                f"{compilation(record):.1f}" if way == "compile" else "",
            ]
        )
    header = (
        "",
        "seeds",
        "accuracy",
        "deviation",
        "epoch / fused",
        f"epochs to {goal:.1%}",
        "seconds",
        "compilation, s",
    )
    print(table("Accuracy in the end, over seeds, and time to accuracy", header, rows))


def draw(record: dict[str, Any], out: Path) -> None:
    """Medians over seeds, and the band from the worst to the best seed. Dotted: with what torch.compile compiles."""
    figure = new_figure(10, 4)
    panels = figure.subplots(1, 2, sharey=True)
    for way in (way for way in WAYS if way in record["accuracy"]):
        accuracies = [[100 * value for value in each] for each in of_epochs(record, way)]
        middles = [statistics.median(each) for each in accuracies]
        lows, highs = [min(each) for each in accuracies], [max(each) for each in accuracies]
        epochs = list(range(1, len(middles) + 1))
        times = [epoch(record, way) * i for i in epochs]
        label = f"torch.{way}" if way == "compile" else way
        for axes, x in zip(panels, (epochs, times), strict=True):
            axes.plot(x, middles, color=WAYS[way], label=label)
            axes.fill_between(x, lows, highs, color=WAYS[way], alpha=0.15, linewidth=0)
        if way == "compile":
            first = compilation(record)
            late = [first + seconds for seconds in times]
            panels[1].plot(late, middles, ":", color=WAYS[way], label=f"{label}, with {first:.0f} s of compiling")
    panels[0].set(xlabel="epoch", ylabel="accuracy on digits held out, %")
    panels[1].set(xlabel="seconds of training (one thread, processor time)")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    save(figure, out)


if __name__ == "__main__":
    main()
