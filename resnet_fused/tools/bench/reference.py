"""Whether a contender computes what the model says, before it is timed: its error against eager float32."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from resnet_fused.tools.bench.contenders import Prepared, on_torch
from resnet_fused.tools.bench.task import Task

# what two right implementations may differ by even if eager has no error at all: a float32 sum in another order, and a
# ReLU's mask that it flips, which changes a gradient; on a GPU float32 products are TF32's unless told otherwise
FLOORS = {"cpu": (1e-3, 5e-2), "cuda": (1e-2, 2e-1)}  # of the output and of the gradients


class Errors(NamedTuple):
    """||got - exact|| / ||exact|| of the output and, in training, of all parameters' gradients together."""

    output: float
    gradients: float | None = None


@dataclass(frozen=True)
class Reference:
    """output: float32 [N, classes]; gradients: of every parameter, none in evaluation; limits: accepted `Errors`."""

    output: Tensor
    gradients: list[Tensor]
    limits: Errors

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, labels: Tensor, task: Task) -> Reference:
        """model: eager float32, as `Task.build` gives it; unchanged."""
        plain = Task(mode=task.mode, device=task.device)
        exact = on_torch(copy.deepcopy(model), x, labels, plain)
        output = exact.step().float().clone()
        gradients = [p.grad.float() for p in exact.parameters if p.grad is not None]
        found = cls(output, gradients, Errors(0.0, 0.0))
        eager = Errors(0.0, 0.0)
        if task.dtype != "float32":
            eager = found.errors(on_torch(*task.cast(copy.deepcopy(model), x), labels, task))
        floors = FLOORS["cuda" if x.is_cuda else "cpu"]
        limits = [limit(error or 0.0, floor) for error, floor in zip(eager, floors, strict=True)]
        return cls(output, gradients, Errors(*limits))

    def errors(self, prepared: Prepared) -> Errors:
        """Runs one step. A contender without parameters is taken by its output alone."""
        output = _distance([prepared.step()], [self.output])
        given = [p.grad for p in prepared.parameters if p.grad is not None]
        if not self.gradients or not prepared.parameters:
            return Errors(output)
        return Errors(output, _distance(given, self.gradients))

    def refusal(self, errors: Errors) -> str | None:
        """Why such a contender is not timed, or None."""
        for what, error, most in zip(Errors._fields, errors, self.limits, strict=True):
            if error is not None and most is not None and not error <= most:  # NaN is refused
                return f"wrong {what}: relative error {error:.1e} against eager float32, accepted {most:.1e}"
        return None


def limit(eager: float, floor: float) -> float:
    """Of a relative error: three times eager's own in the same dtype, but less than 1, which is the error of zeros.

    Where eager itself is off by all of it (batch norms of two values, say) nothing can be told but NaN.
    """
    return max(floor, min(3 * eager, (1 + eager) / 2)) if eager < 1 else 100 * eager


def _distance(given: list[Tensor], exact: list[Tensor]) -> float:
    if [t.shape for t in given] != [t.shape for t in exact]:
        return float("inf")
    off = sum(float((g.float().to(e.device) - e).square().sum()) for g, e in zip(given, exact, strict=True))
    return float((off / sum(float(e.square().sum()) for e in exact)) ** 0.5)
