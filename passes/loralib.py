"""Trained LoRAs from a checkpoint of `microsoft/LoRA` (loralib), as a pass."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from passes.loralib_place import Trained, base_sites, layer_sites
from passes.peft_place import place
from rewriter.edit import Edit
from rewriter.errors import RewriteError, RewriteWarning, UsageError
from rewriter.find import Miss, Sites
from rewriter.formats import loralib
from rewriter.formats.peft import PeftFiles
from rewriter.program import Program
from rewriter.transform import FREE, Law
from rewriter.view import layers, modules

_PARTS = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True, slots=True)
class LoralibAdapter:
    """Put the trained LoRAs of a loralib state dict onto the model they were trained on.

        y = x Wᵀ + b      ->      y = x Wᵀ + b + alpha / r · (x Aᵀ) Bᵀ

    `file` is what `torch.save(lora.lora_state_dict(model))` or `torch.save(model.state_dict())` wrote, or the same as
    safetensors. Shapes, with W [o, i]: Linear A [r, i], B [o, r]; Embedding A [r, rows], B [width, r]; MergedLinear
    with n of N parts A [n r, i], B [n o / N, r], one LoRA per part; Conv2d with a k x k kernel A [r k, i k],
    B [o k, r k], which is a convolutional LoRA of the rank r k². The ranks follow from the shapes. `alpha` does not,
    and must be given as it was in training; so must `enable`, the names of the trained parts of a MergedLinear.

    Biases in the file are the trained ones where it holds no other weights, else those that differ. Where it holds the
    weight of an adapted layer, that shows whether the file was saved merged (`model.eval()` in loralib adds the update
    to the weight): a weight that differs by exactly this update is left out with a warning, one that differs by a
    multiple of it refutes `alpha`. Other weights must be the program's, unless `force_base` takes them from the file.
    `sha256` over the file is filled in when it is empty, and checked when it is not.

    Raises `UsageError` without `alpha`, or without `enable` for a MergedLinear; `RewriteError` unless every tensor has
    exactly one place of its shape in the program; `LawError` for NaN and infinity unless `allow_nonfinite`.
    Source: Hu et al. 2021, arXiv 2106.09685, eq. 3; the files of loralib 0.1.
    """

    name: ClassVar[str] = "loralib"
    source: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"

    file: Path | None = None
    alpha: float | None = None
    enable: tuple[str, ...] = ()
    sha256: str = ""
    adapter: str = "default"
    force_base: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        _check_options(self)
        if self.file is not None:
            object.__setattr__(self, "file", Path(self.file))
            if not self.sha256:
                object.__setattr__(self, "sha256", loralib.digest(self.file))

    @property
    def law(self) -> Law:
        return FREE.because("the adapter is trained")

    def find(self, program: Program) -> Sites[Any]:
        if self.file is None or self.alpha is None:
            raise UsageError("no loralib file given", fix="Name the file that holds lora_A and lora_B: --file.")
        files = loralib.read(self.file, allow_nonfinite=self.allow_nonfinite)
        if files.sha256 != self.sha256:
            raise RewriteError(
                f"{self.file} is not the checkpoint that was meant",
                evidence=[f"meant: sha256 {self.sha256}", f"found: sha256 {files.sha256}"],
                fix="Give the file as it was, or leave the sha256 out.",
            )
        where = place(_unwrapped(files, program), program)
        if not where.identity:
            warnings.warn(f"{self.file} was made for another wrapping: {where}", RewriteWarning, stacklevel=2)
        held = {where.there(path): where.files.modules[path] for path in where.paths if path not in where.idle}
        known = layers(program)
        found = layer_sites(program, held, known, alpha=self.alpha, enable=self.enable, adapter=self.adapter)
        order = {path: number for number, path in enumerate(known)}
        found.sort(key=lambda site: order[site.path])
        self._check_use(found)
        missed = tuple(Miss(where.there(path), "the program never runs this module") for path in where.idle)
        return Sites((*base_sites(where, found, alpha=self.alpha, force=self.force_base), *found), missed)

    def rewrite(self, site: Any, edit: Edit) -> None:
        site.rewrite(edit)

    def _check_use(self, found: list[Trained]) -> None:
        if not found:
            raise RewriteError(f"{self.file}: the program runs none of its modules")
        if self.enable and not any(site.is_slice for site in found):
            raise UsageError(
                f"enable={','.join(self.enable)}, but every LoRA in {self.file} is for a whole layer",
                fix="Leave it out; it names the trained parts of a MergedLinear.",
            )
        if not any(site.a.any() and site.b.any() for site in found):
            warnings.warn(f"{self.file}: every update is zero, the LoRAs have no effect", RewriteWarning, stacklevel=3)


def _unwrapped(files: PeftFiles, program: Program) -> PeftFiles:
    """loralib's Conv2d keeps the convolution as its child `conv`; in other models the module is the convolution."""
    known = modules(program)
    inside = {path: f"{path}.conv" if f"{path}.conv" in known else path for path in files.modules}
    base: dict[str, torch.Tensor] = {}
    for name, tensor in files.base.items():
        owner, _, leaf = name.rpartition(".")
        module = owner.removesuffix(".conv")
        base[f"{inside[module]}.{leaf}" if module != owner and module in inside else name] = tensor
    return replace(files, modules={inside[path]: tensors for path, tensors in files.modules.items()}, base=base)


def _check_options(given: LoralibAdapter) -> None:
    if not given.adapter or "." in given.adapter:
        raise UsageError(f"adapter is {given.adapter!r}", fix="A name without dots.")
    unknown = [name for name in given.enable if name not in (*_PARTS, *_PARTS.values())]
    if unknown:
        raise UsageError(f"enable names {unknown[0]!r}", fix="Name parts: query, key and value, or q, k and v.")
    parts = [_PARTS.get(name, name) for name in given.enable]
    if len(set(parts)) < len(parts):
        raise UsageError(f"enable={','.join(given.enable)} names a part twice", fix="Name every part once.")
    if given.file is not None and given.alpha is None:
        raise UsageError(
            f"alpha is not given, and {given.file} does not hold it",
            evidence=["loralib computes alpha / r · (x Aᵀ) Bᵀ and saves A and B alone: any guess changes all outputs"],
            fix="Give the lora_alpha that the layers were trained with: --alpha.",
        )
    alpha: Any = given.alpha  # what a configuration file holds is not yet known
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if alpha is not None and not (number and math.isfinite(alpha)):
        raise UsageError(f"alpha is {alpha!r}", fix="alpha is a finite number.")
