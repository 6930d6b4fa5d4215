"""Blocks for the CPU's engine: each layout of an input, each schedule, and what lies at their edges."""

from __future__ import annotations

from dataclasses import dataclass, replace

from support.blocks import Case, block, bottleneck, frozen

from resnet_fused.spec import BlockSpec, IntPair, StageSpec
from resnet_fused.spec.activations import KINDS
from resnet_fused.spec.block import ORDERS

BATCHES = (1, 2, 3, 5, 16)
THREADS = (1, 2, 7)
POOL = (3, 2, 1)


@dataclass(frozen=True)
class Entry:
    """A block in evaluation, for these batches; pool: kernel, stride, padding of the max pooling behind it."""

    case: Case
    batches: tuple[int, ...] = BATCHES
    pool: tuple[int, int, int] | None = None


def chain(
    channels: int, *convs: tuple[IntPair, int, StageSpec], size: IntPair = (7, 6), skip: str = "none", **changes: object
) -> Case:
    """convs: kernel, width and stage of each."""
    spec = BlockSpec(tuple(stage for *_, stage in convs), skip)  # type: ignore[arg-type]
    widths, kernels = tuple(w for _, w, _ in convs), tuple(k for k, *_ in convs)
    return replace(Case(spec, channels, widths, kernels, size), **changes)  # type: ignore[arg-type]


def _resnext(groups: int, each: int, stride: int = 1) -> Case:
    width, projects = groups * each, stride > 1
    spec = BlockSpec(
        (StageSpec(), StageSpec(stride, 1, groups=groups), StageSpec()),
        "projection" if projects else "identity",
        StageSpec(stride, act="identity") if projects else None,
    )
    widths, kernels = (width, width, 48, *[48] * projects), ((1, 1), (3, 3), (1, 1), *[(1, 1)] * projects)
    return Case(spec, 48, widths, kernels, (7, 6))


def _table() -> dict[str, Entry]:
    few = (1, 3)
    same = StageSpec(1, 1)
    cases = {
        "bottleneck": bottleneck("identity", channels=64, width=32),
        "bottleneck with projection": bottleneck("projection", channels=64, width=32),
        "bottleneck with projection of one pixel each": bottleneck("projection", channels=64, width=32, stride=1),
        "basic": block(2, channels=32, width=32, size=(8, 8)),
        "basic with projection": block(2, "projection", channels=32, width=48, out_channels=48, stride=2, size=(9, 8)),
        "stem": chain(3, ((7, 7), 64, StageSpec(2, 3)), size=(18, 22)),
        "stem of a row": chain(3, ((7, 7), 8, StageSpec(2, 3)), size=(1, 9)),
        "deep stem": chain(3, ((3, 3), 16, StageSpec(2, 1)), ((3, 3), 16, same), ((3, 3), 32, same), size=(12, 10)),
        "stem with dilation": chain(3, ((3, 3), 32, StageSpec((2, 1), 2, (1, 2))), size=(11, 12)),
        "stem of one channel": chain(1, ((5, 5), 8, StageSpec(1, 2)), size=(6, 9)),
        "stem with a skip path": block(2, channels=3, width=8, size=(9, 7)),
        "groups of 4": _resnext(8, 4),
        "groups of 4 with projection": _resnext(8, 4, 2),
        "groups of 3": _resnext(12, 3),
        "depthwise": chain(40, ((3, 3), 40, StageSpec(1, 1, groups=40)), skip="identity"),
        "depthwise 5x5": chain(16, ((1, 1), 72, StageSpec()), ((5, 5), 72, StageSpec(2, 2, groups=72)), size=(9, 7)),
        "grouped 1x1": chain(24, ((1, 1), 48, StageSpec(groups=3)), ((1, 1), 96, StageSpec(groups=6))),
        "5 channels": block(2, "projection", channels=5, width=5, out_channels=5),
        "33 channels": block(2, channels=33, width=33),
        "70 channels": bottleneck("projection", channels=70, width=35),
        "dilation": block(2, channels=16, width=16, dilation=(2, 3), size=(9, 8)),
        "no padding": chain(16, ((3, 3), 24, StageSpec()), ((3, 3), 8, StageSpec()), size=(8, 7)),
        "padding of 2 and 3": chain(16, ((3, 3), 24, StageSpec(1, 2)), ((3, 3), 8, StageSpec(2, 3)), size=(5, 4)),
        "padding of a pixel": chain(32, ((1, 1), 32, StageSpec(1, 1)), ((1, 1), 8, StageSpec(1, (0, 2)))),
        "patches": chain(32, ((3, 3), 40, same), ((3, 3), 72, same), size=(7, 9)),
        "patches, no padding": chain(40, ((3, 3), 33, StageSpec()), ((3, 3), 32, StageSpec(1, 2)), size=(6, 8)),
        "patches of a bottleneck": bottleneck("identity", channels=64, width=40, size=(10, 11)),
        "patches beside a projection": block(
            2, "projection", channels=32, width=48, out_channels=72, stride=2, size=(18, 21)
        ),
        "1x1 with stride": chain(32, ((1, 1), 40, StageSpec(2)), ((1, 1), 16, StageSpec((1, 3)))),
        "5x5": block(2, channels=16, width=24, kernel=5),
        "1x3 and 3x1": chain(
            16, ((1, 3), 16, StageSpec(1, (0, 1))), ((3, 1), 16, StageSpec(1, (1, 0))), skip="identity"
        ),
        "2x2": chain(16, ((2, 2), 24, StageSpec(2)), ((2, 2), 8, StageSpec(1, 1))),
        "stride of 3": chain(16, ((3, 3), 24, StageSpec(3, 1)), ((2, 2), 8, StageSpec((1, 2), 1)), size=(11, 13)),
        "bias": block(2, "projection", channels=16, width=24, out_channels=16, bias=True),
        "no norm": block(2, channels=16, width=24, norm=False),
        "no norm but bias": block(2, channels=32, width=32, norm=False, bias=True),
        "one channel": block(2, channels=1, width=1),
        "image of one pixel": block(2, channels=32, width=24, size=(1, 1)),
        "bottleneck of one pixel": bottleneck("projection", channels=64, width=32, size=(1, 1)),
        "row": block(2, channels=16, width=16, size=(1, 19)),
        # without a stride, which oneDNN 3.12 gets wrong in bfloat16 on images of one column
        "column": bottleneck("identity", channels=16, width=16, size=(19, 1)),
        "fewer than 16 pixels": bottleneck("identity", channels=32, width=32, size=(3, 4)),
    }
    for order in ORDERS:
        cases[f"{order} order"] = block(2, order=order, channels=32, width=32)
        cases[f"{order} bottleneck, scales"] = bottleneck(
            "identity", order, channels=32, width=32, branch_scale="[C]", skip_scale="0-d"
        )
        cases[f"{order} order, float scales"] = block(
            2, order=order, channels=16, branch_scale="float", skip_scale="float"
        )
    for order in ("post", "pre"):
        cases[f"{order} projection, scales"] = block(
            2, "projection", order=order, channels=16, width=24, out_channels=32, stride=2, branch_scale="[C,1,1]",
            skip_scale="[1]", bias=True,
        )  # fmt: skip
    activations = {
        f"{act}, {order}": block(2, order=order, act=act, channels=33, width=40, size=(4, 5))
        for act in KINDS
        for order in ORDERS
    }
    entries = {name: Entry(frozen(case)) for name, case in cases.items()}
    entries |= {name: Entry(frozen(case), (2, 5)) for name, case in activations.items()}
    large = {
        "bands": block(2, channels=16, width=16, size=(72, 101)),
        "bands with projection": bottleneck("projection", channels=32, width=16, size=(91, 78)),
        "bands of patches beside a projection": block(
            2, "projection", channels=32, width=96, out_channels=96, stride=2, size=(131, 122)
        ),
        "bands of patches": block(2, channels=32, width=48, size=(61, 75)),
        "patches a page apart": chain(1024, ((3, 3), 32, same), size=(5, 6)),
        "wide": block(2, channels=256, width=256, size=(2, 2)),
        "wide patches": block(2, channels=256, width=256, size=(4, 4)),
        "wide bottleneck": bottleneck("projection", channels=512, width=128, size=(4, 4)),
        "wide stem": chain(3, ((3, 3), 512, StageSpec(1, 1)), size=(4, 3)),
        "pixels a page apart": bottleneck("identity", channels=2048, width=32, size=(5, 4)),
        "pixels a page apart, projection": bottleneck("projection", channels=2048, width=32, size=(5, 4)),
    }
    entries |= {name: Entry(frozen(case), few) for name, case in large.items()}
    entries["stem and pooling"] = Entry(entries["stem"].case, (1, 5), POOL)
    entries["deep stem and pooling"] = Entry(entries["deep stem"].case, (1, 5), (2, 2, 0))
    entries["large stem and pooling"] = Entry(
        frozen(chain(3, ((7, 7), 64, StageSpec(2, 3)), size=(64, 97))), (1, 2), POOL
    )
    return entries


TABLE = _table()
