"""The command line, ``resnet-fused`` or ``python -m resnet_fused``: verify, bench, info, explain, cost and others."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

import resnet_fused
from resnet_fused.analysis import command as analyze
from resnet_fused.backends import dispatch
from resnet_fused.errors import BackendError
from resnet_fused.modules.fuse import MatchBy
from resnet_fused.tools import completion, coverage, named_models
from resnet_fused.tools.bench import command
from resnet_fused.tools.comparison import Progress
from resnet_fused.tools.info import about, info
from resnet_fused.tools.terminal import add_json, json_on_standard_output, say
from resnet_fused.tools.verification import CLAIM, SEEDS, verify
from resnet_fused.triton_kernels.host.chips import CHIPS  # loads no Triton

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
WRONG, USAGE = 1, 2
INTERRUPTED, PIPE_CLOSED = 130, 141  # as a shell reports the signals
STATUS = (
    "exit status: 0; 1 if something computed is wrong, or less is fused than asked; 2 for arguments that cannot be "
    "used, or a part that is missing. Colours appear on a terminal only, with rich installed and NO_COLOR unset."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 if something computed is wrong, 2 for a usage error."""
    arguments = _parser().parse_args(argv)
    try:
        for option in ("json", "html", "markdown"):
            _require_writable(option, getattr(arguments, option, None))
        with json_on_standard_output(getattr(arguments, "json", None)):
            status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read has seen enough: `resnet-fused info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return PIPE_CLOSED
    except (ValueError, ImportError, OSError, BackendError) as error:
        print(f"resnet-fused {arguments.command}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(f"\nresnet-fused {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _require_writable(option: str, file: object) -> None:
    """Raises OSError at once, and not after minutes of work; leaves no file behind."""
    if not isinstance(file, Path):
        return
    existed = file.exists()
    try:
        file.open("a").close()
    except OSError as error:
        raise OSError(
            f"--{option} {file} cannot be written ({error.strerror}); give a file in a folder that exists"
        ) from error
    if not existed:
        file.unlink()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="resnet-fused", description="Fused residual blocks for PyTorch.", epilog=STATUS
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {resnet_fused.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    check = commands.add_parser(
        "verify",
        help="compare a fused model with PyTorch and with float64",
        description="Compare a model's fused blocks with PyTorch's own, both against float64: outputs, gradients and "
        f"running statistics. Exit status 1 if errors are larger than PyTorch's own (by {CLAIM.mean:g} on average, "
        f"by {CLAIM.limit:g} where no ReLU can flip; README, The claim), or fewer blocks run fused than asked.",
    )
    named_models.add_option(check)
    check.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="the 16-bit ones are autocast's (default: %(default)s)"
    )
    check.add_argument("--train", action="store_true", help="training mode (default: evaluation)")
    check.add_argument(
        "--layout", choices=LAYOUTS, default="contiguous", help="of model and pictures (default: %(default)s)"
    )
    check.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    check.add_argument("--backend", choices=dispatch.NAMES, default="auto", help="of the fused model (default: auto)")
    check.add_argument(
        "--memory", choices=("default", "low"), default="default", help="low: recompute in backward (default: default)"
    )
    _add_match(check)
    check.add_argument("--images", type=Path, metavar="DIR", help="your pictures (default: scikit-learn's samples)")
    check.add_argument("--size", type=int, default=224, help="of the square pictures (default: %(default)s)")
    check.add_argument("--batch", type=int, default=4, help="pictures at once (default: %(default)s)")
    check.add_argument("--seeds", type=int, default=SEEDS, help="different crops, and gradients (default: %(default)s)")
    check.add_argument("--min-fused", type=float, default=0.0, metavar="SHARE", help="of blocks, 0 to 1 (default: any)")
    add_json(check, "every comparison")
    check.set_defaults(run=_verify)

    command.configure(commands.add_parser("bench", **command.HELP))
    analyze.configure(commands.add_parser("analyze", **analyze.HELP))

    here = commands.add_parser(
        "info",
        help="how the extension was built, and which backends can run",
        description="Show versions, processor and threads, how the C++ extension was built, and for each backend "
        "whether it can run here, or why not.",
    )
    add_json(here, "all of it")
    here.set_defaults(run=_info)

    why = commands.add_parser(
        "explain",
        help="which backend runs each block of a model, and why not another",
        description="Fuse a model, and show for each of its residual blocks the backend that runs it, and why not "
        "another one, or why it is not fused.",
    )
    named_models.add_option(why)
    _add_match(why)
    add_json(why, "every row")
    why.set_defaults(run=_explain)

    covered = commands.add_parser(
        "coverage",
        help="how many convolutions with a batch norm run fused in many models, and why not the rest",
        description="Build each model without values, and count the convolutions that a batch norm follows: how many "
        "run fused with it, and the reasons for the others. Exit status 1 if the share is smaller than asked.",
    )
    covered.add_argument("models", nargs="+", metavar="PATTERN", help="as timm:resnet* or torchvision:*resnet*")
    covered.add_argument("--min-share", type=float, default=0.0, metavar="SHARE", help="of all pairs (default: any)")
    add_json(covered, "every count")
    covered.add_argument("--markdown", type=Path, metavar="FILE", help="write a page there")
    covered.add_argument(
        "--further",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="more families, in tables of their own: the share, --json and exit status leave them out (default: none)",
    )
    covered.set_defaults(run=_coverage)

    cost = commands.add_parser(
        "cost",
        help="predict by counting what fusing ResNet-50's blocks gains on a GPU",
        description="Count the products and bytes of ResNet-50's blocks, fused (with Triton) and in eager PyTorch, and "
        "compare the least times they take at a chip's data-sheet rates. A prediction; needs no GPU and times nothing.",
    )
    chips = ("a100", "h100", "h200")
    names = f"of {', '.join(CHIPS)} (default: {' '.join(chips)})"
    cost.add_argument("--chip", nargs="+", choices=CHIPS, default=chips, metavar="CHIP", help=names)
    cost.add_argument("--batch", type=int, default=256, help="pictures at once (default: %(default)s)")
    cost.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of all tensors (default: %(default)s)")
    cost.add_argument("--per-phase", action="store_true", help="list every fused phase and every operation of eager")
    add_json(cost, "every count")
    cost.set_defaults(run=_cost)

    build = commands.add_parser(
        "compile",
        help="compile the Triton kernels for chips that are not here, and list what they need",
        description="Compile every kernel that ResNet-50's blocks take, ahead of time and without a GPU: registers, "
        "spills, shared memory, tensor-core instructions. Exit status 1 if one spills, does not fit its chip, or "
        "multiplies without tensor cores.",
    )
    archs = ["sm_80", "sm_90", "sm_100"]
    build.add_argument("--arch", nargs="+", default=archs, metavar="ARCH", help=f"default: {' '.join(archs)}")
    build.add_argument(
        "--launch",
        nargs="+",
        choices=("single", "phased"),
        default=["single", "phased"],
        help="all phases in one kernel, or a kernel for each (default: both)",
    )
    build.add_argument("--batch", type=int, default=256, help="pictures at once (default: %(default)s)")
    build.add_argument(
        "--dtype", choices=(*DTYPES, "tf32"), default="bfloat16", help="tf32: float32 by TF32 (default: %(default)s)"
    )
    build.add_argument("--block", nargs="+", metavar="BLOCK", help="e.g. layer1.1 (default: all)")
    add_json(build, "every kernel's figures")
    build.set_defaults(run=_compile)

    tune = commands.add_parser(
        "tune",
        help="measure on this GPU how each block runs fastest, for backend 'auto' to follow",
        description="Time a model's blocks in every way the native and the Triton kernels can run them, against "
        "PyTorch, and keep the result for this device.",
    )
    named_models.add_option(tune)
    tune.add_argument("--batch", type=int, default=32, help="pictures at once (default: %(default)s)")
    tune.add_argument("--size", type=int, default=224, help="of the square pictures (default: %(default)s)")
    tune.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of model and input (default: %(default)s)")
    tune.add_argument("--train", action="store_true", help="training mode (default: evaluation)")
    tune.add_argument("--tiles", action="store_true", help="also search tile sizes of Triton's, which takes minutes")
    add_json(tune, "every row")
    tune.set_defaults(run=_tune)

    complete = commands.add_parser(
        "completion",
        help="print a script with which bash or zsh complete this command line",
        description=completion.ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    complete.add_argument("shell", choices=completion.SHELLS, help="%(choices)s", metavar="SHELL")
    complete.set_defaults(run=_completion)
    return parser


def _add_match(parser: argparse.ArgumentParser) -> None:
    by = "known classes, or also what other blocks compute, traced and proven (default: %(default)s)"
    parser.add_argument("--match", choices=get_args(MatchBy), default="class", help=by)


def _verify(arguments: argparse.Namespace) -> int:
    from resnet_fused.tools.pictures import photographs

    def pictures(seed: int) -> Tensor:
        x = photographs(arguments.batch, arguments.size, arguments.images, seed)
        return x.to(device).contiguous(memory_format=layout)

    device, layout = _device(arguments.device), LAYOUTS[arguments.layout]
    torch.manual_seed(0)
    model = named_models.build(arguments.model).to(device, memory_format=layout)  # type: ignore[call-overload]
    named_models.settle_norms(model, pictures(0))
    with _progress() as progress:
        report = verify(
            model,
            pictures,
            dtype=DTYPES[arguments.dtype],
            train=arguments.train,
            backend=arguments.backend,
            memory=arguments.memory,
            match=arguments.match,
            seeds=arguments.seeds,
            min_fused=arguments.min_fused,
            progress=progress,
        )
    say(report.table())
    if arguments.json is not None:
        arguments.json.write_text(report.to_json() + "\n")
    return 0 if report.ok else WRONG


def _info(arguments: argparse.Namespace) -> int:
    say(info())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(about(), indent=1) + "\n")
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    model = resnet_fused.fuse(named_models.build(arguments.model), match=arguments.match)
    explanation = resnet_fused.explain(model)
    if arguments.json is not None:
        arguments.json.write_text(explanation.to_json() + "\n")
    return 0


def _coverage(arguments: argparse.Namespace) -> int:
    names, beside = coverage.matching(arguments.models), coverage.matching(arguments.further)
    with _progress() as progress:
        found = coverage.coverage(names, progress)
        further = coverage.coverage(beside, progress) if beside else None
    say(str(found))
    if further is not None:
        say(f"\n{further}")
    if arguments.json is not None:
        arguments.json.write_text(found.to_json() + "\n")
    if arguments.markdown is not None:
        asked = [*arguments.models, *(["--further", *arguments.further] if arguments.further else [])]
        arguments.markdown.write_text(found.to_markdown(shlex.join(["resnet-fused", "coverage", *asked]), further))
    return 0 if found.fused >= arguments.min_share * found.pairs else WRONG


def _cost(arguments: argparse.Namespace) -> int:
    _require_triton()
    from resnet_fused.triton_kernels.offline import cost_model

    dtype = DTYPES[arguments.dtype] or torch.float32
    predictions = [cost_model.predict(CHIPS[name], arguments.batch, dtype) for name in arguments.chip]
    say("\n\n".join([*(each.table(arguments.per_phase) for each in predictions), cost_model.NOTE]))
    if arguments.json is not None:
        report = {"note": cost_model.NOTE, "predictions": [each.to_dict() for each in predictions]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _compile(arguments: argparse.Namespace) -> int:
    _require_triton()
    from resnet_fused.triton_kernels import interpreted
    from resnet_fused.triton_kernels.offline import ahead_of_time

    if interpreted():
        raise ValueError("TRITON_INTERPRET is set, and an interpreted kernel cannot be compiled: unset it")
    archs = [ahead_of_time.arch_number(name) for name in arguments.arch]
    dtype = torch.float32 if arguments.dtype == "tf32" else DTYPES[arguments.dtype] or torch.float32
    precision = {"tf32": "tf32", "float32": "ieee"}.get(arguments.dtype)
    work = ahead_of_time.jobs(archs, arguments.launch, arguments.batch, dtype, precision, arguments.block)
    results = list(ahead_of_time.compile_all(work))
    text, good = ahead_of_time.report(results)
    say(text)
    if arguments.json is not None:
        rows = [{"job": str(job), "fault": ahead_of_time.fault(job, b), **asdict(b)} for job, b in results]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if good else WRONG


def _tune(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise BackendError("there is nothing to tune: torch sees no GPU, and only on one is there a choice")
    dtype = DTYPES[arguments.dtype] or torch.float32
    model = named_models.build(arguments.model).to("cuda", dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    found = resnet_fused.tune(resnet_fused.fuse(model).train(arguments.train), x, tiles=arguments.tiles)
    say(str(found))
    if arguments.json is not None:
        arguments.json.write_text(found.to_json() + "\n")
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    print(completion.script(_parser(), arguments.shell))
    return 0


def _device(name: str) -> torch.device:
    """Raises ValueError for a device that torch does not know or have."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ValueError(
            f"--device {name!r} cannot be used: {str(error).splitlines()[0]}; accepted: cpu, cuda"
        ) from error


def _require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise ImportError("this command needs Triton: pip install resnet_fused[triton]")


@contextlib.contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar on standard error while the work runs; without rich, nothing."""
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ImportError:
        yield None
        return
    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
