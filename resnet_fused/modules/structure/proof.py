"""Whether a recipe computes what its block computes: both run beside each other on random input, in float64.

That a graph was traced does not make it right: a forward may read what is no tensor, or a child compute something else
than its class says. So outputs, the gradients of the input and of every parameter, and every buffer are compared. Both
are copies with random values of their own, since a block whose last norm begins at zero hides its whole branch.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import is_norm
from resnet_fused.modules.fused_block import FusedModule, eject
from resnet_fused.modules.module_state import HOOKS
from resnet_fused.modules.plan import describe_all
from resnet_fused.modules.structure.recipe import Recipe, build
from resnet_fused.modules.structure.trace import unmoved_random_numbers

IMAGES = 2
SIZES = ((7, 5), (8, 12), (33, 31))  # odd first: strided slices and poolings round
LIMIT = 1e-9  # of the largest value; rounding is 1e-16, and a norm of few values multiplies it
Values = dict[str, Tensor | None]


def prove(block: nn.Module, recipe: Recipe) -> None:
    """In the block's present mode, which stays as it is, as do random numbers. Raises NotFusable, saying what differs
    by how much."""
    with (
        unmoved_random_numbers(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        if any(tensor.is_meta for tensor in block.state_dict().values()):
            raise NotFusable("its tensors are on the meta device: no match can be proven before they have values")
        try:
            eager = _stand_in(block)
        except Exception as error:  # an uninitialised parameter, a class without copies
            raise NotFusable(f"it has no copy in float64, so no match can be proven: {_first_line(error)}") from error
        x, expected = _first_that_runs(eager)
        twin = copy.deepcopy(eager)
        try:
            modules = describe_all(build(recipe, twin), "default")
            got = _run(twin, lambda given: modules.run(given, "eager"), x)
        except NotFusable:
            raise
        except Exception as error:  # whatever the parts of a wrong match do with each other's results
            raise NotFusable(f"what was matched cannot be run: {_first_line(error)}") from error
    _compare(got, expected)


def _stand_in(block: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, unfused and without hooks, with random values."""
    copied = copy.deepcopy(block)
    for module in copied.modules():
        if isinstance(module, FusedModule):
            eject(module)
        if type(module) is nn.SyncBatchNorm:  # would wait for other processes
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
        for kind in HOOKS:
            getattr(module, kind).clear()
    copied = copied.to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for parameter in copied.parameters():
            size = float(parameter.square().mean().sqrt())
            parameter.add_(random(parameter), alpha=size or 0.3)
        for module in copied.modules():
            if is_norm(module):
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.is_floating_point():
                        buffer.copy_(
                            random(buffer).abs() + 0.5 if name in ("weight", "running_var") else random(buffer)
                        )
    return copied


def _first_that_runs(block: nn.Module) -> tuple[Tensor, Values]:
    """(a picture that the block takes, its results): of as many channels as one of its layers."""
    reason = "it has no layer that tells its channels"
    state = copy.deepcopy(block.state_dict())
    for channels, size in itertools.product(_channels(block), SIZES):
        x = torch.randn(IMAGES, channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        try:
            values = _run(copy.deepcopy(block), None, x)
        except NotFusable:
            raise
        except Exception as error:
            reason = _first_line(error)
            continue
        block.load_state_dict(state)
        return x, values
    raise NotFusable(f"it does not run on random pictures, so no match can be proven: {reason}")


def _channels(block: nn.Module) -> list[int]:
    """Those that the input may have, the likeliest first: of a split input each part has fewer."""
    found = [
        int(count)
        for module in block.modules()
        if isinstance(count := getattr(module, "in_channels", getattr(module, "num_features", None)), int)
    ]
    return list(dict.fromkeys([*found, *(2 * count for count in found[:1])]))


def _run(block: nn.Module, forward: object, x: Tensor) -> Values:
    """Every result by name. forward: in place of the block's."""
    torch.manual_seed(0)  # for dropouts
    leaf = x.clone().requires_grad_()
    given = leaf.clone()  # a leaf may not be written to
    out = (forward or block.forward)(given)  # type: ignore[operator]
    if not isinstance(out, Tensor):
        raise NotFusable(f"its forward returns {type(out).__name__}; accepted: one tensor")
    if not torch.equal(given, x):
        raise NotFusable("its forward writes to its input")
    if out.requires_grad:
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype))
    values: Values = {"output": out.detach(), "gradient of the input": leaf.grad}
    values |= {f"gradient of {name}": parameter.grad for name, parameter in block.named_parameters()}
    return values | dict(block.named_buffers())


def _compare(got: Values, expected: Values) -> None:
    largest = max((float(value.abs().max()) for name, value in _gradients(expected)), default=0.0)
    for name, value in expected.items():
        ours = got[name]
        if value is None or ours is None:
            if value is not ours:
                raise NotFusable(f"the proof of its match failed: {'no ' if ours is None else 'a '}{name}")
            continue
        if ours.shape != value.shape or ours.dtype != value.dtype:
            raise NotFusable(f"the proof of its match failed: {name} is {tuple(ours.shape)}, not {tuple(value.shape)}")
        if not value.numel():
            continue
        difference = float((ours.double() - value.double()).abs().max())
        size = float(value.abs().max())
        if name.startswith("gradient"):
            size = max(size, 1e-3 * largest)  # one that vanishes is rounding
        if not difference <= LIMIT * size:
            share = difference / size if size else float("inf")
            raise NotFusable(f"the proof of its match failed: {name} differs by {share:.2g} of its largest value")


def _gradients(values: Values) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in values.items() if name.startswith("gradient") and value is not None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
