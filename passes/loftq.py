"""LoftQ: weights in 4 bits beside a LoRA that starts with what they lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from passes.lora import Lora
from passes.nf4 import Nf4
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.find import Sites, Targets
from rewriter.program import Program
from rewriter.quantised import hold
from rewriter.transform import FREE, Law
from rewriter.view import Linear, Linear4bit, layers, scope
from runtime.nf4 import Quantised, dequantize


@dataclass(frozen=True, slots=True)
class Loftq:
    """Hold linear weights in 4 bits and start a LoRA beside each with what the 4 bits lost (LoftQ).

        y = x Wᵀ + b      ->      y = x Qᵀ + b + scale · (x Aᵀ) Bᵀ,      Q + scale · B A ≈ W

    For `iterations` rounds: Q = q(W - scale · B A), then scale · B A = the `rank` largest singular triples of W - Q,
    the roots of the singular values on either side. Of all rounds the one with the least error stays, so that the layer
    starts nearer to W than q(W) alone. Shapes: W [o, i], A [rank, i], B [o, rank]; scale = alpha / rank.

    Raises `UsageError` when a target matches nothing or an option cannot be meant.
    Source: Li et al. 2023, arXiv 2310.08659, algorithm 1.
    """

    name: ClassVar[str] = "loftq"
    source: ClassVar[str] = "Li et al. 2023, arXiv 2310.08659"
    law: ClassVar[Law] = FREE.because("weights move to 4-bit levels, and the update takes back a part of that")

    targets: Targets = "all-linear"
    skip: Targets = ()
    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    iterations: int = 1
    kind: Literal["nf4", "fp4"] = "nf4"
    block_size: int = 64
    double_quantise: bool = False
    keep_original: bool = False
    adapter: str = "default"

    def __post_init__(self) -> None:
        rounds: Any = self.iterations
        if type(rounds) is not int or not 1 <= rounds <= 1000:
            raise UsageError(f"iterations is {rounds!r}", fix="A whole number from 1 to 1000; the paper uses 1 to 5.")
        if not self.alpha:
            raise UsageError("alpha is 0: the update could take back nothing", fix="Give an alpha above 0.")
        self._lora()
        self._nf4()

    def _nf4(self) -> Nf4:
        return Nf4(
            targets=self.targets,
            skip=self.skip,
            kind=self.kind,
            block_size=self.block_size,
            double_quantise=self.double_quantise,
            keep_original=self.keep_original,
        )

    def _lora(self) -> Lora:
        return Lora(rank=self.rank, alpha=self.alpha, dropout=self.dropout, adapter=self.adapter)

    def find(self, program: Program) -> Sites[Linear]:
        sites = self._nf4().find(program)
        small = next((site for site in sites if self.rank > min(site.in_features, site.out_features)), None)
        if small is not None:
            limit = min(small.in_features, small.out_features)
            raise UsageError(f"{small.path}: rank {self.rank} exceeds {limit}", fix="Give a smaller rank.")
        return sites

    def rewrite(self, site: Linear, edit: Edit) -> None:
        edit.discards = not self.keep_original
        stored = edit.program.tensor(site.weight).detach()
        weight = stored.t() if site.transposed else stored
        lora = self._lora()
        quantised, factors = self._start(weight, lora.scale_of(site), site.path, edit)
        hold(edit, site, quantised)
        held = next(s for s in layers(edit.program).values() if isinstance(s, Linear4bit) and s.path == site.path)
        lora.rewrite(held, edit)
        for kind, value in factors.items():
            name = f"{scope(edit.program, site.path)}.{kind}.{self.adapter}"
            edit.program.store(name, value.to(weight.dtype).contiguous())

    def _start(self, weight: Tensor, scale: float, path: str, edit: Edit) -> tuple[Quantised, dict[str, Tensor]]:
        """The 4-bit weight, A and B of the best round."""
        nf4 = self._nf4()
        if weight.device.type == "meta":
            return nf4.quantised(weight, path), {}
        exact = weight.float()
        update = torch.zeros_like(exact)
        best: tuple[Quantised, dict[str, Tensor]] | None = None
        errors: list[float] = []
        for _ in range(self.iterations):
            quantised = nf4.quantised(exact - update, path)
            lost = exact - dequantize(quantised, torch.float32)
            u, s, v = torch.linalg.svd(lost, full_matrices=False)
            roots = s[: self.rank].sqrt()
            b, a = u[:, : self.rank] * roots, roots[:, None] * v[: self.rank]
            update = b @ a
            errors.append(float((lost - update).norm()))
            if errors[-1] == min(errors):
                best = quantised, {"lora_A": a, "lora_B": b / scale}
            if len(errors) == 1:
                plain = float(lost.norm())
        assert best is not None
        size = float(exact.norm()) or 1.0
        bits = best[0].bits_per_weight
        edit.note(path, bits_per_weight=bits, relative_rmse=min(errors) / size, without_update=plain / size)
        return best
