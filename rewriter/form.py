"""The form of an affine value, and the algebra of such forms.

    value(x) = Σ_t  (x · down_tᵀ) · rows_t  +  offset

Low-rank updates are kept as factors: `down` [r, i] is the first contraction of a path and `rows` [r, o] is what the
rest of the path makes of the r unit rows. `rows` is obtained by running the graph's own operations on those rows, so
every operation that acts on rows alone is supported by naming it, without a rule of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from rewriter.constants import Constants
from rewriter.grouped import Grouped

Tensor = torch.Tensor


class NotAffine(Exception):  # noqa: N818 - a verdict of the proof, not a user's error
    """The node that is not affine in the root, and why."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Term:
    """One path from the root: `(x · downᵀ) · rows`.

    In a form of several experts, the `down` and `rows` of all of them lie one after the other in dimension 0.
    `down` None is the identity; `rows` None is the identity over `down`'s outputs, scaled by `diagonal` where given.
    `chain` are the contractions on the path, `reads` the parameters that shaped it.
    """

    down: Tensor | None = None
    rows: Tensor | None = None
    diagonal: Tensor | None = None
    chain: tuple[Node, ...] = ()
    reads: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Form:
    """An affine value: its terms, its offset, and the layout of its rows.

    `key` is the geometry of the first contraction (all terms share it), `features` the trailing sizes that belong to
    one row, `channels_first` that the features lie in dimension 1, as in a convolution. With `experts`, every row has
    the factors of the expert that `key` assigns it to.
    """

    terms: tuple[Term, ...]
    features: tuple[int, ...]
    offset: Tensor | None = None
    offset_reads: frozenset[str] = frozenset()
    key: tuple[Any, ...] = ()
    channels_first: bool = False
    experts: int = 0


@dataclass(slots=True)
class Algebra:
    """The operations on forms relative to one root; a refusal names the node that asked for it."""

    constants: Constants
    root: Node
    working: torch.dtype  # the type of the base operation's result: casts below it lose something
    forms: dict[Node, Form] = field(default_factory=dict)

    def of(self, node: Node, index: int = 0) -> Form:
        value = node.args[index]
        if not isinstance(value, Node) or value not in self.forms:
            raise NotAffine(node, f"operand {index} of {short(node)} does not come from the input alone")
        return self.forms[value]

    def constant(self, node: Node, value: Any) -> Any:
        if value not in self.constants:
            raise NotAffine(node, f"{short(node)} multiplies two values that both depend on the input")
        return self.constants.value(value)

    def unit(self, form: Form, term: Term) -> Tensor:
        """The rows of a term as a tensor [r, *features]."""
        if term.rows is not None:
            return term.rows
        size = math.prod(form.features)
        rows = torch.eye(size, dtype=self.constants.precision, device=self.constants.device).reshape(
            size, *form.features
        )
        rows = rows if term.diagonal is None else rows * term.diagonal
        return rows.repeat(form.experts, *[1] * len(form.features)) if form.experts else rows

    def map_rows(
        self, form: Form, node: Node, linear: Callable[[Tensor], Tensor], *, reads: frozenset[str] = frozenset()
    ) -> Form:
        """Apply a row-wise linear operation to every term and to the offset; it sees tensors of the node's rank."""
        ndim = tensor_operand(node, 0).meta["val"].ndim
        width = len(form.features)

        def run(rows: Tensor) -> Tensor:
            laid = rows.reshape(rows.shape[0], *[1] * (ndim - width - 1), *form.features) if ndim > width else rows
            return linear(laid)

        if ndim <= width:
            raise NotAffine(node, f"{short(node)} acts on a value without rows")
        results = [run(self.unit(form, term)) for term in form.terms]
        offset = None if form.offset is None else run(form.offset[None])
        some = results[0] if results else offset
        assert some is not None
        features = tuple(some.shape[ndim - width :]) if not form.channels_first else tuple(some.shape[1:])
        terms = tuple(
            replace(t, rows=r.reshape(r.shape[0], *features), diagonal=None, reads=t.reads | reads)
            for t, r in zip(form.terms, results, strict=True)
        )
        return replace(
            form, terms=terms, features=features, offset=None if offset is None else offset.reshape(features)
        )

    def contract(self, form: Form, node: Node, weight: Tensor, operand: Any) -> Form:
        """`x -> x · weightᵀ` on the last feature; weight [o, i]."""
        if len(form.features) != 1 or form.channels_first or form.features[0] != weight.shape[1]:
            raise NotAffine(node, f"{short(node)} contracts something else than a row's features")
        reads = self.constants.reads(operand)
        terms = []
        for term in form.terms:
            down, rows = _contracted(term, weight)
            if form.experts and term.rows is None and rows is not None:
                rows = rows.repeat(form.experts, 1)
            terms.append(Term(down, rows, None, (*term.chain, node), term.reads | reads))
        offset = None if form.offset is None else form.offset @ weight.t()
        return replace(
            form,
            terms=tuple(terms),
            features=(weight.shape[0],),
            offset=offset,
            offset_reads=form.offset_reads | reads if offset is not None else form.offset_reads,
            key=form.key or ("linear",),
        )

    def contract_stack(self, form: Form, node: Node, weight: Tensor, product: Grouped) -> Form:
        """`x -> x · weight[e]ᵀ` for the expert e of each row; weight [experts, o, i]."""
        experts, _, inputs = weight.shape
        if form.features != (inputs,) or form.channels_first:
            raise NotAffine(node, f"{short(node)} contracts something else than a row's features")
        if form.offset is not None:
            raise NotAffine(node, f"{short(node)} makes a constant differ from expert to expert")
        columns = weight.transpose(1, 2)
        reads = self.constants.reads(product.weight)
        first = form.terms == (Term(),)
        spread = self.spread(form if not first else replace(form, terms=()), node, experts, product.key)
        terms = [Term(weight.flatten(0, 1), None, None, (node,), reads)] if first else []
        for term in spread.terms:
            if term.rows is not None:
                rows = term.rows.reshape(experts, -1, inputs) @ columns
            else:
                rows = columns if term.diagonal is None else term.diagonal[:, None] * columns
            terms.append(Term(term.down, rows.flatten(0, 1), None, (*term.chain, node), term.reads | reads))
        return replace(spread, terms=tuple(terms), features=(weight.shape[1],))

    def spread(self, form: Form, node: Node, experts: int, key: tuple[Any, ...]) -> Form:
        """The form with the same factors for every expert."""
        if form.experts:
            if form.key != key or form.experts != experts:
                raise NotAffine(node, f"{short(node)} assigns rows to other experts than the operation before it")
            return form
        if form.key not in ((), ("linear",)):
            raise NotAffine(node, f"{short(node)} adds operations of different geometry ({form.key} and {key})")
        terms = tuple(
            replace(
                term,
                down=self._down(term).repeat(experts, 1),
                rows=None if term.rows is None else term.rows.repeat(experts, *[1] * len(form.features)),
            )
            for term in form.terms
        )
        return replace(form, terms=terms, key=key, experts=experts)

    def _down(self, term: Term) -> Tensor:
        """The first contraction of a term, written out where it is the identity."""
        if term.down is not None:
            return term.down
        size = static_size(self.root.meta["val"].shape[-1])
        return torch.eye(size or 0, dtype=self.constants.precision, device=self.constants.device)

    def shift(self, form: Form, value: Any, reads: frozenset[str], node: Node) -> Form:
        """Add a constant to every row."""
        if value is None:
            return form
        term = self.constants.tensor(value)
        laid = self._per_row(form, term, node)
        offset = laid.expand(form.features) if form.offset is None else form.offset + laid
        return replace(form, offset=offset, offset_reads=form.offset_reads | reads)

    def scale(self, form: Form, factor: Any, reads: frozenset[str], node: Node) -> Form:
        """Multiply every row by a constant of the features' shape, or by a number."""
        value = self._per_row(form, self.constants.tensor(factor), node)
        terms = []
        for term in form.terms:
            if term.rows is not None:
                scaled = replace(term, rows=term.rows * value, reads=term.reads | reads)
            else:
                diagonal = value.expand(form.features) if term.diagonal is None else term.diagonal * value
                scaled = replace(term, diagonal=diagonal, reads=term.reads | reads)
            terms.append(scaled)
        offset = None if form.offset is None else form.offset * value
        return replace(form, terms=tuple(terms), offset=offset)

    def _per_row(self, form: Form, value: Tensor, node: Node) -> Tensor:
        """A constant operand as seen by one row; refused when it differs from row to row."""
        if value.numel() == 1:
            return value.reshape(())
        width = len(form.features)
        if form.channels_first:
            shape = list(value.shape)
            fits = value.ndim <= width + 1 and all(s == 1 for s in shape[2 - (width + 1 - value.ndim) :])
            if value.ndim == width + 1 and shape[0] == 1:
                value, fits = value[0], all(s == 1 for s in shape[2:])
            if not fits or value.ndim != width:
                raise NotAffine(node, f"{short(node)} combines with a constant that differs from place to place")
            return self._within(form, value, node)
        lead = value.shape[: max(0, value.ndim - width)]
        if any(size != 1 for size in lead):
            raise NotAffine(node, f"{short(node)} combines with a constant that differs from row to row")
        return self._within(form, value.reshape(value.shape[len(lead) :]), node)

    def _within(self, form: Form, value: Tensor, node: Node) -> Tensor:
        if torch.broadcast_shapes(value.shape, form.features) != torch.Size(form.features):
            raise NotAffine(node, f"{short(node)} makes rows wider by a constant")
        return value

    def add(self, node: Node, one: Form, two: Form, alpha: float) -> Form:
        two = self.scale(two, alpha, frozenset(), node) if alpha != 1 else two
        if one.features != two.features or one.channels_first != two.channels_first:
            raise NotAffine(node, f"{short(node)} adds rows of different layouts")
        if one.experts != two.experts:
            some = one if one.experts else two
            one, two = (self.spread(form, node, some.experts, some.key) for form in (one, two))
        if one.key and two.key and one.key != two.key:
            raise NotAffine(node, f"{short(node)} adds operations of different geometry ({one.key} and {two.key})")
        offsets = [o for o in (one.offset, two.offset) if o is not None]
        return replace(
            one,
            terms=(*one.terms, *two.terms),
            offset=sum(offsets[1:], offsets[0]) if offsets else None,
            offset_reads=one.offset_reads | two.offset_reads,
            key=one.key or two.key,
        )


def _contracted(term: Term, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(down, rows) of a term after a contraction with weight [o, i]; the first one becomes `down`."""
    if term.rows is not None:
        rows = term.rows @ weight.t()
        return (rows.t(), None) if term.down is None else (term.down, rows)
    if term.down is None:
        return weight if term.diagonal is None else weight * term.diagonal, None
    return term.down, weight.t() if term.diagonal is None else term.diagonal[:, None] * weight.t()


def matrix(form: Form, inputs: int, precision: torch.dtype) -> Tensor:
    """The one weight of a form, [o, i] for rows of features, [o, i, *kernel] for a convolution, [experts, o, i]."""
    if form.experts:
        return _stack(form)
    total: Tensor | None = None
    size = math.prod(form.features)
    # whole weights first: the low-rank updates are then added to them in one addmm each
    for term in sorted(form.terms, key=lambda t: t.rows is not None):
        if term.rows is None:
            whole = term.down if term.down is not None else torch.eye(inputs, dtype=precision)
            if term.diagonal is not None:
                whole = whole * term.diagonal.reshape(size, *[1] * (whole.ndim - 1))
            total = whole if total is None else total + whole
            continue
        left = term.rows.reshape(term.rows.shape[0], size).t()
        if term.down is None:
            total = left if total is None else total + left
            continue
        down = term.down.flatten(1)
        if total is None:
            total = (left @ down).reshape(size, *term.down.shape[1:])
        else:
            total = torch.addmm(total.flatten(1), left, down).reshape(total.shape)
    assert total is not None
    return total


def _stack(form: Form) -> Tensor:
    """The matrices [experts, o, i] of a form of several experts."""
    size = math.prod(form.features)
    total: Tensor | None = None
    for term in sorted(form.terms, key=lambda t: t.rows is not None):
        assert term.down is not None  # a region has no path without a parameter
        down = term.down.unflatten(0, (form.experts, -1))
        if term.rows is None:
            whole = down if term.diagonal is None else down * term.diagonal.reshape(size, 1)
            total = whole if total is None else total + whole
            continue
        left = term.rows.reshape(form.experts, -1, size).transpose(1, 2)
        total = left @ down if total is None else torch.baddbmm(total, left, down)
    assert total is not None
    return total


def static_size(size: Any) -> int | None:
    """A size as a number, also when it is written as a symbol that can only have one value."""
    if isinstance(size, int):
        return size
    known: int | None = size.node.maybe_as_int()
    return known


def tensor_operand(node: Node, index: int) -> Node:
    value = node.args[index]
    if not isinstance(value, Node):
        raise NotAffine(node, f"{short(node)} has no tensor to start from")
    return value


def short(node: Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]
