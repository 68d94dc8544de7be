"""NF4: weights of linear layers in 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from passes.weight_update import check_choice, check_flag
from rewriter.edit import Edit
from rewriter.errors import LawError, RewriteError, UsageError
from rewriter.find import Miss, Sites, Targets, select
from rewriter.program import Program
from rewriter.quantised import hold
from rewriter.transform import FREE, Law
from rewriter.view import Linear
from runtime.nf4 import BLOCK_SIZES, KINDS, NESTED_CODE, Quantised, dequantize, levels, quantize

ROUNDING_SHARE = 1e-5  # what computing a bound in fp32 may be off by, relative to the largest weight of a block


@dataclass(frozen=True, slots=True)
class Nf4:
    """Hold the weights of linear layers in 4 bits: NF4 or FP4 codes and one scale per block.

        y = x Wᵀ + b      ->      y = x Ŵᵀ + b,      Ŵ_j = level[code_j] · absmax[block of j]

    Shapes: W [o, i] read row by row; codes [o · i], two per byte; absmax [o · i / block_size] fp32. Codes and scales
    are those of bitsandbytes, byte for byte. With `double_quantise` the scales are 8-bit numbers in blocks of 256,
    beside one fp32 scale per such block and their mean: 4.127 bits per weight in place of 4.5. `search` tries smaller
    scales in each block and keeps the one with the least squared error; the format stays the same.

    Biases and everything else stay as they are. Output heads and embeddings stay, unless a target names the head. The
    weights themselves are dropped, and the step cannot be undone, unless `keep_original` is given.

    Raises `UsageError` when a target matches nothing or an option cannot be meant, `RewriteError` for weights that are
    not finite, `LawError` when a weight moved further than the format allows.
    Source: Dettmers et al. 2023, arXiv 2305.14314, section 3.
    """

    name: ClassVar[str] = "nf4"
    source: ClassVar[str] = "Dettmers et al. 2023, arXiv 2305.14314, section 3"

    targets: Targets = "all-linear"
    skip: Targets = ()
    kind: Literal["nf4", "fp4"] = "nf4"
    block_size: int = 64
    double_quantise: bool = False
    search: bool = False
    keep_original: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        for name in ("double_quantise", "search", "keep_original"):
            check_flag(name, getattr(self, name))
        size: Any = self.block_size
        if type(size) is not int or size not in BLOCK_SIZES:
            raise UsageError(
                f"block_size is {size!r}", fix=f"One of {', '.join(map(str, BLOCK_SIZES))} consecutive weights."
            )

    @property
    def law(self) -> Law:
        return FREE.because(
            f"a weight moves to one of 16 levels, at most by {widest_gap(levels(self.kind)):.3f} of the largest of its "
            "block, which is checked for every weight"
        )

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[Linear]:
        sites = select(program, self.targets, kinds=(Linear,), exclude=self.skip)
        found, missed = [], list(sites.missed)
        for site in sites.found:
            assert isinstance(site, Linear)
            reason = _unfit(program, site)
            if reason:
                missed.append(Miss(site.path, reason))
            else:
                found.append(site)
        if not found:
            raise UsageError(
                "no weight can be held in 4 bits",
                evidence=[f"{miss.path}: {miss.reason}" for miss in missed[:6]],
                fix="Name linear layers with weights of their own.",
            )
        return Sites(tuple(found), tuple(missed))

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Linear, edit: Edit) -> None:
        edit.discards = not self.keep_original
        stored = edit.program.tensor(site.weight).detach()
        weight = stored.t() if site.transposed else stored
        quantised = self.quantised(weight, site.path)
        if weight.device.type != "meta":
            edit.note(site.path, **checked(weight, quantised, site.path))
        hold(edit, site, quantised)

    def quantised(self, weight: Tensor, path: str) -> Quantised:
        """The 4-bit form of a weight [o, i] under the options of this pass."""
        try:
            return quantize(
                weight,
                block_size=self.block_size,
                kind=self.kind,
                double_quantise=self.double_quantise,
                search=self.search,
            )
        except ValueError as error:
            raise RewriteError(f"{path} cannot be held in 4 bits: {error}", fix=f"Repair it, or skip {path}.") from None


def _unfit(program: Program, site: Linear) -> str:
    weight = program.tensor(site.weight)
    if site.tied:
        return f"its weight is also used as {', '.join(site.tied[:3])}"
    if not weight.is_floating_point() or weight.dtype is torch.float64:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}: fp32, bf16 and fp16 can be held in 4 bits"
    if any(call.kwargs for call in site.calls):
        return "its operation scales what it adds"
    return ""


def widest_gap(values: Tensor) -> float:
    """Half the largest distance of two neighbouring levels: how far a number between them can be from the nearest."""
    return float(values.sort().values.diff().max()) / 2


def checked(weight: Tensor, quantised: Quantised, path: str) -> dict[str, float]:
    """How far a weight moved, after holding every number of it to the bound of its block.

    `|w - ŵ| <= h · max(s, a) + |a - s| (+ the step of the scales themselves)`, with the largest number a and the scale
    s of its block, and h half the widest gap between levels.
    """
    exact = weight.reshape(-1).float()
    error = dequantize(quantised, torch.float32).reshape(-1).sub_(exact).abs_()
    size = quantised.block_size
    largest, worst = _per_block(exact.abs(), size), _per_block(error, size)
    scales = quantised.scales()
    bound = widest_gap(levels(quantised.kind)) * torch.maximum(scales, largest) + (largest - scales).abs()
    bound += ROUNDING_SHARE * largest
    if quantised.nested is not None:
        step = widest_gap(NESTED_CODE) * quantised.nested.absmax
        bound += step.repeat_interleave(quantised.nested.block_size)[: bound.numel()]
    beyond = int((worst > bound).sum())
    if beyond:
        raise LawError(
            f"{path} moved further than its format allows in {beyond} blocks",
            evidence=[f"by up to {float((worst - bound).max()):.3g} more"],
            fix="This is an error of the tool; report it with the weight.",
        )
    norm = float(exact.norm())
    return {
        "bits_per_weight": quantised.bits_per_weight,
        "relative_rmse": float(error.norm()) / norm if norm else 0.0,
    }


def _per_block(values: Tensor, size: int) -> Tensor:
    rest = -values.numel() % size
    padded = torch.nn.functional.pad(values, (0, rest)) if rest else values
    return padded.view(-1, size).amax(1)
