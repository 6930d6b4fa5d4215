"""Do gradients reach the first blocks? Their norm by depth, residual beside plain.

Along a chain x_{l+1} = x_l + g_l(x_l) the gradient is dL/dx_0 = dL/dx_L prod(I + J_l), which has the term I at any
depth; a plain chain has prod(J_l) (He et al., arXiv:1603.05027, eq. 5). With every branch a x they are (1 + a)^L, a^L.

The fused operators run here, forward and backward, unless a block falls back: nothing needs a second derivative.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.analysis import panels
from resnet_fused.analysis.blocks import blocks, without_skips
from resnet_fused.analysis.chains import scalar_chain
from resnet_fused.errors import NotFusable
from resnet_fused.spec import Skip
from resnet_fused.tools.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHAINS = ((0.9, 20), (0.9, 100), (0.5, 20))  # (a, L) of the table


@dataclass(frozen=True)
class GradientsByDepth:
    """|dL/dx_l|_2 over the whole batch, x_l the output of block l; before the first step and after the last.

    plain_*: the same network without its skip paths, each trained on its own; None where they cannot be taken out, and
    `plain_missing` says why.
    """

    blocks: tuple[str, ...]
    steps: int
    batch: int
    residual_start: tuple[float, ...]
    residual_end: tuple[float, ...]
    plain_start: tuple[float, ...] | None
    plain_end: tuple[float, ...] | None
    plain_missing: str | None = None

    @property
    def first_over_last(self) -> dict[str, float]:
        """The gradient at the first block's output over that at the last one's."""
        curves = {name: getattr(self, name) for name in _CURVES}
        return {name: curve[0] / curve[-1] for name, curve in curves.items() if curve is not None}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"first_over_last": self.first_over_last}

    def table(self) -> str:
        curves = [curve for name in _CURVES if (curve := getattr(self, name)) is not None]
        header = ["block", *(_CURVES[name].format(self.steps) for name in _CURVES if getattr(self, name) is not None)]
        rows = [[name, *(f"{curve[i]:.3g}" for curve in curves)] for i, name in enumerate(self.blocks)]
        rows.append(["first over last", *(f"{ratio:.3g}" for ratio in self.first_over_last.values())])
        told = table(f"Gradient norm at each block's output, batch {self.batch}", header, rows)
        return told if self.plain_missing is None else f"{told}\nno plain network beside it: {self.plain_missing}"


_CURVES = {
    "residual_start": "residual, at the start",
    "residual_end": "residual, after {} steps",
    "plain_start": "plain, at the start",
    "plain_end": "plain, after {} steps",
}


@dataclass(frozen=True)
class ChainGradient:
    """dx_L/dx_0 of a chain of L fused blocks whose branch is a x, by autograd through the operators; float64."""

    a: float
    depth: int
    plain: float
    residual: float

    @property
    def residual_over_plain(self) -> float:
        return self.residual / self.plain


@dataclass(frozen=True)
class ChainGradients:
    rows: tuple[ChainGradient, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"chains": [asdict(row) | {"residual_over_plain": row.residual_over_plain} for row in self.rows]}

    def table(self) -> str:
        rows = [
            [f"{r.a:g}", str(r.depth), f"{r.plain:.4g}", f"{r.residual:.4g}", f"{r.residual_over_plain:.4g}"]
            for r in self.rows
        ]
        header = ("a", "blocks", "plain", "residual", "residual / plain")
        return table("Gradient through a chain of fused blocks whose branch is a x, float64", header, rows)


def gradients_by_depth(
    model: nn.Module, x: Tensor, labels: Tensor, steps: int = 10, lr: float = 0.01
) -> GradientsByDepth:
    """Gradient norms of the mean cross entropy at each block's output, of the model and its plain copy, training.

    model:  logits [N, classes] from x; left as it is, copies are trained by plain SGD with the learning rate `lr`.
    x:      [N, C, H, W]; labels: [N] int64.

    Raises ValueError for a model without blocks, another output than [N, classes], or steps < 0.
    """
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    residual = _train(copy.deepcopy(model), x, labels, steps, lr)
    names = tuple(blocks(model))
    try:
        plain = _train(without_skips(model), x, labels, steps, lr, names)
    except NotFusable as reason:
        return GradientsByDepth(names, steps, len(x), *residual, None, None, str(reason))
    return GradientsByDepth(names, steps, len(x), *residual, *plain)


def chain_gradient(a: float, depth: int, skip: Skip, dtype: torch.dtype = torch.float64) -> float:
    """dx_L/dx_0 of `chains.scalar_chain`, measured by autograd through the fused operators."""
    x = torch.ones(1, 1, 1, 1, dtype=dtype, requires_grad=True)
    torch.autograd.backward(scalar_chain(a, depth, skip, dtype)(x))
    assert x.grad is not None
    return x.grad.item()


def chain_gradients(chains: Sequence[tuple[float, int]] = CHAINS) -> ChainGradients:
    """Plain and residual chains for each (a, depth)."""
    return ChainGradients(
        tuple(ChainGradient(a, n, chain_gradient(a, n, "none"), chain_gradient(a, n, "identity")) for a, n in chains)
    )


def figure(found: GradientsByDepth, chains: ChainGradients, title: str = "") -> Figure:
    """Left the network's gradient norms by block, right those of the scalar chains by their depth."""
    drawn, (left, right) = panels.side_by_side(2, 5.6, 4.2, title)
    colours = {"residual": panels.RESIDUAL, "plain": panels.PLAIN}
    for name, label in _CURVES.items():
        curve = getattr(found, name)
        if curve is None:
            continue
        colour, end = colours[name.split("_")[0]], name.endswith("end")
        line = "o--" if end else "o-"
        left.plot(range(len(curve)), curve, line, markersize=3, color=colour, label=label.format(found.steps))
    left.set_yscale("log")
    panels.thin_labels(left, found.blocks)
    left.set(xlabel="block, from the input to the output", ylabel="norm of the loss's gradient at its output")
    left.legend(fontsize=8)

    depths = (1, 2, 5, 10, 20, 40, 60, 80, 100)
    bases = sorted({row.a for row in chains.rows})
    for a, style in zip(bases, itertools.cycle(("-", "--", ":")), strict=False):
        for kind, skip in (("residual", "identity"), ("plain", "none")):
            values = [abs(chain_gradient(a, depth, skip)) for depth in depths]  # type: ignore[arg-type]
            right.plot(depths, values, style, color=colours[kind], label=f"{kind}, a = {a:g}", marker="o", markersize=3)
    right.set_yscale("log")
    right.set(xlabel="blocks L", ylabel="gradient of the output to the input")
    right.set_title("chain of fused blocks, branch a x", fontsize=10)
    right.legend(fontsize=8)
    return drawn


def _train(
    model: nn.Module, x: Tensor, labels: Tensor, steps: int, lr: float, names: Sequence[str] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Gradient norms at the named modules' outputs before the first step and after the last."""
    watched = {name: model.get_submodule(name) for name in names or blocks(model)}
    norms: dict[str, float] = {}
    handles = [module.register_forward_hook(_watch(norms, name)) for name, module in watched.items()]
    optimizer = torch.optim.SGD(model.train().parameters(), lr=lr)
    try:
        for step in range(steps + 1):
            optimizer.zero_grad()
            logits = model(x)
            if logits.ndim != 2 or len(logits) != len(labels):
                raise ValueError(
                    f"the model's output has shape {list(logits.shape)}; accepted: logits [{len(labels)}, classes]"
                )
            torch.autograd.backward(F.cross_entropy(logits, labels))
            if step == 0:
                start = tuple(norms[name] for name in watched)
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    return start, tuple(norms[name] for name in watched)


def _watch(norms: dict[str, float], name: str) -> Any:
    """A forward hook that keeps the norm of its output's gradient when backward reaches it."""

    def keep(gradient: Tensor) -> None:
        norms[name] = float(gradient.double().norm())

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(keep)

    return hook
