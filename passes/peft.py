"""A trained adapter from a PEFT adapter directory, as a pass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from passes.lora import Lora
from passes.peft_method_sites import method_sites
from passes.peft_place import Place, place
from rewriter.edit import Edit
from rewriter.errors import RewriteError, RewriteWarning, UsageError
from rewriter.find import Miss, Sites, select
from rewriter.formats import peft
from rewriter.formats.json import read_json
from rewriter.formats.peft_config import CONFIG, LoraConfig
from rewriter.formats.peft_methods import LayerNormConfig
from rewriter.formats.peft_targets import TargetedConfig, short_names, short_patterns
from rewriter.formats.sniff import Kind, require
from rewriter.norms import norms
from rewriter.program import Program
from rewriter.transform import FREE, Law, Pass, Result, apply
from rewriter.view import Conv, Embedding, Linear, layers, modules


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """Put the trained adapter of a PEFT directory onto the model it was trained on.

        y = x Wᵀ + b      ->      y = x Wᵀ + b + scale · (x Aᵀ) Bᵀ      for a LoRA

    What is inserted, and its shapes, are those of the pass for the method that `adapter_config.json` names, whose
    options follow from it. Trained biases and `modules_to_save` replace what the program holds; a saved module that
    shares its weight is untied. Of prefixes and prompts PEFT saves what their encoder gave, not the encoder.
    `sha256` over both files is filled in when it is empty, and checked when it is not; a recipe records it beside the
    directory's last name. So is `config`, what the configuration of a method other than LoRA says.

    Raises `RewriteError` unless every tensor has exactly one place, every module of the configuration its tensors, and
    every shape, rank and base name agree (`force_base` lets the base name differ); `LawError` for NaN and infinity
    unless `allow_nonfinite`; with `strict`, `UsageError` for unknown fields whatever PEFT wrote them.
    Source: Hu et al. 2021, arXiv 2106.09685; the files of PEFT 0.21.
    """

    name: ClassVar[str] = "peft"
    source: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"

    directory: Path | None = None
    sha256: str = ""
    adapter: str = "default"
    strict: bool = False
    force_base: bool = False
    allow_nonfinite: bool = False
    config: Mapping[str, Any] = field(default_factory=dict, metadata={"given": False})

    def __post_init__(self) -> None:
        if not self.adapter or "." in self.adapter:
            raise UsageError(f"adapter is {self.adapter!r}", fix="A name without dots.")
        if self.directory is not None:
            object.__setattr__(self, "directory", Path(self.directory))
            if not self.sha256:
                require(self.directory, Kind.PEFT_ADAPTER)
                object.__setattr__(self, "sha256", peft.digest(self.directory))
            held = read_json(self.directory / CONFIG) if not self.config and self.directory.is_dir() else {}
            if held.get("peft_type") not in (None, "LORA"):
                object.__setattr__(self, "config", held)

    @property
    def law(self) -> Law:
        return FREE.because("the adapter is trained")

    def find(self, program: Program) -> Sites[Any]:
        if self.directory is None:
            raise UsageError("no adapter directory given", fix="Name the directory that holds adapter_config.json.")
        read = read_adapter(
            self.directory,
            program,
            adapter=self.adapter,
            strict=self.strict,
            force_base=self.force_base,
            allow_nonfinite=self.allow_nonfinite,
        )
        if read.sha256 != self.sha256:
            raise RewriteError(
                f"{self.directory} is not the adapter that was meant",
                evidence=[f"meant: sha256 {self.sha256}", f"found: sha256 {read.sha256}"],
                fix="Give the directory as it was, or leave the sha256 out.",
            )
        return read.sites

    def rewrite(self, site: Any, edit: Edit) -> None:
        site.rewrite(edit)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter directory, checked against one program: the pass it means, and where every tensor goes."""

    directory: Path
    adapter: str
    pass_: Pass
    sites: Sites[Any]
    sha256: str
    options: Mapping[str, Any]

    def apply(self, program: Program, *, check: bool = True) -> Result:
        """The program with the trained adapter, by one step named `peft` that `undo` takes back."""
        step = PeftAdapter(self.directory, self.sha256, self.adapter, **self.options)
        return apply(program, step, check=check)


def read_adapter(
    directory: Path,
    program: Program,
    *,
    adapter: str = "default",
    strict: bool = False,
    force_base: bool = False,
    allow_nonfinite: bool = False,
) -> Adapter:
    """Read a PEFT directory for a program; nothing is changed. Raises as `PeftAdapter`."""
    files = peft.read(Path(directory), strict=strict, allow_nonfinite=allow_nonfinite)
    if not force_base:
        _check_base(files, program)
    where = place(files, program)
    if not where.identity:
        warnings.warn(f"{files.directory} was made for another wrapping: {where}", RewriteWarning, stacklevel=2)
    if isinstance(files.config, TargetedConfig):
        _check_coverage(files.config, program, where)
    pass_, sites = _sites(program, where, adapter)
    options = {"strict": strict, "force_base": force_base, "allow_nonfinite": allow_nonfinite}
    return Adapter(files.directory, adapter, pass_, sites, files.sha256, options)


def _sites(program: Program, where: Place, adapter: str) -> tuple[Pass, Sites[Any]]:
    files = where.files
    if not isinstance(files.config, LoraConfig):
        return method_sites(where, program, adapter)
    lora = _lora(files.config, program, where, adapter)
    found = [site for path in where.paths if (site := where.layer(lora, path)) is not None]
    order = {path: number for number, path in enumerate(layers(program))}
    found.sort(key=lambda site: order[site.path])
    _warn_without_effect(files, files.config)
    missed = tuple(Miss(where.there(path), "the program never runs this module") for path in where.idle)
    trained = set(lora.trained_beside(program, [site.path for site in found]))
    return lora, Sites((*where.parameters(trained), *found), missed)


def _check_base(files: peft.PeftFiles, program: Program) -> None:
    wanted = Path(files.config.base_model_name_or_path or "").name
    given = str(program.metadata.get("huggingface", {}).get("directory", ""))
    if wanted and given and wanted.lower() != given.lower():
        raise RewriteError(
            f"{files.directory} was trained on another base model",
            evidence=[f"adapter: {files.config.base_model_name_or_path}", f"program: {given}"],
            fix="Use the base it was trained on; if it is the same under another name, add --force-base.",
        )


def _check_coverage(config: TargetedConfig, program: Program, where: Place) -> None:
    """The configuration and the tensors must mean the same modules."""
    files, held = where.files, set(where.paths)
    if isinstance(config, LayerNormConfig):
        held = {owner for name in files.base if not config.saves(owner := name.rpartition(".")[0])}
        candidates = {where.here(norm.path) for norm in norms(program)}
    else:
        candidates = {where.here(site.path) for site in layers(program).values()}
    wanted = {path for path in candidates if config.wants(path)}
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        linear = {where.here(site.path) for site in select(program, "all-linear", kinds=(Linear, Conv, Embedding))}
        wanted &= linear
    problems = {
        "the configuration targets, but the weights lack": sorted(wanted - held),
        "the weights hold, but the configuration does not target": sorted(
            path for path in held if not config.wants(path) and not any(config.wants(p) for p in where.tied(path))
        ),
    }
    for what, paths in problems.items():
        if paths:
            raise RewriteError(
                f"{files.directory}: modules that {what}: {len(paths)}",
                evidence=[*paths[:8], *([f"and {len(paths) - 8} more"] if len(paths) > 8 else [])],
                fix="Use the adapter_config.json that belongs to these weights.",
            )
    idle = config.unmatched(held)
    if idle:
        raise UsageError(
            f"{files.directory}: {idle[0]} matches no module",
            evidence=[f"adapted modules: {', '.join(sorted(held)[:6])}", *idle[1:8]],
            fix="Remove it from adapter_config.json, or use the model that has such a module.",
        )


def _lora(config: LoraConfig, program: Program, where: Place, adapter: str) -> Lora:
    """The LoRA pass that builds what the configuration describes, in the paths of this program."""
    here = {where.there(path): path for path in where.paths if path not in where.idle}
    if not here:
        raise RewriteError(f"{where.files.directory}: the program runs none of its modules")
    rank, ranks = short_patterns({path: config.rank_of(old) for path, old in here.items()})
    alpha, alphas = short_patterns({path: config.alpha_of(old) for path, old in here.items()})
    saved = [name for name in config.modules_to_save or () if where.saves(name)]
    idle = sorted(set(config.modules_to_save or ()) - {*saved, "classifier", "score"})  # PEFT adds these two unasked
    if idle:
        raise UsageError(
            f"{where.files.directory}: modules_to_save {idle[0]!r} matches no saved tensor",
            evidence=[f"saved: {', '.join(where.files.base) or 'none'}"],
            fix="The adapter is incomplete: save or download it again.",
        )
    init = config.init_lora_weights
    transposed = [s.path for s in layers(program).values() if isinstance(s, Linear) and s.transposed and s.path in here]
    if init == "olora" and transposed:
        raise RewriteError(f"init_lora_weights=olora on {transposed[0]}, whose weight is stored [i, o]: not supported")
    return Lora(
        targets=tuple(short_names(list(here), modules(program))),
        rank=rank,
        alpha=alpha,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        dropout=config.lora_dropout,
        init=init if init in ("gaussian", "pissa", "olora") else "kaiming",  # type: ignore[arg-type]
        rslora=config.use_rslora,
        dora=config.use_dora,
        lora_bias=config.lora_bias,
        bias=config.bias,
        modules_to_save=tuple(saved),
        adapter=adapter,
    )


def _warn_without_effect(files: peft.PeftFiles, config: LoraConfig) -> None:
    if files.base or config.use_dora or config.init_lora_weights in ("pissa", "olora"):
        return

    def is_zero(tensors: Mapping[str, torch.Tensor]) -> bool:
        return any(not tensors[kind].any() for pair in peft.PAIRS.items() for kind in pair if kind in tensors)

    if not any("lora_B_bias" in tensors or not is_zero(tensors) for tensors in files.modules.values()):
        warnings.warn(f"{files.directory}: every B is zero, the adapter has no effect", RewriteWarning, stacklevel=3)
