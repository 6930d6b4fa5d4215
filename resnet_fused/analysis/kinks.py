"""Kinks along a straight segment between two inputs: where an activation's pre-activation changes its sign.

A ReLU network is linear between kinks, so their number measures how far the function is from linear on the segment
(Raghu et al., arXiv:1606.05336; restriction to a segment: Sotoudeh & Thakur, arXiv:1908.06214). A residual network of L
blocks is the sum of 2^L paths (Veit et al., arXiv:1605.06431), each through some branches and past the others. The path
past all of them is the identity and has no kink at any depth; a plain network is the one path through all branches.

- Chains are counted exactly. The segment's image is kept as the vertices of a broken line: each block is a fused call
  on all vertices, its first convolution another, and a sign change between two vertices is a new vertex.
- Models are sampled at equal steps, so two kinks of one unit within a step are missed; the count at half the resolution
  stands beside it. Hooks on the activations see the pre-activations, so a fused block runs its own forward here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.analysis import panels
from resnet_fused.analysis.chains import Chain, relu_chain
from resnet_fused.spec.activations import IDENTITY, RELU
from resnet_fused.tools.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AT_ZERO = (nn.ReLU, nn.LeakyReLU, nn.PReLU)  # their one kink
ELSEWHERE = (nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Threshold)
SAMPLES_AT_ONCE = 16


@dataclass(frozen=True)
class ChainKinks:
    """Kinks of one depth, exact, averaged over `segments`.

    paths: (branches passed, mean number of kinks) of random paths of the residual chain; (0, 0.0) is the identity path.
    """

    depth: int
    plain: float
    residual: float
    paths: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class KinksByDepth:
    """Of random chains `chains.relu_chain`."""

    width: int
    segments: int
    rows: tuple[ChainKinks, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        rows = []
        for row in self.rows:
            middle = [f"{count:.1f} ({passed})" for passed, count in row.paths if passed]
            identity = dict(row.paths)[0]
            rows.append(
                [str(row.depth), f"{identity:.0f}", ", ".join(middle), f"{row.plain:.1f}", f"{row.residual:.1f}"]
            )
        title = f"Kinks along a segment, exact, width {self.width}, mean of {self.segments} segments"
        header = ("blocks", "identity path", "paths (through so many branches)", "plain network", "residual network")
        return table(title, header, rows)


@dataclass(frozen=True)
class ModelKinks:
    """Sign changes of pre-activations along a segment, counted at `resolution` equal steps.

    layers: activations in the order of the calls; units, kinks: of each.
    half:   all kinks, counted at half the resolution.
    """

    name: str
    resolution: int
    layers: tuple[str, ...]
    units: tuple[int, ...]
    kinks: tuple[int, ...]
    half: int

    @property
    def total(self) -> int:
        return sum(self.kinks)

    @property
    def per_unit(self) -> tuple[float, ...]:
        return tuple(kinks / units for kinks, units in zip(self.kinks, self.units, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class ModelsKinks:
    """A model and its copy without skips, on one segment."""

    model: str
    rows: tuple[ModelKinks, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "networks": [row.to_dict() for row in self.rows]}

    def table(self) -> str:
        first = self.rows[0]
        header = (
            "network",
            "activations",
            "units",
            "kinks",
            f"at {first.resolution // 2} steps",
            "kinks a unit, last activation",
        )
        rows = [
            [r.name, str(len(r.layers)), str(sum(r.units)), str(r.total), str(r.half), f"{r.per_unit[-1]:.3g}"]
            for r in self.rows
        ]
        return table(
            f"Kinks of {self.model} along a segment between two inputs, at {first.resolution} steps", header, rows
        )


def chain_kinks(chain: Chain, start: Tensor, end: Tensor) -> Tensor:
    """Where on the segment the chain has kinks: t in (0, 1) of start + t (end - start), sorted, [number of kinks].

    start, end: [1, C, H, W]. Every block is convolution, ReLU, convolution without norms (`chains.relu_chain`): exact
    up to rounding. A unit that stays 0 has no kink. Raises ValueError for other blocks.
    """
    where = torch.tensor([0.0, 1.0], dtype=start.dtype)
    x = torch.cat([start, end])
    kinks = torch.zeros(0, dtype=start.dtype)
    for params, spec in chain.blocks:
        hidden, last = spec.stages if len(spec.stages) == 2 else (spec.stages[0], None)
        plain = last is not None and not hidden.norm and not last.norm and spec.order == "post"
        if not plain or hidden.act != RELU or last.act != IDENTITY:  # type: ignore[union-attr]
            raise ValueError(f"got {spec}; accepted: convolution, relu, convolution without norms (chains.relu_chain)")
        z = functional.conv_bn_act(x, params.stages[0], replace(hidden, act=IDENTITY)).flatten(1)
        piece, unit = ((z[:-1] < 0) != (z[1:] < 0)).nonzero(as_tuple=True)
        share = z[piece, unit] / (z[piece, unit] - z[piece + 1, unit])
        found = where[piece] + share * (where[piece + 1] - where[piece])
        kinks = torch.cat([kinks, found])
        weight = share.reshape(-1, *[1] * (x.ndim - 1))
        where, order = torch.cat([where, found]).sort()
        x = torch.cat([x, torch.lerp(x[piece], x[piece + 1], weight)])[order]
        x = functional.residual_block(x, params, spec)
    return kinks.sort().values


def kinks_by_depth(
    depths: Sequence[int] = (1, 2, 4, 8, 16), width: int = 16, segments: int = 8, seed: int = 0
) -> KinksByDepth:
    """Kinks of random chains with their skip paths, without them, and along single paths, all of the same weights.

    The path through all branches is the plain network.
    """
    rows = []
    for depth in depths:
        residual = 0.0
        lengths = sorted({0, depth // 4, depth // 2, 3 * depth // 4, depth})
        paths = dict.fromkeys(lengths, 0.0)
        for i in range(segments):
            drawn, generator = random.Random(seed + i), torch.Generator().manual_seed(seed + i)
            start, end = torch.randn(2, 1, width, 1, 1, generator=generator, dtype=torch.float64)
            chain = relu_chain(depth, width, "identity", seed + i)
            residual += len(chain_kinks(chain, start, end)) / segments
            for length in lengths:
                passed = sorted(drawn.sample(range(depth), length))
                paths[length] += len(chain_kinks(chain.path(passed), start, end)) / segments
        rows.append(ChainKinks(depth, paths[depth], residual, tuple(paths.items())))
    return KinksByDepth(width, segments, tuple(rows))


@torch.no_grad()
def model_kinks(model: nn.Module, start: Tensor, end: Tensor, resolution: int = 128, name: str = "") -> ModelKinks:
    """Sign changes of every activation's input on the segment from start to end, each [1, C, H, W], in evaluation mode.

    Raises ValueError for an odd or small resolution, and for a model without ReLU, LeakyReLU or PReLU modules or with
    activations whose kinks are elsewhere than at 0.
    """
    if resolution < 2 or resolution % 2:
        raise ValueError(f"resolution is {resolution}; accepted: an even number of steps, 2 or more")
    acts = {key: module for key, module in model.named_modules() if isinstance(module, AT_ZERO)}
    others = sorted({type(m).__name__ for m in model.modules() if isinstance(m, ELSEWHERE)})
    if others or not acts:
        raise ValueError(
            f"the model has {', '.join(others) or 'no activation module with a kink'}; accepted: kinks at 0, of "
            f"{', '.join(act.__name__ for act in AT_ZERO)}"
        )
    seen: list[tuple[str, Tensor]] = []

    def watch(key: str) -> Any:
        return lambda module, inputs: seen.append((key, (inputs[0] < 0).flatten(1)))

    handles = [module.register_forward_pre_hook(watch(key)) for key, module in acts.items()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        signs: list[list[Tensor]] = []
        for steps in torch.arange(resolution + 1).split(SAMPLES_AT_ONCE):
            seen.clear()
            model(torch.lerp(start, end, (steps / resolution).to(start.dtype).reshape(-1, *[1] * (start.ndim - 1))))
            signs.append([sign for _, sign in seen])
        layers = tuple(key for key, _ in seen)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    whole = [torch.cat(parts) for parts in zip(*signs, strict=True)]
    return ModelKinks(
        name,
        resolution,
        layers,
        tuple(sign.shape[1] for sign in whole),
        tuple(_changes(sign) for sign in whole),
        sum(_changes(sign[::2]) for sign in whole),
    )


def figure(found: KinksByDepth, models: ModelsKinks | None = None, title: str = "") -> Figure:
    """Kinks of chains by depth and along paths; of models by layer."""
    drawn, axes = panels.side_by_side(2 if models is None else 3, 4.8, 3.9, title)
    depths = [row.depth for row in found.rows]
    axes[0].plot(depths, [row.plain for row in found.rows], "s-", color=panels.PLAIN, label="plain network")
    axes[0].plot(depths, [row.residual for row in found.rows], "o-", color=panels.RESIDUAL, label="residual network")
    identity = [dict(row.paths)[0] for row in found.rows]
    axes[0].plot(depths, identity, "^-", color=panels.OTHER, label="identity path")
    axes[0].set(xlabel="blocks", ylabel="kinks on the segment")
    axes[0].set_title(f"chains of width {found.width}, exact", fontsize=10)
    axes[0].legend(fontsize=8)
    row = found.rows[-1]
    axes[1].plot([p for p, _ in row.paths], [count for _, count in row.paths], "o-", color=panels.RESIDUAL)
    axes[1].set(xlabel="branches that the path passes", ylabel="kinks on the segment")
    axes[1].set_title(f"paths of the residual chain of {row.depth} blocks", fontsize=10)
    if models is not None:
        for each, colour in zip(models.rows, (panels.RESIDUAL, panels.PLAIN), strict=False):
            axes[2].plot(
                range(1, len(each.layers) + 1), each.per_unit, "o-", markersize=3, color=colour, label=each.name
            )
        axes[2].set(xlabel="activation, in the order of the calls", ylabel="kinks a unit")
        axes[2].set_ylim(bottom=0)
        axes[2].set_title(f"{models.model}, {models.rows[0].resolution} steps", fontsize=10)
        axes[2].legend(fontsize=8)
    return drawn


def _changes(sign: Tensor) -> int:
    return int((sign[1:] != sign[:-1]).sum())
