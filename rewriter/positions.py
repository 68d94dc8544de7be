"""Where a model looks up the positions of its tokens: tables of positions, rotations, and sines; by data flow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from rewriter.attention import PASS_ON
from rewriter.program import Program, module_path
from rewriter.view import weight_of

aten = torch.ops.aten
LOOKUPS = {
    aten.embedding.default: (0, 1),
    aten.index.Tensor: (0, 1),
    aten.index_select.default: (0, 2),
    aten.gather.default: (0, 2),
}
# What a table goes through on its way to a lookup: the rows stay the rows.
WHOLE = {
    aten.slice.Tensor,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.repeat.default,
    aten.expand.default,
    aten.to.device,
    aten.to.dtype,
}
WAVES = {aten.cos.default, aten.sin.default, aten.polar.default}
ARANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
COUNTS = {*ARANGES, aten.cumsum.default}
# Operations after which a position p + n is still n more than p; a product is one with a mask of zeros and ones.
MOVES_ALONG = {
    *PASS_ON,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.type_as.default,
    aten._to_copy.default,
    aten.repeat.default,
    aten.clamp.default,
}
# Operations that a position goes through on its way to a sine: all but powers, which make the frequencies.
LINEAR = {
    *PASS_ON,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.outer.default,
    aten.ger.default,
    aten.einsum.default,
    aten.cat.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
}


@dataclass(frozen=True, slots=True)
class Positions:
    """Values that say where tokens stand, and the operation that reads them: a lookup, a slice of a table, a wave.

    `rows` is the number of positions of the table, None where there is no end. `values` is the slice itself when the
    table is sliced and no positions are computed.
    """

    path: str
    values: Node
    reader: Node
    rows: int | None = None

    @property
    def sliced(self) -> bool:
        return self.values is self.reader

    @property
    def first(self) -> int:
        """What is looked up for the first token: some tables begin with rows for padding."""
        return 0 if self.sliced else _first(self.values)

    @property
    def length(self) -> Any:
        """How many positions are looked up: a number when the length of the sequence is fixed."""
        if self.sliced:
            return self.reader.meta["val"].shape[_dimension(self.reader)]
        sizes = self.values.meta["val"].shape
        return next((size for size in sizes if not isinstance(size, int)), max(sizes, default=1))


def positions(program: Program) -> list[Positions]:
    """Every place where the program reads positions, in program order.

    What only compares positions with each other, as masks and relative biases do, is none of them.
    """
    found: dict[tuple[Node, Node], Positions] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        for each in _at(program, node):
            found.setdefault((each.values, each.reader), each)
    return sorted(found.values(), key=lambda each: each.reader)


def _at(program: Program, node: Node) -> Iterator[Positions]:
    if node.target in WAVES:
        yield from _waves(program, node)
    elif node.target in LOOKUPS:
        table, index = (node.args[i] for i in LOOKUPS[node.target])
        indices = [i for i in index if i is not None] if isinstance(index, list | tuple) else [index]
        weight = _table(program, table)
        values = indices[0]
        if weight is not None and len(indices) == 1 and isinstance(values, Node) and counts(program, values):
            yield Positions(module_path(node), values, node, program.tensor(weight).shape[0])
    elif node.target is aten.slice.Tensor and len(node.args) > 3 and isinstance(node.args[3], Node):
        weight = _table(program, node.args[0])
        if weight is not None and not _is_square(program.tensor(weight)):
            source = node.args[0]
            assert isinstance(source, Node)
            yield Positions(module_path(node), node, node, source.meta["val"].shape[_dimension(node)])


def _table(program: Program, node: object) -> str | None:
    """The tensor of floating-point rows behind a value, through whole slices and views."""
    while isinstance(node, Node) and node.target in WHOLE:
        node = node.args[0]
    held = weight_of(program, node)
    tensor = program.tensor(held[0]) if held else None
    return held[0] if held and tensor is not None and tensor.is_floating_point() and tensor.ndim >= 2 else None


def _is_square(table: torch.Tensor) -> bool:
    """Whether a tensor has a row for every pair of positions, as a stored mask has, not one per position."""
    return table.ndim >= 2 and table.shape[-1] == table.shape[-2]


def _dimension(node: Node) -> int:
    dimension = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(dimension, int)
    return int(dimension % node.meta["val"].ndim)


def counts(program: Program, value: object) -> bool:
    """Whether a value counts positions: moved by n when every position is."""
    todo, seen = [value], set()
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if _is_source(program, node):
            return True
        if node.op == "call_function" and node.target in MOVES_ALONG and not _is_difference(node):
            todo.extend(node.args[:2] if node.target in (aten.add.Tensor, aten.mul.Tensor) else node.args[:1])
    return False


def _first(value: object) -> int:
    """The first number of a count, with what is added to it on the way."""
    added = 0
    while isinstance(value, Node) and value.target in MOVES_ALONG:
        other = value.args[1] if len(value.args) > 1 else None
        if isinstance(other, int) and value.target in (aten.add.Tensor, aten.sub.Tensor):
            added += other if value.target is aten.add.Tensor else -other
        value = value.args[0]
    return added + (isinstance(value, Node) and value.target is aten.cumsum.default)


def _is_difference(node: Node) -> bool:
    """Whether one tensor of positions is taken from another: how far two tokens are apart does not move."""
    other = node.args[1] if node.target is aten.sub.Tensor else None
    return isinstance(other, Node) and isinstance(other.meta.get("val"), torch.Tensor)


def _is_source(program: Program, node: Node) -> bool:
    if node.target in COUNTS:
        return True
    if node.op != "placeholder" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if node.meta["val"].is_floating_point():
        return False
    name = program.parameter_name(node)
    if name is None:  # among integer inputs only the name tells positions from tokens
        return "position" in node.name
    tensor = program.tensor(name)
    if tensor.device.type == "meta" or tensor.numel() < 2:
        return "position" in name
    return bool((tensor.diff(dim=-1) == 1).all())


def _waves(program: Program, wave: Node) -> Iterator[Positions]:
    """The positions whose sine or cosine is taken: what is still a count on the way back."""
    todo = [(source, wave) for source in wave.all_input_nodes]
    seen = set()
    while todo:
        node, reader = todo.pop()
        if (node, reader) in seen or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        seen.add((node, reader))
        whole = not node.meta["val"].is_floating_point()
        if (whole and counts(program, node)) or node.target in ARANGES:
            yield Positions(module_path(reader), node, reader)
        elif node.op == "call_function" and node.target in LINEAR:
            todo.extend((source, node) for source in node.all_input_nodes)
