"""A trained bottleneck adapter from a directory of the `adapters` library, as a pass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import torch

from passes.adapter import Adapter
from passes.adapter_config import options_of
from passes.adapter_place import Sublayer
from passes.adapterhub_place import match, saved_names, without_blocks
from passes.peft_method_sites import MethodSite
from rewriter.edit import Edit
from rewriter.errors import RewriteError, RewriteWarning, UsageError
from rewriter.find import Sites
from rewriter.formats import adapterhub
from rewriter.formats.adapterhub import AdapterHubFiles
from rewriter.formats.adapterhub_config import Bottleneck, read_config
from rewriter.program import Program
from rewriter.transform import FREE, Law
from rewriter.view import scope


@dataclass(frozen=True, slots=True)
class AdapterHubAdapter:
    """Put the trained bottleneck adapter of a directory of the `adapters` library onto its model.

        h = sublayer(x)      ->      h + scale · W_up act(W_down h)      as the directory's configuration says

    What is inserted, and its shapes, are those of the pass `adapter`, whose options follow from the configuration. An
    adapter finds its sublayer by the number of its block and the kind of sublayer in the data flow, so that a model
    whose modules were renamed since takes it too. A prediction head beside the adapter is not read. `sha256` over both
    files is filled in when it is empty, and checked when it is not. `config` is what the configuration says.

    Raises `RewriteError` unless every tensor has exactly one place, every place its tensors, and shapes, hidden size,
    model type and base name agree (`force_base` lets the last two differ); `UsageError` for options of the library that
    the pass does not have; `LawError` for NaN and infinity unless `allow_nonfinite`.
    Source: Poth et al. 2023, arXiv 2311.11077; the files of adapters 1.3.
    """

    name: ClassVar[str] = "adapterhub"
    source: ClassVar[str] = "Poth et al. 2023, arXiv 2311.11077"

    directory: Path | None = None
    sha256: str = ""
    adapter: str = "default"
    force_base: bool = False
    allow_nonfinite: bool = False
    config: Mapping[str, Any] = field(default_factory=dict, metadata={"given": False})

    def __post_init__(self) -> None:
        name: Any = self.adapter  # what a configuration file holds is not yet known
        if not isinstance(name, str) or not name or "." in name:
            raise UsageError(f"adapter is {name!r}", fix="A name without dots.")
        if self.directory is None:
            return
        object.__setattr__(self, "directory", Path(self.directory))
        if not self.sha256:
            object.__setattr__(self, "sha256", adapterhub.digest(self.directory))
        if not self.config and self.directory.is_dir():
            given = Bottleneck(**read_config(self.directory).options)
            object.__setattr__(self, "config", given.model_dump(exclude_defaults=True))

    @property
    def law(self) -> Law:
        return FREE.because("the adapter is trained")

    def find(self, program: Program) -> Sites[Any]:
        if self.directory is None:
            raise UsageError("no adapter directory given", fix="Name the directory that holds adapter_config.json.")
        files = adapterhub.read(self.directory, allow_nonfinite=self.allow_nonfinite)
        if files.sha256 != self.sha256:
            raise RewriteError(
                f"{self.directory} is not the adapter that was meant",
                evidence=[f"meant: sha256 {self.sha256}", f"found: sha256 {files.sha256}"],
                fix="Give the directory as it was, or leave the sha256 out.",
            )
        if not self.force_base:
            _check_base(files, program)
        return _sites(files, program, self.adapter)

    def rewrite(self, site: Any, edit: Edit) -> None:
        site.rewrite(edit)


def _sites(files: AdapterHubFiles, program: Program, adapter: str) -> Sites[Any]:
    """The sublayers that get an adapter, the last with all tensors, by the names of the program's parameters."""
    options = files.config.options
    pass_ = options_of({**options, "leave_out": [], **_unused(files)}, name=adapter)
    sites = pass_.find(program)
    wanted = without_blocks(sites.found, options["leave_out"])
    _check_width(files, wanted)
    placed = match(list(files.modules), wanted)
    _check_tensors(files, saved_names(options))
    values = {
        f"{scope(program, site.path)}.adapter.{adapter}.{ours}": files.modules[path][theirs]
        for path, site in placed.items()
        for theirs, ours in saved_names(options).items()
    }
    _warn_without_effect(files, pass_)
    *first, last = wanted
    found = [*(MethodSite(pass_, site) for site in first), MethodSite(pass_, last, values)]
    return Sites(tuple(found), sites.missed)


def _unused(files: AdapterHubFiles) -> dict[str, Any]:
    """Options that old configurations of task adapters give and nothing in the file bears out."""
    return {"inv_adapter": None} if files.config.legacy_task else {}


def _check_base(files: AdapterHubFiles, program: Program) -> None:
    """The model the adapter names must be the program's, as far as both say which it is."""
    record = program.metadata.get("huggingface", {})
    names = (Path(files.config.model_name or "").name, str(record.get("directory", "")))
    types = (files.config.model_type or "", str(record.get("config", {}).get("model_type", "")))
    for what, (wanted, given) in {"model type": types, "base model": names}.items():
        if wanted and given and wanted.lower() != given.lower():
            raise RewriteError(
                f"{files.directory} was trained on another {what}",
                evidence=[f"adapter: {wanted}", f"program: {given}"],
                fix="Use the base it was trained on; if it is the same under another name, add --force-base.",
            )


def _check_width(files: AdapterHubFiles, sites: list[Sublayer]) -> None:
    if not sites:
        raise UsageError(f"{files.directory}: leave_out leaves no block", fix="Correct adapter_config.json.")
    widths = sorted({site.width for site in sites})
    if files.config.hidden_size not in (None, *widths):
        raise RewriteError(
            f"{files.directory} was made for another size of model",
            evidence=[f"adapter: hidden size {files.config.hidden_size}", f"program: {', '.join(map(str, widths))}"],
            fix="Use the base model this adapter was trained on.",
        )


def _check_tensors(files: AdapterHubFiles, names: Mapping[str, str]) -> None:
    """Every adapter must hold exactly the tensors that the configuration means."""
    wrong = [
        f"{path}: {word} {name}"
        for path, tensors in files.modules.items()
        for word, these in (("no", {*names} - {*tensors}), ("unexpected", {*tensors} - {*names}))
        for name in sorted(these)
    ]
    if not wrong:
        wrong = [
            f"{path}: {one} is not {other}, and both are {names[one]}"
            for path, tensors in files.modules.items()
            for one, other in combinations(names, 2)
            if names[one] == names[other] and not torch.equal(tensors[one], tensors[other])
        ]
    if wrong:
        raise RewriteError(
            f"{files.directory}: the tensors are not those of its configuration",
            evidence=[*wrong[:8], *([f"and {len(wrong) - 8} more"] if len(wrong) > 8 else [])],
            fix="Use the adapter_config.json that belongs to these weights.",
        )


def _warn_without_effect(files: AdapterHubFiles, pass_: Adapter) -> None:
    def silent(tensors: Mapping[str, torch.Tensor]) -> bool:
        return not tensors["adapter_up.weight"].any() and not tensors["adapter_up.bias"].any()

    if not pass_.norm_after and all(silent(tensors) for tensors in files.modules.values()):
        warnings.warn(f"{files.directory}: every W_up is zero, the adapter has no effect", RewriteWarning, stacklevel=4)
