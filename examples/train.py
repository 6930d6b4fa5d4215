"""Train a ResNet with fused blocks: on scikit-learn's digits, or on a folder of pictures.

    python examples/train.py                                                  # digits, under two minutes on two cores
    python examples/train.py --data pictures --model resnet50 --amp bfloat16  # pictures/CLASS/*.jpg
    python examples/train.py --checkpoint last.pt                             # can be interrupted ...
    python examples/train.py --checkpoint last.pt --resume                    # ... and continued, bit for bit

SGD with momentum, a cosine schedule (Loshchilov & Hutter 2017, arXiv:1608.03983) and label smoothing (Szegedy et al.
2016, arXiv:1512.00567). Writes log.csv and curve.png to the folder --out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import resnet_fused
from resnet_fused.tools.figures import new_figure, save
from resnet_fused.tools.named_models import FAMILY, import_torchvision
from resnet_fused.tools.pictures import IMAGENET_MEAN, IMAGENET_STD

SMALL = 64  # pixels: up to here the stem keeps the resolution
HELD_OUT = 0.2  # of the examples: what accuracy is measured on
# Arguments that a resumed run may change: they do not enter what is computed.
FREE = ("checkpoint", "resume", "out")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.manual_seed(arguments.seed)
    data = digits(arguments.size) if arguments.data is None else pictures(Path(arguments.data), arguments.size)
    model = build(arguments, data)
    training = Training.begin(model, data, arguments)
    if arguments.resume:
        training.load(arguments.checkpoint)
    run = torch.compile(model) if arguments.run == "compile" else model
    for epoch in range(training.epoch, arguments.epochs):
        training.history.append({"epoch": epoch + 1, **one_epoch(run, training, arguments)})
        training.epoch = epoch + 1
        report(training.history, arguments.out)
        if arguments.checkpoint is not None:
            training.save(arguments.checkpoint)
    print(f"accuracy {training.history[-1]['accuracy']:.2%} on {len(data.held_out)} held-out examples")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="a folder with one folder of pictures per class; default: digits")
    parser.add_argument("--size", type=int, help="of the square inputs; default: 12 for digits, 224 for pictures")
    parser.add_argument("--limit", type=int, help="train on this many examples only, to try things out")
    parser.add_argument("--model", choices=FAMILY, default="resnet18")
    run = parser.add_mutually_exclusive_group()
    for name, what in (
        ("fused", "fused blocks (default)"),
        ("eager", "plain PyTorch"),
        ("compile", "plain PyTorch under torch.compile"),
    ):
        run.add_argument(f"--{name}", dest="run", action="store_const", const=name, default="fused", help=what)
    parser.add_argument("--memory", choices=("default", "low"), default="default", help="low recomputes in backward")
    parser.add_argument("--amp", choices=("bfloat16",), help="autocast; default: float32")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.05, help="at the start of the cosine")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="of all weights but norms and biases")
    parser.add_argument("--smoothing", type=float, default=0.1, help="of the labels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="written after every epoch")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of log.csv and curve.png")
    arguments = parser.parse_args(argv)
    arguments.size = arguments.size or (12 if arguments.data is None else 224)
    for name in ("size", "epochs", "batch"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(arguments, name)}")
    if arguments.limit is not None and arguments.limit < 2:
        parser.error(f"--limit must be at least 2, got {arguments.limit}")
    if arguments.memory == "low" and arguments.run != "fused":
        parser.error(f"--memory low is for fused blocks, got --{arguments.run}")
    if arguments.resume and arguments.checkpoint is None:
        parser.error("--resume needs --checkpoint FILE")
    if arguments.checkpoint is not None and arguments.checkpoint.exists() != arguments.resume:
        parser.error(
            f"{arguments.checkpoint} does not exist; leave --resume away to begin"
            if arguments.resume
            else f"{arguments.checkpoint} exists; add --resume to continue it, or remove it"
        )
    return arguments


# --- data ------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Examples are (float32 [channels, size, size], label)."""

    train: Dataset[Any]
    held_out: Subset[Any]
    classes: int
    channels: int


def digits(size: int) -> Data:
    """The 1797 handwritten digits of scikit-learn, 8x8, enlarged to size x size; raises ImportError without it."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"the digits need scikit-learn: `pip install resnet_fused[pictures]` ({error})") from error
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16  # values are 0 to 16
    x = F.interpolate((x - x.mean()) / x.std(), (size, size), mode="bilinear")
    examples = TensorDataset(x, torch.from_numpy(labels))
    train, held_out = _split(len(examples))
    return Data(Subset(examples, train), Subset(examples, held_out), classes=10, channels=1)


def pictures(folder: Path, size: int) -> Data:
    """folder/CLASS/*.jpg, ..., with ImageNet's augmentation; raises ImportError without torchvision."""
    torchvision = import_torchvision()
    if torchvision is None:
        raise ImportError(f"reading {folder} needs torchvision: `pip install torchvision`")
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    end = [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    augmented = ImageFolder(folder, T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), *end]))
    plain = ImageFolder(folder, T.Compose([T.Resize(size * 8 // 7), T.CenterCrop(size), *end]))
    train, held_out = _split(len(plain))
    return Data(Subset(augmented, train), Subset(plain, held_out), classes=len(plain.classes), channels=3)


def _split(count: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out, the same in every run."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held_out = max(1, round(HELD_OUT * count))
    return order[held_out:], order[:held_out]


# --- the model -------------------------------------------------------------------------------------------------------


def build(arguments: argparse.Namespace, data: Data) -> nn.Module:
    """A model of the family. Small inputs get CIFAR's stem: 3x3, stride 1, no pooling (arXiv:1512.03385, 4.2)."""
    factory = getattr(resnet_fused.models, arguments.model)
    model: nn.Module = factory(fused=False, num_classes=data.classes, zero_init_residual=True)
    width = model.conv1.out_channels
    if arguments.size <= SMALL:
        model.conv1, model.maxpool = nn.Conv2d(data.channels, width, 3, padding=1, bias=False), nn.Identity()
    elif data.channels != 3:
        model.conv1 = nn.Conv2d(data.channels, width, 7, stride=2, padding=3, bias=False)
    model = model.to(arguments.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if arguments.run == "fused":
        resnet_fused.explain(resnet_fused.fuse(model, memory=arguments.memory))
    return model


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """Everything that a checkpoint holds, and the data."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: DataLoader[Any]
    held_out: DataLoader[Any]
    settings: dict[str, Any]
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def begin(cls, model: nn.Module, data: Data, arguments: argparse.Namespace) -> Training:
        train = data.train
        if arguments.limit is not None:
            train = Subset(train, range(min(arguments.limit, len(train))))  # type: ignore[arg-type]
        # a last batch of one example has no statistics to normalise with
        loader = DataLoader(
            train,
            arguments.batch,
            shuffle=True,
            drop_last=len(train) % arguments.batch == 1,
            num_workers=arguments.workers,
        )  # type: ignore[arg-type]
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": arguments.weight_decay}, {"params": others}],
            arguments.lr,
            arguments.momentum,
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs * len(loader))
        settings = {k: str(v) for k, v in vars(arguments).items() if k not in FREE}
        held_out = DataLoader(data.held_out, arguments.batch, num_workers=arguments.workers)
        return cls(model, optimizer, scheduler, loader, held_out, settings)

    def save(self, file: Path) -> None:
        """Replaces the file at once, so that an interruption leaves the last whole checkpoint."""
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f"{file.suffix}.partial")
        torch.save(state, partial)
        partial.replace(file)

    def load(self, file: Path) -> None:
        """Continue where the checkpoint was saved; raises ValueError where it belongs to another run."""
        state = torch.load(file, map_location="cpu", weights_only=True)
        other = [
            f"--{name.replace('_', '-')} was {state['settings'].get(name)}, now {value}"
            for name, value in self.settings.items()
            if state["settings"].get(name) != value
        ]
        if other:
            raise ValueError(f"{file} is of another run: {'; '.join(other)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.history = state["epoch"], state["history"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])


def one_epoch(run: nn.Module, training: Training, arguments: argparse.Namespace) -> dict[str, float]:
    """Trains on every example once, then measures on the held-out ones. run: the model as it is called."""
    start = time.perf_counter()
    device, amp = torch.device(arguments.device), _autocast(arguments)
    run.train()
    loss_sum, seen = torch.zeros((), device=device), 0
    for x, labels in progress(training.loader, f"epoch {training.epoch + 1}"):
        with amp:
            loss = F.cross_entropy(run(_to(x, device)), labels.to(device), label_smoothing=arguments.smoothing)
        training.optimizer.zero_grad()
        torch.autograd.backward(loss)
        training.optimizer.step()
        training.scheduler.step()
        loss_sum += loss.detach().float() * len(labels)
        seen += len(labels)
    train_loss, seconds = loss_sum.item() / seen, time.perf_counter() - start
    held_out_loss, accuracy = evaluate(run, training.held_out, arguments)
    return {
        "train_loss": train_loss,
        "held_out_loss": held_out_loss,
        "accuracy": accuracy,
        "images_per_second": seen / seconds,
    }


@torch.no_grad()
def evaluate(run: nn.Module, loader: DataLoader[Any], arguments: argparse.Namespace) -> tuple[float, float]:
    """(mean cross entropy without smoothing, share of right answers)."""
    device, amp = torch.device(arguments.device), _autocast(arguments)
    run.eval()
    loss, right, seen = 0.0, 0, 0
    for x, labels in loader:
        with amp:
            logits = run(_to(x, device)).float()
        labels = labels.to(device)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
    return loss / seen, right / seen


def _to(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device, memory_format=torch.channels_last)


def _autocast(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    kind = torch.device(arguments.device).type
    return torch.autocast(kind, torch.bfloat16) if arguments.amp == "bfloat16" else contextlib.nullcontext()


# --- what is shown ---------------------------------------------------------------------------------------------------


def progress(batches: DataLoader[Any], what: str) -> Iterable[Any]:
    """The batches, with a bar on standard error where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return batches
    return track(batches, what, total=len(batches), console=Console(stderr=True), transient=True)


def report(history: list[dict[str, float]], out: Path) -> None:
    """Prints the last epoch; writes all of them to log.csv and, with matplotlib, to curve.png."""
    last = history[-1]
    print(
        f"epoch {last['epoch']:3.0f}   loss {last['train_loss']:.4f}   held-out loss {last['held_out_loss']:.4f}   "
        f"accuracy {last['accuracy']:.2%}   {last['images_per_second']:.0f} images/s",
        flush=True,
    )
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(last))
        writer.writeheader()
        writer.writerows(history)
    try:
        figure = new_figure(9, 3.5)
    except ImportError as error:
        if len(history) == 1:
            print(f"no {out / 'curve.png'}: {error}")
        return
    epochs = [int(row["epoch"]) for row in history]
    losses, accuracy = figure.subplots(1, 2)
    losses.plot(epochs, [row["train_loss"] for row in history], "o-", label="training, smoothed labels")
    losses.plot(epochs, [row["held_out_loss"] for row in history], "s-", label="held out")
    losses.set(xlabel="epoch", ylabel="cross entropy (nats)", ylim=(0, None))
    losses.legend()
    accuracy.plot(epochs, [100 * row["accuracy"] for row in history], "s-", color="C1")
    accuracy.set(xlabel="epoch", ylabel="accuracy, held out (%)")
    for axes in (losses, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    save(figure, out / "curve.png")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"train.py: {error}")
