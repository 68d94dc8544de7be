"""Weights in 4 bits: NF4 and FP4, byte for byte what bitsandbytes stores, without bitsandbytes.

Blocks of `block_size` consecutive weights of the row-major tensor share one scale, the largest magnitude of the block:

    code_i = argmin_c |w_i / absmax - level_c|          w'_i = level_{code_i} · absmax

Two codes share a byte, the first in the high nibble. Double quantisation keeps the scales themselves in 8 bits.
Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("nf4", "fp4")
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by code: two exponent bits, one of mantissa
FP4 = tuple((torch.tensor((*_FP4_TWELFTHS, *(-level for level in _FP4_TWELFTHS))) / 12).tolist())
BLOCK_SIZES = tuple(2**power for power in range(4, 13))
NESTED_BLOCK = 256


def _dynamic_map() -> Tensor:
    """The 256 values of bitsandbytes' signed 8-bit type: decades from 1e-6 to 1, the larger the finer divided."""
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        means = (edges[:-1] + edges[1:]) / 2
        values += (10 ** (power - 6) * means).tolist() + (-(10 ** (power - 6)) * means).tolist()
    return torch.tensor(sorted(values))


NESTED_CODE = _dynamic_map()


@dataclass(frozen=True, slots=True)
class Nested:
    """What turns 8-bit codes of scales back into scales."""

    absmax: Tensor  # fp32 [ceil(blocks / block_size)]
    offset: Tensor  # fp32 [], the mean of the scales
    block_size: int = NESTED_BLOCK


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight in 4 bits."""

    packed: Tensor  # uint8 [ceil(n / 2)], the first weight in the high nibble
    absmax: Tensor  # fp32 [ceil(n / block_size)], or uint8 codes of the scales when `nested`
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the weight that was quantised
    kind: str = "nf4"
    block_size: int = 64
    nested: Nested | None = None

    def scales(self) -> Tensor:
        """The fp32 scale of each block, double quantisation resolved."""
        if self.nested is None:
            return self.absmax
        steps = self.nested.absmax.repeat_interleave(self.nested.block_size)[: self.absmax.numel()]
        return NESTED_CODE.to(self.absmax.device)[self.absmax.long()] * steps + self.nested.offset

    @property
    def bits_per_weight(self) -> float:
        """Bits of all that is kept, over the number of weights."""
        held = [self.packed, self.absmax, *([self.nested.absmax, self.nested.offset] if self.nested else [])]
        return 8 * sum(tensor.nbytes for tensor in held) / torch.Size(self.shape).numel()


def levels(kind: str) -> Tensor:
    """The value of each of the 16 codes, fp32."""
    return torch.tensor({"nf4": NF4, "fp4": FP4}[kind])


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high nibble; an odd last code leaves a low nibble of 0."""
    flat = codes.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, flat.numel() % 2))
    return (padded[::2] << 4) | padded[1::2]


def unpack(packed: Tensor, numel: int) -> Tensor:
    """The codes, uint8 [numel]."""
    flat = packed.reshape(-1)
    return torch.stack((flat >> 4, flat & 15), dim=-1).reshape(-1)[:numel]


def quantize(
    weight: Tensor, *, block_size: int = 64, kind: str = "nf4", double_quantise: bool = False
) -> Quantised:
    """Quantise a floating-point tensor of any shape to 4 bits."""
    flat = weight.detach().reshape(-1).float()
    count, tail = flat.numel(), flat.numel() % block_size
    full = flat[: count - tail].reshape(-1, block_size)
    absmax = full.abs().amax(dim=-1)
    scaled = (full * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).reshape(-1)
    if tail:
        largest = flat[count - tail :].abs().max().clamp(min=1e-38)
        absmax = torch.cat([absmax, largest[None]])
        scaled = torch.cat([scaled, (flat[count - tail :] / largest).clamp(-1, 1)])
    if count % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    table = levels(kind).to(flat.device)
    order = torch.argsort(table)
    codes = torch.bucketize(scaled, (table[order[:-1]] + table[order[1:]]) / 2, out_int32=True)
    packed = pack(order[codes])
    if not double_quantise:
        return Quantised(packed, absmax, tuple(weight.shape), weight.dtype, kind, block_size)
    offset = absmax.mean()
    nested_codes, nested_absmax = _quantise_scales(absmax - offset)
    nested = Nested(nested_absmax, offset)
    return Quantised(packed, nested_codes, tuple(weight.shape), weight.dtype, kind, block_size, nested)


def _quantise_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    blocks = torch.nn.functional.pad(scales, (0, -scales.numel() % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(dim=-1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    code = NESTED_CODE.to(scales.device)
    codes = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8)
    return codes.reshape(-1)[: scales.numel()], absmax


def dequantize(it: Quantised, dtype: torch.dtype | None = None) -> Tensor:
    """The weight that 4 bits stand for, in `dtype` (default: the type of the weight that was quantised)."""
    dtype = dtype or it.dtype
    if it.packed.is_meta:
        return torch.empty(it.shape, dtype=dtype, device="meta")
    numel = torch.Size(it.shape).numel()
    flat = dequantize_flat(
        it.packed, it.scales(), numel=numel, block_size=it.block_size, kind=it.kind, dtype=dtype
    )
    return flat.reshape(it.shape)


def dequantize_flat(
    packed: Tensor, absmax: Tensor, *, numel: int, block_size: int, kind: str, dtype: torch.dtype
) -> Tensor:
    """`level[code] · absmax` in fp32, rounded once to `dtype`; flat [numel]."""
    values = levels(kind).to(packed.device)[unpack(packed, numel).int()]
    full = numel - numel % block_size
    head = (values[:full].reshape(-1, block_size) * absmax[: full // block_size, None]).reshape(-1)
    if full != numel:
        head = torch.cat([head, values[full:] * absmax[full // block_size]])
    return head.to(dtype)
