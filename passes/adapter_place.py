"""Sublayers and where an adapter meets them: from an output projection to the residual addition, by data flow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.fx import Node

from rewriter.attention import PASS_ON, SHAPES, Attention, Residual, attentions, residuals
from rewriter.find import Miss, Sites
from rewriter.program import Origin, Program
from rewriter.view import NO_CHANGE, Conv, Experts, Linear, Site, layers, top

aten = torch.ops.aten
NORMS = {aten.layer_norm.default, aten.rms_norm.default}
MOVES_ROWS = {aten.transpose.int, aten.permute.default}
Kind = Literal["attention", "cross", "feed_forward"]


@dataclass(frozen=True, slots=True)
class Place:
    """One call of a sublayer, `sum = skip + end` with `end` computed from `input`, computed from `skip`.

    `input` is what the first layers read, behind a pre-norm; `output` what the output projection gives, behind its
    dropout; `norm` the model's norm of the sum in a post-norm model.
    """

    skip: Node
    input: Node
    output: Node
    end: Node
    sum: Node
    norm: Node | None


@dataclass(frozen=True, slots=True)
class Sublayer:
    """An attention or feed-forward sublayer, known by its output projection, with every call of it."""

    path: str  # of the output projection
    weight: str
    kind: Kind
    width: int
    places: tuple[Place, ...]


def sublayers(program: Program) -> Sites[Sublayer]:
    """Every sublayer with a residual addition, in program order; what an adapter cannot stand behind is a miss."""
    found = layers(program)
    calls = {call: site for site in found.values() for call in site.calls}
    heads = attentions(program, found)
    sites: dict[str, Sublayer] = {}
    missed: list[Miss] = []
    for residual in residuals(program):
        if Origin.of(residual.node) is not None:
            continue  # the addition of an adapter
        applied = sorted(node for node in residual.branch if node in calls)
        if not applied:
            missed.append(Miss(residual.path, "no layer between its input and its residual addition"))
            continue
        last = calls[applied[-1]]
        reason = _unfit(last)
        place = None if reason else _place(residual, applied, last.out_features)
        if place is None:
            missed.append(Miss(last.path, reason or "its output is not the projection's, row by row"))
        elif last.path in sites:
            known = sites[last.path]
            sites[last.path] = replace(known, places=(*known.places, place))
        else:
            kind = _kind(residual, heads)
            sites[last.path] = Sublayer(last.path, last.weight, kind, last.out_features, (place,))
    return Sites(tuple(sites.values()), tuple(missed))


def standing(node: Node) -> Node:
    """What stands for a value by now, also when it does not read that value: a block's sum and norm made again."""
    names, last = {node.name}, node
    for other in node.graph.nodes:  # an update below a bottleneck may stand for the same value, and comes before it
        if (origin := Origin.of(other)) and origin.stands_for in names:
            names.add(other.name)
            last = other
    return last


def _unfit(last: Site) -> str:
    if isinstance(last, Linear | Experts):
        return ""
    kind = "a convolution" if isinstance(last, Conv) else "an embedding"
    return f"it ends in {kind}, not in a linear layer or experts"


def _kind(residual: Residual, heads: list[Attention]) -> Kind:
    """Cross-attention takes its keys from elsewhere."""
    inside = [head for head in heads if head.node in residual.branch]
    if not inside:
        return "feed_forward"
    keys = [call for head in inside for site in head.key for call in site.calls]
    return "attention" if not keys or any(call in residual.branch for call in keys) else "cross"


def _place(residual: Residual, applied: list[Node], width: int) -> Place | None:
    """Where the sublayer's layers begin and end; None when the width of the output is not that of the projection."""
    narrow = _narrows(residual)
    entry = next(n for n in reversed(narrow) if n < applied[0] and (n is residual.skip or n.target not in SHAPES))
    whole = _size(residual.end)  # of experts, the first value that is their sum per token
    output = _behind(next(n for n in narrow if n >= applied[-1] and _size(n) == whole), residual.branch)
    if output.meta["val"].shape[-1] != width:
        return None
    norm = _post_norm(residual) if entry is residual.skip else None
    return Place(residual.skip, entry, output, residual.end, residual.node, norm)


def _narrows(residual: Residual) -> list[Node]:
    """The values that all data from the skip to the branch's end passes through, in order."""
    inside = sorted(node for node in residual.branch if _is_data(node))
    within = set(inside)
    last_use = {
        node: max((user for user in node.users if user in within), default=node) for node in [residual.skip, *inside]
    }
    result, in_use = [residual.skip], [residual.skip]
    for node in inside:
        in_use = [*(value for value in in_use if node < last_use[value]), node]
        if len(in_use) == 1 and isinstance(node.meta["val"], torch.Tensor):
            result.append(node)
    return result


def _size(node: Node) -> str:
    """The number of elements, as an expression of the symbolic sizes."""
    return str(math.prod(node.meta["val"].shape))


def _is_data(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor | tuple | list)


def _behind(node: Node, branch: frozenset[Node]) -> Node:
    """The value behind the dropout, casts and reshapes that follow, and behind what earlier passes put there."""
    while True:
        node = top(node)
        following = [user for user in node.users if user in branch and _is_data(user)]
        if len(following) != 1 or not _keeps_rows(node, following[0]):
            return node
        node = following[0]


def _keeps_rows(node: Node, user: Node) -> bool:
    before, after = node.meta["val"], user.meta["val"]
    if user.target in MOVES_ROWS:
        order = torch.empty([1] * (before.ndim - 1) + [2])
        return bool(user.target(order, *user.args[1:]).shape[-1] == 2)
    plain = {aten.view.default, aten.reshape.default, *NO_CHANGE, *(PASS_ON - SHAPES)}
    return user.target in plain and bool(after.shape[-1] == before.shape[-1])


def _post_norm(residual: Residual) -> Node | None:
    """The norm that alone reads the sum; the norm at the end of a pre-norm model is none of its block's."""
    readers = [user for user in residual.node.users if user.target is not aten.sym_size.int]
    return readers[0] if len(readers) == 1 and readers[0].target in NORMS else None
