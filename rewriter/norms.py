"""Norm layers of a graph: one operation each, or written out as a division by a size and a multiplication by a gain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from rewriter.program import Program, module_path
from rewriter.view import NO_CHANGE, weight_of

aten = torch.ops.aten
OPERATIONS = {  # operation -> kind, and the places of its weight and bias
    aten.layer_norm.default: ("layer_norm", 2, 3),
    aten.rms_norm.default: ("rms_norm", 2, None),
    aten.group_norm.default: ("group_norm", 2, 3),
    aten.batch_norm.default: ("batch_norm", 1, 2),
    aten.instance_norm.default: ("instance_norm", 1, 2),
}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default, *NO_CHANGE}
PRODUCTS = {aten.mul.Tensor, aten.mul_.Tensor}
SUMS = {aten.add.Tensor, aten.add_.Tensor}
MEANS = {aten.mean.dim, aten.sum.dim_IntList}
SPREADS = {aten.std.dim, aten.std.correction, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim}
REDUCTIONS = {*MEANS, *SPREADS, aten.var.dim, aten.var.correction}
ROOTS = {aten.rsqrt.default, aten.sqrt.default, *SPREADS}
STEPS = {  # what may lie between a value and its size
    *CASTS,
    *PRODUCTS,
    *SUMS,
    *REDUCTIONS,
    *ROOTS,
    aten.sub.Tensor,
    aten.square.default,
    aten.pow.Tensor_Scalar,
    aten.reciprocal.default,
    aten.div.Tensor,
    aten.clamp_min.default,
    aten.clamp.default,
    aten.expand.default,
    aten.expand_as.default,
}


@dataclass(frozen=True, slots=True)
class Norm:
    """`y = x / size(x) · weight + bias`, with every value `y` it gives and the value `x` each of them is made from.

    `kind` is the operation's name; a norm that is written out is an `rms_norm`, or a `layer_norm` when the mean is
    taken off. `weight` and `bias` are parameter names, None where the norm has none.
    """

    path: str  # of the module that owns the parameters
    kind: str
    weight: str | None
    bias: str | None
    calls: tuple[Node, ...]
    inputs: tuple[Node, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)


def norms(program: Program) -> tuple[Norm, ...]:
    """Every norm of the model, in the order of first use; those whose parameters a pass added are not among them."""
    added = {name for step in program.steps for name in step.added}
    found: dict[tuple[str, ...] | Node, Norm] = {}
    for node in program.graph.nodes:
        norm = (_operation(program, node) or _written_out(program, node)) if node.op == "call_function" else None
        if norm is None or added.intersection(norm.parameters):
            continue
        key = norm.parameters or node
        if key in found:
            norm = replace(
                found[key], calls=(*found[key].calls, *norm.calls), inputs=(*found[key].inputs, *norm.inputs)
            )
        found[key] = norm
    return tuple(_named(list(found.values())))


def _named(found: list[Norm]) -> Iterator[Norm]:
    """Two norms whose parameters lie in one module are told apart by the names of their weights."""
    owners = Counter(norm.path for norm in found)
    for norm in found:
        shared = owners[norm.path] > 1 and norm.parameters
        yield replace(norm, path=norm.parameters[0]) if shared else norm


def _make(kind: str, weight: str | None, bias: str | None, call: Node, source: Node) -> Norm:
    name = weight or bias
    return Norm(module_path(call) if name is None else name.rpartition(".")[0], kind, weight, bias, (call,), (source,))


def _operation(program: Program, node: Node) -> Norm | None:
    known = OPERATIONS.get(node.target)  # type: ignore[call-overload]
    if known is None:
        return None
    kind, *places = known
    weight, bias = (
        _parameter(program, node.args[place]) if place is not None and place < len(node.args) else None
        for place in places
    )
    source = node.args[0]
    assert isinstance(source, Node)
    return _make(kind, weight, bias, node, source)


def _written_out(program: Program, node: Node) -> Norm | None:
    """`gain · x / size(x)`, with the bias that is added to it alone."""
    if node.target not in PRODUCTS:
        return None
    for gain, value in (node.args[:2], node.args[1::-1]):
        weight = _vector(program, gain)
        found = _normalised(program, _uncast(value)) if weight is not None else None
        if found is None:
            continue
        kind, source = found
        bias = None
        users = list(node.users)
        if len(users) == 1 and users[0].target in SUMS:
            bias = next((name for arg in users[0].args[:2] if (name := _vector(program, arg)) is not None), None)
        return _make(kind, weight, bias, users[0] if bias else node, source)
    return None


def _normalised(program: Program, value: object) -> tuple[str, Node] | None:
    """(kind, x) of a value `x / size(x)`: the size is a root of a reduction of x itself."""
    if not isinstance(value, Node) or value.target not in {*PRODUCTS, aten.div.Tensor}:
        return None
    pairs = [value.args[:2], value.args[1::-1]] if value.target in PRODUCTS else [value.args[:2]]
    for data, size in pairs:
        if not isinstance(data, Node) or not isinstance(size, Node) or program.parameter_name(data):
            continue
        centred: Any = _uncast(data)
        is_centred = centred.target is aten.sub.Tensor and _is_mean(centred.args[1])
        source = _uncast(centred.args[0]) if is_centred else centred
        if not isinstance(source, Node):
            continue
        cone = _cone(size, source)
        if source in cone and any(n.target in ROOTS for n in cone) and any(n.target in REDUCTIONS for n in cone):
            return ("layer_norm" if is_centred else "rms_norm"), source
    return None


def _cone(end: Node, source: Node) -> set[Node]:
    """The elementwise operations and reductions that `end` is made by, back to `source`."""
    seen: set[Node] = set()
    todo = [end]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node is not source and node.target in STEPS:
            todo.extend(node.all_input_nodes)
    return seen


def _is_mean(node: object) -> bool:
    return isinstance(node, Node) and node.target in MEANS


def _vector(program: Program, node: object) -> str | None:
    """The parameter of one dimension behind a gain or a bias."""
    name = _parameter(program, node)
    return name if name is not None and program.tensor(name).ndim == 1 else None


def _parameter(program: Program, node: object) -> str | None:
    """The parameter behind an operand, also when it is cast or shifted by a number: `1 + weight`."""
    while isinstance(node, Node):
        found = weight_of(program, node)
        if found is not None:
            return found[0]
        number = node.target in {*SUMS, aten.add.Scalar} and not isinstance(node.args[1], Node)
        if not number and node.target not in CASTS:
            return None
        node = node.args[0]
    return None


def _uncast(node: object) -> object:
    while isinstance(node, Node) and node.target in CASTS:
        node = node.args[0]
    return node
