"""pytorchcv's residual units: a body of ConvBlocks, perhaps squeeze-excitation, and the skip path beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.resnet import skip_steps
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    CompositeModules,
    Modules,
    StageModules,
    StepModules,
    class_path,
    original_path,
    require_no_hooks,
)

PACKAGE = "pytorchcv.models"
CONV_BLOCK, PRE_CONV_BLOCK = f"{PACKAGE}.common.conv.ConvBlock", f"{PACKAGE}.common.conv.PreConvBlock"
SE_BLOCK = f"{PACKAGE}.common.att.SEBlock"
BODIES = tuple(
    f"{PACKAGE}.{name}"
    for name in (
        "resnet.ResBlock",
        "resnet.ResBottleneck",
        "resnext.ResNeXtBottleneck",
        "senet.SENetBottleneck",
    )
)
REGNET_BODY = f"{PACKAGE}.regnet.RegNetBottleneck"
PRE_BODIES = (f"{PACKAGE}.preresnet.PreResBlock", f"{PACKAGE}.preresnet.PreResBottleneck")


def unit(block: nn.Module) -> Modules:
    """Squeeze-excitation behind the body is a gate."""
    stages = [_stage(f"body.{name}", part) for name, part in _parts(block, BODIES)]
    last = _with_act("body", stages[-1], block.activ)
    gate = _gate("se", block.se) if hasattr(block, "se") else None  # type: ignore[arg-type]
    pools, projection = _skip_path(block)
    return _whole((), (*stages[:-1], last), gate, pools, projection)


def regnet_unit(block: nn.Module) -> Modules:
    """Its squeeze-excitation stands before the last convolution."""
    parts = [(name, part) for name, part in _parts(block, (REGNET_BODY,)) if name != "se"]
    first, second, last = (_stage(f"body.{name}", part) for name, part in parts)
    last = _with_act("body", last, block.activ)
    pools, projection = _skip_path(block)
    body = block.body
    if not body.use_se:  # type: ignore[union-attr]
        return _whole((), (first, second, last), None, pools, projection)
    gate = _gate("body.se", body.se)  # type: ignore[union-attr, arg-type]
    branch = (BlockModules((first, second), "none", order="branch", gate=gate),)
    return _whole(branch, (last,), None, pools, projection)


def pre_unit(block: nn.Module) -> Modules:
    """arXiv:1603.05027; the projection reads what the first norm and activation give."""
    stages = tuple(_pre_stage(f"body.{name}", part) for name, part in _parts(block, PRE_BODIES))
    gate = _gate("se", block.se) if hasattr(block, "se") else None  # type: ignore[arg-type]
    if not block.resize_identity:
        return BlockModules(stages, "identity", order="pre", gate=gate)
    projection = StageModules(block.identity_conv, None, None)  # type: ignore[arg-type]
    if gate is None:
        return BlockModules(stages, "projection", projection, order="pre")
    behind = [(stage.norm, stage.act) for stage in stages[1:]] + [(None, None)]
    end = tuple(StageModules(stage.conv, *norm_act) for stage, norm_act in zip(stages, behind, strict=True))
    before = (stages[0].norm, stages[0].act)
    return CompositeModules((), BlockModules(end, "none", gate=gate), skip_steps((), projection), before)  # type: ignore[arg-type]


def pre_stem(block: nn.Module) -> CompositeModules:
    stage = StageModules(block.conv, block.bn, block.activ)  # type: ignore[arg-type]
    return CompositeModules((BlockModules((stage,), "none"), block.pool))  # type: ignore[arg-type]


def body(block: nn.Module) -> BlockModules:
    """Of a unit that is not known, which calls it."""
    return BlockModules(tuple(_stage(name, part) for name, part in block.named_children()), "none")


def layer(module: nn.Module) -> BlockModules:
    stage = _stage("it", module)
    sequential.require_gain(stage)
    return BlockModules((stage,), "none")


def _whole(
    branch: tuple[StepModules, ...],
    end: tuple[StageModules, ...],
    gate: Callable[[Tensor], Tensor] | None,
    pools: tuple[nn.Module, ...],
    projection: StageModules | None,
) -> Modules:
    if branch or pools:
        return CompositeModules(branch, BlockModules(end, "none", gate=gate), skip_steps(pools, projection))
    return BlockModules(end, "identity" if projection is None else "projection", projection, gate=gate)


def _parts(block: nn.Module, known: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    if original_path(block.body) not in known:  # type: ignore[arg-type]
        names = ", ".join(path.rpartition(".")[2] for path in known)
        raise NotFusable(f"body is {type(block.body).__name__}; accepted: {names}")
    require_no_hooks("body", block.body)  # type: ignore[arg-type]
    return list(block.body.named_children())  # type: ignore[union-attr]


def _skip_path(block: nn.Module) -> tuple[tuple[nn.Module, ...], StageModules | None]:
    if not block.resize_identity:
        return (), None
    if not hasattr(block, "identity_block"):
        return (), _with_act("identity_conv", _stage("identity_conv", block.identity_conv), None)  # type: ignore[arg-type]
    pooled = block.identity_block  # ResNet(A)'s: pool, conv
    require_no_hooks("identity_block", pooled)  # type: ignore[arg-type]
    stage = _stage("identity_block.conv", pooled.conv)  # type: ignore[union-attr, arg-type]
    return (pooled.pool,), _with_act("identity_block.conv", stage, None)  # type: ignore[union-attr, return-value]


def _stage(name: str, module: nn.Module) -> StageModules:
    if original_path(module) != CONV_BLOCK:
        raise NotFusable(f"{name} is {type(module).__name__}; accepted: ConvBlock")
    if module.use_pad:
        raise NotFusable(f"{name} pads each side by a number of its own; accepted: the convolution's padding")
    return _read(name, module)


def _pre_stage(name: str, module: nn.Module) -> StageModules:
    if original_path(module) != PRE_CONV_BLOCK:
        raise NotFusable(f"{name} is {type(module).__name__}; accepted: PreConvBlock")
    return _read(name, module)


def _read(name: str, module: nn.Module) -> StageModules:
    require_no_hooks(name, module)
    norm = module.bn if module.normalize else None
    return StageModules(module.conv, norm, module.activ if module.activate else None)  # type: ignore[arg-type]


def _with_act(name: str, stage: StageModules, act: object) -> StageModules:
    if stage.act is not None:
        raise NotFusable(f"{name} ends in {type(stage.act).__name__}; accepted before an addition: no activation")
    return replace(stage, act=act)  # type: ignore[arg-type]


def _gate(name: str, se: nn.Module) -> Callable[[Tensor], Tensor]:
    if class_path(type(se)) != SE_BLOCK:
        raise NotFusable(f"{name} is {type(se).__name__}; accepted: SEBlock")
    require_no_hooks(name, se)
    require_no_hooks(f"{name}.pool", se.pool)  # type: ignore[arg-type]
    first, second = (se.conv1, se.conv2) if se.use_conv else (se.fc1, se.fc2)

    def gate(pooled: Tensor) -> Tensor:
        squeezed = pooled[:, :, None, None] if se.use_conv else pooled
        return se.sigmoid(second(se.activ(first(squeezed)))).flatten(1)  # type: ignore[operator]

    return gate


BLOCKS: dict[str, Adapter] = {
    f"{PACKAGE}.resnet.ResUnit": unit,
    f"{PACKAGE}.resnext.ResNeXtUnit": unit,
    f"{PACKAGE}.seresnet.SEResUnit": unit,
    f"{PACKAGE}.senet.SENetUnit": unit,
    f"{PACKAGE}.seresnext.SEResNeXtUnit": unit,
    f"{PACKAGE}.resneta.ResAUnit": unit,
    f"{PACKAGE}.regnet.RegNetUnit": regnet_unit,
    f"{PACKAGE}.preresnet.PreResUnit": pre_unit,
    f"{PACKAGE}.sepreresnet.SEPreResUnit": pre_unit,
    f"{PACKAGE}.preresnet.PreResInitBlock": pre_stem,
    **dict.fromkeys(BODIES, body),
    CONV_BLOCK: layer,
}
LAYERS: tuple[str, ...] = (CONV_BLOCK, *BODIES)
