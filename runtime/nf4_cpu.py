"""4-bit weights quickly on the CPU: counting thresholds over pieces of the weight that stay in the cache.

The code of a value is the number of thresholds below it. Fifteen comparisons of a whole piece, each a vector
instruction over 16 values, are many times faster than a binary search per value. NumPy's functions run them outside the
interpreter's lock, in as many threads as torch has. Pieces are so large because a thread that waits for the lock
between two calls sleeps longer than a short call takes.
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

PIECE = 48 << 12  # values compared at a time; a multiple of every block size, as the next two are
SMALL = 7 << 12  # values for torch at a time: from 32,768 on, it would start threads inside ours
STRETCH = 8 * SMALL  # weights that one thread takes at a time when it works in small pieces
Array = NDArray[Any]


class Coder:
    """Finds the codes of scaled values; keeps its buffer, so each thread has its own."""

    def __init__(self, kind: str, size: int) -> None:
        bounds, order = thresholds(kind)
        self._bounds = np.array(bounds, dtype=np.float32)[:, None]
        self._first = np.uint8(order[0])
        self._steps = np.diff(np.array(order, dtype=np.uint8))[:, None]  # what a code grows by at each threshold
        self._counts = bool((self._steps == 1).all())  # the code itself counts thresholds
        self._room = np.empty((len(bounds), size), dtype=np.bool_)

    def find(self, scaled: Array, codes: Array) -> None:
        """Write the codes of at most `size` fp32 values into `codes` (uint8), both flat."""
        above = self._room[:, : scaled.size]
        np.greater(scaled, self._bounds, out=above)
        grown = above.view(np.uint8)
        if not self._counts:
            np.multiply(grown, self._steps, out=grown)
        np.add.reduce(grown, axis=0, out=codes)
        if self._first:
            np.add(codes, self._first, out=codes)

    def of(self, scaled: Tensor) -> Tensor:
        """The codes of at most `size` fp32 values, in their shape."""
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
    rows = flat.view(-1, block_size)
    absmax.copy_(torch.maximum(rows.amax(dim=-1), rows.amin(dim=-1).neg_()).abs_())  # abs: no scale of -0
    factors = absmax.clamp(min=1e-38).reciprocal_()[:, None].numpy()
    values, size, together = _array(rows), min(PIECE, flat.numel()), packed.numpy()

    def work(starts: Iterator[int]) -> None:
        coder, codes = Coder(kind, size), np.empty(size, dtype=np.uint8)
        scaled = np.empty((size // block_size, block_size), dtype=np.float32)
        for start in starts:
            blocks = slice(start // block_size, (start + size) // block_size)
            target = scaled[: len(factors[blocks])]
            with np.errstate(invalid="ignore"):  # infinities are the caller's to refuse
                np.multiply(_floats(values[blocks], target), factors[blocks], out=target)
            coder.find(target.reshape(-1), codes[: target.size])
            join(codes[: target.size], together[start // 2 :][: target.size // 2])

    share(work, range(0, flat.numel(), PIECE))


def _array(tensor: Tensor) -> Array:
    """As NumPy sees it: NumPy has no bf16, so that its bits stand for it."""
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _floats(values: Array, room: Array) -> Array:
    """fp32 values, in `room` where they have to be converted."""
    if values.dtype == np.float32:
        return values
    if values.dtype == np.uint16:  # bf16 is the upper half of fp32
        bits = room.view(np.uint32)
        np.copyto(bits, values)
        np.left_shift(bits, np.uint32(16), out=bits)
    else:
        np.copyto(room, values)
    return room


def dequantise(packed: Tensor, absmax: Tensor, block_size: int, pairs: Tensor, flat: Tensor) -> None:
    """Write the values of all codes, times their block's scale, into `flat`; `pairs` holds two fp32 values per byte."""
    full = flat.numel() - flat.numel() % block_size

    def work(starts: Iterator[int]) -> None:
        room, places = torch.empty(SMALL // 2, dtype=torch.int64), torch.empty(SMALL // 2, dtype=torch.int32)
        for start in starts:
            for first in range(start, min(start + STRETCH, full), SMALL):
                last = min(first + SMALL, full)
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
    inference = torch.is_inference_mode_enabled()  # a thread starts without it, and may not write what it made

    def in_mode() -> None:
        with torch.inference_mode(inference):
            work(left)

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(in_mode) for _ in range(workers)]:
            done.result()
