"""Whether an installed wheel works: ``python smoke.py`` where torch and the wheel are installed, outside the sources.

A step of training with the fused operators gives eager's loss and gradients, and evaluation eager's output.
"""

from __future__ import annotations

import copy

import torch

import resnet_fused
from resnet_fused.models import resnet18


def main() -> None:
    reason = resnet_fused.backends()["native"]
    assert reason is None, reason
    torch.manual_seed(0)
    plain = resnet18(fused=False, num_classes=10)
    x = torch.randn(2, 3, 64, 64)
    results = []
    for fused in (False, True):
        model = copy.deepcopy(plain)
        if fused:
            resnet_fused.fuse(model, backend="native")
        with torch.no_grad():
            evaluated = model.eval()(x)
        loss = model.train()(x).square().mean()
        loss.backward()
        results.append([evaluated, loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-3)
    print(f"resnet_fused {resnet_fused.__version__}, torch {torch.__version__}: fused blocks give what eager gives")


if __name__ == "__main__":
    main()
