"""A block's branch as a vector field F, computed by the fused block operator.

    F(x)         = the chain alone                        skip="none"
    step(x, dt)  = skip_scale * x + dt * F(x)             skip="identity", branch_scale=dt

With skip_scale 1 a step is a residual block, read as one step of forward Euler on x' = F(x) (E 2017,
doi:10.1007/s40304-017-0103-z; Haber & Ruthotto 2017, arXiv:1705.03341; Chen et al. 2018, arXiv:1806.07366).

Time enters through biases that are affine in t: b(t) = b + t * c. Chen et al. append a channel that holds t to every
convolution's input; a convolution of a constant channel is that same b + t * c away from the padded border, so the two
differ at the border only, and the bias needs neither a copy of x with one more channel nor the products of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.errors import NotFusable
from resnet_fused.modules import module_state
from resnet_fused.modules.block_modules import (
    BlockModules,
    StageModules,
    describe,
    frozen_norm,
    require_no_hooks,
)
from resnet_fused.modules.fused_block import Description
from resnet_fused.modules.plan import Described
from resnet_fused.ops import operators
from resnet_fused.params import BlockParams, Scale, StageParams
from resnet_fused.spec import Activation, BlockSpec, Memory, Order, StageSpec
from resnet_fused.spec.activations import KINDS, recognise

Time = float | Tensor
# Variants of a branch (a step size, a time) are kept for evaluation, each with a packed copy of the weights: as many as
# fit these bytes, within these counts.
KEPT_BYTES = 32 << 20
FEWEST_KEPT, MOST_KEPT = 8, 1024


class Branch(nn.Module):
    """The vector field F of a chain of convolutions: [N, C, H, W] -> [N, C, H, W], one fused call each time.

    net: the chain's modules in order: conv, [norm], [act] for each stage (F = act_n(norm_n(conv_n(...)))), or, where
         the first is a norm or an activation, [norm], [act], conv for each (pre-activation). Convolutions, norms and
         activations as `fuse` takes them; nested nn.Sequential and nn.Identity are looked through. They stay
         children, so parameters, `train`, `to` and `state_dict` are theirs.
    time_dependent: F(x, t), with a parameter `time_biases[i]` for each stage, zero at first: its norm's bias, or its
         convolution's where it has no norm, becomes b + t * time_biases[i].
    memory, backend: as in `fuse`.

    Raises NotFusable, naming the part, for modules that the fused operator does not compute.
    """

    def __init__(
        self, *net: nn.Module, time_dependent: bool = False, memory: Memory = "default", backend: str = "auto"
    ) -> None:
        super().__init__()
        self.net = net[0] if len(net) == 1 and type(net[0]) is nn.Sequential else nn.Sequential(*net)
        self.memory, self.backend = memory, backend
        params, spec = self.describe()
        self.time_biases: nn.ParameterList | None = None
        if time_dependent:
            pairs = zip(params.stages, spec.stages, strict=True)
            self.time_biases = nn.ParameterList(_time_bias(p, stage, spec.order) for p, stage in pairs)
        self._known = _Known()

    @classmethod
    def of(
        cls,
        net: nn.Module | Sequence[StageModules],
        *,
        order: Order = "post",
        time_dependent: bool = False,
        memory: Memory = "default",
        backend: str = "auto",
    ) -> Branch:
        """The branch of an nn.Sequential, or of stages as adapters name them.

        order: of StageModules: "post" (conv, norm, act) or "pre" (norm, act, conv). An nn.Sequential shows it.
        """
        if not isinstance(net, nn.Module):
            net = nn.Sequential(*(module for stage in net for module in _in_order(stage, order)))
        return cls(net, time_dependent=time_dependent, memory=memory, backend=backend)

    @property
    def time_dependent(self) -> bool:
        return self.time_biases is not None

    def forward(self, x: Tensor, t: Time = 0.0, scale: Scale = 1.0) -> Tensor:
        """scale * F(x, t).

        x: [N, C, H, W], dtypes as `functional.residual_block`. t: a number, or a 0-d tensor. scale: as a step's dt.
        """
        require_finite("scale", scale)
        return self._call(x, t, False, scale, 1.0)

    def step(self, x: Tensor, dt: Scale, t: Time = 0.0, skip_scale: Scale = 1.0) -> Tensor:
        """skip_scale * x + dt * F(x, t), as one fused call.

        dt, skip_scale: a number, or a tensor (0-d, or one value a channel) which receives gradients. Under autocast a
        float32 x is added as it is, which PyTorch's own operations then do; F alone stays fused.

        Raises ValueError where dt is not finite (looked at on the CPU only) or F changes the shape of x.
        """
        require_finite("dt", dt)
        return self._call(x, t, True, dt, skip_scale)

    def jvp(self, x: Tensor, v: Tensor, t: Time = 0.0) -> tuple[Tensor, Tensor]:
        """(F(x, t), J v), J the derivative of F at x; for use without autograd.

        The fused operators have no forward-mode derivative, so PyTorch's own operations compute both: exact to
        rounding, where a finite difference of fused calls would lose half of the digits.

        Raises ValueError where a norm takes the batch's statistics, which every evaluation would update.
        """
        self.require_fixed_norms("a derivative of F")
        t = t.detach() if isinstance(t, Tensor) else t
        found = torch.func.jvp(lambda point: self._call(point, t, False, 1.0, 1.0, "eager"), (x,), (v,))
        return found[0], found[1]

    def require_fixed_norms(self, what: str) -> None:
        """Raises ValueError where a norm takes the batch's statistics: F is then no function of one sample alone."""
        for i, stage in enumerate(self._known.of(self).spec.stages):
            if stage.norm and stage.batch_stats:
                raise ValueError(
                    f"{what} evaluates F again and again, and the norm of stage {i} takes the batch's statistics, "
                    "which ties the samples to each other and updates the running ones each time; accepted: "
                    "branch.eval() (its parameters still receive gradients), or a branch without norms"
                )

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of F(x) for x [N, C, H, W], from sizes alone."""
        known = self._known.of(self)
        size = (x.shape[2], x.shape[3])
        for stage, params in zip(known.spec.stages, known.params.stages, strict=True):
            size = stage.output_size(size, (params.weight.shape[2], params.weight.shape[3]))
        return x.shape[0], known.params.stages[-1].weight.shape[0], *size

    def describe(self) -> tuple[BlockParams, BlockSpec]:
        """Tensors and spec of F in its present state, at t = 0; raises NotFusable."""
        stages, order = stages_of(self.net)
        # the last activation belongs to F, so in a step it stands before the addition
        return describe(BlockModules(stages, "none", order="pre" if order == "pre" else "branch"), self.memory)

    def _call(
        self, x: Tensor, t: Time, steps: bool, scale: Scale, skip_scale: Scale, backend: str | None = None
    ) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        variants = self._known.of(self)
        time: tuple[list[Tensor], Time] | None = None
        if self.time_biases is not None:
            _require_one_time(t)
            time = list(self.time_biases), t
        return variants.call(x, time, steps, scale, skip_scale, backend or self.backend)


def require_finite(name: str, value: Scale) -> None:
    """Raises ValueError for a number, or a tensor on the CPU, that is not finite; elsewhere looking would wait."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or _is_traced() or bool(value.detach().isfinite().all()):
            return
    elif math.isfinite(value):
        return
    raise ValueError(f"{name} is {value!r}; accepted: finite numbers")


def _require_one_time(t: Time) -> None:
    if isinstance(t, Tensor) and t.numel() != 1:
        raise ValueError(f"t must hold one value for the whole batch, got {tuple(t.shape)}")
    require_finite("t", t)


class _Known:
    """What a branch last was; copies and pickles begin without it."""

    def __init__(self) -> None:
        self._description = Description()
        self._variants: _Variants | None = None

    def of(self, branch: Branch) -> _Variants:
        if _is_traced():  # has its own guards
            return _Variants(*branch.describe())
        _, holds = self._description.recall(branch)
        if not holds or self._variants is None:
            block = branch.describe()
            self._variants = _Variants(*block)
            self._description.keep(Described(*block, None), module_state.snapshot(branch.modules()))
        return self._variants

    def __reduce__(self) -> tuple[type[_Known], tuple[()]]:
        return _Known, ()


class _Variants:
    """The tensors of F, and those of its steps and times, which share all but the scales and the biases.

    What evaluation folds or packs hangs on a BlockParams, so one is kept for each of the last step sizes and times.
    What is known of shapes and dtypes holds for all of them and is handed on.
    """

    def __init__(self, params: BlockParams, spec: BlockSpec) -> None:
        self.params, self.spec = params, spec
        self._step_spec = replace(spec, skip="identity")
        size = sum(p.weight.numel() * p.weight.element_size() for p in params.stages)
        self._most_kept = min(max(KEPT_BYTES // max(size, 1), FEWEST_KEPT), MOST_KEPT)
        self._kept: OrderedDict[Any, BlockParams] = OrderedDict()
        self._checked: dict[bool, Any] = {}

    def call(
        self,
        x: Tensor,
        time: tuple[list[Tensor], Time] | None,
        steps: bool,
        scale: Scale,
        skip_scale: Scale,
        backend: str,
    ) -> Tensor:
        """time: the branch's time biases and t; steps: skip_scale * x is added."""
        spec = self._step_spec if steps else self.spec
        params = self._variant(time, steps, scale, skip_scale)
        if _is_traced():
            return functional.residual_block(x, params, spec, backend=backend)
        params.kept.checked = self._checked.get(steps)
        out = functional.residual_block(x, params, spec, backend=backend)
        self._checked[steps] = params.kept.checked
        return out

    def _variant(
        self, time: tuple[list[Tensor], Time] | None, steps: bool, scale: Scale, skip_scale: Scale
    ) -> BlockParams:
        scale, skip_scale = _number_if_constant(scale), _number_if_constant(skip_scale)
        if time is not None:
            time = time[0], _number_if_constant(time[1])
        key = self._key(time, steps, scale, skip_scale)
        known = None if key is None else self._kept.get(key)
        if key is not None and known is not None:
            self._kept.move_to_end(key)
            return known
        params = self.params if time is None else _at_time(self.params, self.spec, *time)
        params = replace(params, branch_scale=scale, skip_scale=skip_scale)
        if key is not None:
            self._kept[key] = params
            if len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
        return params

    def _key(self, time: tuple[list[Tensor], Time] | None, steps: bool, scale: Scale, skip_scale: Scale) -> Any:
        """What a variant depends on beside the tensors it shares; None where it is for one call only."""
        if isinstance(scale, Tensor) or isinstance(skip_scale, Tensor) or _is_traced():
            return None
        if time is None:
            return steps, scale, skip_scale
        biases, t = time
        if isinstance(t, Tensor) or torch.is_grad_enabled():  # b + t c belongs to a graph
            return None
        made_of = [*biases, *(b for p in self.params.stages for b in (p.bias, p.norm_bias) if b is not None)]
        values = operators.fingerprint(made_of, "everything")  # which may change in place
        return None if values is None else (steps, scale, skip_scale, t, values)


def stages_of(net: nn.Module) -> tuple[tuple[StageModules, ...], Order]:
    """The stages of a chain of modules, and "pre" where its first is no convolution; raises NotFusable."""
    leaves = [leaf for leaf in _leaves(net) if type(leaf) is not nn.Identity]
    kinds = [_kind(leaf) for leaf in leaves]
    pre = bool(kinds) and kinds[0] != "conv"
    stages: list[StageModules] = []
    parts: dict[str, nn.Module] = {}
    for kind, leaf in zip(kinds, leaves, strict=True):
        begins = "conv" in parts if pre else kind == "conv" and bool(parts)
        if begins:
            stages.append(StageModules(parts["conv"], parts.get("norm"), parts.get("act")))
            parts = {}
        if kind in parts or (kind == "norm" and "act" in parts):
            break
        parts[kind] = leaf
    else:
        if "conv" in parts:
            stages.append(StageModules(parts["conv"], parts.get("norm"), parts.get("act")))
            return tuple(stages), "pre" if pre else "post"
    names = ", ".join(type(leaf).__name__ for leaf in leaves) or "nothing"
    raise NotFusable(
        f"a branch is a chain of conv, [norm], [act] for each stage, or of [norm], [act], conv; given: {names}"
    )


def _leaves(net: nn.Module) -> Iterable[nn.Module]:
    if type(net) is nn.Sequential:
        require_no_hooks("net", net)
        for child in net:
            yield from _leaves(child)
    else:
        yield net


def _kind(module: nn.Module) -> str:
    if recognise(module) is not None:
        return "act"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if isinstance(module, nn.modules.batchnorm._NormBase) or frozen_norm(type(module)) is not None:
        return "norm"
    raise NotFusable(
        f"a branch has {type(module).__name__}; accepted: nn.Conv2d, nn.BatchNorm2d, FrozenBatchNorm2d and the "
        f"activations {', '.join(KINDS)}"
    )


def _in_order(stage: StageModules, order: Order) -> Iterable[nn.Module]:
    act = stage.act
    if act is not None and not isinstance(act, nn.Module):
        found = recognise(act)
        if found is None or found.kind.learned:
            raise NotFusable(f"act is {act!r}; accepted: {', '.join(KINDS)}, their functions and modules")
        act = _module_of(found)
    ordered = (stage.norm, act, stage.conv) if order == "pre" else (stage.conv, stage.norm, act)
    return (module for module in ordered if module is not None)


def _module_of(act: Activation) -> nn.Module:
    if act.name == "leaky_relu":
        return nn.LeakyReLU(act.parameter)
    return nn.GELU("tanh") if act.name == "gelu_tanh" else act.kind.modules[0]()


def _time_bias(params: StageParams, stage: StageSpec, order: Order) -> nn.Parameter:
    channels = params.weight.shape[1] * stage.groups if stage.norm and order == "pre" else params.weight.shape[0]
    return nn.Parameter(params.weight.detach().new_zeros(channels))


def _at_time(params: BlockParams, spec: BlockSpec, biases: list[Tensor], t: Time) -> BlockParams:
    """params with b + t c for each stage's bias b, that of the norm where there is one."""

    def shifted(bias: Tensor | None, c: Tensor) -> Tensor:
        return c * t if bias is None else bias + c * t

    stages = [
        replace(p, norm_bias=shifted(p.norm_bias, c)) if stage.norm else replace(p, bias=shifted(p.bias, c))
        for p, stage, c in zip(params.stages, spec.stages, biases, strict=True)
    ]
    return replace(params, stages=tuple(stages))


def _number_if_constant(value: Scale) -> Scale:
    """A tensor of one value as a number, where no derivative is asked of it and reading it waits for nothing."""
    if not isinstance(value, Tensor):
        return float(value)
    constant = (
        type(value) in (Tensor, nn.Parameter)
        and value.device.type == "cpu"
        and value.numel() == 1
        and not (value.requires_grad and torch.is_grad_enabled())
        and not _is_traced()
        and functional.differentiated_otherwise(value, ()) is None
    )
    return float(value) if constant else value


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
