"""Scales that lose less than the largest magnitude of a block, in the same 4-bit format.

A block's largest weight need not be met exactly: a smaller scale spends the 16 levels where most weights are, a larger
one brings the largest weight to another level than the last. Each scale f · absmax of a grid gives codes c, and these
codes have one scale that is best for them, in closed form:

    s = <w, level_c> / |level_c|²          |w - s level_c|² = |w|² - <w, level_c>² / |level_c|²
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from runtime.nf4_cpu import SMALL, STRETCH, Coder, share
from runtime.nf4_tables import levels, nearest

_FACTORS = tuple(percent / 100 for percent in range(76, 137, 4))
_AT_ONCE = 1 << 24  # weights, where there is no cache to stay in
_Find = Callable[[Tensor], Tensor]


def scales(flat: Tensor, absmax: Tensor, block_size: int, kind: str) -> Tensor:
    """The best scale found for each block; none loses more than `absmax` does."""
    table, best = levels(kind).to(flat.device), torch.empty_like(absmax)

    def improve(rows: Tensor, first: int, find: _Find) -> None:
        largest = absmax[first : first + len(rows)]
        unit = rows / largest.clamp(min=1e-38)[:, None]  # no square overflows
        best[first : first + len(rows)] = largest * _factors(unit, table, find)

    _each(flat, block_size, kind, improve)
    return best


def codes(flat: Tensor, scale: Tensor, block_size: int, kind: str) -> Tensor:
    """The nearest code of each weight for its block's scale, uint8 [n]; the code of 0 where that is not positive."""
    found = torch.empty(len(scale), block_size, dtype=torch.uint8, device=flat.device)

    def encode(rows: Tensor, first: int, find: _Find) -> None:
        inverse = torch.where(scale > 0, scale.clamp(min=1e-38).reciprocal(), 0)[first : first + len(rows), None]
        found[first : first + len(rows)] = find(rows * inverse)

    _each(flat, block_size, kind, encode)
    return found.view(-1)[: flat.numel()]


def _each(flat: Tensor, block_size: int, kind: str, do: Callable[[Tensor, int, _Find], None]) -> None:
    """Call `do` with fp32 blocks [rows, block_size], the first one's number, and what finds codes of scaled blocks."""
    on_cpu = flat.device.type == "cpu"
    stretch, piece = (STRETCH, SMALL) if on_cpu else (_AT_ONCE, _AT_ONCE)

    def work(starts: Iterator[int]) -> None:
        find = Coder(kind, piece).of if on_cpu else lambda scaled: nearest(scaled, kind)
        step = piece // block_size
        for start in starts:
            values = flat[start : start + stretch].float()
            rows = torch.nn.functional.pad(values, (0, -len(values) % block_size)).view(-1, block_size)
            for first in range(0, len(rows), step):
                do(rows[first : first + step], start // block_size + first, find)

    starts = range(0, flat.numel(), stretch)
    if on_cpu:
        share(work, starts)
    else:
        work(iter(starts))


def _factors(unit: Tensor, table: Tensor, find: _Find) -> Tensor:
    """What to multiply the largest magnitude of each block by; `unit` is divided by it."""
    least = (unit - _values(find(unit), table)).square_().sum(dim=1)
    square, best = unit.square().sum(dim=1), torch.ones_like(least)
    for factor in _FACTORS:
        level = _values(find(unit * (1 / factor)), table)
        product, length = (unit * level).sum(dim=1), level.square().sum(dim=1).clamp(min=1e-30)
        error = square - product.square() / length
        better = error < least * (1 - 1e-6)  # more than rounding of the sums
        least, best = torch.where(better, error, least), torch.where(better, product / length, best)
    return best


def _values(codes: Tensor, table: Tensor) -> Tensor:
    return table.index_select(0, codes.view(-1).int()).view(codes.shape)
