"""Singular values and condition number of a block's or a network's Jacobian, with and without the skip path.

A branch g has the Jacobian J, the block x + g(x) has I + J: where J is small, its singular values gather around 1
instead of 0. An activation behind the addition multiplies rows by its derivative, D (I + J), which is 0 in every unit
that ReLU switches off, so that such a block has singular values of 0 however good I + J is.

Derivatives are torch.func's (jvp, vjp), within which fused blocks run their plain PyTorch formula: the fused operators
have no forward-mode derivative. Batch norms normalise with their running statistics, so that units of one input do not
depend on others by way of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, jvp, vjp

from resnet_fused import functional
from resnet_fused.analysis import panels
from resnet_fused.analysis.blocks import branch_modules
from resnet_fused.modules.block_modules import describe
from resnet_fused.spec.activations import IDENTITY
from resnet_fused.tools.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Map = Callable[[Tensor], Tensor]
DENSE = 2**22  # entries of a Jacobian that is written out: 32 MiB in float64
CHUNK = 64  # derivatives taken at once


@dataclass(frozen=True)
class Spectrum:
    """Singular values of the Jacobian [outputs, inputs] of one map at one input, in falling order.

    values:    all min(outputs, inputs) of them where `dense`, else the largest found by Lanczos' method.
    condition: largest over smallest; None where it is not known (not dense) or the smallest is 0 up to rounding.
    condition_on_range: largest over the smallest that is not 0; None where not dense.
    """

    name: str
    inputs: int
    outputs: int
    dense: bool
    values: tuple[float, ...]

    @property
    def zeros(self) -> int | None:
        """Singular values that are 0 up to rounding (eps times the larger side times the largest); None: not dense."""
        return sum(value <= self._rounding for value in self.values) if self.dense else None

    @property
    def condition(self) -> float | None:
        if not self.dense or self.zeros:
            return None
        return self.values[0] / self.values[-1]

    @property
    def condition_on_range(self) -> float | None:
        held = [value for value in self.values if value > self._rounding]
        return held[0] / held[-1] if self.dense and held else None

    @property
    def _rounding(self) -> float:
        return self.values[0] * max(self.inputs, self.outputs) * torch.finfo(torch.float64).eps

    def to_dict(self) -> dict[str, Any]:
        known = ("zeros", "condition", "condition_on_range")
        return asdict(self) | {name: getattr(self, name) for name in known}


@dataclass(frozen=True)
class Spectra:
    """What is compared: maps of one block, or networks."""

    title: str
    rows: tuple[Spectrum, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"title": self.title, "spectra": [row.to_dict() for row in self.rows]}

    def table(self) -> str:
        header = ("map", "Jacobian", "by", "largest", "middle", "smallest", "zeros", "condition", "without the zeros")
        return table(f"Singular values of the Jacobian: {self.title}", header, [_row(row) for row in self.rows])


def _row(row: Spectrum) -> list[str]:
    middle = f"{row.values[len(row.values) // 2]:.4g}" if row.dense else ""
    if not row.dense:
        condition = f"over {row.values[0] / row.values[-1]:.4g}, by the {len(row.values)} largest"
    else:
        condition = f"{row.condition:.4g}" if row.condition else "infinite"
    held = row.condition_on_range
    return [
        row.name,
        f"{row.outputs} x {row.inputs}",
        "dense" if row.dense else "Lanczos",
        f"{row.values[0]:.4g}",
        middle,
        f"{row.values[-1]:.4g}" if row.dense else "",
        "" if row.zeros is None else str(row.zeros),
        condition,
        "" if held is None else f"{held:.4g}",
    ]


def spectrum(f: Map, x: Tensor, name: str = "", largest: int = 12, dense: bool | None = None) -> Spectrum:
    """Singular values of df/dx at x, any shapes; computed in float64, which f's parameters have to be.

    largest: how many singular values Lanczos' method finds (scipy.sparse.linalg.svds, by jvp and vjp alone).
    dense:   write the whole Jacobian out and find all of them; None: up to DENSE entries.

    Raises TypeError for another dtype, ValueError for largest outside 1 ... min(inputs, outputs) - 1 where Lanczos'
    method is used, ImportError where that needs scipy.
    """
    if x.dtype != torch.float64:
        raise TypeError(f"x is {x.dtype}; accepted: float64, as model.double() and x.double() give")
    with torch.no_grad():
        outputs = f(x).numel()
    entries = outputs * x.numel()
    if dense if dense is not None else entries <= DENSE:
        matrix = _columns(f, x) if x.numel() <= outputs else jacrev(f, chunk_size=CHUNK)(x).reshape(outputs, -1)
        values = torch.linalg.svdvals(matrix.detach())
        return Spectrum(name, x.numel(), outputs, True, tuple(values.tolist()))
    return Spectrum(name, x.numel(), outputs, False, _lanczos(f, x, outputs, largest))


def _columns(f: Map, x: Tensor) -> Tensor:
    """The Jacobian [outputs, inputs] by forward-mode derivatives, one for each input."""
    directions = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    found = torch.vmap(lambda v: jvp(f, (x,), (v,))[1], chunk_size=CHUNK)(directions)
    return found.reshape(x.numel(), -1).T


def _lanczos(f: Map, x: Tensor, outputs: int, largest: int) -> tuple[float, ...]:
    try:
        import numpy as np
        from scipy.sparse.linalg import LinearOperator, svds
    except ImportError as error:
        raise ImportError(
            f"a Jacobian of {outputs} x {x.numel()} needs scipy: `pip install resnet_fused[pictures]` (import said: "
            f"{error})"
        ) from error
    if not 1 <= largest < min(x.numel(), outputs):
        raise ValueError(
            f"largest is {largest}, accepted: 1 to {min(x.numel(), outputs) - 1} for a Jacobian of "
            f"{outputs} x {x.numel()}"
        )
    y, pull = vjp(f, x)  # type: ignore[misc]  # the third is only there with has_aux

    def forward(v: np.ndarray) -> np.ndarray:
        tangent = torch.from_numpy(v.reshape(x.shape))
        return jvp(f, (x,), (tangent,))[1].detach().flatten().numpy()

    def backward(v: np.ndarray) -> np.ndarray:
        return pull(torch.from_numpy(v.reshape(y.shape)))[0].detach().flatten().numpy()

    shape = outputs, x.numel()
    operator = LinearOperator(shape, matvec=forward, rmatvec=backward, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(min(shape))
    found = svds(operator, k=largest, v0=start, return_singular_vectors=False)
    return tuple(sorted((float(value) for value in found), reverse=True))


def block_maps(block: nn.Module) -> dict[str, Map]:
    """A block's branch g, its sum with the skip path, and the block as it is, as functions of its input.

    In post-activation order the sum is taken before the last activation: I + J where the skip path is the identity. In
    the other orders the block is that sum. Raises NotFusable for a block that no adapter describes.
    """
    params, spec = describe(branch_modules(block), "default")
    stages = spec.stages
    if spec.order == "post":
        stages = (*stages[:-1], replace(stages[-1], act=IDENTITY))
    branch = replace(spec, stages=stages, skip="none", projection=None)
    whole = replace(spec, stages=stages)
    alone = replace(params, projection=None)
    scaled = any(isinstance(s, Tensor) or s != 1.0 for s in (params.branch_scale, params.skip_scale))
    joined = "projection + J" if spec.skip == "projection" else "scaled I + J" if scaled else "I + J"
    maps: dict[str, Map] = {"branch, J": lambda x: functional.residual_block(x, alone, branch)}
    if spec.skip != "none":
        maps[f"sum, {joined}"] = lambda x: functional.residual_block(x, params, whole)
    if whole != spec:
        act = spec.stages[-1].activation.name
        maps[f"block, {act} behind the sum"] = lambda x: functional.residual_block(x, params, spec)
    return maps


def block_spectra(block: nn.Module, x: Tensor, title: str = "block", **options: Any) -> Spectra:
    """`spectrum` of each of `block_maps` at x [1, C, H, W] float64; the block in evaluation mode and float64.

    Raises what `spectrum` and `block_maps` raise, ValueError where a batch norm would take the batch's statistics.
    """
    _require_evaluation(block)
    return Spectra(title, tuple(spectrum(f, x, name, **options) for name, f in block_maps(block).items()))


def model_spectra(models: dict[str, nn.Module], x: Tensor, title: str = "networks", **options: Any) -> Spectra:
    """`spectrum` of each named network's output at x [1, C, H, W]; in evaluation mode and float64."""
    for model in models.values():
        _require_evaluation(model)
    return Spectra(title, tuple(spectrum(model, x, name, **options) for name, model in models.items()))


def input_of(model: nn.Module, block: nn.Module, x: Tensor) -> Tensor:
    """What reaches the block when the model is given x."""
    seen: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    return seen[0]


def figure(spectra: Sequence[Spectra], title: str = "") -> Figure:
    """One panel for each group: singular values by their rank."""
    drawn, axes = panels.side_by_side(len(spectra), 5.0, 3.8, title)
    for axis, group in zip(axes, spectra, strict=True):
        lowest = math.inf
        for row in group.rows:
            alone = row.name.startswith(("branch", "plain"))
            colour = panels.PLAIN if alone else panels.OTHER if row.name.startswith("block") else panels.RESIDUAL
            held = row.values[: len(row.values) - (row.zeros or 0)]
            ranks = [(i + 1) / len(row.values) if row.dense else i + 1 for i in range(len(held))]
            label = row.name + (f" (the other {row.zeros} are 0)" if row.zeros else "")
            axis.plot(ranks, held, color=colour, label=label, linewidth=1.6, marker=None if row.dense else "o")
            lowest = min(lowest, held[-1])
        axis.axhline(1.0, color=panels.SOFT, linewidth=0.8, linestyle=":")
        axis.set_yscale("log")
        axis.set_ylim(bottom=max(lowest, 1e-6) / 30)  # room for the legend below the curves
        dense = all(row.dense for row in group.rows)
        axis.set(xlabel="share of all singular values" if dense else "rank", ylabel="singular value")
        axis.set_title(group.title, fontsize=10)
        axis.legend(fontsize=8)
    return drawn


def _require_evaluation(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"batch norm {name or 'itself'} is in training mode, where units depend on the whole batch; "
                "accepted: model.eval(), after blocks.settle_statistics(model, x) if the model is freshly made"
            )
