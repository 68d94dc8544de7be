"""The rows of a prefix: their parameters, their layout, and where they join keys and values."""

from __future__ import annotations

import math
import operator
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from passes.prefix_mask import Columns, shared_call, size_of
from passes.prefix_place import Entry, Place, ancestors
from passes.prompt_encoder import Draw, drawn, normal, uniform
from rewriter.edit import Edit
from rewriter.errors import RewriteError
from rewriter.positions import Positions
from rewriter.text import line

if TYPE_CHECKING:
    from passes.prefix import Prefix

aten = torch.ops.aten
END = sys.maxsize


class Joined:
    """The rows of one attention's prefix, and what they are joined with."""

    def __init__(self, prefix: Prefix, place: Place, columns: int, edit: Edit) -> None:
        self.prefix, self.place, self.columns, self.edit = prefix, place, columns, edit
        self.label = label(prefix)

    def _call(self, operation: Any, *args: Any, like: Node, what: str) -> Node:
        return shared_call(self.edit, operation, *args, like=like, label=f"{self.label}_{what}")

    def rewrite(self) -> None:
        width = self.place.key.heads * self.place.key.width
        prefix = encoded(self.prefix, self.edit, self.place.key.node, width, self.columns)
        count = inserted(self.prefix, self.place.past, self.edit)
        scores = self.place.operands.scores
        keys = self._join(self.place.key, self._rows(prefix, self.place.key, self.place.key_columns))
        self._join(self.place.value, self._rows(prefix, self.place.value, self.place.value_columns))
        extend = Columns(self.edit, count, self.label)
        if scores is None:
            _extend_mask(extend, self.place, keys)
        else:
            _extend_scores(extend, self.place, scores)

    # -- the prefix ---------------------------------------------------------------------------------------------

    def _rows(self, prefix: Node, entry: Entry, columns: tuple[int, int]) -> Node:
        """The rows of one attention, laid out as the tensor they are put before."""
        node, p = entry.node, self.prefix.virtual_tokens
        rows = self._call(aten.slice.Tensor, prefix, 1, *columns, like=node, what="columns")
        heads = self._call(aten.view.default, rows, [1, p, entry.heads, entry.width], like=node, what="heads")
        value = self._call(aten.permute.default, heads, [0, 2, 1, 3], like=node, what="rows")
        count = entry.heads
        if entry.repeat > 1:
            shared = self._call(aten.unsqueeze.default, value, 2, like=node, what="shared")
            wide = self._call(aten.expand.default, shared, [1, count, entry.repeat, p, -1], like=node, what="repeat")
            count *= entry.repeat
            value = self._call(aten.reshape.default, wide, [1, count, p, -1], like=node, what="repeated")
        value = self._laid_out(value, entry, count)
        if entry.past is None:
            return value
        time = entry.axes[2]
        present = in_cache(self.prefix, self.place.past, self.edit)
        return self._call(aten.slice.Tensor, value, time, present, END, like=node, what="new_rows")

    def _laid_out(self, value: Node, entry: Entry, heads: int) -> Node:
        """[1, heads, p, width] in the axes of the entry, once per example."""
        node, batch = entry.node, entry.axes[0]
        if batch is not None and batch == entry.axes[1]:
            return self._merged(value, entry, heads)
        there = sorted((axis, own) for own, axis in enumerate(entry.axes) if axis is not None)
        order = [own for _, own in there]
        dropped = [own for own in range(4) if own not in order]
        if [*order, *dropped] != [0, 1, 2, 3]:
            value = self._call(aten.permute.default, value, [*order, *dropped], like=node, what="layout")
        for _ in dropped:
            value = self._call(aten.squeeze.dim, value, -1, like=node, what="layout")
        if batch is None:
            return value
        sizes = [size_of(self.edit, node, axis) if axis == batch else -1 for axis, _ in there]
        return self._call(aten.expand.default, value, sizes, like=node, what="batch")

    def _merged(self, value: Node, entry: Entry, heads: int) -> Node:
        """For keys or values [b · heads, t, width], or with time last."""
        node, time = entry.node, entry.axes[2]
        flat = self._call(aten.squeeze.dim, value, 0, like=node, what="layout")
        if time == 2:
            flat = self._call(aten.transpose.int, flat, 1, 2, like=node, what="layout")
        size = size_of(self.edit, node, 0)
        times: Any = size // heads if isinstance(size, int) else None
        if times is None:
            times = self._call(operator.floordiv, size, heads, like=node, what="examples")
        return self._call(aten.repeat.default, flat, [times, 1, 1], like=node, what="batch")

    # -- joining ------------------------------------------------------------------------------------------------

    def _join(self, entry: Entry, rows: Node) -> Node:
        """The rows before keys or values, or behind the cache; what reads them reads the longer tensor."""
        edit, node, time = self.edit, entry.node, entry.axes[2]
        if entry.past is not None:
            parts: Any = node.args[0]
            joined = self._call(aten.cat.default, [parts[0], rows, *parts[1:]], time, like=node, what="joined")
            edit.redirect(node, joined)
            edit.erase([node])
        else:
            joined = self._call(aten.cat.default, [rows, node], time, like=node, what="joined")
            if edit.current(node) in entry.reader.all_input_nodes:  # keys and values may be one tensor
                edit.rewire(entry.reader, node, joined)
        if entry.sizes:
            length = self._call(aten.sym_size.int, joined, time, like=joined, what="length")
            for reader, size in entry.sizes:
                edit.rewire(reader, size, length)
            edit.erase({size for _, size in entry.sizes if not size.users})
        return joined


def encoded(prefix: Prefix, edit: Edit, like: Node, width: int, columns: int) -> Node:
    """[virtual_tokens, columns]: a parameter, or what the projection makes of its parameters."""
    values = _Start(prefix, edit, like)
    if not prefix.projection:
        return values.parameter(f"prompt_embeddings.{prefix.adapter}", prefix.virtual_tokens, columns)
    hidden = prefix.hidden or width
    owner = f"prompt_encoder.{prefix.adapter}"
    what = f"{label(prefix)}_encoder"
    rows = values.parameter(f"{owner}.embedding.weight", prefix.virtual_tokens, width)
    inner = shared_call(edit, aten.linear.default, rows, *values.linear(owner, 0, hidden, width), like=like, label=what)
    active = shared_call(edit, aten.tanh.default, inner, like=like, label=what)
    last = values.linear(owner, 2, columns, hidden)
    return shared_call(edit, aten.linear.default, active, *last, like=like, label=what)


class _Start:
    """The parameters of a prefix, made once with their first values."""

    def __init__(self, prefix: Prefix, edit: Edit, like: Node) -> None:
        example = like.meta["val"]
        self.prefix, self.edit = prefix, edit
        self.like = torch.empty(0, dtype=example.dtype, device=example.device)

    def parameter(self, name: str, *shape: int) -> Node:
        """Normal values of the spread asked for."""
        return self._named(name, shape, normal(self.prefix.sigma if self.prefix.init == "random" else 0.0))

    def linear(self, owner: str, index: int, outs: int, ins: int) -> tuple[Node, Node]:
        """Weight and bias as `torch.nn.Linear` starts them; the last layer zero for a prefix that starts at zero."""
        draw = uniform(0.0 if index and self.prefix.init == "zero" else 1 / math.sqrt(ins))
        name = f"{owner}.transform.{index}"
        return self._named(f"{name}.weight", (outs, ins), draw), self._named(f"{name}.bias", (outs,), draw)

    def _named(self, name: str, shape: tuple[int, ...], draw: Draw) -> Node:
        if name in self.edit.added:
            return self.edit.program.placeholder(name)
        return self.edit.parameter(name, drawn(shape, self.like, self.prefix.seed, name, draw))


def label(prefix: Prefix) -> str:
    return "prefix" if prefix.adapter == "default" else f"prefix_{prefix.adapter}"


# -- how many rows enter ----------------------------------------------------------------------------------------------


def in_cache(prefix: Prefix, past: Entry | None, edit: Edit) -> Node:
    """How many rows of the prefix a cache holds: all of it as soon as it is not empty."""
    assert past is not None
    assert past.past is not None
    length = size_of(edit, past.past, past.axes[2])
    assert isinstance(length, Node)
    return shared_call(
        edit, torch.sym_min, length, prefix.virtual_tokens, like=length, label=f"{label(prefix)}_in_cache"
    )


def inserted(prefix: Prefix, past: Entry | None, edit: Edit) -> int | Node:
    """How many rows of the prefix enter now."""
    if past is None:
        return prefix.virtual_tokens
    present = in_cache(prefix, past, edit)
    return shared_call(edit, operator.sub, prefix.virtual_tokens, present, like=present, label=f"{label(prefix)}_new")


# -- masks and positions ----------------------------------------------------------------------------------------------


def _extend_mask(columns: Columns, place: Place, keys: Node) -> None:
    """The mask of an attention in one operation; a causal one without a mask gets one."""
    node, edit = place.operands.result, columns.edit
    args = [*node.args, *[None] * (6 - len(node.args))]
    mask, causal = args[3] or node.kwargs.get("attn_mask"), args[5] or node.kwargs.get("is_causal")
    if isinstance(mask, Node):
        edit.rewire(node, mask, columns.extended(mask, -1, mask.meta["val"].dtype is torch.bool))
    elif causal and isinstance(columns.count, Node):
        raise RewriteError(
            "attention is causal without a mask, although a cache stands before the tokens",
            evidence=[line(edit.program, node)],
            fix="Trace the model with an attention mask.",
        )
    elif causal:
        if place.key.node is not place.operands.key:
            edit.retype()  # what lies between, a repeat of the heads, has become longer
        query, device = place.operands.query, place.operands.query.meta["val"].device
        sizes = [size_of(edit, query, query.meta["val"].ndim - 2), size_of(edit, keys, place.key.axes[2])]
        every = columns.call(aten.ones.default, sizes, dtype=torch.bool, device=device, like=keys, label="all")
        visible = columns.call(aten.tril.default, every, columns.count, like=every, label="mask")
        options = {name: value for name, value in node.kwargs.items() if name not in ("attn_mask", "is_causal")}
        operands = (*node.args[:3], visible, args[4] or 0.0, False)
        explicit = columns.call(node.target, *operands, like=node, label="attention", **options)
        edit.redirect(node, explicit)
        edit.erase([node])


def _extend_scores(columns: Columns, place: Place, scores: Node) -> None:
    """What is added to the scores, scales or hides them on the way to the softmax."""
    node, edit = place.node, columns.edit
    on_the_way = [each for each in ancestors([node]) if each is not scores and scores in ancestors([each])]
    carried = {scores, *on_the_way}
    for each in sorted(on_the_way):
        own = next(source for source in each.all_input_nodes if source in carried)
        last = each.meta["val"].ndim - 1
        for operand in columns.operands(each, last, 0, own) or ():
            if operand.node not in carried:
                edit.rewire(each, operand.node, columns.extended(operand.node, operand.axis, operand.neutral))


def shift(prefix: Prefix, read: Positions, past: Entry | None, edit: Edit) -> None:
    """Positions plus the rows that enter now; to keep them, less the rows of the prefix in the cache."""
    values, reader = read.values, read.reader
    if prefix.positions == "keep":
        by: Any = shared_call(
            edit, operator.neg, in_cache(prefix, past, edit), like=values, label=f"{label(prefix)}_back"
        )
    else:
        by = inserted(prefix, past, edit)
    what = f"{label(prefix)}_positions"
    if not read.sliced:
        edit.rewire(reader, values, shared_call(edit, aten.add.Tensor, values, by, like=values, label=what))
        return
    start, stop = reader.args[2] or 0, reader.args[3]
    moved = [
        start + by
        if isinstance(start, int) and isinstance(by, int)
        else shared_call(edit, operator.add, end, by, like=values, label=what)
        for end in (start, stop)
    ]
    longer = edit.call(aten.slice.Tensor, *reader.args[:2], *moved, like=reader, label=what)
    edit.redirect(reader, longer)
    edit.erase([reader])
