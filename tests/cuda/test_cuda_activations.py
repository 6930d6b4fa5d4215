"""Every activation in every place of a block, by the CUDA kernels run on a CPU (tests/emulator)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.blocks import Case
from support.blocks import block as any_block
from support.eager_crashes import eager_may_crash
from support.emulated_checks import LARGE, SMALL, Checks
from support.frozen_blocks import gradients
from support.matrix import family
from support.random_blocks import EVERY, cases
from torch import Tensor

from resnet_fused.params import BlockParams, map_tensors
from resnet_fused.spec import Activation, BlockSpec
from resnet_fused.spec.activations import KINDS

# With a negative slope the output does not tell the sign of the argument.
ACTS = [*map(Activation, KINDS), Activation("leaky_relu", 0.1), Activation("leaky_relu", -0.2)]
acts = pytest.mark.parametrize("act", ACTS, ids=lambda act: f"{act.name}{act.parameter or ''}")
# Each runs in few phases, or one launch each; or with the library's convolutions.
MODES = {"single": ("single", "none", SMALL), "phased": ("phased", "none", LARGE), "library": ("single", "all", SMALL)}
# What reads the last activation differs with the order and the skip path.
PLACES: dict[str, dict[str, Any]] = {
    "post, identity": {"skip": "identity"},
    "post, projection": {"skip": "projection"},
    "post, none": {"skip": "none"},
    "pre": {"skip": "projection", "order": "pre"},
    "branch": {"skip": "identity", "order": "branch"},
    "branch, projection": {"skip": "projection", "order": "branch"},
}
places = pytest.mark.parametrize("place", PLACES)
block = partial(any_block, 2, channels=8, width=8, kernel=1, size=(7, 8), batch=4)


@dataclass(frozen=True)
class PerChannel(Case):
    """A case whose slopes are one for each channel, from `lowest` to `highest`."""

    lowest: float = -0.3
    highest: float = 0.4

    @staticmethod
    def of(case: Case, **slopes: float) -> PerChannel:
        return PerChannel(**{field.name: getattr(case, field.name) for field in fields(case)}, **slopes)

    def build(self, *args: Any, **kwargs: Any) -> tuple[Tensor, BlockParams, BlockSpec]:
        x, params, spec = super().build(*args, **kwargs)
        channels = self.sources if spec.order == "pre" else self.widths

        def change(name: str, tensor: Tensor) -> Tensor:
            if not name.endswith(".slope"):
                return tensor
            return torch.linspace(self.lowest, self.highest, channels[int(name.split(".")[1])]).to(tensor.dtype)

        return x, map_tensors(params, change), spec


def both_slopes(case: Case) -> list[Case]:
    learns = any(stage.activation.kind.learned for stage in case.spec.convs)
    return [case, PerChannel.of(case)] if learns else [case]


@acts
@places
@pytest.mark.parametrize("mode", MODES)
def test_training(act: Activation, place: str, mode: str, check: Checks) -> None:
    launch, library, device = MODES[mode]
    for case in both_slopes(block(**PLACES[place], act=act)):
        check.trains(case, launch, library=library, device=device, seeds=range(8))


@acts
@places
@pytest.mark.parametrize("mode", MODES)
def test_evaluation(act: Activation, place: str, mode: str, check: Checks) -> None:
    launch, library, device = MODES[mode]
    for case in both_slopes(block(**PLACES[place], act=act, branch_scale="[C]", bias=True)):
        launched = check.evaluates(case, launch, library=library, device=device, seeds=range(2))
        # between a projection and an activation before the addition nothing may be summed up
        activated = place == "branch, projection" and act.name != "identity"
        assert ("chain" in launched) == (mode == "single" and not activated)


@acts
@pytest.mark.parametrize("place", ["post, projection", "branch, projection"])
def test_scales_and_recomputed_outputs(act: Activation, place: str, check: Checks) -> None:
    """More sums than a pass has room for: those of both scales, both norms and a slope."""
    for case in both_slopes(
        block(**PLACES[place], act=act, branch_scale="[C]", skip_scale="0-d", memory="low", bias=True)
    ):
        check.trains(case, seeds=range(4))


@pytest.mark.parametrize("name", ["relu6", "prelu", "gelu"])
@pytest.mark.parametrize("place", ["post, identity", "pre", "branch"])
@pytest.mark.parametrize("norm", [True, False], ids=["constant statistics", "no norm"])
def test_without_batch_statistics(norm: bool, place: str, name: str, check: Checks) -> None:
    case = block(**PLACES[place], act=name, batch_stats=False, norm=norm, branch_scale="0-d", skip_scale="[C]")
    check.trains(case, "phased", seeds=range(4))


@pytest.mark.parametrize("place", PLACES)
def test_nothing_but_slopes(place: str, check: Checks) -> None:
    """Their gradients do not lean on what the others need."""
    check.set("single")
    for frozen in (False, True):
        case = PerChannel.of(block(**PLACES[place], act="prelu", batch_stats=not frozen, branch_scale="[C]"))
        x, params, spec = case.build(torch.float32, torch.channels_last)
        got, expected = (
            gradients(x, params, spec, backend, case.upstream(torch.float32), lambda name: "slope" in name)
            for backend in ("emulated", "eager")
        )
        assert len(got) == 3
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("identity", "relu")])
@pytest.mark.parametrize("place", ["post, projection", "pre", "branch"])
def test_in_16_bits(place: str, name: str, dtype: torch.dtype, check: Checks) -> None:
    """relu's are in the other files."""
    check.trains(block(**PLACES[place], act=name, size=(15, 16)), dtype=dtype, norm_dtype=torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_channels_that_are_no_pack(place: str, check: Checks) -> None:
    """Convolutions are the library's, passes read values one by one."""
    for name in ("hardswish", "prelu"):
        case = any_block(2, channels=5, width=3, kernel=1, size=(7, 8), batch=3, act=name, **PLACES[place])
        check.trains(case)


@settings(family, max_examples=15)
@given(
    case=cases(values=48, **EVERY),
    mode=st.sampled_from(list(MODES)),
)
def test_any_block_in_evaluation(case: Case, mode: str, check: Checks) -> None:
    assume(not any(map(eager_may_crash, case.spec.convs, case.kernels)))
    launch, library, device = MODES[mode]
    check.evaluates(case, launch, library=library, device=device)
