"""Numbers of a spec while torch.compile traces: constants of the graph, never inputs of it."""

from __future__ import annotations

import torch


def constant(value: float) -> float:
    """value itself. Under ``dynamic=True`` Dynamo makes a symbol of a float attribute; this asks for its value, and the
    graph is compiled again where it changes."""
    if not torch.compiler.is_compiling():
        return value
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # with sympy; whoever compiles has it loaded

    return guard_scalar(value)
