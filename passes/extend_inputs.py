"""What an input that goes along with the tokens means, and what it holds at positions that a pass adds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from rewriter.attention import PASS_ON
from rewriter.constants import Constants
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.formats.index_range import reach
from rewriter.program import Program

aten = torch.ops.aten
COMPARISONS = {aten.eq.Scalar, aten.ne.Scalar, aten.eq.Tensor, aten.ne.Tensor}
LOSSES = {aten.cross_entropy_loss.default: 4, aten.nll_loss_nd.default: 4}  # -> position of the label it ignores
FILLS = {aten.masked_fill.Scalar, aten.masked_fill_.Scalar}
NEGATIONS = {aten.logical_not.default, aten.bitwise_not.default, aten.rsub.Scalar}
ROTATIONS = {aten.cos.default, aten.sin.default}
TURNED = {*PASS_ON, aten.mul.Tensor, aten.matmul.default, aten.bmm.default, aten.cat.default, aten._to_copy.default}


@dataclass(frozen=True, slots=True)
class Layout:
    """What stands before and after the tokens: a token id, or None for a position whose embedding is given."""

    before: tuple[int | None, ...]
    after: tuple[int | None, ...] = ()

    @classmethod
    def ahead(cls, count: int) -> Layout:
        """`count` given positions before the tokens and nothing else."""
        return cls((None,) * count)

    @property
    def given(self) -> int:
        return [*self.before, *self.after].count(None)

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


@dataclass(frozen=True, slots=True)
class Companion:
    """An input with one value per token along `dimension`, and the value it holds at added positions."""

    node: Node
    dimension: int
    kind: Literal["tokens", "positions", "constant"]
    value: int = 0

    def joined(self, edit: Edit, layout: Layout) -> Node:
        """The input with the positions of `layout` around it."""
        builder = _Builder(self, edit)
        pieces = builder.positions(layout) if self.kind == "positions" else builder.values(layout)
        return builder.call("long", aten.cat.default, pieces, self.dimension)


def companions(program: Program, tokens: Node) -> list[Companion]:
    """The token ids [b, t] and every input with one value per token.

    A mask of 0 and 1 holds 1 at added positions, labels what their loss ignores, positions count on, everything else
    (token types) holds 0.
    Raises `UsageError` for an input with a value per pair of tokens.
    """
    length = shape(tokens)[1]
    found = []
    for node in program.inputs():
        sizes = shape(node)
        places = [index for index, size in enumerate(sizes) if size == length]
        if len(places) > 1 or any(size != length and depends(size, length) for size in sizes):
            raise UsageError(
                f"the input {node.name} of size {[str(size) for size in sizes]} says what each token sees",
                evidence=["what it says of added positions cannot be known"],
                fix="Trace the model with a mask of size [batch, length], or without a mask.",
            )
        if places:
            found.append(_companion(program, tokens, node, places[0]))
        elif _is_untied(program, tokens, node):
            found.append(_companion(program, tokens, node, 1))
    return found


def _companion(program: Program, tokens: Node, node: Node, dimension: int) -> Companion:
    if node is tokens:
        return Companion(node, dimension, "tokens", meaningless(program, tokens))
    ignored = _ignored_label(node)
    if ignored is not None:
        return Companion(node, dimension, "constant", ignored)
    if are_positions(program, node):
        return Companion(node, dimension, "positions")
    return Companion(node, dimension, "constant", int(_is_mask(program, node) and not _ones_hide(node)))


def _is_mask(program: Program, node: Node) -> bool:
    example = _example(program, node)
    binary = example is None or bool(((example == 0) | (example == 1)).all())
    return binary and node.name not in reach(program)


def _ones_hide(node: Node) -> bool:
    """Whether a mask says which tokens are hidden: where it is 1, or would be after negations, scores are filled."""
    todo, seen = [(node, True)], set()
    while todo:
        value, ones = todo.pop()
        for user in value.users:
            if user.target in FILLS and user.args[1] is value and float(user.args[2]) < 0:  # type: ignore[arg-type]
                return ones
            negated = user.target in NEGATIONS or (user.target is aten.eq.Scalar and user.args[1] == 0)
            if (negated or user.target in PASS_ON) and user not in seen:
                seen.add(user)
                todo.append((user, ones != negated))
    return False


def _is_untied(program: Program, tokens: Node, node: Node) -> bool:
    """Whether an input is a mask or the labels of the tokens although its length is a symbol of its own.

    Traces leave open how long a mask is when they return a cache, and how long labels are that are flattened at once.
    """
    ids, values, sizes = _example(program, tokens), _example(program, node), shape(node)
    if ids is None or values is None or values.shape != ids.shape or isinstance(sizes[1], int):
        return False
    others = [other for other in program.inputs() if other is not node]
    lonely = not any(size == sizes[1] for other in others for size in shape(other))
    return lonely and (_is_mask(program, node) or _ignored_label(node) is not None)


def are_positions(program: Program, node: Node) -> bool:
    """Whether the values are positions: turned into rotations, or counting up from token to token to more than 1."""
    if not shape(node) or node.meta["val"].dtype.is_floating_point:
        return False
    if any(user.target in ROTATIONS for user in descendants(node, TURNED)):
        return True
    example = _example(program, node)
    if example is None or example.shape[-1] < 3:
        return False
    steps = example.long().diff(dim=-1)
    return bool(((steps == 0) | (steps == 1)).all()) and int(example.max()) > 1


def _ignored_label(node: Node) -> int | None:
    """The label that a loss ignores, when the input holds labels."""
    reached = descendants(node)
    for user in reached:
        if user.target in LOSSES and user.args[1] in reached and user.args[0] not in reached:
            place = LOSSES[user.target]
            ignored = user.args[place] if len(user.args) > place else -100
            assert isinstance(ignored, int)
            return ignored
    return None


def meaningless(program: Program, tokens: Node) -> int:
    """The smallest token id that the graph compares with nothing: no padding, no end of a sequence."""
    constants = Constants(program).with_values()
    special: set[int] = set()
    for node in descendants(tokens):
        if node.target in COMPARISONS and node.args[1] in constants:
            special.update(constants.tensor(constants.value(node.args[1])).flatten().long().tolist())
    return next(token for token in range(len(special) + 1) if token not in special)


def descendants(node: Node, through: set[Any] | None = None) -> set[Node]:
    """A value and all tensors computed from it, by the operations in `through` and one more; sizes carry no value."""
    found, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user not in found and user.op == "call_function" and not isinstance(user.meta.get("val"), torch.SymInt):
                found.add(user)
                if through is None or user.target in through:
                    todo.append(user)
    return found


def _example(program: Program, node: Node) -> torch.Tensor | None:
    given = torch.utils._pytree.tree_leaves(program.exported.example_inputs)
    for known, value in zip(program.inputs(), given, strict=False):
        if known is node and isinstance(value, torch.Tensor) and value.device.type != "meta":
            return value
    return None


def shape(node: Node) -> tuple[Any, ...]:
    """The sizes of a tensor as expressions; nothing for what is no tensor."""
    value = node.meta.get("val")
    return tuple(expression(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def depends(size: Any, symbol: Any) -> bool:
    """Whether a size is computed from the one that `symbol` stands for."""
    return symbol in getattr(size, "free_symbols", ())


class _Builder:
    """The operations that lengthen one input."""

    def __init__(self, companion: Companion, edit: Edit) -> None:
        self.edit, self.node, self.dimension = edit, companion.node, companion.dimension
        self.constant = companion.value
        self.is_tokens = companion.kind == "tokens"
        self.sizes = [
            size if isinstance(size, int) else self.call("size", aten.sym_size.int, self.node, index)
            for index, size in enumerate(self.node.meta["val"].shape)
            if index != self.dimension
        ]

    def call(self, label: str, operation: Any, *args: Any, **kwargs: Any) -> Node:
        return self.edit.call(operation, *args, like=self.node, label=f"{self.node.name}_{label}", **kwargs)

    def values(self, layout: Layout) -> list[Node]:
        return [*self._constants(layout.before), self.node, *self._constants(layout.after)]

    def _constants(self, ids: Sequence[int | None]) -> Iterator[Node]:
        values = [self.constant if each is None or not self.is_tokens else each for each in ids]
        for value, count in runs(values):
            yield self.call("added", aten.new_full.default, self.node, self._sizes(count), value)

    def positions(self, layout: Layout) -> list[Node]:
        moved = self.call("moved", aten.add.Tensor, self.node, len(layout.before))
        pieces = [moved]
        if layout.before:
            pieces.insert(0, self._counted(len(layout.before)))
        if layout.after:
            last = self.call("last", aten.amax.default, moved, [self.dimension], True)
            following = self.call("following", aten.add.Tensor, self._counted(len(layout.after)), 1)
            pieces.append(self.call("after", aten.add.Tensor, following, last))
        return pieces

    def _counted(self, count: int) -> Node:
        value = self.node.meta["val"]
        numbers = self.call("numbers", aten.arange.default, count, dtype=value.dtype, device=value.device)
        flat = [1] * value.ndim
        flat[self.dimension] = count
        shaped = self.call("shaped", aten.view.default, numbers, flat)
        return self.call("counted", aten.expand.default, shaped, self._sizes(count))

    def _sizes(self, count: int) -> list[Any]:
        return [*self.sizes[: self.dimension], count, *self.sizes[self.dimension :]]


def runs(values: Sequence[Any]) -> list[tuple[Any, int]]:
    """Equal neighbours together: value and count."""
    return [(value, len(list(group))) for value, group in itertools.groupby(values)]
