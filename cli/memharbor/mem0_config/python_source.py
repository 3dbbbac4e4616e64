"""
Find the configuration in a Python file, without running a line of it.

The file is parsed; the configuration is what `Memory.from_config(…)`, `Memory(…)` or `MemoryConfig(…)` is given, or else
the one dictionary at the top of the file that looks like one. Names are followed to the one place where they are
assigned. `os.environ` and `os.getenv` become variables; what only running could tell becomes `Unreadable`.
"""

from __future__ import annotations

import ast
import warnings
from typing import Any

from memharbor.errors import SourceDataError
from memharbor.mem0_config.rules import is_configuration
from memharbor.mem0_config.values import Cast, Text, Unreadable, Variable, join, parts_of

_CONSTRUCTORS = {"Memory", "AsyncMemory", "MemoryConfig"}
_COMPONENT_CLASSES = {
    "MemoryConfig",
    "VectorStoreConfig",
    "LlmConfig",
    "EmbedderConfig",
    "GraphStoreConfig",
    "RerankerConfig",
}
_CASTS: dict[str, Cast] = {"int": "int", "float": "float", "bool": "bool"}
_CHANGING = {"update", "setdefault", "pop", "popitem", "clear"}
_DEPTH_MAX = 50


def read_python(source: str, name: str) -> dict[str, Any]:
    """
    Read the configuration of a Python file.

    Args:
        source: The file's text.
        name: How messages call the file.

    Raises:
        SourceDataError: It is no Python, holds no configuration or more than one, or one that cannot be followed; the
            message names the line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except SyntaxError as exc:
        raise SourceDataError(f"{name}, line {exc.lineno or 1}: this is no Python: {exc.msg}") from None
    except (ValueError, RecursionError, MemoryError):
        raise SourceDataError(f"{name} is no Python that can be read") from None
    return _Reader(tree, name).find()


class _Reader:
    def __init__(self, tree: ast.Module, name: str) -> None:
        self._name = name
        self._scope_of: dict[ast.AST, ast.AST] = {}
        self._branches: set[ast.AST] = set()
        self._assigned: dict[tuple[ast.AST, str], list[ast.expr]] = {}
        self._items: dict[tuple[ast.AST, str], list[tuple[ast.Subscript, ast.expr]]] = {}
        self._changed: dict[tuple[ast.AST, str], int] = {}
        self._following: set[tuple[ast.AST, str]] = set()
        self._tree = tree
        self._walk(tree, tree, within_branch=False)

    def find(self) -> dict[str, Any]:
        """Find the one configuration, or say which lines hold several."""
        given = [(argument, line) for call in self._calls() for argument, line in self._argument_of(call)]
        values = [(self._value(argument), line) for argument, line in given]
        found = [(value, line) for value, line in values if isinstance(value, dict)]
        unread = [line for value, line in values if not isinstance(value, dict)]
        if not found:
            found = self._dictionaries()
        distinct = [each for index, each in enumerate(found) if each[0] not in [other for other, _ in found[:index]]]
        if len(distinct) == 1:
            config: dict[str, Any] = distinct[0][0]
            return config
        if distinct:
            lines = ", ".join(str(line) for _, line in distinct)
            raise SourceDataError(
                f"{self._name} holds {len(distinct)} configurations, on lines {lines}",
                hint="put the one that is meant into a file of its own",
            )
        where = f", line {unread[0]}" if unread else ""
        raise SourceDataError(
            f"{self._name}{where}: no configuration of Mem0 is written out here",
            hint="write it as a dictionary with `vector_store`, `llm` or `embedder`, or as JSON",
        )

    def _walk(self, node: ast.AST, scope: ast.AST, *, within_branch: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
            self._scope_of[child] = scope
            branch = isinstance(child, ast.If | ast.For | ast.While | ast.Match) or (within_branch and not inner)
            if branch:
                self._branches.add(child)
            if isinstance(child, ast.Assign | ast.AnnAssign) and child.value is not None:
                for target in child.targets if isinstance(child, ast.Assign) else [child.target]:
                    self._note(target, child.value, scope)
            self._note_change(child, scope)
            self._walk(child, child if inner else scope, within_branch=branch)

    def _note(self, target: ast.expr, value: ast.expr, scope: ast.AST) -> None:
        if isinstance(target, ast.Name):
            self._assigned.setdefault((scope, target.id), []).append(value)
        elif isinstance(target, ast.Subscript) and (root := _root_name(target)):
            self._items.setdefault((scope, root), []).append((target, value))

    def _note_change(self, node: ast.AST, scope: ast.AST) -> None:
        """Keep in mind what changes a dictionary in a way that is not followed."""
        changed: list[ast.expr] = []
        match node:
            case ast.AugAssign(target=target):
                changed = [target]
            case ast.Delete(targets=targets):
                changed = targets
            case ast.Call(func=ast.Attribute(value=owner, attr=method)) if method in _CHANGING:
                changed = [owner]
        for name in filter(None, map(_root_name, changed)):
            self._changed.setdefault((scope, name), node.lineno)  # type: ignore[attr-defined]  # all three have one

    def _calls(self) -> list[ast.Call]:
        calls = [node for node in ast.walk(self._tree) if isinstance(node, ast.Call)]
        from_config = [call for call in calls if _last_name(call.func) == "from_config"]
        return from_config or [call for call in calls if _last_name(call.func) in _CONSTRUCTORS]

    def _argument_of(self, call: ast.Call) -> list[tuple[ast.expr, int]]:
        if _last_name(call.func) == "MemoryConfig":
            return [(call, call.lineno)]
        named = [each.value for each in call.keywords if each.arg in ("config", "config_dict")]
        arguments = [*call.args[:1], *named]
        return [(argument, call.lineno) for argument in arguments]

    def _dictionaries(self) -> list[tuple[Any, int]]:
        found = []
        for (scope, name), values in self._assigned.items():
            for each in values:
                value = self._name_value(name, scope, each) if len(values) == 1 else self._value(each)
                if isinstance(value, dict) and is_configuration(value):
                    found.append((value, each.lineno))
        return found

    def _value(self, node: ast.expr, depth: int = 0) -> Any:
        """Tell a value without running anything; `Unreadable` where that is not possible."""
        unread = Unreadable(node.lineno)
        if depth > _DEPTH_MAX:
            return unread
        match node:
            case ast.Constant(value=str() | int() | float() | bool() | None as plain):
                return plain
            case ast.Dict():
                return self._dictionary(node, depth)
            case ast.List() | ast.Tuple():
                return [self._value(each, depth + 1) for each in node.elts]
            case ast.Name(id=name):
                return self._followed(node, name, depth)
            case ast.JoinedStr() | ast.BinOp(op=ast.Add()):
                return self._joined(node, depth)
            case ast.Subscript() if _last_name(node.value) == "environ":
                return self._variable([node.slice], depth) or unread
            case ast.BoolOp(op=ast.Or(), values=[first, second]):
                return self._with_default(self._value(first, depth + 1), self._value(second, depth + 1)) or unread
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.Call():
                called = self._called(node, depth)
                return unread if called is None else called
        return unread

    def _dictionary(self, node: ast.Dict, depth: int) -> dict[str, Any] | Unreadable:
        found: dict[str, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            name = None if key is None else self._value(key, depth + 1)
            read = self._value(value, depth + 1)
            if key is None and isinstance(read, dict):
                found |= read
            elif isinstance(name, str):
                found[name] = read
            else:
                return Unreadable(value.lineno)
        return found

    def _followed(self, node: ast.expr, name: str, depth: int) -> Any:
        scope: ast.AST | None = self._scope_of[node]
        while scope is not None:
            assigned = self._assigned.get((scope, name), [])
            if len(assigned) > 1:
                lines = ", ".join(str(each.lineno) for each in assigned)
                raise SourceDataError(
                    f"{self._name}: `{name}` is assigned more than once, on lines {lines}",
                    hint="put the configuration that is meant into a file of its own",
                )
            if assigned:
                return self._name_value(name, scope, assigned[0], depth)
            if name in _parameters(scope):
                break
            scope = self._scope_of.get(scope)
        return Unreadable(node.lineno)

    def _name_value(self, name: str, scope: ast.AST, assigned: ast.expr, depth: int = 0) -> Any:
        """Tell the value of a name, with the items that are set on it afterwards."""
        if (scope, name) in self._following:
            return Unreadable(assigned.lineno)
        self._following.add((scope, name))
        value = self._value(assigned, depth + 1)
        self._following.discard((scope, name))
        if isinstance(value, dict):
            self._refuse_changes(name, scope)
        for target, item in self._items.get((scope, name), []):
            keys: list[Any] = []
            where: ast.expr = target
            while isinstance(where, ast.Subscript):
                keys.insert(0, self._value(where.slice, depth + 1))
                where = where.value
            place = value
            for key in keys[:-1]:
                place = place.get(key) if isinstance(place, dict) else None
            if target in self._branches or not isinstance(place, dict) or not isinstance(keys[-1], str):
                raise self._untold(name, target.lineno)
            place[keys[-1]] = self._value(item, depth + 1)
        return value

    def _refuse_changes(self, name: str, scope: ast.AST) -> None:
        """Refuse what changes a name in a way, or from a function, that is not followed."""
        for (where, changed), line in self._changed.items():
            if changed == name and (where is scope or (where, name) not in self._assigned):
                raise self._untold(name, line)
        for (where, changed), items in self._items.items():
            if changed == name and where is not scope and (where, name) not in self._assigned:
                raise self._untold(name, items[0][0].lineno)

    def _untold(self, name: str, line: int) -> SourceDataError:
        return SourceDataError(
            f"{self._name}, line {line}: what is set on `{name}` here cannot be told without running it",
            hint="write the configuration as one dictionary",
        )

    def _joined(self, node: ast.JoinedStr | ast.BinOp, depth: int) -> str | Text | Unreadable:
        if isinstance(node, ast.JoinedStr):
            pieces = [self._piece(each, depth) for each in node.values]
        else:
            pieces = [self._value(node.left, depth + 1), self._value(node.right, depth + 1)]
        parts: list[str | Variable] = []
        for piece in pieces:
            if not isinstance(piece, str | Text):
                return Unreadable(node.lineno)
            parts += parts_of(piece)
        return join(parts)

    def _piece(self, node: ast.expr, depth: int) -> Any:
        if not isinstance(node, ast.FormattedValue):
            return self._value(node, depth + 1)
        if node.format_spec is not None:
            return Unreadable(node.lineno)
        value = self._value(node.value, depth + 1)
        return str(value) if isinstance(value, int | float) else value

    def _called(self, node: ast.Call, depth: int) -> Any:
        name = _last_name(node.func)
        owner = _last_name(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name == "getenv" or (owner == "environ" and name == "get"):
            defaults = [each.value for each in node.keywords if each.arg == "default"]
            return self._variable([*node.args, *defaults], depth)
        if name == "dict" or name in _COMPONENT_CLASSES:
            return {each.arg: self._value(each.value, depth + 1) for each in node.keywords if each.arg}
        if len(node.args) < 1:
            return None
        value = self._value(node.args[0], depth + 1)
        if name in _CASTS and isinstance(value, Text):
            return Text(value.parts, _CASTS[name])
        if name == "int" and isinstance(value, str) and value.isdecimal():
            return int(value)
        if name == "str" and isinstance(value, str | Text):
            return value
        if name in ("quote", "quote_plus") and isinstance(value, Text):
            encoded = [Variable(each.name, each.default, encoded=True) for each in value.variables]
            return Text(tuple(encoded)) if len(encoded) == len(value.parts) else None
        return None

    def _variable(self, arguments: list[ast.expr], depth: int) -> Text | None:
        values = [self._value(each, depth + 1) for each in arguments]
        if not values or not isinstance(values[0], str):
            return None
        default = values[1] if len(values) > 1 else None
        if isinstance(default, Text):
            default = None
        return Text((Variable(values[0], None if default is None else str(default)),))

    @staticmethod
    def _with_default(first: Any, second: Any) -> Any:
        if isinstance(first, Text) and len(first.parts) == 1 and isinstance(second, str | int):
            return Text((Variable(first.variables[0].name, str(second)),))
        return first if isinstance(first, Text) and isinstance(second, Text) else None


def _root_name(node: ast.expr) -> str:
    """Name what items are set on: `a` of `a["b"]["c"]`."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _parameters(scope: ast.AST) -> set[str]:
    if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return set()
    given = scope.args
    return {
        each.arg for each in [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg] if each
    }


def _last_name(node: ast.expr) -> str:
    """Name what is called, without what it is called on."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
