"""Quantising to 4 bits quickly on the CPU: counting thresholds over pieces of the weight that stay in the cache.

The code of a value is the number of thresholds below it. Fifteen comparisons of a whole piece, each a vector
instruction over 16 values, are many times faster than a binary search per value. These functions run outside the
interpreter's lock, so that as many stretches of the weight are worked on at a time as torch has threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.nf4_tables import thresholds

PIECE = 7 << 12  # values compared at a time; from 32,768 on, torch would start threads inside ours
STRETCH = 8 * PIECE  # weights one thread takes at a time
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
    bytes_, largest = packed.numpy(), absmax.numpy()
    rows = PIECE // block_size

    def work(starts: Iterator[int]) -> None:
        coder, codes = Coder(kind), np.empty(STRETCH, dtype=np.uint8)
        scaled, factors = torch.empty(rows, block_size), torch.empty(rows, 1)
        scaled_array, factors_array = scaled.view(-1).numpy(), factors.view(-1).numpy()
        for start in starts:
            stretch = flat[start : start + STRETCH].view(-1, block_size)
            count, block = stretch.numel(), start // block_size
            pieces = zip(stretch.split(rows), absmax[block : block + len(stretch)].split(rows), strict=True)
            for index, (piece, most) in enumerate(pieces):
                size, height = piece.numel(), len(piece)
                values = piece if piece.dtype == torch.float32 else piece.float()
                whole = scaled if height == rows else scaled[:height]
                torch.amax(torch.abs(values, out=whole), dim=-1, out=most)
                inverse = factors_array[:height]
                np.maximum(largest[block + index * rows :][:height], np.float32(1e-38), out=inverse)
                np.reciprocal(inverse, out=inverse)
                torch.mul(values, factors[:height], out=whole)
                coder.find(scaled_array[:size], codes[index * PIECE :][:size])
            join(codes[:count], bytes_[start // 2 :][: count // 2])

    share(work, range(0, flat.numel(), STRETCH))


def dequantise(packed: Tensor, absmax: Tensor, block_size: int, pairs: Tensor, flat: Tensor) -> None:
    """Write the values of all codes, times their block's scale, into `flat`; `pairs` holds two fp32 values per byte."""
    full = flat.numel() - flat.numel() % block_size

    def work(starts: Iterator[int]) -> None:
        room, places = torch.empty(PIECE // 2, dtype=torch.int64), torch.empty(PIECE // 2, dtype=torch.int32)
        for start in starts:
            for first in range(start, min(start + STRETCH, full), PIECE):
                last = min(first + PIECE, full)
                place = places[: (last - first) // 2].copy_(packed[first // 2 : last // 2])
                found = torch.index_select(pairs, 0, place, out=room[: len(place)]).view(torch.float32)
                rows, scales = found.view(-1, block_size), absmax[first // block_size : last // block_size, None]
                target = flat[first:last].view(-1, block_size)
                if flat.dtype == torch.float32:
                    torch.mul(rows, scales, out=target)
                else:
                    target.copy_(rows.mul_(scales))

    share(work, range(0, full, STRETCH))
    if full != flat.numel():
        values = pairs[packed[full // 2 :].int()].view(torch.float32)
        flat[full:] = values[: flat.numel() - full] * absmax[-1]


def share(work: Callable[[Iterator[int]], None], starts: range) -> None:
    """Do the work from each start, in as many threads as torch uses: `work` takes starts until there are no more."""
    workers, left = min(torch.get_num_threads(), len(starts)), iter(starts)
    if workers < 2:
        work(left)
        return
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work, left) for _ in range(workers)]:
            done.result()
