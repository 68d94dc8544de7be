"""The fields of a pass as options of a command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from rewriter.find import Targets, parse_targets

RENAMED = {"adapter": "adapter-name"}  # `--adapter DIR` applies a directory
SCALARS: dict[Any, click.ParamType[Any]] = {
    int: click.INT,
    float: click.FLOAT,
    str: click.STRING,
    Path: click.Path(path_type=Path),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One option of a pass: its name in recipes, its type, its default (`dataclasses.MISSING` when it has none)."""

    name: str
    hint: Any
    default: Any

    @property
    def flag(self) -> str:
        return "--" + RENAMED.get(self.name, self.name.replace("_", "-"))

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def is_flag(self) -> bool:
        return self.hint is bool

    @property
    def type_name(self) -> str:
        return _type_name(self.hint)

    def option(self) -> click.Option:
        """The option of a command line; its value is None when it is not given."""
        if self.is_flag:
            flags = f"{self.flag}/--no-{self.flag.removeprefix('--')}"
            return click.Option([flags, self.name], default=None, required=self.is_required, help=self._help())
        return click.Option(
            [self.flag, self.name], type=_parameter(self.hint), required=self.is_required, help=self._help()
        )

    def _help(self) -> str:
        if self.is_required or self.default in (None, "", (), {}):
            return ""
        value = ",".join(map(str, self.default)) if isinstance(self.default, tuple) else self.default
        return f"[default: {str(value).lower() if self.is_flag else value}]"


def fields(kind: type) -> tuple[Field, ...]:
    """The fields of a pass that a user may give, in order."""
    hints = get_type_hints(kind)
    found = []
    for each in dataclasses.fields(kind):
        if not each.metadata.get("given", True):
            continue
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        found.append(Field(each.name, _bare(hints[each.name]), default))
    return tuple(found)


class _Targets(click.ParamType[Any]):
    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return parse_targets(value)


class _Items(click.ParamType[Any]):
    """`a,b` -> ("a", "b")."""

    def __init__(self, item: click.ParamType[Any]) -> None:
        self.item = item
        self.name = f"{item.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return tuple(self.item.convert(part.strip(), param, ctx) for part in value.split(",") if part.strip())


class _Pairs(click.ParamType[Any]):
    """`a=1,b=2` -> {"a": 1, "b": 2}."""

    def __init__(self, item: click.ParamType[Any]) -> None:
        self.item = item
        self.name = f"name={item.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        made: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in value.split(","))):
            name, equals, number = part.rpartition("=")
            if not equals or not name:
                self.fail(f"{part!r} is not of the form name=value.", param, ctx)
            if name in made:
                self.fail(f"{name!r} is given twice.", param, ctx)
            made[name] = self.item.convert(number, param, ctx)
        return made


def _bare(hint: Any) -> Any:
    """`X | None -> X`."""
    if get_origin(hint) in (Union, UnionType) and hint != Targets:
        rest = [part for part in get_args(hint) if part is not NoneType]
        return rest[0] if len(rest) == 1 else hint
    return hint


def _parameter(hint: Any) -> click.ParamType[Any]:
    if hint == Targets:
        return _Targets()
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return click.Choice([str(each) for each in arguments])
    if origin is not None and issubclass(origin, Mapping):
        return _Pairs(_parameter(arguments[1]))
    if origin is not None and issubclass(origin, Sequence):
        return _Items(_parameter(arguments[0]))
    return SCALARS.get(hint, click.STRING)


def _type_name(hint: Any) -> str:
    if hint == Targets:
        return "targets"
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is not None and issubclass(origin, Mapping):
        return f"{_type_name(arguments[1])} by name"
    if origin is not None and issubclass(origin, Sequence):
        return f"list of {_type_name(arguments[0])}"
    return str(getattr(hint, "__name__", hint)).lower()
