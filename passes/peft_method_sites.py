"""Where the tensors of a PEFT adapter that is no LoRA go: the pass that makes their parameters, then their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from passes.layer_norm_tuning import LayerNormTuning
from passes.lora import Lora
from passes.peft_methods import METHODS, Tensors
from passes.peft_place import Place, misfit
from passes.peft_prompts import TABLES, rows_of
from rewriter.edit import Edit
from rewriter.errors import RewriteError
from rewriter.find import Miss, Sites
from rewriter.formats.peft_methods import LayerNormConfig, PromptLearningConfig
from rewriter.formats.peft_targets import AdapterConfig
from rewriter.program import Program
from rewriter.transform import Pass


@dataclass(frozen=True, slots=True)
class MethodSite:
    """A place that a pass changes; the last one of the adapter also brings all trained tensors, by parameter name."""

    pass_: Pass
    site: Any
    values: Mapping[str, torch.Tensor] | None = None

    @property
    def path(self) -> str:
        return str(self.site.path)

    def rewrite(self, edit: Edit) -> None:
        self.pass_.rewrite(self.site, edit)
        if self.values is None:
            return
        closing = getattr(self.pass_, "finish", None)
        if closing is not None:
            closing(edit)
        lost = sorted({*self.values} - {*edit.added})
        missing = sorted({*edit.trainable} & {*edit.added} - {*self.values})
        if lost or missing:
            raise RewriteError(
                f"the tensors are not those of {self.pass_.name} with this configuration",
                evidence=[*(f"no place: {name}" for name in lost[:4]), *(f"no tensor: {n}" for n in missing[:4])],
                fix="Use the adapter_config.json and the model that belong to these weights.",
            )
        for name, value in self.values.items():
            before = edit.program.tensor(name)
            if before.shape != value.shape:
                raise misfit(name, before.shape, value.shape)
            edit.program.store(name, value.to(before.dtype))


def method_sites(where: Place, program: Program, adapter: str) -> tuple[Pass, Sites[Any]]:
    """The pass that a configuration means, and its sites with the trained tensors.

    Raises `RewriteError` when the pass finds other places than the adapter has tensors for.
    """
    files = where.files
    held = {where.there(path): dict(kinds) for path, kinds in files.modules.items() if path and path not in where.idle}
    old = {where.there(path): path for path in files.modules}
    base = where.parameters(_trained(where, program, list(held)))
    missed = tuple(Miss(where.there(path), "the program never runs this module") for path in where.idle)
    if isinstance(files.config, LayerNormConfig):
        owners = (site.path.rpartition(".")[0] for site in base)
        names = tuple(dict.fromkeys(path for path in owners if not files.config.saves(where.here(path))))
        return LayerNormTuning(targets=names), Sites(tuple(base), missed)
    pass_ = _pass(files.config, held, old, adapter)
    sites = pass_.find(program)
    held = _one_of_tied(where, held, {site.path for site in sites})
    values = {f"{path}.{kind}.{adapter}": tensor for path, kinds in held.items() for kind, tensor in kinds.items()}
    root = files.modules.get("", {})
    if isinstance(files.config, PromptLearningConfig):
        root = {kind: rows_of(files.directory, files.config, tensor) for kind, tensor in root.items()}
    values |= {f"{kind}.{adapter}": tensor for kind, tensor in root.items()}
    *first, last = sites
    found = [*(MethodSite(pass_, site) for site in first), MethodSite(pass_, last, values)]
    return pass_, Sites((*base, *found), (*missed, *sites.missed))


def _pass(config: AdapterConfig, held: Tensors, old: Mapping[str, str], adapter: str) -> Pass:
    prompts = TABLES.get(config.peft_type)
    if prompts is not None:
        return prompts.kind(**prompts.options(config), adapter=adapter)  # type: ignore[call-arg]
    method = METHODS[config.peft_type]
    return method.kind(**method.options(config, held, old), adapter=adapter)  # type: ignore[call-arg]


def _trained(where: Place, program: Program, adapted: list[str]) -> set[str]:
    """What trains of the base model beside the adapter."""
    config = where.files.config
    if isinstance(config, LayerNormConfig):
        return {where.there(name) for name in where.files.base}
    bias = {"all": "all", "lora_only": "lora_only", "vera_only": "lora_only"}.get(getattr(config, "bias", ""), "none")
    saved = tuple(name for name in config.modules_to_save or () if where.saves(name))
    return set(Lora(bias=bias, modules_to_save=saved).trained_beside(program, adapted))  # type: ignore[arg-type]


def _one_of_tied(
    where: Place, held: Mapping[str, dict[str, torch.Tensor]], found: set[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """Of the users of one tied weight, each of which PEFT gives its own tensors, the one that the pass changes."""
    kept = {path: kinds for path, kinds in held.items() if path in found}
    for path, kinds in held.items():
        if path in found:
            continue
        tied = {where.there(name) for name in where.tied(where.here(path))}
        other = next((kept[name] for name in tied if name in kept), None)
        if other is None or any(not torch.equal(tensor, other[kind]) for kind, tensor in kinds.items()):
            raise RewriteError(
                f"{path} has tensors of its own in the adapter, but no place of its own in the program",
                evidence=[f"places: {', '.join(sorted(found)[:6])}"],
                fix="Use the model this adapter was trained on.",
            )
    return kept
