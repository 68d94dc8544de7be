"""Two tensors of one name -> whether a bit changed, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.text import tensor_type

CHUNK = 1 << 22  # numbers compared at a time, so that memory stays small beside a large tensor
SMALL = 512  # matrices up to this many rows or columns have all their singular values computed
SKETCH = 256  # larger ones as many, which are all that count where the change has a low rank
CAPTURED = 1 - 1e-6  # of the squared norm, for a sketch to stand for the matrix


@dataclass(frozen=True, slots=True)
class ChangedTensor:
    """A tensor whose bits changed under the same name.

    With Δ = after - before: `largest` is max |Δ|, `relative` is ‖Δ‖ / ‖before‖ (Frobenius), `share` is the share of the
    numbers that changed, and `effective_rank` is exp(-Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σ σⱼ over the singular values of Δ as
    a matrix of its first dimension by the others (Roy and Vetterli 2007). All are None when the shape or the type
    changed or when there are no values to compare; the rank also for vectors, for numbers that are not finite, and for
    large matrices whose change is not of low rank.
    """

    name: str
    before: str
    after: str
    largest: float | None = None
    relative: float | None = None
    share: float | None = None
    effective_rank: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "before": self.before,
            "after": self.after,
            "largest_change": _finite(self.largest),
            "relative_change": _finite(self.relative),
            "share_changed": self.share,
            "effective_rank": self.effective_rank,
        }


def changed_tensors(names: Iterable[str], old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> list[ChangedTensor]:
    """What changed among the tensors of both sides, in the order of `names`."""
    return [
        _change(name, old[name], new[name]) for name in names if name in old and not same_bits(old[name], new[name])
    ]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape, one type and the same bits; the same memory is not read."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if "meta" in (one.device.type, other.device.type) or not one.numel():
        return one.device.type == other.device.type or not one.numel()
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    return all(
        torch.equal(left.view(torch.uint8), right.to(left.device).view(torch.uint8))
        for left, right in _parts(one, other)
    )


def singular_values(one: Tensor, other: Tensor) -> Tensor | None:
    """Those of the change as a matrix [first dimension, others], largest first; None where they are not to be had."""
    if one.dim() < 2 or min(one.shape[0], math.prod(one.shape[1:])) < 1 or one.is_complex():
        return None
    change = (other.detach().float() - one.detach().float()).flatten(1)
    if not change.isfinite().all():
        return None
    if min(change.shape) > SMALL:
        generator = torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(change @ torch.randn(change.shape[1], SKETCH, generator=generator))
        sketch = basis.t() @ change
        if float(sketch.double().square().sum()) < CAPTURED * float(change.double().square().sum()):
            return None
        change = sketch
    values: Tensor = torch.linalg.svdvals(change.double())
    return values


def _change(name: str, one: Tensor, other: Tensor) -> ChangedTensor:
    kinds = tensor_type(one), tensor_type(other)
    if kinds[0] != kinds[1] or "meta" in (one.device.type, other.device.type):
        return ChangedTensor(name, *kinds)
    precise = torch.complex128 if one.is_complex() else torch.float64
    largest = change = size = 0.0
    moved = 0
    for left, right in _parts(one, other):
        was, now = left.to(precise), right.to(left.device, precise)
        delta = now - was
        top = float(delta.abs().max())
        largest = top if math.isnan(top) or top > largest else largest
        change += float(delta.abs().square().sum())
        size += float(was.abs().square().sum())
        moved += int((now != was).sum())
    relative = math.sqrt(change / size) if size else (math.inf if change else 0.0)
    return ChangedTensor(name, *kinds, largest, relative, moved / one.numel(), _effective_rank(one, other))


def _effective_rank(one: Tensor, other: Tensor) -> float | None:
    values = singular_values(one, other) if one.is_floating_point() else None
    if values is None or not float(values.sum()):
        return None
    parts = values / values.sum()
    return float(torch.special.entr(parts).sum().exp())


def _parts(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    flat = one.detach().reshape(-1), other.detach().reshape(-1)
    return zip(flat[0].split(CHUNK), flat[1].split(CHUNK), strict=True)


def _finite(value: float | None) -> float | str | None:
    """A number for JSON, which has no infinity and no NaN."""
    return value if value is None or math.isfinite(value) else str(value)
