"""The levels of the 4-bit types, and the 8-bit type that double quantisation keeps scales in."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

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
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by code; both zeros are +0
FP4 = tuple((torch.tensor((*_FP4_TWELFTHS, *(0.0 - level for level in _FP4_TWELFTHS)), device="cpu") / 12).tolist())
LEVELS = {"nf4": NF4, "fp4": FP4}
KINDS = tuple(LEVELS)
NESTED_BLOCK = 256  # scales per second-level scale


def levels(kind: str) -> Tensor:
    """The value of each of the 16 codes, fp32."""
    if kind not in LEVELS:
        raise ValueError(f"4-bit weights are of kind {' or '.join(KINDS)}, not {kind!r}")
    return torch.tensor(LEVELS[kind])


@functools.cache
def thresholds(kind: str) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The 15 fp32 midpoints between neighbouring levels, and the 16 codes in the order of their levels.

    A value takes the code at the number of midpoints strictly below it. FP4 has 0 twice: a value from just below
    zero up to zero takes code 0, one just above takes code 8.
    """
    order = sorted(range(16), key=LEVELS[kind].__getitem__)
    ranked = torch.tensor([LEVELS[kind][code] for code in order], device="cpu")
    return tuple(((ranked[:-1] + ranked[1:]) / 2).tolist()), tuple(order)


def nearest(scaled: Tensor, kind: str) -> Tensor:
    """The codes of values between -1 and 1, uint8."""
    bounds, order = thresholds(kind)
    ranks = torch.bucketize(scaled, torch.tensor(bounds, device=scaled.device), out_int32=True)
    return torch.tensor(order, dtype=torch.uint8, device=scaled.device)[ranks]


def _dynamic_map() -> Tensor:
    """The 256 values of bitsandbytes' signed 8-bit type: decades from 1e-6 to 1, the larger the finer divided."""
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2
        decade = 10 ** (power - 6)
        values += (decade * means).tolist() + (-decade * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


NESTED_CODE = _dynamic_map()


@functools.cache
def _nested_lookup() -> Tensor:
    """The code of each of 65,536 equally spaced values from -1 to 1, uint8."""
    spaced = torch.arange(65536, dtype=torch.float32) * 2 / 65535 - 1
    return torch.bucketize(spaced, (NESTED_CODE[:-1] + NESTED_CODE[1:]) / 2).to(torch.uint8)


def quantise_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes of fp32 scales (their mean already subtracted) and the fp32 absmax of each 256 of them.

    bitsandbytes' CPU library rounds x / absmax to one of 65,536 values first and looks that up; its other backends
    search the code for x / absmax itself. So they differ by one code near a midpoint, and in a block of zeros (code 0
    here, the code of zero there, both times an absmax of 0). This is the CPU library's way, on every device.
    """
    count = scales.numel()
    blocks = torch.nn.functional.pad(scales, (0, -count % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(dim=-1)
    # 1 / absmax overflows for the smallest denormals; 0 · inf is then code 0, as a block of zeros is
    scaled = (blocks * absmax.reciprocal()[:, None]).clamp(-1, 1).nan_to_num(nan=-1.0)
    # float64 holds the product exactly, so that rounding to fp32 once is the fused multiply-add of the library
    position = (((scaled + 1) * 0.5).double() * 65535 + 0.5).float().long()
    codes = _nested_lookup().to(scales.device)[position].reshape(-1)[:count]
    return codes.contiguous(), absmax
