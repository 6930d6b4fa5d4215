"""Which backend runs a block, and why the others do not.

A backend asked for by name runs or raises `BackendError` with its reason; "auto" takes the first that can and does not
decline, in the order below, and otherwise plain PyTorch. On a GPU every backend declines, except one that `tune` has
measured to be the fastest and faster than PyTorch. `explain` shows the reasons that `auto` met. While a graph is
exported or traced "auto" is plain PyTorch: the graph runs where this package is absent.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from resnet_fused.backends import native, triton
from resnet_fused.backends.how import Way
from resnet_fused.errors import BackendError
from resnet_fused.ops.export import exports_plain
from resnet_fused.ops.operators import Tensors
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec
from resnet_fused.spec.facts import Needs

log = logging.getLogger("resnet_fused")


class Backend(Protocol):
    """What a backend offers; the tensors of forward and backward are documented in `operators`."""

    name: str

    def unavailable(self) -> str | None:
        """Why the backend cannot run on this machine at all, or None."""

    def unsupported(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
        """Why it cannot run this block, or None."""

    def declines(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
        """Why "auto" should pass over it although it could run this block, or None."""

    def ways(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> list[Way]:
        """The ways to run this block among which `tune` may choose; none where there is no choice."""

    def forward(self, spec: BlockSpec, tensors: Tensors, needs: Needs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(out, convolution outputs to save, batch statistics). needs: which gradients `backward` will be asked for."""

    def backward(
        self,
        spec: BlockSpec,
        dout: Tensor,
        out: Tensor | None,
        conv_outputs: list[Tensor],
        batch_stats: list[Tensor],
        tensors: Tensors,
        needs: Needs,
        master: torch.dtype | None = None,
    ) -> Tensors:
        """The gradient of each of `tensors`, None where `needs` is false; those of convolutions' weights and biases in
        `master`, where it is given.
        """

    def infer(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor | None:
        """Evaluation with running statistics and no autograd; params as their owner holds them, before autocast.

        None where folded weights would not be finite.
        """


BACKENDS: dict[str, Backend] = {"native": native.NativeBackend(), "triton": triton.TritonBackend()}
NAMES = ("auto", *BACKENDS, "eager")


def check_name(backend: str) -> None:
    """Raises ValueError for a name that is no backend."""
    if backend not in NAMES:
        raise ValueError(f"unknown backend {backend!r}; accepted: {', '.join(map(repr, NAMES))}")


def select(backend: str, x: Tensor, params: BlockParams, spec: BlockSpec, refusal: str | None = None) -> Backend | None:
    """The backend for this call, None for plain PyTorch ("eager").

    refusal: a reason, known to the caller, that holds for every backend.
    An empty batch always runs in plain PyTorch, so that it behaves as there. Raises ValueError, BackendError.
    """
    check_name(backend)
    if backend == "eager" or x.numel() == 0 or _is_exported(backend):
        return None
    if backend != "auto":
        known = BACKENDS[backend]
        reason = refusal or _reason(known, x, params, spec)
        if reason is not None:
            raise BackendError(f"backend {backend!r} cannot run this block: {reason}. Accepted here: 'auto', 'eager'")
        return known
    for candidate in BACKENDS.values():
        reason = refusal or _reason(candidate, x, params, spec) or candidate.declines(x, params, spec)
        if reason is None:
            return candidate
        _log(candidate.name, reason)
    return None


def reasons(asked: str, x: Tensor, params: BlockParams, spec: BlockSpec) -> dict[str, str | None]:
    """For each backend: why it would not run this block when `asked` is asked for, or None."""
    against = {name: _reason(backend, x, params, spec) for name, backend in BACKENDS.items()}
    if asked == "auto":
        against = {name: reason or BACKENDS[name].declines(x, params, spec) for name, reason in against.items()}
    return against


def select_pool(backend: str, x: Tensor, refusal: str | None = None) -> Backend | None:
    """As `select`, for `max_pool2d`, which only the native CPU backend has."""
    if x.numel() == 0:
        check_name(backend)
        return None
    if x.device.type != "cpu":
        refusal = f"the native backend pools CPU tensors, x is on {x.device}"
    return _select_native("max_pool2d", backend, refusal, "Triton has no pooling kernel")


def takes_gate(backend: str, x: Tensor, refusal: str | None = None) -> bool:
    """Whether a block with a gate is computed in fused parts; else in plain PyTorch. Raises as `select`."""
    check_name(backend)
    if refusal is not None and backend not in ("auto", "eager"):
        raise BackendError(f"backend {backend!r} cannot run this block: {refusal}. Accepted here: 'auto', 'eager'")
    return backend != "eager" and refusal is None and x.numel() > 0 and not _is_exported(backend)


def select_norm(backend: str, x: Tensor, refusal: str | None = None) -> Backend | None:
    """As `select`, for `batch_norm_act`, which the native backend has for CPU and CUDA tensors."""
    refusal = refusal or native.refuses(x)
    return _select_native("batch_norm_act", backend, refusal, "Triton has no kernels of a batch norm on its own")


def _select_native(operator: str, backend: str, refusal: str | None, triton_refusal: str) -> Backend | None:
    """The native backend or None for plain PyTorch, for an operator that no other backend has."""
    check_name(backend)
    if backend == "eager" or _is_exported(backend):
        return None
    chosen = BACKENDS["native"]
    reason = triton_refusal if backend == "triton" else chosen.unavailable() or refusal
    if reason is None:
        return chosen
    if backend != "auto":
        raise BackendError(f"backend {backend!r} cannot run {operator}: {reason}. Accepted here: 'auto', 'eager'")
    _log(chosen.name, reason)
    return None


def _is_exported(backend: str) -> bool:
    return backend == "auto" and exports_plain()


def _reason(backend: Backend, x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
    return backend.unavailable() or backend.unsupported(x, params, spec)


def _log(name: str, reason: str) -> None:
    if not torch.compiler.is_compiling():  # where a message would end the graph
        _log_once(name, reason)


@lru_cache(maxsize=1024)  # reasons name shapes; a reason that has fallen out of the cache is logged again
def _log_once(name: str, reason: str) -> None:
    log.info("backend %s is not used: %s", name, reason)
