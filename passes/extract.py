"""The LoRA that best explains the difference between two checkpoints of one architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from passes.lora import Lora
from passes.peft_write import write_adapter
from rewriter import verify
from rewriter.errors import LawError, RewriteError, UsageError
from rewriter.find import Sites, Targets, select
from rewriter.formats.peft_targets import short_names, short_patterns
from rewriter.program import Program
from rewriter.transform import Result, apply
from rewriter.view import Linear, Site, layers, modules


@dataclass(frozen=True, slots=True)
class Factors:
    """The LoRA of one layer, scale 1: A [rank, i], B [o, rank], and the share of the change's energy that B A holds."""

    a: Tensor
    b: Tensor
    share: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True)
class Extraction:
    """A LoRA per layer path, and everything else that differs.

    `uncovered` is tensor name -> ‖tuned − base‖ / ‖base‖ (Frobenius; infinite for a base of zeros) of each differing
    tensor that no LoRA covers: biases, norms, embeddings, layers that are no target.
    """

    base: Program
    factors: Mapping[str, Factors]
    uncovered: Mapping[str, float]
    alpha: float | None

    @property
    def share(self) -> Mapping[str, float]:
        """Layer path -> sum of the kept squared singular values of its change over the sum of all; 1 where equal."""
        return {path: factors.share for path, factors in self.factors.items()}

    def apply(self, program: Program | None = None, *, adapter: str = "default") -> Result:
        """The base, or another program of its layers, with the LoRAs: one step named `lora`.

        Raises `UsageError` when a layer is missing or has another size.
        """
        base = self.base if program is None else program
        lora = self._lora(base, adapter)
        result = apply(base, lora)
        values = {}
        for path, factors in self.factors.items():
            # With alpha given, scale is not 1; B gives it back.
            scale = lora.scale_of(next(site for site in result.sites if site.path == path))
            values[f"{path}.lora_A.{adapter}"] = factors.a
            values[f"{path}.lora_B.{adapter}"] = factors.b / scale
        filled = result.program.with_tensors(
            {name: value.to(result.program.tensor(name).dtype) for name, value in values.items()}
        )
        absolute, relative, equal, _ = verify.compare(base, filled)
        change = verify.Change(absolute, relative, equal, None)
        return Result(filled, (replace(result.applied[0], change=change),))

    def write(self, directory: Path, *, base_model: str | None = None, overwrite: bool = False) -> Path:
        """The LoRAs as a PEFT adapter directory for the base."""
        return write_adapter(self.apply().program, directory, base_model=base_model, overwrite=overwrite)

    def _lora(self, program: Program, adapter: str) -> Lora:
        paths = list(self.factors)
        rank, ranks = short_patterns({path: factors.rank for path, factors in self.factors.items()})
        alphas = {path: self.alpha or factors.rank for path, factors in self.factors.items()}
        alpha, others = short_patterns(alphas)
        return Lora(
            targets=tuple(short_names(paths, modules(program))),
            rank=rank,
            alpha=alpha,
            rank_pattern=ranks,
            alpha_pattern=others,
            adapter=adapter,
        )


def extract(
    base: Program,
    tuned: Program | Mapping[str, Tensor],
    *,
    rank: int,
    targets: Targets = "all-linear",
    alpha: float | None = None,
) -> Extraction:
    """The LoRA of a given rank nearest to `tuned − base`, per linear layer.

        W + B A ≈ W_tuned,  B A = the `rank` largest singular triples of W_tuned − W

    Shapes: W [o, i], A [rank, i], B [o, rank], both with the square roots of the singular values. `alpha` defaults to
    the rank, so that the scale is 1; another one changes B alone. A layer smaller than `rank` gets the rank it can
    have. No matrix of that rank is nearer in the Frobenius norm (Eckart and Young 1936).

    Raises `UsageError` for targets that match nothing and ranks below 1, `RewriteError` when names or shapes of the
    two differ or nothing differs, `LawError` for NaN or infinity.
    """
    if type(rank) is not int or rank < 1:
        raise UsageError(f"rank is {rank!r}", fix="A rank is a whole number of at least 1.")
    if alpha is not None and not alpha > 0:
        raise UsageError(f"alpha is {alpha!r}", fix="alpha is a positive number.")
    sites = select(base, targets, kinds=(Linear,))
    changed = _changed(base, _matched(base, tuned))
    factors = {site.path: _nearest(site, *changed[site.weight], rank) for site in sites if site.weight in changed}
    if not factors:
        raise RewriteError(
            "no target differs between the two checkpoints",
            evidence=[f"{len(changed)} other tensors differ: {', '.join(list(changed)[:6])}"] if changed else [],
            fix="Check that the second one is the fine-tuned one, and the targets.",
        )
    covered = _covered(base, sites)
    uncovered = {name: _relative(*pair) for name, pair in changed.items() if name not in covered}
    return Extraction(base, factors, uncovered, alpha)


def _matched(base: Program, tuned: Program | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tuned tensors under the names of the base; tied names may be given once."""
    given = dict(tuned.exported.state_dict if isinstance(tuned, Program) else tuned)
    for group in base.tied():
        present = [name for name in group if name in given]
        given.update({name: given[present[0]] for name in group if present and name not in given})
    needed = {name: t for name, t in base.exported.state_dict.items() if t.is_floating_point()}
    buffers = set(needed) - set(base.parameters())
    missing = sorted(set(needed) - set(given) - buffers)
    extra = sorted(n for n, t in given.items() if n not in base.tensors and t.is_floating_point())
    wrong = [
        f"{name}: base {list(needed[name].shape)}, tuned {list(given[name].shape)}"
        for name in needed
        if name in given and needed[name].shape != given[name].shape
    ]
    held = [name for name in missing if f"{name}_packed" in given]
    if held:
        raise RewriteError(
            f"{held[0]} of the tuned program is held in 4 bits, which has no difference to the base's to extract",
            fix="Apply dequantise to it first.",
        )
    lines = [*(f"only in the base: {n}" for n in missing), *(f"only in the tuned: {n}" for n in extra), *wrong]
    if lines:
        raise RewriteError(
            "the two are not checkpoints of one architecture",
            evidence=[*lines[:8], *([f"and {len(lines) - 8} more"] if len(lines) > 8 else [])],
            fix="Give a base and its fine-tune with the same names and shapes.",
        )
    return {name: given[name] for name in needed if name in given}


def _changed(base: Program, tuned: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (base, tuned) of the tensors whose values differ."""
    result = {}
    for name, after in tuned.items():
        before = base.tensor(name).detach()
        after = after.detach().to(before.device)
        if torch.equal(before, after.to(before.dtype)) and torch.equal(before.to(after.dtype), after):
            continue
        for which, tensor in (("base", before), ("tuned", after)):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise LawError(f"{name} of the {which} checkpoint holds {bad} NaN or infinite values")
        result[name] = (before, after)
    return result


def _nearest(site: Site, before: Tensor, after: Tensor, rank: int) -> Factors:
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    change = after.to(wide) - before.to(wide)
    if isinstance(site, Linear) and site.transposed:
        change = change.t()
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    kept = s[:rank]
    root = kept.sqrt()
    energy = s.double().square()
    share = float(energy[:rank].sum() / energy.sum())
    return Factors((root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous(), share)


def _covered(base: Program, sites: Sites[Site]) -> set[str]:
    """The names of the weights that a LoRA explains: not those that a layer without one reads, too."""
    chosen = {site.path for site in sites}
    elsewhere = {site.weight for site in layers(base).values() if site.path not in chosen}
    weights = {site.weight for site in sites} - elsewhere
    tied = {name for group in base.tied() if weights & set(group) for name in group}
    return weights | tied


def _relative(before: Tensor, after: Tensor) -> float:
    size = float(before.double().norm())
    change = float((after.double() - before.double()).norm())
    return change / size if size else float("inf")
