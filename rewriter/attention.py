"""Attention, residual additions and what lies between them, found by data flow in a graph with any names."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from rewriter.program import Program, module_path
from rewriter.view import BITS4, NO_CHANGE, Embedding, Experts, Linear, Part, Site, layers, top

aten = torch.ops.aten
ELEMENTWISE = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,  # scores may be capped
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
}
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
class Operands:
    """The values that meet in an attention, and its result; `scores` is None when one operation does it all."""

    query: Node
    key: Node
    value: Node
    result: Node
    scores: Node | None = None


@dataclass(frozen=True, slots=True)
class Residual:
    """`sum = skip + branch(skip)`: the addition, the value that is carried over, and the operations of the branch.

    `end` is the branch's last value. A block that adds attention and feed-forward at once has one entry for each.
    """

    path: str
    node: Node
    skip: Node
    branch: frozenset[Node]
    has_attention: bool
    end: Node


def attention_operands(node: Node) -> Operands | None:
    """The values that meet in the attention that ends or sits at this node; None when there is none."""
    if node.target is aten.scaled_dot_product_attention.default:
        q, k, v = node.args[:3]
        return Operands(q, k, v, node)  # type: ignore[arg-type]
    if node.target not in (aten.softmax.int, aten._softmax.default):
        return None
    scores = _scores(node)
    weights = node
    while len(weights.users) == 1 and (user := next(iter(weights.users))).target in PASS_ON:
        weights = user
    result = next((user for user in weights.users if _is_product(user)), None)
    if scores is None or result is None:
        return None
    q, k = _operands(scores)
    v = next((operand for operand in _operands(result) if operand is not weights), None)
    return Operands(q, k, v, result, scores) if v is not None else None


def _scores(softmax: Node) -> Node | None:
    """The product of queries and keys whose softmax is taken, after scales, masks and biases."""
    todo, seen = [softmax.args[0]], set()
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if _is_product(node):
            return node
        if node.target in {*ELEMENTWISE, *PASS_ON}:
            todo.extend(reversed(node.args[:3]))
    return None


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
        operands = attention_operands(node) if node.op == "call_function" else None
        if operands is None:
            continue
        sources = [_projections(operand, by_top) for operand in (operands.query, operands.key, operands.value)]
        query, key, value = (
            tuple(_cut(site, call, frontier, role) for site, call, frontier in source)
            for source, role in zip(sources, ("query", "key", "value"), strict=True)
        )
        output = _output_projection(operands.result, by_call)
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
    marks = {node for node in program.graph.nodes if node.op == "call_function" and attention_operands(node)}
    scores = _below_softmax(marks)
    for node in program.graph.nodes:
        if node.target not in (aten.add.Tensor, aten.add_.Tensor) or node in scores:
            continue
        sides = [a for a in node.args[:2] if isinstance(a, Node) and program.parameter_name(a) is None]
        if len(sides) != 2:
            continue
        for end, carried in (sides, sides[::-1]):
            found = next(
                ((skip, inside) for skip in _carried(carried) if _weighs(program, inside := _between(skip, end))), None
            )
            if found is not None:
                result.extend(
                    _terms(program, Residual(module_path(node), node, *found, bool(found[1] & marks), end), marks)
                )
                break
    return result


def _below_softmax(marks: set[Node]) -> set[Node]:
    """What lies between products and softmax: a mask or bias added there is also part of what later layers read."""
    todo = [node.args[0] for node in marks if node.target is not aten.scaled_dot_product_attention.default]
    seen: set[Node] = set()
    while todo:
        node = todo.pop()
        if isinstance(node, Node) and node not in seen and node.target in {*ELEMENTWISE, *PASS_ON, aten.add_.Tensor}:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return seen


def _carried(node: Node) -> list[Node]:
    """What a branch may start from: the other addend, or a term of it (`(skip + attention) + feed_forward`)."""
    terms = node.args[:2] if node.target in (aten.add.Tensor, aten.add_.Tensor) else ()
    return [node, *(term for term in terms if isinstance(term, Node))]


def _terms(program: Program, whole: Residual, marks: set[Node]) -> list[Residual]:
    """The branch, or its two terms when one of them is an attention and the other is none."""
    total = whole.end
    while total.target in PASS_ON and isinstance(total.args[0], Node):
        total = total.args[0]
    if total.target not in (aten.add.Tensor, aten.add_.Tensor) or not whole.has_attention:
        return [whole]
    parts = [(end, _between(whole.skip, end)) for end in total.args[:2] if isinstance(end, Node)]
    terms = [replace(whole, branch=inside, has_attention=bool(inside & marks), end=end) for end, inside in parts]
    split = all(_weighs(program, term.branch) for term in terms) and {t.has_attention for t in terms} == {True, False}
    return sorted(terms, key=lambda term: term.end) if split else [whole]


def _weighs(program: Program, inside: frozenset[Node]) -> bool:
    return any(_has_weight(program, node) for node in inside)


def _has_weight(program: Program, node: Node) -> bool:
    if node.target in BITS4:
        return True
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
            if user not in seen and user.target in {*PASS_ON, *ELEMENTWISE}:
                seen.add(user)
                todo.append(user)
    return False
