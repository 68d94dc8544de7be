"""What a merge does where the weight is held in 4 bits: dequantise, requantise, or leave the update beside it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rewriter.edit import Edit
from rewriter.errors import LawError, RewriteError
from rewriter.quantised import assemble
from rewriter.region import Fold
from rewriter.view import BITS4, weight_of
from runtime.nf4 import Quantised, dequantize, quantize

Policy = Literal["dequantise", "keep", "requantise"]
POLICIES: tuple[str, ...] = get_args(Policy)
LARGEST_LOSS = 0.5  # of an update: what requantising may change of it and still be called a merge

aten = torch.ops.aten


def is_4bit(site: Fold) -> bool:
    return site.base.target in BITS4


def base_weight(site: Fold) -> Quantised:
    """The 4-bit weight of a region's base operation, as it was when the region was found."""
    values = site.constants.with_values()
    place = BITS4[site.base.target]  # type: ignore[index]
    tensors = [values.value(operand) for operand in site.base.args[1:place]]
    out_features, block_size, kind = site.base.args[place + 1 :]
    inputs = int(site.base.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
    shape = (out_features, inputs)
    return assemble(tensors, shape, site.constants.precision, kind, block_size)  # type: ignore[arg-type]


def fold_4bit(edit: Edit, site: Fold, weight: Tensor, *, requantise: bool, lossy: bool) -> dict[str, float]:
    """Put the folded weight [o, i] in the place of a 4-bit one; returns its notes for the report.

        packed, absmax   ->   weight, rounded once to the type the layer computes in
        packed, absmax   ->   packed', absmax' of the folded weight, in the same format

    The error is relative to the update, because one that is small against the weight can be as large as the adapter.
    Raises `LawError` when requantising would lose more than half of an update, unless `lossy`.
    """
    before = base_weight(site)
    update = weight - dequantize(before, weight.dtype)
    if requantise:
        after = _requantised(site, weight, before) if update.any() else before
        error = _relative(dequantize(after, torch.float32) - weight, update)
        if error > LARGEST_LOSS and not lossy:
            raise LawError(
                f"{site.path}: holding the merged weight in 4 bits again would lose {error:.0%} of the update",
                evidence=[
                    f"the update is {_relative(update, weight):.2%} of the weight, less than the steps of the format"
                ],
                fix="Merge with --nf4 dequantise, leave the update beside the weight with --nf4 keep, or force it with "
                "--lossy.",
            )
        _store(edit, site, after)
    else:
        value = weight.to(site.base.meta["val"].dtype)
        error = _relative(value.to(weight.dtype) - weight, update)
        _release(edit, site, value)
    bits = after.bits_per_weight if requantise else 8.0 * value.element_size()
    return {"update": _relative(update, weight - update), "error_of_update": error, "bits_per_weight": bits}


def _requantised(site: Fold, weight: Tensor, before: Quantised) -> Quantised:
    try:
        return quantize(
            weight.float().contiguous(),
            block_size=before.block_size,
            kind=before.kind,
            double_quantise=before.nested is not None,
        )
    except ValueError as error:
        raise RewriteError(
            f"{site.path} cannot be held in 4 bits again: {error}", fix="Repair it, or merge with --nf4 dequantise."
        ) from None


def _store(edit: Edit, site: Fold, quantised: Quantised) -> None:
    nested = quantised.nested
    values = [quantised.packed, quantised.absmax, *([nested.absmax, nested.offset] if nested else [])]
    for operand, value in zip(site.base.args[1:], values, strict=False):
        held = weight_of(edit.program, operand)
        assert held is not None
        if held[0] in edit.originals and not torch.equal(edit.program.tensor(held[0]), value):
            raise RewriteError(
                f"{site.path} is applied twice, with updates that differ", fix="Merge with --nf4 dequantise."
            )
        edit.set_value(held[0], value)


def _release(edit: Edit, site: Fold, value: Tensor) -> None:
    """Let the base operation read a plain weight; the codes go with their last reader."""
    name = site.weight.removesuffix("_packed")
    while name in edit.program.tensors and not torch.equal(edit.program.tensor(name), value):
        name += "_merged"  # another call of the layer, with an update of its own
    if name in edit.program.tensors:
        made = edit.program.placeholder(name)
    else:
        made = edit.hold(name, torch.nn.Parameter(value.contiguous(), requires_grad=False))
    bias = site.base.args[BITS4[site.base.target]]  # type: ignore[index]
    edit.turn(site.base, aten.linear.default, site.base.args[0], made, *([] if bias is None else [bias]))


def _relative(difference: Tensor, whole: Tensor) -> float:
    size = float(whole.norm())
    return float(difference.norm()) / size if size else 0.0
