"""Columns for a prefix on the left of what is added to or hides attention scores.

A column of a prefix is visible. Where the graph computes a bias or a window from how far a key is from a query, the
prefix stands just before the first key, at the distances -p … -1, as rows of a cache would.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from rewriter.edit import Edit
from rewriter.errors import RewriteError
from rewriter.positions import COUNTS
from rewriter.program import Origin
from rewriter.text import line
from rewriter.view import NO_CHANGE

aten = torch.ops.aten
ORDER = {aten.le: (1, -1), aten.lt: (1, -1), aten.ge: (-1, 1), aten.gt: (-1, 1)}  # signs of operands that make it True
AND = {aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor}
OR = {aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor}
NOT = {aten.logical_not.default, aten.bitwise_not.default}
FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar}
SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor, aten.add.Scalar, aten.sub.Scalar}
PRODUCTS = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}
UNARY = {
    *NO_CHANGE,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.abs.default,
    aten.neg.default,
    aten.log.default,
    aten.exp.default,
    aten.tanh.default,
    aten.relu.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.floor.default,
    aten.full_like.default,
    aten.ones_like.default,
    aten.zeros_like.default,
}
PAIRS = {aten.min.other, aten.max.other, aten.minimum.default, aten.maximum.default, aten.rsub.Scalar}
HIDDEN = -1e4  # a score this low is hidden


@dataclass(frozen=True, slots=True)
class _Operand:
    """One operand of an operation that has a column per key: where it stands, on which axis, what extends it."""

    index: int
    node: Node
    axis: int
    neutral: float


@dataclass(frozen=True, slots=True)
class Columns:
    """Extends values by `count` columns on the left of an axis; `count` is a number or a size of the graph."""

    edit: Edit
    count: int | Node
    label: str

    def call(self, operation: Any, *args: Any, like: Node, label: str, **kwargs: Any) -> Node:
        """An operation of this step; the one that is there already when it computes the same."""
        return shared_call(self.edit, operation, *args, like=like, label=f"{self.label}_{label}", **kwargs)

    def extended(self, node: Node, axis: int, neutral: float) -> Node:
        """`node` with more columns on an axis; itself when it has one column for all keys."""
        value = node.meta["val"]
        axis %= max(value.ndim, 1)
        if value.ndim == 0 or (isinstance(value.shape[axis], int) and value.shape[axis] == 1):
            return node
        if not self._depends_on_distance(node, axis, neutral):
            return self._padded(node, axis, neutral)
        if node.target in COUNTS:
            return self._counted(node, axis)
        args = list(node.args)
        operands = self.operands(node, axis, neutral)
        assert operands is not None
        for each in operands:
            args[each.index] = self.extended(each.node, each.axis, each.neutral)
        if node.target is aten.expand.default:
            args[1] = [*args[1][:axis], -1, *args[1][axis + 1 :]]  # type: ignore[index, misc]
        return self.call(node.target, *args, like=node, label="mask", **node.kwargs)

    def _padded(self, node: Node, axis: int, neutral: float) -> Node:
        value = node.meta["val"]
        fill: Any = bool(neutral) if value.dtype is torch.bool else neutral
        sizes = [self.count if i == axis else size_of(self.edit, node, i) for i in range(value.ndim)]
        left = self.call(aten.new_full.default, node, sizes, fill, like=node, label="visible")
        return self.call(aten.cat.default, [left, node], axis, like=node, label="mask")

    def _counted(self, node: Node, axis: int) -> Node:
        """Positions that begin `count` earlier."""
        first: Any = (
            -self.count
            if isinstance(self.count, int)
            else self.call(operator.neg, self.count, like=self.count, label="first")
        )
        if node.target is aten.arange.default:
            return self.call(aten.arange.start, first, *node.args, like=node, label="keys", **node.kwargs)
        start = node.args[0]
        if node.target is aten.arange.start and isinstance(start, int) and isinstance(first, int):
            return self.call(aten.arange.start, start + first, *node.args[1:], like=node, label="keys", **node.kwargs)
        raise unknown_bias(self.edit, node)

    # -- what depends on distance ---------------------------------------------------------------------------------

    def _depends_on_distance(self, node: Node, axis: int, neutral: float) -> bool:
        """Whether the prefix's columns differ from the neutral value, because positions are compared or counted."""
        if node.target in COUNTS:
            return True
        if node.meta["val"].dtype is torch.bool:
            return self._far(node, axis, bool(neutral)) != bool(neutral)
        operands = self.operands(node, axis, neutral)
        if operands is not None:
            return any(self._depends_on_distance(each.node, each.axis, each.neutral) for each in operands)
        if node.op == "call_function" and _counts_below(node):
            raise unknown_bias(self.edit, node)
        return False

    def _far(self, node: Node, axis: int, neutral: bool) -> bool:
        """What a mask holds for a key far to the left: what it compares decides, anything else is neutral."""
        packet = getattr(node.target, "overloadpacket", None)
        if packet in ORDER:
            for sign, operand in zip(ORDER[packet], node.args, strict=False):
                direction = self._direction(operand, axis - _missing(node, operand)) * sign
                if direction:
                    return direction > 0
            return neutral
        operands = self.operands(node, axis, neutral) or []
        values = [self._far(each.node, each.axis, bool(each.neutral)) for each in operands]
        if node.target in NOT:
            return not values[0] if values else neutral
        if node.target in AND:
            return all(values) if values else neutral
        if node.target in OR:
            return any(values) if values else neutral
        return values[0] if len(values) == 1 else neutral

    def _direction(self, node: Any, axis: int) -> int:
        """1 when a value grows with the position of a key on the left of all, -1 when it falls, 0 for another value."""
        if not isinstance(node, Node) or axis < 0 or not isinstance(node.meta.get("val"), torch.Tensor):
            return 0
        size = node.meta["val"].shape[axis]
        if isinstance(size, int) and size == 1:
            return 0
        if node.target in COUNTS:
            return 1
        operands = self.operands(node, axis, 0) or []
        found = {index: self._direction(each.node, each.axis) for index, each in enumerate(operands)}
        signs = [
            -sign if node.target is aten.sub.Tensor and operands[i].index == 1 else sign for i, sign in found.items()
        ]
        if node.target in {aten.neg.default, aten.rsub.Scalar}:
            signs = [-sign for sign in signs]
        if node.target is aten.abs.default:
            signs = [-abs(sign) for sign in signs]
        return next((sign for sign in signs if sign), 0)

    # -- operations -----------------------------------------------------------------------------------------------

    def operands(self, node: Node, axis: int, neutral: float, scores: Node | None = None) -> list[_Operand] | None:
        """The operands of an operation that have a column per key; None for an operation this pass does not know.

        `scores` is the operand that is the attention's own, when it is known.
        """
        target, args = node.target, node.args
        if node.op != "call_function":
            return None
        if target is aten.permute.default:
            order = [int(d) % node.meta["val"].ndim for d in args[1]]  # type: ignore[union-attr, arg-type]
            return _kept(0, args[0], order[axis], neutral)
        if target is aten.transpose.int:
            one, other = (int(d) % node.meta["val"].ndim for d in args[1:3])  # type: ignore[arg-type]
            return _kept(0, args[0], {one: other, other: one}.get(axis, axis), neutral)
        if target is aten.unsqueeze.default:
            place = int(args[1]) % node.meta["val"].ndim  # type: ignore[arg-type]
            return _kept(0, args[0], axis - (axis > place), neutral)
        if target is aten.expand.default:
            return _kept(0, args[0], axis - _missing(node, args[0]), neutral)
        if target is aten.slice.Tensor:
            cuts = int(args[1] if len(args) > 1 else 0) % node.meta["val"].ndim == axis  # type: ignore[arg-type]
            whole = tuple(args[2:3]) in ((), (0,), (None,)) and (
                len(args) < 4 or args[3] == torch.iinfo(torch.int64).max
            )
            return None if cuts and not whole else _kept(0, args[0], axis, neutral)
        if target is aten.embedding.default:
            return _kept(1, args[1], axis, 0) if axis < args[1].meta["val"].ndim else None  # type: ignore[union-attr]
        neutrals = _neutrals(node, neutral, scores)
        if neutrals is None:
            return None
        found = []
        for index, (operand, own) in enumerate(zip(args, neutrals, strict=False)):
            if isinstance(operand, Node) and isinstance(operand.meta.get("val"), torch.Tensor):
                found += _kept(index, operand, axis - _missing(node, operand), own)
        return found


def _kept(index: int, operand: Any, axis: int, neutral: float) -> list[_Operand]:
    shape = operand.meta["val"].shape
    if axis < 0 or axis >= len(shape) or (isinstance(shape[axis], int) and shape[axis] == 1):
        return []
    return [_Operand(index, operand, axis, neutral)]


def _missing(node: Node, operand: Any) -> int:
    """How many axes an operand lacks on the left."""
    if not isinstance(operand, Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
        return int(node.meta["val"].ndim)
    return int(node.meta["val"].ndim - operand.meta["val"].ndim)


def _neutrals(node: Node, neutral: float, scores: Node | None) -> list[float] | None:
    """For each operand of an elementwise operation: what a new column of it holds so that the result's is neutral."""
    target, args = node.target, node.args
    packet = getattr(target, "overloadpacket", None)
    if target in UNARY:
        return [neutral]
    if target in SUMS or target in PAIRS or packet in ORDER or packet in (aten.eq, aten.ne):
        return [neutral, 0] if target in SUMS else [neutral, neutral]
    if target in PRODUCTS:
        return [neutral, 1]
    if target in AND or target in OR:
        return [neutral, neutral]
    if target in NOT:
        return [not neutral]
    if target in FILLS:
        return [neutral, False]
    if target in WHERE:
        return [_shows_first(args[1], args[2], scores), neutral, neutral]
    return None


def _shows_first(one: Any, other: Any, scores: Node | None) -> bool:
    """Whether a `where` shows what it takes first, and hides a score behind the second."""
    if scores is not None:
        return one is scores
    values = [_number(one), _number(other)]
    if values[1] is not None and values[1] <= HIDDEN:
        return True
    return not (values[0] is not None and values[0] <= HIDDEN)


def _number(value: Any) -> float | None:
    """The number that a scalar or a filled tensor holds."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Node) and value.target in {aten.full.default, aten.full_like.default, aten.new_full.default}:
        number = value.args[1 if value.target is not aten.new_full.default else 2]
        return float(number) if isinstance(number, (int, float)) else None
    if isinstance(value, Node) and value.target in {aten.scalar_tensor.default, *NO_CHANGE, *UNARY} and value.args:
        return _number(value.args[0])
    return -math.inf if isinstance(value, Node) and value.op == "placeholder" and value.meta["val"].ndim == 0 else None


def _counts_below(node: Node) -> bool:
    """Whether numbers that count positions reach a value without being turned into a mask or used to look it up."""
    todo, seen = [node], set()
    while todo:
        each = todo.pop()
        value = each.meta.get("val")
        if each in seen or not isinstance(value, torch.Tensor) or value.dtype is torch.bool:
            continue
        seen.add(each)
        if each.target in COUNTS:
            return True
        looked_up = each.target in {aten.index.Tensor, aten.gather.default, aten.index_select.default}
        todo.extend(each.all_input_nodes[:1] if looked_up else each.all_input_nodes)
    return False


def unknown_bias(edit: Edit, node: Node) -> RewriteError:
    return RewriteError(
        "attention scores have a bias by position (ALiBi or its like) that this pass cannot extend to a prefix",
        evidence=[line(edit.program, node)],
        fix="Use prompt tuning on this model: it lengthens the sequence itself.",
    )


# -- operations of one step -------------------------------------------------------------------------------------------


def shared_call(edit: Edit, operation: Any, *args: Any, like: Node, label: str, **kwargs: Any) -> Node:
    """`edit.call`, or the operation that this step inserted before and that computes the same."""
    first = next((leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Node)), like)
    for user in first.users:
        origin = Origin.of(user)
        if (
            origin is not None
            and origin.step == edit.number
            and user.target is operation
            and _same(user.args, args)
            and _same(user.kwargs, kwargs)
        ):
            return user
    return edit.call(operation, *args, like=like, label=label, **kwargs)


def _same(one: Any, other: Any) -> bool:
    leaves = [torch.utils._pytree.tree_flatten(_plain(tree)) for tree in (one, other)]
    return leaves[0] == leaves[1]


def _plain(tree: Any) -> Any:
    """fx keeps lists and mappings of its own kind."""
    if isinstance(tree, (list, tuple)):
        return [_plain(item) for item in tree]
    return {key: _plain(item) for key, item in tree.items()} if isinstance(tree, dict) else tree


def size_of(edit: Edit, tensor: Node, axis: int) -> int | Node:
    """A size as an operation can take it: a number, or the value in the graph that holds it."""
    size = tensor.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    for node in edit.program.graph.nodes:
        if node is tensor and node.op != "placeholder":
            break
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == size.node.expr:
            return node  # type: ignore[no-any-return]
    return shared_call(edit, aten.sym_size.int, tensor, axis, like=tensor, label="prefix_size")
