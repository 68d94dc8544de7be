"""Two texts -> which line of one is which line of the other, and how that is known.

Lines are paired by what is surest first, and every later step builds on the pairs before it:

1. *name*: tensors, inputs and outputs of one name; operations too where names are stable, as those of a program are.
2. *parameter*: operations of one kind that read the same tensors, and are the only ones that do.
3. *structure*: operations whose surroundings look the same, by Weisfeiler–Lehman hashes (Shervashidze et al. 2011), the
   widest surroundings first; where several look alike on both sides, they are paired in order.
4. *neighbour*: operations of one kind that read, or are read by, two that are a pair, at the same place.
5. *path*: operations of one kind in one module, where both sides have as many.

Nothing here recurses; the work grows with the number of lines.
"""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import networkx
from networkx.algorithms.graph_hashing import weisfeiler_lehman_subgraph_hashes

from rewriter.text import MARK, Line

How = Literal["name", "parameter", "structure", "neighbour", "path"]
ROUNDS = 4  # how many steps from an operation its surroundings reach


@dataclass(frozen=True, slots=True)
class Pair:
    """A line and its counterpart."""

    before: Line
    after: Line
    how: How


def pairs(old: Sequence[Line], new: Sequence[Line], *, stable_names: bool = True) -> list[Pair]:
    """The pairs of two texts, in the order of the new one.

    `stable_names` says that an operation of one name is the same operation in both, which holds for programs: their
    names come from module paths and from what passes call what they insert. What is left after that is paired by
    structure only where both sides have something left.
    """
    matching = _Matching(_Side(old), _Side(new))
    for key, line in matching.new.lines.items():
        if key in matching.old.lines and (stable_names or not line.operation):
            matching.pair(key, key, "name")
    for exact in (True, False):
        matching.by_parameter(exact)
        matching.by_structure(exact)
        matching.by_neighbours()
    matching.by_path()
    matching.by_neighbours(in_order=True)
    return matching.found()


@dataclass(slots=True)
class _Side:
    """One text: its lines by name, and which operations read a value, at which place."""

    given: Sequence[Line]
    lines: dict[str, Line] = field(init=False)
    users: dict[str, list[tuple[int, str]]] = field(init=False)
    free: set[str] = field(init=False)  # operations without a counterpart

    def __post_init__(self) -> None:
        self.lines = {line.key: line for line in self.given}
        self.users = {}
        self.free = {line.key for line in self.given if line.operation}
        for line in self.given:
            if line.operation:
                for place, name in enumerate(line.reads):
                    self.users.setdefault(name, []).append((place, line.key))

    def remaining(self) -> Iterator[Line]:
        return (line for line in self.given if line.key in self.free)


class _Matching:
    """Pairs so far. Operations enter by `pair`, which keeps each in one pair."""

    def __init__(self, old: _Side, new: _Side) -> None:
        self.old, self.new = old, new
        self.counterpart: dict[str, str] = {}  # new -> old
        self.how: dict[str, How] = {}
        self.taken: dict[str, str] = {}  # old -> new

    @property
    def unfinished(self) -> bool:
        return bool(self.old.free and self.new.free)

    def pair(self, old: str, new: str, how: How) -> None:
        self.counterpart[new], self.taken[old], self.how[new] = old, new, how
        self.old.free.discard(old)
        self.new.free.discard(new)

    def found(self) -> list[Pair]:
        return [
            Pair(self.old.lines[self.counterpart[key]], line, self.how[key])
            for key, line in self.new.lines.items()
            if key in self.counterpart
        ]

    # -- parameters -----------------------------------------------------------------------------------------------

    def by_parameter(self, exact: bool) -> None:
        if not self.unfinished:
            return

        def old_key(line: Line) -> Hashable:
            return self._reading(line, exact, {name: name for name in self.taken})

        def new_key(line: Line) -> Hashable:
            return self._reading(line, exact, self.counterpart)

        self._alike(old_key, new_key, "parameter", in_order=False)

    def _reading(self, line: Line, exact: bool, known: dict[str, str]) -> Hashable:
        """The kind of an operation and the tensors that it reads; None where it reads none."""
        tensors = tuple(known[name] for name in line.reads if name.startswith("@") and name in known)
        return (_kind(line, exact), tensors) if tensors else None

    # -- structure ------------------------------------------------------------------------------------------------

    def by_structure(self, exact: bool) -> None:
        if not self.unfinished:
            return
        old, new = self._hashes(self.old, exact), self._hashes(self.new, exact)
        for depth in range(ROUNDS - 1, -1, -1):
            for in_order in (False, True):
                self._alike(
                    lambda line, depth=depth: old[line.key][depth],  # type: ignore[misc]
                    lambda line, depth=depth: new[line.key][depth],  # type: ignore[misc]
                    "structure",
                    in_order=in_order and depth > 0,
                )

    def _hashes(self, side: _Side, exact: bool) -> dict[str, list[str]]:
        """Hashes of the surroundings of every line, from near to far; lines of a pair count as the same."""
        ours = side is self.new
        known = self.counterpart if ours else {name: name for name in self.taken}
        graph: networkx.DiGraph[str] = networkx.DiGraph()
        for line in side.given:
            label = f"={known[line.key]}" if line.key in known else _kind(line, exact)
            graph.add_node(line.key, label=ascii(label))  # networkx hashes ASCII alone
        for line in side.given:
            for place, name in enumerate(line.reads):
                if name in side.lines:
                    graph.add_edge(name, line.key, place=_place(graph, name, line.key, place))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that hashes differ from those of older versions
            hashes: dict[str, list[str]] = weisfeiler_lehman_subgraph_hashes(
                graph, edge_attr="place", node_attr="label", iterations=ROUNDS
            )
        return hashes

    # -- neighbours -----------------------------------------------------------------------------------------------

    def by_neighbours(self, *, in_order: bool = False) -> None:
        waiting = deque(self.counterpart)
        while waiting and self.unfinished:
            new = waiting.popleft()
            for old_name, new_name in self._beside(self.counterpart[new], new, in_order):
                self.pair(old_name, new_name, "neighbour")
                waiting.append(new_name)

    def _beside(self, old: str, new: str, in_order: bool) -> Iterator[tuple[str, str]]:
        before, after = self.old.lines[old], self.new.lines[new]
        if len(before.reads) == len(after.reads) and before.operation == after.operation:
            for one, other in zip(before.reads, after.reads, strict=True):
                if self._fit(one, other):
                    yield one, other
        readers = self._readers(self.old, old)
        for use, found in self._readers(self.new, new).items():
            known = readers.get(use, [])
            if len(known) == len(found) and (in_order or len(found) == 1):
                yield from ((one, other) for one, other in zip(known, found, strict=True) if self._fit(one, other))

    def _fit(self, old: str, new: str) -> bool:
        return (
            old in self.old.free
            and new in self.new.free
            and self.old.lines[old].operation == self.new.lines[new].operation
        )

    def _readers(self, side: _Side, name: str) -> dict[tuple[int, str], list[str]]:
        found: dict[tuple[int, str], list[str]] = {}
        for place, key in side.users.get(name, ()):
            if key in side.free:
                found.setdefault((place, side.lines[key].operation), []).append(key)
        return found

    # -- modules --------------------------------------------------------------------------------------------------

    def by_path(self) -> None:
        def place(line: Line) -> Hashable:
            return (line.path, line.operation) if line.path else None

        self._alike(place, place, "path", in_order=True)

    # -- what several steps share ---------------------------------------------------------------------------------

    def _alike(
        self, old_key: Callable[[Line], Hashable], new_key: Callable[[Line], Hashable], how: How, *, in_order: bool
    ) -> None:
        """Pair what has one key: alone on both sides, or with `in_order` as many on either side."""
        old, new = _by(old_key, self.old.remaining()), _by(new_key, self.new.remaining())
        for key, found in new.items():
            known = old.get(key, [])
            if len(known) == len(found) and (in_order or len(found) == 1):
                for one, other in zip(known, found, strict=True):
                    self.pair(one, other, how)


def _by(key: Callable[[Line], Hashable], lines: Iterator[Line]) -> dict[Hashable, list[str]]:
    found: dict[Hashable, list[str]] = {}
    for line in lines:
        value = key(line)
        if value is not None:
            found.setdefault(value, []).append(line.key)
    return found


def _kind(line: Line, exact: bool) -> str:
    """What an operation is, with `exact` also its constants; of everything else, its type."""
    if not line.operation:
        return f"{line.key[:1]} {line.type}"
    if not exact:
        return line.operation
    return f"{line.operation}({MARK.join(line.arguments.split(MARK)[::2])})"


def _place(graph: networkx.DiGraph[str], source: str, target: str, place: int) -> str:
    """The places at which one operation reads one value."""
    before = graph.get_edge_data(source, target)
    return f"{before['place']},{place}" if before else str(place)


def counts(found: Sequence[Pair]) -> dict[str, int]:
    """How many operations were paired in which way."""
    return dict(Counter(pair.how for pair in found if pair.after.operation))
