"""LayerNorm tuning: the gains and biases of the norms train, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from passes.lora import Lora
from rewriter.edit import Edit
from rewriter.errors import UsageError, closest
from rewriter.find import Miss, Sites, Targets, full_match
from rewriter.norms import Norm, norms
from rewriter.program import Program
from rewriter.transform import EXACT, Law
from rewriter.view import modules

EVERY = "@norm"


@dataclass(frozen=True, slots=True)
class LayerNormTuning:
    """Train the gains and biases of the norm layers, and nothing else.

        y = x / size(x) · w + b      ->      the same, with w and b trainable

    Shapes: w [d], b [d]; no parameter and no operation is added, so there is nothing to merge. Norms are found in the
    graph: layer, RMS, group, batch and instance norms, also those that are written out as elementwise operations.
    `targets` are names as PEFT's `target_modules`, or `@norm` for every norm of the model.

    Raises `UsageError` when a target matches no norm.
    Source: Zhao et al. 2023, arXiv 2312.11420.
    """

    name: ClassVar[str] = "ln_tuning"
    source: ClassVar[str] = "Zhao et al. 2023, arXiv 2312.11420"

    targets: Targets = (EVERY,)
    exclude: Targets = ()
    modules_to_save: tuple[str, ...] = ()

    @property
    def law(self) -> Law:
        return EXACT.because("no value and no operation changes")

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[Norm]:
        every = norms(program)
        names = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        if not names:
            raise UsageError("no target given", fix=f"Give the names of norms, or {EVERY}.")
        chosen: dict[str, Norm] = {}
        for name in names:
            hits = [norm for norm in every if name == EVERY or _matches(self.targets, name, norm.path)]
            if not hits:
                raise _unmatched(program, name, every)
            chosen.update((norm.path, norm) for norm in hits)
        missed = []
        for norm in list(chosen.values()):
            if any(_matches(self.exclude, name, norm.path) for name in _listed(self.exclude)):
                missed.append(Miss(norm.path, "excluded"))
            elif not norm.parameters:
                missed.append(Miss(norm.path, f"this {norm.kind} has no gain and no bias"))
        for miss in missed:
            del chosen[miss.path]
        if not chosen:
            raise UsageError(
                f"targets {', '.join(names)} match no norm that can train",
                evidence=[f"{miss.path}: {miss.reason}" for miss in missed[:6]],
                fix="Loosen the exclusion, or name norms with parameters.",
            )
        return Sites(tuple(chosen.values()), tuple(missed))

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Norm, edit: Edit) -> None:
        for name in site.parameters:
            edit.train(name)

    def finish(self, edit: Edit) -> None:
        Lora(modules_to_save=self.modules_to_save).finish(edit)


def _listed(targets: Targets) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else tuple(targets)


def _matches(targets: Targets, target: str, path: str) -> bool:
    if isinstance(targets, str):
        return full_match(target, path)
    return path == target or path.endswith("." + target)


def _unmatched(program: Program, target: str, every: tuple[Norm, ...]) -> UsageError:
    if not every:
        return UsageError("the program has no norm layer at all", fix="Use a pass that adapts other layers.")
    known = modules(program)
    module = next((path for path in known if path == target or path.endswith("." + target)), None)
    paths = [norm.path for norm in every]
    if module is not None:
        return UsageError(
            f"target {target!r} matches {module}, which is no norm",
            evidence=[f"norms: {', '.join(paths[:6])}"],
            fix="Name norms; `modules_to_save` trains other modules whole.",
        )
    return UsageError(
        f"target {target!r} matches no norm of the program",
        evidence=[f"closest: {', '.join(closest(target, paths) or paths[:6])}"],
        fix=f"Every target must match. Correct the name, or give {EVERY}.",
    )
