"""What 4 bits cost Gaussian weights: relative RMSE of each type and block size, measured and by theory, and storage.

`python tools/bench/quantisation_error.py [--json FILE]` prints a Markdown table. Relative RMSE is |W - W'| / |W|.

The theory is for blocks of n independent N(0, 1) weights with the scale M = max |x|, whose density is that of the
largest of n. The weight with |x| = M is met exactly; the others are normal between -M and M:

    E[(x - x')²] = (n - 1)/n ∫ p(M) Σ_k ∫_{cell k} (x - M level_k)² φ(x) dx / P(|x| < M) dM

and likewise over least and largest weight for Int4 asymmetric, which meets both. The sums over cells are closed forms.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from runtime import nf4

SCHEMA = 1
BLOCKS = (32, 64, 128, 256)


def symmetric(*magnitudes: float) -> tuple[float, ...]:
    """Levels of both signs, brought to 1 at most."""
    most = max(magnitudes)
    return tuple(sorted({sign * magnitude / most for magnitude in magnitudes for sign in (-1, 1)}))


LEVELS = {
    "NF4": nf4.NF4,
    "FP4 (bitsandbytes)": tuple(sorted(set(nf4.FP4))),
    "E2M1": symmetric(0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "E3M0": symmetric(0, 0.25, 0.5, 1, 2, 4, 8, 16),
    "Int4 symmetric": symmetric(*range(8)),
}
ASYMMETRIC = "Int4 asymmetric"  # 16 levels at equal distances from the least weight of a block to the largest
STORED = {"NF4": "nf4", "FP4 (bitsandbytes)": "fp4"}


@dataclass(frozen=True, slots=True)
class Row:
    """The error of one type at one block size, and bits per weight counted from stored bytes where a store exists."""

    type: str
    block_size: int
    error: float
    theory: float
    searched: float | None  # the error when `search` chooses the scales
    bits: float | None
    bits_double: float | None  # with double quantisation


# -- measured ---------------------------------------------------------------------------------------------------------


def relative(weight: Tensor, read: Tensor) -> float:
    return float((weight.double() - read.double()).norm() / weight.double().norm())


def read_symmetric(blocks: Tensor, levels: Sequence[float]) -> Tensor:
    table, scale = torch.tensor(levels), blocks.abs().amax(dim=1, keepdim=True)
    return table[torch.bucketize(blocks / scale, (table[:-1] + table[1:]) / 2)] * scale


def read_asymmetric(blocks: Tensor) -> Tensor:
    least, most = blocks.aminmax(dim=1, keepdim=True)
    step = (most - least) / 15
    return ((blocks - least) / step).round() * step + least


def measured(weight: Tensor, type_: str, block_size: int) -> Row:
    blocks = weight.view(-1, block_size)
    if type_ == ASYMMETRIC:
        error = relative(blocks, read_asymmetric(blocks))
        return Row(type_, block_size, error, asymmetric_theory(block_size), None, None, None)
    theory = symmetric_theory(LEVELS[type_], block_size)
    if type_ not in STORED:
        error = relative(blocks, read_symmetric(blocks, LEVELS[type_]))
        return Row(type_, block_size, error, theory, None, None, None)
    kind = STORED[type_]
    plain = nf4.quantize(weight, block_size=block_size, kind=kind)
    double = nf4.quantize(weight, block_size=block_size, kind=kind, double_quantise=True)
    best = nf4.quantize(weight, block_size=block_size, kind=kind, search=True)
    errors = relative(weight, nf4.dequantize(plain)), theory, relative(weight, nf4.dequantize(best))
    return Row(type_, block_size, *errors, plain.bits_per_weight, double.bits_per_weight)


# -- theory -----------------------------------------------------------------------------------------------------------


def density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def cells(low: Tensor, high: Tensor, levels: Tensor) -> Tensor:
    """Σ_k ∫ (x - level_k)² φ(x) dx over the cells of each row's levels between `low` and `high`."""
    edges = torch.cat([low[:, None], (levels[:, :-1] + levels[:, 1:]) / 2, high[:, None]], dim=1)
    mass, peak = torch.special.ndtr(edges), density(edges)
    zeroth, first = mass.diff(dim=1), -peak.diff(dim=1)
    second = zeroth - (edges * peak).diff(dim=1)
    error: Tensor = second - 2 * levels * first + levels.square() * zeroth
    return error.sum(dim=1)


def symmetric_theory(levels: Sequence[float], block_size: int) -> float:
    """The root of the mean squared error, with the largest magnitude of each block integrated over."""
    largest = torch.linspace(1e-3, 9, 20_001, dtype=torch.float64)
    inside = 2 * torch.special.ndtr(largest) - 1
    weight = block_size * inside.pow(block_size - 1) * 2 * density(largest)
    error = cells(-largest, largest, largest[:, None] * torch.tensor(levels, dtype=torch.float64)) / inside
    return math.sqrt(float(torch.trapezoid(weight * error, largest)) * (block_size - 1) / block_size)


def asymmetric_theory(block_size: int) -> float:
    """The same with the least and the largest weight integrated over."""
    axis = torch.linspace(-7, 7, 561, dtype=torch.float64)
    least, most = (grid.reshape(-1) for grid in torch.meshgrid(axis, axis, indexing="ij"))
    least, most = least[ordered := most > least], most[ordered]
    inside = torch.special.ndtr(most) - torch.special.ndtr(least)
    pairs = block_size * (block_size - 1)
    weight = pairs * inside.pow(block_size - 2) * density(least) * density(most)
    levels = least[:, None] + (most - least)[:, None] * torch.linspace(0, 1, 16, dtype=torch.float64)
    error = cells(least, most, levels) / inside
    total = float((weight * error).sum()) * float(axis[1] - axis[0]) ** 2
    return math.sqrt(total * (block_size - 2) / block_size)


# -- the table --------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| type | block | relative RMSE | theory | with search | bits per weight | double quantised |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        numbers = (row.error, row.theory, row.searched, row.bits, row.bits_double)
        shown = " | ".join("" if number is None else f"{number:.4f}" for number in numbers)
        lines.append(f"| {row.type} | {row.block_size} | {shown} |")
    return "\n".join(lines)


def rows(size: int, seed: int, blocks: Sequence[int] = BLOCKS) -> list[Row]:
    """All types and block sizes on one Gaussian matrix [size, size]."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return [measured(weight, type_, block) for type_ in (*LEVELS, ASYMMETRIC) for block in blocks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="the matrix is size × size; a multiple of 16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args()
    found = rows(options.size, options.seed)
    print(table(found))
    if options.json:
        about = {"schema": SCHEMA, "size": options.size, "seed": options.seed, "rows": [asdict(row) for row in found]}
        options.json.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
