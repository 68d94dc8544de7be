"""Where the tensors of a loralib checkpoint go in a program, and what the weights beside them prove."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from passes.lora import Lora
from passes.peft_place import ParameterSite, Place, misfit
from rewriter.edit import Edit
from rewriter.errors import RewriteError, RewriteWarning, UsageError
from rewriter.find import fused_parts
from rewriter.program import Program
from rewriter.view import Conv, Embedding, Linear, Site

_BASE = "Use the base model that the LoRAs were trained on."
_ROUNDINGS = 16  # loralib rounds the weight each time it merges or takes the update out again


@dataclass(frozen=True, slots=True)
class Trained:
    """A layer, or a slice of one, that gets a LoRA with these factors."""

    site: Site
    lora: Lora
    a: torch.Tensor
    b: torch.Tensor

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def is_slice(self) -> bool:
        return isinstance(self.site, Linear) and self.site.part is not None

    def rewrite(self, edit: Edit) -> None:
        known = len(edit.added)
        self.lora.rewrite(self.site, edit)
        for name, value in zip(edit.added[known:], (self.a, self.b), strict=True):
            edit.program.store(name, value.to(edit.program.tensor(name).dtype))

    def update(self, weight: torch.Tensor) -> torch.Tensor:
        """What the LoRA adds to the weight, as the weight is stored, in fp64."""
        product = self.lora.scale_of(self.site) * (self.b.double().flatten(1) @ self.a.double().flatten(1))
        if isinstance(self.site, Linear) and self.site.part is not None:
            whole = product.new_zeros(self.site.out_features, self.site.in_features)
            whole[self.site.part.start : self.site.part.stop] = product
            product = whole
        turned = isinstance(self.site, Embedding) or (isinstance(self.site, Linear) and self.site.transposed)
        return product.t() if turned else product.view(weight.shape)


# -- LoRAs --------------------------------------------------------------------------------------------------------


def layer_sites(
    program: Program,
    held: Mapping[str, Mapping[str, torch.Tensor]],
    known: Mapping[str, Site],
    *,
    alpha: float,
    enable: Sequence[str],
    adapter: str,
) -> list[Trained]:
    """The sites of all adapted modules; `held` is module path -> `lora_A`, `lora_B`, as loralib stores them.

    Raises `RewriteError` for a module that is no layer or has other sizes, `UsageError` when `enable` does not fit.
    """
    found = []
    for path, tensors in held.items():
        sites = [site for site in known.values() if site.path == path]
        site = next((s for s in sites if isinstance(s, Embedding)), next(iter(sites), None))
        a, b = tensors["lora_A"], tensors["lora_B"]
        if isinstance(site, Conv):
            found.append(_convolution(program, site, a, b, alpha, adapter))
        elif isinstance(site, (Linear, Embedding)):
            rank = b.shape[1]
            lora = Lora(targets=(path,), rank=rank, alpha=alpha, adapter=adapter)
            if (a.shape, b.shape) == ((rank, site.in_features), (site.out_features, rank)):
                found.append(Trained(site, lora, a, b))
            else:
                found += _slices(program, site, lora, a, b, enable)
        else:
            raise RewriteError(
                f"{path}: a LoRA of loralib does not fit here",
                evidence=[f"the program has: {site.kind if site else 'a module without a weight'}"],
                fix=_BASE,
            )
    return found


def _slices(
    program: Program, site: Linear | Embedding, lora: Lora, a: torch.Tensor, b: torch.Tensor, enable: Sequence[str]
) -> list[Trained]:
    """One LoRA per trained part of a MergedLinear: the rows of A and B lie part after part."""
    count, rest = divmod(a.shape[0], lora.rank)
    width = b.shape[0] // count if count else 0
    fits = isinstance(site, Linear) and not rest and count and not b.shape[0] % count and a.shape[1] == site.in_features
    if not isinstance(site, Linear) or not fits or site.out_features % width or count * width > site.out_features:
        raise _misfit(site, a, b)
    of = f"{count} of {site.out_features // width} parts"
    shapes = f"A {list(a.shape)}, B {list(b.shape)} on {site.out_features} outputs: {of}, {width} outputs each"
    if len(enable) != count:
        given = f"enable names {len(enable)} parts" if enable else "enable is not given"
        raise UsageError(
            f"{site.path}: the LoRAs are for {of} of a fused layer, and {given}",
            evidence=[shapes, "the file does not say which parts"],
            fix="Name the parts that were trained, such as --enable query,value for enable_lora=[True, False, True].",
        )
    sites = sorted(fused_parts(program, site, enable), key=lambda each: each.part.start if each.part else 0)
    result = []
    for number, each in enumerate(sites):
        assert each.part is not None
        if each.part.start % width or each.part.stop - each.part.start != width:
            raise RewriteError(
                f"{site.path}: the {each.part.name} is no part as loralib divides the layer",
                evidence=[shapes, f"program: {each.part.name} is the outputs {each.part.start} to {each.part.stop}"],
                fix=_BASE,
            )
        rows = (tensor.view(count, -1, tensor.shape[1])[number].clone() for tensor in (a, b))
        result.append(Trained(each, lora, *rows))
    return result


def _convolution(program: Program, site: Conv, a: torch.Tensor, b: torch.Tensor, alpha: float, adapter: str) -> Trained:
    """ΔW = (B A) read row by row as [o, i, k, k]: the k rows of B of one output, each with its own share of a filter.

    So A stands k times on the diagonal of [r k², i k²], and one output's k rows of B side by side. Exact.
    """
    kernel = program.tensor(site.weight).shape[2:]
    k = kernel[0]
    rows = a.shape[0]
    wanted = ((rows, site.in_features * k), (site.out_features * k, rows))
    if site.groups > 1:
        raise RewriteError(
            f"{site.path}: loralib's LoRA on a grouped convolution is not supported",
            evidence=[f"groups: {site.groups}; A {list(a.shape)}, B {list(b.shape)}"],
            fix="Merge it in loralib with `model.eval()` and trace that model.",
        )
    square = set(kernel) == {k} and math.prod(kernel) == k * k  # loralib's view of B A fits no other kernel
    if rows % k or (a.shape, b.shape) != wanted or not square:
        raise _misfit(site, a, b)
    lora = Lora(targets=(site.path,), rank=k * rows, alpha=alpha * k * k, adapter=adapter)
    wide = torch.block_diag(*[a] * k).view(k * rows, site.in_features, *kernel)
    ones = [1] * len(kernel)
    return Trained(site, lora, wide, b.reshape(site.out_features, k * rows, *ones))


def _misfit(site: Site, a: torch.Tensor, b: torch.Tensor) -> RewriteError:
    turned = (a.shape[0], b.shape[1]) == (site.in_features, site.out_features)
    return RewriteError(
        f"{site.path}: the LoRA was made for another layer",
        evidence=[
            f"file: A {list(a.shape)}, B {list(b.shape)}{' (stored transposed)' if turned else ''}",
            f"program: {site.kind}, {site.in_features} inputs, {site.out_features} outputs",
        ],
        fix="Save A as [rank, in] and B as [out, rank]." if turned else _BASE,
    )


# -- the rest of the file -----------------------------------------------------------------------------------------


def base_sites(where: Place, found: Sequence[Trained], *, alpha: float, force: bool) -> list[ParameterSite]:
    """What the file brings of the base model: trained biases, and with `force` all weights that differ.

    Raises `RewriteError` for a tensor of another shape, for the weight of an adapted layer that is neither the
    program's nor that with the update in it, and without `force` for other weights that differ.
    """
    program, held = where.program, {where.there(name): tensor for name, tensor in where.files.base.items()}
    groups = [frozenset(group) for group in program.tied()]
    adapted = {name: _layer_of(name, groups, found) for name in held}
    whole = any("bias" not in name.rpartition(".")[2] for name in held)
    result, foreign, merged = [], [], []
    for name, value in held.items():
        before = program.tensor(name)
        if before.shape != value.shape:
            raise misfit(name, before.shape, value.shape)
        if before.is_floating_point() != value.is_floating_point():
            types = f"file: {value.dtype}, program: {before.dtype}".replace("torch.", "")
            raise RewriteError(f"{name} is of another type", evidence=[types], fix="Save it without quantisation.")
        layer = adapted[name]
        if layer:
            if _has_update(name, before, value, layer, alpha):
                merged.append(name)
            continue
        if whole and _same(before, value):
            continue
        trains = name in program.parameters() and "bias" in name.rpartition(".")[2]
        if not trains and not _same(before, value):
            foreign.append(name)
        tied = {other for group in groups if name in group for other in group}
        alone = any(other in held and not torch.equal(held[other], value) for other in tied)
        result.append(ParameterSite(name, value, trains, alone))
    if foreign and not force:
        raise RewriteError(
            f"{where.files.directory}: {len(foreign)} weights are not those of the program",
            evidence=[*foreign[:8], *([f"and {len(foreign) - 8} more"] if len(foreign) > 8 else [])],
            fix="Use the base model that the LoRAs were trained on; if these were trained beside them, --force-base.",
        )
    if merged:
        warnings.warn(
            f"{where.files.directory} was saved merged, as `model.eval()` does in loralib: the update is already in"
            f" {len(merged)} weights, such as {merged[0]}; the program's own weights are kept, and get it once",
            RewriteWarning,
            stacklevel=3,
        )
    return result


def _layer_of(name: str, groups: Sequence[frozenset[str]], found: Sequence[Trained]) -> list[Trained]:
    """The LoRAs of the layer whose weight a name means, also when another layer shares it."""
    names = next((group for group in groups if name in group), frozenset({name}))
    return [trained for trained in found if trained.site.weight in names]


def _same(before: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether two tensors are equal in the coarser of their types."""
    return torch.equal(before.to(value.dtype), value) or torch.equal(before, value.to(before.dtype))


def _has_update(name: str, before: torch.Tensor, value: torch.Tensor, layer: Sequence[Trained], alpha: float) -> bool:
    """Whether the weight in the file is the program's with the update in it (True) or without (False)."""
    change = value.double() - before.detach().double()
    update = torch.stack([trained.update(before) for trained in layer]).sum(0)
    size = float(update.norm())
    factor = float((change * update).sum()) / size**2 if size else 0.0
    epsilon = max(torch.finfo(before.dtype).eps, torch.finfo(value.dtype).eps)
    noise = _ROUNDINGS * epsilon * (float(before.detach().double().norm()) + size)
    if float((change - factor * update).norm()) > noise:
        raise RewriteError(
            f"{name}: the weight in the file is not the program's, with the LoRA in it or without",
            evidence=[f"they differ by {float(change.norm()):.3g}, the update is {size:.3g} (Frobenius norms)"],
            fix=_BASE,
        )
    nearest = 0.0 if factor < 0.5 else 1.0
    if abs(factor - nearest) * size > noise:
        raise RewriteError(
            f"{name}: the weight in the file was saved merged, and not with alpha {alpha:g}",
            evidence=[f"it differs from the program's by {factor:.6g} times the update that this alpha gives"],
            fix=f"Give the alpha of the training; {alpha * factor:.6g} would explain the difference.",
        )
    return nearest == 1.0
