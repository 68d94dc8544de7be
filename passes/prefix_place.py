"""Where rows of a prefix enter an attention: before a key/value repeat, and into a cache when there is one."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from rewriter.attention import Attention, Operands, attention_operands, attentions
from rewriter.errors import RewriteError
from rewriter.find import Miss
from rewriter.program import Program, module_path
from rewriter.text import line
from rewriter.view import NO_CHANGE, Linear, layers, top

aten = torch.ops.aten
WRITES = {  # how a cache of fixed length takes new rows
    aten.index_copy.default,
    aten.index_copy_.default,
    aten.index_put.default,
    aten.index_put_.default,
    aten.slice_scatter.default,
    aten.scatter.src,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Keys or values that rows are put before: which axis means what, and what reads the longer tensor.

    `axes` are the axes of (batch, head, time, width); a tensor without heads has None there, and one whose batch and
    heads are one axis has both at 0. `repeat` is how many query heads share a head later on, when the prefix must be
    repeated itself. `sizes` are operations with the size they name, which must become the longer one. `past` is the
    cache that `node` appends to.
    """

    node: Node
    reader: Node
    axes: tuple[int | None, int | None, int, int]
    heads: int
    width: int
    repeat: int = 1
    sizes: tuple[tuple[Node, Node], ...] = ()
    past: Node | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """One attention that gets a prefix; its rows are columns `start..` of the prefix, keys before values."""

    path: str
    role: str  # cross, or encoder and decoder where one attends to the other, or self
    node: Node
    operands: Operands
    key: Entry
    value: Entry
    start: int = 0
    past: Entry | None = None  # the entry whose cache says whether the prefix is in already

    @property
    def key_columns(self) -> tuple[int, int]:
        return self.start, self.start + self.key.heads * self.key.width

    @property
    def value_columns(self) -> tuple[int, int]:
        middle = self.key_columns[1]
        return middle, middle + self.value.heads * self.value.width

    @property
    def columns(self) -> int:
        return self.value_columns[1] - self.start


def places(program: Program) -> tuple[list[Place], list[Miss]]:
    """Every attention of the program, with its role, in program order; `start` is not set yet."""
    found = layers(program)
    tops = {top(call): (site, call) for site in found.values() if isinstance(site, Linear) for call in site.calls}
    result, missed = [], []
    crossing: list[Node] = []
    for attention in attentions(program, found):
        operands = attention_operands(attention.node)
        assert operands is not None
        key, value = _entries(program, attention, operands)
        if isinstance(key, str) or isinstance(value, str):
            missed.append(Miss(attention.path, key if isinstance(key, str) else str(value)))
            continue
        queries, keys = (_inputs(operand, tops) for operand in (operands.query, operands.key))
        crosses = bool(queries) and bool(keys) and not queries & keys
        if crosses:
            crossing.append(operands.key)
        role = "cross" if crosses else "self"
        result.append(Place(attention.path, role, attention.node, operands, key, value))
    if not result and not missed:
        missed = [
            Miss(module_path(node), f"a softmax of what is no product: {line(program, node)}")
            for node in softmaxes(program)
        ]
    encoder = ancestors(crossing)
    own = "decoder" if crossing else "self"
    caching = next((place.key for place in result if place.key.past is not None), None)
    return [
        replace(
            place,
            role="cross" if place.role == "cross" else "encoder" if place.operands.result in encoder else own,
            past=caching if place.key.past is not None else None,
        )
        for place in result
    ], missed


def softmaxes(program: Program) -> list[Node]:
    return [node for node in program.graph.nodes if node.target in (aten.softmax.int, aten._softmax.default)]


def ancestors(nodes: Iterable[Node], stop: frozenset[Node] = frozenset()) -> set[Node]:
    """The nodes and everything they are computed from, without walking through `stop`."""
    seen: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen and node not in stop:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return seen


def _inputs(operand: Node, tops: dict[Node, tuple[Linear, Node]]) -> set[Node]:
    """What the linear layers that an operand comes from are applied to."""
    todo, seen, found = [operand], set(), set()
    while todo:
        node = todo.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node in tops:
            site, call = tops[node]
            found.add(_source(site.input(call)))
        else:
            todo.extend(node.all_input_nodes)
    return found


def _source(node: Node) -> Node:
    """The value behind views and copies of it, such as the flat one that a transposed layer takes."""
    while node.target in {aten.view.default, aten.reshape.default, *NO_CHANGE} and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


# -- entries ----------------------------------------------------------------------------------------------------------


def _entries(program: Program, attention: Attention, operands: Operands) -> tuple[Entry | str, Entry | str]:
    sites = (attention.key, attention.value)
    if operands.scores is None:
        layouts = [_plain(operand.meta["val"].ndim) for operand in (operands.key, operands.value)]
        readers = [operands.result, operands.result]
    else:
        scores = _product_layout(operands.scores, operands.key, is_key=True)
        weighted = _product_layout(operands.result, operands.value, is_key=False)
        dimension = attention.node.args[1]
        if not isinstance(dimension, int) or dimension % attention.node.meta["val"].ndim != _last(attention.node):
            return "the softmax is not over the last dimension", ""
        layouts, readers = [scores, weighted], [operands.scores, operands.result]
    found = []
    for operand, reader, layout, site in zip((operands.key, operands.value), readers, layouts, sites, strict=True):
        found.append(_entry(program, operand, reader, layout, site))
    return found[0], found[1]


def _last(node: Node) -> int:
    return int(node.meta["val"].ndim) - 1


def _plain(ndim: int) -> tuple[int | None, int | None, int, int] | None:
    return {4: (0, 1, 2, 3), 3: (0, None, 1, 2), 2: (None, None, 0, 1)}.get(ndim)


def _product_layout(product: Node, operand: Node, *, is_key: bool) -> tuple[int | None, int | None, int, int] | None:
    """The axes of keys or values in the product that reads them."""
    if product.target is aten.einsum.default:
        equation = str(product.args[0]).replace(" ", "")
        terms, _, out = equation.partition("->")
        mine = terms.split(",")[list(product.args[1]).index(operand)]  # type: ignore[arg-type]
        other = next(term for term in terms.split(",") if term != mine)
        summed = [letter for letter in mine if letter in other and letter not in out]
        free = [letter for letter in mine if letter not in other and letter in out]
        shared = [letter for letter in mine if letter in other and letter in out]
        if "." in equation or len(summed) != 1 or len(free) != 1 or len(shared) > 2:
            return None
        time, width = (free[0], summed[0]) if is_key else (summed[0], free[0])
        if is_key and out[-1] != time:
            return None
        heads = mine.index(shared[1]) if len(shared) == 2 else None
        return (mine.index(shared[0]) if shared else None, heads, mine.index(time), mine.index(width))
    if product.args[1] is not operand:
        return None
    plain = _plain(operand.meta["val"].ndim)
    return (plain[0], plain[1], plain[3], plain[2]) if plain is not None and is_key else plain


def _entry(
    program: Program,
    operand: Node,
    reader: Node,
    axes: tuple[int | None, int | None, int, int] | None,
    sites: Sequence[Linear],
) -> Entry | str:
    if axes is None:
        return "keys and values are laid out in a way this pass does not know"
    node = operand
    batch, head, time, width = axes
    if node.target is aten.transpose.int and {int(d) % (_last(node) + 1) for d in node.args[1:3]} == {time, width}:  # type: ignore[arg-type]
        node, reader, (time, width) = node.args[0], node, (width, time)  # type: ignore[assignment]
    sizes = node.meta["val"].shape
    if head is None and batch is not None and len(sizes) == 3 and sites and isinstance(sizes[width], int):
        rows = sum(s.part.stop - s.part.start if s.part else s.out_features for s in sites)
        count = rows // sizes[width]
        entry = Entry(node, reader, (batch, 0 if count > 1 else None, time, width), count, sizes[width])
    else:
        heads = sizes[head] if head is not None else 1
        if not isinstance(heads, int) or not isinstance(sizes[width], int):
            return "the number of heads or their size is not fixed"
        entry = Entry(node, reader, (batch, head, time, width), heads, sizes[width])
    if entry.axes == (0, 1, 2, 3):
        entry = _before_repeat(entry)
    return _in_cache(program, entry)


def _before_repeat(entry: Entry) -> Entry:
    """The entry before each head is repeated for the query heads that share it."""
    node, path = entry.node, [entry.reader, entry.node]
    if node.target is aten.repeat_interleave.self_int and len(node.args) > 2 and node.args[2] == 1:
        source = node.args[0]
        assert isinstance(source, Node)
        return replace(entry, node=source, reader=node, heads=source.meta["val"].shape[1])
    for targets in ({aten.view.default, aten.reshape.default}, {aten.expand.default}, {aten.unsqueeze.default}):
        while node.target in NO_CHANGE or (aten.unsqueeze.default in targets and _is_whole_slice(node)):
            node = node.args[0]  # type: ignore[assignment]
            path.append(node)
        if node.target not in targets or node.meta["val"].ndim == 2:
            return entry
        node = node.args[0]  # type: ignore[assignment]
        path.append(node)
    unsqueeze = path[-2]
    heads = node.meta["val"].shape[1] if node.meta["val"].ndim == 4 else None
    if unsqueeze.args[1] not in (2, -3) or not isinstance(heads, int) or entry.heads % heads:
        return entry
    repeat = entry.heads // heads
    sizes = []
    for each in path[1:-2]:
        if each.target in {aten.view.default, aten.reshape.default, aten.expand.default}:
            given = each.args[1]
            size = given[-2]  # type: ignore[index]
            if isinstance(size, Node):
                sizes.append((each, size))
            elif size != -1:  # a fixed length is named: the rows enter after the repeat
                return replace(entry, heads=heads, repeat=repeat)
    return replace(entry, node=node, reader=unsqueeze, heads=heads, sizes=tuple(sizes))


def _handed_on(node: Node) -> Node | None:
    """The value that an operation passes on as it is."""
    source = node.args[0] if node.target in NO_CHANGE or _is_whole_slice(node) else None
    return source if isinstance(source, Node) else None


def _is_whole_slice(node: Node) -> bool:
    return node.target is aten.slice.Tensor and tuple(node.args[2:4]) in ((), (0,), (0, sys.maxsize))


def _in_cache(program: Program, entry: Entry) -> Entry | str:
    node, reader = entry.node, entry.reader
    while (source := _handed_on(node)) is not None:
        node, reader = source, node
    if node.target in WRITES:
        return "its cache has a fixed length, in which a prefix has no place"
    if node.target is not aten.cat.default:
        return entry
    parts = node.args[0]
    past: Node = parts[0]  # type: ignore[index, assignment]
    while (source := _handed_on(past)) is not None:
        past = source
    if past not in program.inputs():
        return entry
    forgets = _returns_some(node)
    if entry.repeat > 1 or forgets:
        reason = "forgets its first rows (a sliding window)" if forgets else "has a fixed length"
        raise RewriteError(
            f"the cache {reason}, so a prefix cannot be kept in it",
            evidence=[line(program, node)],
            fix="Trace with a cache that keeps every row and whose length may vary, or without one.",
        )
    return replace(entry, node=node, reader=reader, past=past)


def _returns_some(node: Node) -> bool:
    """Whether a part of the rows is returned."""
    todo, cut = [node], set[Node]()
    while todo:
        for user in todo.pop().users:
            if user.target is aten.slice.Tensor and user not in cut:
                todo.append(user)
                cut.add(user)
    return any(not _is_whole_slice(each) and any(user.op == "output" for user in each.users) for each in cut)


def numbered(chosen: Sequence[Place], *, in_fours: bool) -> Iterator[Place]:
    """The places with their columns of the prefix.

    With `in_fours`, as PEFT reads a prefix with two submodules: it takes the pairs of all layers twice over in fours,
    a pair for the decoder's own attention and one for the cross-attention, which it drops.
    """
    start = 0
    starts = []
    for place in chosen:
        starts.append(start)
        start += place.columns
    for index, place in enumerate(chosen):
        yield replace(place, start=starts[2 * index % len(chosen)] if in_fours else starts[index])


def total(chosen: Iterable[Place]) -> int:
    return sum(place.columns for place in chosen)
