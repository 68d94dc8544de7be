"""Changed lines of a program -> what people read: by module, with layers that changed alike shown once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rewriter.tensor_changes import ChangedTensor
from rewriter.text import Line

TOP = "(top)"
AMOUNTS = {  # what the text calls the numbers of a changed tensor
    "largest change": "largest",
    "relative": "relative",
    "share": "share",
    "effective rank": "effective_rank",
}


@dataclass(slots=True)
class _Group:
    """The changed lines of one module, or of several that differ by a number in their path."""

    path: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)

    def shown(self) -> Iterator[str]:
        title = self.path or TOP
        if len(self.numbers) > 1:
            count = sum(sign != " " for sign, _ in self.rows)
            lines = "the same line" if count == 1 else f"the same {count} lines"
            title += f"  (* = {_spans(self.numbers)}: {lines} in each)"
        yield f"@@ {title} @@"
        yield from (sign + text for sign, text in self.rows)


def grouped(changes: Sequence[tuple[str, Line]]) -> Iterator[str]:
    """Lines of the form `+`, `-` or space and text, under one header for each module path."""
    for group in _alike(_by_path(changes)):
        yield from group.shown()


def size(size_bytes: int) -> str:
    """`1536 -> 1.5 KiB`."""
    amount, units = float(size_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.0f} bytes" if units[0] == "bytes" else f"{amount:.1f} {units[0]}"


def numbers(tensors: int, count: int, size_bytes: int) -> str:
    """`2 tensors, 208 numbers, 832 bytes`."""
    return f"{tensors} tensor{'s' * (tensors != 1)}, {count:,} numbers, {size(size_bytes)}"


def changed(tensors: Sequence[ChangedTensor]) -> Iterator[str]:
    """A line for each changed tensor; those of layers that differ by a number alone share one, with their ranges."""
    groups: dict[tuple[str, str, str], list[tuple[str | None, ChangedTensor]]] = {}
    for tensor in tensors:
        name, number = _numbered(tensor.name)
        groups.setdefault((name, tensor.before, tensor.after), []).append((number, tensor))
    for (name, before, after), members in groups.items():
        found = [number for number, _ in members if number is not None]
        title = f"@{name}  (* = {_spans(found)})" if len(members) > 1 else f"@{members[0][1].name}"
        parts = [f"{title} : {after if before == after else f'{before} -> {after}'}"]
        for label, field_ in AMOUNTS.items():
            values = [value for _, tensor in members if (value := getattr(tensor, field_)) is not None]
            if values and not (field_ == "share" and min(values) == 1):
                parts.append(f"{label} {_range(values)}")
        yield ", ".join(parts)


def _numbered(path: str) -> tuple[str, str | None]:
    """`layers.3.up.weight -> layers.*.up.weight, 3`: the first number of a path."""
    parts = path.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if place is None:
        return path, None
    return ".".join([*parts[:place], "*", *parts[place + 1 :]]), parts[place]


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.3g}", f"{max(values):.3g}"
    if any(math.isnan(value) for value in values):
        return "nan"
    return least if least == most else f"{least} to {most}"


def _by_path(changes: Sequence[tuple[str, Line]]) -> list[_Group]:
    """Parameters go to the module whose operations changed too, if there is one above them."""
    operations = {line.path for sign, line in changes if sign != " " and not _is_tensor(line)}
    groups: dict[str, _Group] = {}
    tensors: list[tuple[str, Line]] = []
    waiting: list[tuple[str, str]] = []  # context goes with the change that follows it
    for sign, line in changes:
        if sign == " ":
            waiting = [(sign, line.text)]
        elif _is_tensor(line):
            tensors.append((sign, line))
        else:
            group = groups.setdefault(line.path, _Group(line.path))
            group.rows += [*waiting, (sign, line.text)]
            waiting = []
    heads: dict[str, list[tuple[str, str]]] = {}
    for sign, line in tensors:
        heads.setdefault(_owner(line.path, operations), []).append((sign, line.text))
    for path, rows in heads.items():
        group = groups.setdefault(path, _Group(path))
        group.rows[:0] = rows
    return list(groups.values())


def _is_tensor(line: Line) -> bool:
    return line.key.startswith("@")


def _owner(path: str, operations: set[str]) -> str:
    above = path
    while above and above not in operations:
        above = above.rpartition(".")[0]
    return above or path


def _alike(groups: Iterable[_Group]) -> list[_Group]:
    """Show groups once that differ only by the first number in their path."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], _Group] = {}
    single: dict[int, _Group] = {}
    for group in groups:
        template, number = _template(group)
        key = (template.path, tuple(template.rows))
        if number is None or key not in found:
            found[key] = template
            single[id(template)] = group
        if number is not None:
            found[key].numbers.append(number)
    return [group if len(group.numbers) > 1 else single[id(group)] for group in found.values()]


def _template(group: _Group) -> tuple[_Group, str | None]:
    parts = group.path.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if place is None:
        return group, None
    stem, number = "".join(f"{part}." for part in parts[:place]), parts[place]
    # A layer also reads what the layer before it made.
    names = {number: "*", str(int(number) - 1): "*-1"}
    pattern = re.compile(rf"(?<=[@%]){re.escape(stem)}(\d+)(?=[./])")

    def rename(match: re.Match[str]) -> str:
        return stem + names.get(match[1], match[1])

    rows = [(sign, pattern.sub(rename, text)) for sign, text in group.rows]
    return _Group(".".join([*parts[:place], "*", *parts[place + 1 :]]), rows), number


def _spans(found: list[str]) -> str:
    """`0, 1, 2, 5 -> 0 … 2, 5`."""
    spans: list[list[int]] = []
    for number in sorted(map(int, found)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a} … {b}" for a, b in spans)
