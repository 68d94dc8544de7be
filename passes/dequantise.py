"""Dequantise: layers in 4 bits become plain layers again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.find import Miss, Sites, Targets, select
from rewriter.program import Program
from rewriter.quantised import release, weight_value
from rewriter.transform import ROUNDING, Law
from rewriter.view import Linear4bit, layers


@dataclass(frozen=True, slots=True)
class Dequantise:
    """Give 4-bit layers plain weights again, in the type they compute in.

        y = x dequantise(W)ᵀ + b      ->      y = x Ŵᵀ + b,      Ŵ_j = level[code_j] · absmax[block of j]

    Shapes: Ŵ [o, i]. Without `targets` every 4-bit layer. The weights stay what the 4 bits made of them: what was lost
    does not come back.

    Raises `UsageError` when the program has no 4-bit layer or a target matches none.
    Source: Dettmers et al. 2023, arXiv 2305.14314, section 3.
    """

    name: ClassVar[str] = "dequantise"
    source: ClassVar[str] = "Dettmers et al. 2023, arXiv 2305.14314, section 3"
    law: ClassVar[Law] = ROUNDING.because("the same weights are multiplied in another order")

    targets: Targets = ()

    def find(self, program: Program) -> Sites[Linear4bit]:
        if not self.targets:
            found, missed = tuple(s for s in layers(program).values() if isinstance(s, Linear4bit)), tuple[Miss, ...]()
        else:
            sites = select(program, self.targets, kinds=(Linear4bit,))
            found, missed = tuple(s for s in sites if isinstance(s, Linear4bit)), sites.missed
        if not found:
            raise UsageError("the program has no layer in 4 bits", fix="`rewriter inspect MODEL` lists its layers.")
        return Sites(found, missed)

    def rewrite(self, site: Linear4bit, edit: Edit) -> None:
        release(edit, site, weight_value(edit.program, site))
