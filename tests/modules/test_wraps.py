"""What is wrapped around a block's parts: hooks, parametrizations, pruning, adapters of fine-tuning.

A block whose part computes more than its class does runs its own forward while that is so, `explain` says why, and
it is fused again afterwards. Results are eager's all the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.small_net import picture, small_net
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from resnet_fused import explain, fuse

CLOSE = {"rtol": 1e-9, "atol": 1e-10}  # float64


class LowRank(nn.Module):
    """conv(x) + up(down(x)), as LoRA wraps a convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.down = nn.Conv2d(conv.in_channels, 2, 1, conv.stride, bias=False).double()  # type: ignore[arg-type]
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.up(self.down(x))


class Wrap(NamedTuple):
    """on, off: given a block. reason: part of what `explain` gives while it is on; None: the block stays fused."""

    on: Callable[[Any], object]
    off: Callable[[Any], object]
    reason: str | None


def unregister(block: nn.Module) -> None:
    for module in block.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, kind).clear()
        module._is_full_backward_hook = None


def unparametrize(block: Any) -> None:
    parametrize.remove_parametrizations(block.conv2, "weight")


def absorb(block: Any) -> None:
    """Fold a norm into its convolution, as for deployment."""
    was = block.bn2.training
    block.conv2.eval(), block.bn2.eval()
    block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
    block.train(was)


WRAPS: dict[str, Wrap] = {
    "forward hook on the block": Wrap(
        lambda b: b.register_forward_hook(lambda m, args, out: 2 * out), unregister, None
    ),
    "forward pre-hook on the block": Wrap(
        lambda b: b.register_forward_pre_hook(lambda m, args: (2 * args[0],)), unregister, None
    ),
    "backward hook on the block": Wrap(
        lambda b: b.register_full_backward_hook(lambda m, grads, _: (2 * grads[0],)), unregister, None
    ),
    "backward pre-hook on the block": Wrap(
        lambda b: b.register_full_backward_pre_hook(lambda m, grads: (2 * grads[0],)), unregister, None
    ),
    "backward hook on a part": Wrap(
        lambda b: b.conv2.register_full_backward_hook(lambda m, grads, _: (2 * grads[0],)), unregister, "has hooks"
    ),
    "forward hook on a norm": Wrap(
        lambda b: b.bn1.register_forward_hook(lambda m, args, out: 2 * out), unregister, "has hooks"
    ),
    "hook on a parameter": Wrap(
        lambda b: setattr(b, "handle", b.conv1.weight.register_hook(lambda grad: 2 * grad)),
        lambda b: b.handle.remove(),
        None,
    ),
    "weight norm": Wrap(lambda b: parametrizations.weight_norm(b.conv2), unparametrize, "conv is ParametrizedConv2d"),
    "spectral norm": Wrap(
        lambda b: parametrizations.spectral_norm(b.conv2), unparametrize, "conv is ParametrizedConv2d"
    ),
    "orthogonal": Wrap(lambda b: parametrizations.orthogonal(b.conv2), unparametrize, "conv is ParametrizedConv2d"),
    "weight norm by a hook": Wrap(
        lambda b: old_weight_norm(b.conv2), lambda b: nn.utils.remove_weight_norm(b.conv2), "has hooks"
    ),
    "spectral norm by a hook": Wrap(
        lambda b: old_spectral_norm(b.conv2), lambda b: nn.utils.remove_spectral_norm(b.conv2), "has hooks"
    ),
    "pruning": Wrap(
        lambda b: prune.l1_unstructured(b.conv1, "weight", 0.5),  # type: ignore[no-untyped-call]
        lambda b: prune.remove(b.conv1, "weight"),  # type: ignore[no-untyped-call]
        "has hooks",
    ),
    "structured pruning of a norm": Wrap(
        lambda b: prune.random_unstructured(b.bn1, "weight", 0.5),  # type: ignore[no-untyped-call]
        lambda b: prune.remove(b.bn1, "weight"),  # type: ignore[no-untyped-call]
        "has hooks",
    ),
    "low-rank adapter": Wrap(
        lambda b: setattr(b, "conv2", LowRank(b.conv2)), lambda b: setattr(b, "conv2", b.conv2.conv), "conv is LowRank"
    ),
    "a norm folded away": Wrap(absorb, lambda b: None, None),
    "frozen parts": Wrap(
        lambda b: [b.conv1.requires_grad_(False), b.bn2.requires_grad_(False)], lambda b: b.requires_grad_(True), None
    ),
}


def results(model: nn.Module) -> dict[str, Any]:
    """Of a training step and of evaluation; the state among them."""
    modes = {module: module.training for module in model.modules()}
    model.zero_grad()
    x = picture().double().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        evaluated = model.eval()(picture().double())
    for module, mode in modes.items():
        module.training = mode
    return {
        "output": out.detach(),
        "gradient": x.grad,
        "gradients": gradients,
        "evaluated": evaluated,
        "state": dict(model.state_dict()),
    }


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", WRAPS)
def test_on_and_off(name: str) -> None:
    wrap, eager = WRAPS[name], small_net().double()
    fused = fuse(copy.deepcopy(eager))
    plain = results(fused)
    torch.testing.assert_close(plain, results(eager), **CLOSE)
    for change in (wrap.on, wrap.off):
        for model in (eager, fused):
            torch.manual_seed(3)
            change(model[1])
        reason = wrap.reason if change is wrap.on else None
        rows = explain(fused)
        assert [row.backend for row in rows] == ["native", "eager" if reason else "native"]
        assert reason is None or reason in rows[1].reason
        torch.testing.assert_close(results(fused), results(eager), **CLOSE)


@pytest.mark.parametrize("train", [True, False])
def test_functional_call_with_other_tensors(train: bool) -> None:
    """Their values count in this call, and the module's own in the next one."""
    eager = small_net().double().train(train)
    fused = fuse(copy.deepcopy(eager))
    x, seen = picture().double(), []
    for model in (eager, fused):
        others = {name: (value + 0.1).detach().requires_grad_(train) for name, value in model.named_parameters()}
        others |= {name: (value + 1).detach() for name, value in model.named_buffers()}
        with torch.set_grad_enabled(train):
            first = model(x)
            out = torch.func.functional_call(model, others, (x,))
        gradients = []
        if train:
            out.square().sum().backward()
            gradients = [others[name].grad for name, _ in model.named_parameters()]
        with torch.no_grad():
            again = copy.deepcopy(model).eval()(x)
        seen.append((first.detach(), out.detach(), gradients, others, again, dict(model.state_dict())))
        assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(seen[1], seen[0], **CLOSE)
    assert not torch.allclose(seen[1][0], seen[1][1])
