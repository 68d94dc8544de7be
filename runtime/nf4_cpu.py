"""Quantising to 4 bits quickly on the CPU: counting thresholds over pieces of the weight that stay in the cache.

The code of a value is the number of thresholds below it. Fifteen comparisons of a whole piece, each a vector
instruction over 16 values, are many times faster than a binary search per value. These functions run outside the
interpreter's lock, so that as many stretches of the weight are worked on at a time as torch has threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.nf4_tables import thresholds

PIECE = 1 << 15  # values compared at a time: more, and torch would start threads inside ours
STRETCH = 32 * PIECE  # weights one thread takes at a time
Array = NDArray[Any]


class Coder:
    """Finds the codes of scaled values; keeps its buffer, so each thread has its own."""

    def __init__(self, kind: str) -> None:
        bounds, order = thresholds(kind)
        self._bounds = np.array(bounds, dtype=np.float32)[:, None]
        self._first = np.uint8(order[0])
        self._steps = np.diff(np.array(order, dtype=np.uint8))[:, None]  # what a code grows by at each threshold
        self._counts = bool((self._steps == 1).all())  # the code itself counts thresholds
        self._room = np.empty((len(bounds), PIECE), dtype=np.bool_)

    def find(self, scaled: Array, codes: Array) -> None:
        """Write the codes of at most PIECE fp32 values into `codes` (uint8), both flat."""
        above = self._room[:, : scaled.size]
        np.greater(scaled, self._bounds, out=above)
        grown = above.view(np.uint8)
        if not self._counts:
            np.multiply(grown, self._steps, out=grown)
        np.add.reduce(grown, axis=0, out=codes)
        if self._first:
            np.add(codes, self._first, out=codes)

    def of(self, scaled: Tensor) -> Tensor:
        """The codes of at most PIECE fp32 values, in their shape."""
        codes = torch.empty(scaled.shape, dtype=torch.uint8)
        self.find(scaled.reshape(-1).numpy(), codes.view(-1).numpy())
        return codes


def join(codes: Array, packed: Array) -> None:
    """Write pairs of codes as bytes, the first of each pair in the high nibble; `codes` is overwritten."""
    pairs = codes.view("<u2")
    np.multiply(pairs, np.uint16(0x1001), out=pairs)  # 0x0S0F becomes 0xFS0F
    np.right_shift(pairs, np.uint16(8), out=pairs)
    np.copyto(packed, pairs, casting="unsafe")


def quantise(flat: Tensor, block_size: int, kind: str, packed: Tensor, absmax: Tensor) -> None:
    """Quantise whole blocks into `packed` and `absmax`."""

    def work(start: int) -> None:
        values = flat[start : start + STRETCH].float()
        count = values.numel()
        largest = absmax[start // block_size :][: count // block_size]
        codes = np.empty(count, dtype=np.uint8)
        scaled = torch.empty(min(count, PIECE)).view(-1, block_size)
        coder = Coder(kind)
        pieces = values.view(-1, block_size).split(len(scaled))
        for piece, most in zip(pieces, largest.split(len(scaled)), strict=True):
            torch.amax(torch.abs(piece, out=scaled[: len(piece)]), dim=-1, out=most)
        factors = largest.clamp(min=1e-38).reciprocal_()[:, None].split(len(scaled))
        for index, (piece, factor) in enumerate(zip(pieces, factors, strict=True)):
            target = torch.mul(piece, factor, out=scaled[: len(piece)])
            coder.find(target.view(-1).numpy(), codes[index * PIECE :][: piece.numel()])
        join(codes, packed[start // 2 :][: count // 2].numpy())

    share(work, range(0, flat.numel(), STRETCH))


def share(work: Callable[[int], None], starts: range) -> None:
    """Do the work from each start, in as many threads as torch uses."""
    workers = min(torch.get_num_threads(), len(starts))
    if workers < 2:
        for start in starts:
            work(start)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, starts):
            pass


def dequantise(packed: Tensor, absmax: Tensor, block_size: int, pairs: Tensor, flat: Tensor) -> None:
    """Write the values of all codes, times their block's scale, into `flat`; `pairs` holds two fp32 values per byte."""
    full = flat.numel() - flat.numel() % block_size

    def work(start: int) -> None:
        for first in range(start, min(start + STRETCH, full), PIECE):
            last = min(first + PIECE, full)
            values = pairs.index_select(0, packed[first // 2 : last // 2].int()).view(torch.float32)
            scales = absmax[first // block_size : last // block_size, None]
            rows = values.view(-1, block_size)
            flat[first:last].copy_(torch.mul(rows, scales, out=rows).view(-1))

    share(work, range(0, full, STRETCH))
    if full != flat.numel():
        values = pairs[packed[full // 2 :].int()].view(torch.float32)
        flat[full:] = values[: flat.numel() - full] * absmax[-1]
