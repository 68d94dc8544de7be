"""Linear layers whose weight is stored in 4 bits, as operators: `import runtime.nf4_linear` registers them.

`rewriter::nf4_linear` and, for scales that are quantised themselves, `rewriter::nf4_linear_double` compute

    y = x dequantise(W)ᵀ + b

with W [out_features, in_features = last size of x], row-major, brought to x's type as bitsandbytes does it. They run on
every device, on meta tensors, under `torch.compile` and `torch.export`; gradients reach x and b. The dequantised weight
is never kept. A program that has these operators needs this import, and nothing of the compiler, to be loaded.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.nf4 import KINDS, NESTED_BLOCK, NESTED_CODE, Quantised, dequantize, dequantize_flat

_CHUNK_WEIGHTS = 1 << 22  # dequantised at a time on the CPU, whatever the size of the weight


# -- sizes ------------------------------------------------------------------------------------------------------------


def _check_weight(packed: Tensor, absmax: Tensor, out_features: int, in_features: int, size: int, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"4-bit weights are of kind nf4 or fp4, not {kind!r}")
    if size < 2 or size & (size - 1):
        raise ValueError(f"the block size is a power of two, not {size}")
    weights = out_features * in_features
    _check_tensor("packed", packed, torch.uint8, (weights + 1) // 2, f"a weight [{out_features}, {in_features}]")
    _check_tensor("absmax", absmax, torch.float32, -(-weights // size), f"{weights} weights in blocks of {size}")


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, count: int, purpose: str) -> None:
    if tensor.dtype != dtype or tensor.numel() != count:
        found = f"{tensor.numel()} of {str(tensor.dtype).removeprefix('torch.')}"
        raise ValueError(f"{purpose} needs {count} {str(dtype).removeprefix('torch.')} in `{name}`, not {found}")


def _check_input(x: Tensor, bias: Tensor | None, out_features: int) -> None:
    if not x.ndim or not x.is_floating_point():
        raise ValueError(f"x is a floating-point tensor with at least one dimension, not {x.dtype}{list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"the bias of {out_features} outputs has shape [{out_features}], not {list(bias.shape)}")


def _check_nested(absmax: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> None:
    blocks = absmax.numel()
    _check_tensor("absmax", absmax, torch.uint8, blocks, "double quantisation")
    purpose = f"{blocks} quantised scales in blocks of {NESTED_BLOCK}"
    _check_tensor("nested_absmax", nested_absmax, torch.float32, -(-blocks // NESTED_BLOCK), purpose)
    _check_tensor("nested_offset", nested_offset, torch.float32, 1, "double quantisation")


@torch.library.custom_op(
    "rewriter::nf4_scales",
    mutates_args=(),
    schema="(Tensor absmax, Tensor nested_absmax, Tensor nested_offset) -> Tensor",
)
def scales(absmax: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """The fp32 scales that 8-bit codes, one fp32 scale per 256 of them and an offset stand for."""
    _check_nested(absmax, nested_absmax, nested_offset)
    codes = absmax.reshape(-1)
    steps = nested_absmax.reshape(-1).repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return NESTED_CODE.to(codes.device)[codes.int()] * steps + nested_offset.reshape(())


@scales.register_fake
def _(absmax: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    _check_nested(absmax, nested_absmax, nested_offset)
    return absmax.new_empty((absmax.numel(),), dtype=torch.float32)


# -- the weight -------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "rewriter::nf4_weight",
    mutates_args=(),
    schema="(Tensor packed, Tensor absmax, int out_features, int in_features, int block_size, str kind, "
    "ScalarType dtype) -> Tensor",
)
def nf4_weight(
    packed: Tensor, absmax: Tensor, out_features: int, in_features: int, block_size: int, kind: str, dtype: torch.dtype
) -> Tensor:
    """The dequantised weight [out_features, in_features] in `dtype`."""
    _check_weight(packed, absmax, out_features, in_features, block_size, kind)
    it = Quantised(packed.reshape(-1), absmax.reshape(-1), (out_features, in_features), dtype, kind, block_size)
    return dequantize(it)


@nf4_weight.register_fake
def _(
    packed: Tensor, absmax: Tensor, out_features: int, in_features: int, block_size: int, kind: str, dtype: torch.dtype
) -> Tensor:
    _check_weight(packed, absmax, out_features, in_features, block_size, kind)
    return packed.new_empty((out_features, in_features), dtype=dtype)


@nf4_weight.register_kernel("cuda")
def _(
    packed: Tensor, absmax: Tensor, out_features: int, in_features: int, block_size: int, kind: str, dtype: torch.dtype
) -> Tensor:
    _check_weight(packed, absmax, out_features, in_features, block_size, kind)
    packed, absmax = packed.reshape(-1), absmax.reshape(-1)
    count, size = out_features * in_features, (out_features, in_features)
    if triton := _triton():
        weight: Tensor = triton.dequantise(packed, absmax, count, block_size, kind, dtype).reshape(size)
    elif (library := _bitsandbytes()) and block_size in range(64, 4097):
        weight = library.dequantize_4bit(packed, absmax, block_size, kind, size, dtype)
    else:
        flat = dequantize_flat(packed, absmax, numel=count, block_size=block_size, kind=kind, dtype=dtype)
        weight = flat.reshape(size)
    return weight


@functools.cache
def _triton() -> Any:
    """The Triton kernels, where Triton is installed; imported at the first call on a GPU, not before."""
    try:
        import runtime.nf4_triton as kernels
    except ImportError:
        return None
    return kernels


@functools.cache
def _bitsandbytes() -> Any:
    """The operators that bitsandbytes registers, where it is installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return None
    return torch.ops.bitsandbytes


# -- y = x Wᵀ + b -----------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "rewriter::nf4_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor absmax, Tensor? bias, int out_features, int block_size, str kind) "
    "-> Tensor",
)
def nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out_features: int, block_size: int, kind: str
) -> Tensor:
    """y = x dequantise(W)ᵀ + b with one fp32 scale per block."""
    _check_input(x, bias, out_features)
    _check_weight(packed, absmax, out_features, x.shape[-1], block_size, kind)
    return _linear_in_chunks(x, packed.reshape(-1), absmax.reshape(-1), bias, out_features, block_size, kind)


def _linear_in_chunks(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out_features: int, block_size: int, kind: str
) -> Tensor:
    """Dequantise and multiply some rows of the weight at a time, each chunk starting where a block starts."""
    width = x.shape[-1]
    unit = block_size // math.gcd(width, block_size) if width else 1  # the fewest rows that fill whole blocks
    step = unit * max(1, _CHUNK_WEIGHTS // max(1, unit * width))
    parts = []
    for start in range(0, out_features, step):
        rows = min(step, out_features - start)
        first, count = start * width, rows * width
        codes = packed[first // 2 : (first + count + 1) // 2]
        scale = absmax[first // block_size : -(-(first + count) // block_size)]
        weight = dequantize(Quantised(codes, scale, (rows, width), x.dtype, kind, block_size))
        parts.append(F.linear(x, weight, None if bias is None else bias[start : start + rows].to(x.dtype)))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=-1) if parts else x.new_empty((*x.shape[:-1], 0))


@nf4_linear.register_fake
def _(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out_features: int, block_size: int, kind: str
) -> Tensor:
    _check_input(x, bias, out_features)
    _check_weight(packed, absmax, out_features, int(x.shape[-1]), block_size, kind)  # its weight fixes a symbolic width
    return x.new_empty((*x.shape[:-1], out_features))


@nf4_linear.register_kernel("cuda")
def _linear_on_cuda(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out_features: int, block_size: int, kind: str
) -> Tensor:
    _check_input(x, bias, out_features)
    _check_weight(packed, absmax, out_features, x.shape[-1], block_size, kind)
    triton = _triton()
    if triton is not None and triton.takes(x):
        y: Tensor = triton.linear(x, packed.reshape(-1), absmax.reshape(-1), bias, out_features, block_size, kind)
        return y
    weight = nf4_weight(packed, absmax, out_features, x.shape[-1], block_size, kind, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, packed, absmax, bias, ctx.out_features, ctx.block_size, ctx.kind = inputs
    ctx.save_for_backward(packed, absmax)
    ctx.in_features, ctx.bias_type = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = _gradients(ctx, gradient, *ctx.saved_tensors, needs_bias=ctx.needs_input_grad[3])
    return x, None, None, bias, None, None, None


def _gradients(
    ctx: Any, gradient: Tensor, packed: Tensor, absmax: Tensor, *, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the bias."""
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        sizes = ctx.out_features, ctx.in_features, ctx.block_size, ctx.kind, gradient.dtype
        of_x = gradient @ torch.ops.rewriter.nf4_weight(packed, absmax, *sizes)
    if needs_bias:
        of_bias = gradient.reshape(-1, ctx.out_features).sum(0).to(ctx.bias_type)
    return of_x, of_bias


nf4_linear.register_autograd(_backward, setup_context=_keep)


# -- the same with quantised scales -----------------------------------------------------------------------------------


@torch.library.custom_op(
    "rewriter::nf4_linear_double",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor nested_offset, Tensor? bias, "
    "int out_features, int block_size, str kind) -> Tensor",
)
def nf4_linear_double(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    nested_offset: Tensor,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
    kind: str,
) -> Tensor:
    """y = x dequantise(W)ᵀ + b with an 8-bit scale per block, an fp32 scale per 256 of these, and an fp32 offset."""
    scale = scales(absmax, nested_absmax, nested_offset)
    y: Tensor = nf4_linear(x, packed, scale, bias, out_features, block_size, kind)
    return y


@nf4_linear_double.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    nested_offset: Tensor,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
    kind: str,
) -> Tensor:
    _check_nested(absmax, nested_absmax, nested_offset)
    _check_input(x, bias, out_features)
    scale = absmax.new_empty(absmax.shape, dtype=torch.float32)
    _check_weight(packed, scale, out_features, int(x.shape[-1]), block_size, kind)
    return x.new_empty((*x.shape[:-1], out_features))


def _keep_double(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, packed, absmax, nested_absmax, nested_offset, bias, ctx.out_features, ctx.block_size, ctx.kind = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)
    ctx.in_features, ctx.bias_type = x.shape[-1], None if bias is None else bias.dtype


def _backward_double(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    packed, *nested = ctx.saved_tensors
    x, bias = _gradients(ctx, gradient, packed, scales(*nested), needs_bias=ctx.needs_input_grad[5])
    return x, None, None, None, None, bias, None, None, None


nf4_linear_double.register_autograd(_backward_double, setup_context=_keep_double)
