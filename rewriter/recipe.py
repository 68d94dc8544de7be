"""Recipes: the passes that made a program, as YAML that records them and replays them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from rewriter.errors import RewriteError, UsageError, closest
from rewriter.program import Step
from rewriter.transform import Pass

SCHEMA = 1
LARGEST_BYTES = 1 << 20
_FORM = "schema: 1, then passes: a list of {pass: NAME, options: {...}}"


def write(steps: Iterable[Step]) -> str:
    """The recipe of the passes of a program, as YAML; options that have their default are left out.

    What training put into parameters is in the program, not in its recipe.
    """
    passes = [{"pass": step.name, **({"options": _plain(step.options)} if step.options else {})} for step in steps]
    text: str = yaml.safe_dump(
        {"schema": SCHEMA, "passes": passes}, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120
    )
    return text


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a recipe file, `{"pass": name, "options": {...}}` each.

    Raises `RewriteError` for a file that cannot be read or is no YAML, `UsageError` for one that is no recipe.
    """
    try:
        data = path.read_bytes()
        if len(data) > LARGEST_BYTES:
            raise RewriteError(f"{path} has {len(data):,} bytes, a recipe has less than {LARGEST_BYTES:,}")
        content = yaml.load(data, _Loader)
    except OSError as error:
        raise RewriteError(f"{path} cannot be read: {error.strerror}", fix="Name a recipe file.") from None
    except (yaml.YAMLError, RecursionError) as error:
        lines = str(error).splitlines()[:4]
        raise RewriteError(f"{path} is not a YAML file", evidence=lines, fix="Correct it there.") from None
    if not isinstance(content, dict) or set(content) != {"schema", "passes"} or not isinstance(content["passes"], list):
        raise UsageError(f"{path} is not a recipe", evidence=[f"expected {_FORM}"], fix="Correct it there.")
    if content["schema"] != SCHEMA:
        raise UsageError(
            f"{path} is a recipe of schema {content['schema']!r}",
            evidence=[f"this version reads schema {SCHEMA}"],
            fix="Use the version of rewriter that wrote it.",
        )
    return [_entry(path, number, each) for number, each in enumerate(content["passes"], 1)]


def build(entries: Sequence[Mapping[str, Any]], known: Mapping[str, type[Pass]], *, folder: Path) -> tuple[Pass, ...]:
    """The passes that the entries of a recipe mean, out of the `known` ones by name.

    Paths among the options are relative to `folder`. Raises `UsageError` for an unknown pass or option, with the
    closest names, and for a value that is not of the option's type.
    """
    return tuple(_build(each, known, folder) for each in entries)


class _Loader(yaml.SafeLoader):
    """Plain data only, each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _entry(path: Path, number: int, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict) or not set(given) <= {"pass", "options"} or not isinstance(given.get("pass"), str):
        raise UsageError(
            f"{path}: pass {number} is not an entry of a recipe",
            evidence=[f"expected {_FORM}"],
            fix="Correct it there.",
        )
    options = given.get("options") or {}
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        what = f"{path}: the options of {given['pass']} are not named"
        raise UsageError(what, evidence=[f"expected {_FORM}"], fix="Correct it there.")
    return {"pass": given["pass"], "options": options}


def _build(given: Mapping[str, Any], known: Mapping[str, type[Pass]], folder: Path) -> Pass:
    name, options = given["pass"], given["options"]
    if name not in known:
        near = closest(name, list(known), 3)
        raise UsageError(
            f"the recipe names the pass {name!r}, which does not exist",
            evidence=[f"closest: {', '.join(near)}" if near else f"passes: {', '.join(known)}"],
            fix="`rewriter passes` lists them.",
        )
    kind = known[name]
    fields = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            near = closest(option, list(fields), 3)
            raise UsageError(
                f"the pass {name} has no option {option!r}",
                evidence=[f"closest: {', '.join(near)}" if near else f"its options: {', '.join(fields)}"],
                fix="Correct the recipe.",
            )
    missing = [each.name for each in fields.values() if _is_required(each) and each.name not in options]
    if missing:
        raise UsageError(f"the recipe gives {name} no {missing[0]}", fix="Add it to the recipe.")
    hints = get_type_hints(kind)
    return kind(**{option: _value(name, option, hints[option], value, folder) for option, value in options.items()})


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(name: str, option: str, hint: Any, value: Any, folder: Path) -> Any:
    """A value of a recipe as the type of its option; nothing is converted that YAML tells apart."""
    try:
        # From JSON, so that a list is a tuple also where types are strict.
        made = TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError, ValueError) as error:
        reasons = [each["msg"] for each in error.errors()] if isinstance(error, ValidationError) else [str(error)]
        raise UsageError(
            f"the recipe gives {name} {option}: {value!r}", evidence=list(dict.fromkeys(reasons))[:4], fix="Correct it."
        ) from None
    if isinstance(made, Path):
        return folder / made
    return tuple(made) if isinstance(made, list) else made


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without shared parts, which YAML would write as references."""
    copied: dict[str, Any] = json.loads(json.dumps(options))
    return copied
