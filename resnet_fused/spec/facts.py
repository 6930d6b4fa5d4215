"""What follows from a spec and from the wanted gradients for everything that runs a block.

It is decided once, here, and handed to the kernels of every backend (`ops.encoding`), to the fakes and to the checks:
which norm stands before and behind a convolution, what forward keeps, what backward reads, computes and leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resnet_fused.spec.block import BlockSpec
from resnet_fused.spec.tensors import BlockTensors

# From what backward takes the derivative of the block's last activation: nothing (it is the identity, or stands
# elsewhere), the block's output, or the activation's argument, computed again. That argument is the sum of branch and
# skip path, or the branch's norm alone.
JoinReads = Literal["nothing", "output", "sum", "branch"]
JOIN_READS: tuple[JoinReads, ...] = ("nothing", "output", "sum", "branch")
Needs = BlockTensors[bool]  # which gradients are wanted
NONE = -1


@dataclass(frozen=True)
class ConvFacts:
    """Facts about one convolution. Stages are indices into `BlockSpec.convs`; -1: none.

    input_stage:  its norm and activation turn the stored tensor into the convolution's input; -1: x is the input.
    output_stage: its norm and activation read the convolution's output.
    saved:        forward keeps the output for backward.
    read:         backward reads the output, and computes it again where it is not saved.
    wants_dy:     backward needs the gradient of the output. wants_dp: of the input.
    """

    input_stage: int
    output_stage: int
    saved: bool
    read: bool
    wants_dy: bool
    wants_dp: bool


@dataclass(frozen=True)
class Facts:
    """convs: in the order of `BlockSpec.convs`. join: what backward's first step reads."""

    convs: tuple[ConvFacts, ...]
    join: JoinReads

    @property
    def saved(self) -> list[int]:
        """The convolutions whose outputs forward keeps, in the order in which it returns them."""
        return [i for i, conv in enumerate(self.convs) if conv.saved]


def facts(spec: BlockSpec, needs: Needs | None = None) -> Facts:
    """needs: None for none, as in evaluation."""
    needs = needs or BlockTensors.filled(False, len(spec.convs))
    join = join_reads(spec)
    return Facts(tuple(_conv(spec, needs, join, i) for i in range(len(spec.convs))), join)


def join_reads(spec: BlockSpec) -> JoinReads:
    """`Facts.join` alone."""
    reads = spec.stages[-1].activation.reads
    if spec.order == "pre" or reads == "nothing":
        return "nothing"
    if spec.order == "branch":
        return "branch"
    # a plain chain's argument is made from y, which is saved anyway; `out` need not be saved
    return "output" if reads == "output" and spec.skip != "none" else "sum"


def _conv(spec: BlockSpec, needs: Needs, join: JoinReads, conv: int) -> ConvFacts:
    last, projects = len(spec.stages) - 1, conv == len(spec.stages)
    if spec.order == "pre":
        input_stage = 0 if projects else conv
        output_stage = conv + 1 if conv < last else NONE
    else:
        input_stage = NONE if projects else conv - 1
        output_stage = conv
    read = conv < last or _end_is_read(spec, needs, join, conv)
    below = needs.x or any(_wants_any(needs, k) for k in range(0 if projects else conv))
    wants_dp = below or (input_stage != NONE and _wants_stage(needs, input_stage))
    return ConvFacts(
        input_stage,
        output_stage,
        saved=read and not (spec.memory == "low" and _is_cheap(spec, conv)),
        read=read,
        wants_dy=wants_dp or needs.weights[conv] or needs.biases[conv],
        wants_dp=wants_dp,
    )


def _is_cheap(spec: BlockSpec, conv: int) -> bool:
    """Whether memory="low" has backward compute the convolution's output again."""
    if conv >= len(spec.stages) - 1:
        return True
    # Before a stride the output has several times the pixels of all that follows, for one convolution over x, which is
    # kept anyway.
    return conv == 0 and spec.stages[0].stride == (1, 1) and spec.stages[1].stride != (1, 1)


def _end_is_read(spec: BlockSpec, needs: Needs, join: JoinReads, conv: int) -> bool:
    """Whether backward reads the output of the last convolution, or of the projection.

    The gradient of its scale reads it. Behind a norm the gradients of gamma and beta and the gradient through the
    batch's statistics read it as well. Without any of these dy is dz times a constant, and nothing reads it.
    """
    stage, is_last = spec.convs[conv], conv == len(spec.stages) - 1
    if needs.branch_scale if is_last else needs.skip_scale:
        return True
    if spec.order == "pre":
        return False
    through_norm = stage.norm and (stage.batch_stats or needs.norm_weights[conv] or needs.norm_biases[conv])
    return through_norm or join == "sum" or (is_last and join == "branch")


def _wants_stage(needs: Needs, stage: int) -> bool:
    return needs.norm_weights[stage] or needs.norm_biases[stage] or needs.slopes[stage]


def _wants_any(needs: Needs, stage: int) -> bool:
    return needs.weights[stage] or needs.biases[stage] or _wants_stage(needs, stage)
