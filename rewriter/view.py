"""Typed, read-only views of what the graph holds: layers by the parameter they apply.

A site is a parameter, not a call: a module called twice is one `Linear` with two calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch.fx import Node

from rewriter.grouped import grouped
from rewriter.program import Origin, Program, module_path
from runtime import nf4_linear as _operators  # noqa: F401 - registers the operators of 4-bit layers

aten = torch.ops.aten
CONVOLUTIONS = {op for packet in (aten.conv1d, aten.conv2d, aten.conv3d) for op in (packet.default, packet.padding)}
TRANSPOSES = {aten.t.default, aten.numpy_T.default}
NO_CHANGE = {  # operations that pass their first input on as it is
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
}


ACTIVATIONS = {aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default}


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start..stop` of a fused weight, such as the query of a qkv projection."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Layer:
    """A parameter that acts on activations, with every operation that applies it."""

    path: str  # of the module that owns the weight, or the weight's own name when it is not called `weight`
    weight: str  # fully qualified name
    bias: str | None
    calls: tuple[Node, ...]
    in_features: int
    out_features: int
    tied: tuple[str, ...] = ()  # other names and users of the same tensor
    patched: bool = False  # what the layer applies is no more the weight itself, but a value that a pass computes of it

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True, slots=True)
class Linear(Layer):
    """`y = x Wᵀ + b`; `transposed` when the weight is stored [i, o], as GPT-2's Conv1D does."""

    transposed: bool = False
    part: Part | None = None

    def input(self, call: Node) -> Node:
        index = 1 if call.target is aten.addmm.default else 0
        node = call.args[index]
        assert isinstance(node, Node)
        return node

    def added(self, call: Node) -> Node | None:
        """What the operation itself adds to the product: a bias, or None."""
        index = 0 if call.target is aten.addmm.default else BITS4.get(call.target, 2)  # type: ignore[call-overload]
        node = call.args[index] if index < len(call.args) else None
        return node if isinstance(node, Node) else None


@dataclass(frozen=True, slots=True)
class Linear4bit(Linear):
    """`y = x dequantise(W)ᵀ + b`: a linear layer whose weight [o, i] is held in 4 bits by the tensors `tensors`.

    `weight` names the packed codes, the first of them; the others are scales.
    """

    tensors: tuple[str, ...] = ()
    quantisation: str = "nf4"
    block_size: int = 64


@dataclass(frozen=True, slots=True)
class Conv(Layer):
    """A 1-, 2- or 3-dimensional convolution, weight [o, i / groups, *kernel]."""

    groups: int = 1

    def input(self, call: Node) -> Node:
        node = call.args[0]
        assert isinstance(node, Node)
        return node


@dataclass(frozen=True, slots=True)
class Embedding(Layer):
    """A table [in_features = rows, out_features = width] read by index."""

    def input(self, call: Node) -> Node:
        node = call.args[1]
        assert isinstance(node, Node)
        return node


@dataclass(frozen=True, slots=True)
class Experts(Layer):
    """`y_s = x_s W_eᵀ` for every row s of expert e; weight [experts, o, i], or [experts, i, o] when `transposed`."""

    experts: int = 1
    transposed: bool = False

    def input(self, call: Node) -> Node:
        product = grouped(call)
        assert product is not None
        return product.data


Site = Linear | Conv | Embedding | Experts
S = TypeVar("S", bound=Layer)
BITS4 = {  # operation of a 4-bit layer -> position of its bias, after the tensors of its weight
    torch.ops.rewriter.nf4_linear.default: 3,
    torch.ops.rewriter.nf4_linear_double.default: 5,
}


def top(node: Node) -> Node:
    """The value that stands for `node` by now: the node itself, or the sum the last pass put in its place.

    A network that reads the layer's result, such as the bottleneck of a series adapter, is no update of the layer:
    it stays above all updates, also later ones.
    """
    *_, last = updates(node)
    return last


def updates(node: Node) -> Iterator[Node]:
    """The node and the values that stand for it, the lowest first, up to a network that reads more than it does."""
    start, names = node, {node.name}
    while True:
        yield node
        above = [user for user in node.users if (origin := Origin.of(user)) and origin.stands_for in names]
        if not above or not _network_inputs(above[0]) <= set(start.all_input_nodes):
            return
        node = above[0]
        names.add(node.name)  # an update that came later and joined lower stands for the same value


def _network_inputs(end: Node) -> set[Node]:
    """The values of the model that reach `end` through activations that the same step added."""
    return {source for node in _behind(end) if node.target in ACTIVATIONS for source in _sources(node)}


def _behind(end: Node) -> set[Node]:
    """`end` and the operations of its step that it is made of."""
    origin = Origin.of(end)
    todo, inside = [end], {end}
    while todo:
        for source in todo.pop().all_input_nodes:
            made = Origin.of(source)
            if made and origin and made.step == origin.step and source not in inside:
                inside.add(source)
                todo.append(source)
    return inside


def _sources(end: Node) -> set[Node]:
    """The tensors of the model that the operations of a step behind `end` read."""
    inside = _behind(end)
    read = {source for node in inside for source in node.all_input_nodes} - inside
    return {node for node in read if node.op != "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)}


def computed(program: Program) -> dict[str, str]:
    """Parameter -> the pass that last put a value computed of it, such as `W + P θ`, in its place."""
    names = {node.name: name for node in program.graph.nodes if (name := program.parameter_name(node)) is not None}
    origins = [origin for node in program.graph.nodes if (origin := Origin.of(node)) is not None]
    return {names[o.stands_for]: o.name for o in origins if o.stands_for in names}


def weight_of(program: Program, node: object) -> tuple[str, bool] | None:
    """The parameter behind a value and whether it arrives transposed; None when the value is not a bare parameter.

    A stack of matrices is transposed when each of them is.
    """
    transposed = False
    while isinstance(node, Node):
        name = program.parameter_name(node)
        if name is not None:
            return name, transposed
        if swaps(node):
            transposed = not transposed
        elif node.target not in NO_CHANGE:
            return None
        node = node.args[0]
    return None


def _applied(program: Program, node: object) -> tuple[str, bool] | None:
    """As `weight_of`, also through values that a pass computes and that stand for a parameter."""
    found = weight_of(program, node)
    transposed = False
    while found is None and isinstance(node, Node):
        origin = Origin.of(node)
        if origin is not None and origin.stands_for is not None:
            node = next((source for source in node.all_input_nodes if source.name == origin.stands_for), None)
            name = program.parameter_name(node)
            if name is not None:
                return name, transposed
            continue
        if node.op != "call_function" or not (swaps(node) or node.target in NO_CHANGE):
            return None
        transposed = transposed != swaps(node)
        node = node.args[0]
    return found


def swaps(node: Node) -> bool:
    """Whether an operation transposes a matrix, or each of a stack of matrices."""
    ndim = node.meta["val"].ndim if "val" in node.meta and hasattr(node.meta["val"], "ndim") else 0
    if node.target in TRANSPOSES:
        return ndim == 2
    if node.target is aten.mT.default:
        return ndim in (2, 3)
    if node.target is aten.transpose.int:
        return ndim in (2, 3) and {int(d) % ndim for d in node.args[1:3]} == {ndim - 2, ndim - 1}  # type: ignore[arg-type]
    if node.target is aten.permute.default:
        order = [int(d) % ndim for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        return order in ([1, 0], [0, 2, 1])
    return False


def _describe(program: Program, node: Node) -> tuple[type[Layer], str, str | None, bool] | None:
    """(kind, weight, bias, stored transposed) of an operation that applies a parameter."""
    target, args = node.target, node.args
    if target is aten.linear.default:
        found = _applied(program, args[1])
        bias = weight_of(program, args[2]) if len(args) > 2 else None
        return found and (Linear, found[0], bias and bias[0], found[1])
    if target is aten.addmm.default:
        found, bias = _applied(program, args[2]), weight_of(program, args[0])
        return found and (Linear, found[0], bias and bias[0], not found[1])
    if target in BITS4:
        found, bias = weight_of(program, args[1]), weight_of(program, args[BITS4[target]])
        return found and (Linear4bit, found[0], bias and bias[0], False)
    if target in (aten.mm.default, aten.matmul.default):
        found = _applied(program, args[1])
        if found and node.args[1].meta["val"].ndim == 2 and weight_of(program, args[0]) is None:  # type: ignore[union-attr]
            return Linear, found[0], None, not found[1]
    if target in CONVOLUTIONS:
        found = _applied(program, args[1])
        bias = weight_of(program, args[2]) if len(args) > 2 else None
        return (Conv, found[0], bias and bias[0], False) if found and not found[1] else None
    if target is aten.embedding.default:
        found = _applied(program, args[0])
        return (Embedding, found[0], None, False) if found and not found[1] else None
    product = grouped(node)
    if product is not None and weight_of(program, product.data) is None:
        found = _applied(program, product.weight)
        return found and (Experts, found[0], None, found[1] != product.inputs_first)
    return None


def layers(program: Program) -> dict[str, Site]:
    """Every layer of the model by its path, in the order of first use; what a pass put beside one is no layer.

    A tied weight that is read as an embedding and as a linear layer is one entry per use, each naming the others.
    """
    added = {name for step in program.steps for name in step.added}  # what passes added is no layer of the model
    aliases = {name: group for group in program.tied() for name in group}
    found: dict[tuple[str, str], Site] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        described = _describe(program, node)
        if described is None or described[1] in added:
            continue
        kind, weight, bias, transposed = described
        if Origin.of(node) and Origin.of(program.placeholder(weight)):
            continue
        path = _owner(weight, aliases.get(weight, (weight,)), module_path(node))
        name = _alias(path, weight, aliases.get(weight, (weight,)))
        key = (path, kind.__name__)
        if key in found:
            found[key] = replace(found[key], calls=(*found[key].calls, node))
            continue
        others = tuple(n for n in aliases.get(weight, ()) if n != name)
        site = _make(program, node, kind, path, weight, bias, transposed, others)
        bare = [held[0] for source in node.all_input_nodes if (held := weight_of(program, source))]
        found[key] = replace(site, patched=weight not in bare)
    return _named(found)


def _named(found: dict[tuple[str, str], Site]) -> dict[str, Site]:
    by_tensor: dict[str, list[Site]] = {}
    for site in found.values():
        by_tensor.setdefault(site.weight, []).append(site)
    result: dict[str, Site] = {}
    for site in found.values():
        users = [other.path for other in by_tensor[site.weight] if other is not site]
        site = replace(site, tied=tuple(dict.fromkeys([*site.tied, *users])))
        result[site.path if site.path not in result else f"{site.path}:{site.kind}"] = site
    return result


def _make(
    program: Program,
    node: Node,
    kind: type[Layer],
    path: str,
    weight: str,
    bias: str | None,
    transposed: bool,
    tied: tuple[str, ...],
) -> Site:
    shape = program.tensor(weight).shape
    common = {"path": path, "weight": weight, "bias": bias, "calls": (node,), "tied": tied}
    if kind is Linear4bit:
        names = [found[0] for held in node.args[1 : BITS4[node.target]] if (found := weight_of(program, held))]  # type: ignore[index]
        o, block_size, quantisation = node.args[-3:]
        i = int(node.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
        own = {"tensors": tuple(names), "quantisation": quantisation, "block_size": block_size}
        return Linear4bit(**common, **own, in_features=i, out_features=o)  # type: ignore[arg-type]
    if kind is Linear:
        o, i = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
        return Linear(**common, in_features=i, out_features=o, transposed=transposed)  # type: ignore[arg-type]
    if kind is Experts:
        o, i = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        return Experts(**common, in_features=i, out_features=o, experts=shape[0], transposed=transposed)  # type: ignore[arg-type]
    if kind is Conv:
        groups = node.args[6] if len(node.args) > 6 else 1
        assert isinstance(groups, int)
        return Conv(**common, in_features=shape[1] * groups, out_features=shape[0], groups=groups)  # type: ignore[arg-type]
    return Embedding(**common, in_features=shape[0], out_features=shape[1])  # type: ignore[arg-type]


def _owner(weight: str, names: tuple[str, ...], called: str) -> str:
    """The path of a layer: the owner of the name (of several tied ones) under which the calling module knows it."""
    owners = [_stem(name) for name in names]
    return called if called in owners else _stem(weight)


def _stem(name: str) -> str:
    return name.removesuffix("_packed").removesuffix(".weight")


def _alias(path: str, weight: str, names: tuple[str, ...]) -> str:
    return next((name for name in names if _stem(name) == path), weight)


def scope(program: Program, path: str) -> str:
    """Where a pass puts the parameters of a layer: in its module, or beside a weight that has no module of its own."""
    return f"{path}_adapter" if path in program.tensors else path


def modules(program: Program) -> dict[str, str]:
    """Every module path that made a node or owns a tensor -> its class name (empty when unknown)."""
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            path = path.split("@", 1)[0]
            if path:
                found.setdefault(path, kind if isinstance(kind, str) else kind.__name__)
    for name in program.exported.state_dict:
        while "." in name:
            name = name.rsplit(".", 1)[0]
            found.setdefault(name, "")
    return found
