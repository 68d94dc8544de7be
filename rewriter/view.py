"""Typed, read-only views of what the graph holds: layers by their parameter, attention and residuals by data flow.

A site is a parameter, not a call: a module called twice is one `Linear` with two calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.fx import Node

from rewriter.grouped import grouped
from rewriter.program import Origin, Program, module_path

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


def top(node: Node) -> Node:
    """The value that stands for `node` by now: the node itself, or the sum the last pass put in its place."""
    while True:
        above = [user for user in node.users if (origin := Origin.of(user)) and origin.stands_for == node.name]
        if not above:
            return node
        node = above[0]


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
    """(kind, weight, bias, stored transposed) of an operation that applies a bare parameter."""
    target, args = node.target, node.args
    if target is aten.linear.default:
        found = weight_of(program, args[1])
        bias = weight_of(program, args[2]) if len(args) > 2 else None
        return found and (Linear, found[0], bias and bias[0], found[1])
    if target is aten.addmm.default:
        found, bias = weight_of(program, args[2]), weight_of(program, args[0])
        return found and (Linear, found[0], bias and bias[0], not found[1])
    if target in (aten.mm.default, aten.matmul.default):
        found = weight_of(program, args[1])
        if found and node.args[1].meta["val"].ndim == 2 and weight_of(program, args[0]) is None:  # type: ignore[union-attr]
            return Linear, found[0], None, not found[1]
    if target in CONVOLUTIONS:
        found = weight_of(program, args[1])
        bias = weight_of(program, args[2]) if len(args) > 2 else None
        return (Conv, found[0], bias and bias[0], False) if found and not found[1] else None
    if target is aten.embedding.default:
        found = weight_of(program, args[0])
        return (Embedding, found[0], None, False) if found and not found[1] else None
    product = grouped(node)
    if product is not None and weight_of(program, product.data) is None:
        found = weight_of(program, product.weight)
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
        found[key] = _make(program, node, kind, path, weight, bias, transposed, others)
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
    owners = [name.removesuffix(".weight") for name in names]
    return called if called in owners else weight.removesuffix(".weight")


def _alias(path: str, weight: str, names: tuple[str, ...]) -> str:
    return next((name for name in names if name.removesuffix(".weight") == path), weight)


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


# -- attention and residuals --------------------------------------------------------------------------------------

ELEMENTWISE = {aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.masked_fill.Scalar, aten.where.self}
SHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    *NO_CHANGE,
}
PASS_ON = {*SHAPES, aten.dropout.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device}


def is_getitem(node: Node) -> bool:
    import operator

    return node.target is operator.getitem


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention: the operation, and the projections its data comes from and goes to.

    A fused projection appears as `Linear` views with a `part`.
    """

    path: str
    node: Node
    query: tuple[Linear, ...]
    key: tuple[Linear, ...]
    value: tuple[Linear, ...]
    output: tuple[Linear, ...]


@dataclass(frozen=True, slots=True)
class Residual:
    """`sum = skip + branch(skip)`: the addition, the value that is carried over, and the operations of the branch."""

    path: str
    node: Node
    skip: Node
    branch: frozenset[Node]
    has_attention: bool


def _attention_operands(node: Node) -> tuple[Node, Node, Node, Node] | None:
    """(query, key, value, result) of an attention that ends or sits at this node."""
    if node.target is aten.scaled_dot_product_attention.default:
        q, k, v = node.args[:3]
        return q, k, v, node  # type: ignore[return-value]
    if node.target not in (aten.softmax.int, aten._softmax.default):
        return None
    scores = node.args[0]
    while isinstance(scores, Node) and scores.target in {*ELEMENTWISE, *PASS_ON}:
        tensors = [a for a in scores.args if isinstance(a, Node)]
        scores = next((a for a in tensors if _is_product(a) or a.target in {*ELEMENTWISE, *PASS_ON}), None)
    if not isinstance(scores, Node) or not _is_product(scores):
        return None
    weights = node
    while len(weights.users) == 1 and (user := next(iter(weights.users))).target in PASS_ON:
        weights = user
    result = next((user for user in weights.users if _is_product(user)), None)
    if result is None:
        return None
    q, k = _operands(scores)
    v = next((operand for operand in _operands(result) if operand is not weights), None)
    return (q, k, v, result) if v is not None else None


def _operands(node: Node) -> list[Node]:
    tree = node.args[1] if node.target is aten.einsum.default else node.args[:2]
    return [a for a in tree if isinstance(a, Node)]  # type: ignore[union-attr]


def _is_product(node: Node) -> bool:
    return node.target in (aten.matmul.default, aten.bmm.default, aten.einsum.default) and len(_operands(node)) == 2


def attentions(program: Program, found: dict[str, Site] | None = None) -> list[Attention]:
    """Every attention of the program, with its projections found by walking the data flow."""
    found = layers(program) if found is None else found
    by_call = {call: site for site in found.values() if isinstance(site, Linear) for call in site.calls}
    by_top = {top(call): site for call, site in by_call.items()}
    result: list[Attention] = []
    for node in program.graph.nodes:
        operands = _attention_operands(node) if node.op == "call_function" else None
        if operands is None:
            continue
        sources = [_projections(operand, by_top) for operand in operands[:3]]
        query, key, value = (
            tuple(_cut(site, call, frontier, role) for site, call, frontier in source)
            for source, role in zip(sources, ("query", "key", "value"), strict=True)
        )
        output = _output_projection(operands[3], by_call)
        result.append(Attention(module_path(node), node, query, key, value, output))
    return result


def _projections(start: Node, by_top: dict[Node, Linear]) -> list[tuple[Linear, Node, frozenset[Node]]]:
    """The linear layers a value comes from, without walking through them; with the nodes on the way."""
    seen: set[Node] = set()
    todo, calls = [start], []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in by_top:
            calls.append(node)
        elif node.op == "call_function" and node.target is not aten.embedding.default:
            todo.extend(node.all_input_nodes)
    return [(by_top[call], call, frozenset(seen)) for call in sorted(calls)]


def _cut(site: Linear, call: Node, cone: frozenset[Node], role: str) -> Linear:
    """The part of a fused projection's rows that reach one operand of the attention."""
    channels = _channels(call, cone, site.out_features)
    if channels is None or len(channels) == site.out_features:
        return site
    start, stop = channels[0], channels[-1] + 1
    if channels != list(range(start, stop)):
        return site  # interleaved heads: the rows of one role do not lie together
    return replace(site, part=Part(role, start, stop))


def _channels(call: Node, cone: frozenset[Node], width: int) -> list[int] | None:
    """Which output channels of `call` reach the end of `cone`, by pushing their numbers through shape operations."""
    value = call.meta["val"]
    sizes = _Sizes()
    numbers = torch.arange(width).expand([sizes(s) for s in value.shape])
    env: dict[Node, Any] = {call: numbers}
    reached: set[int] = set()
    todo = [call]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user not in cone and not is_getitem(user):
                continue
            if user not in cone:
                continue
            if user.target not in SHAPES and not is_getitem(user):
                held = env[node]
                if isinstance(held, torch.Tensor):
                    reached.update(held.unique().tolist())
                continue
            args = torch.fx.node.map_arg(user.args, lambda n: env[n] if n in env else sizes(n.meta["val"]))
            try:
                env[user] = user.target(*args, **user.kwargs)  # type: ignore[operator]
            except (
                RuntimeError,
                TypeError,
                IndexError,
            ):  # a shape operation whose sizes are not those of this cone: no statement possible
                return None
            todo.append(user)
            if not any(u in cone for u in user.users) and isinstance(env[user], torch.Tensor):
                reached.update(env[user].unique().tolist())
    return sorted(reached) if reached else None


class _Sizes:
    """Numbers for symbolic sizes: each symbol gets its own small number, expressions follow."""

    def __init__(self) -> None:
        self.symbols: dict[object, int] = {}

    def __call__(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr
        for symbol in expression.free_symbols:
            self.symbols.setdefault(symbol, 2 + len(self.symbols))
        return int(expression.subs(self.symbols))


def _output_projection(node: Node, by_call: dict[Node, Linear]) -> tuple[Linear, ...]:
    """The linear layer that the attention's result goes to through shape operations only."""
    todo, seen = [node], set()
    while todo:
        for user in todo.pop().users:
            if user in by_call:
                return (by_call[user],)
            if user.target in PASS_ON and user not in seen:
                seen.add(user)
                todo.append(user)
    return ()


def residuals(program: Program) -> list[Residual]:
    """Every `skip + branch(skip)` whose branch holds at least one operation with a parameter."""
    result = []
    marks = {node for node in program.graph.nodes if node.op == "call_function" and _attention_operands(node)}
    for node in program.graph.nodes:
        if node.target not in (aten.add.Tensor, aten.add_.Tensor):
            continue
        sides = [a for a in node.args[:2] if isinstance(a, Node) and program.parameter_name(a) is None]
        if len(sides) != 2:
            continue
        for branch, skip in (sides, sides[::-1]):
            inside = _between(skip, branch)
            if inside and any(_has_weight(program, n) for n in inside):
                result.append(Residual(module_path(node), node, skip, inside, bool(inside & marks)))
                break
    return result


def _has_weight(program: Program, node: Node) -> bool:
    return any(program.parameter_name(a) is not None and a.meta["val"].ndim >= 2 for a in node.all_input_nodes)


def _between(skip: Node, end: Node) -> frozenset[Node]:
    """The operations between `skip` and `end`; empty when `end` does not come from `skip`."""
    if not skip < end:
        return frozenset()
    seen: set[Node] = set()
    todo, reaches = [end], False
    while todo:
        node = todo.pop()
        if node is skip:
            reaches = True
        elif node not in seen and skip < node and node.op == "call_function":
            seen.add(node)
            todo.extend(node.all_input_nodes)
    if not reaches:
        return frozenset()
    inside: set[Node] = set()
    for node in sorted(seen):
        if any(source is skip or source in inside for source in node.all_input_nodes):
            inside.add(node)
    return frozenset(inside)


def mlp_layers(program: Program, found: dict[str, Site] | None = None) -> Iterator[Linear | Experts]:
    """The linear layers, experts included, inside residual branches that hold no attention."""
    found = layers(program) if found is None else found
    inside = {node for residual in residuals(program) if not residual.has_attention for node in residual.branch}
    for site in found.values():
        if isinstance(site, Linear | Experts) and any(call in inside for call in site.calls):
            yield site


def is_output_head(site: Linear, found: dict[str, Site]) -> bool:
    """Whether a linear layer is the output embedding: it has one row per row of an embedding and ends the program."""
    if not any(isinstance(s, Embedding) and s.in_features == site.out_features for s in found.values()):
        return False
    todo, seen = list(site.calls), set(site.calls)
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return True
            if user not in seen and (user.target in {*PASS_ON, *ELEMENTWISE} or user.target is aten.tanh.default):
                seen.add(user)
                todo.append(user)
    return False
