"""Products of rows with a stack of matrices, one of which each row takes: what a mixture of experts computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten
# By name: one of them exists only where the library that defines it was imported.
OFFSETS = {"transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"}
BATCHED = {aten.bmm.default, aten.matmul.default}


@dataclass(frozen=True, slots=True)
class Grouped:
    """`y_s = x_s W_e` for every row s of expert e: the operands, and what assigns rows to experts.

    Two products with equal `key` assign every row to the same expert. The weight operand is [experts, i, o] with
    `inputs_first`, else [experts, o, i].
    """

    data: Node
    weight: Node
    key: tuple[Any, ...]
    inputs_first: bool


def grouped(node: Node) -> Grouped | None:
    """How an operation multiplies rows with a stack of matrices; None when it does not."""
    if node.op != "call_function":
        return None
    if node.target in BATCHED:
        return _batched(node)
    if node.target is aten.einsum.default:
        return _einsum(node)
    if str(node.target) in OFFSETS and not node.kwargs and all(extra is None for extra in node.args[3:]):
        data, weight, offsets = node.args[:3]
        if not isinstance(data, Node) or not isinstance(weight, Node) or not isinstance(offsets, Node):
            return None
        if data.meta["val"].ndim == 2 and weight.meta["val"].ndim == 3:
            return Grouped(data, weight, ("grouped", offsets), inputs_first=True)
    return None


def _batched(node: Node) -> Grouped | None:
    data, weight = node.args[:2]
    if not isinstance(data, Node) or not isinstance(weight, Node) or weight.meta["val"].ndim != 3:
        return None
    shape = data.meta["val"].shape
    if len(shape) < 3 or str(shape[-3]) != str(weight.meta["val"].shape[0]):
        return None
    return Grouped(data, weight, _place(data, len(shape) - 3), inputs_first=True)


def _einsum(node: Node) -> Grouped | None:
    """`…e…i,eio->…e…o` or `…e…i,eoi->…e…o`, whatever the letters are."""
    equation, operands = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    left, _, result = equation.replace(" ", "").partition("->")
    if len(operands) != 2 or "." in left:
        return None
    (rows, matrices), (data, weight) = left.split(","), operands
    if len(matrices) != 3 or not result or not isinstance(data, Node) or not isinstance(weight, Node):
        return None
    expert, inner, outer = matrices[0], rows[-1], result[-1]
    inputs_first = matrices == expert + inner + outer
    stacked = inputs_first or matrices == expert + outer + inner
    if not stacked or len({expert, inner, outer}) != 3 or expert not in rows or rows[:-1] + outer != result:
        return None
    if len(set(rows)) != len(rows) or outer in rows:
        return None
    return Grouped(data, weight, _place(data, rows.index(expert)), inputs_first)


def _place(data: Node, dim: int) -> tuple[Any, ...]:
    """The assignment by position: rows are counted in the leading sizes, and one of those counts the experts."""
    return ("batched", dim, *(str(size) for size in data.meta["val"].shape[:-1]))
