"""4-bit linear layers on a GPU in Triton: few rows at a time by a fused kernel, weights dequantised for the rest."""

from __future__ import annotations

import functools

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

from runtime.nf4 import levels

LARGEST_ROWS = 64  # above, a product of dequantised weights by the vendor's library reads the weight no more often
_TYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _linear_kernel(  # type: ignore[no-untyped-def]
    x, packed, absmax, table, bias, y, rows, outputs, width, block_size,
    has_bias: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_BYTES: tl.constexpr,
):  # fmt: skip
    """One tile of y: a byte holds the weights of an even and the next odd column, which share a scale."""
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    output = tl.program_id(1) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    start = output.to(tl.int64)[:, None] * width
    total = tl.zeros((TILE_ROWS, TILE_OUTPUTS), dtype=tl.float32)
    for first in range(0, width // 2, TILE_BYTES):
        column = first + tl.arange(0, TILE_BYTES)
        inside = column < width // 2
        weight = start + 2 * column[None, :]
        stored = (output < outputs)[:, None] & inside[None, :]
        byte = tl.load(packed + weight // 2, mask=stored, other=0).to(tl.int32)
        scale = tl.load(absmax + weight // block_size, mask=stored, other=0.0)
        even = (tl.load(table + (byte >> 4)) * scale).to(x.dtype.element_ty)
        odd = (tl.load(table + (byte & 15)) * scale).to(x.dtype.element_ty)
        place = x + row.to(tl.int64)[:, None] * width + 2 * column[None, :]
        given = (row < rows)[:, None] & inside[None, :]
        total = tl.dot(tl.load(place, mask=given, other=0.0), tl.trans(even), total, input_precision="ieee")
        total = tl.dot(tl.load(place + 1, mask=given, other=0.0), tl.trans(odd), total, input_precision="ieee")
    if has_bias:
        total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    target = y + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (output < outputs)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _dequantise_kernel(packed, absmax, table, weight, count, block_size, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = place < count
    byte = tl.load(packed + place // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(place % 2 == 0, byte >> 4, byte & 15)
    value = tl.load(table + code) * tl.load(absmax + place // block_size, mask=inside, other=0.0)
    tl.store(weight + place, value.to(weight.dtype.element_ty), mask=inside)


@functools.cache
def _table(kind: str, device: torch.device) -> Tensor:
    return levels(kind).to(device)


def takes(x: Tensor) -> bool:
    """Whether `linear` is made for this input: few rows, of an even width, in 16 or 32 bits."""
    width = x.shape[-1]
    return x.dtype in _TYPES and width > 0 and width % 2 == 0 and 0 < x.numel() // width <= LARGEST_ROWS


def linear(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out_features: int, block_size: int, kind: str
) -> Tensor:
    """y = x dequantise(W)ᵀ + b, accumulated in fp32; W is never whole in memory."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty((flat.shape[0], out_features))
    tile = 16, 64, 32  # rows, outputs, bytes
    grid = triton.cdiv(flat.shape[0], tile[0]), triton.cdiv(out_features, tile[1])
    with torch.cuda.device_of(x):
        _linear_kernel[grid](
            flat, packed.contiguous(), absmax.contiguous(), _table(kind, x.device), flat if bias is None else bias, y,
            flat.shape[0], out_features, flat.shape[1], block_size,
            has_bias=bias is not None, TILE_ROWS=tile[0], TILE_OUTPUTS=tile[1], TILE_BYTES=tile[2],
        )  # fmt: skip
    return y.reshape((*x.shape[:-1], out_features))


def dequantise(packed: Tensor, absmax: Tensor, count: int, block_size: int, kind: str, dtype: torch.dtype) -> Tensor:
    """The flat weight [count] in `dtype`."""
    weight = torch.empty(count, dtype=dtype, device=packed.device)
    tile = 1024
    if count:
        with torch.cuda.device_of(packed):
            _dequantise_kernel[triton.cdiv(count, tile),](
                packed.contiguous(), absmax.contiguous(), _table(kind, packed.device), weight, count, block_size,
                TILE=tile,
            )  # fmt: skip
    return weight
