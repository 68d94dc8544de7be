"""LoKr: an update that is the Kronecker product of two small matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch.fx import Node

from passes.weight_update import (
    Branch,
    Place,
    by_pattern,
    check_adapter,
    check_alphas,
    check_choice,
    check_flag,
    check_ranks,
    check_seed,
    choose,
    kernel,
    rows,
)
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.find import Sites, Targets
from rewriter.program import Program
from rewriter.transform import EXACT, FREE, Law

aten = torch.ops.aten
INITS = ("zero", "lycoris", "random")


@dataclass(frozen=True, slots=True)
class Lokr:
    """Add a trainable Kronecker product of two small matrices beside linear and convolution layers.

        y = x Wᵀ + b      ->      y = x Wᵀ + b + x ΔWᵀ,    ΔW = alpha / rank · w1 ⊗ w2

    Shapes: W [o, i] with o = o1 · o2 and i = i1 · i2, w1 [o1, i1], w2 [o2, i2]. `decompose_factor` is the size wished
    for o1 and i1, -1 the divisors nearest to the root. A w2 larger than twice the rank is the product of w2_a
    [o2, rank] and w2_b [rank, i2]; with `decompose_both` so is w1. With init=zero, w1 or w1_a is zero; with lycoris,
    w2 or w2_b is; everything else starts Kaiming-uniform. ΔW is computed in the graph at every call, o · i numbers.
    The w2 of a convolution has the layer's kernel; with `use_effective_conv2d`, a decomposed one with a kernel larger
    than one is Σ t2[p, q] w2_a[p] w2_b[q] with t2 [rank, rank, *kernel], w2_a [rank, o2] and w2_b [rank, i2].

    Raises `UsageError` when a target matches nothing or an option cannot be meant.
    Source: Yeh et al. 2024 (LyCORIS), arXiv 2309.14859, section 3.3.
    """

    name: ClassVar[str] = "lokr"
    source: ClassVar[str] = "Yeh et al. 2024, arXiv 2309.14859"

    targets: Targets = ("@attention.query", "@attention.value")
    rank: int = 8
    alpha: float = 8
    init: Literal["zero", "lycoris", "random"] = "zero"
    decompose_both: bool = False
    decompose_factor: int = -1
    use_effective_conv2d: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude: Targets = ()
    layers: tuple[int, ...] = ()
    layers_pattern: str | None = None
    adapter: str = "default"
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranks(self.rank, self.rank_pattern)
        check_alphas(self.alpha, self.alpha_pattern)
        check_choice("init", self.init, INITS)
        check_flag("decompose_both", self.decompose_both)
        check_flag("use_effective_conv2d", self.use_effective_conv2d)
        if type(self.decompose_factor) is not int or (self.decompose_factor != -1 and self.decompose_factor < 1):
            raise UsageError(
                f"decompose_factor is {self.decompose_factor!r}", fix="A whole number of at least 1, or -1."
            )
        check_adapter(self.adapter)
        check_seed("seed", self.seed)

    @property
    def law(self) -> Law:
        if self.init == "random":
            return FREE.because("no factor starts at zero")
        return EXACT.because(f"{'w1' if self.init == 'zero' else 'w2'} starts at zero, and so does the product")

    def find(self, program: Program) -> Sites[Place]:
        return choose(program, self, self.rank_pattern, self.alpha_pattern)

    def rewrite(self, site: Place, edit: Edit) -> None:
        branch = Branch(edit, site, self.name, self.adapter, self.seed)
        rank = by_pattern(self.rank_pattern, site.path, self.rank)
        scale = by_pattern(self.alpha_pattern, site.path, self.alpha) / rank
        sizes = kernel(site, branch.weight)
        inputs = branch.weight.shape[1] if sizes else site.in_features
        (o1, o2), (i1, i2) = (split(size, self.decompose_factor) for size in (rows(site), inputs))
        left = self._left(branch, o1, i1, rank)
        right = self._right(branch, o2, i2, rank, sizes)
        for call in site.calls:
            one = branch.call(call, "scaled", aten.mul.Tensor, branch.product(call, 1, left), scale)
            two = branch.product(call, 2, right)
            if len(sizes) == 1 and len(right) == 1:  # PEFT and its checkpoints take a signal's whole w2 in this order
                shapes = [o1, 1, i1, 1], [o2, 1, i2, 1, *sizes]
            else:
                shapes = [o1, 1, i1, 1, *[1] * len(sizes)], [o2, 1, i2, *sizes]
            one = branch.call(call, "left", aten.reshape.default, one, shapes[0])
            two = branch.call(call, "right", aten.reshape.default, two, shapes[1])
            blocks = branch.call(call, "blocks", aten.mul.Tensor, one, two)
            change = branch.call(call, "kronecker", aten.reshape.default, blocks, [o1 * o2, i1 * i2, *sizes])
            branch.add(call, branch.applied(call, change))

    def _left(self, branch: Branch, outs: int, inputs: int, rank: int) -> tuple[Node, ...]:
        """w1, or w1_a and w1_b."""
        start = branch.zeros if self.init == "zero" else branch.kaiming
        if self.decompose_both and rank < max(outs, inputs) / 2:
            return start("lokr_w1_a", outs, rank), branch.kaiming("lokr_w1_b", rank, inputs)
        return (start("lokr_w1", outs, inputs),)

    def _right(self, branch: Branch, outs: int, inputs: int, rank: int, sizes: tuple[int, ...]) -> tuple[Node, ...]:
        """w2; or w2_a and w2_b; or w2_a, w2_b and t2 of an effective convolution."""
        start = branch.zeros if self.init == "lycoris" else branch.kaiming
        if rank >= max(outs, inputs) / 2:
            return (start("lokr_w2", outs, inputs, *sizes),)
        if self.use_effective_conv2d and math.prod(sizes) > 1:
            t = branch.kaiming("lokr_t2", rank, rank, *sizes, *([1] if len(sizes) == 1 else []))
            return branch.kaiming("lokr_w2_a", rank, outs), start("lokr_w2_b", rank, inputs), t
        return branch.kaiming("lokr_w2_a", outs, rank), start("lokr_w2_b", rank, inputs * math.prod(sizes))


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m · n = size: m is `factor` where that divides; else n ≥ m ≤ factor, as near to each other as can be.

    A factor of -1 sets no limit. `split(24) == (4, 6)`, `split(24, 8) == (8, 3)`, `split(24, 5) == (4, 6)`.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    smaller = next(m for m in range(limit, 0, -1) if size % m == 0)
    return smaller, size // smaller
