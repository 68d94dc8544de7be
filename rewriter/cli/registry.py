"""The passes that can be named: every pass among the public names of the package `passes`."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import passes
from rewriter.cli.fields import Field, fields
from rewriter.errors import UsageError, closest
from rewriter.transform import Pass, plain


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a pass without applying it."""

    name: str
    kind: type[Pass]
    fields: tuple[Field, ...]

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return inspect.getdoc(self.kind).partition("\n\n")[0].replace("\n", " ")  # type: ignore[union-attr]

    @property
    def description(self) -> str:
        """The docstring: what the pass does, its equation, its source."""
        return inspect.getdoc(self.kind) or ""

    @property
    def law(self) -> str:
        """The law with the default options."""
        try:
            return str(self.kind().law)
        except TypeError:  # an option without a default
            return "depends on the options"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "summary": self.summary,
            "options": [
                {"name": f.name, "flag": f.flag, "type": f.type_name, "required": f.is_required}
                | ({} if f.is_required else {"default": plain(f.default)})
                for f in self.fields
            ],
            "law": self.law,
            "source": self.kind.source,
        }


def registry() -> dict[str, Entry]:
    """Every pass by its name, in the order in which the package lists them."""
    found = (getattr(passes, name) for name in passes.__all__)
    kinds: list[type[Pass]] = [kind for kind in found if isinstance(kind, type) and _is_pass(kind)]
    return {kind.name: Entry(kind.name, kind, fields(kind)) for kind in kinds}


def entry(name: str) -> Entry:
    """The pass of a name; `UsageError` with the closest names when there is none."""
    known = registry()
    if name not in known:
        near = closest(name, list(known), 3)
        raise UsageError(
            f"there is no pass {name!r}",
            evidence=[f"closest: {', '.join(near)}" if near else f"passes: {', '.join(known)}"],
            fix="`rewriter passes` lists them.",
        )
    return known[name]


def _is_pass(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) and all(hasattr(kind, name) for name in ("name", "source", "find", "rewrite"))
