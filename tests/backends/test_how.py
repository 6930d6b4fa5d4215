"""How a block runs on a GPU: what is asked for, what C++ is told, and which ways differ."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from itertools import product
from pathlib import Path

import pytest
import torch
from support.blocks import block

from resnet_fused.backends import how
from resnet_fused.backends.how import Way, Wish
from resnet_fused.ops import operators

HEADER = Path(__file__).parents[2] / "csrc" / "block" / "spec.h"


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    """Those of float32's precision, put back after each test."""
    places = (torch.backends, torch.backends.cudnn, torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    yield
    torch.backends.cudnn.allow_tf32 = True  # the old flag first: it writes the new ones
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


@pytest.fixture(params=["ieee", "tf32"])
def precision(request: pytest.FixtureRequest) -> str:
    torch.backends.cudnn.conv.fp32_precision = request.param
    return request.param


def code(enum: str, name: str) -> int:
    """Of a name in one of csrc/block/spec.h's enums."""
    (body,) = re.findall(rf"enum class {enum} : int64_t {{([^}}]+)}}", HEADER.read_text())
    return int(re.findall(rf"\b{name} = (\d+)", body)[0])


@pytest.mark.parametrize("wish", [Wish(*pair) for pair in product((None, *how.MODES), (None, *how.LIBRARIES))], ids=str)
def test_encoding_is_what_cpp_decodes(wish: Wish, precision: str) -> None:
    launch, library = code("Launch", wish.mode or "choose"), code("Library", wish.library or "choose")
    assert how.encode(wish) == launch | library << 2 | (precision == "tf32") << 4


def test_the_encoding_reaches_the_operators(precision: str) -> None:
    _, _, spec = block().build()
    ints, eps = spec.encode(how.encode(Wish("phased", "all")))
    assert ints[4] == 2 | 3 << 2 | (precision == "tf32") << 4
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


def test_threads_may_interleave() -> None:
    """A enters, B enters, A leaves, B leaves: the last to enter counts while it is there, and nothing stays behind."""
    steps = [threading.Event() for _ in range(3)]
    seen: list[tuple[str | None, str | None]] = []

    def first() -> None:
        with how.launch_mode("single"):
            steps[0].set()
            assert steps[1].wait(60)
        seen.append(how.asked())
        steps[2].set()

    def second() -> None:
        assert steps[0].wait(60)
        with how.launch_mode("phased"), how.library_convolutions("all"):
            seen.append(how.asked())
            steps[1].set()
            assert steps[2].wait(60)
            seen.append(how.asked())

    with ThreadPoolExecutor(2) as threads:
        for thread in (threads.submit(first), threads.submit(second)):
            thread.result()
    assert seen == [("phased", "all")] * 3
    assert how.asked() == (None, None)


def test_an_inner_block_that_outlives_the_outer_one() -> None:
    outer, inner = how.launch_mode("single"), how.launch_mode("phased")
    with ExitStack() as stack:
        outer.__enter__()
        stack.enter_context(inner)
        outer.__exit__(None, None, None)
        assert how.asked().mode == "phased"
    assert how.asked().mode is None


@pytest.mark.parametrize("ask", [how.launch_mode, how.library_convolutions])
def test_another_name_is_refused(ask: Callable[[str], AbstractContextManager[None]]) -> None:
    with pytest.raises(ValueError, match=r"unknown .* 'each'; accepted: '(single|none)'"), ask("each"):
        pass
    assert how.asked() == (None, None)


def test_products_have_the_precision_of_pytorchs_convolution() -> None:
    """Whichever flag it was set by, old or new; that of matrix products counts without cuDNN alone."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    assert how.precision() == "tf32", "as cuDNN's convolutions, where nothing was set"
    matmul.fp32_precision = "ieee"
    assert how.precision() == "tf32"
    cudnn.allow_tf32 = False
    assert how.precision() == "ieee"
    matmul.fp32_precision = "tf32"
    assert how.precision() == "ieee"
    cudnn.allow_tf32 = True
    assert how.precision() == "tf32"
    cudnn.conv.fp32_precision = "ieee"
    assert how.precision() == "ieee"
    cudnn.conv.fp32_precision = "none"  # then a wider setting counts
    assert how.precision() == "ieee"
    cudnn.fp32_precision = "tf32"
    assert how.precision() == "tf32"


def test_without_cudnn_a_convolution_is_a_product_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert how.precision() == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert how.precision() == "tf32"


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
