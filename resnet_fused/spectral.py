"""How much a block can stretch: spectral norms of its convolutions, Lipschitz bounds of its branch and the whole.

Lengths are Euclidean norms over all channels and pixels. Computed in float64, whatever the block's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from resnet_fused.backends.folding import Affine, affine
from resnet_fused.errors import NotFusable
from resnet_fused.modules import adapters
from resnet_fused.modules.block_modules import CompositeModules, StageModules, class_path, describe, describe_stage
from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.modules.plan import Plan
from resnet_fused.ops import reference
from resnet_fused.params import BlockParams, Scale, StageParams, map_tensors
from resnet_fused.spec import BlockSpec, IntPair, StageSpec
from resnet_fused.spec.facts import NONE, facts

Block = tuple[BlockParams, BlockSpec]
Map = Callable[[Tensor], Tensor]
CHUNK = 1 << 24  # complex values of a convolution's symbol at once: 256 MiB


class Lipschitz(NamedTuple):
    """Upper bounds of a block  act(skip_scale S(x) + branch_scale g(x)).

    branch: of g, without its scale. skip: of S, 1 where it is x. block: |skip_scale| skip + |branch_scale| branch,
    times that of the activation behind the sum.
    """

    branch: float
    skip: float
    block: float


def lipschitz(block: nn.Module, size: IntPair) -> Lipschitz:
    """Bounds of the block in evaluation, for inputs of up to `size` (height, width) pixels.

    Of the branch it is the product over its parts: of each convolution the spectral norm with the factors of the batch
    norm behind it, gamma / sqrt(running_var + eps), multiplied into its rows (`conv_norm`, upper=True); of each
    activation `Activation.lipschitz`; of a batch norm before the first convolution its largest factor (Gouk et al.,
    arXiv:1804.04368, sections 3 and 4).

    block: of a class that `fuse` knows, fused or not.
    Raises ValueError for a block in training mode, whose batch norms depend on the batch; NotFusable, TypeError as
    `fuse`.
    """
    params, spec = described(block)
    if spec.batch_stats:
        raise ValueError(
            f"{type(block).__name__} normalises with the statistics of its batch, which has no fixed Lipschitz "
            "constant: call eval() first"
        )
    return block_bounds(params, spec, size)


def conv_norm(
    conv: nn.Conv2d, size: IntPair, *, upper: bool = False, tolerance: float = 1e-3, iterations: int = 10_000
) -> float:
    """The spectral norm of a convolution, without its bias, on inputs of `size` (height, width).

    By default an estimate, never above: power iteration on A^T A from a fixed random start, through the convolution and
    its transpose as they are, with stride, padding, groups and dilation (arXiv:1804.04368, algorithm 2). It ends where
    the residual |A^T A v - s^2 v| is at most `tolerance` s^2. Then a singular value is that close to s; that it is the
    largest is likely and not certain. The more pixels, the slower: their largest singular values lie close together.

    upper: a bound instead, never below, without iteration: the norm of the same convolution on a torus that is large
    enough for the padding, which holds A as a submatrix (compare arXiv:2402.00240). There it is the largest singular
    value over all frequencies (arXiv:1805.10408, theorem 6); with a stride, the matrices of frequencies that fall on
    one another stand side by side in one. Equal for 1x1 kernels; the more pixels, the closer: within 5 % for
    3x3 kernels on 10x10 pixels.

    Raises ValueError for a padding other than zeros or a size that the kernel does not fit, RuntimeError if
    `iterations` do not reach the tolerance.
    """
    params, stage = describe_stage("conv", StageModules(conv, None, None))
    weight = params.weight.detach().double()
    _require_norm(weight, stage, size)
    if upper:
        return _upper_norm(weight, stage, size)
    return _power_iteration(weight, stage, size, tolerance, iterations)


def described(block: nn.Module) -> Block:
    """The block's tensors and spec, as fused blocks are computed with. Raises TypeError, NotFusable."""
    if isinstance(block, FusedModule):
        found = block.fused_describe()
        if isinstance(found, Plan):
            raise NotFusable(_COMPOSITE.format(class_path(type(block))))
        _require_no_gate(block, found.gate)
        return found.params, found.spec
    adapter = adapters.find(type(block))
    if adapter is None:
        raise TypeError(
            f"{class_path(type(block))} is no block class that is known here; register_block(cls, adapter) teaches it"
        )
    modules = adapter(block)
    if isinstance(modules, CompositeModules):
        raise NotFusable(_COMPOSITE.format(class_path(type(block))))
    _require_no_gate(block, modules.gate)
    return describe(modules, "default")


_COMPOSITE = "{} is computed in several parts with PyTorch's own modules between, which has no bound here"


def _require_no_gate(block: nn.Module, gate: object) -> None:
    if gate is not None:
        raise NotFusable(
            f"{class_path(type(block))} multiplies its branch with a gate computed from the input, which has no bound "
            "here; accepted: blocks without a gate"
        )


def evaluated(params: BlockParams, spec: BlockSpec) -> Block:
    """The block as evaluation computes it, in float64; raises ValueError where a norm keeps no running statistics."""

    def evaluate(stage: StageSpec, tensors: StageParams) -> StageSpec:
        if stage.norm and tensors.running_mean is None:
            raise ValueError("a batch norm keeps no running statistics, so that evaluation depends on the batch, too")
        return replace(stage, batch_stats=False)

    stages = tuple(map(evaluate, spec.stages, params.stages))
    projection = spec.projection
    if projection is not None and params.projection is not None:
        projection = evaluate(projection, params.projection)
    wide = map_tensors(params, lambda _, t: t.detach().double() if t.is_floating_point() else t)
    return wide, replace(spec, stages=stages, projection=projection)


def paths(params: BlockParams, spec: BlockSpec) -> tuple[Map, Map]:
    """g and S of act(skip_scale S(x) + branch_scale g(x)): the block's two paths as functions in plain PyTorch."""
    stages = list(spec.stages)
    if spec.order == "post":
        stages[-1] = replace(stages[-1], act="identity")
    branch = BlockSpec(tuple(stages), order=spec.order)
    tensors = BlockParams(params.stages)

    def g(x: Tensor) -> Tensor:
        return reference.residual_block(x, tensors, branch)

    if spec.projection is None or params.projection is None:
        return g, (lambda x: x) if spec.skip == "identity" else (lambda x: torch.zeros_like(g(x)))
    stage, projection = spec.projection, params.projection
    if spec.order == "pre":  # it reads what the first norm and activation make
        first, own = spec.stages[0], params.stages[0]
        stage = replace(stage, norm=first.norm, batch_stats=first.batch_stats, eps=first.eps, act=first.act)
        projection = replace(own, weight=projection.weight, bias=projection.bias)
    skip_spec = BlockSpec((stage,), order="pre" if spec.order == "pre" else "post")
    return g, lambda x: reference.residual_block(x, BlockParams((projection,)), skip_spec)


def block_bounds(params: BlockParams, spec: BlockSpec, size: IntPair) -> Lipschitz:
    """As `lipschitz`, of a block in evaluation, or in training as its running statistics make it in evaluation."""
    params, spec = evaluated(params, spec)
    factors = part_norms(params, spec, size)
    branch, skip = math.prod(factors.convs) * factors.rest, 1.0 if spec.skip == "identity" else 0.0
    if factors.projection is not None:
        skip = factors.projection
    behind = spec.stages[-1].activation.lipschitz(params.stages[-1].slope) if spec.order == "post" else 1.0
    total = largest(params.branch_scale) * branch
    if spec.skip != "none":
        total += largest(params.skip_scale) * skip
    return Lipschitz(branch, skip, behind * total)


def jacobian(function: Map, x: Tensor) -> Tensor:
    """The dense Jacobian of function at x, [outputs, inputs], both flattened."""
    found = torch.func.jacrev(function, chunk_size=256)(x.detach())
    return found.reshape(-1, x.numel()).detach()


class PartNorms(NamedTuple):
    """Upper bounds of a block's parts; the product of `convs` and `rest` is the branch's."""

    convs: list[float]  # each with the norm behind it
    rest: float  # activations, and in pre-activation order the first norm
    projection: float | None  # of the whole path


def part_norms(params: BlockParams, spec: BlockSpec, size: IntPair) -> PartNorms:
    """Of an evaluated block."""
    norms = [affine(s, p, torch.float64) for s, p in zip(spec.convs, params.convs, strict=True)]
    known, before, convs = facts(spec).convs, size, []
    for stage, tensors, conv in zip(spec.stages, params.stages, known, strict=False):
        weight = _with_norm(tensors.weight, None if conv.output_stage == NONE else norms[conv.output_stage])
        _require_norm(weight, stage, before)
        convs.append(_upper_norm(weight, stage, before))
        before = stage.output_size(before, (weight.shape[2], weight.shape[3]))
    first, inner = 1.0, list(zip(spec.stages, params.stages, strict=True))
    if spec.order == "post":
        inner.pop()  # its activation follows the sum
    acts = [stage.activation.lipschitz(tensors.slope) for stage, tensors in inner]
    if spec.order == "pre" and norms[0] is not None:
        first = float(norms[0][0].abs().max())
    projection = None
    if spec.projection is not None and params.projection is not None:
        norm = norms[-1] if known[-1].output_stage != NONE else None
        weight = _with_norm(params.projection.weight, norm)
        _require_norm(weight, spec.projection, size)
        projection = _upper_norm(weight, spec.projection, size)
        if spec.order == "pre":
            projection *= first * acts[0]
    return PartNorms(convs, math.prod(acts) * first, projection)


def _with_norm(weight: Tensor, norm: Affine | None) -> Tensor:
    weight = weight.detach().double()
    return weight if norm is None else weight * norm[0].view(-1, 1, 1, 1)


def largest(scale: Scale) -> float:
    """The largest size of a scale over the channels."""
    return float(scale.abs().max()) if isinstance(scale, Tensor) else abs(scale)


def _require_norm(weight: Tensor, stage: StageSpec, size: IntPair) -> None:
    if stage.pads_values:
        raise ValueError(
            f"a convolution has padding_mode={stage.padding_mode!r}, whose border holds values that count more than "
            "once; accepted: 'zeros'"
        )
    if not weight.isfinite().all():
        raise ValueError("a convolution's weight, or the batch norm behind it, is not finite")
    if min(stage.output_size(size, (weight.shape[2], weight.shape[3]))) < 1:
        raise ValueError(f"a kernel of {tuple(weight.shape[2:])} does not fit an input of {size} pixels")


@torch.no_grad()
def _power_iteration(weight: Tensor, stage: StageSpec, size: IntPair, tolerance: float, iterations: int) -> float:
    stride, padding, dilation = stage.geometry
    shape = (1, weight.shape[1] * stage.groups, *size)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(shape, dtype=weight.dtype, generator=generator).to(weight.device)
    v /= v.norm()
    residual = square = 0.0
    for _ in range(iterations):
        image = F.conv2d(v, weight, None, stride, padding, dilation, stage.groups)
        square = float(image.square().sum())
        if square == 0.0:
            return 0.0
        back = conv2d_input(shape, weight, image, stride, padding, dilation, stage.groups)
        residual = float((back - square * v).norm())
        if residual <= tolerance * square:
            return math.sqrt(square)
        v = back / back.norm()
    raise RuntimeError(
        f"power iteration: after {iterations} iterations the residual is {residual / square:.2g}, wanted "
        f"{tolerance:g}; raise iterations or tolerance, or take upper=True"
    )


@torch.no_grad()
def _upper_norm(weight: Tensor, stage: StageSpec, size: IntPair) -> float:
    """The norm on a torus; weight in float64."""
    kernel = (weight.shape[2], weight.shape[3])
    out = stage.output_size(size, kernel)
    torus = []
    for n, k, m, s, p, d in zip(size, kernel, out, *stage.geometry, strict=True):
        # the zeros on one side may be those on the other; no tap and no output may fall on another
        least = s if k == 1 and p == 0 else max(n + p, (k - 1) * d + 1, (m - 1) * s + 1)
        torus.append(-(-least // s) * s)
    (sh, sw), _, (dh, dw) = stage.geometry
    spread = weight.new_zeros(*weight.shape[:2], (kernel[0] - 1) * dh + 1, (kernel[1] - 1) * dw + 1)
    spread[:, :, ::dh, ::dw] = weight
    rows, columns = torus[0] // sh, torus[1] // sw
    square = weight.new_zeros(())
    for group in spread.chunk(stage.groups):
        # per frequency of the output, the matrices of the input's frequencies that the stride folds onto it
        symbol = torch.fft.fft2(group, (torus[0], torus[1])).unflatten(3, (sw, columns)).unflatten(2, (sh, rows))
        half = symbol[..., : columns // 2 + 1]  # the rest are complex conjugates
        matrices = half.permute(3, 5, 0, 1, 2, 4).flatten(3).flatten(0, 1)
        if matrices.shape[1] > matrices.shape[2]:
            matrices = matrices.mT
        for part in matrices.split(max(1, CHUNK // matrices[0].numel())):
            square = torch.maximum(square, torch.linalg.eigvalsh(part @ part.mH)[:, -1].max())  # keeps NaN
    return math.sqrt(float(square) / (sh * sw))
