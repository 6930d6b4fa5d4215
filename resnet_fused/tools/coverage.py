"""`coverage`: of the convolutions of many models that a batch norm follows, how many run fused, and why not the rest.

Models are built without values, on PyTorch's meta device, and called once there: what a batch norm reads tells which
convolution stands before it, whatever the model's class. So a model of a billion parameters takes about a second.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import frozen_norm, stages_of
from resnet_fused.modules.candidates import CONTAINERS, NORMS, candidates, original_class
from resnet_fused.modules.fuse import fuse, why_not
from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.modules.stem import FusedStem
from resnet_fused.tools import named_models
from resnet_fused.tools.comparison import Progress
from resnet_fused.tools.tables import table

SIZE = (3, 224, 224)  # of an input, where the model does not name its own
SHOWN = 3  # reasons in a row of the table


@dataclass(frozen=True)
class Covered:
    """One model. pairs: convolutions that a batch norm follows; fused: those that run fused with it; reasons: for the
    others, how many there are for each. error: why the model could not be built or called, and nothing is counted."""

    model: str
    pairs: int
    fused: int
    reasons: dict[str, int] = field(default_factory=dict)
    error: str | None = None

    @property
    def share(self) -> float:
        return self.fused / self.pairs if self.pairs else 1.0


class Coverage(list[Covered]):
    """One entry for each model; ``str()`` gives the table."""

    @property
    def pairs(self) -> int:
        return sum(each.pairs for each in self)

    @property
    def fused(self) -> int:
        return sum(each.fused for each in self)

    @property
    def reasons(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for each in self:
            total.update(each.reasons)
        return total

    @property
    def summary(self) -> str:
        counted = [each for each in self if each.error is None and each.pairs]
        share = self.fused / self.pairs if self.pairs else 1.0
        whole = sum(each.fused == each.pairs for each in counted)
        failed = sum(each.error is not None for each in self)
        text = (
            f"{self.fused} of {self.pairs} convolution + batch norm pairs run fused ({share:.1%}), "
            f"all of them in {whole} of {len(counted)} models"
        )
        return f"{text}; {failed} models could not be called" if failed else text

    def __str__(self) -> str:
        left = table("What is not fused", ("pairs", "reason"), [(str(n), why) for why, n in self.reasons.most_common()])
        tables = [table("Pairs of convolution and batch norm", _HEADER, [_row(each) for each in self])]
        return "\n\n".join([*tables, *([left] if self.reasons else []), self.summary])

    def to_json(self) -> str:
        """The totals, the reasons, and every model."""
        totals = {"pairs": self.pairs, "fused": self.fused, "summary": self.summary, "reasons": self.reasons}
        return json.dumps(totals | {"models": [asdict(each) for each in self]}, indent=1)

    def to_markdown(self, command: str, further: Coverage | None = None) -> str:
        """A page; command: what made it; further: families in a section of their own, which the totals leave out."""
        head = (
            "# Coverage",
            "Of the convolutions that a batch norm follows, how many `fuse` runs together with it. A model is built "
            "without values and called once; `explain(model)` gives the reason for each block.",
            f"    {command}",
        )
        rest = () if further is None else ("# Further families", *further._sections())
        return "\n\n".join([*head, *self._sections(), *rest]) + "\n"

    def _sections(self) -> list[str]:
        left = ["## What is not fused", _markdown(("pairs", "reason"), self.reasons_by_count())] if self.reasons else []
        return [f"**{self.summary}.**", *left, "## Models", _markdown(_HEADER, [_row(each) for each in self])]

    def reasons_by_count(self) -> list[tuple[str, str]]:
        return [(str(n), why) for why, n in self.reasons.most_common()]


def coverage(names: Iterable[str], progress: Progress | None = None) -> Coverage:
    """names: as `named_models.matching` gives them. A model that cannot be built or called is listed with its error."""
    found, names = Coverage(), list(names)
    for i, name in enumerate(names):
        if progress is not None:
            progress(name, i, len(names))
        try:
            found.append(_covered(name))
        except Exception as error:  # one model of hundreds, from a library of any version
            found.append(Covered(name, 0, 0, {}, f"{type(error).__name__}: {str(error).splitlines()[0]}"))
    return found


def _covered(name: str) -> Covered:
    with without_values():
        model = named_models.build_any(name)
    model = model.to("meta").eval()
    size = getattr(model, "pretrained_cfg", {}).get("input_size", SIZE)
    given = torch.empty(2, *size, device="meta")
    watched = getattr(model, "backbone", model) if _detects(model) else model
    followed = pairs(watched, given)
    fuse_quietly(watched)
    reasons = unfused(watched, followed)
    return Covered(name, len(followed), len(followed) - len(reasons), dict(Counter(reasons.values()).most_common()))


def _detects(model: nn.Module) -> bool:
    """A detection model takes a list of pictures and answers with boxes; its backbone is called by itself."""
    return hasattr(model, "backbone") and hasattr(model, "transform")


def fuse_quietly(model: nn.Module) -> nn.Module:
    """`fuse`, whose warning of what it leaves the table says better."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fuse(model)


def pairs(model: nn.Module, x: Tensor) -> list[str]:
    """The names of the convolutions whose very output a batch norm reads when the model runs on x."""
    made: dict[int, tuple[str, Tensor]] = {}  # by the output's identity; it is kept, so that none is reused
    found: dict[str, None] = {}
    handles = []

    def note(name: str, out: Tensor) -> None:
        made[id(out)] = name, out

    def follow(given: Tensor) -> None:
        if id(given) in made:
            found[made[id(given)][0]] = None

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(lambda _, given, out, name=name: note(name, out)))
        elif isinstance(module, NORMS) or frozen_norm(type(module)) is not None:
            handles.append(module.register_forward_pre_hook(lambda _, given: follow(given[0])))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return list(found)


def unfused(model: nn.Module, convs: Iterable[str]) -> dict[str, str]:
    """Of these convolutions of a fused model those that do not run fused, each with the reason of its block."""
    fused: set[int] = set()
    for module in model.modules():
        if isinstance(module, FusedModule):
            with contextlib.suppress(NotFusable):
                module.fused_describe()
                fused |= {id(stage.conv) for stage in stages_of(module.fused_modules())}
    blocks = [(name, module) for name, module, _ in candidates(model)]
    return {name: _reason(model, name, blocks) for name in convs if id(model.get_submodule(name)) not in fused}


def _reason(model: nn.Module, conv: str, blocks: Sequence[tuple[str, nn.Module]]) -> str:
    """Of the innermost block around the convolution."""
    alone = f"{_caller(model, conv)}: its forward calls them, and it is no block that fuse knows"
    around = [(len(name), block) for name, block in blocks if not name or conv.startswith(f"{name}.")]
    if not around:
        return alone
    block = max(around, key=lambda pair: pair[0])[1]
    if isinstance(block, FusedModule):
        try:
            block.fused_describe()
        except NotFusable as reason:
            return f"{block._fused_from.__name__}: {reason}"
        return (
            alone
            if isinstance(block, FusedStem)
            else f"{block._fused_from.__name__}: PyTorch's own between its fused calls"
        )
    return f"{type(block).__name__}: {why_not(block) or 'not fused'}"


def _caller(model: nn.Module, name: str) -> str:
    """The class of the nearest module around it that is no plain container."""
    while name:
        name = name.rpartition(".")[0]
        cls = original_class(model.get_submodule(name))
        if cls not in CONTAINERS:
            break
    return cls.__name__


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Modules made inside have parameters on the meta device, so that neither memory nor initialisation costs anything.

    Other tensors stay where they are made: some models compute their widths with tensors.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def matching(patterns: Sequence[str]) -> list[str]:
    """The models whose names match, as ``timm:resnet*``; raises ValueError where none do."""
    found: dict[str, None] = {}
    for pattern in patterns:
        names = [name for name in named_models.known(pattern) if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(
                f"no model matches {pattern!r}; accepted: timm:PATTERN, torchvision:PATTERN, as timm:resnet*"
            )
        found |= dict.fromkeys(names)
    return list(found)


_HEADER = ("model", "pairs", "fused", "share", "what is not")


def _row(each: Covered) -> tuple[str, ...]:
    if each.error is not None:
        return each.model, "", "", "", each.error
    shown = [f"{why} ({n})" for why, n in list(each.reasons.items())[:SHOWN]]
    if len(each.reasons) > SHOWN:
        shown.append("and more")
    share = f"{each.share:.0%}" if each.pairs else ""
    return each.model, str(each.pairs), str(each.fused), share, "; ".join(shown) if each.pairs else "no such pair"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
