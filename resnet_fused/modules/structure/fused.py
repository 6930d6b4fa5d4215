"""The class of a block that is fused by what its trace shows, and what is kept of that."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.block_modules import Modules
from resnet_fused.modules.fused_block import FusedBlock, FusedModule, Settings, inject
from resnet_fused.modules.module_state import GLOBAL_HOOKS
from resnet_fused.modules.operations import look_up
from resnet_fused.modules.structure.match import match
from resnet_fused.modules.structure.proof import prove
from resnet_fused.modules.structure.recipe import Join, Recipe, build, fused_calls, words
from resnet_fused.modules.structure.trace import DROPOUTS, has_hooks, takes_x_alone, trace

KEPT = 8  # states of a block: its modes, and those that a user alternates between
_deriving = threading.RLock()  # torch.fx changes nn.Module while it traces
_refused: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


class Match(NamedTuple):
    """words: the recipe in a line; promotes: it scales by a tensor that widens 16 bits under autocast."""

    recipe: Recipe
    words: str
    promotes: bool


class Matches:
    """What was found in each state of a block (`_state`): a match, or the reason against one.

    Names alone are kept, so copies of a block begin with what was proven. Pickles begin without it.
    """

    __slots__ = ("_kept",)

    def __init__(self, kept: tuple[Found, ...] = ()) -> None:
        self._kept = kept

    def of(self, block: nn.Module, known: list[Found] | None = None) -> Match:
        """In its present state: kept, or among `known`, or traced and proven now. Raises NotFusable."""
        if any(GLOBAL_HOOKS):
            raise NotFusable("global module hooks are registered and would not run for the block's children")
        if torch.compiler.is_compiling():
            return self._of_compiled(block)
        state = _state(block)
        found = next((found for kept, found in (*self._kept, *(known or ())) if kept == state), None)
        if found is None:
            with _deriving:
                found = _derive(block)
            if known is not None:
                known.append((state, found))
        if not any(kept == state for kept, _ in self._kept):
            self._kept = (*self._kept[1 - KEPT :], (state, found))
        if isinstance(found, str):
            raise NotFusable(found)
        return found

    def may_promote(self) -> bool:
        """Whether it is worth asking `of`, which takes a tenth of a millisecond."""
        return not self._kept or any(isinstance(found, Match) and found.promotes for _, found in self._kept)

    def _of_compiled(self, block: nn.Module) -> Match:
        """A graph is made: nothing can be traced, and attributes are compared where Dynamo sees it."""
        for state, found in self._kept:
            if isinstance(found, Match) and state.holds(block):
                return found
        raise NotFusable("in this state it has not been traced yet: call it once before it is compiled")

    def __deepcopy__(self, memo: dict[int, Any]) -> Matches:
        return Matches(self._kept)

    def __reduce__(self) -> tuple[type[Matches], tuple[()]]:
        return Matches, ()


class FusedByStructure(FusedBlock):
    """A block of a class that no adapter knows."""

    _fused_attributes: ClassVar[tuple[str, ...]] = (*FusedBlock._fused_attributes, "_fused_matches")
    _fused_matches: Matches

    def forward(self, x: Tensor) -> Tensor:
        if _is_widened(x) and self._fused_matches.may_promote() and self._fused_promotes():
            return super(FusedModule, self).forward(x)
        return super().forward(x)

    def fused_modules(self) -> Modules:
        try:
            return build(self._fused_matches.of(self).recipe, self)
        except AttributeError as error:  # compiled, where only attributes are compared
            raise NotFusable(f"a part that was matched is missing: {error}") from error

    def _fused_promotes(self) -> bool:
        try:
            return self._fused_matches.of(self).promotes
        except NotFusable:
            return False


class FusedCall(FusedByStructure):
    """Where forward takes other arguments beside x, or calls it otherwise: given more than x, the block's own runs.

    Apart from `FusedByStructure`, since torch.fx wants a plain signature.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            return super().forward(args[0])
        return super(FusedModule, self).forward(*args, **kwargs)

    def _fused_lasts(self) -> bool:
        """Lists and the like may change in place, which no snapshot sees."""
        own = [module for module in self.modules() if not _is_of_torch(module)]
        held = [value for module in own for name, value in vars(module).items() if name not in OF_EVERY_MODULE]
        return super()._fused_lasts() and not any(isinstance(value, (list, dict, set)) for value in held)


def fuse_by_structure(block: nn.Module, settings: Settings, known: list[Found]) -> bool:
    """Fuse it, if it has a match in its present or in the other mode; otherwise `reason_against` says why not.

    known: what was found for other blocks, which holds for those that are in the same state; this one's is added.
    """
    matches, reasons = Matches(), []
    for mode in (block.training, not block.training):
        try:
            matches.of(block if mode == block.training else _in_mode(block, mode), known)
        except NotFusable as reason:
            reasons.append(str(reason))
    if len(reasons) == 2:
        _refused[block] = reasons[0]
        return False
    _refused.pop(block, None)
    inject(block, FusedByStructure if takes_x_alone(block) else FusedCall, settings)
    block._fused_matches = matches  # type: ignore[assignment]
    return True


def _in_mode(block: nn.Module, training: bool) -> nn.Module:
    """A copy, as `train` leaves it, which a user may have written."""
    try:
        copied = copy.deepcopy(block)
        copied.train(training)
    except Exception as error:  # a tensor with a history, a lock
        raise NotFusable(f"it cannot be copied, so it cannot be traced in its other mode: {error}") from error
    return copied


def reason_against(block: nn.Module) -> str | None:
    """Why the last `fuse_by_structure` left it alone; None where there was none."""
    return _refused.get(block)


def matched_words(block: FusedByStructure) -> str:
    """What was found in its present mode. Raises NotFusable."""
    alone = "" if not isinstance(block, FusedCall) else " (given more than x, its own forward runs)"
    return block._fused_matches.of(block).words + alone


def _derive(block: nn.Module) -> Match | str:
    try:
        recipe = match(block, trace(block))
        _require_gain(recipe, block)
        prove(block, recipe)
    except NotFusable as reason:
        return str(reason)
    scales = [scale for call in fused_calls(recipe) for scale in (call.branch_scale, call.skip_scale)]
    promotes = any(isinstance(scale, str) and look_up(block, scale).dim() > 0 for scale in scales)
    return Match(recipe, words(recipe, block), promotes)


def _require_gain(recipe: Recipe, block: nn.Module) -> None:
    """Raises NotFusable for single stages alone, none of which is worth it; as of the layers that adapters know."""
    calls = list(fused_calls(recipe))
    if any(isinstance(step, Join) for step in recipe) or any(len(c.stages) > 1 or c.skip != "none" for c in calls):
        return
    reasons = []
    for call in calls:
        try:
            sequential.require_gain(build((call,), block).stages[0])  # type: ignore[union-attr]
        except NotFusable as reason:
            reasons.append(reason)
    if len(reasons) == len(calls):
        raise reasons[0]


class _State(NamedTuple):
    """What a block's forward may depend on beside x and the values of its tensors.

    values:  of every module the class, whether it has hooks, its tensors' shapes and all other attributes.
    classes: (child, class), and plain: (child, attribute, value) of what a user's modules and dropouts have: what
             Dynamo can compare.
    """

    values: tuple[Any, ...]
    classes: tuple[tuple[str, type[nn.Module]], ...]
    plain: tuple[tuple[str, str, Any], ...]

    def holds(self, block: nn.Module) -> bool:
        """Whether `classes` and `plain` are as they were."""
        for path, cls in self.classes:
            now = type(look_up(block, path))
            if getattr(now, "_fused_from", now) is not cls:
                return False
        for path, attribute, value in self.plain:
            if getattr(look_up(block, path) if path else block, attribute, None) != value:
                return False
        return True


Found = tuple[_State, Match | str]  # a match, or the reason against one


class _Same:
    """Equal by identity."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


OF_EVERY_MODULE = (frozenset(vars(nn.Module())) - {"training"}) | {
    *FusedByStructure._fused_attributes,
    "_former_parameters",  # of nn.DataParallel's replicas
    "_is_replica",
}


def _state(block: nn.Module) -> _State:
    values: list[Any] = []
    classes: list[tuple[str, type[nn.Module]]] = []
    plain: list[tuple[str, str, Any]] = [("", "training", block.training)]
    for path, module in block.named_modules(remove_duplicate=False):
        own = {name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}
        # what shards or replicates a model leaves parameters as plain attributes
        held = {**module._parameters, **module._buffers, **{k: v for k, v in own.items() if isinstance(v, Tensor)}}
        tensors = sorted((name, None if t is None else tuple(t.shape)) for name, t in held.items())
        absent = [name for name, child in module._modules.items() if child is None]
        rest = sorted((name, value) for name, value in own.items() if name not in held)
        cls: type[nn.Module] = module._fused_from if isinstance(module, FusedModule) else type(module)
        if path:
            classes.append((path, cls))
        hooked = module is not block and has_hooks(module)
        values.append((path, cls, hooked, tensors, absent, [(name, _frozen(value)) for name, value in rest]))
        if not _is_of_torch(module) or isinstance(module, DROPOUTS):
            plain += [(path, name, value) for name, value in rest if isinstance(value, PLAIN) and name.isidentifier()]
    return _State(tuple(values), tuple(classes), tuple(plain))


PLAIN = (bool, int, float, str, type(None))


def _frozen(value: Any) -> Any:
    """For comparison later, when what can be changed may have been."""
    if isinstance(value, (*PLAIN, torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), [_frozen(each) for each in value]
    if isinstance(value, dict):
        return type(value), [(_frozen(key), _frozen(each)) for key, each in value.items()]
    return _Same(value)


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _is_widened(x: object) -> bool:
    return isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type)
