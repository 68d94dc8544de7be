"""One affine region of a graph: the base operation it is folded into, what enters and leaves it, and its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from rewriter.affine import Analysis
from rewriter.constants import Constants
from rewriter.form import matrix, static_size
from rewriter.grouped import grouped
from rewriter.program import Program, module_path
from rewriter.view import BITS4, CONVOLUTIONS, weight_of

aten = torch.ops.aten
WEIGHT_INPUT = {aten.addmm.default: 2, aten.embedding.default: 0}
DATA_INPUT = {aten.addmm.default: 1, aten.embedding.default: 1}
BIAS_INPUT = {aten.linear.default: 2, aten.addmm.default: 0, **dict.fromkeys(CONVOLUTIONS, 2), **BITS4}
RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.contiguous.default,
}
COMPUTED = {  # operations whose weight may be computed from several parameters
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
    aten.embedding.default,
    *CONVOLUTIONS,
}


def weight_operand(node: Node) -> Any:
    """What an operation applies to its data."""
    product = grouped(node)
    if product is not None:
        return product.weight
    index = WEIGHT_INPUT.get(node.target, 1)  # type: ignore[call-overload]
    return node.args[index] if index < len(node.args) else None


def data_operand(node: Node) -> Any:
    """What an operation applies its weight to."""
    product = grouped(node)
    return node.args[DATA_INPUT.get(node.target, 0)] if product is None else product.data  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True)
class Fold:
    """One region: from `root` to `end`, around the operation `base` that applies `weight`.

    `kept` is the base operation followed by what only reshapes it or adds a bare bias: it takes the place of `end`.
    `proven` is the last node of the region; `end` may be a cast after it that changes nothing, and `source` is the
    root or what it is cast from without a change.
    """

    path: str
    weight: str
    bias: str | None
    base: Node
    root: Node
    source: Node
    end: Node
    kept: Node
    proven: Node
    nodes: frozenset[Node]
    reads: frozenset[str]  # every parameter the region reads
    constants: Constants
    together: frozenset[Node] = frozenset()  # the nodes of every region of this layer, when it is called twice

    def values(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(weight [o, i] of the whole region, offset of the region, offset of `kept`), computed now."""
        analysis = Analysis(self.constants.with_values(), self.root, self.base.meta["val"].dtype)
        form, kept = analysis.form(self.proven), analysis.form(self.kept)
        inputs = static_size(self.root.meta["val"].shape[-1]) or 0
        return matrix(form, inputs, self.constants.precision), _flat(form.offset), _flat(kept.offset)

    def own_bias(self) -> torch.Tensor:
        """What the base operation adds to its product: the bias, with the update it is computed with if it has one."""
        index = BIAS_INPUT[self.base.target]  # type: ignore[index]
        value: torch.Tensor = self.constants.with_values().value(self.base.args[index])
        return value


def _flat(offset: torch.Tensor | None) -> torch.Tensor | None:
    return None if offset is None else offset.reshape(-1)


def readers(node: Node) -> list[Node]:
    """The users that read a value: not those that only ask for its size."""
    return [user for user in node.users if user.target is not aten.sym_size.int]


def home(program: Program, constants: Constants, operand: Node) -> str | None:
    """The one parameter of a computed weight's shape: the place for the folded weight."""
    shape = tuple(operand.meta["val"].shape)
    added = {name for step in program.steps for name in step.added}
    same = [
        name
        for name in sorted(constants.reads(operand) - added)
        if tuple(program.tensor(name).shape) in (shape, (*shape[:-2], *shape[:-3:-1]))
        and program.tensor(name).dtype == operand.meta["val"].dtype
    ]
    return same[0] if len(same) == 1 else None


def own_bias(program: Program, constants: Constants, base: Node) -> str | None:
    """The parameter that holds the base operation's own bias."""
    index = BIAS_INPUT.get(base.target)  # type: ignore[call-overload]
    if index is None or index >= len(base.args) or not isinstance(base.args[index], Node):
        return None
    operand = base.args[index]
    found = weight_of(program, operand)
    return found[0] if found else home(program, constants, operand)


def kept_after(constants: Constants, added: frozenset[str], base: Node, end: Node) -> Node:
    """The base operation and what only reshapes it, or adds a bare bias to it, on the way to the region's end."""
    node = base
    while node is not end:
        following = [user for user in readers(node) if user <= end]
        if len(following) != 1 or not (only_reshapes(following[0]) or _adds_bias(constants, added, following[0])):
            break
        node = following[0]
    return node


def bias_beside(program: Program, fold: Fold) -> str | None:
    """The bare bias that is added to the base operation's result inside `kept`, for operations without one."""
    node = fold.kept
    while node is not fold.base:
        if node.target is aten.add.Tensor:
            names = [program.parameter_name(operand) for operand in node.args[:2]]
            return next(name for name in names if name is not None)
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return None


def _adds_bias(constants: Constants, added: frozenset[str], node: Node) -> bool:
    names = [constants.bare(operand) for operand in node.args[:2]]
    return node.target is aten.add.Tensor and any(name is not None and name not in added for name in names)


def only_reshapes(node: Node) -> bool:
    source = node.args[0]
    if not isinstance(source, Node):
        return False
    same_type = source.meta["val"].dtype == node.meta["val"].dtype
    return same_type and node.target in RESHAPES


def after_casts(end: Node, wrapper: str) -> Node:
    """Walk over casts that change nothing, in the module around the region: wrappers leave them behind."""
    while len(end.users) == 1:
        cast = next(iter(end.users))
        same = cast.target in (aten.to.dtype, aten.to.dtype_layout) and cast.args[0] is end
        if not same or cast.meta["val"].dtype != end.meta["val"].dtype:
            break
        if module_path(cast) not in (wrapper, module_path(end)):
            break  # a cast of the surrounding model
        end = cast
    return end


def before_casts(root: Node, wrapper: str) -> Node:
    """Walk back over casts that change nothing, in the module around the region."""
    while root.target in (aten.to.dtype, aten.to.dtype_layout) and module_path(root) == wrapper:
        source = root.args[0]
        assert isinstance(source, Node)
        if source.meta["val"].dtype != root.meta["val"].dtype:
            break
        root = source
    return root


def entry(base: Node, root: Node) -> tuple[Node, Node] | None:
    """(reader, value): the operand to replace by the root so that the base operation reads the root directly.

    The value nearest to the base operation that has the root's own shape and type; what reshapes it after that stays.
    """
    reader: Node = base
    value = data_operand(base)
    while isinstance(value, Node):
        if value is root or (
            value.meta["val"].shape == root.meta["val"].shape and value.meta["val"].dtype == root.meta["val"].dtype
        ):
            return reader, value
        if not only_reshapes(value):
            return None
        reader, value = value, value.args[0]
    return None


def between(root: Node, end: Node) -> set[Node]:
    """The operations that lie on a path from `root` to `end`."""
    seen: set[Node] = set()
    todo = [end]
    while todo:
        node = todo.pop()
        if node in seen or not root < node or node.op != "call_function" or node.target is aten.sym_size.int:
            continue
        seen.add(node)
        todo.extend(node.all_input_nodes)
    inside: set[Node] = set()
    for node in sorted(seen):
        if any(source is root or source in inside for source in node.all_input_nodes):
            inside.add(node)
    return inside
