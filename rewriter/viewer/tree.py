"""Operations of a difference -> modules in modules: what the page shows inside of what.

Modules that differ by a number alone are one *fold*; a module with very many parts has them in *chunks*, so that what
is drawn at once stays small.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rewriter.diff import Change, Difference
from rewriter.text import MARK, Line

LARGEST = 400  # parts of one group
CHUNK = 200

Status = Literal["same", "added", "removed", "changed", "weights"]
STATUS: dict[Change, Status] = {
    "added": "added",
    "removed": "removed",
    "changed": "changed",
    "rewired": "changed",
    "moved": "changed",
}


@dataclass(slots=True)
class Item:
    """An operation (or a tensor, where there are no operations) with both of its lines."""

    number: int
    line: Line
    before: Line | None
    after: Line | None
    change: str
    status: Status


@dataclass(slots=True)
class Group:
    """A module, a fold of modules that are alike, or a chunk of a large one; `parts` are in the order of the text."""

    number: int
    name: str
    path: str
    parent: Group | None
    kind: Literal["module", "fold", "chunk"] = "module"
    parts: list[Group | Item] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def groups(self) -> Iterator[Group]:
        """This group and all below it, without recursion."""
        waiting = [self]
        while waiting:
            group = waiting.pop()
            yield group
            waiting += [part for part in reversed(group.parts) if isinstance(part, Group)]


def tree(difference: Difference) -> Group:
    """The modules of both sides of a difference, with what happened in each."""
    top = Group(0, "", "", None)
    modules = {"": top}
    for item in _items(difference):
        _module(item.line.path, modules).parts.append(item)
    numbers = len(modules)
    for group in reversed(list(top.groups())):  # the innermost first
        for part in group.parts:
            group.counts.update(part.counts if isinstance(part, Group) else [part.status])
    signatures = _signatures(top)
    for group in list(top.groups()):
        numbers = _fold(group, signatures, numbers)
        numbers = _chunk(group, numbers)
    return top


def _items(difference: Difference) -> Iterator[Item]:
    old = {line.key: line for line in difference.before.lines}
    new = {line.key: line for line in difference.after.lines}
    changed = {f"@{tensor.name}" for tensor in difference.changed}
    computes = any(line.operation for line in [*old.values(), *new.values()])
    for number, line in enumerate(_merged(difference.before.lines, difference.after.lines, computes)):
        before, after = old.get(line.key), new.get(line.key)
        change = difference.changes.get(line.key, "same") if computes else _tensor_change(before, after)
        status: Status = "same"
        if change != "same":
            status = STATUS[change]  # type: ignore[index]
        elif line.key in changed or any(name in changed for name in line.reads):
            status, change = "weights", "weights changed"
        yield Item(number, line, before, after, change, status)


def _tensor_change(before: Line | None, after: Line | None) -> str:
    if before is None or after is None:
        return "added" if before is None else "removed"
    return "same" if before.template == after.template else "changed"


def _merged(old: Sequence[Line], new: Sequence[Line], computes: bool) -> Iterator[Line]:
    """The new lines, and each removed one behind the line it stood behind."""

    def shown(line: Line) -> bool:
        return bool(line.operation) if computes else line.key.startswith("@")

    kept = {line.key for line in new}
    behind: dict[str, list[Line]] = {}
    last = ""
    for line in old:
        if line.key in kept:
            last = line.key
        elif shown(line):
            behind.setdefault(last, []).append(line)
    yield from behind.get("", ())
    for line in new:
        if shown(line):
            yield line
        yield from behind.get(line.key, ())


def _module(path: str, modules: dict[str, Group]) -> Group:
    """The group of a module, made with those around it."""
    missing = []
    while path not in modules:
        missing.append(path)
        path = path.rpartition(".")[0]
    group = modules[path]
    for each in reversed(missing):
        made = Group(len(modules), each.rpartition(".")[2], each, group)
        group.parts.append(made)
        modules[each] = group = made
    return group


def _signatures(top: Group) -> dict[int, str]:
    """What is in each group, without the name of the group itself."""
    found: dict[int, str] = {}
    for group in reversed(list(top.groups())):
        content = hashlib.sha256()
        for part in group.parts:
            if isinstance(part, Group):
                content.update(f"{part.name}\0{found[part.number]}".encode())
            else:
                sides = [
                    f"{line.operation}({''.join(line.arguments.split(MARK)[::2])}) {line.type}" if line else ""
                    for line in (part.before, part.after)
                ]
                content.update(f"{part.status}\0{sides[0]}\0{sides[1]}\n".encode())
        found[group.number] = content.hexdigest()
    return found


def _fold(group: Group, signatures: dict[int, str], numbers: int) -> int:
    """Put runs of numbered modules that are alike into folds."""
    runs: list[list[Group | Item]] = []
    for part in group.parts:
        last = runs[-1][-1] if runs else None
        alike = (
            isinstance(part, Group)
            and isinstance(last, Group)
            and part.name.isdigit()
            and last.name.isdigit()
            and signatures[part.number] == signatures[last.number]
        )
        if alike:
            runs[-1].append(part)
        else:
            runs.append([part])
    parts: list[Group | Item] = []
    for run in runs:
        if len(run) == 1:
            parts += run
            continue
        members = [part for part in run if isinstance(part, Group)]
        fold = Group(numbers, f"{members[0].name} … {members[-1].name}", members[0].path, group, "fold")
        _adopt(fold, list(members))
        parts.append(fold)
        numbers += 1
    group.parts = parts
    return numbers


def _chunk(group: Group, numbers: int) -> int:
    """Put the parts of a group that has too many into chunks."""
    while len(group.parts) > LARGEST:
        parts: list[Group | Item] = []
        for start in range(0, len(group.parts), CHUNK):
            some = group.parts[start : start + CHUNK]
            chunk = Group(numbers, f"part {start // CHUNK + 1}", group.path, group, "chunk")
            _adopt(chunk, some)
            parts.append(chunk)
            numbers += 1
        group.parts = parts
    return numbers


def _adopt(group: Group, parts: list[Group | Item]) -> None:
    group.parts = parts
    for part in parts:
        if isinstance(part, Group):
            part.parent = group
            group.counts.update(part.counts)
        else:
            group.counts[part.status] += 1
