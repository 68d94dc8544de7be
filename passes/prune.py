"""Prune: one LoRA of a smaller rank, with fewer non-zero entries, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from passes import combine
from passes.combine import Update
from passes.lora_sources import (
    Shared,
    check_adapter,
    check_density,
    check_rank,
    factors,
    insert,
    kept_base,
    rank_of_each,
    refuse_buried,
    remove,
    shared,
    sources,
    tensors_of,
)
from passes.peft_place import ParameterSite
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.find import Sites
from rewriter.program import Program
from rewriter.transform import FREE, Law


@dataclass(frozen=True, slots=True)
class Pruning:
    """A layer, or a slice of one, with the LoRA to reduce and the steps that made it."""

    layer: Shared
    steps: frozenset[int]

    @property
    def path(self) -> str:
        return self.layer.path


@dataclass(frozen=True, slots=True)
class Prune:
    """Reduce one LoRA to a lower rank by SVD, to its largest entries, or to both.

        y = x Wᵀ + s (x Aᵀ) Bᵀ      ->      y = x Wᵀ + s' (x A'ᵀ) B'ᵀ

    Shapes: A [r, i], B [o, r]; A' [rank, i], B' [o, rank]. `rank`: B' A' is the best approximation of s B A in the
    Frobenius norm, and s' = 1; a layer whose rank is no larger stays as it is. `density`: of A' and of B' that share of
    the entries stays that is largest in magnitude, the others are zero. With both, the rank is reduced first. Biases
    of B and DoRA's magnitudes stay. The error of the update relative to itself is noted per layer.

    Raises `UsageError` when neither is given, when the program has no such LoRA, or when no layer has a larger rank.
    Source: Han et al. 2015, arXiv 1506.02626; Eckart and Young 1936.
    """

    name: ClassVar[str] = "prune"
    source: ClassVar[str] = "Han et al. 2015, arXiv 1506.02626"

    rank: int | None = None
    density: float | None = None
    adapter: str = "default"

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_density(self.density)
        check_adapter(self.adapter)

    @property
    def law(self) -> Law:
        return FREE.because("the update loses what is pruned")

    def find(self, program: Program) -> Sites[Pruning | ParameterSite]:
        if self.rank is None and self.density is None:
            raise UsageError("nothing to prune to", fix="Give a rank, a density, or both.")
        found = sources(program, (self.adapter,))
        steps = found[0].numbers
        sites = [Pruning(layer, steps) for layer in shared(found)]
        for site in sites:
            refuse_buried(site.layer.site, steps)
        if self.density is None and not any(self._rank(site) for site in sites):
            raise UsageError(f"no layer of the adapter {self.adapter} has a rank above {self.rank}", fix="Lower it.")
        return Sites((*sites, *kept_base(program, found)))

    def _rank(self, site: Pruning) -> int | None:
        """The rank that each matrix of the layer is reduced to; None where it has no larger one."""
        ((_, branch),) = site.layer.branches
        if self.rank is None:
            return None
        rank = rank_of_each(site.layer.site, self.rank)
        return rank if rank < factors(branch).rank else None

    def rewrite(self, site: Pruning | ParameterSite, edit: Edit) -> None:
        if isinstance(site, ParameterSite):
            site.rewrite(edit)
            return
        ((_, branch),) = site.layer.branches
        layer, before, rank = site.layer.site, factors(branch), self._rank(site)
        remove(layer, site.steps, edit)
        after, scale = before, branch.scale
        if rank is not None:
            after, scale = combine.truncated(before.times(scale), rank), 1.0
        if self.density is not None:
            after = Update(combine.largest(after.a, self.density), combine.largest(after.b, self.density))
        error = combine.relative_error(after.times(scale), before.times(branch.scale))
        edit.note(site.layer.label, error_of_update=error)
        tensors = {**branch.tensors, **tensors_of(layer, after, branch)}
        if "lora_B_bias" in tensors and scale != branch.scale:
            tensors["lora_B_bias"] = tensors["lora_B_bias"].detach().double() * branch.scale / scale
        insert(layer, tensors, scale, branch.dropout or 0.0, self.adapter, edit)
