"""The scales of a residual block (1 - beta) x + alpha g(x): how to choose them and how to keep them within bounds.

g is the branch, J its Jacobian, Lip(g) a bound of J's spectral norm; `resnet_fused.spectral` computes both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resnet_fused import spectral
from resnet_fused.modules import adapters
from resnet_fused.modules.fused_block import original_class
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import BlockSpec, IntPair
from resnet_fused.spec.facts import NONE, facts

DENSE = 2048  # up to so many values in and out Jacobians are matrices; beyond, products with them (Lanczos)
Condition = Callable[[float], float]


@dataclass(frozen=True)
class Learnable:
    """A scale that is trained: a parameter of its block, in the block's `state_dict` under the argument's name.

    initial:     0 starts each block as its skip path: ReZero (arXiv:2003.04887), SkipInit (arXiv:2002.10444). A small
                 number with `per_channel` is LayerScale (arXiv:2103.17239), which starts at 0.1, 1e-5 or 1e-6 by depth.
    per_channel: [C_out] instead of [1].

    Raises ValueError where initial is not finite.
    """

    initial: float = 0.0
    per_channel: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.initial):
            raise ValueError(f"initial must be finite, got {self.initial!r}")

    def parameter(self, channels: int) -> nn.Parameter:
        return nn.Parameter(torch.full((channels if self.per_channel else 1,), float(self.initial)))


BlockScale = float | Learnable
ModelScale = BlockScale | Callable[[int], BlockScale]  # a function of the number of blocks


def scale_of_depth(scale: ModelScale, blocks: int) -> BlockScale:
    """What each of so many blocks gets."""
    return scale(blocks) if callable(scale) else scale


def depth_scale(blocks: int) -> float:
    """1 / sqrt(L) for L blocks in a row: the branch scale with which depth neither blows up nor loses a signal.

    With x_{l+1} = x_l + a g(x_l), and branches that are independent at initialisation and keep the mean square, the
    mean square of x_L is that of x_0 times (1 + a^2)^L: at most e for a = 1 / sqrt(L), 2^L for a = 1, and close to 1
    for a = 1 / L, where the branches no longer count (Hayou et al., arXiv:2010.12859; Marion et al., arXiv:2206.06929).
    Fixup (arXiv:1901.09321) scales the weights of branches of m layers by L^(-1 / (2 m - 2)) instead.

    Raises ValueError unless blocks is a positive int.
    """
    if not isinstance(blocks, int) or blocks < 1:
        raise ValueError(f"blocks must be a positive int, got {blocks!r}")
    return 1 / math.sqrt(blocks)


def stable_branch_scale(beta: float, lipschitz: float) -> float:
    """beta / Lip(g): the largest alpha for which (1 - beta) x + alpha g(x) is sure to stretch nothing.

    For 0 <= alpha <= beta / Lip(g), at every x,

        |(1 - beta) I + alpha J|  <=  (1 - beta) |I| + alpha |J|          triangle inequality
                                  <=  (1 - beta) + alpha Lip(g)           |J| <= Lip(g) where g is differentiable
                                  <=  (1 - beta) + beta  =  1

    Along the line from x to y the block's difference is the integral of its Jacobian, so no two points move apart, and
    a network of such blocks, however deep, neither amplifies a signal nor its gradient. For g(x) = Lip(g) x the norm
    is 1, so without knowing more of g no larger alpha is sure.

    beta: in [0, 1). lipschitz: >= 0; for 0 the result is infinite. Raises ValueError for others, NaN among them.
    """
    if not 0 <= beta < 1 or not lipschitz >= 0:
        raise ValueError(
            f"got beta={beta!r}, lipschitz={lipschitz!r}; accepted: 0 <= beta < 1 and a lipschitz constant >= 0"
        )
    return beta / lipschitz if lipschitz > 0 else math.inf


def condition_bounded_scale(condition: float, lipschitz: float, beta: float = 0.0) -> float:
    """The largest alpha for which (1 - beta) I + alpha J is sure to have a condition number of at most `condition`.

    Its singular values lie within (1 - beta) -+ alpha s, s = Lip(g) (Weyl), so that kappa is at most
    ((1 - beta) + alpha s) / ((1 - beta) - alpha s), which is `condition` for
    alpha = (1 - beta) / s * (condition - 1) / (condition + 1).

    Raises ValueError as `stable_branch_scale`, and for a condition below 1.
    """
    stable_branch_scale(beta, lipschitz)
    if not 1 <= condition < math.inf:
        raise ValueError(f"got condition={condition!r}; accepted: a finite number >= 1")
    return (1 - beta) / lipschitz * (condition - 1) / (condition + 1) if lipschitz > 0 else math.inf


def condition_optimal_scale(
    jacobian: Tensor, beta: float = 0.0, *, skip: Tensor | None = None, scales: tuple[float, float] = (0.1, 1.0)
) -> float:
    """The alpha within `scales` for which the condition number of (1 - beta) S + alpha J is nearest 1.

    jacobian: J of the branch, [m, n]; or the eigenvalues [n], real or complex, of a J that is normal.
    skip:     S of the skip path, [m, n]; None: the identity.
    scales:   where to look. alpha = 0 is perfectly conditioned where S is the identity, and a block without a branch,
              so the lower end says how much of the branch has to remain.

    The condition number has several minima over alpha in general (it is infinite where -(1 - beta) / alpha is an
    eigenvalue of J), so the interval is searched on a grid, which is then refined around its best point, to 1e-3 of the
    interval. Raises ValueError for shapes or numbers that are none of these.
    """
    _check_interval(beta, scales)
    if jacobian.dim() == 1 and skip is None:

        def condition(alpha: float) -> float:
            sizes = (1 - beta + alpha * jacobian).abs()
            return _ratio(float(sizes.max()), float(sizes.min()))

        return _minimise(condition, scales)
    if skip is None and jacobian.dim() == 2 and jacobian.shape[0] == jacobian.shape[1]:
        skip = torch.eye(len(jacobian), dtype=jacobian.dtype, device=jacobian.device)
    if skip is None or jacobian.dim() != 2 or jacobian.shape != skip.shape:
        raise ValueError(
            f"got a Jacobian {list(jacobian.shape)}, skip {None if skip is None else list(skip.shape)}; accepted: two "
            "matrices of one shape, a square one without skip, or eigenvalues without skip"
        )
    return _minimise(_dense_condition(jacobian, (1 - beta) * skip), scales)


class Advice(NamedTuple):
    """Condition numbers of a block before its last activation, as it is and with the scale advised."""

    scale: float
    condition: float
    best_scale: float
    best_condition: float


def advise(block: nn.Module, x: Tensor, scales: tuple[float, float] = (0.1, 1.0)) -> Advice:
    """Measure the block at x, and find the branch scale within `scales` with which it is best conditioned there.

    block:  of a class that `fuse` knows, with a skip path; as in evaluation, its batch norms with running statistics.
    x:      one input of the block, [1, C, H, W]. Beyond 2048 values in or out the extreme singular values come from
            Lanczos' method on products with the Jacobian, to 1 %, which needs scipy and takes minutes; a crop of x is
            quicker.
    scales: see `condition_optimal_scale`. A branch scale per channel keeps its shape, and is told by its mean size.

    The skip path counts with the block's own scale. Raises ValueError for another x or a block without a skip path,
    TypeError, NotFusable as `fuse`.
    """
    params, spec = spectral.evaluated(*spectral.described(block))
    _check_interval(0.0, scales)
    if x.dim() != 4 or x.shape[0] != 1 or spec.skip == "none":
        raise ValueError(
            f"got x {list(x.shape)} and a block with skip={spec.skip!r}; accepted: one input, [1, C, H, W], and a "
            "block with a skip path"
        )
    x = x.detach().double()
    g, s = spectral.paths(params, spec)
    now, shape = _mean_size(params.branch_scale)

    def branch(x: Tensor) -> Tensor:
        return g(x) * shape

    def skip(x: Tensor) -> Tensor:
        scale = params.skip_scale
        return s(x) * (scale.reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale)

    with torch.no_grad():
        size = max(x.numel(), g(x).numel())
    if size <= DENSE:
        condition = _dense_condition(spectral.jacobian(branch, x), spectral.jacobian(skip, x))
        best = _minimise(condition, scales)
    else:
        condition = _lanczos_condition(branch, skip, x)
        best = _minimise(condition, scales, points=5, zooms=1)
    return Advice(now, condition(now), best, condition(best))


class Contractive:
    """Keeps |branch_scale| Lip(g) <= beta in every residual block of a model while it is trained.

    With skip_scale = 1 - beta no block then stretches anything: |(1 - beta) I + alpha J| <= 1 (`stable_branch_scale`),
    and neither does a ReLU behind it. With any skip_scale above beta the block (before a last activation) is
    invertible, by iterating x <- (y - alpha g(x)) / skip_scale: i-ResNet (arXiv:1811.00995) has beta < 1 = skip_scale.

        constraint = Contractive(model, beta=0.5, x=pictures)
        constraint.attach(optimizer)          # or constraint.apply() after each step

    What is too large is shrunk, in place, and nothing is ever enlarged: a learnable branch scale is clamped; else every
    convolution of the branch by the same factor, its batch norm's weight where one that is trained follows it. A
    projection is kept at norm 1, a learnable skip scale within 1 - beta.

    Batch norms count as in evaluation, with their running statistics: in training they divide by the batch's deviation,
    which has no bound. These move with every forward pass in training, so apply once more before the last evaluation;
    without batch norms the bound always holds. Lip(g) is `spectral.lipschitz`'s, which takes the eigenvalues of one
    matrix for each frequency and convolution: little for small pictures, and seconds for a 3x3 convolution of 64
    channels on 56x56 pixels.

    model: fused or not; its residual blocks are those of a class that `fuse` knows.
    beta:  in (0, 1).
    x:     an input of the model, of the largest size that it will see. The model runs on it once, in evaluation.

    Raises ValueError for another beta, a model without such blocks, norms without running statistics; NotFusable for a
    block with a part that has no fused form.
    """

    def __init__(self, model: nn.Module, beta: float, x: Tensor) -> None:
        if not 0 < beta < 1:
            raise ValueError(f"beta must be in (0, 1), got {beta!r}")
        self.beta = beta
        self._sizes = _block_sizes(model, x)
        self._names = {module: name for name, module in model.named_modules()}
        if not self._sizes:
            raise ValueError(f"{type(model).__name__} has no residual block of a class that is known here")
        self.bounds()  # raises at once where a block cannot be bounded

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Apply after each of the optimizer's steps; the handle removes that again."""
        return optimizer.register_step_post_hook(lambda *_: self.apply())

    @torch.no_grad()
    def apply(self) -> None:
        for block, size in self._sizes.items():
            params, spec = spectral.described(block)
            norms = spectral.part_norms(*spectral.evaluated(params, spec), size)
            if norms.projection is not None and norms.projection > 1:
                _shrink(params, spec, len(spec.stages), 1 / norms.projection)
            if _learned(params.skip_scale):
                params.skip_scale.clamp_(self.beta - 1, 1 - self.beta)  # type: ignore[union-attr]
            limit = stable_branch_scale(self.beta, math.prod(norms.convs) * norms.rest)
            if _learned(params.branch_scale):
                params.branch_scale.clamp_(-limit, limit)  # type: ignore[union-attr]
            elif (excess := spectral.largest(params.branch_scale) / limit) > 1:
                for i in range(len(spec.stages)):
                    _shrink(params, spec, i, excess ** (-1 / len(spec.stages)))

    def bounds(self) -> dict[str, spectral.Lipschitz]:
        """Of each block by its name in the model, in evaluation."""
        found = {}
        for block, size in self._sizes.items():
            found[self._names[block]] = spectral.block_bounds(*spectral.described(block), size)
        return found


def _block_sizes(model: nn.Module, x: Tensor) -> dict[nn.Module, IntPair]:
    """The residual blocks, and the pixels of their inputs when the model runs on x."""
    sizes: dict[nn.Module, IntPair] = {}

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        before, (height, width) = sizes.get(module, (0, 0)), given[0].shape[2:]
        sizes[module] = max(before[0], height), max(before[1], width)

    blocks = [m for m in model.modules() if adapters.find(original_class(m)) is not None]
    blocks = [block for block in blocks if spectral.described(block)[1].skip != "none"]
    handles = [block.register_forward_pre_hook(note) for block in blocks]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return sizes


def _learned(scale: float | Tensor) -> bool:
    return isinstance(scale, Tensor) and scale.requires_grad


def _shrink(params: BlockParams, spec: BlockSpec, conv: int, factor: float) -> None:
    """One convolution with the norm behind it, by the norm's weight where that is trained; in place."""
    behind = facts(spec).convs[conv].output_stage
    norm: StageParams | None = None if behind == NONE else params.convs[behind]
    if norm is not None and norm.norm_weight is not None and norm.norm_weight.requires_grad:
        norm.norm_weight.mul_(factor)
    else:
        params.convs[conv].weight.mul_(factor)


def _check_interval(beta: float, scales: tuple[float, float]) -> None:
    if not 0 <= beta < 1 or not 0 <= scales[0] < scales[1] < math.inf:
        raise ValueError(f"got beta={beta!r}, scales={scales!r}; accepted: 0 <= beta < 1 and 0 <= low < high")


def _mean_size(scale: float | Tensor) -> tuple[float, Tensor]:
    """The mean size of a scale, and the scale divided by it; 1 where it is zero everywhere."""
    values = torch.as_tensor(scale, dtype=torch.float64).reshape(-1, 1, 1)
    size = float(values.abs().mean())
    return size, values / size if size > 0 else torch.ones_like(values)


def _dense_condition(branch: Tensor, skip: Tensor) -> Condition:
    def condition(alpha: float) -> float:
        values = torch.linalg.svdvals(skip + alpha * branch)
        return _ratio(float(values[0]), float(values[-1]))

    return condition


def _lanczos_condition(branch: spectral.Map, skip: spectral.Map, x: Tensor) -> Condition:
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ImportError as error:
        raise ImportError(
            f"blocks of more than {DENSE} values are measured with scipy: `pip install scipy`, or give a crop of x "
            f"(import said: {error})"
        ) from error

    def condition(alpha: float) -> float:
        def sum_of_paths(x: Tensor) -> Tensor:
            return skip(x) + alpha * branch(x)

        out, backward = torch.func.vjp(sum_of_paths, x)[:2]  # typed with a third

        def forward(t: Tensor) -> Tensor:
            return torch.func.jvp(sum_of_paths, (x,), (t,))[1]

        wide = out.numel() < x.numel()  # then the matrix has as many singular values as outputs
        shape = out.shape if wide else x.shape

        def gram(v: Any) -> Any:
            t = torch.as_tensor(v, dtype=torch.float64).reshape(shape)
            t = forward(backward(t)[0]) if wide else backward(forward(t))[0]
            return t.detach().flatten().numpy()

        operator = LinearOperator((shape.numel(), shape.numel()), matvec=gram, dtype="float64")
        start = torch.randn(shape.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
        kept = min(shape.numel() - 1, 200)  # many vectors, since small eigenvalues lie close together
        given: dict[str, Any] = {"k": 1, "v0": start, "ncv": kept, "tol": 1e-2, "return_eigenvectors": False}
        try:
            largest = eigsh(operator, which="LA", **given)[0]
            smallest = eigsh(operator, which="SA", **given)[0]
        except ArpackNoConvergence as error:
            raise RuntimeError(f"Lanczos' method did not converge ({error}); give a crop of x") from error
        return _ratio(math.sqrt(largest), math.sqrt(max(smallest, 0.0)))

    return condition


def _ratio(largest: float, smallest: float) -> float:
    return largest / smallest if smallest > 0 else math.inf


def _minimise(condition: Condition, scales: tuple[float, float], points: int = 33, zooms: int = 2) -> float:
    """The best point of a grid over the interval, which is laid again, more closely, around the best of the last."""
    low, high = scales
    found: dict[float, float] = {}
    for _ in range(1 + zooms):
        grid = torch.linspace(low, high, points, dtype=torch.float64).tolist()
        found |= {alpha: condition(alpha) for alpha in grid if alpha not in found}
        best = min(found, key=found.__getitem__)
        step = (high - low) / (points - 1)
        low, high = max(scales[0], best - step), min(scales[1], best + step)
    return best
