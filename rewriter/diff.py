"""Two programs -> what changed: lines of the text, parameters, numbers."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from rewriter.difference_text import grouped, numbers
from rewriter.errors import UsageError
from rewriter.graph import Graph
from rewriter.pairing import Pair, counts, pairs
from rewriter.program import Program
from rewriter.text import Line, tensor_type

SCHEMA = 1
CHUNK = 1 << 22  # numbers compared at a time, so that memory stays small beside a large tensor


@dataclass(frozen=True, slots=True)
class ChangedLine:
    """A line that only one program has, or a line that both have around one (`sign` is a space)."""

    sign: Literal["+", "-", " "]
    line: Line


@dataclass(frozen=True, slots=True)
class ChangedTensor:
    """A tensor whose bits changed under the same name.

    `largest` is max |after - before|, `relative` is ‖after - before‖ / ‖before‖ (Frobenius); both are None when the
    shape or the type changed, or when there are no values to compare.
    """

    name: str
    before: str
    after: str
    largest: float | None
    relative: float | None


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
    """What changed from one program to another. True when anything did; history and metadata do not count."""

    lines: tuple[ChangedLine, ...]
    added: Tensors
    removed: Tensors
    changed: tuple[ChangedTensor, ...]
    paired: Mapping[str, int]  # how operations were paired -> how many

    def __bool__(self) -> bool:
        return bool(self.lines or self.added.names or self.removed.names or self.changed)

    @property
    def same(self) -> bool:
        """Whether the programs are equal in text and in every bit."""
        return not self

    @cached_property
    def operations(self) -> dict[str, int]:
        """How many operations were added, removed and changed; a moved operation counts as changed."""
        sides: dict[str, set[str]] = {"+": set(), "-": set(), " ": set()}
        for each in self.lines:
            if each.line.operation:
                sides[each.sign].add(each.line.key)
        both = sides["+"] & sides["-"]
        return {"added": len(sides["+"] - both), "removed": len(sides["-"] - both), "changed": len(both)}

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
        for each in self.changed[:SHOWN]:
            kind = each.after if each.before == each.after else f"{each.before} -> {each.after}"
            amounts = ""
            if each.largest is not None and each.relative is not None:
                amounts = f", largest change {each.largest:.3g}, relative {each.relative:.3g}"
            yield f"  @{each.name} : {kind}{amounts}"
        if len(self.changed) > SHOWN:
            yield f"  … and {len(self.changed) - SHOWN} more"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; `lines` is complete and without context."""
        return {
            "schema": SCHEMA,
            "same": self.same,
            "operations": self.operations,
            "paired": dict(self.paired),
            "lines": [
                {"sign": each.sign, "path": each.line.path, "text": each.line.text.strip()}
                for each in self.lines
                if each.sign != " "
            ],
            "tensors": {
                "added": self.added.to_json(),
                "removed": self.removed.to_json(),
                "changed": [
                    {
                        "name": each.name,
                        "before": each.before,
                        "after": each.after,
                        "largest_change": _finite(each.largest),
                        "relative_change": _finite(each.relative),
                    }
                    for each in self.changed
                ],
            },
        }


SHOWN = 12  # changed tensors that the text lists; the JSON has all


def diff(before: Program | Graph, after: Program | Graph) -> Difference:
    """Compare two programs line by line and tensor by tensor, by bits.

    Operations are paired first, by name in programs and by structure across sources; what is paired goes by its name
    in `before`. Raises `UsageError` for what is neither a program nor a graph that was read from a file.
    """
    old, new = _graph(before), _graph(after)
    found = pairs(old.lines, new.lines, stable_names=old.stable_names and new.stable_names)
    return Difference(
        tuple(_changed_lines(list(old.lines), _named_alike(old.lines, new.lines, found))),
        Tensors.of(new, [name for name in _ordered(new) if name not in old.tensors]),
        Tensors.of(old, [name for name in _ordered(old) if name not in new.tensors]),
        tuple(_changed_tensors(old, new)),
        counts(found),
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


# -- tensors ----------------------------------------------------------------------------------------------------


def _changed_tensors(before: Graph, after: Graph) -> Iterator[ChangedTensor]:
    old, new = before.tensors, after.tensors
    for name in _ordered(after):
        if name in old and not same_bits(old[name], new[name]):
            yield ChangedTensor(name, tensor_type(old[name]), tensor_type(new[name]), *_amounts(old[name], new[name]))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one shape, one type and the same bits; the same memory is not read."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if "meta" in (one.device.type, other.device.type) or not one.numel():
        return one.device.type == other.device.type or not one.numel()
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    return all(
        torch.equal(left.view(torch.uint8), right.to(left.device).view(torch.uint8))
        for left, right in _parts(one, other)
    )


def _parts(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    flat = one.detach().reshape(-1), other.detach().reshape(-1)
    return zip(flat[0].split(CHUNK), flat[1].split(CHUNK), strict=True)


def _amounts(one: torch.Tensor, other: torch.Tensor) -> tuple[float | None, float | None]:
    if one.shape != other.shape or one.dtype != other.dtype or "meta" in (one.device.type, other.device.type):
        return None, None
    precise = torch.complex128 if one.is_complex() else torch.float64
    largest = change = size = 0.0
    for left, right in _parts(one, other):
        was, delta = left.to(precise), right.to(left.device, precise) - left.to(precise)
        top = float(delta.abs().max())
        largest = top if math.isnan(top) or top > largest else largest
        change += float(delta.abs().square().sum())
        size += float(was.abs().square().sum())
    return largest, math.sqrt(change / size) if size else (math.inf if change else 0.0)


def _finite(value: float | None) -> float | str | None:
    """A number for JSON, which has no infinity and no NaN."""
    return value if value is None or math.isfinite(value) else str(value)
