"""``resnet-fused analyze SUBJECT``: arguments, the model, what is printed, drawn and written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from resnet_fused.analysis import degree, gradients, jacobian, kinks, receptive_field
from resnet_fused.analysis.blocks import blocks, named, open_branches, settle_statistics, without_skips
from resnet_fused.analysis.geometry import figure as geometry_figure
from resnet_fused.analysis.geometry import geometry
from resnet_fused.errors import NotFusable
from resnet_fused.modules.fuse import fuse
from resnet_fused.tools import named_models
from resnet_fused.tools.figures import new_figure, save
from resnet_fused.tools.terminal import add_json, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTLING = 8  # random inputs whose statistics the batch norms get
HELP: dict[str, Any] = {
    "help": "study a residual network: gradients, Jacobian, kinks, degree, receptive field, geometry",
    "description": "Measure what skip paths do to a network, with random weights and inputs, beside the same network "
    "without them. Every subject prints tables; --plots draws them, --json writes the numbers.",
}


class Result(NamedTuple):
    """What one subject found: parts with ``table()`` and ``to_dict()``, and how to draw them."""

    parts: dict[str, Any]
    draw: Callable[[], Figure]


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subjects, each with its arguments and `run`."""
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="subject")

    one = _subject(subjects, "gradients", _gradients, "gradient norm by depth, before and after some training")
    _add_model(one, "resnet50", size=64)
    one.add_argument("--batch", type=int, default=4, help="random inputs at once (default: %(default)s)")
    one.add_argument("--steps", type=int, default=5, help="of SGD (default: %(default)s)")

    one = _subject(subjects, "jacobian", _jacobian, "singular values and condition number, with and without the skip")
    _add_model(one, "resnet18", size=32)
    one.add_argument("--block", metavar="NAME", help="e.g. layer3.1 (default: the last with an identity skip)")
    one.add_argument("--whole", action="store_true", help="also the whole network's Jacobian, beside the plain one's")

    one = _subject(subjects, "kinks", _kinks, "activation kinks between two inputs, of networks and of single paths")
    _add_model(one, "resnet18", size=32)
    one.add_argument("--resolution", type=int, default=128, help="steps along the segment (default: %(default)s)")
    one.add_argument(
        "--depths",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        metavar="L",
        help="of the chains (default: 1 2 4 8 16)",
    )

    one = _subject(subjects, "degree", _degree, "degree and coefficients of polynomial networks (no --model)")
    one.add_argument("--power", type=int, nargs="+", default=[2, 3], metavar="M", help="activations x^M (default: 2 3)")
    one.add_argument("--depth", type=int, default=3, help="largest number of blocks (default: %(default)s)")

    one = _subject(subjects, "receptive-field", _receptive_field, "effective receptive field, with and without skips")
    _add_model(one, "resnet18", size=224)
    one.add_argument("--layer", metavar="NAME", help="whose middle unit (default: the last block that fits)")
    one.add_argument("--inputs", type=int, default=8, help="random ones, averaged over (default: %(default)s)")

    one = _subject(subjects, "geometry", _geometry, "stride, receptive field and alignment of every layer")
    _add_model(one, "resnet50", size=224)


def _subject(
    subjects: Any, name: str, measure: Callable[[argparse.Namespace], Result], about: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subjects.add_parser(name, help=about, description=f"Measure: {about}.")
    parser.add_argument("--plots", type=Path, metavar="DIR", help=f"draw {name}.png there")
    add_json(parser, "every number")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: %(default)s)")
    parser.set_defaults(run=lambda arguments: _run(arguments, name, measure))
    return parser


def _add_model(parser: argparse.ArgumentParser, default: str, size: int) -> None:
    named_models.add_option(parser, default)
    parser.add_argument("--size", type=int, default=size, help="of the square pictures (default: %(default)s)")
    parser.add_argument("--unfused", action="store_true", help="leave the model's blocks as plain PyTorch")


def _run(arguments: argparse.Namespace, name: str, measure: Callable[[argparse.Namespace], Result]) -> int:
    """Returns the exit status. Raises ValueError for arguments that cannot be used."""
    if arguments.plots is not None:
        new_figure(1, 1)  # says at once, and not after the work, that matplotlib is missing
        arguments.plots.mkdir(parents=True, exist_ok=True)
    if getattr(arguments, "size", 1) < 1 or getattr(arguments, "batch", 1) < 1:
        raise ValueError(f"got --size {arguments.size}, --batch {getattr(arguments, 'batch', 1)}; accepted: 1 or more")
    torch.manual_seed(arguments.seed)
    try:
        found = measure(arguments)
    except NotFusable as error:
        raise ValueError(str(error)) from error
    say("\n\n".join(part.table() for part in found.parts.values()))
    if arguments.json is not None:
        setting = {key: value for key, value in vars(arguments).items() if key not in ("run", "json", "plots")}
        record = {"setting": setting} | {key: part.to_dict() for key, part in found.parts.items()}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plots is not None:
        file = arguments.plots / f"{name}.png"
        save(found.draw(), file)
        print(f"\ndrawn: {file}")
    return 0


def _model(arguments: argparse.Namespace) -> nn.Module:
    """Freshly made, its branches open, fused unless told otherwise."""
    model = named_models.build(arguments.model)
    if opened := open_branches(model):
        print(f"{opened} blocks of {arguments.model} start as the identity: their last norm's weight, 0, is set to 1\n")
    return model if arguments.unfused else fuse(model)


def _settled(arguments: argparse.Namespace) -> nn.Module:
    """In evaluation mode, with the statistics of random inputs."""
    model = _model(arguments)
    settle_statistics(model, torch.randn(SETTLING, 3, arguments.size, arguments.size))
    return model.eval()


def _plain(arguments: argparse.Namespace, model: nn.Module) -> nn.Module:
    """The model without skip paths, its statistics settled on the same kind of inputs."""
    plain = without_skips(model)
    settle_statistics(plain, torch.randn(SETTLING, 3, arguments.size, arguments.size))
    return plain.eval()


def _gradients(arguments: argparse.Namespace) -> Result:
    model = _model(arguments)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    labels = torch.randint(10, (arguments.batch,))
    found = gradients.gradients_by_depth(model, x, labels, arguments.steps)
    chains = gradients.chain_gradients()
    return Result({"network": found, "chains": chains}, lambda: gradients.figure(found, chains, arguments.model))


def _jacobian(arguments: argparse.Namespace) -> Result:
    model = _settled(arguments).double()
    known = blocks(model)
    block = arguments.block
    if block is None:
        block = next((name for name in reversed(known) if _has_identity_skip(known[name])), list(known)[-1])
    named(block, known, "block")
    x = torch.randn(1, 3, arguments.size, arguments.size, dtype=torch.float64)
    spectra = jacobian.block_spectra(known[block], jacobian.input_of(model, known[block], x), title=f"block {block}")
    parts = {"block": spectra}
    if arguments.whole:
        networks = {"residual": model, "plain": _plain(arguments, model.float()).double()}
        model.double()
        parts["network"] = jacobian.model_spectra(networks, x, title=f"{arguments.model}, logits to input")
    return Result(parts, lambda: jacobian.figure(list(parts.values()), arguments.model))


def _has_identity_skip(block: nn.Module) -> bool:
    return any(name.endswith("I + J") for name in jacobian.block_maps(block))


def _kinks(arguments: argparse.Namespace) -> Result:
    chains = kinks.kinks_by_depth(arguments.depths, seed=arguments.seed)
    model = _settled(arguments)
    start, end = torch.randn(2, 1, 3, arguments.size, arguments.size)
    networks = {"residual": model, "plain": _plain(arguments, model)}
    rows = [kinks.model_kinks(each, start, end, arguments.resolution, name) for name, each in networks.items()]
    models = kinks.ModelsKinks(arguments.model, tuple(rows))
    return Result({"chains": chains, "models": models}, lambda: kinks.figure(chains, models))


def _degree(arguments: argparse.Namespace) -> Result:
    found = degree.degrees([(power, depth) for power in arguments.power for depth in range(1, arguments.depth + 1)])
    return Result({"networks": found}, lambda: degree.figure(found))


def _receptive_field(arguments: argparse.Namespace) -> Result:
    chains = receptive_field.chain_fields()
    model = _model(arguments)
    settle_statistics(model, torch.randn(receptive_field.AT_ONCE, 3, arguments.size, arguments.size))
    found = receptive_field.effective_fields(
        model.eval(), arguments.layer, arguments.size, arguments.inputs, arguments.seed, arguments.model
    )
    return Result({"network": found, "chains": chains}, lambda: receptive_field.figure(found))


def _geometry(arguments: argparse.Namespace) -> Result:
    model = named_models.build(arguments.model)
    found = geometry(model if arguments.unfused else fuse(model), arguments.size)
    return Result({"geometry": found}, lambda: geometry_figure(found, arguments.model))
