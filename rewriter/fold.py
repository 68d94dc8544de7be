"""Finds the maximal affine regions around base weights, which a merge folds each into its base operation.

A region starts at one value x, holds exactly one *base* contraction (the one path from x to the region's end that is a
single contraction with a bare parameter), and ends where every use of it passes through one node. What else it holds -
low-rank branches, scalings, rotations, norms of weights - is folded into the base operation's weight and bias, and
the base operation alone remains. Residual additions stay: a path without a parameter is structure, not an update.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.fx import Node

from rewriter.affine import Analysis, has_rule
from rewriter.constants import Constants
from rewriter.form import Form, NotAffine
from rewriter.grouped import grouped
from rewriter.module import TRAIN_FLAG
from rewriter.program import Program, module_path
from rewriter.region import (
    BIAS_INPUT,
    COMPUTED,
    Fold,
    after_casts,
    before_casts,
    between,
    data_operand,
    entry,
    home,
    kept_after,
    own_bias,
    readers,
    weight_operand,
)
from rewriter.view import layers, weight_of

aten = torch.ops.aten


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

    def updates(self, reads: frozenset[str]) -> bool:
        """Whether a weight computed from these beside its own holds an update, not only a norm of the model's own.

        In a program with adapters of ours it reads one of them; in a foreign one it reads another matrix.
        """
        if self.added:
            return bool(reads & self.added)
        return any(sum(size > 1 for size in self.program.tensor(name).shape) > 1 for name in reads)

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
        prefix = between(root, base)
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
    return [replace(fold, together=_together(fold, found)) for fold in found], missed


def _together(fold: Fold, found: list[Fold]) -> frozenset[Node]:
    """The operations of all regions that fold into the same layer: those of every call of a shared module."""
    same = [other.nodes for other in found if (other.weight, other.path) == (fold.weight, fold.path)]
    return frozenset().union(*same)


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
                place = home(context.program, constants, operand)
                if place is not None and context.updates(constants.reads(operand) - {place}):
                    yield node, place.removesuffix(".weight"), place


def _grow(context: _Context, base: Node, path: str, weight: str) -> Fold | None:
    """The largest region around one base operation that holds an update; None when there is none."""
    best: Fold | None = None
    for root in _roots(context.constants, base):
        analysis = context.analysis(root, base.meta["val"].dtype)
        try:
            start = analysis.form(base)
        except NotAffine:
            continue  # a value between two reshapes has no rows of its own; the ones before it may
        prefix = between(root, base)
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
        elif accepted and not more and _returns(accepted[0], end, base):
            accepted = (end, form)
        elif more:
            if not (context.wraps(end, base) and context.in_one_module(between(analysis.root, end), _reads(form))):
                break  # a scaling of its own module, such as LayerScale, is part of the model
            accepted, before = (end, form), form
    if accepted is None or entry(base, analysis.root) is None:
        return None
    return _region(context, analysis.root, base, path, weight, *accepted)


def _region(context: _Context, root: Node, base: Node, path: str, weight: str, end: Node, form: Form) -> Fold | None:
    """The region from `root` to `end`, with what it leaves behind."""
    proven = end
    kept = kept_after(context.constants, context.added, base, end)
    if kept.meta["val"].dtype != end.meta["val"].dtype:
        raise NotAffine(end, f"the layer gives {kept.meta['val'].dtype}, with its update {end.meta['val'].dtype}")
    if kept.meta["val"].shape != end.meta["val"].shape:
        return None
    nodes = frozenset(between(root, end))
    reads = _reads(form) | form.offset_reads
    bias, source = own_bias(context.program, context.constants, base), root
    if not reads & context.added:  # our own updates leave no casts, so any cast beside one is the model's
        end = after_casts(end, context.wrapper(nodes))
        if context.wrapper(nodes) != module_path(base):  # in its own module, a cast is the layer's
            source = before_casts(source, context.wrapper(nodes))
    return Fold(path, weight, bias, base, root, source, end, kept, proven, nodes, reads, context.constants)


def _returns(accepted: Node, end: Node, base: Node) -> bool:
    """Whether a value is cast back to the type of the base operation, which the update had widened."""
    wide, narrow, own = (node.meta["val"].dtype for node in (accepted, end, base))
    return bool(wide != own and narrow == own)


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
        open_ = {n for n in open_ if n is node or any(user not in affine or node < user for user in readers(n))}
        if open_ == {node}:
            yield node, analysis.form(node)


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
        branch = between(source, other)
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
