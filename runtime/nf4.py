"""NF4 and FP4: matrices in 4 bits and one scale per block, byte for byte as bitsandbytes holds them.

A weight is read row by row in blocks. A block's scale is its largest magnitude; each weight becomes the code of the
nearest of 16 levels times that scale, two codes per byte, the first in the high nibble:

    W [any shape]   ->   packed uint8 [⌈n / 2⌉], absmax fp32 [⌈n / block_size⌉]

Double quantisation holds the scales themselves as 8-bit codes, in blocks of 256, beside the scale of each such block
and the mean of all. Source: Dettmers et al. 2023, arXiv 2305.14314, sections 2 and 3.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KINDS = ("nf4", "fp4")
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(sign * twelfths / 12 for sign in (1, -1) for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3))
SMALLEST_SCALE = 1e-38  # what a smaller scale counts as when weights are divided by it
CHUNK = 1 << 17  # weights at a time: what is made of them stays in a core's cache
SEARCH = tuple(1 - 0.02 * step for step in range(21))  # shares of a block's largest weight that are tried as its scale


@dataclass(frozen=True, slots=True)
class Nested:
    """The state of double-quantised scales: `scale = code · absmax[block] + offset`."""

    absmax: Tensor  # fp32 [⌈blocks / 256⌉]
    offset: Tensor  # fp32 []
    block_size: int = NESTED_BLOCK


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight in 4 bits; `absmax` holds the scales in fp32, or their 8-bit codes where there is a `nested` state."""

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the weight that was quantised
    kind: str = "nf4"
    block_size: int = 64
    nested: Nested | None = None

    def scales(self) -> Tensor:
        """The scale of every block, fp32."""
        if self.nested is None:
            return self.absmax
        return nested_scales(self.absmax, self.nested.absmax, self.nested.offset)

    @property
    def bits_per_weight(self) -> float:
        """Of the bytes held."""
        nested = [self.nested.absmax, self.nested.offset] if self.nested else []
        size_bytes = sum(t.numel() * t.element_size() for t in (self.packed, self.absmax, *nested))
        return 8 * size_bytes / math.prod(self.shape)


def _nested_code() -> Tensor:
    """The 256 levels of double-quantised scales, rising: decades of a shrinking number of equal steps, fp32."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


# Made on import: a tensor made on first use could be made, and kept, inside a trace without values.
LEVELS = {kind: torch.tensor(values, dtype=torch.float32) for kind, values in (("nf4", NF4), ("fp4", FP4))}
NESTED_CODE = _nested_code()
_BYTE = torch.arange(256)
_PAIRS = {kind: torch.stack([table[_BYTE >> 4], table[_BYTE & 15]], 1) for kind, table in LEVELS.items()}
# The code of the level nearest to each of 65,536 places between -1 and 1.
_NESTED_PLACES = torch.bucketize(
    torch.arange(65536, dtype=torch.float64) / 65535 * 2 - 1, (NESTED_CODE.double()[1:] + NESTED_CODE.double()[:-1]) / 2
).to(torch.uint8)


def levels(kind: str) -> Tensor:
    """The 16 levels by code, fp32."""
    return LEVELS[kind]


# -- from a weight to codes ---------------------------------------------------------------------------------------


def quantize(
    weight: Tensor, *, block_size: int = 64, kind: str = "nf4", double_quantise: bool = False, search: bool = False
) -> Quantised:
    """Hold a weight of fp32, bf16 or fp16 in 4 bits.

    With `search`, each block takes the scale, of several at or below its largest weight, with the least squared error.
    Raises `ValueError` for another type, an empty weight, one that is not finite, or an unknown kind or block size.
    """
    _check(weight, block_size, kind)
    blocks = -(-weight.numel() // block_size)
    if weight.device.type == "meta":
        packed = weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)
        absmax = weight.new_empty(blocks, dtype=torch.float32)
    else:
        flat = weight.detach().cpu().reshape(-1)
        packed, absmax = _codes(flat, block_size, kind, search)
        packed, absmax = packed.to(weight.device), absmax.to(weight.device)
    nested = None
    if double_quantise:
        absmax, nested = _double(absmax)
    return Quantised(packed, absmax, tuple(weight.shape), weight.dtype, kind, block_size, nested)


def _check(weight: Tensor, block_size: int, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"the kind is {kind!r}, not one of {', '.join(KINDS)}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"the block size is {block_size!r}, not one of {', '.join(map(str, BLOCK_SIZES))}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the weight is {weight.dtype}, not fp32, bf16 or fp16")
    if not weight.numel():
        raise ValueError(f"the weight is empty: {list(weight.shape)}")


def _codes(flat: Tensor, block_size: int, kind: str, search: bool) -> tuple[Tensor, Tensor]:
    packed = np.empty((flat.numel() + 1) // 2, np.uint8)
    absmax = np.empty(-(-flat.numel() // block_size), np.float32)
    whole = flat.numel() - flat.numel() % block_size
    size = max(CHUNK, block_size)
    work = partial(_chunk, flat, packed, absmax, block_size, kind, search)
    ranges = [(start, min(start + size, whole)) for start in range(0, whole, size)]
    if len(ranges) > 1 and torch.get_num_threads() > 1:
        shares = min(torch.get_num_threads(), len(ranges))
        with ThreadPoolExecutor(shares) as pool:
            for done in [pool.submit(work, ranges[share::shares]) for share in range(shares)]:
                done.result()
    else:
        work(ranges)
    if whole < flat.numel():
        _last(flat[whole:], packed[whole // 2 :], absmax[-1:], kind, search)
    bad = int((~np.isfinite(absmax)).sum())
    if bad:
        count = int((~torch.isfinite(flat)).sum())
        raise ValueError(f"{count} of its {flat.numel()} weights are infinite or NaN")
    return torch.from_numpy(packed), torch.from_numpy(absmax)


def _chunk(
    flat: Tensor,
    packed: NDArray[np.uint8],
    absmax: NDArray[np.float32],
    block_size: int,
    kind: str,
    search: bool,
    ranges: list[tuple[int, int]],
) -> None:
    """Codes and scales of whole blocks, in place."""
    bounds, order = _bounds(kind)
    for start, stop in ranges:
        rows = flat[start:stop].float().view(-1, block_size)
        values, scale = rows.numpy(), rows.abs().amax(1).numpy()  # NaN and infinity stay, and are refused in the end
        if search:
            scale = _searched(values, scale, kind)
        factor = np.float32(1) / np.maximum(scale, np.float32(SMALLEST_SCALE))
        absmax[start // block_size : stop // block_size] = scale
        packed[start // 2 : stop // 2] = _packed(_nearest(values * factor[:, None], bounds, order).reshape(-1))


def _last(flat: Tensor, packed: NDArray[np.uint8], absmax: NDArray[np.float32], kind: str, search: bool) -> None:
    """The block that is not full: its weights are divided by the scale, not multiplied by its reciprocal."""
    bounds, order = _bounds(kind)
    values = flat.float().numpy()[None]
    scale = np.maximum(np.abs(values).max(1), np.float32(SMALLEST_SCALE))
    if search:
        scale = _searched(values, scale, kind)
    absmax[:] = scale
    codes = _nearest(values / scale[:, None], bounds, order).reshape(-1)
    filler = _nearest(np.zeros(1, np.float32), bounds, order)  # an odd count is filled up with a zero
    packed[:] = _packed(np.concatenate([codes, filler]) if codes.size % 2 else codes)


@cache
def _bounds(kind: str) -> tuple[tuple[np.float32, ...], NDArray[np.uint8] | None]:
    """The 15 middles between the levels in rising order, and the code of each rank where it is not the rank itself."""
    ordered, order = levels(kind).sort(stable=True)
    middles = tuple(((ordered[:-1] + ordered[1:]) / 2).numpy())
    return middles, None if kind == "nf4" else order.numpy().astype(np.uint8)


def _nearest(
    scaled: NDArray[np.float32], bounds: tuple[np.float32, ...], order: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    """The code of the nearest level: how many middles lie below; a number on a middle belongs to the lower level."""
    rank = np.zeros(scaled.shape, np.uint8)
    above = np.empty(scaled.shape, np.bool_)
    for bound in bounds:
        np.greater(scaled, bound, out=above)
        np.add(rank, above.view(np.uint8), out=rank)
    return rank if order is None else order[rank]


def _packed(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two codes per byte; read as little-endian pairs, the first code is the low byte."""
    pairs = codes.view("<u2")
    return ((pairs << 4) | (pairs >> 8)).astype(np.uint8)


def _searched(values: NDArray[np.float32], largest: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """For each block, the scale with the least squared error."""
    bounds, order = _bounds(kind)
    table = levels(kind).numpy()
    best, least = largest.copy(), np.full(largest.shape, np.inf, np.float32)
    for share in SEARCH:
        scale = largest * np.float32(share)
        factor = np.float32(1) / np.maximum(scale, np.float32(SMALLEST_SCALE))
        restored = table[_nearest(values * factor[:, None], bounds, order)] * scale[:, None]
        error = np.square(restored - values).sum(1)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best


# -- scales -------------------------------------------------------------------------------------------------------


def _double(absmax: Tensor) -> tuple[Tensor, Nested]:
    """Scales -> their 8-bit codes, and what it takes to read them."""
    blocks = -(-absmax.numel() // NESTED_BLOCK)
    if absmax.device.type == "meta":
        nested = Nested(absmax.new_empty(blocks), absmax.new_empty(()))
        return absmax.new_empty(absmax.numel(), dtype=torch.uint8), nested
    offset = absmax.mean()
    centred = torch.nn.functional.pad(absmax - offset, (0, blocks * NESTED_BLOCK - absmax.numel()))
    largest = centred.view(blocks, NESTED_BLOCK).abs().amax(1)
    scaled = (centred.view(blocks, NESTED_BLOCK) * (1 / largest)[:, None]).reshape(-1)[: absmax.numel()]
    scaled = scaled.nan_to_num(nan=-1).clamp(-1, 1)  # where the reciprocal is infinite, as bitsandbytes has it
    place = ((scaled + 1) * 0.5 * 65535 + 0.5).int()  # bitsandbytes looks the nearest level up at 16 bits
    return _NESTED_PLACES[place.cpu().long()].to(absmax.device), Nested(largest, offset)


def nested_scales(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """Double-quantised scales as fp32."""
    values = NESTED_CODE.to(codes.device)[codes.int()]
    return values * absmax.repeat_interleave(NESTED_BLOCK)[: codes.numel()] + offset


# -- and back -----------------------------------------------------------------------------------------------------


def dequantize(it: Quantised, dtype: torch.dtype | None = None) -> Tensor:
    """The weight in its own type, or in another one: `level[code] · scale` in fp32, rounded once."""
    dtype = dtype or it.dtype
    if it.packed.device.type == "meta":
        return it.packed.new_empty(it.shape, dtype=dtype)
    numel = math.prod(it.shape)
    flat = dequantize_flat(it.packed, it.scales(), numel=numel, block_size=it.block_size, kind=it.kind, dtype=dtype)
    return flat.view(it.shape)


def dequantize_flat(
    packed: Tensor, absmax: Tensor, *, numel: int, block_size: int, kind: str, dtype: torch.dtype
) -> Tensor:
    """The weights [numel] of codes and fp32 scales."""
    pairs = _PAIRS[kind].to(packed.device)[packed.reshape(-1).int()].reshape(-1)[:numel]
    whole = numel - numel % block_size
    scaled = (pairs[:whole].view(-1, block_size) * absmax[: whole // block_size, None]).to(dtype).reshape(-1)
    if whole == numel:
        return scaled
    return torch.cat([scaled, (pairs[whole:] * absmax[-1]).to(dtype)])


def unpack(packed: Tensor, numel: int) -> Tensor:
    """The codes of a weight, one per byte."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], 1).reshape(-1)[:numel]


def pack(codes: Tensor) -> Tensor:
    """Codes, one per byte, two per byte; an odd count is filled up with the code 0."""
    padded = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    return (padded[::2] << 4) | padded[1::2]
