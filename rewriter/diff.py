"""Two programs -> what changed: lines of the text, parameters, numbers."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from rewriter.difference_text import changed, grouped, numbers
from rewriter.errors import UsageError
from rewriter.graph import Graph
from rewriter.pairing import How, Pair, pairs
from rewriter.program import Program
from rewriter.tensor_changes import ChangedTensor, changed_tensors
from rewriter.text import MARK, Line

SCHEMA = 1
Change = Literal["added", "removed", "changed", "rewired", "moved"]


@dataclass(frozen=True, slots=True)
class ChangedLine:
    """A line that only one program has, or a line that both have around one (`sign` is a space)."""

    sign: Literal["+", "-", " "]
    line: Line


@dataclass(frozen=True, slots=True)
class Tensors:
    """Tensors by name, with what they take together."""

    names: tuple[str, ...]
    count: int
    size_bytes: int

    @classmethod
    def of(cls, graph: Graph, names: Sequence[str]) -> Tensors:
        chosen = [graph.tensors[name] for name in names]
        return cls(tuple(names), sum(t.numel() for t in chosen), sum(t.numel() * t.element_size() for t in chosen))

    def to_json(self) -> dict[str, Any]:
        return {"names": list(self.names), "count": self.count, "bytes": self.size_bytes}


@dataclass(frozen=True)
class Difference:
    """What changed from one graph to another. True when anything did; history and metadata do not count.

    `after` goes by the names of `before` wherever a line has a counterpart there; `how` says for these lines how the
    counterpart was found.
    """

    before: Graph
    after: Graph
    how: Mapping[str, How]
    lines: tuple[ChangedLine, ...]
    added: Tensors
    removed: Tensors
    changed: tuple[ChangedTensor, ...]

    def __bool__(self) -> bool:
        return bool(self.lines or self.added.names or self.removed.names or self.changed)

    @property
    def same(self) -> bool:
        """Whether the programs are equal in text and in every bit."""
        return not self

    @cached_property
    def changes(self) -> dict[str, Change]:
        """What happened to each operation that is not the same on both sides, by its name.

        A *rewired* operation reads other values and is the same otherwise; a *moved* one stands elsewhere in the text.
        """
        sides: dict[str, dict[str, Line]] = {"+": {}, "-": {}, " ": {}}
        for each in self.lines:
            if each.line.operation:
                sides[each.sign][each.line.key] = each.line
        found: dict[str, Change] = {}
        for key, line in {**sides["-"], **sides["+"]}.items():
            if key not in sides["-"]:
                found[key] = "added"
            elif key not in sides["+"]:
                found[key] = "removed"
            else:
                found[key] = _change(sides["-"][key], line)
        return found

    @cached_property
    def operations(self) -> dict[str, int]:
        """How many operations were added, removed and changed; a moved or rewired operation counts as changed."""
        counted = Counter(self.changes.values())
        changed = sum(counted[kind] for kind in ("changed", "rewired", "moved"))
        return {"added": counted["added"], "removed": counted["removed"], "changed": changed}

    @cached_property
    def paired(self) -> dict[str, int]:
        """How many operations were paired in which way."""
        return dict(Counter(self.how[line.key] for line in self.after.lines if line.operation and line.key in self.how))

    def __str__(self) -> str:
        if not self:
            return "no difference\n"
        pairs = [(each.sign, each.line) for each in self.lines]
        return "\n".join(grouped(pairs)) + "\n" * bool(pairs) + self.summary()

    def summary(self) -> str:
        """What changed, counted: operations, tensors, numbers."""
        return "\n".join(self._summary()) + "\n" if self else "no difference\n"

    def _summary(self) -> Iterator[str]:
        operations = self.operations
        yield "operations: " + ", ".join(f"{count} {word}" for word, count in operations.items())
        for word, tensors in (("added", self.added), ("removed", self.removed)):
            if tensors.names:
                yield f"tensors {word}: {numbers(len(tensors.names), tensors.count, tensors.size_bytes)}"
        if self.changed:
            yield f"tensors changed: {len(self.changed)}"
        shown = list(changed(self.changed))
        yield from (f"  {line}" for line in shown[:SHOWN])
        if len(shown) > SHOWN:
            yield f"  … and {len(shown) - SHOWN} more lines"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data, schema 1. Lists are complete and without context.

        - `same`: whether nothing changed; `operations`: counts of added, removed, changed; `paired`: counts by how
        - `nodes`: name, path, operation, change (added, removed, changed, rewired, moved), how it was paired (or null),
          and its text `before` and `after` (or null)
        - `lines`: sign, path and text of every line of the unified text, tensors, inputs and outputs included
        - `tensors`: `added` and `removed` with names, count of numbers, bytes; `changed` with name, type before and
          after, largest_change, relative_change, share_changed, effective_rank
        - `bytes`: of all tensors `before` and `after`; `metadata`: key -> value before and after, where they differ
        """
        return {
            "schema": SCHEMA,
            "same": self.same,
            "operations": self.operations,
            "paired": self.paired,
            "nodes": list(self._nodes()),
            "lines": [
                {"sign": each.sign, "path": each.line.path, "text": each.line.text.strip()}
                for each in self.lines
                if each.sign != " "
            ],
            "tensors": {
                "added": self.added.to_json(),
                "removed": self.removed.to_json(),
                "changed": [each.to_json() for each in self.changed],
            },
            "bytes": {"before": _size_bytes(self.before), "after": _size_bytes(self.after)},
            "metadata": {
                key: {"before": self.before.facts.get(key), "after": self.after.facts.get(key)}
                for key in sorted({*self.before.facts, *self.after.facts})
                if self.before.facts.get(key) != self.after.facts.get(key)
            },
        }

    def _nodes(self) -> Iterator[dict[str, Any]]:
        old = {line.key: line for line in self.before.lines}
        new = {line.key: line for line in self.after.lines}
        for key, change in self.changes.items():
            line = new.get(key) or old[key]
            yield {
                "name": key,
                "path": line.path,
                "operation": line.operation,
                "change": change,
                "paired": self.how.get(key) if change not in ("added", "removed") else None,
                "before": old[key].text.strip() if change != "added" else None,
                "after": new[key].text.strip() if change != "removed" else None,
            }


SHOWN = 24  # lines of changed tensors that the text has; the JSON has all


def _change(before: Line, after: Line) -> Change:
    if before.template == after.template:
        return "moved"
    same = (before.operation, before.type) == (after.operation, after.type)
    constants = [line.arguments.split(MARK)[::2] for line in (before, after)]
    return "rewired" if same and constants[0] == constants[1] else "changed"


def _size_bytes(graph: Graph) -> int:
    """Of all tensors, one that has several names once."""
    storages = {_place(tensor): tensor.numel() * tensor.element_size() for tensor in graph.tensors.values()}
    return sum(storages.values())


def _place(tensor: Tensor) -> Hashable:
    if tensor.device.type == "meta":
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def diff(before: Program | Graph, after: Program | Graph) -> Difference:
    """Compare two programs line by line and tensor by tensor, by bits.

    Operations are paired first, by name in programs and by structure across sources; what is paired goes by its name
    in `before`. Raises `UsageError` for what is neither a program nor a graph that was read from a file.
    """
    old, given = _graph(before), _graph(after)
    found = pairs(old.lines, given.lines, stable_names=old.stable_names and given.stable_names)
    new = replace(given, lines=tuple(_named_alike(old.lines, given.lines, found)))
    return Difference(
        old,
        new,
        {pair.before.key: pair.how for pair in found},
        tuple(_changed_lines(list(old.lines), list(new.lines))),
        Tensors.of(new, [name for name in _ordered(new) if name not in old.tensors]),
        Tensors.of(old, [name for name in _ordered(old) if name not in new.tensors]),
        tuple(changed_tensors(_ordered(new), old.tensors, new.tensors)),
    )


def _graph(given: Program | Graph) -> Graph:
    if isinstance(given, Graph):
        return given
    if not isinstance(given, Program):
        raise UsageError(
            f"diff compares two programs, got {type(given).__name__}",
            fix="Make programs of both with `rewriter.trace` or `rewriter.load`.",
        )
    return Graph.of(given)


def _ordered(graph: Graph) -> list[str]:
    """The names of all tensors in the order of the text, then the ones that it does not name."""
    named = [line.key[1:] for line in graph.lines if line.key.startswith("@") and line.key[1:] in graph.tensors]
    return list(dict.fromkeys([*named, *sorted(graph.tensors)]))


# -- lines ------------------------------------------------------------------------------------------------------


def _named_alike(old: Sequence[Line], new: Sequence[Line], found: Sequence[Pair]) -> list[Line]:
    """The new lines, those of a pair under the name of the old one, and no other line under a name of an old one."""
    names = {pair.after.key: pair.before.key for pair in found}
    taken = {*(line.key for line in old), *(line.key for line in new)}
    own = {line.key for line in old}
    for line in new:
        if line.key not in names and line.key in own:
            number = next(i for i in itertools.count(1) if f"{line.key}_{i}" not in taken)
            names[line.key] = f"{line.key}_{number}"
            taken.add(names[line.key])
    changed = {key: name for key, name in names.items() if key != name}
    return [line.renamed(changed) for line in new]


def _changed_lines(old: list[Line], new: list[Line]) -> Iterator[ChangedLine]:
    """Added and removed lines in the order of the text, each run of them after the unchanged operation before it."""
    stay = _staying(old, new)
    place = {line.key: i for i, line in enumerate(old) if line.key in stay}
    start, context = 0, None
    added: list[Line] = []
    for line in [*new, None]:
        if line is not None and line.key not in stay:
            added.append(line)
            continue
        end = len(old) if line is None else place[line.key]
        changes = list(_aligned(old[start:end], added))
        if changes and context is not None and context.operation:
            yield ChangedLine(" ", context)
        yield from changes
        start, context, added = end + 1, line, []


def _aligned(removed: list[Line], added: list[Line]) -> Iterator[ChangedLine]:
    """The two sides of one place, a changed line before its new form."""
    keys = {line.key for line in removed}
    given = 0
    for line in added:
        if line.key in keys:
            upto = next((i for i in range(given, len(removed)) if removed[i].key == line.key), given - 1) + 1
            yield from (ChangedLine("-", each) for each in removed[given:upto])
            given = upto
        yield ChangedLine("+", line)
    yield from (ChangedLine("-", each) for each in removed[given:])


def _staying(old: list[Line], new: list[Line]) -> set[str]:
    """The keys of equal lines that keep their order: the longest increasing run of their places."""
    where = {line.key: i for i, line in enumerate(old)}
    texts = {line.key: line.text for line in old}
    equal = [line.key for line in new if texts.get(line.key) == line.text]
    ends: list[int] = []  # the smallest place at which a run of each length ends
    last: list[str] = []
    before: dict[str, str | None] = {}
    for key in equal:
        length = bisect_left(ends, where[key])
        ends[length : length + 1] = [where[key]]
        last[length : length + 1] = [key]
        before[key] = last[length - 1] if length else None
    stay: set[str] = set()
    current = last[-1] if last else None
    while current is not None:
        stay.add(current)
        current = before[current]
    return stay
