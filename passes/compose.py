"""Compose: several LoRAs of one program as one new LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from passes import combine
from passes.combine import Update
from passes.lora_sources import (
    Shared,
    Source,
    check_adapter,
    check_density,
    check_rank,
    insert,
    kept_base,
    rank_of_each,
    refuse_buried,
    remove,
    shared,
    sources,
    tensors_of,
    trained_base,
)
from passes.lora_sources import factors as lora_factors
from passes.peft_branches import Branch, adapters
from passes.peft_place import ParameterSite
from rewriter.edit import Edit
from rewriter.errors import RewriteError, UsageError
from rewriter.find import Sites
from rewriter.program import Program
from rewriter.transform import FREE, ROUNDING, Law

Method = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


@dataclass(frozen=True, slots=True)
class Composition:
    """A layer, or a slice of one, with the sources that have a branch there, their weights, and the steps to remove."""

    layer: Shared
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    steps: frozenset[int]

    @property
    def path(self) -> str:
        return self.layer.path

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(branch for _, branch in self.layer.branches)

    def keys(self, prefix: str) -> list[str]:
        """What seeds the random choices of each source here, alike for no two sources, layers and slices."""
        return [f"{prefix}/{self.layer.label}/{adapter}" for adapter in self.adapters]


@dataclass(frozen=True, slots=True)
class Compose:
    """Combine several LoRAs of one program into one new LoRA, as a weighted sum, by SVD, TIES, DARE or pruning.

        y = x Wᵀ + Σ s_k (x A_kᵀ) B_kᵀ      ->      y = x Wᵀ + s (x Aᵀ) Bᵀ,    s B A ≈ Σ w_k s_k B_k A_k

    Shapes: A_k [r_k, i], B_k [o, r_k]; A [r, i], B [o, r]. The scales s_k are read from the graph, so rank-stabilised
    LoRAs count as they act. Without `adapters`, all LoRAs are combined; `weights` default to 1.

    cat: the exact sum, r = Σ r_k. svd: its best approximation of the rank `rank` (default: the largest r_k).
    linear: A = Σ √(w_k s_k) A_k and B = Σ √(w_k s_k) B_k as PEFT defines it; B A has products of different adapters and
    is not the sum of the updates. ties, dare_linear, dare_ties, magnitude_prune: likewise on A and B, each reduced to
    the share `density` of its entries: the largest (ties, magnitude_prune) or random ones, rescaled (dare); the ties
    variants then average only the values whose sign wins (`majority_sign`: by sum or by count). With `_svd`, the same
    on the updates s_k B_k A_k, and then the best approximation. A layer that an adapter lacks counts as zero.

    With `drop`, the combined LoRAs leave the graph and the new one stands alone; else it is added to them. How far the
    new update is from the weighted sum is noted per layer, relative to that sum.

    Raises `UsageError` for names, weights and options that cannot be meant; `RewriteError` for what has no such sum:
    DoRA (magnitudes do not add up; one DoRA alone can be renamed), trained biases and saved modules that differ,
    unequal ranks in the methods on A and B, biases of B in any method but cat and svd.
    Source: TIES Yadav et al. 2023, arXiv 2306.01708; DARE Yu et al. 2023, arXiv 2311.03099; PEFT's names.
    """

    name: ClassVar[str] = "compose"
    source: ClassVar[str] = "Yadav et al. 2023, arXiv 2306.01708; Yu et al. 2023, arXiv 2311.03099"

    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    method: Method = "cat"
    density: float | None = None
    majority_sign: combine.Sign = "total"
    rank: int | None = None
    adapter: str = "default"
    drop: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check_options(self)

    @property
    def law(self) -> Law:
        if self.method == "cat" and self.drop and all(weight == 1 for weight in self.weights):
            return ROUNDING.because("the same updates are summed inside one product")
        return FREE.because("the update becomes another one")

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[Composition | ParameterSite]:
        found = sources(program, self.adapters)
        weights = self.weights or (1.0,) * len(found)
        if len(weights) != len(found):
            names = ", ".join(source.adapter for source in found)
            raise UsageError(f"{len(weights)} weights for {len(found)} adapters: {names}", fix="Give one weight each.")
        taken = set(adapters(program)) - ({source.adapter for source in found} if self.drop else set())
        if self.adapter in taken:
            raise UsageError(
                f"the program already has a LoRA named {self.adapter!r}", fix="Name the new one otherwise."
            )
        self._refuse_dora(found, weights)
        _refuse_base(program, found, weights)
        steps = frozenset(number for source in found for number in source.numbers) if self.drop else frozenset()
        sites = []
        for layer in shared(found):
            self._check_layer(layer, found)
            refuse_buried(layer.site, steps)
            here = [index for index, _ in layer.branches]
            factors = tuple(float(weights[index]) for index in here)
            sites.append(Composition(layer, tuple(found[index].adapter for index in here), factors, steps))
        return Sites((*sites, *(kept_base(program, found) if self.drop else ())))

    def _refuse_dora(self, found: Sequence[Source], weights: Sequence[float]) -> None:
        dora = [(s.adapter, b) for s in found for b in s.branches if "lora_magnitude_vector" in b.tensors]
        renamed = len(found) == 1 and weights[0] == 1 and self.method == "cat" and self.drop
        if dora and not renamed:
            raise RewriteError(
                f"the adapter {dora[0][0]} is a DoRA: its magnitudes have no weighted sum",
                evidence=[f"{dora[0][1].site.path}: y = m / ‖W + s B A‖ · (W + s B A) x is not linear in the adapter"],
                fix="Merge it into the base first, or leave it out.",
            )

    def _check_layer(self, layer: Shared, found: Sequence[Source]) -> None:
        names = [found[index].adapter for index, _ in layer.branches]
        each = [branch for _, branch in layer.branches]
        ranks = [lora_factors(branch).rank for branch in each]
        if self.rank is not None:
            rank_of_each(layer.site, self.rank)
        if _adds_factors(self.method) and len(set(ranks)) > 1:
            raise UsageError(
                f"{layer.label}: method {self.method} adds A to A and B to B and needs equal ranks",
                evidence=[f"{name}: rank {rank}" for name, rank in zip(names, ranks, strict=True)],
                fix=f"Use cat, svd{'' if self.method == 'linear' else f' or {self.method}_svd'}.",
            )
        biased = [name for name, branch in zip(names, each, strict=True) if "lora_B_bias" in branch.tensors]
        if biased and self.method not in ("cat", "svd"):
            raise RewriteError(
                f"{layer.label}: the adapter {biased[0]} has a bias of B, which method {self.method} has no rule for",
                fix="Use cat or svd, which sum it exactly.",
            )

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Composition | ParameterSite, edit: Edit) -> None:
        if isinstance(site, ParameterSite):
            site.rewrite(edit)
            return
        layer, each = site.layer.site, site.branches
        remove(layer, site.steps, edit)
        factors = [weight * branch.scale for weight, branch in zip(site.weights, each, strict=True)]
        # one common factor stays a scale, and then A and B keep every bit
        scale = factors[0] if self.method == "cat" and len(set(factors)) == 1 and factors[0] > 0 else 1.0
        tensors = tensors_of(layer, self._combined(site, [factor / scale for factor in factors], edit), each[0])
        tensors |= _bias(each, [factor / scale for factor in factors])
        if "lora_magnitude_vector" in each[0].tensors:
            tensors["lora_magnitude_vector"] = each[0].tensors["lora_magnitude_vector"]
        insert(layer, tensors, scale, _dropout(each), self.adapter, edit)

    def _combined(self, site: Composition, factors: Sequence[float], edit: Edit) -> Update:
        read = [lora_factors(branch) for branch in site.branches]
        exact = combine.joined([update.times(factor) for update, factor in zip(read, factors, strict=True)])
        if self.method == "cat":
            return exact
        made = self._on_factors(site, read, factors) if _adds_factors(self.method) else self._by_svd(site, read, exact)
        edit.note(site.layer.label, error_of_update=combine.relative_error(made, exact))
        return made

    def _on_factors(self, site: Composition, read: Sequence[Update], factors: Sequence[float]) -> Update:
        roots = [math.sqrt(abs(factor)) for factor in factors]
        signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
        a = self._merged(self.method, [update.a for update in read], signed, site.keys(f"{self.seed}/A"))
        b = self._merged(self.method, [update.b for update in read], roots, site.keys(f"{self.seed}/B"))
        return Update(a, b)

    def _by_svd(self, site: Composition, read: Sequence[Update], exact: Update) -> Update:
        rank = max(update.rank for update in read)
        if self.rank is not None:
            rank = rank_of_each(site.layer.site, self.rank)
        if self.method == "svd":
            return combine.truncated(exact, rank)
        products = [update.times(b.scale).product() for update, b in zip(read, site.branches, strict=True)]
        keys = site.keys(str(self.seed))
        return combine.factored(self._merged(self.method.removesuffix("_svd"), products, site.weights, keys), rank)

    def _merged(
        self, rule: str, tensors: Sequence[torch.Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> torch.Tensor:
        return combine.merged(rule, tensors, weights, keys, density=self.density, majority_sign=self.majority_sign)


def _adds_factors(method: str) -> bool:
    return method != "cat" and not method.endswith("svd")


def _bias(each: Sequence[Branch], factors: Sequence[float]) -> dict[str, torch.Tensor]:
    terms = [
        factor * branch.tensors["lora_B_bias"].detach().double()
        for branch, factor in zip(each, factors, strict=True)
        if "lora_B_bias" in branch.tensors
    ]
    return {"lora_B_bias": torch.stack(terms).sum(0)} if terms else {}


def _dropout(each: Sequence[Branch]) -> float:
    """The dropout that all share; updates of different dropouts have no common one."""
    rates = {branch.dropout or 0.0 for branch in each}
    return rates.pop() if len(rates) == 1 else 0.0


# -- refusals -----------------------------------------------------------------------------------------------------


def _refuse_base(program: Program, found: Sequence[Source], weights: Sequence[float]) -> None:
    """Whole parameters of the base are no terms of a sum: all adapters must agree on them, with the weight 1."""
    names = [source.adapter for source in found]
    for name, values in trained_base(program, found).items():
        first = next(iter(values.values()))
        if any(not torch.equal(first, value) for value in values.values()):
            raise RewriteError(
                f"{name} was trained or replaced by several adapters, to different values",
                evidence=[f"by: {', '.join(values)}"],
                fix="Combine adapters of which at most one trains biases or saves this module.",
            )
        scaled = next((n for n in values if weights[names.index(n)] != 1), None)
        if scaled is not None:
            raise RewriteError(
                f"{name} was trained or replaced by the adapter {scaled}, and a weight has no meaning for it",
                evidence=[f"weight of {scaled}: {weights[names.index(scaled)]}"],
                fix="Give this adapter the weight 1.",
            )


def _check_options(compose: Compose) -> None:
    object.__setattr__(compose, "adapters", _listed("adapters", compose.adapters, str))
    object.__setattr__(compose, "weights", _listed("weights", compose.weights, int, float))
    twice = sorted({name for name in compose.adapters if compose.adapters.count(name) > 1})
    if twice:
        raise UsageError(f"the adapter {twice[0]!r} is given twice", fix="Give it once, with the sum of the weights.")
    for weight in compose.weights:
        if not math.isfinite(weight):
            raise UsageError(f"a weight is {weight!r}", fix="A weight is a finite number; it may be negative.")
    if compose.adapters and compose.weights and len(compose.adapters) != len(compose.weights):
        raise UsageError(
            f"{len(compose.weights)} weights for {len(compose.adapters)} adapters", fix="Give one weight each."
        )
    if compose.method not in get_args(Method):
        raise UsageError(f"method is {compose.method!r}", fix=f"One of {', '.join(get_args(Method))}.")
    if compose.majority_sign not in get_args(combine.Sign):
        raise UsageError(f"majority_sign is {compose.majority_sign!r}", fix="One of total, frequency.")
    _check_density(compose)
    if compose.rank is not None and not compose.method.endswith("svd"):
        raise UsageError(f"rank={compose.rank!r} with the method {compose.method}", fix="Only SVD chooses a rank.")
    check_rank(compose.rank)
    check_adapter(compose.adapter)
    for name, value, kind in (("drop", compose.drop, bool), ("seed", compose.seed, int)):
        if type(value) is not kind:
            raise UsageError(f"{name} is {value!r}", fix=f"A value of the type {kind.__name__}.")


def _check_density(compose: Compose) -> None:
    reduces = compose.method.startswith(("ties", "dare", "magnitude"))
    if reduces and compose.density is None:
        raise UsageError(f"method {compose.method} needs a density", fix="The share of entries to keep, such as 0.5.")
    if not reduces and compose.density is not None:
        raise UsageError(f"density={compose.density!r} with the method {compose.method}", fix="It keeps every entry.")
    check_density(compose.density)


def _listed(field: str, value: Any, *kinds: type) -> tuple[Any, ...]:
    """A list as a tuple; exact types, because a configuration file may hold anything and a bool is no number."""
    if not isinstance(value, (list, tuple)) or any(type(item) not in kinds for item in value):
        raise UsageError(f"{field} is {value!r}", fix="Give a list, of names for adapters and of numbers for weights.")
    return tuple(value)
