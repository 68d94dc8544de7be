"""Proves that a value is affine in another one, row by row.

A value is affine in x when it is reached from x through contractions with constants, scaling, adding, dropout in
evaluation, casts that lose nothing, and reshaping that keeps x's rows apart. One rule per kind of operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from rewriter.form import Algebra, Form, NotAffine, Term, short, static_size, tensor_operand
from rewriter.grouped import OFFSETS, grouped
from rewriter.quantised import assemble
from rewriter.view import BITS4, CONVOLUTIONS
from runtime.nf4 import dequantize

aten = torch.ops.aten
Tensor = torch.Tensor


@dataclass(slots=True)
class Analysis(Algebra):
    """Forms of values relative to one root; computed on request, without recursion."""

    def __post_init__(self) -> None:
        self.forms[self.root] = _identity(self.root)

    def form(self, target: Node) -> Form:
        """The form of a value; raises `NotAffine` naming the first operation that breaks it."""
        todo = [target]
        while todo:
            node = todo[-1]
            if node in self.forms:
                todo.pop()
                continue
            if not self.root < node or node.op != "call_function":
                raise NotAffine(node, "it does not come from the same input")
            needed = [n for n in node.all_input_nodes if n not in self.constants and n not in self.forms]
            if needed and node.target not in ROWLESS and node.target not in SIZED and not sorts_rows(node):
                todo.extend(needed)
                continue
            if (node.target in SIZED or sorts_rows(node)) and tensor_operand(node, 0) not in self.forms:
                todo.append(tensor_operand(node, 0))
                continue
            if node in self.constants.changed:
                raise NotAffine(node, "it is changed in place while others read it")
            self.forms[node] = self._step(node)
            todo.pop()
        return self.forms[target]

    def _step(self, node: Node) -> Form:
        rule = RULES.get(node.target)
        if rule is not None:
            return rule(self, node)
        if sorts_rows(node):
            return _stacked(self, node)
        raise NotAffine(node, f"{short(node)} is not affine")


def has_rule(node: Node) -> bool:
    """Whether there is a rule for an operation."""
    return node.target in RULES or sorts_rows(node)


# -- rules: operation -> form of its result ------------------------------------------------------------------------


def _identity(root: Node) -> Form:
    value = root.meta["val"]
    width = static_size(value.shape[-1]) if value.ndim else None
    return Form((Term(),), () if width is None else (width,))


def _pass(analysis: Analysis, node: Node) -> Form:
    return analysis.of(node)


def _cast(analysis: Analysis, node: Node) -> Form:
    target = node.meta["val"].dtype
    if not target.is_floating_point or torch.promote_types(target, analysis.working) != target:
        source = tensor_operand(node, 0).meta["val"].dtype
        if target != source:
            raise NotAffine(node, f"the cast from {source} to {target} loses precision")
    return analysis.of(node)


def _dropout(analysis: Analysis, node: Node) -> Form:
    if node.args[2] if len(node.args) > 2 else True:
        raise NotAffine(node, "dropout in training mode is random")
    return analysis.of(node)


def _linear(analysis: Analysis, node: Node) -> Form:
    weight = analysis.constant(node, node.args[1])
    form = analysis.contract(analysis.of(node), node, weight, node.args[1])
    bias = node.args[2] if len(node.args) > 2 else None
    return analysis.shift(form, analysis.constant(node, bias), analysis.constants.reads(bias), node)


def _linear_4bit(analysis: Analysis, node: Node) -> Form:
    """A linear layer whose weight, held in 4 bits, is a constant like any other."""
    place = BITS4[node.target]  # type: ignore[index]
    tensors = [analysis.constant(node, operand) for operand in node.args[1:place]]
    out_features, block_size, kind = node.args[place + 1 :]
    inputs = static_size(tensor_operand(node, 0).meta["val"].shape[-1])
    weight = dequantize(assemble(tensors, (out_features, inputs), analysis.constants.precision, kind, block_size))  # type: ignore[arg-type]
    form = analysis.contract(analysis.of(node), node, weight, node.args[1])
    return analysis.shift(
        form, analysis.constant(node, node.args[place]), analysis.constants.reads(node.args[place]), node
    )


def _addmm(analysis: Analysis, node: Node) -> Form:
    """`beta · added + alpha · x W`; what is added is a bias, or a value of the same input."""
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    added, weight = node.args[0], analysis.constant(node, node.args[2])
    product = analysis.contract(analysis.of(node, 1), node, weight.t(), node.args[2])
    product = analysis.scale(product, alpha, frozenset(), node) if alpha != 1 else product
    if isinstance(added, Node) and added in analysis.forms:
        return analysis.add(node, product, analysis.forms[added], float(beta))  # type: ignore[arg-type]
    value = analysis.constants.tensor(analysis.constant(node, added)) * float(beta)  # type: ignore[arg-type]
    return analysis.shift(product, value, analysis.constants.reads(added), node)


def _matmul(analysis: Analysis, node: Node) -> Form:
    form = analysis.of(node)
    weight = analysis.constant(node, node.args[1])
    if weight.ndim == 2:
        return analysis.contract(form, node, weight.t(), node.args[1])
    if weight.ndim == 3 and len(form.features) == 1:
        return _stacked(analysis, node)
    if weight.ndim > len(form.features):
        raise NotAffine(node, f"{short(node)} takes another matrix for every row")
    mapped = analysis.map_rows(form, node, lambda rows: rows @ weight, reads=analysis.constants.reads(node.args[1]))
    return replace(mapped, terms=tuple(replace(t, chain=(*t.chain, node)) for t in mapped.terms))


def _stacked(analysis: Analysis, node: Node) -> Form:
    """A product with another matrix of a stack for every group of rows."""
    product = grouped(node)
    if product is None or product.data not in analysis.forms:
        raise NotAffine(node, f"{short(node)} takes another matrix for every row")
    weight = analysis.constant(node, product.weight)
    weight = weight.transpose(1, 2) if product.inputs_first else weight
    return analysis.contract_stack(analysis.forms[product.data], node, weight, product)


def _einsum(analysis: Analysis, node: Node) -> Form:
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    varying = [place for place, operand in enumerate(operands) if operand in analysis.forms]
    if len(varying) != 1:
        raise NotAffine(node, f"einsum {equation!r} does not read the input once")
    place = varying[0]
    source = operands[place]
    assert isinstance(source, Node)
    form, ndim = analysis.forms[source], source.meta["val"].ndim
    product = grouped(node)
    if product is not None and product.data is source and len(form.features) == 1 and not form.channels_first:
        return _stacked(analysis, node)
    others = [operand for operand in operands if operand is not source]
    constants = [analysis.constant(node, operand) for operand in others]
    left, _, right = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    x, width = letters.pop(place), len(form.features)
    row_letters = x[: len(x) - width]
    if (
        ndim <= width
        or not row_letters
        or len(set(x.replace(".", ""))) != len(x.replace(".", ""))
        or not right.startswith(row_letters)
        or set(row_letters) & set("".join(letters))
        or "." in x[len(x) - width :]
    ):
        raise NotAffine(node, f"einsum {equation!r} mixes rows")

    def run(rows: Tensor) -> Tensor:
        laid = rows.reshape(rows.shape[0], *[1] * (ndim - width - 1), *form.features)
        return torch.einsum(equation, *constants[:place], laid, *constants[place:])

    results = [run(analysis.unit(form, term)) for term in form.terms]
    offset = None if form.offset is None else run(form.offset[None])
    keep = ndim - width
    some = results[0] if results else offset
    assert some is not None
    features = tuple(some.shape[keep:])
    reads = frozenset[str]().union(*(analysis.constants.reads(operand) for operand in others))
    terms = tuple(
        Term(t.down, r.reshape(r.shape[0], *features), None, (*t.chain, node), t.reads | reads)
        for t, r in zip(form.terms, results, strict=True)
    )
    return replace(form, terms=terms, features=features, offset=None if offset is None else offset.reshape(features))


def _scaled(analysis: Analysis, node: Node) -> Form:
    one, two = node.args[0], node.args[1]
    if one in analysis.constants:
        one, two = two, one
    if not isinstance(one, Node) or one not in analysis.forms:
        raise NotAffine(node, f"{short(node)} is not affine")
    factor = analysis.constant(node, two)
    return analysis.scale(analysis.forms[one], factor, analysis.constants.reads(two), node)


def _divided(analysis: Analysis, node: Node) -> Form:
    if "rounding_mode" in node.kwargs:
        raise NotAffine(node, "division with rounding")
    divisor = analysis.constant(node, node.args[1])
    factor = 1 / analysis.constants.tensor(divisor)
    return analysis.scale(analysis.of(node), factor, analysis.constants.reads(node.args[1]), node)


def _negated(analysis: Analysis, node: Node) -> Form:
    return analysis.scale(analysis.of(node), -1.0, frozenset(), node)


def _added(sign: int) -> Callable[[Analysis, Node], Form]:
    def rule(analysis: Analysis, node: Node) -> Form:
        alpha = sign * float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
        one, two = node.args[0], node.args[1]
        forms = analysis.forms
        if isinstance(one, Node) and isinstance(two, Node) and one in forms and two in forms:
            if node.meta["val"].shape != one.meta["val"].shape or node.meta["val"].shape != two.meta["val"].shape:
                raise NotAffine(node, f"{short(node)} broadcasts one value over the other")
            return analysis.add(node, forms[one], forms[two], alpha)
        if isinstance(one, Node) and one in forms:
            value = analysis.constant(node, two)
            value = analysis.constants.tensor(value) * alpha
            return analysis.shift(forms[one], value, analysis.constants.reads(two), node)
        if isinstance(two, Node) and two in forms:
            scaled = analysis.scale(forms[two], alpha, frozenset(), node) if alpha != 1 else forms[two]
            return analysis.shift(scaled, analysis.constant(node, one), analysis.constants.reads(one), node)
        raise NotAffine(node, f"{short(node)} is not affine")

    return rule


def _reshaped(analysis: Analysis, node: Node) -> Form:
    """A reshape keeps rows apart when the trailing sizes of its result multiply to one row's features."""
    form = analysis.of(node)
    if form.channels_first:
        raise NotAffine(node, f"{short(node)} mixes channels and places")
    size = math.prod(form.features)
    features: list[int] = []
    for length in reversed(node.meta["val"].shape):
        if features and math.prod(features) == size:
            break
        known = static_size(length)
        if known is None:
            raise NotAffine(node, f"{short(node)} mixes rows")
        features.insert(0, known)
    if math.prod(features) != size:
        raise NotAffine(node, f"{short(node)} mixes rows")
    shape = tuple(features)
    terms = tuple(
        replace(
            term,
            rows=None if term.rows is None else term.rows.reshape(-1, *shape),
            diagonal=None if term.diagonal is None else term.diagonal.reshape(shape),
        )
        for term in form.terms
    )
    offset = None if form.offset is None else form.offset.reshape(shape)
    return replace(form, terms=terms, features=shape, offset=offset)


def _moved(analysis: Analysis, node: Node) -> Form:
    """A transposition among one row's features."""
    form = analysis.of(node)
    ndim, width = node.meta["val"].ndim, len(form.features)
    if node.target is aten.transpose.int:
        touched = [dim % ndim for dim in _integers(node.args[1:3])]
    else:
        order = [dim % ndim for dim in _integers(node.args[1])]
        touched = [d for place, d in enumerate(order) if place != d]
    if form.channels_first or any(d < ndim - width for d in touched):
        raise NotAffine(node, f"{short(node)} moves rows")
    return analysis.map_rows(form, node, lambda rows: node.target(rows, *node.args[1:]))  # type: ignore[operator]


def _integers(value: Any) -> list[int]:
    return [int(item) for item in value]


def _sliced(analysis: Analysis, node: Node) -> Form:
    form = analysis.of(node)
    ndim, width = node.meta["val"].ndim, len(form.features)
    given: list[Any] = [*node.args[1:], *[0, None, None, 1][len(node.args) - 1 :]]
    dim, start, end, step = given
    assert isinstance(dim, int)
    if dim % ndim < ndim - width or form.channels_first:
        if start in (0, None) and (end is None or (isinstance(end, int) and end >= 2**62)) and step == 1:
            return form
        raise NotAffine(node, f"{short(node)} selects rows")
    return analysis.map_rows(form, node, lambda rows: aten.slice.Tensor(rows, *node.args[1:]))


def _padded(analysis: Analysis, node: Node) -> Form:
    form = analysis.of(node)
    padding = node.args[1]
    assert isinstance(padding, (list, tuple))
    filling = [value for value in node.args[2:] if value != "constant"]
    if len(padding) > 2 * len(form.features) or form.channels_first or any(filling):
        raise NotAffine(node, f"{short(node)} pads rows")
    return analysis.map_rows(form, node, lambda rows: aten.constant_pad_nd.default(rows, list(padding)))


def _joined(analysis: Analysis, node: Node) -> Form:
    """Concatenation along the last feature: every piece is padded to the whole width, then they are added."""
    pieces = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(pieces, (list, tuple))
    assert isinstance(dim, int)
    if dim % node.meta["val"].ndim != node.meta["val"].ndim - 1:
        raise NotAffine(node, "concatenation of rows")
    total, start, result = static_size(node.meta["val"].shape[-1]), 0, None
    if total is None:
        raise NotAffine(node, "concatenation of unknown width")
    for piece in pieces:
        if not isinstance(piece, Node) or piece not in analysis.forms:
            raise NotAffine(node, "concatenation with a value that does not come from the input")
        form = analysis.forms[piece]
        if len(form.features) != 1 or form.channels_first:
            raise NotAffine(node, "concatenation of values of different layouts")
        before, after = start, total - start - form.features[0]
        start += form.features[0]
        terms = tuple(
            replace(t, rows=torch.nn.functional.pad(analysis.unit(form, t), (before, after)), diagonal=None)
            for t in form.terms
        )
        offset = None if form.offset is None else torch.nn.functional.pad(form.offset, (before, after))
        padded = replace(form, terms=terms, features=(total,), offset=offset)
        result = padded if result is None else analysis.add(node, result, padded, 1)
    assert result is not None
    return result


def _zeros(analysis: Analysis, node: Node) -> Form:
    """Zeros of the input's rows: an affine value without terms."""
    width = static_size(node.meta["val"].shape[-1])
    if width is None:
        raise NotAffine(node, "zeros of unknown width")
    return Form((), (width,), torch.zeros(width, dtype=analysis.constants.precision, device=analysis.constants.device))


def _convolution(analysis: Analysis, node: Node) -> Form:
    form = analysis.of(node)
    weight = analysis.constant(node, node.args[1])
    bias_operand = node.args[2] if len(node.args) > 2 else None
    bias = analysis.constant(node, bias_operand)
    reads = analysis.constants.reads(node.args[1])
    dims = weight.ndim - 2
    geometry = [*node.args[3:], *[[1] * dims, [0] * dims, [1] * dims, 1][len(node.args[3:]) :]]
    shaped = None if bias is None else bias.reshape(-1, *[1] * dims)
    if not form.key:
        key = (node.target, *(tuple(g) if isinstance(g, (list, tuple)) else g for g in geometry))
        if form.terms != (Term(),) or form.offset is not None:
            raise NotAffine(node, "a convolution of something else than the input")
        term = Term(down=weight, chain=(node,), reads=reads)
        result = Form((term,), (weight.shape[0], *[1] * dims), None, frozenset(), key, channels_first=True)
    else:
        plain = (
            all(size == 1 for size in weight.shape[2:])
            and geometry[0] in ([1] * dims, 1)
            and not any(
                g for g in (geometry[1] if isinstance(geometry[1], (list, tuple)) else [geometry[1]]) if g != "valid"
            )
        )
        if not plain or not form.channels_first:
            raise NotAffine(node, "a second convolution that is not 1x1")
        result = analysis.map_rows(form, node, lambda rows: node.target(rows, weight, None, *geometry), reads=reads)  # type: ignore[operator]
        result = replace(result, terms=tuple(replace(t, chain=(*t.chain, node)) for t in result.terms))
    return analysis.shift(result, shaped, analysis.constants.reads(bias_operand), node)


def _embedding(analysis: Analysis, node: Node) -> Form:
    if node.args[1] is not analysis.root:
        raise NotAffine(node, "an embedding of something else than the input")
    table = analysis.constant(node, node.args[0])
    term = Term(down=table.t(), chain=(node,), reads=analysis.constants.reads(node.args[0]))
    return Form((term,), (table.shape[1],), key=("embedding",))


def sorts_rows(node: Node) -> bool:
    """Whether an operation also reads where each expert's rows end, which says nothing about the rows' values."""
    return str(node.target) in OFFSETS


SIZED = {  # operations that also take sizes of the input, which say nothing about its values
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unflatten.int,
}
ROWLESS = {aten.new_zeros.default, aten.zeros_like.default, aten.zeros.default}
RULES: dict[Any, Callable[[Analysis, Node], Form]] = {
    **dict.fromkeys(
        (
            aten.contiguous.default,
            aten.clone.default,
            aten.alias.default,
            aten.detach.default,
            aten.detach_.default,
            aten.lift_fresh_copy.default,
        ),
        _pass,
    ),
    **dict.fromkeys(
        (
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
            aten.to.other,
            aten._to_copy.default,
            aten.type_as.default,
        ),
        _cast,
    ),
    **dict.fromkeys((aten.dropout.default, aten.native_dropout.default, aten.feature_dropout.default), _dropout),
    aten.linear.default: _linear,
    **dict.fromkeys(BITS4, _linear_4bit),
    aten.addmm.default: _addmm,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _matmul),
    aten.einsum.default: _einsum,
    **dict.fromkeys((aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar), _scaled),
    **dict.fromkeys((aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar), _divided),
    aten.neg.default: _negated,
    **dict.fromkeys((aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar), _added(1)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub_.Tensor, aten.sub.Scalar), _added(-1)),
    **dict.fromkeys(
        (
            *SIZED,
            aten.flatten.using_ints,
            aten.unsqueeze.default,
            aten.squeeze.dim,
        ),
        _reshaped,
    ),
    **dict.fromkeys((aten.transpose.int, aten.permute.default), _moved),
    aten.slice.Tensor: _sliced,
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), _padded),
    aten.cat.default: _joined,
    **dict.fromkeys(ROWLESS, _zeros),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    aten.embedding.default: _embedding,
}
