"""How a block runs on a GPU: what is asked for, what C++ is told, and which ways differ."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from itertools import product

import pytest
import torch
from support.blocks import block

from resnet_fused.backends import how
from resnet_fused.backends.how import How, Way, Wish
from resnet_fused.ops.encoding import decode, encode
from resnet_fused.spec import BlockSpec


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


def on(channels: int = 32) -> tuple[torch.Tensor, list[torch.Tensor], BlockSpec]:
    x, params, spec = block(3, "projection", channels=channels, width=16, out_channels=64).build(torch.float32)
    return x, [p.weight for p in params.convs], spec


@pytest.mark.parametrize("wish", [Wish(*pair) for pair in product(how.MODES, how.LIBRARIES)], ids=str)
def test_what_is_wished_for_is_chosen(wish: Wish, precision: str) -> None:
    x, weights, spec = on()
    library = {"none": set(), "spatial": {0, 1, 2}, "all": {0, 1, 2, 3}}[str(wish.library)]
    assert how.choose(wish, spec, x, weights) == How(wish.mode, library, precision == "tf32")  # type: ignore[arg-type]


def test_the_rest_is_chosen_by_size() -> None:
    x, weights, spec = on()
    assert how.choose(Wish(None, None), spec, x, weights)[:2] == ("single", frozenset())
    large = torch.empty(1 << 13, 32, 20, 20, device="meta")
    assert how.choose(Wish(None, None), spec, large, weights)[:2] == ("phased", {0, 1, 2})
    assert how.choose(Wish("single", None), spec, large, weights)[:2] == ("single", frozenset())
    _, thin, spec = on(channels=8)
    assert how.choose(Wish(None, None), spec, x, thin).library == {0, 3}, "fewer than 16 channels on a side"


def test_how_reaches_the_operators(precision: str) -> None:
    x, weights, spec = on()
    encoded = encode(spec, how=how.choose(Wish("phased", "spatial"), spec, x, weights))
    assert encoded.ints[4] == 1 | (precision == "tf32") << 1
    assert [flags >> 4 & 1 for flags in encoded.ints[16::13]] == [1, 1, 1, 0]
    assert decode(*encoded).spec == spec


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
