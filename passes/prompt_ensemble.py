"""Several prompts over one model: the batch once per prompt, and what the copies say together."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch.fx import Node

from passes.extend import Lengthened, output, returned
from passes.extend_inputs import depends, shape
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.view import top

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, slots=True)
class Ensemble:
    """One batch of `copies` copies for every batch [b, ...] that the caller passes; copy n is rows n·b to (n + 1)·b."""

    extended: Lengthened
    copies: int
    symbols: frozenset[Any]  # sizes that stand for b: a mask may have a symbol of its own
    batch: Node


def copied(edit: Edit, extended: Lengthened, copies: int) -> Ensemble:
    """Repeat the batch of every input that has one.

    Raises `UsageError` when the batch is fixed.
    """
    program, source = edit.program, extended.place.source
    symbols = frozenset(shape(node)[0] for node in extended.inputs if len(shape(node)) > 1)
    symbols = frozenset(symbol for symbol in symbols if not isinstance(symbol, int))
    if isinstance(shape(source)[0], int):
        raise UsageError(
            f"the batch of {source.name} is fixed at {shape(source)[0]}",
            fix="Trace with two or more rows in the example, or use ensemble=1.",
        )
    batch = edit.call(aten.sym_size.int, source, 0, like=source, label=f"{source.name}_rows")
    for node in program.inputs():
        sizes = shape(node)
        if sizes and sizes[0] in symbols:
            current = top(node)
            times = [copies, *[1] * (len(sizes) - 1)]
            repeated = edit.call(aten.repeat.default, current, times, like=node, label=f"{node.name}_copies")
            edit.replace(current, repeated)
    edit.retype()
    tokens = top(source)
    return Ensemble(dataclasses.replace(extended, tokens=tokens), copies, symbols, batch)


def spread(edit: Edit, ensemble: Ensemble, rows: Node) -> Node:
    """The prompts [copies, p, d] as rows of the repeated batch [copies · b, p, d]."""
    at = ensemble.extended.embeddings[0]
    single = edit.call(aten.unsqueeze.default, rows, 1, like=at, label="prompt_single")
    sizes = [-1, ensemble.batch, -1, -1]
    every = edit.call(aten.expand.default, single, sizes, like=at, label="prompt_every")
    return edit.call(aten.flatten.using_ints, every, 0, 1, like=at, label="prompt_copies")


def vote(edit: Edit, ensemble: Ensemble, how: Literal["mean", "majority"]) -> None:
    """Let every output with a batch be one answer of all copies: mean, or of the first one the share of votes.

    Raises `UsageError` for an output whose batch cannot be told apart and for one that is no floating point.
    """
    first = True
    for node, before in zip(returned(edit.program), ensemble.extended.shapes.values(), strict=True):
        dimension = _batch_dimension(node, before, ensemble)
        if dimension is None:
            continue
        value = node
        if how == "majority" and first:
            value = _votes(edit, node, dimension)
        first = False
        sizes = [ensemble.copies, -1]
        apart = edit.call(aten.unflatten.int, value, dimension, sizes, like=value, label="prompt_apart")
        together = edit.call(aten.mean.dim, apart, [dimension], like=apart, label="prompt_vote")
        edit.rewire(output(edit.program), node, together)


def _batch_dimension(node: Node, before: tuple[Any, ...], ensemble: Ensemble) -> int | None:
    found = [index for index, size in enumerate(before) if size in ensemble.symbols]
    mixed = [size for size in before if size not in ensemble.symbols and _depends(size, ensemble)]
    if len(found) > 1 or mixed:
        raise UsageError(
            f"the output {node.name} of size {[str(size) for size in before]} compares the rows of a batch",
            evidence=["the answers of several copies of the batch cannot be told apart"],
            fix="Use ensemble=1 for this model.",
        )
    if not found:
        return None
    if not node.meta["val"].dtype.is_floating_point:
        raise UsageError(
            f"the output {node.name} is {node.meta['val'].dtype}, of which there is no mean",
            fix="Trace the model so that it returns scores, or use ensemble=1.",
        )
    return found[0]


def _depends(size: Any, ensemble: Ensemble) -> bool:
    return any(depends(size, symbol) for symbol in ensemble.symbols)


def _votes(edit: Edit, scores: Node, dimension: int) -> Node:
    """1 for the class with the highest score, the first of equal ones, and 0 for the others."""
    value = scores.meta["val"]
    if dimension == value.ndim - 1:
        raise UsageError(
            f"the output {scores.name} has no classes to vote for: its last dimension is the batch",
            fix="Use vote=mean.",
        )

    def call(label: str, operation: Any, *args: Any, **kwargs: Any) -> Node:
        return edit.call(operation, *args, like=scores, label=f"prompt_{label}", **kwargs)

    chosen = call("chosen", aten.argmax.default, scores, -1, True)
    classes = call("classes", aten.arange.default, value.shape[-1], dtype=torch.int64, device=value.device)
    votes = call("votes", aten.eq.Tensor, classes, chosen)
    return call("counts", aten.to.dtype, votes, value.dtype)
