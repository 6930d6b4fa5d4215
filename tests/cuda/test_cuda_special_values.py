"""NaN, infinity, and zero at a ReLU go where the formula lets them."""

from __future__ import annotations

import pytest
import torch
from support.blocks import bottleneck, frozen
from support.emulated_blocks import block
from support.emulated_checks import LARGE, SMALL, Checks, devices
from support.matrix import HALVES
from support.named_tensors import is_buffer
from support.runs import run, run_exact

from resnet_fused.params import map_tensors


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("batch_stats", [True, False])
def test_nan_goes_where_the_formula_lets_it(
    batch_stats: bool, order: str, dtype: torch.dtype, device: tuple[int, int], check: Checks
) -> None:
    check.set(device=device)
    case = block(2, "identity", order=order, size=(9, 8), batch_stats=batch_stats)  # type: ignore[arg-type]
    x, params, spec = case.build(dtype)
    x[1, 2, 4, 3] = torch.nan
    dout = case.upstream(dtype)
    got, exact = run(x, params, spec, "emulated", dout), run_exact(x, params, spec, dout)
    assert got["out"].isnan().any()  # type: ignore[union-attr]
    for name, value in exact.items():
        assert torch.equal(got[name].isnan(), value.isnan()), name  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float32, SMALL), (torch.bfloat16, SMALL), (torch.float16, LARGE)], ids=str
)
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
@pytest.mark.parametrize("order", ["post", "pre"])
def test_nan_survives_evaluation(
    order: str, skip: str, dtype: torch.dtype, device: tuple[int, int], check: Checks
) -> None:
    """Through every ReLU, and no further than its window."""
    check.set(device=device)
    for stages in (1, 3):
        case = block(stages, skip, order=order, size=(19, 10), batch_stats=False)  # type: ignore[arg-type]
        x, params, spec = case.build(dtype)
        x[1, 2, 4, 3] = torch.nan
        got, exact = run(x, params, spec, "emulated")["out"], run_exact(x, params, spec)["out"]
        assert torch.equal(got.isnan(), exact.isnan()) and got.isnan().any() and not got.isnan().all()  # type: ignore[union-attr]


@devices
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
def test_infinity_goes_where_the_formula_lets_it(
    skip: str, value: float, dtype: torch.dtype, device: tuple[int, int], check: Checks
) -> None:
    """In 16 bits. The two parts of a float32 weight may differ in sign, and then make NaN of an infinity."""
    check.set(device=device)
    case = frozen(bottleneck(skip, channels=24, width=8, stride=1, size=(9, 8)))
    x, params, spec = case.build(dtype)
    params = map_tensors(params, lambda n, t: t if is_buffer(n) else t.abs())  # of two signs it would make NaN
    x[0, 1, 4, 3] = value
    exact = run_exact(x, params, spec)["out"]
    assert exact.isinf().any() == (value > 0)  # type: ignore[union-attr]
    for dout in (None, case.upstream(dtype)):
        got = run(x, params, spec, "emulated", dout)["out"]
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got), kind(exact)), kind  # type: ignore[arg-type]


def test_relu_has_no_gradient_at_zero(check: Checks) -> None:
    """gamma = beta = 0 and x = 0 put every ReLU exactly at 0, where nothing but the skip path may pass."""
    check.set()
    for order in ("post", "pre"):
        for skip in ("none", "identity"):
            case = block(2, skip, order=order)  # type: ignore[arg-type]
            x, params, spec = case.build(torch.float32)
            params = map_tensors(params, lambda n, t: t * 0 if "norm_" in n else t)
            got = run(x * 0, params, spec, "emulated", case.upstream(torch.float32))
            for name, value in got.items():
                if not name.startswith("grad"):
                    continue
                if name == "grad of x" and order == "pre" and skip == "identity":
                    assert torch.equal(value, case.upstream(torch.float32))  # type: ignore[arg-type]
                else:
                    assert not value.any(), name  # type: ignore[union-attr]
