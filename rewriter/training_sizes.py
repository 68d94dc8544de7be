"""Batch and length -> a number for every size of a program that varies."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.errors import RewriteWarning, UsageError
from rewriter.formats.huggingface_inputs import LENGTH_LIMITS
from rewriter.formats.index_range import reach
from rewriter.formats.random_inputs import example_sizes
from rewriter.program import Program

LENGTH = 512
UNBOUNDED = 2**40
BATCH_DIMENSION, LENGTH_DIMENSION = 0, 1
SEQUENCE_DIMENSIONS = 3  # [batch, length, width]: floats of this many dimensions are sequences


@dataclass(frozen=True, slots=True)
class Sizes:
    """What one step of training takes: rows, positions (None for a model without a length), and all symbols."""

    batch: int
    length: int | None
    symbols: Mapping[str, int]


def training_sizes(program: Program, *, batch: int = 1, length: int | None = None) -> Sizes:
    """The sizes of a program for a batch of so many rows of so many positions.

    The first dimension of every input is the batch; the second one of tokens, masks and sequences of vectors is the
    length, by default 512 or as many as the model takes. Images keep the sizes they were traced with.

    Raises `UsageError` for a size that the program fixes, for a length that it has not or that is too large for it.
    """
    check_sizes(batch, length)
    symbols = example_sizes(program)
    rows, positions = list(_sizes(program, BATCH_DIMENSION)), list(_sizes(program, LENGTH_DIMENSION))
    _check_fixed("batch", batch, rows)
    if not positions and length is not None:
        shown = ", ".join(f"{node.name} {list(node.meta['val'].shape)}" for node in program.inputs() if _is_data(node))
        raise UsageError(
            f"--length {length} has no meaning for this model: none of its inputs is a sequence",
            evidence=[f"inputs: {shown}"],
            fix="Leave it out; the size of an image is that of the model's configuration.",
        )
    varying = [str(size.node.expr) for size in positions if isinstance(size, torch.SymInt)]
    if not varying:
        _check_fixed("length", length, positions)
        length = int(positions[0]) if positions else None
    else:
        length = _allowed(program, length, varying)
        symbols.update(dict.fromkeys(varying, length))
    symbols.update({str(size.node.expr): batch for size in rows if isinstance(size, torch.SymInt)})
    return Sizes(batch, length, symbols)


def check_sizes(batch: int, length: int | None) -> None:
    """Refuse what is no number of rows or positions at all."""
    given: dict[str, Any] = {"batch": batch, "length": length}
    for name, value in given.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f"{name} is {value!r}", fix=f"A {name} is a whole number of at least 1.")


def _sizes(program: Program, dimension: int) -> Iterator[Any]:
    """The sizes of the inputs in one dimension, where it means batch or length; expressions of sizes left out."""
    for node in program.inputs():
        if not _is_data(node) or (dimension == LENGTH_DIMENSION and not _is_sequence(node.meta["val"])):
            continue
        size = node.meta["val"].shape[dimension]
        if not isinstance(size, torch.SymInt) or size.node.expr.is_symbol:
            yield size


def _is_data(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 1


def _is_sequence(value: Tensor) -> bool:
    if value.is_floating_point():
        return value.ndim == SEQUENCE_DIMENSIONS and isinstance(value.shape[LENGTH_DIMENSION], torch.SymInt)
    return value.ndim > 1


def _check_fixed(what: str, wanted: int | None, sizes: list[Any]) -> None:
    fixed = next((int(size) for size in sizes if not isinstance(size, torch.SymInt)), None)
    if wanted is not None and fixed is not None and wanted != fixed:
        raise UsageError(
            f"--{what} {wanted}: the {what} of this program is fixed at {fixed}",
            fix=f"Give --{what} {fixed}, or trace the model again with example inputs whose sizes may vary.",
        )


def _allowed(program: Program, length: int | None, symbols: list[str]) -> int:
    """The length, or the default one where none is given; refused or warned of when the model takes fewer positions."""
    bounds = {str(symbol): values.upper for symbol, values in program.exported.range_constraints.items()}
    hard = min((int(bounds[s]) for s in symbols if s in bounds and bounds[s] < UNBOUNDED), default=UNBOUNDED)
    soft = _positions(program, symbols)
    if length is None:
        return min(LENGTH, hard, soft)
    if length > hard:
        fix = f"Give a length of at most {hard:,}."
        raise UsageError(f"--length {length:,}: the model takes at most {hard:,} positions", fix=fix)
    if length > soft:
        text = f"length {length:,} is more than the {soft:,} positions that the model was made for"
        warnings.warn(text, RewriteWarning, stacklevel=4)
    return length


def _positions(program: Program, symbols: list[str]) -> int:
    """How many positions the configuration names, or else the tables of positions in the graph have."""
    config = program.metadata.get("huggingface", {}).get("config", {})
    settings = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    named: list[int] = [part[key] for part in settings for key in LENGTH_LIMITS if isinstance(part.get(key), int)]
    if named:
        return min(named)
    tables = reach(program).positions
    return min((tables[symbol] for symbol in symbols if symbol in tables), default=UNBOUNDED)
