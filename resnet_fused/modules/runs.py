"""Which children a class's methods call one after the other, told by their source, and these methods with each such
run as one call.

    x = self.conv1(x)
    x = self.bn1(x)                     x = self._fused_run(("conv1", "bn1", "relu"), x)
    x = self.relu(x)

A run is taken only where nothing else can see what lies between its calls: each result is given to the next child and
to nothing else, in the next statement or in the same expression. So ``_fused_run`` may compute all of them in one go,
and where it calls them one by one, the method is what it was. A source that does not compile to the method's own
bytecode (edited since, decorated) is not read.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import linecache
from collections import Counter
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType

import torch
from torch import nn
from torch.fx import GraphModule

Run = tuple[str, ...]  # qualified names of what is called, in order
CALL = "_fused_run"
ITEMS = "_fused_items"
# methods that call the items of their nn.ModuleDict in order and return those named in `return_layers`
FLATTEN = "torch.flatten"  # in a run: torch.flatten(x, 1)
GETTERS = (
    "torchvision.models._utils.IntermediateLayerGetter.forward",
    "timm.models._features.FeatureDictNet._collect",
)
LOOKS_AT_LOCALS = {"locals", "vars", "eval", "exec"}


@cache
def merged(cls: type[nn.Module]) -> tuple[dict[str, FunctionType], tuple[Run, ...]]:
    """The methods of `cls` with runs as one call, by name, and the runs of `forward` first."""
    methods: dict[str, FunctionType] = {}
    runs: dict[Run, None] = {}
    if issubclass(cls, GraphModule):  # its class is its own, and its forward is written anew with each change
        return methods, ()
    for name, method in _methods(cls):
        found = _merge(cls, method)
        if found is not None:
            methods[name], new = found
            runs.update(dict.fromkeys(new))
    return methods, tuple(runs)


def _methods(cls: type[nn.Module]) -> Iterator[tuple[str, FunctionType]]:
    """forward, what it calls of the class itself, and the other ways through the model ("forward_features")."""
    waiting = ["forward", *(name for name in dir(cls) if name.startswith("forward_"))]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop(0)
        method = inspect.getattr_static(cls, name, None)
        if name in seen or not isinstance(method, FunctionType) or method.__module__.startswith("torch."):
            continue
        seen.add(name)
        yield name, method
        waiting += [called for called in method.__code__.co_names if called not in seen]


def _merge(cls: type[nn.Module], method: FunctionType) -> tuple[FunctionType, list[Run]] | None:
    """The method with its runs merged; None without a run, or where its source is not known for certain."""
    tree = _source(method)
    if tree is None:
        return None
    assert isinstance(tree.body[0], ast.FunctionDef)
    function = tree.body[0]
    getter = f"{method.__module__}.{method.__qualname__}" in GETTERS
    merger = _Merger(cls, function, getter, flattens=method.__globals__.get("torch") is torch)
    if not merger.may_read:
        return None
    function.body = merger.statements(function.body)
    if not merger.changed:
        return None
    code = _compiled(ast.fix_missing_locations(tree), method)
    assert code is not None
    made = FunctionType(code, method.__globals__, method.__name__, method.__defaults__)
    made.__kwdefaults__, made.__qualname__, made.__doc__ = method.__kwdefaults__, method.__qualname__, method.__doc__
    made.__annotations__, made.__module__ = method.__annotations__, method.__module__
    return made, merger.runs


def _source(method: FunctionType) -> ast.Module | None:
    """The method's definition, where compiling it gives the method's own bytecode."""
    try:
        source = inspect.getsource(method)
        tree = ast.parse(f"if True:\n{source}" if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return None
    first = tree.body[0]
    function = first.body[0] if isinstance(first, ast.If) else first
    if not isinstance(function, ast.FunctionDef) or function.decorator_list or method.__code__.co_freevars:
        return None
    arguments = function.args
    everyone = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
    for argument in everyone:
        if argument is not None:
            argument.annotation = None
    function.returns = None
    # evaluated where it was defined: the values are taken over from there
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [None if value is None else ast.Constant(None) for value in arguments.kw_defaults]
    ast.increment_lineno(function, method.__code__.co_firstlineno - function.lineno)
    # the compiler emits other instructions for calls of a name that its module imports
    imported = [ast.Import([ast.alias(name)]) for name in method.__code__.co_names if name in _imports(method)]
    module = ast.fix_missing_locations(ast.Module([function, *imported], []))
    code = _compiled(module, method)
    return module if code is not None and _same(code, method.__code__) else None


def _imports(method: FunctionType) -> frozenset[str]:
    source = inspect.getsourcefile(method)
    return frozenset() if source is None else _imported_by(source)


@cache
def _imported_by(filename: str) -> frozenset[str]:
    """The names that a file imports outside of its functions."""
    try:
        waiting: list[ast.AST] = [ast.parse("".join(linecache.getlines(filename)))]
    except SyntaxError:
        return frozenset()
    names: set[str] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.Module, ast.If, ast.Try, ast.With)):
            waiting += ast.iter_child_nodes(node)
    return frozenset(names)


def _compiled(module: ast.Module, method: FunctionType) -> CodeType | None:
    flags = method.__code__.co_flags & __future__.annotations.compiler_flag
    whole = compile(module, method.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    return next((const for const in whole.co_consts if isinstance(const, CodeType)), None)


def _same(made: CodeType, given: CodeType) -> bool:
    def told(code: CodeType) -> tuple[object, ...]:
        constants = [(type(const), const) for const in code.co_consts if not isinstance(const, CodeType)]
        return code.co_code, code.co_names, code.co_varnames, code.co_cellvars, constants

    return told(made) == told(given)


class _Merger:
    """Merges the runs of one function."""

    def __init__(self, cls: type[nn.Module], function: ast.FunctionDef, getter: bool, flattens: bool) -> None:
        """flattens: whether the name torch is the package's."""
        self.runs: list[Run] = []
        self.changed = False
        self._cls, self._getter, self._flattens = cls, getter, flattens
        nodes = list(ast.walk(function))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        self._loads = Counter(node.id for node in names if not isinstance(node.ctx, ast.Store))
        nested = [node for node in nodes if isinstance(node, (ast.Lambda, ast.FunctionDef)) and node is not function]
        self._captured = {node.id for each in nested for node in ast.walk(each) if isinstance(node, ast.Name)}
        arguments = function.args.posonlyargs + function.args.args
        self._self = arguments[0].arg if arguments else ""
        rebound = any(node.id == self._self and not isinstance(node.ctx, ast.Load) for node in names)
        outside = any(isinstance(node, (ast.Global, ast.Nonlocal)) for node in nodes)
        self.may_read = bool(arguments) and not (rebound or outside or LOOKS_AT_LOCALS & self._loads.keys())

    def statements(self, body: list[ast.stmt]) -> list[ast.stmt]:
        merged: list[ast.stmt] = []
        for statement in body:
            self._descend(statement)
            if merged and self._continues(merged[-1], statement):
                before = merged.pop()
                assert isinstance(before, ast.Assign) and isinstance(statement, (ast.Assign, ast.Return))
                assert statement.value is not None
                first, given = self._applied(before.value)
                second, _ = self._applied(statement.value)
                statement.value = self._apply(first + second, given, statement.value)
            merged.append(statement)
        return [_Calls(self).visit(statement) for statement in merged]

    def _descend(self, statement: ast.stmt) -> None:
        """Into branches and loops. Not into try and with, where an exception may leave half of a run behind."""
        if isinstance(statement, (ast.If, ast.For, ast.While)):
            statement.body = self.statements(statement.body)
            statement.orelse = self.statements(statement.orelse)

    def _continues(self, before: ast.stmt, statement: ast.stmt) -> bool:
        """Whether `statement` gives what `before` has computed to the next child, and nothing else sees it."""
        target = _target(before)
        if target is None or not isinstance(statement, (ast.Assign, ast.Return)) or statement.value is None:
            return False
        assert isinstance(before, ast.Assign)
        names, given = self._applied(statement.value)
        if not names or not self._applied(before.value)[0] or target in self._captured:
            return False
        if not (isinstance(given, ast.Name) and given.id == target):
            return False
        return isinstance(statement, ast.Return) or _target(statement) == target or self._loads[target] == 1

    def _applied(self, node: ast.expr) -> tuple[Run, ast.expr]:
        """self.c(self.b(self.a(x))) as ((a, b, c), x)."""
        names: list[str] = []
        while isinstance(node, ast.Call) and node.args and not node.keywords:
            name = FLATTEN if self._is_flatten(node) else self._child(node.func) if len(node.args) == 1 else None
            if name is None or isinstance(node.args[0], ast.Starred):
                break
            names.insert(0, name)
            node = node.args[0]
        return tuple(names), node

    def _is_flatten(self, node: ast.Call) -> bool:
        """torch.flatten(anything, 1), where torch is no local variable."""
        return self._flattens and ast.unparse(node.func) == FLATTEN and [ast.unparse(a) for a in node.args[1:]] == ["1"]

    def _child(self, node: ast.expr) -> str | None:
        """The qualified name of what an instance holds; None for the class's own methods and anything else."""
        path: list[str] = []
        while isinstance(node, ast.Attribute):
            path.insert(0, node.attr)
            node = node.value
        if not path or not (isinstance(node, ast.Name) and node.id == self._self):
            return None
        return None if inspect.getattr_static(self._cls, path[0], None) is not None else ".".join(path)

    def _apply(self, names: Run, given: ast.expr, like: ast.expr) -> ast.expr:
        """As nested calls of the children, which `_Calls` makes one of."""
        node = given
        for name in names:
            first, *path = name.split(".") if name == FLATTEN else (self._self, *name.split("."))
            child: ast.expr = ast.Name(first, ast.Load())
            for part in path:
                child = ast.Attribute(child, part, ast.Load())
            node = ast.Call(child, [node, ast.Constant(1)] if name == FLATTEN else [node], [])
        return ast.copy_location(node, like)

    def one_call(self, node: ast.Call) -> ast.expr | None:
        """What replaces this call, if anything does."""
        function: ast.expr = ast.Attribute(ast.Name(self._self, ast.Load()), CALL, ast.Load())
        if self._getter and self._child_of_self(node.func) == "items" and not node.args:
            self.changed = True
            function = ast.Attribute(ast.Name(self._self, ast.Load()), ITEMS, ast.Load())
            return ast.copy_location(ast.Call(function, [], []), node)
        names, given = self._applied(node)
        if len(names) < 2:
            return None
        self.changed = True
        self.runs.append(names)
        path = ast.Tuple([ast.Constant(name) for name in names], ast.Load())
        return ast.copy_location(ast.Call(function, [path, given], []), node)

    def _child_of_self(self, node: ast.expr) -> str | None:
        held = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self._self
        return node.attr if held else None  # type: ignore[attr-defined]


class _Calls(ast.NodeTransformer):
    """Nested calls of children as one, wherever they stand; what `_Merger` has not gone into is left as it is."""

    def __init__(self, merger: _Merger) -> None:
        self._merger = merger

    def visit_Call(self, node: ast.Call) -> ast.AST:
        made = self._merger.one_call(node)
        return self.generic_visit(node if made is None else made)

    def _leave(self, node: ast.AST) -> ast.AST:
        return node

    visit_Lambda = visit_FunctionDef = visit_ClassDef = visit_Try = visit_With = _leave  # noqa: N815


def _target(statement: ast.stmt) -> str | None:
    """The name that an assignment sets."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None
