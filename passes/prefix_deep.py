"""Deep prompts: positions of their own in front of the tokens, which every block's input holds anew."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from passes.extend import TokenInput, caches, cut, lengthen, refuse_without_room, token_input
from passes.extend_inputs import Layout, depends, shape
from passes.prefix_mask import shared_call, size_of
from passes.prefix_place import places
from passes.prefix_rows import encoded, label
from rewriter.attention import residuals
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.program import Program
from rewriter.view import top

if TYPE_CHECKING:
    from passes.prefix import Prefix

aten = torch.ops.aten
END = sys.maxsize


@dataclass(frozen=True, slots=True)
class Deep:
    """The tokens that deep prompts stand in front of, and the width of the blocks."""

    path: str
    place: TokenInput
    width: int


def deep_site(prefix: Prefix, program: Program) -> Deep:
    """Where deep prompts go. Raises `UsageError` for a model without tokens or room, and for one that takes a cache."""
    place = token_input(program)
    length = shape(place.source)[1]
    refuse_without_room(program, length, prefix.virtual_tokens)
    blocks = block_inputs(program, length)
    if not blocks:
        raise UsageError("the model has no blocks of attention and addition", fix="Use deep=False, or prompt tuning.")
    taken = [node.name for node in program.inputs() if node in caches(program)]
    if taken:
        raise UsageError(
            f"the program takes the keys and values of earlier tokens: {taken[0]}",
            fix="Use deep=False, whose rows enter the cache, or trace without one.",
        )
    return Deep(place.path, place, int(blocks[0].meta["val"].shape[2]))


def block_inputs(program: Program, length: object) -> list[Node]:
    """The inputs [b, t, width] of the blocks over a sequence: what an attention's result is added to."""
    crossing = {place.node for place in places(program)[0] if place.role == "cross"}
    found = dict.fromkeys(r.skip for r in residuals(program) if r.has_attention and not r.branch & crossing)
    return [node for node in found if len(shape(node)) == 3 and depends(shape(node)[1], length)]


def add_deep(prefix: Prefix, site: Deep, edit: Edit) -> None:
    """Lengthen the sequence, write each layer's prompts over the first rows of its block's input, cut the outputs."""
    p, length = prefix.virtual_tokens, shape(site.place.source)[1]
    extended = lengthen(edit, site.place, Layout.ahead(p))
    blocks = block_inputs(edit.program, length)
    for index, node in enumerate(blocks):
        old = top(node)
        rows = encoded(prefix, edit, old, site.width, len(blocks) * site.width)
        columns = (index * site.width, (index + 1) * site.width)
        own = _call(prefix, edit, aten.slice.Tensor, rows, 1, *columns, like=old, what="columns")
        many = _call(prefix, edit, aten.unsqueeze.default, own, 0, like=old, what="rows")
        sizes = [size_of(edit, old, 0), -1, -1]
        batch = _call(prefix, edit, aten.expand.default, many, sizes, like=old, what="batch")
        tokens = _call(prefix, edit, aten.slice.Tensor, old, 1, p, END, like=old, what="tokens")
        edit.replace(old, _call(prefix, edit, aten.cat.default, [batch, tokens], 1, like=old, what="joined"))
    edit.retype()
    cut(edit, extended)


def _call(prefix: Prefix, edit: Edit, operation: object, *args: object, like: Node, what: str) -> Node:
    return shared_call(edit, operation, *args, like=like, label=f"{label(prefix)}_{what}")
