"""One call of a block, forward or with its backward: every result by name, by a backend and exactly."""

from __future__ import annotations

from support.equivalence import Results
from support.gates import SqueezeExcitation
from support.named_tensors import is_buffer, leaves, named_tensors, to_double
from torch import Tensor

from resnet_fused import functional
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec


def run(
    x: Tensor,
    params: BlockParams,
    spec: BlockSpec,
    backend: str,
    dout: Tensor | None = None,
    gate: SqueezeExcitation | None = None,
) -> Results:
    """The output, the gradient of x and of each parameter if `dout` is given, and the buffers afterwards.

    Nothing given is changed.
    """
    x, params = x.detach().requires_grad_(dout is not None), leaves(params, lambda name: dout is not None)
    gate = gate and gate.leaf(dout is not None)
    out = functional.residual_block(x, params, spec, gate=gate, backend=backend)
    results: Results = {"out": out.detach()}
    if dout is not None:
        out.backward(dout)
        results["grad of x"] = x.grad
        if gate is not None:
            results |= {"grad of gate.down": gate.down.grad, "grad of gate.up": gate.up.grad}
    for name, tensor in named_tensors(params).items():
        if is_buffer(name):
            results[name] = tensor
        elif dout is not None:
            results[f"grad of {name}"] = tensor.grad
    return results


def run_exact(
    x: Tensor, params: BlockParams, spec: BlockSpec, dout: Tensor | None = None, gate: SqueezeExcitation | None = None
) -> Results:
    """`run` of the reference formula in fp64, on the same values."""
    dout, gate = dout if dout is None else dout.double(), gate and gate.double()
    return run(x.double(), to_double(params), spec, "eager", dout, gate)
