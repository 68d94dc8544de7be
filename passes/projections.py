"""Random projections that a graph regenerates from a seed, one operation after the other; none is ever stored.

All randomness is one counter-based hash in 64-bit integers that never overflow, so the same key gives the same numbers
on every machine, and a number depends on its key and its own index only:

    x = (i · a + b) mod 2³²          the key (a, b): a odd below 2³¹, b below 2³², from SHA-256 of "seed:index"
    x = (x xor x >> 16) · 0x21f0aaad mod 2³²
    x = (x xor x >> 15) · 0x735a2d97 mod 2³²
    hash(i) = x xor x >> 15
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.fx import Node

aten = torch.ops.aten
WORD = 2**32 - 1
ROUNDS = ((16, 0x21F0AAAD), (15, 0x735A2D97))  # multipliers below 2³¹, so that products with 32 bits stay below 2⁶³
LONGEST = 2**30  # numbers a parameter may have: their hashes' indices, padded and twice as many, fit 32 bits
FACTOR_BITS = 4  # the Hadamard matrix of size 2ᵏ is applied as a Kronecker product of matrices of at most 16 x 16


class Writer(Protocol):
    """Inserts one operation into the graph, in program order."""

    def __call__(self, label: str, operation: Any, *args: Any, **kwargs: Any) -> Node: ...


def key(seed: int, index: int) -> tuple[int, int]:
    """The key of one parameter's projection."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1 | 1, int.from_bytes(digest[4:8], "little")


def padded(dimension: int) -> int:
    """The size of a fastfood block: the next power of two."""
    return int(1 << (dimension - 1).bit_length())


def factors(size: int) -> list[int]:
    """The sizes of the Hadamard matrices whose Kronecker product is the one of `size`, a power of two."""
    bits = size.bit_length() - 1
    return [2**FACTOR_BITS] * (bits // FACTOR_BITS) + ([2 ** (bits % FACTOR_BITS)] if bits % FACTOR_BITS else [])


def one_hot(write: Writer, theta: Node, key: tuple[int, int], count: int, total: int) -> Node:
    """`count` rows of P with one entry ±√(d / total) each, times `theta` [d].

    Row i has its entry in column (hash(i) >> 1) mod d, negative when hash(i) is odd. Columns are orthogonal; over all
    `total` rows their expected squared norm is 1.
    """
    dimension = theta.meta["val"].shape[0]
    bits = _hashes(write, key, count, theta.meta["val"].device)
    half = write("column_bits", aten.bitwise_right_shift.Tensor_Scalar, bits, 1)
    column = write("column", aten.remainder.Scalar, half, dimension)
    read = write("read", aten.index_select.default, theta, 0, column)
    signed = write("signed", aten.mul.Tensor, read, _signs(write, bits))
    return write("scaled", aten.mul.Tensor, signed, math.sqrt(dimension / total))


def fastfood(
    write: Writer, theta: Node, hadamard: dict[int, Node], key: tuple[int, int], count: int, total: int
) -> Node:
    """`count` rows of P = [H G Π H B; H G' Π' H B'; ...] / √total, times `theta` [n], with n a power of two.

    Every block of n rows is one H G Π H B / ‖G‖ of its own: H the Hadamard matrix of ±1, B random signs, Π a random
    permutation, G standard normal. Its columns have norm √n and its entries mean square 1, both exactly, so that over
    `total` rows the columns of P have norm 1 but for the last blocks' rows that are cut off.

    With h(s, r, j) = hash((s · blocks + r) · n + j) for block r: B_j = -1 when h(0, r, j) is odd, else 1; (Π x)_j = x_p
    with p_j the j-th of the places sorted by (h(0, r, p) >> 1, p); and by Box and Muller
    G_j = √(-2 ln u) · cos(2π v), with u = ((h(1, r, j) >> 16) + ½) / 2¹⁶ and v = (h(1, r, j) mod 2¹⁶) / 2¹⁶.
    """
    value = theta.meta["val"]
    size = value.shape[0]
    blocks = -(-count // size)
    hashes = _hashes(write, key, 2 * blocks * size, value.device)
    table = write("hash_blocks", aten.reshape.default, hashes, [2, blocks, size])
    bits = write("bits", aten.select.int, table, 0, 0)
    order = _permutation(write, bits, size)
    gauss = _gauss(write, write("normal_bits", aten.select.int, table, 0, 1), value.dtype)
    flipped = write("flipped", aten.mul.Tensor, theta, _signs(write, bits))
    mixed = _transform(write, flipped, hadamard, blocks, size)
    permuted = write("permuted", aten.gather.default, mixed, 1, order)
    weighted = write("weighted", aten.mul.Tensor, permuted, gauss)
    rows = write("rows", aten.reshape.default, _transform(write, weighted, hadamard, blocks, size), [-1])
    kept = write("kept", aten.slice.Tensor, rows, 0, 0, count) if blocks * size > count else rows
    return write("scaled", aten.mul.Tensor, kept, 1 / math.sqrt(total))


def hadamard(write: Writer, size: int, dtype: torch.dtype, device: torch.device) -> Node:
    """The Hadamard matrix of `size` up to 16: entry (i, j) is -1 to the number of ones in i and j."""
    column = write("column", aten.reshape.default, write("places", aten.arange.default, size, device=device), [size, 1])
    row = write("row", aten.reshape.default, column, [1, size])
    parity = write("both", aten.bitwise_and.Tensor, column, row)
    for shift in (2, 1):
        parity = _xor_shifted(write, parity, shift)
    return write("matrix", aten.to.dtype, _signs(write, parity), dtype)


def _transform(write: Writer, x: Node, hadamard: dict[int, Node], blocks: int, size: int) -> Node:
    """H x for every row x of [blocks, size], one Kronecker factor after the other: size · 16 · log₁₆ size products."""
    behind = size
    for factor in factors(size):
        behind //= factor
        shape: Sequence[int] = [blocks * size // (factor * behind), factor, behind]
        x = write("folded", aten.reshape.default, x, shape)
        x = write("transformed", aten.matmul.default, hadamard[factor], x)
    return write("unfolded", aten.reshape.default, x, [blocks, size])


def _permutation(write: Writer, bits: Node, size: int) -> Node:
    """The order of the hashes; equal ones by place, since sorting leaves their order open."""
    half = write("order_bits", aten.bitwise_right_shift.Tensor_Scalar, bits, 1)
    wide = write("order_wide", aten.mul.Tensor, half, size)
    place = write("places", aten.arange.default, size, device=bits.meta["val"].device)
    return write("order", aten.argsort.default, write("ranks", aten.add.Tensor, wide, place))


def _gauss(write: Writer, bits: Node, dtype: torch.dtype) -> Node:
    """Standard normal numbers divided by their norm.

    In 64 bits, so that the numbers are the same when the module runs in a type too short for the hashes.
    """
    high = write("u_bits", aten.bitwise_right_shift.Tensor_Scalar, bits, 16)
    low = write("v_bits", aten.bitwise_and.Scalar, bits, 2**16 - 1)
    u = write("u_wide", aten.add.Tensor, write("u_double", aten.to.dtype, high, torch.float64), 0.5)
    v = write("angle", aten.mul.Tensor, write("v_double", aten.to.dtype, low, torch.float64), 2 * math.pi / 2**16)
    log = write("log", aten.log.default, write("u", aten.mul.Tensor, u, 2.0**-16))
    radius = write("radius", aten.sqrt.default, write("radius_squared", aten.mul.Tensor, log, -2.0))
    normal = write("normal", aten.mul.Tensor, radius, write("cosine", aten.cos.default, v))
    norm = write("norm", aten.linalg_vector_norm.default, normal, 2, [1], True)
    unit = write("normal_unit", aten.div.Tensor, normal, norm)
    return unit if dtype is torch.float64 else write("gauss", aten.to.dtype, unit, dtype)


def _signs(write: Writer, bits: Node) -> Node:
    """1 - 2 · (the lowest bit), in integers."""
    low = write("sign_bit", aten.bitwise_and.Scalar, bits, 1)
    return write("signs", aten.add.Tensor, write("sign_twice", aten.mul.Tensor, low, -2), 1)


def _hashes(write: Writer, key: tuple[int, int], count: int, device: torch.device) -> Node:
    """hash(0), ..., hash(count - 1)."""
    index = write("index", aten.arange.default, count, device=device)
    x = write("keyed", aten.add.Tensor, write("strided", aten.mul.Tensor, index, key[0]), key[1])
    x = write("word", aten.bitwise_and.Scalar, x, WORD)
    for shift, multiplier in ROUNDS:
        x = write("multiplied", aten.mul.Tensor, _xor_shifted(write, x, shift), multiplier)
        x = write("word", aten.bitwise_and.Scalar, x, WORD)
    return _xor_shifted(write, x, 15)


def _xor_shifted(write: Writer, x: Node, shift: int) -> Node:
    shifted = write("shifted", aten.bitwise_right_shift.Tensor_Scalar, x, shift)
    return write("mixed_bits", aten.bitwise_xor.Tensor, x, shifted)
