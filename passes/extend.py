"""Lengthening what goes into a model: positions of its own before and after the tokens, which every size follows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from passes.extend_inputs import Layout, are_positions, companions, depends, descendants, runs, shape
from rewriter.attention import PASS_ON, attention_operands
from rewriter.edit import Edit
from rewriter.errors import RewriteError, UsageError
from rewriter.formats.index_range import reach
from rewriter.program import Program, module_path
from rewriter.view import Embedding, layers, top

aten = torch.ops.aten
END = sys.maxsize
CACHED_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class TokenInput:
    """An input of token ids [b, t] and the operations that look it up in an embedding [rows, width]."""

    path: str  # of the embedding
    weight: str
    rows: int
    width: int
    source: Node
    calls: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Lengthened:
    """What `lengthen` made of a program.

    `tokens` [b, before + t + after] are the ids, `inputs` all lengthened inputs by the placeholder they stand for,
    `embeddings` the outputs of the token embedding [b, before + t + after, width], whose rows at given positions hold
    the embedding of a token without meaning.
    """

    place: TokenInput
    layout: Layout
    tokens: Node
    inputs: dict[Node, Node]
    embeddings: tuple[Node, ...]
    shapes: dict[Node, tuple[Any, ...]]  # of the program's outputs as they were
    length: Any  # the symbol of t


# -- where ------------------------------------------------------------------------------------------------------


def token_input(program: Program, name: str = "") -> TokenInput:
    """The input of token ids called `name`, or the one that feeds all others: the encoder's before the decoder's.

    Of inputs of one length (token ids, token types) the one with the largest table counts.
    Raises `UsageError` when the program has none, when its length cannot vary, and when it is lengthened already.
    """
    for node in program.inputs():
        if top(node) is not node:
            raise UsageError(
                f"the input {node.name} was lengthened before", fix="Undo the step that did it before you add another."
            )
    found = _token_inputs(program)
    if not found:
        raise UsageError(
            "the program has no embedding that is looked up by token ids",
            evidence=[f"inputs: {', '.join(node.name for node in program.inputs())}"],
            fix="Prompts stand beside tokens; use prefix tuning or adapters for this model.",
        )
    chosen = _named(found, name) if name else _first(program, found)
    sizes = shape(chosen.source)
    if len(sizes) != 2:
        raise UsageError(f"the token ids {chosen.source.name} are not [batch, length] but of size {list(sizes)}")
    if isinstance(sizes[1], int):
        raise UsageError(
            f"the length of {chosen.source.name} is fixed at {sizes[1]}",
            fix="Trace with varying length: two or more tokens in the example, dynamic_shapes='auto'.",
        )
    return chosen


def _token_inputs(program: Program) -> list[TokenInput]:
    inputs = set(program.inputs())
    found: dict[Node, TokenInput] = {}
    for site in layers(program).values():
        if not isinstance(site, Embedding):
            continue
        by_source: dict[Node, list[Node]] = {}
        for call in site.calls:
            source = _handed_on(site.input(call))
            if source in inputs and not are_positions(program, source):
                by_source.setdefault(source, []).append(call)
        for source, calls in by_source.items():
            if source not in found or found[source].rows < site.in_features:
                found[source] = TokenInput(
                    site.path, site.weight, site.in_features, site.out_features, source, tuple(calls)
                )
    return list(found.values())


def _handed_on(node: Node) -> Node:
    while node.target in PASS_ON and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _named(found: list[TokenInput], name: str) -> TokenInput:
    for each in found:
        if each.source.name == name:
            return each
    names = ", ".join(each.source.name for each in found)
    raise UsageError(f"{name!r} is no input of token ids", evidence=[f"there are: {names}"], fix="Name one of these.")


def _first(program: Program, found: list[TokenInput]) -> TokenInput:
    order = {node: index for index, node in enumerate(program.inputs())}
    by_length: dict[str, TokenInput] = {}
    for each in sorted(found, key=lambda one: (-one.rows, order[one.source])):
        by_length.setdefault(str(shape(each.source)[-1:]), each)
    candidates = list(by_length.values())
    reached = {each.source: descendants(each.source) for each in candidates}
    fed = {b.source for a in candidates for b in candidates if a is not b and _feeds(a.source, b.source, reached)}
    heads = [each for each in candidates if each.source not in fed]
    if len(heads) == 1:
        return heads[0]
    raise UsageError(
        "several inputs hold token ids",
        evidence=[f"{each.source.name}, looked up in {each.path}" for each in candidates],
        fix="Say which one is meant by input=NAME.",
    )


def _feeds(a: Node, b: Node, reached: dict[Node, set[Node]]) -> bool:
    """Whether values at b's positions depend on a, as a decoder's do on the encoder's tokens."""
    one, other = shape(a)[-1], shape(b)[-1]
    mixed = [shape(node) for node in reached[a] & reached[b]]
    return any(len(sizes) > 2 and other in sizes and one not in sizes for sizes in mixed)


# -- what -------------------------------------------------------------------------------------------------------


def lengthen(edit: Edit, place: TokenInput, layout: Layout) -> Lengthened:
    """Put the positions of `layout` around the tokens, and around every input with one value per token.

        ids [b, t]  ->  [b, before + t + after]

    A mask of 0 and 1 is 1 there, token types are 0, positions count on, labels are ignored. What the graph derives from
    the inputs (masks, positions, sizes) follows, and sizes that varied still vary.
    Raises `UsageError` and `RewriteError` when the model cannot take more positions.
    """
    program = edit.program
    length = shape(place.source)[1]
    refuse_without_room(program, length, len(layout))
    kept = caches(program)
    shapes = {node: shape(node) for node in returned(program) if node not in kept}
    inputs = {each.node: each.joined(edit, layout) for each in companions(program, place.source)}
    for node, joined in inputs.items():
        edit.replace(node, joined)
    edit.retype()
    edit.removes = True  # values that stay have other types: what undo gives back is the program from before
    embeddings = tuple(_embedded(place, call) for call in place.calls)
    return Lengthened(place, layout, inputs[place.source], inputs, embeddings, shapes, length)


def fill(edit: Edit, extended: Lengthened, rows: Node) -> None:
    """Let the given positions of the embeddings hold `rows`, [given, width] or [b, given, width]."""
    for node in extended.embeddings:
        value = rows
        if value.meta["val"].dtype != node.meta["val"].dtype:
            value = edit.call(aten.to.dtype, value, node.meta["val"].dtype, like=node, label="prompt_cast")
        if value.meta["val"].ndim == 2:
            batch = edit.call(aten.sym_size.int, extended.tokens, 0, like=node, label="prompt_batch")
            value = edit.call(aten.expand.default, value, [batch, -1, -1], like=node, label="prompt_rows")
        pieces = list(_pieces(edit, extended.layout, node, value))
        edit.replace(node, edit.call(aten.cat.default, pieces, 1, like=node, label="prompt_joined"))
    edit.retype()


def cut(edit: Edit, extended: Lengthened) -> None:
    """Take the added positions away from every output that has them; a cache that is returned keeps them.

    Raises `RewriteError` for an output whose positions are mixed with other dimensions.
    """
    first, last = len(extended.layout.before), -len(extended.layout.after) or END
    result = output(edit.program)
    for node, before in extended.shapes.items():
        value = node
        for dimension, (old, new) in enumerate(zip(before, shape(node), strict=True)):
            if old == extended.length:
                value = edit.call(aten.slice.Tensor, value, dimension, first, last, like=value, label="prompt_cut")
            elif depends(old, extended.length):
                raise RewriteError(
                    f"the output {node.name} mixes the positions of tokens with other dimensions",
                    evidence=[f"dimension {dimension} was {old} and is {new}"],
                    fix="Use outputs=all, which leaves the outputs as they come.",
                )
        if value is not node:
            edit.rewire(result, node, value)


def _embedded(place: TokenInput, call: Node) -> Node:
    """The output of the embedding module that makes a lookup: after what passes added, after a scale of its own."""
    node = top(call)
    while module_path(call) == place.path:
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_function" or module_path(users[0]) != place.path:
            break
        node = users[0]
    return node


def _pieces(edit: Edit, layout: Layout, node: Node, rows: Node) -> Iterator[Node]:
    """Runs of given rows and of what the embedding holds, in order."""
    before, after = ([each is None for each in ids] for ids in (layout.before, layout.after))
    used = start = 0
    for given, count in runs([*before, False, *after]):
        stop = start + count
        if given:
            whole = count == layout.given
            part = (1, used, used + count)
            yield rows if whole else edit.call(aten.slice.Tensor, rows, *part, like=node, label="prompt_part")
            used += count
        else:  # a run behind the tokens, or one that holds them, is counted from the end
            first = start if start <= len(before) else start - len(layout) - 1
            last = stop if stop <= len(before) else (stop - len(layout) - 1) or END
            yield edit.call(aten.slice.Tensor, node, 1, first, last, like=node, label="prompt_tokens")
        start = stop


# -- limits -------------------------------------------------------------------------------------------------------


def refuse_without_room(program: Program, length: Any, count: int) -> None:
    """Refuse as many positions as a table of positions has rows: one token at least must fit beside them.

    Such a table is looked up by counted positions, or cut to the length.
    """
    rooms = [room for symbol, room in reach(program).positions.items() if symbol == str(length)]
    for node in program.graph.nodes:
        if node.target is aten.slice.Tensor and program.parameter_name(node.args[0]) is not None:
            dimension = node.args[1] if len(node.args) > 1 else 0
            if depends(shape(node)[dimension], length):
                rooms.append(shape(node.args[0])[dimension])
    if rooms and count >= min(rooms):
        raise UsageError(
            f"{count} added positions leave no room for tokens",
            evidence=[f"the model has room for {min(rooms)} positions"],
            fix=f"Add fewer than {min(rooms)}.",
        )


def caches(program: Program) -> set[Node]:
    """The keys and values [b, h, t, k] that attention reads, and what they are joined and reshaped from."""
    seen: set[Node] = set()
    for node in program.graph.nodes:
        operands = attention_operands(node) if node.op == "call_function" else None
        todo = [operands.key, operands.value] if operands else []
        while todo:
            part = todo.pop()
            if part not in seen:
                seen.add(part)
                if part.target in PASS_ON or part.target is aten.cat.default:
                    todo.extend(source for source in part.all_input_nodes if shape(source))
    return {node for node in seen if len(shape(node)) == CACHED_DIMENSIONS}


def returned(program: Program) -> list[Node]:
    """The tensors that a program returns, each once."""
    values = output(program).args[0]
    assert isinstance(values, tuple)
    return [node for node in dict.fromkeys(values) if isinstance(node, Node) and shape(node)]


def output(program: Program) -> Node:
    """The node that holds what a program returns."""
    found: Node = next(iter(reversed(program.graph.nodes)))
    return found
