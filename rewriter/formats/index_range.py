"""Which inputs of a program index a table, and how many rows that table has: found by data flow, not by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.program import Program

aten = torch.ops.aten
Reach = list[tuple[Any, int]]  # rows of the table (an int or a SymInt), what is added to the index before it is used

# operation -> position of the table among the arguments, the dimension that is indexed, position of the index
_TABLES = {
    aten.embedding.default: (0, 0, 1),
    aten.cross_entropy_loss.default: (0, 1, 1),
    aten.nll_loss_nd.default: (0, 1, 1),
}
_BY_DIMENSION = (aten.index_select.default, aten.gather.default)
# operations that hand on the values of their first argument
_SAME = {
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.flatten.using_ints,
    aten.repeat.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.masked_fill.Scalar,
    aten.roll.default,
    aten.flip.default,
}
# operations that hand on values of several arguments
_MIXED: dict[Any, tuple[int, ...]] = {
    aten.where.self: (1, 2),
    aten.where.ScalarOther: (1,),
    aten.where.ScalarSelf: (2,),
    aten.cat.default: (0,),
    aten.stack.default: (0,),
    aten.slice_scatter.default: (0, 1),
    aten.select_scatter.default: (0, 1),
    aten.copy.default: (1,),
    aten.copy_.default: (0, 1),
    aten.mul.Tensor: (0, 1),
}
_SUMS: dict[Any, int] = {aten.add.Tensor: 1, aten.add.Scalar: 1, aten.sub.Tensor: -1, aten.sub.Scalar: -1}
_COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.cumsum.default)


class Found(dict[str, Reach]):
    """Input placeholder -> tables it indexes; `positions` says how large a symbol may become before positions run
    past their table."""

    def __init__(self) -> None:
        self.positions: dict[str, int] = {}


def reach(program: Program) -> Found:
    """Walk back from every index of every table lookup to the inputs and to the position counts it comes from."""
    found = Found()
    inputs = {node.name for node in program.inputs()}
    for node in program.graph.nodes:
        for rows, index in _lookups(node):
            for source, offset in _sources(index):
                if source.name in inputs:
                    found.setdefault(source.name, []).append((rows, offset))
                elif source.target in _COUNTS and isinstance(rows, int):
                    _limit(found.positions, index, rows - max(offset, 2))
    return found


def _limit(positions: dict[str, int], index: Node, largest: int) -> None:
    value = index.meta.get("val")
    shape: Any = value.shape if isinstance(value, Tensor) else ()
    for size in shape:
        if not isinstance(size, torch.SymInt) or len(size.node.expr.free_symbols) != 1:
            continue
        (symbol,) = size.node.expr.free_symbols
        more = size.node.expr - symbol  # a prompt's rows, which are no tokens of the caller's
        if more.is_number:
            room = largest - int(more)
            positions[str(symbol)] = min(room, positions.get(str(symbol), room))


def _lookups(node: Node) -> Iterator[tuple[Any, Node]]:
    """The number of rows and the index node of every table that this node looks up."""
    if node.op != "call_function":
        return
    args: Any = node.args
    if node.target is aten.one_hot.default:
        if len(args) > 1 and args[1] > 0:
            yield args[1], args[0]
    elif node.target in _TABLES:
        table, dimension, index = _TABLES[node.target]
        shape = _shape(args[table])
        if shape and isinstance(args[index], Node):
            yield shape[min(dimension, len(shape) - 1)], args[index]
    elif node.target in _BY_DIMENSION and isinstance(args[2], Node):
        yield _shape(args[0])[args[1]], args[2]
    elif node.target is aten.index.Tensor:
        for dimension, index in enumerate(args[1]):
            if isinstance(index, Node) and index.meta["val"].dtype is not torch.bool:
                yield _shape(args[0])[dimension], index


def _shape(node: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.shape if isinstance(value, Tensor) else ()


def _sources(index: Node) -> Iterator[tuple[Node, int]]:
    """The nodes whose values arrive at `index`, with what is added on the way.

    A product is a count times a mask: the count arrives, but an input that is a factor is the mask.
    """
    waiting: list[tuple[Node, int, bool]] = [(index, 0, False)]
    seen = set()
    while waiting:
        node, offset, factor = waiting.pop()
        if (node, offset, factor) in seen:
            continue
        seen.add((node, offset, factor))
        if node.op == "call_function" and node.target in _SUMS:
            offset += _SUMS[node.target] * sum(value for value in node.args if isinstance(value, int))
        before = _handed_on(node)
        if before:
            waiting += [(n, offset, factor or node.target is aten.mul.Tensor) for n in before]
        elif node.op == "call_function" or not factor:
            yield node, offset


def _handed_on(node: Node) -> list[Node]:
    """The arguments whose values the node hands on; none for a node that makes values of its own."""
    if node.op != "call_function":
        return []
    if node.target in _SAME:
        return node.all_input_nodes[:1]
    if node.target in _SUMS:
        return node.all_input_nodes
    return [n for place in _MIXED.get(node.target, ()) for n in _nodes(node.args[place])]


def _nodes(value: Any) -> list[Node]:
    return [n for n in (value if isinstance(value, list | tuple) else [value]) if isinstance(n, Node)]
