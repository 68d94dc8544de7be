"""LoHa: an update that is the Hadamard product of two low-rank products."""

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
    warn_of_rank,
)
from rewriter.edit import Edit
from rewriter.find import Sites, Targets
from rewriter.program import Program
from rewriter.transform import EXACT, FREE, Law

aten = torch.ops.aten
INITS = ("zero", "random")


@dataclass(frozen=True, slots=True)
class Loha:
    """Add a trainable Hadamard product of two low-rank products beside linear and convolution layers.

        y = x Wᵀ + b      ->      y = x Wᵀ + b + x ΔWᵀ,    ΔW = alpha / rank · (w1_a w1_b) ∘ (w2_a w2_b)

    Shapes: W [o, i], w1_a and w2_a [o, rank], w1_b and w2_b [rank, i]: ΔW has a rank of up to rank². All start
    Kaiming-uniform but w2_b, which is zero with init=zero: nothing changes until it is trained. ΔW is computed in the
    graph at every call, o · i numbers. A convolution's kernel k counts as inputs, i · k / groups; with
    `use_effective_conv2d` a kernel larger than one has, for both products, t [rank, rank, *kernel], w_a [rank, o] and
    w_b [rank, i / groups] with Σ t[p, q] w_a[p] w_b[q] in place of w_a w_b.

    Raises `UsageError` when a target matches nothing or an option cannot be meant.
    Source: Hyeon-Woo et al. 2022 (FedPara), arXiv 2108.06098, propositions 1 and 3; LyCORIS, arXiv 2309.14859.
    """

    name: ClassVar[str] = "loha"
    source: ClassVar[str] = "Hyeon-Woo et al. 2022, arXiv 2108.06098; Yeh et al. 2024, arXiv 2309.14859"

    targets: Targets = ("@attention.query", "@attention.value")
    rank: int = 8
    alpha: float = 8
    init: Literal["zero", "random"] = "zero"
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
        check_flag("use_effective_conv2d", self.use_effective_conv2d)
        check_adapter(self.adapter)
        check_seed("seed", self.seed)

    @property
    def law(self) -> Law:
        if self.init == "random":
            return FREE.because("no factor starts at zero")
        return EXACT.because("w2_b starts at zero, and so does the product")

    def find(self, program: Program) -> Sites[Place]:
        sites = choose(program, self, self.rank_pattern, self.alpha_pattern)
        for site in sites:
            warn_of_rank(site, by_pattern(self.rank_pattern, site.path, self.rank))
        return sites

    def rewrite(self, site: Place, edit: Edit) -> None:
        branch = Branch(edit, site, self.name, self.adapter, self.seed)
        rank = by_pattern(self.rank_pattern, site.path, self.rank)
        scale = by_pattern(self.alpha_pattern, site.path, self.alpha) / rank
        first, second = (self._factors(branch, number, rank) for number in (1, 2))
        shape = [rows(site), *branch.weight.shape[1:]] if kernel(site, branch.weight) else None
        for call in site.calls:
            scaled = branch.call(call, "scaled", aten.mul.Tensor, first[0], scale)
            one = branch.product(call, 1, (scaled, *first[1:]))
            two = branch.product(call, 2, second)
            change = branch.call(call, "hadamard", aten.mul.Tensor, one, two)
            if shape is not None:
                change = branch.call(call, "kernel", aten.reshape.default, change, shape)
            branch.add(call, branch.applied(call, change))

    def _factors(self, branch: Branch, number: int, rank: int) -> tuple[Node, ...]:
        """a, b and, for an effective convolution, t of one of the two products."""
        site, weight = branch.site, branch.weight
        sizes = kernel(site, weight)
        inputs = weight.shape[1] if sizes else site.in_features
        zero = number == 2 and self.init == "zero"
        start = branch.zeros if zero else branch.kaiming
        if self.use_effective_conv2d and math.prod(sizes) > 1:
            t = branch.kaiming(f"hada_t{number}", rank, rank, *sizes, *([1] if len(sizes) == 1 else []))
            a = branch.kaiming(f"hada_w{number}_a", rank, rows(site))
            return a, start(f"hada_w{number}_b", rank, inputs), t
        a = branch.kaiming(f"hada_w{number}_a", rows(site), rank)
        return a, start(f"hada_w{number}_b", rank, inputs * math.prod(sizes))
