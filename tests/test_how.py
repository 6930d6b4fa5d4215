"""How a block runs on a GPU: what is asked for, what C++ is told, and which ways differ."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from blocks import block

from resnet_fused import how, operators
from resnet_fused.how import Way, Wish

HEADER = Path(__file__).parent.parent / "csrc" / "block_spec.h"


@pytest.fixture(params=["ieee", "tf32"])
def precision(request: pytest.FixtureRequest) -> str:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    request.addfinalizer(lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", before))
    return request.param


def code(enum: str, name: str) -> int:
    """Of a name in one of csrc/block_spec.h's enums."""
    (body,) = re.findall(rf"enum class {enum} : int64_t {{([^}}]+)}}", HEADER.read_text())
    return int(re.findall(rf"\b{name} = (\d+)", body)[0])


@pytest.mark.parametrize("wish", [Wish(*pair) for pair in product((None, *how.MODES), (None, *how.LIBRARIES))], ids=str)
def test_encoding_is_what_cpp_decodes(wish: Wish, precision: str) -> None:
    launch, library = code("Launch", wish.mode or "choose"), code("Library", wish.library or "choose")
    assert how.encode(wish) == launch | library << 2 | (precision == "tf32") << 4


def test_the_encoding_reaches_the_operators() -> None:
    _, _, spec = block().build()
    ints, eps = spec.encode(how.encode(Wish("phased", "all")))
    assert ints[4] == 2 | 3 << 2
    assert operators.decode(ints, eps) == spec


def test_what_is_asked_for_is_nested_and_undone() -> None:
    assert how.asked() == (None, None)
    with how.launch_mode("single"):
        with how.library_convolutions("all"), how.launch_mode("phased"):
            assert how.asked() == ("phased", "all")
        assert how.asked() == ("single", None)
        with pytest.raises(KeyError), how.library_convolutions("none"):
            raise KeyError
    assert how.asked() == (None, None)


WAYS = {
    "spatial beside others": ([3, 1], [], ["none", "spatial", "all"]),
    "all spatial": ([3, 3], [], ["none", "spatial"]),
    "none spatial": ([1, 1], [], ["none", "all"]),
    "the spatial one is the library's": ([3, 1], [0], ["none", "all"]),
    "all are the library's": ([3, 1], [0, 1], ["none"]),
}


@pytest.mark.parametrize(("kernels", "always", "libraries"), WAYS.values(), ids=WAYS)
def test_ways_differ(kernels: list[int], always: list[int], libraries: list[str]) -> None:
    weights = [torch.empty(6, 6, k, k) for k in kernels]
    assert how.ways(weights, frozenset(always)) == [Way(*pair) for pair in product(how.MODES, libraries)]  # type: ignore[arg-type]
