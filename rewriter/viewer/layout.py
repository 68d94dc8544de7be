"""Groups -> where each of their parts stands: rows from top to bottom, and places from left to right.

Each group is laid out by itself with its parts closed (layers by Sugiyama et al. 1981, by fast-sugiyama); the page
moves rows and places apart where a part is opened. An edge is drawn in the innermost group that
holds both of its ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fast_sugiyama import from_edges

from rewriter.viewer.tree import Group, Item

WIDTH = 190.0  # of a closed part, as the page draws it, with the space beside it


@dataclass(slots=True)
class Layout:
    """Of each part of a group its row and its place; of each edge the parts at its ends and the points between."""

    places: list[tuple[int, float]] = field(default_factory=list)
    edges: list[tuple[int, int, list[tuple[int, float]]]] = field(default_factory=list)


def layouts(top: Group) -> dict[int, Layout]:
    """The layout of every group, by its number."""
    groups = list(top.groups())
    holder = {part.number: group for group in groups for part in group.parts if isinstance(part, Item)}
    index = {(isinstance(part, Group), part.number): i for group in groups for i, part in enumerate(group.parts)}
    depth: dict[int, int] = {}
    for group in groups:
        depth[group.number] = depth[group.parent.number] + 1 if group.parent else 0
    inside: dict[int, dict[tuple[int, int], None]] = {group.number: {} for group in groups}
    for source, target in _edges(groups):
        where, ends = _meeting(source, target, holder, depth)
        one, other = (index[end] for end in ends)
        if one != other:
            inside[where.number][one, other] = None
    return {group.number: _layout(group, list(inside[group.number])) for group in groups}


def _edges(groups: list[Group]) -> Iterator[tuple[int, int]]:
    items = [part for group in groups for part in group.parts if isinstance(part, Item)]
    number = {item.line.key: item.number for item in items}
    for item in items:
        reads = {name: None for line in (item.before, item.after) if line is not None for name in line.reads}
        yield from ((number[name], item.number) for name in reads if name in number)


def _meeting(
    source: int, target: int, holder: dict[int, Group], depth: dict[int, int]
) -> tuple[Group, tuple[tuple[bool, int], tuple[bool, int]]]:
    """The innermost group that holds two items, and the part of it that each of them is or is in."""
    one, other = holder[source], holder[target]
    ends = [(False, source), (False, target)]
    while one is not other:
        if depth[one.number] >= depth[other.number]:
            ends[0] = True, one.number
            assert one.parent is not None
            one = one.parent
        else:
            ends[1] = True, other.number
            assert other.parent is not None
            other = other.parent
    return one, (ends[0], ends[1])


def _layout(group: Group, edges: list[tuple[int, int]]) -> Layout:
    if group.kind == "fold":
        return Layout([(row, 0.0) for row in range(len(group.parts))], [(a, b, []) for a, b in edges if b == a + 1])
    # What reads from a later part runs upwards: for the layout it is turned round.
    forward = list(dict.fromkeys((min(edge), max(edge)) for edge in edges))
    positions: dict[int, tuple[float, float]] = {}
    pieces: list[tuple[int, int]] = []
    left = 0.0
    next_dummy = len(group.parts)
    for found, width, _height, links in (
        from_edges(forward, vertex_spacing=WIDTH, dummy_vertices=True) if forward else ()
    ):
        # dummies are numbered anew in each connected piece
        own: dict[int, int] = {}
        for name, (x, y) in found:
            number = int(name)
            if number not in own:
                is_part = number < len(group.parts)
                own[number] = number if is_part else next_dummy
                next_dummy += not is_part
            positions[own[number]] = left + x, y
        pieces += [(own[int(a)], own[int(b)]) for a, b in links or ()]
        left += width + WIDTH
    alone = [i for i in range(len(group.parts)) if i not in positions]
    for i in alone:
        positions[i] = left, 0.0
        left += WIDTH
    rows = _rows(positions, forward)
    return Layout(
        [(rows[i], positions[i][0]) for i in range(len(group.parts))],
        list(_routed(edges, pieces, positions, rows, len(group.parts))),
    )


def _rows(positions: dict[int, tuple[float, float]], edges: list[tuple[int, int]]) -> dict[int, int]:
    """Heights -> numbers of rows, from the top, where edges begin."""
    heights = sorted({round(y, 3) for _, y in positions.values()})
    downwards = sum(positions[b][1] > positions[a][1] for a, b in edges) * 2 >= len(edges)
    order = heights if downwards else heights[::-1]
    number = {height: row for row, height in enumerate(order)}
    return {i: number[round(y, 3)] for i, (_, y) in positions.items()}


def _routed(
    edges: list[tuple[int, int]],
    pieces: list[tuple[int, int]],
    positions: dict[int, tuple[float, float]],
    rows: dict[int, int],
    count: int,
) -> Iterator[tuple[int, int, list[tuple[int, float]]]]:
    """Each edge with the points that its long way goes through."""
    after: dict[int, list[int]] = {}
    for a, b in pieces:
        one, other = (a, b) if rows[a] <= rows[b] else (b, a)
        after.setdefault(one, []).append(other)
    ways: dict[tuple[int, int], list[int]] = {}
    for start in range(count):
        for step in after.get(start, ()):
            way = []
            while step >= count:
                way.append(step)
                step = after[step][0]
            ways[start, step] = way
    for a, b in edges:
        way = ways.get((min(a, b), max(a, b)), ways.get((max(a, b), min(a, b)), []))
        points = [(rows[i], positions[i][0]) for i in way]
        yield a, b, points if rows[a] <= rows[b] else points[::-1]
