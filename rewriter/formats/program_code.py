"""The texts in a serialized program that torch evaluates as Python: each must be nothing but what torch writes there.

`torch.export.load` hands size expressions to sympy (which evaluates them), resolves operator names attribute by
attribute from `torch`, and builds classes that tree specs name. The loaded program's `module()` compiles a function
from its guards, from argument names and from literal inputs. An archive can carry other code in all of these places.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rewriter.errors import UnsafeError

_OPERATOR = re.compile(
    r"torch\.ops\.(?!load_library\b|loaded_libraries\b|import_module\b|_|\w+\.__(?:call|class|init|get|set|dict|globals))"
    r"\w+\.\w+(\.\w+)?"
    r"|_operator\.(getitem|add|mul|sub|truediv|ge|le|gt|lt|eq|ne|floordiv|mod|and_|or_|not_|pow|neg|abs|lshift|rshift)"
    r"|math\.(ceil|floor|trunc)|torch\.sym_\w+|torch\._sym_\w+"
    r"|torch(\._C\._|\.autograd\.grad_mode\.)set_grad_enabled|torch\.amp\.autocast_mode\._(enter|exit)_autocast"
)
_PLAIN = re.compile(r"[^\"'\\\n\r\x00]*")
_NUMBER_OR_NAME = re.compile(r"[A-Za-z0-9_.+-]*")

_SIZE_FUNCTION = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|Mod|floor|ceiling|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality"
    r"|(Strict)?(Greater|Less)Than|And|Or|Not|Xor|Piecewise|ExprCondPair|Tuple|sqrt|log|exp|Where|PythonMod|Identity"
    r"|(Floor|Clean|Ceil|FloatTrue|IntTrue)Div|ModularIndexing|(Ceil|Floor|Trunc|Round)ToInt|TruncToFloat|ToFloat"
    r"|[LR]Shift|PowByNatural|FloatPow|RoundDecimal|IsNonOverlappingAndDenseIndicator|(OpaqueUnaryFn|BitwiseFn)_\w+"
)
_GUARD_FUNCTION = re.compile(
    r"max|min|abs|round|int|float|bool|Max|Min|Mod|floor|ceiling"
    r"|IsNonOverlappingAndDenseIndicator|cast_symbool_to_symint_guardless"
)
_GUARD_METHODS = {"size", "stride", "storage_offset"}
_ARITHMETIC = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.Call,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_PLAIN_CLASSES = {
    *(f"builtins:{name}" for name in ("tuple", "list", "set", "frozenset", "dict", "int", "float", "str", "bool")),
    *(f"collections:{name}" for name in ("OrderedDict", "defaultdict", "deque")),
    "torch:Size",
}

# key in the JSON -> what its text must be
_NAME_KEYS = {"name", "as_name"}
_PATH_KEYS = {
    "parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "user_input_name", "fqn", "class_fqn",
}  # fmt: skip


def check_model(path: Path, model: Any) -> None:
    """Raise `UnsafeError` when a text of a serialized program (the parsed `models/*.json`) could run code."""
    for key, value in _items(model):
        for problem in _problems(key, value):
            raise UnsafeError(
                f"{path}: its graph contains code",
                evidence=[problem[:300]],
                fix="If you trust its author, add --trust-pickle; else export the program again from its source.",
            )


def named_types(model: Any) -> set[tuple[str, str]]:
    """Module and name of each class of transformers that the tree specs of a serialized program name."""
    found = set()
    for key, value in _items(model):
        if key in ("in_spec", "out_spec") and isinstance(value, str):
            specs = (text for inner, text in _items(_decoded(value)) if inner == "type" and isinstance(text, str))
            found |= {match.groups() for text in specs if (match := _TRANSFORMERS_CLASS.fullmatch(text))}
    return {(str(module), str(name)) for module, name in found}


_TRANSFORMERS_CLASS = re.compile(r"(transformers(?:\.[a-z]\w*)*)[.:]([A-Za-z]\w*)")


def _items(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every (key, value) in nested JSON, without recursion; list elements come with the key of their list."""
    stack = [(key, value)]
    while stack:
        key, value = stack.pop()
        yield key, value
        if isinstance(value, dict):
            stack.extend((str(inner), item) for inner, item in value.items())
        elif isinstance(value, list):
            stack.extend((key, item) for item in value)


def _problems(key: str, value: Any) -> Iterator[str]:
    if key == "graph" and isinstance(value, dict):
        yield from _literal_problems(value.get("inputs"))
    elif key == "constant_input":
        yield from _literal_problems(value)
    elif key == "nodes" and isinstance(value, dict):
        yield from _operator_problems(value.get("target"))
    elif not isinstance(value, str):
        return
    elif key == "as_operator":
        yield from _operator_problems(value)
    elif key in _NAME_KEYS and value and not value.isidentifier():
        yield f"not a name: {value!r}"
    elif key == "forward_arg_names" and not value.isidentifier():
        yield f"not an argument name: {value!r}"
    elif key in _PATH_KEYS and not _PLAIN.fullmatch(value):
        yield f"not a path of a parameter: {value!r}"
    elif key == "expr_str" and not _only(value, _is_size_node):
        yield f"not a size: {value!r}"
    elif key == "guards_code" and not _only(value, _is_guard_node):
        yield f"not a guard: {value!r}"
    elif key in ("in_spec", "out_spec"):
        yield from _spec_problems(key, value)


def _operator_problems(target: Any) -> Iterator[str]:
    if not isinstance(target, str) or not _OPERATOR.fullmatch(target):
        yield f"not an operator: {target!r}"


def _literal_problems(inputs: Any) -> Iterator[str]:
    for _, value in _items(inputs):
        if isinstance(value, str) and not _PLAIN.fullmatch(value):
            yield f"not a plain literal: {value!r}"


def _only(text: str, allowed: Callable[[ast.AST], bool]) -> bool:
    try:
        return all(allowed(node) for node in ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_size_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) or _is_text(node.value, _NUMBER_OR_NAME)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and _SIZE_FUNCTION.fullmatch(node.func.id) is not None
    if isinstance(node, ast.Name):
        return "__" not in node.id
    return isinstance(node, (*_ARITHMETIC, ast.keyword, ast.Tuple))


def _is_guard_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float | None) or _is_text(node.value, _PLAIN)
    if isinstance(node, ast.Call):
        return _is_guard_function(node.func) and not node.keywords
    if isinstance(node, ast.Attribute):
        return "__" not in node.attr
    if isinstance(node, ast.Name):
        return node.id in ("L", "math", "torch", "inf") or _GUARD_FUNCTION.fullmatch(node.id) is not None
    return isinstance(node, (*_ARITHMETIC, ast.Subscript, ast.IfExp))


def _is_guard_function(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return _GUARD_FUNCTION.fullmatch(function.id) is not None
    if not isinstance(function, ast.Attribute):
        return False
    if isinstance(function.value, ast.Name) and function.value.id == "torch":
        return re.fullmatch(r"_?sym_\w+", function.attr) is not None
    if isinstance(function.value, ast.Name) and function.value.id == "math":
        return True
    return function.attr in _GUARD_METHODS


def _is_text(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _spec_problems(key: str, text: str) -> Iterator[str]:
    spec = _decoded(text)
    if not (isinstance(spec, list) and len(spec) == 2 and isinstance(spec[1], dict)):
        if text:
            yield f"not a tree of inputs: {text!r}"
        return
    if key == "in_spec":
        yield from _keyword_problems(spec[1])
    for inner, value in _items(spec[1]):
        if inner == "context":
            yield from _context_problems(_decoded(value) if isinstance(value, str) else value)


def _keyword_problems(root: dict[str, Any]) -> Iterator[str]:
    """The inputs are a tuple of (arguments, keywords); keyword names become the compiled function's parameters."""
    children = root.get("children_spec")
    if root.get("type") != "builtins.tuple" or not isinstance(children, list) or len(children) != 2:
        return
    context = children[1].get("context") if isinstance(children[1], dict) else None
    if not isinstance(context, str) or children[1].get("type") != "builtins.dict":
        return
    for _, name in _items(_decoded(context)):
        if isinstance(name, str) and not name.isidentifier():
            yield f"not a keyword: {name!r}"


def _context_problems(context: Any) -> Iterator[str]:
    for _, value in _items(context):
        if isinstance(value, str) and not _PLAIN.fullmatch(value):
            yield f"not a plain key: {value!r}"
        if not isinstance(value, dict):
            continue
        named = [value[key] for key in ("p", "fqn") if key in value and ("_t" in value or "__enum__" in value)]
        if "default_factory_module" in value:
            named.append(f"{value['default_factory_module']}:{value.get('default_factory_name')}")
        yield from (f"not a plain class: {name!r}" for name in named if not _is_plain_class(name))


def _is_plain_class(name: Any) -> bool:
    """A container, or a class that really is defined in transformers and not merely reachable through it."""
    if name in _PLAIN_CLASSES:
        return True
    match = _TRANSFORMERS_CLASS.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        return False
    import importlib

    try:
        found = getattr(importlib.import_module(match[1]), match[2], None)
    except ImportError:
        return False
    return isinstance(found, type) and found.__module__ == match[1]
