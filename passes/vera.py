"""VeRA: one frozen random pair of matrices for the whole model, and two trained vectors per layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from passes.weight_update import (
    Branch,
    check_adapter,
    check_dropout,
    check_number,
    check_ranks,
    check_seed,
    choose,
    rows,
)
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.find import Sites, Targets
from rewriter.program import Program
from rewriter.quantised import weight_like
from rewriter.transform import EXACT, Law
from rewriter.view import Linear, Linear4bit

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Share:
    """A layer, and the sizes of the pair it shares with the others: A [rank, inputs], B [outputs, rank]."""

    layer: Linear
    inputs: int
    outputs: int

    @property
    def path(self) -> str:
        return self.layer.path


@dataclass(frozen=True, slots=True)
class Vera:
    """Add trainable scalings of one frozen random low-rank update beside linear layers.

        y = x Wᵀ + b      ->      y = x Wᵀ + b + λ_b ∘ ((λ_d ∘ (dropout(x) Aᵀ)) Bᵀ)

    Shapes: W [o, i], λ_b [o], λ_d [rank]; A [rank, largest i] and B [largest o, rank] are buffers of the whole model,
    `vera_A` and `vera_B`, of which a layer reads the first i columns and the first o rows. They are Kaiming-uniform
    from `projection_seed`, the numbers that PEFT draws for the same `projection_prng_key`. λ_d starts at `d_initial`
    and λ_b at zero: nothing changes until it is trained.

    Raises `UsageError` when a target matches nothing or an option cannot be meant.
    Source: Kopiczko et al. 2024, arXiv 2310.11454, eq. 2.
    """

    name: ClassVar[str] = "vera"
    source: ClassVar[str] = "Kopiczko et al. 2024, arXiv 2310.11454"
    law: ClassVar[Law] = EXACT.because("λ_b starts at zero")

    targets: Targets = ("@attention.query", "@attention.value")
    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    projection_seed: int = 0
    exclude: Targets = ()
    layers: tuple[int, ...] = ()
    layers_pattern: str | None = None
    adapter: str = "default"

    def __post_init__(self) -> None:
        check_ranks(self.rank, {})
        check_number("d_initial", self.d_initial)
        check_dropout(self.dropout)
        check_seed("projection_seed", self.projection_seed)
        check_adapter(self.adapter)

    def find(self, program: Program) -> Sites[Share]:
        sites = choose(program, self, kinds=(Linear, Linear4bit))
        types = {weight_like(program, site).dtype for site in sites}
        if len(types) > 1:
            raise UsageError(
                "the targets have weights of several types, and share one pair of matrices",
                evidence=[", ".join(sorted(str(kind).removeprefix("torch.") for kind in types))],
                fix="Give the layers of each type an adapter of their own.",
            )
        inputs, outputs = max(site.in_features for site in sites), max(rows(site) for site in sites)
        return Sites(tuple(Share(site, inputs, outputs) for site in sites), sites.missed)

    def rewrite(self, site: Share, edit: Edit) -> None:
        layer = site.layer
        branch = Branch(edit, layer, self.name, self.adapter)
        a, b = self._pair(site, edit, branch.weight)
        scale_b = branch.zeros("vera_lambda_b", rows(layer))
        scale_d = edit.parameter(branch.name("vera_lambda_d"), branch.weight.new_full((self.rank,), self.d_initial))
        for call in layer.calls:
            own_a = _first(branch, call, "A", a, 1, layer.in_features)
            own_b = _first(branch, call, "B", b, 0, rows(layer))
            low = branch.call(call, "down", aten.linear.default, branch.input(call, self.dropout), own_a)
            low = branch.call(call, "scaled_d", aten.mul.Tensor, low, scale_d)
            high = branch.call(call, "up", aten.linear.default, low, own_b)
            branch.add(call, branch.call(call, "scaled_b", aten.mul.Tensor, high, scale_b))

    def _pair(self, site: Share, edit: Edit, like: Tensor) -> tuple[Node, Node]:
        """A and B, made at the first layer of the step."""
        names = [f"vera_{letter}.{self.adapter}" for letter in "AB"]
        if names[0] not in edit.added:
            for name, value in zip(names, projections(self, site.inputs, site.outputs, like), strict=True):
                edit.buffer(name, value)
        a, b = (edit.program.placeholder(name) for name in names)
        return a, b


def projections(vera: Vera, inputs: int, outputs: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A [rank, inputs] and B [outputs, rank] of a seed, drawn in fp32, one after the other, whatever type they get."""
    shapes = (vera.rank, inputs), (outputs, vera.rank)
    if like.device.type == "meta":
        return like.new_empty(shapes[0]), like.new_empty(shapes[1])
    generator = torch.Generator().manual_seed(vera.projection_seed)
    a, b = (_uniform(shape, generator).to(like) for shape in shapes)
    return a, b


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    limit = math.sqrt(6 / shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-limit, limit, generator=generator)


def _first(branch: Branch, call: Node, label: str, matrix: Node, dim: int, count: int) -> Node:
    """The first rows or columns of a shared matrix; the matrix itself where the layer needs all of it."""
    if matrix.meta["val"].shape[dim] == count:
        return matrix
    return branch.call(call, f"own_{label}", aten.slice.Tensor, matrix, dim, 0, count)
