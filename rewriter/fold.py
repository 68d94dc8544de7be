"""Finds the maximal affine regions around base weights and folds each into its base operation.

A region starts at one value x, holds exactly one *base* contraction (the one path from x to the region's end that is a
single contraction with a bare parameter), and ends where every use of it passes through one node. What else it holds -
low-rank branches, scalings, rotations, norms of weights - is folded into the base operation's weight and bias, and
the base operation alone remains. Residual additions stay: a path without a parameter is structure, not an update.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from rewriter.affine import Analysis, has_rule
from rewriter.constants import Constants
from rewriter.errors import RewriteError
from rewriter.form import Form, NotAffine, matrix, static_size
from rewriter.grouped import grouped
from rewriter.module import TRAIN_FLAG
from rewriter.program import Origin, Program, module_path
from rewriter.view import CONVOLUTIONS, layers, weight_of

aten = torch.ops.aten
WEIGHT_INPUT = {aten.addmm.default: 2, aten.embedding.default: 0}
DATA_INPUT = {aten.addmm.default: 1, aten.embedding.default: 1}
BIAS_INPUT = {aten.linear.default: 2, aten.addmm.default: 0, **dict.fromkeys(CONVOLUTIONS, 2)}
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

    def values(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(weight [o, i] of the whole region, offset of the region, offset of `kept`), computed now."""
        analysis = Analysis(self.constants.with_values(), self.root, self.base.meta["val"].dtype)
        form, kept = analysis.form(self.proven), analysis.form(self.kept)
        inputs = static_size(self.root.meta["val"].shape[-1]) or 0
        return matrix(form, inputs, self.constants.precision), _flat(form.offset), _flat(kept.offset)


def _flat(offset: torch.Tensor | None) -> torch.Tensor | None:
    return None if offset is None else offset.reshape(-1)


class _Context:
    """What the search knows of the program."""

    def __init__(self, program: Program, constants: Constants) -> None:
        self.program = program
        self.constants = constants
        self.added = frozenset(name for step in program.steps for name in step.added)
        self.layers = layers(program)
        self._owners = self._weights()
        self._analyses: dict[tuple[Node, torch.dtype], Analysis] = {}

    def analysis(self, root: Node, working: torch.dtype) -> Analysis:
        return self._analyses.setdefault((root, working), Analysis(self.constants, root, working))

    def is_base(self, node: Node) -> bool:
        """Whether an operation applies a bare parameter that no pass added."""
        bare = weight_of(self.program, weight_operand(node))
        return bare is not None and bare[0] not in self.added

    def wrapper(self, nodes: frozenset[Node] | set[Node]) -> str:
        """The innermost module that holds all these operations."""
        paths = [[part for part in module_path(node).split(".") if part] for node in nodes]
        common: list[str] = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return ".".join(common)

    def in_one_module(self, nodes: set[Node], reads: frozenset[str]) -> bool:
        """Whether the operations lie in one module all of whose layers they are: it holds no weight but those read."""
        return self._owners.get(self.wrapper(nodes), set()) <= reads

    def wraps(self, node: Node, base: Node) -> bool:
        """Whether an operation belongs to the module of the base operation, or to one around it."""
        path, inner = module_path(node), module_path(base)
        return path in ("", inner) or inner.startswith(path + ".")

    def updates_input(self, root: Node, base: Node, reads: frozenset[str]) -> bool:
        """Whether what stands between the root and the base operation is an update: all of it in one wrapper.

        In the module of the whole model, a part beside the layer is the model's own, such as the gain of a norm.
        """
        prefix = _between(root, base)
        wrapper, start = self.wrapper(prefix), module_path(root)
        if start != wrapper and start.startswith(wrapper):
            return False  # the root is made by one part of the wrapper, so the part is more than an update
        reading = [node for node in prefix - {base} if any(n in self.constants for n in node.all_input_nodes)]
        return self.in_one_module(prefix, reads) and (bool(wrapper) or all(self.wraps(node, base) for node in reading))

    def _weights(self) -> dict[str, set[str]]:
        """Module path -> the weights of the model that are applied inside it."""
        found: dict[str, set[str]] = {}
        for layer in self.layers.values():
            if layer.weight not in self.added:
                path = module_path(layer.calls[0])
                for prefix in [path, *(path[:i] for i, c in enumerate(path) if c == "."), ""]:
                    found.setdefault(prefix, set()).add(layer.weight)
        return found


def folds(program: Program, constants: Constants) -> tuple[list[Fold], list[tuple[str, NotAffine]]]:
    """Every region of the program that folds, in program order; and, by path, what breaks the near misses."""
    context = _Context(program, constants)
    found: list[Fold] = []
    missed: list[tuple[str, NotAffine]] = []
    inside: set[Node] = set()
    for base, path, weight in _contractions(context):
        if base in inside or weight in context.added:
            continue
        try:
            region = _grow(context, base, path, weight)
        except NotAffine as error:
            missed.append((path, error))
            continue
        if region is not None:
            found.append(region)
            inside |= region.nodes
    return found, missed


def _contractions(context: _Context) -> Iterator[tuple[Node, str, str]]:
    """(operation, path, weight): layers with a bare weight first, then operations whose weight is computed."""
    constants = context.constants
    bare = {call: layer for layer in context.layers.values() for call in layer.calls}
    for call in sorted(bare):
        yield call, bare[call].path, bare[call].weight
    for node in context.program.graph.nodes:
        if node not in bare and (node.target in COMPUTED or grouped(node)):
            operand, data = weight_operand(node), data_operand(node)
            if isinstance(operand, Node) and operand in constants and data not in constants:
                home = _home(context.program, constants, operand)
                if home is not None and constants.reads(operand) - {home}:
                    yield node, home.removesuffix(".weight"), home


def _home(program: Program, constants: Constants, operand: Node) -> str | None:
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


def _grow(context: _Context, base: Node, path: str, weight: str) -> Fold | None:
    """The largest region around one base operation that holds an update; None when there is none."""
    best: Fold | None = None
    for root in _roots(context.constants, base):
        analysis = context.analysis(root, base.meta["val"].dtype)
        try:
            start = analysis.form(base)
        except NotAffine:
            continue  # a value between two reshapes has no rows of its own; the ones before it may
        prefix = _between(root, base)
        if any(node.target in TRAIN_FLAG for node in prefix):
            break  # a dropout of the model stays where it is
        early = _reads(start) - {weight} - _computed(context, base)
        if early and not (early <= context.added or context.updates_input(root, base, _reads(start))):
            break  # what stands before the layer, such as the gain of a norm, is part of the model
        found = _extend(context, analysis, base, path, weight, start, bool(early))
        if found is not None and (best is None or early or best.proven < found.proven):
            best = found
    if best is None:
        _complain(context.constants, base)
    return best


def _extend(
    context: _Context, analysis: Analysis, base: Node, path: str, weight: str, start: Form, updated: bool
) -> Fold | None:
    """The farthest end of a region that starts at the analysis' root; every further piece must be an update."""
    accepted: tuple[Node, Form] | None = None
    updated = updated or bool(_computed(context, base))
    before = start
    for end, form in _cuts(analysis, base):
        if not _one_base(context, form, base):
            break
        more = _reads(form) - _reads(before)
        late = (form.offset_reads - before.offset_reads) & context.added
        if end is base:
            if updated:
                accepted = (end, form)
            continue
        own = _reads(before) | before.offset_reads
        again = any(context.constants.reads(n) & own for n in end.all_input_nodes if n in context.constants)
        if len(form.terms) > len(before.terms) or late or more & context.added or (accepted and again):
            accepted, before = (end, form), form
        elif more:
            if not (context.wraps(end, base) and context.in_one_module(_between(analysis.root, end), _reads(form))):
                break  # a scaling of its own module, such as LayerScale, is part of the model
            accepted, before = (end, form), form
    if accepted is None or entry(base, analysis.root) is None:
        return None
    end, form = accepted
    kept = _kept(context, base, end)
    if kept.meta["val"].shape != end.meta["val"].shape:
        return None
    nodes = frozenset(_between(analysis.root, end))
    reads = _reads(form) | form.offset_reads
    bias, source = _bias(context, base), analysis.root
    if not any(Origin.of(node) for node in nodes):  # our own branches leave no casts, so any cast is the model's
        end = _absorb_casts(end, context.wrapper(nodes))
        if context.wrapper(nodes) != module_path(base):  # in its own module, a cast is the layer's
            source = _before_casts(source, context.wrapper(nodes))
    return Fold(
        path, weight, bias, base, analysis.root, source, end, kept, accepted[0], nodes, reads, context.constants
    )


def _one_base(context: _Context, form: Form, base: Node) -> bool:
    """Whether the form is this base weight plus updates: no second base weight, and no path without a parameter."""
    for term in form.terms:
        if not term.chain:
            return False  # a residual connection
        others = [node for node in term.chain if node is not base]
        if base in term.chain and any(context.is_base(node) for node in others):
            return False  # another layer of the model, before or after this one
        if base not in term.chain and len(others) == 1 and context.is_base(others[0]):
            return False  # two layers side by side: which one is the base cannot be told
    return any(base in term.chain for term in form.terms)


def _reads(form: Form) -> frozenset[str]:
    return frozenset().union(*(term.reads for term in form.terms))


def _computed(context: _Context, base: Node) -> frozenset[str]:
    """The parameters behind a weight or bias that is computed, such as W + B A, instead of bare."""
    result: frozenset[str] = frozenset()
    bias = BIAS_INPUT.get(base.target)  # type: ignore[call-overload]
    for operand in (weight_operand(base), base.args[bias] if bias is not None and bias < len(base.args) else None):
        if isinstance(operand, Node) and weight_of(context.program, operand) is None:
            result |= context.constants.reads(operand)
    return result


def _roots(constants: Constants, base: Node) -> list[Node]:
    """The operation's input, and the values it is made from by one-input operations, nearest first."""
    node = data_operand(base)
    roots: list[Node] = []
    while isinstance(node, Node):
        roots.append(node)
        varying = [n for n in node.all_input_nodes if n not in constants and n.target is not aten.sym_size.int]
        if node.op != "call_function" or len(varying) != 1 or not has_rule(node):
            break
        if node.target in COMPUTED and node.target is not aten.matmul.default:
            break
        node = varying[0]
    return roots


def _cuts(analysis: Analysis, base: Node) -> Iterator[tuple[Node, Form]]:
    """The nodes after `base` that all its uses pass through, with their forms, as far as the region is affine."""
    try:
        yield base, analysis.form(base)
    except NotAffine:
        return
    affine, todo = {base}, sorted(base.users)
    while todo:  # what follows from `base` and is affine in the root
        node = todo.pop(0)
        if node in affine or node.op != "call_function":
            continue
        try:
            analysis.form(node)
        except NotAffine:
            continue
        affine.add(node)
        todo.extend(sorted(node.users))
    open_: set[Node] = {base}
    for node in sorted(affine - {base}):
        open_.add(node)
        open_ = {n for n in open_ if n is node or any(user not in affine or node < user for user in _readers(n))}
        if open_ == {node}:
            yield node, analysis.form(node)


def _readers(node: Node) -> list[Node]:
    """The users that read a value: not those that only ask for its size."""
    return [user for user in node.users if user.target is not aten.sym_size.int]


def _bias(context: _Context, base: Node) -> str | None:
    """The parameter that holds the base operation's own bias."""
    index = BIAS_INPUT.get(base.target)  # type: ignore[call-overload]
    if index is None or index >= len(base.args) or not isinstance(base.args[index], Node):
        return None
    operand = base.args[index]
    found = weight_of(context.program, operand)
    return found[0] if found else _home(context.program, context.constants, operand)


def _kept(context: _Context, base: Node, end: Node) -> Node:
    """The base operation and what only reshapes it, or adds a bare bias to it, on the way to the region's end."""
    node = base
    while node is not end:
        following = [user for user in _readers(node) if user <= end]
        if len(following) != 1 or not (_only_reshapes(following[0]) or _adds_bias(context, following[0])):
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


def _adds_bias(context: _Context, node: Node) -> bool:
    names = [context.constants.bare(operand) for operand in node.args[:2]]
    return node.target is aten.add.Tensor and any(name is not None and name not in context.added for name in names)


def _only_reshapes(node: Node) -> bool:
    source = node.args[0]
    if not isinstance(source, Node):
        return False
    same_type = source.meta["val"].dtype == node.meta["val"].dtype
    return same_type and node.target in RESHAPES


def _absorb_casts(end: Node, wrapper: str) -> Node:
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


def _before_casts(root: Node, wrapper: str) -> Node:
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
        if not _only_reshapes(value):
            return None
        reader, value = value, value.args[0]
    return None


def _between(root: Node, end: Node) -> set[Node]:
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


def _complain(constants: Constants, base: Node) -> None:
    """Raise `NotAffine` when a branch from the same input joins the base operation and is not affine in it."""
    source = data_operand(base)
    if not isinstance(source, Node):
        return
    for join in base.users:
        if join.target not in (aten.add.Tensor, aten.add_.Tensor):
            continue
        other = next((a for a in join.args[:2] if isinstance(a, Node) and a is not base), None)
        if other is None or other in constants:
            continue
        branch = _between(source, other)
        operands = [n for node in branch for n in node.all_input_nodes if n in constants]
        if other in branch and any(constants.reads(operand) for operand in operands):
            Analysis(constants, source, base.meta["val"].dtype).form(join)


def leftover(
    program: Program, constants: Constants, found: list[Fold], missed: list[tuple[str, NotAffine]]
) -> list[tuple[str, Node, str]]:
    """(parameter, node, reason) of every pass's parameter that no region folds: the node is what breaks the proof."""
    folded = frozenset().union(*(fold.reads for fold in found)) if found else frozenset()
    added = {name for step in program.steps for name in step.added}
    result = []
    for placeholder in list(constants.leaves):
        name = program.parameter_name(placeholder)
        if name in added and name not in folded and placeholder.users:
            result.append((name, *_breaker(constants, placeholder, [error for _, error in missed])))
    return result


def _breaker(constants: Constants, start: Node, known: list[NotAffine]) -> tuple[Node, str]:
    """The operation after a parameter that broke a proof, or the first one that no rule covers."""
    reached, todo = {start}, [start]
    while todo:
        new = set(todo.pop().users) - reached
        reached |= new
        todo.extend(new)
    for error in known:
        if error.node in reached:
            return error.node, error.reason
    for node in sorted(reached - {start}):
        if not has_rule(node) and node not in constants:
            return node, f"{str(node.target).removeprefix('aten.').split('.')[0]} is not affine"
        if node.target is aten.dropout.default and node.args[2]:
            return node, "dropout in training mode is random"
    return next(iter(start.users)), "it reaches no base weight"


def refuse(program: Program, name: str, node: Node, reason: str) -> RewriteError:
    """The error for a parameter that cannot be folded, with the program's lines around the node."""
    from rewriter.text import around

    return RewriteError(
        f"{name} cannot be merged: {reason}",
        evidence=around(program, node),
        fix="Keep this pass in the graph and export the program with its branch, or undo it before merging.",
    )
