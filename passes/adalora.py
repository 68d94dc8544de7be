"""AdaLoRA: an update in the form of a singular value decomposition, whose values can be pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Node

from passes.weight_update import (
    Branch,
    Place,
    by_pattern,
    check_adapter,
    check_alphas,
    check_dropout,
    check_ranks,
    check_seed,
    choose,
    kernel,
    rows,
    warn_of_rank,
)
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.find import Miss, Sites, Targets
from rewriter.program import Program
from rewriter.transform import EXACT, Law
from rewriter.view import Conv

aten = torch.ops.aten
SMALLEST = 1e-5  # what PEFT adds to the rank it divides by
DEVIATION = 0.02


@dataclass(frozen=True, slots=True)
class Adalora:
    """Add a trainable update in the form of a singular value decomposition beside linear and convolution layers.

        y = x Wᵀ + b      ->      y = x Wᵀ + b + alpha / ranknum · (dropout(x) (E ∘ A)ᵀ) Bᵀ

    Shapes: W [o, i], A [rank, i], E [rank, 1] the singular values, B [o, rank], ranknum [1]. A and B are normal with
    deviation 0.02 and E is zero: nothing changes until it is trained. A convolution's kernel k counts as inputs, i · k.

    `rank` is the rank that training starts with, and ranknum, a buffer, holds it; a layer that `rank_pattern` gives
    less, as after pruning, keeps its scale, and one that it gives 0 gets no update. Which singular values to give up,
    and the penalty that holds A and B orthogonal, ‖A Aᵀ − I‖ + ‖Bᵀ B − I‖, are up to the training loop.

    Raises `UsageError` when a target matches nothing or an option cannot be meant.
    Source: Zhang et al. 2023, arXiv 2303.10512, eq. 3.
    """

    name: ClassVar[str] = "adalora"
    source: ClassVar[str] = "Zhang et al. 2023, arXiv 2303.10512"
    law: ClassVar[Law] = EXACT.because("E starts at zero")

    targets: Targets = ("@attention.query", "@attention.value")
    rank: int = 12
    alpha: float = 8
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    exclude: Targets = ()
    layers: tuple[int, ...] = ()
    layers_pattern: str | None = None
    adapter: str = "default"
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranks(self.rank, self.rank_pattern, least=0)
        check_alphas(self.alpha, {})
        check_dropout(self.dropout)
        check_adapter(self.adapter)
        check_seed("seed", self.seed)

    def find(self, program: Program) -> Sites[Place]:
        sites = choose(program, self, self.rank_pattern)
        pruned = [site for site in sites if not self._rank(site)]
        found = [site for site in sites if self._rank(site)]
        if not found:
            raise UsageError("rank_pattern leaves no layer a rank", fix="Give at least one target a rank above 0.")
        for site in found:
            warn_of_rank(site, self._rank(site))
            if isinstance(site, Conv) and site.groups > 1:
                raise UsageError(
                    f"{site.path}: AdaLoRA on a grouped convolution",
                    evidence=[f"{site.groups} groups; A has a row for all inputs together"],
                    fix="Leave it out with exclude, or use LoRA on this layer.",
                )
        return Sites(tuple(found), (*sites.missed, *(Miss(site.path, "its rank is 0") for site in pruned)))

    def rewrite(self, site: Place, edit: Edit) -> None:
        branch = Branch(edit, site, self.name, self.adapter, self.seed)
        rank, sizes = self._rank(site), kernel(site, branch.weight)
        a = branch.normal("lora_A", rank, site.in_features * math.prod(sizes), deviation=DEVIATION)
        b = branch.normal("lora_B", rows(site), rank, deviation=DEVIATION)
        e = branch.zeros("lora_E", rank, 1)
        ranknum = edit.buffer(branch.name("ranknum"), branch.weight.new_full((1,), float(self.rank)))
        for call in site.calls:
            whole = branch.call(call, "ranknum", aten.add.Tensor, ranknum, SMALLEST)
            values = branch.call(call, "values", aten.mul.Tensor, e, self.alpha)
            values = branch.call(call, "values_scaled", aten.div.Tensor, values, whole)
            down = branch.call(call, "A_scaled", aten.mul.Tensor, a, values)
            x = branch.input(call, self.dropout)
            branch.add(call, _factored(branch, call, x, down, b, sizes))

    def _rank(self, site: Place) -> int:
        return by_pattern(self.rank_pattern, site.path, self.rank)


def _factored(branch: Branch, call: Node, x: Node, a: Node, b: Node, sizes: tuple[int, ...]) -> Node:
    """`B A x`: for a convolution, A with the layer's kernel and geometry and then B at every place."""
    if not sizes:
        low = branch.call(call, "down", aten.linear.default, x, a)
        return branch.call(call, "up", aten.linear.default, low, b)
    rank, ones = a.meta["val"].shape[0], [1] * len(sizes)
    a = branch.call(call, "A_kernel", aten.view.default, a, [rank, branch.site.in_features, *sizes])
    b = branch.call(call, "B_kernel", aten.view.default, b, [rows(branch.site), rank, *ones])
    low = branch.call(call, "down", call.target, x, a, None, *call.args[3:])
    operation: Any = call.target
    pointwise = operation.overloadpacket.default  # `conv2d.padding` -> `conv2d.default`: 1x1 takes no padding
    return branch.call(call, "up", pointwise, low, b)
