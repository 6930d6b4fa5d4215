"""timm's blocks. Attention and stochastic depth are a gate; what has no fused form is called between fused parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.resnet import Modules, chain, skip_steps, with_skip
from resnet_fused.modules.block_modules import (
    BlockModules,
    CompositeModules,
    StageModules,
    StepModules,
    class_path,
    is_norm,
    original_path,
    require_no_hooks,
)

CONV_NORM_ACT = "timm.layers.conv_bn_act.ConvNormAct"
BYOB_DOWNSAMPLE = "timm.models.byobnet.DownsampleAvg"
DOWNSAMPLES = ("timm.models.resnetv2.DownsampleConv", "timm.models.resnetv2.DownsampleAvg")


def basic_block(block: nn.Module) -> Modules:
    return _resnet_block(block, ("act1", "act2"), middle=1)


def bottleneck(block: nn.Module) -> Modules:
    return _resnet_block(block, ("act1", "act2", "act3"), middle=2)


def _resnet_block(block: nn.Module, acts: tuple[str, ...], middle: int) -> Modules:
    """middle: how many stages there are before `aa`; `drop_block` stands before the last of their activations."""
    stages = chain(block, acts)
    drop_block, aa = getattr(block, "drop_block", None), getattr(block, "aa", None)
    first = stages[:middle]
    between: list[nn.Module] = []
    if not _does_nothing(drop_block):
        between += [drop_block, first[-1].act]  # type: ignore[list-item]
        first = (*first[:-1], replace(first[-1], act=None))
    if not _does_nothing(aa):
        between.append(aa)  # type: ignore[arg-type]
    for name, slot in (("drop_block", drop_block), ("aa", aa)):
        if slot is not None and slot not in between:
            require_no_hooks(name, slot)
    branch: tuple[StepModules, ...] = (BlockModules(first, "none"), *between) if between else ()
    end = stages[middle:] if between else stages
    return with_skip(end, block.downsample, branch=branch, gate=_gate(block))  # type: ignore[arg-type]


def _does_nothing(module: object) -> bool:
    """An empty slot, or dropped regions outside of training."""
    if module is None or type(module) is nn.Identity:
        return True
    if class_path(type(module)) == "timm.layers.drop.DropBlock2d":
        return not module.training or module.drop_prob == 0  # type: ignore[attr-defined]
    return False


def stem(model: nn.Module) -> BlockModules:
    """conv1, bn1 and act1, where a deep stem's conv1 holds stages of its own; then a pooling that is a convolution."""
    if type(model.conv1) is not nn.Sequential and not pools_with_convolution(model):
        return BlockModules((StageModules(model.conv1, model.bn1, model.act1),), "none")  # type: ignore[arg-type]
    modules = [model.conv1]
    if type(model.conv1) is nn.Sequential:
        require_no_hooks("conv1", model.conv1)
        modules = list(model.conv1.children())
    modules += [model.bn1, model.act1]
    if pools_with_convolution(model):
        require_no_hooks("maxpool", model.maxpool)  # type: ignore[arg-type]
        modules += list(model.maxpool.children())  # type: ignore[union-attr]
    steps = sequential.chains(modules)  # type: ignore[arg-type]
    if len(steps) != 1 or not isinstance(steps[0], BlockModules):
        names = ", ".join(type(part).__name__ for part in modules)
        raise NotFusable(f"the stem is {names}; accepted: convolutions, each with a norm and an activation")
    return steps[0]


def pools_with_convolution(model: nn.Module) -> bool:
    """Whether the stem's `maxpool` is a convolution with a norm and an activation (``replace_stem_pool``)."""
    pool = model.maxpool
    return type(pool) is nn.Sequential and len(pool) > 1 and type(pool[0]) is nn.Conv2d and is_norm(pool[1])


def conv_norm_act(module: nn.Module) -> Modules:
    """timm's layer on its own."""
    modules, aa = _conv_norm_act("", module)
    sequential.require_gain(modules)
    block = BlockModules((modules,), "none")
    return block if aa is None else CompositeModules((block, aa))


def _conv_norm_act(name: str, module: nn.Module) -> tuple[StageModules, nn.Module | None]:
    """(its stage, what blurs behind it or None)."""
    norm = module.bn
    if type(norm) is nn.Sequential and len(norm) == 0:
        norm = None  # type: ignore[assignment]
    if norm is None and not name:
        raise NotFusable("it has no norm, and a convolution alone has nothing to fuse with")
    return StageModules(module.conv, norm, None), getattr(module, "aa", None)  # type: ignore[arg-type]


def _stage_of(name: str, module: nn.Module) -> StageModules:
    """Of a ConvNormAct within a block."""
    if original_path(module) != CONV_NORM_ACT:
        raise NotFusable(f"{name} is {type(module).__name__}; accepted: ConvNormAct")
    require_no_hooks(name, module)
    stage, aa = _conv_norm_act(name, module)
    if aa is not None:
        raise NotFusable(f"{name} blurs with {type(aa).__name__}; accepted within this block: none")
    return stage


def regnet_bottleneck(block: nn.Module) -> Modules:
    """Designing Network Design Spaces, arXiv:2003.13678; the attention stands before the last convolution."""
    stages = tuple(_stage_of(f"conv{i}", getattr(block, f"conv{i}")) for i in (1, 2, 3))
    last = replace(stages[2], act=block.act3)  # type: ignore[arg-type]
    attention = _attention(block.se)  # type: ignore[arg-type]
    gate = None if block.downsample is None else _drop_path(block.drop_path)  # type: ignore[arg-type]
    return _attended((*stages[:2], last), attention, gate, block.downsample)  # type: ignore[arg-type]


def byob_bottleneck(block: nn.Module) -> Modules:
    """timm's configurable bottleneck (CLIP's ResNets, RegNet-Z's relatives, ResNet-33ts and others)."""
    names = ["conv1_1x1", "conv2_kxk", "conv2b_kxk", "conv3_1x1"]
    names = [name for name in names if type(getattr(block, name)) is not nn.Identity]
    stages = tuple(_stage_of(name, getattr(block, name)) for name in names)
    last = replace(stages[-1], act=block.act)  # type: ignore[arg-type]
    attention = _attention(block.attn, "attn")  # type: ignore[arg-type]
    gate = _both(_attention(block.attn_last, "attn_last"), _drop_path(block.drop_path))  # type: ignore[arg-type]
    return _attended((*stages[:-1], last), attention, gate, block.shortcut)  # type: ignore[arg-type]


def _attended(
    stages: tuple[StageModules, ...],
    attention: Callable[[Tensor], Tensor] | None,
    gate: Callable[[Tensor], Tensor] | None,
    downsample: nn.Module | None,
) -> Modules:
    """A bottleneck with attention before its last convolution, and a gate of its branch.

    downsample: nn.Identity for the identity, None for no skip path.
    """
    branch: tuple[StepModules, ...] = ()
    end = stages
    if attention is not None:
        branch, end = (BlockModules(stages[:-1], "none", order="branch", gate=attention),), stages[-1:]
    if downsample is None:
        whole = BlockModules(end, "none", gate=gate)
        return CompositeModules(branch, whole) if branch else whole
    pools, projection = _shortcut(downsample)
    if not branch and not pools:
        skip = "identity" if projection is None else "projection"
        return BlockModules(end, skip, projection, gate=gate)  # type: ignore[arg-type]
    steps = skip_steps(pools, projection)
    return CompositeModules(branch, BlockModules(end, "none", gate=gate), steps)


def _shortcut(downsample: nn.Module) -> tuple[tuple[nn.Module, ...], StageModules | None]:
    """RegNet's and ResNet v2's skip path: (what pools, the projection or None for the identity)."""
    require_no_hooks("downsample", downsample)
    if type(downsample) is nn.Identity:
        return (), None
    path = original_path(downsample)
    pools: list[nn.Module] = []
    if path == BYOB_DOWNSAMPLE:
        pools, stage = [downsample.pool], _stage_of("shortcut.conv", downsample.conv)  # type: ignore[list-item, arg-type]
    elif path in DOWNSAMPLES:
        pools, conv, norm = [getattr(downsample, "pool", nn.Identity())], downsample.conv, downsample.norm
        require_no_hooks("downsample.norm", norm)  # type: ignore[arg-type]
        norm = None if type(norm) is nn.Identity else norm  # type: ignore[assignment]
        stage = StageModules(conv, norm, None)  # type: ignore[arg-type]
    elif path == CONV_NORM_ACT:
        stage = _stage_of("downsample", downsample)
    elif type(downsample) is nn.Sequential and len(downsample) == 2:
        pools, conv = [downsample[0]], downsample[1]
        stage = StageModules(conv, None, None) if isinstance(conv, nn.Conv2d) else _stage_of("downsample.1", conv)
    else:
        stage = StageModules(downsample, None, None)  # a convolution, or refused by name
    return tuple(pool for pool in pools if type(pool) is not nn.Identity), stage


def selective_kernel_bottleneck(block: nn.Module) -> Modules:
    """arXiv:1903.06586; conv2, whose paths are ConvNormActs, is called between."""
    first, last = _stage_of("conv1", block.conv1), _stage_of("conv3", block.conv3)  # type: ignore[arg-type]
    last = replace(last, act=block.act)  # type: ignore[arg-type]
    branch = (BlockModules((first,), "none"), block.conv2)
    return with_skip((last,), block.downsample, branch=branch, gate=_gate(block))  # type: ignore[arg-type]


def selective_kernel_basic_block(block: nn.Module) -> Modules:
    last = replace(_stage_of("conv2", block.conv2), act=block.act)  # type: ignore[arg-type]
    return with_skip((last,), block.downsample, branch=(block.conv1,), gate=_gate(block))  # type: ignore[arg-type]


def pre_basic_block(block: nn.Module) -> Modules:
    return _pre_activation(block, convs=2)


def pre_bottleneck(block: nn.Module) -> Modules:
    return _pre_activation(block, convs=3)


def _pre_activation(block: nn.Module, convs: int) -> Modules:
    """norm1 with its activation, conv1, norm2, ...; the projection reads what norm1 gives."""
    pairs = [(getattr(block, f"conv{i}"), getattr(block, f"norm{i}")) for i in range(1, convs + 1)]
    gate = _drop_path(block.drop_path)  # type: ignore[arg-type]
    pools: tuple[nn.Module, ...] = ()
    projection = None
    if block.downsample is not None:
        pools, projection = _shortcut(block.downsample)  # type: ignore[arg-type]
    if projection is not None and projection.norm is not None:
        raise NotFusable("downsample has a norm; accepted in pre-activation order: a convolution alone")
    if not pools and (gate is None or projection is None):
        stages = tuple(StageModules(conv, norm, None) for conv, norm in pairs)
        skip = "identity" if projection is None else "projection"
        return BlockModules(stages, skip, projection, order="pre", gate=gate)  # type: ignore[arg-type]
    steps = skip_steps(pools, projection)
    end = BlockModules(_behind_first_norm(pairs), "none", gate=gate)
    return CompositeModules((), end, steps, before=(pairs[0][1],))


def _behind_first_norm(pairs: list[tuple[nn.Module, nn.Module]]) -> tuple[StageModules, ...]:
    """A pre-activation branch that begins with its first convolution, in post-activation order."""
    norms = [norm for _, norm in pairs[1:]]
    return tuple(StageModules(conv, norm, None) for (conv, _), norm in zip(pairs, [*norms, None], strict=True))


def regnet_pre_bottleneck(block: nn.Module) -> Modules:
    """The skip path reads what norm1 gives, even where it is the identity; the attention stands before norm3."""
    pairs = [(getattr(block, f"conv{i}"), getattr(block, f"norm{i}")) for i in (1, 2, 3)]
    stages = _behind_first_norm(pairs)
    attention = _attention(block.se)  # type: ignore[arg-type]
    branch: tuple[StepModules, ...] = ()
    end = stages
    if attention is not None:
        gated = BlockModules((stages[0], replace(stages[1], norm=None)), "none", gate=attention)
        branch, end = (gated, pairs[2][1]), stages[2:]
    if block.downsample is None:
        return CompositeModules(branch, BlockModules(end, "none"), before=(pairs[0][1],))
    pools, projection = _shortcut(block.downsample)  # type: ignore[arg-type]
    steps = skip_steps(pools, projection)
    gate = _drop_path(block.drop_path)  # type: ignore[arg-type]
    return CompositeModules(branch, BlockModules(end, "none", gate=gate), steps, before=(pairs[0][1],))


def legacy_bottleneck(block: nn.Module) -> Modules:
    stages = chain(block, ("relu", "relu", "relu"))
    return with_skip(stages, block.downsample, gate=_attention(block.se_module), in_place_add=False)  # type: ignore[arg-type]


def legacy_basic_block(block: nn.Module) -> Modules:
    """Its activation stands twice behind the last norm: before the attention and behind the addition."""
    whole = with_skip(chain(block, ("relu", "relu")), block.downsample, in_place_add=False)  # type: ignore[arg-type]
    pools: tuple[StepModules, ...] = ()
    if isinstance(whole, CompositeModules):
        end, pools = whole.blocks[0], whole.skip or ()
    else:
        end = whole
        pools = () if whole.projection is None else (BlockModules((whole.projection,), "none"),)
    end = replace(end, skip="none", projection=None, order="branch", gate=_attention(block.se_module))  # type: ignore[arg-type]
    return CompositeModules((), end, pools, after=(block.relu,))  # type: ignore[arg-type]


def _require(slot: str, module: nn.Module, instead: str | None) -> None:
    if instead is not None:
        raise NotFusable(f"{slot} is {type(module).__name__}; accepted: none, or {instead}")
    require_no_hooks(slot, module)


def _gate(block: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """se(x), then drop_path(x): the factors that they multiply x with."""
    return _both(_attention(block.se), _drop_path(block.drop_path))  # type: ignore[arg-type]


def _both(
    attention: Callable[[Tensor], Tensor] | None, drop_path: Callable[[Tensor], Tensor] | None
) -> Callable[[Tensor], Tensor] | None:
    if attention is None or drop_path is None:
        return attention or drop_path
    return lambda pooled: attention(pooled) * drop_path(pooled)


def _attention(se: nn.Module | None, name: str = "se") -> Callable[[Tensor], Tensor] | None:
    """pooled [N, C] -> [N, C]."""
    if se is None or type(se) is nn.Identity:
        return None
    gate = ATTENTION.get(class_path(type(se)))
    fits = gate is not None and not getattr(se, "add_maxpool", False) and getattr(se, "mlp", None) is None
    accepted = "SEModule, EffectiveSEModule, EcaModule of the mean alone, nn.Identity"
    _require(name, se, None if fits else accepted)
    return lambda pooled: gate(se, pooled)  # type: ignore[misc]


def _squeeze_excitation(se: nn.Module, pooled: Tensor) -> Tensor:
    squeezed = se.act(se.bn(se.fc1(pooled[:, :, None, None])))  # type: ignore[operator]
    return se.gate(se.fc2(squeezed)).flatten(1)  # type: ignore[operator]


def _effective(se: nn.Module, pooled: Tensor) -> Tensor:
    return se.gate(se.fc(pooled[:, :, None, None])).flatten(1)  # type: ignore[operator]


def _legacy(se: nn.Module, pooled: Tensor) -> Tensor:
    squeezed = se.relu(se.fc1(pooled[:, :, None, None]))  # type: ignore[operator]
    return se.sigmoid(se.fc2(squeezed)).flatten(1)  # type: ignore[operator]


def _efficient(eca: nn.Module, pooled: Tensor) -> Tensor:
    y = eca.conv(pooled[:, None])  # type: ignore[operator]
    if eca.conv2 is not None:
        y = eca.conv2(eca.act(y))  # type: ignore[operator]
    return eca.gate(y).flatten(1)  # type: ignore[operator]


ATTENTION: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "timm.layers.squeeze_excite.SEModule": _squeeze_excitation,
    "timm.layers.squeeze_excite.EffectiveSEModule": _effective,
    "timm.layers.eca.EcaModule": _efficient,
    "timm.models.senet.SEModule": _legacy,
}


def _drop_path(drop_path: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """pooled [N, C] -> [N, 1], by the module itself and so with its random numbers."""
    if drop_path is None or type(drop_path) is nn.Identity:
        return None
    known = class_path(type(drop_path)) == "timm.layers.drop.DropPath"
    _require("drop_path", drop_path, None if known else "DropPath, nn.Identity")
    if not drop_path.training or drop_path.drop_prob == 0:
        return None
    return lambda pooled: drop_path(pooled.new_ones(len(pooled), 1))
