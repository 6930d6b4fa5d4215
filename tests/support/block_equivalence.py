"""Everything a block computes against the fp64 reference, by the tolerance of `equivalence`."""

from __future__ import annotations

import torch
from support.equivalence import CHANCE, Results, assert_runs_as_accurate, pooled
from support.gates import SqueezeExcitation
from support.kinks import MANY, RARE, Kinks
from support.matrix import FORMATS
from support.runs import run, run_exact
from torch import Tensor

from resnet_fused.params import BlockParams, map_tensors
from resnet_fused.spec import BlockSpec

Block = tuple[Tensor, BlockParams, BlockSpec]


def assert_equivalent(
    blocks: list[Block], douts: list[Tensor], backend: str, gate: SqueezeExcitation | None = None
) -> None:
    """Everything that `run` returns for these blocks of one spec, pooled over them.

    Gradients that vanish but for rounding are held to that (`assert_vanishes`).
    """
    spec, dtype = blocks[0][2], blocks[0][0].dtype
    flips = any(stage.activation.name != "identity" for stage in spec.convs)
    runs: dict[str, list[Results]] = {"got": [], "eager": [], "other": [], "flipped": [], "exact": []}
    for (x, params, _), dout in zip(blocks, douts, strict=True):
        kinks = Kinks(dtype, MANY if dtype == torch.bfloat16 else RARE)  # of so few values, halves flip one at most
        runs["got"].append(run(x, params, spec, backend, dout, gate))
        with kinks.record():
            runs["eager"].append(run(x, params, spec, "eager", dout, gate))
        with kinks.measure():
            runs["exact"].append(run_exact(x, params, spec, dout, gate))
        with kinks.flip():
            runs["flipped"].append(run_exact(x, params, spec, dout, gate))
        runs["other"].append(run(*in_other_format(x, params), spec, "eager", dout, gate))
    results = {kind: pooled(each) for kind, each in runs.items()}
    for name in vanishing(spec) & results["exact"].keys():
        assert_vanishes(name, results["got"], results["eager"])
        results = {kind: {n: t for n, t in each.items() if n != name} for kind, each in results.items()}
    assert_runs_as_accurate(results, dtype, flips)


def in_other_format(x: Tensor, params: BlockParams) -> tuple[Tensor, BlockParams]:
    """channels_last for contiguous and the other way round."""
    other = FORMATS[x.is_contiguous()]
    change = map_tensors(params, lambda _, t: t.contiguous(memory_format=other) if t.dim() == 4 else t)
    return x.contiguous(memory_format=other), change


def vanishing(spec: BlockSpec) -> set[str]:
    """Gradients that are zero but for rounding: a batch normalisation takes away what a bias before it adds."""
    names = [*(f"stages.{i}" for i in range(len(spec.stages))), "projection"]
    biases = {f"grad of {n}.bias": s for n, s in zip(names, spec.convs, strict=False)}
    if spec.order != "pre":
        return {name for name, stage in biases.items() if stage.norm and stage.batch_stats}
    after = dict(zip(biases, spec.stages[1:], strict=False))  # the norm that reads u_{i+1} = conv_i(...)
    return {name for name, stage in after.items() if stage.norm and stage.batch_stats}


def assert_vanishes(name: str, got: Results, eager: Results) -> None:
    """The gradient of a bias that a batch norm takes away: only rounding, on the scale of what it sums."""
    bias, weight = got[name], eager[name.replace(".bias", ".weight")]
    assert bias is not None and weight is not None and bias.dtype == weight.dtype
    bound = 64 * CHANCE * torch.finfo(weight.dtype).eps * max(1.0, float(weight.abs().max()))
    assert float(bias.abs().max()) <= bound, f"{name}: {bias} should be 0"
