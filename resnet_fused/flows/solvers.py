"""Solvers of g(z) = z for a batch, each sample on its own: its own residual, its own stop.

A sample is a row of z [N, D]; a solver sees r(z) = g(z) - z. A sample that has converged keeps its value while the
others go on, so what becomes of a sample does not depend on those beside it. A sample has converged where

    |r(z)| <= tol * max(|g(z_0)|, |g(z)|)                       (Euclidean norms)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
# The derivative of r at z: `derivative(z)(v)` = J_r(z) v.
Derivative = Callable[[Tensor], Map]
OnFailure = Literal["raise", "warn"]

# of r, relative; in 16 bits g itself is rounded to 2^-9 (bfloat16) or 2^-12 (float16)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Solution(NamedTuple):
    """What a solver found.

    z:          [N, D]
    residuals:  [iterations + 1, N] relative residuals, the first at `initial`; a sample's last one is repeated after it
                has stopped
    converged:  [N] bool
    iterations: [N] int64
    tol:        what `residuals` were held against
    """

    z: Tensor
    residuals: Tensor
    converged: Tensor
    iterations: Tensor
    tol: float


class ConvergenceError(RuntimeError):
    """A solver did not converge; `solution` has where it stopped and the history of its residuals."""

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution


class ConvergenceWarning(UserWarning):
    """As ConvergenceError, where on_failure="warn"."""


class Solver(Protocol):
    """What `FixedPoint`, `Anderson`, `NewtonKrylov` and `Gmres` are."""

    @property
    def name(self) -> str: ...

    def solve(self, residual: Map, initial: Tensor, tol: float, derivative: Derivative) -> Solution:
        """From `initial` [N, D] to where residual(z) is small; derivative: of `residual`."""


@dataclass(frozen=True)
class FixedPoint:
    """Picard iteration z <- g(z); converges where g contracts."""

    max_iterations: int = 200

    def __post_init__(self) -> None:
        _at_least_one(max_iterations=self.max_iterations)

    @property
    def name(self) -> str:
        return "fixed point iteration"

    def solve(self, residual: Map, initial: Tensor, tol: float, derivative: Derivative) -> Solution:
        z, watch = initial, _Watch(initial, tol)
        for _ in range(self.max_iterations):
            r = residual(z)
            if watch.stops(z, r):
                return watch.solution(z)
            z = torch.where(watch.active, z + r, z)
        watch.stops(z, residual(z))
        return watch.solution(z)


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration of the fixed point iteration (Walker & Ni 2011, doi:10.1137/10078356X, (2.2) type II).

        gamma = argmin |r_k - dR gamma|,     z_{k+1} = z_k + damping r_k - (dZ + damping dR) gamma

    memory: how many differences dZ, dR of earlier iterates are kept, two vectors of z's size each while it runs.
    """

    memory: int = 5
    damping: float = 1.0
    max_iterations: int = 100

    def __post_init__(self) -> None:
        _at_least_one(memory=self.memory, max_iterations=self.max_iterations)
        if not 0 < self.damping <= 1:
            raise ValueError(f"got damping={self.damping}; accepted: in (0, 1]")

    @property
    def name(self) -> str:
        return f"Anderson acceleration with memory {self.memory}"

    def solve(self, residual: Map, initial: Tensor, tol: float, derivative: Derivative) -> Solution:
        z, watch = initial, _Watch(initial, tol)
        n, d = z.shape
        dz, dr = (z.new_zeros(n, self.memory, d) for _ in range(2))
        last: tuple[Tensor, Tensor] | None = None
        for k in range(self.max_iterations):
            r = residual(z)
            if watch.stops(z, r):
                return watch.solution(z)
            if last is not None:
                place = (k - 1) % self.memory
                dz[:, place], dr[:, place] = z - last[0], r - last[1]
            last = z, r
            used = min(k, self.memory)
            step = self.damping * r
            if used:
                gamma = _least_squares(dr[:, :used], r)
                step = step - torch.einsum("nk,nkd->nd", gamma, dz[:, :used] + self.damping * dr[:, :used])
            z = torch.where(watch.active, z + step, z)
        watch.stops(z, residual(z))
        return watch.solution(z)


@dataclass(frozen=True)
class Gmres:
    """Restarted GMRES (Saad & Schultz 1986, doi:10.1137/0907058) for a linear r; solves J_r s = -r(initial).

    krylov: dimensions before a restart; up to as many vectors of z's size are held while it runs.
    """

    krylov: int = 30
    restarts: int = 10

    def __post_init__(self) -> None:
        _at_least_one(krylov=self.krylov, restarts=self.restarts)

    @property
    def name(self) -> str:
        return f"GMRES({self.krylov})"

    def solve(self, residual: Map, initial: Tensor, tol: float, derivative: Derivative) -> Solution:
        z, watch, product = initial, _Watch(initial, tol), _negative(derivative(initial))
        for _ in range(self.restarts):
            r = residual(z)
            if watch.stops(z, r):
                return watch.solution(z)
            s = gmres(product, torch.where(watch.active, r, 0), tol * watch.scale, self.krylov)
            z = torch.where(watch.active, z + s, z)
        watch.stops(z, residual(z))
        return watch.solution(z)


@dataclass(frozen=True)
class NewtonKrylov:
    """Inexact Newton, J_r s = -r by GMRES (Knoll & Keyes 2004, doi:10.1016/j.jcp.2003.08.010), with backtracking.

    krylov:  dimensions of each linear solve. forcing: |J_r s + r| <= forcing |r|.
    halvings: how often a sample's step is halved while it does not reduce its residual.
    """

    krylov: int = 30
    forcing: float = 1e-2
    halvings: int = 6
    max_iterations: int = 30

    def __post_init__(self) -> None:
        _at_least_one(krylov=self.krylov, max_iterations=self.max_iterations)
        if not 0 < self.forcing < 1 or self.halvings < 0:
            raise ValueError(
                f"got forcing={self.forcing}, halvings={self.halvings}; accepted: forcing in (0, 1), halvings from 0 on"
            )

    @property
    def name(self) -> str:
        return f"Newton-GMRES({self.krylov})"

    def solve(self, residual: Map, initial: Tensor, tol: float, derivative: Derivative) -> Solution:
        z, watch = initial, _Watch(initial, tol)
        r = residual(z)
        for _ in range(self.max_iterations):
            if watch.stops(z, r):
                return watch.solution(z)
            product = _negative(derivative(z))
            # no more exactly than what is asked of r in the end
            wanted = torch.maximum(self.forcing * _norm(r), 0.5 * tol * watch.scale)
            s = gmres(product, torch.where(watch.active, r, 0), wanted, self.krylov)
            z, r = self._move(residual, z, r, torch.where(watch.active, s, 0), watch.active)
        watch.stops(z, r)
        return watch.solution(z)

    def _move(self, residual: Map, z: Tensor, r: Tensor, s: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.ones_like(z[:, :1])
        for halving in range(self.halvings + 1):
            trial = z + share * s
            found = residual(trial)
            worse = active & ~(_norm(found) < _norm(r))  # true for NaN
            if halving == self.halvings or not bool(worse.any()):
                break
            share = torch.where(worse, share / 2, share)
        return trial, found


class _Watch:
    """Which samples go on, and how they came there."""

    def __init__(self, initial: Tensor, tol: float) -> None:
        self._tol = tol
        self.active = torch.ones_like(initial[:, :1], dtype=torch.bool)  # [N, 1]
        self.scale = torch.zeros_like(initial[:, :1])  # [N, 1]
        self._first: Tensor | None = None
        self._history: list[Tensor] = []
        self._iterations = torch.zeros(len(initial), dtype=torch.int64, device=initial.device)
        self._converged = torch.zeros_like(self.active)

    def stops(self, z: Tensor, r: Tensor) -> bool:
        """Notes r(z); whether every sample has converged or left the finite numbers."""
        size, residual = _norm(z + r), _norm(r)
        if self._first is None:
            self._first = size
        else:
            self._iterations += self.active[:, 0]
        self.scale = torch.maximum(self._first, size)
        relative = torch.where(residual == 0, residual, residual / self.scale)
        if self._history:
            relative = torch.where(self.active, relative, self._history[-1])
        self._history.append(relative)
        self._converged |= self.active & (relative <= self._tol)
        self.active = self.active & ~self._converged & relative.isfinite()
        return not bool(self.active.any())

    def solution(self, z: Tensor) -> Solution:
        residuals = torch.stack(self._history)[:, :, 0]
        return Solution(z, residuals, self._converged[:, 0], self._iterations, self._tol)


def gmres(product: Map, b: Tensor, wanted: Tensor, krylov: int) -> Tensor:
    """s with |A s - b| <= wanted, each row on its own, or the best of `krylov` dimensions.

    product: v -> A v of [N, D]. b: [N, D]. wanted: [N, 1].
    """
    beta = _norm(b)
    space = Krylov(b, krylov)
    right = torch.zeros(len(b), space.most + 1, 1, dtype=b.dtype, device=b.device)
    right[:, 0] = beta
    y = torch.zeros_like(right[:, 1:])
    active = (beta > 0) & ~(beta <= wanted)  # [N, 1]
    for k in range(1, space.most + 1):
        if not bool(active.any()):
            break
        space.extend(product)
        h = space.h[:, : k + 1, :k]
        active = active & h.isfinite().flatten(1).all(1, keepdim=True)
        # a row whose space is exhausted has columns of zeros, and one that has stopped may have anything
        best = torch.linalg.pinv(torch.where(active[:, :, None], h, 0)) @ right[:, : k + 1]
        y[:, :k] = torch.where(active[:, :, None], best, y[:, :k])
        left = _norm((h @ best - right[:, : k + 1])[:, :, 0])
        active = active & ~(left <= wanted)
    return torch.einsum("nkd,nko->nd", space.v[:, : space.size], y[:, : space.size])


class Krylov:
    """Arnoldi's orthonormal basis of span(b, A b, A^2 b, ...), each row on its own: A V_k = V_{k+1} H.

    v: [N, at most `most` + 1, D], grown as needed. h: [N, most + 1, most]. Gram-Schmidt is done twice, which keeps the
    basis orthogonal to rounding (Giraud et al. 2005, doi:10.1007/s00211-005-0615-4).
    """

    def __init__(self, b: Tensor, most: int) -> None:
        n, d = b.shape
        self.most, self.size = min(most, d), 0
        self.v = b.new_zeros(n, min(self.most + 1, 8), d)
        self.h = b.new_zeros(n, self.most + 1, self.most)
        self.v[:, 0] = _over(b, _norm(b))

    def extend(self, product: Map) -> None:
        k = self.size
        if k + 1 == self.v.shape[1]:
            self.v = torch.cat([self.v, torch.zeros_like(self.v)], 1)[:, : self.most + 1]
        w = product(self.v[:, k])
        before = _norm(w)
        basis = self.v[:, : k + 1]
        for _ in range(2):
            along = torch.einsum("nkd,nd->nk", basis, w)
            w = w - torch.einsum("nk,nkd->nd", along, basis)
            self.h[:, : k + 1, k] += along
        left = _norm(w)
        # what is left of an exhausted space is rounding
        left = torch.where(left > 10 * torch.finfo(w.dtype).eps * before, left, 0)
        self.h[:, k + 1, k] = left[:, 0]
        self.v[:, k + 1] = _over(w, left)
        self.size = k + 1


def tolerance(tol: float | None, dtype: torch.dtype) -> float:
    """tol, or the dtype's own. Raises ValueError."""
    if tol is None:
        return TOLERANCES[dtype]
    if not 0 < tol < 1:
        raise ValueError(f"tol is {tol!r}; accepted: a relative residual in (0, 1), or None for the dtype's own")
    return tol


def report_failure(what: str, solver: Solver, solution: Solution, on_failure: OnFailure) -> None:
    """Raises ConvergenceError, or warns, where a sample has not converged; says which, and how its residual went."""
    if bool(solution.converged.all()):
        return
    failed = (~solution.converged).nonzero()[:, 0]
    last = solution.residuals[-1].nan_to_num(nan=float("inf"), posinf=float("inf"))
    worst = int(last.argmax())
    history = solution.residuals[:, worst].tolist()
    shown = [f"{r:.1e}" for r in (history if len(history) <= 6 else [*history[:3], *history[-3:]])]
    if len(history) > 6:
        shown.insert(3, "...")
    message = (
        f"{what} by {solver.name} has not converged for {len(failed)} of {len(last)} samples after "
        f"{int(solution.iterations.max())} iterations: the relative residual of sample {worst} went "
        f"{', '.join(shown)}, wanted {solution.tol:.1e}; take a smaller step or a more contractive branch, another "
        "solver (NewtonKrylov needs no contraction), more iterations or a larger tol"
    )
    if on_failure == "raise":
        raise ConvergenceError(message, solution)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)


def check_on_failure(on_failure: str) -> None:
    if on_failure not in ("raise", "warn"):
        raise ValueError(f"on_failure is {on_failure!r}; accepted: 'raise', 'warn'")


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"got {name}={count}; accepted: at least 1")


def _negative(product: Map) -> Map:
    return lambda v: -product(v)


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _over(rows: Tensor, norms: Tensor) -> Tensor:
    return torch.where(norms > 0, rows / norms, 0)


def _least_squares(columns: Tensor, r: Tensor) -> Tensor:
    """argmin |r - columns^T gamma| of [N, k, D] and [N, D], in double: the normal equations of columns of norm 1."""
    norms = torch.linalg.vector_norm(columns, dim=2, keepdim=True)
    units = torch.where(norms > 0, columns / norms, 0)
    gram = torch.einsum("nkd,njd->nkj", units, units).double()
    right = torch.einsum("nkd,nd->nk", units, r).double()
    rtol = 1e-12 if r.dtype == torch.float64 else 1e-6
    gamma = torch.linalg.pinv(gram, rtol=rtol, hermitian=True) @ right[:, :, None]
    return torch.where(norms > 0, gamma.to(r.dtype) / norms, 0)[:, :, 0]
