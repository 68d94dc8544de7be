"""Intrinsic dimension: one short trainable vector behind many parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Node

from passes import projections
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.find import Miss, Sites, Targets, select
from rewriter.program import Origin, Program
from rewriter.transform import EXACT, Law
from rewriter.view import Conv, Embedding, Experts, Linear, Site, scope, top

aten = torch.ops.aten
PROJECTIONS = ("fastfood", "one_hot")


@dataclass(frozen=True, slots=True)
class Portion:
    """A parameter, or the rows of one that a slice of a fused layer means, and its number among all that are chosen."""

    name: str
    label: str  # weight or bias
    index: int
    shape: tuple[int, ...]
    dim: int = 0  # the dimension that is sliced
    start: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Projected:
    """A layer whose parameters follow the short vector."""

    path: str
    part: str | None  # the slice of a fused layer
    portions: tuple[Portion, ...]
    total: int  # numbers in all chosen parameters of the program
    dtype: torch.dtype  # of the vector: fp32, or fp64 with a parameter that is
    device: torch.device


@dataclass(frozen=True, slots=True)
class Intrinsic:
    """Train one short vector that moves the parameters of many layers through a fixed random projection.

        y = f(x; W)      ->      y = f(x; W + λ · P θ)

    Shapes: θ [dimension], shared by all chosen parameters, of D numbers together; P [D, dimension], its rows those of
    the parameters one after the other; λ is 1, or with `layer_scale` one trained number [1] per layer that starts at 1.
    θ starts at zero: nothing changes until it is trained. The columns of P have norm 1 in expectation, so a step moves
    the parameters together as far as it moves θ. P is never stored: the graph makes it anew from `seed` whenever it
    runs, as `passes.projections` defines it, and a merge needs memory in proportion to the largest parameter.
    Weights and biases of linear, convolution and embedding layers and of stacks of experts are projected; a tensor that
    layers share moves for all of them. LoRA and its like go before it: they refuse a layer whose weight is computed.
    Training keeps 28 bytes for every number that is projected with fastfood, and 20 with one_hot.

    Raises `UsageError` when a target matches nothing or an option cannot be meant.
    Source: Aghajanyan et al. 2020, arXiv 2012.13255, eq. 1 and 2 (λ: SAID); Li et al. 2018, arXiv 1804.08838;
    fastfood: Le et al. 2014, arXiv 1408.3060, without its scaling S.
    """

    name: ClassVar[str] = "intrinsic"
    source: ClassVar[str] = "Aghajanyan et al. 2020, arXiv 2012.13255"

    targets: Targets = "all-linear"
    dimension: int = 256
    projection: Literal["fastfood", "one_hot"] = "fastfood"
    layer_scale: bool = False
    exclude: Targets = ()
    adapter: str = "default"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_options(self)

    @property
    def law(self) -> Law:
        return EXACT.because("the vector starts at zero")

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[Projected]:
        sites = select(program, self.targets, kinds=(Linear, Conv, Embedding, Experts), exclude=self.exclude)
        missed, taken = list(sites.missed), dict[object, str]()
        chosen: list[tuple[Site, tuple[Portion, ...]]] = []
        for site in sites.found:
            fresh = []
            for portion in _portions(program, site):
                tensor = program.tensor(portion.name)
                identity = (id(tensor), portion.start, portion.shape)
                if not tensor.is_floating_point():
                    missed.append(Miss(site.path, f"{portion.name} holds {tensor.dtype}"))
                elif identity in taken:
                    missed.append(Miss(site.path, f"{portion.name} moves with {taken[identity]}, which shares it"))
                else:
                    fresh.append(replace(portion, index=len(taken)))
                    taken[identity] = site.path
            if fresh:
                chosen.append((site, tuple(fresh)))
        portions = [portion for _, some in chosen for portion in some]
        self._check_sizes(portions)
        tensors = [program.tensor(portion.name) for portion in portions]
        dtype = torch.float64 if any(tensor.dtype is torch.float64 for tensor in tensors) else torch.float32
        total = sum(portion.count for portion in portions)
        found = [
            Projected(site.path, _part(site), some, total, dtype, tensors[some[0].index].device)
            for site, some in chosen
        ]
        return Sites(tuple(found), tuple(missed))

    def _check_sizes(self, portions: list[Portion]) -> None:
        total = sum(portion.count for portion in portions)
        if self.dimension > total:
            raise UsageError(
                f"dimension is {self.dimension}, the chosen parameters have {total} numbers",
                fix="Take a smaller dimension or more targets.",
            )
        for portion in portions:
            if portion.count > projections.LONGEST:
                raise UsageError(
                    f"{portion.name} has {portion.count:,} numbers, a projection reaches {projections.LONGEST:,}",
                    fix="Exclude its layer.",
                )

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Projected, edit: Edit) -> None:
        name, scale = f"intrinsic_theta.{self.adapter}", None
        if name not in edit.added:
            edit.parameter(name, torch.zeros(self.dimension, dtype=site.dtype, device=site.device))
        theta = edit.program.placeholder(name)
        if self.layer_scale:
            name = f"{scope(edit.program, site.path)}.intrinsic_lambda.{self.adapter}"
            ones = torch.ones(1, dtype=site.dtype, device=site.device)
            scale = edit.parameter(f"{name}.{site.part}" if site.part else name, ones)
        shared = {name: group for group in edit.program.tied() for name in group}
        for portion in site.portions:
            placeholders = map(edit.program.placeholder, shared.get(portion.name, (portion.name,)))
            bases = [top(node) for node in placeholders if node.users]
            reader = min(user for base in bases for user in base.users)
            write = partial(_write, edit, reader, f"{portion.label}_")
            update = self._update(write, edit, portion, site.total, theta, scale)
            for base in bases:
                edit.replace(base, write("moved", aten.add.Tensor, base, update))

    def _update(
        self, write: projections.Writer, edit: Edit, portion: Portion, total: int, theta: Node, scale: Node | None
    ) -> Node:
        """`λ · P θ` for one parameter, in its shape and type."""
        key = projections.key(self.seed, portion.index)
        if self.projection == "one_hot":
            flat = projections.one_hot(write, theta, key, portion.count, total)
        else:
            flat = projections.fastfood(write, *_prologue(edit, theta), key, portion.count, total)
        if scale is not None:
            flat = write("layer_scaled", aten.mul.Tensor, flat, scale)
        update = write("update", aten.reshape.default, flat, list(portion.shape))
        weight = edit.program.tensor(portion.name)
        after = weight.shape[portion.dim] - portion.start - portion.shape[portion.dim]
        if portion.start or after:
            padding = [*[0, 0] * (weight.ndim - 1 - portion.dim), portion.start, after]
            update = write("placed", aten.constant_pad_nd.default, update, padding)
        if weight.dtype is not update.meta["val"].dtype:
            update = write("cast", aten.to.dtype, update, weight.dtype)
        return update


def _part(site: Site) -> str | None:
    return site.part.name if isinstance(site, Linear) and site.part is not None else None


def _portions(program: Program, site: Site) -> Iterator[Portion]:
    part = site.part if isinstance(site, Linear) else None
    for label, name in (("weight", site.weight), ("bias", site.bias)):
        if name is None:
            continue
        shape = list(program.tensor(name).shape)
        dim = 1 if label == "weight" and isinstance(site, Linear) and site.transposed else 0
        if part is not None:
            shape[dim] = part.stop - part.start
        yield Portion(name, label, 0, tuple(shape), dim, part.start if part else 0)


def _write(edit: Edit, reader: Node, prefix: str, label: str, operation: Any, *args: Any, **kwargs: Any) -> Node:
    return edit.call(operation, *args, like=reader, before=True, label=f"intrinsic_{prefix}{label}", **kwargs)


def _prologue(edit: Edit, theta: Node) -> tuple[Node, dict[int, Node]]:
    """What every projection reads, at the start of the graph: θ in the length of a block, and Hadamard matrices."""
    value = theta.meta["val"]
    length, size = value.shape[0], projections.padded(value.shape[0])
    factors = sorted(set(projections.factors(size)))
    made: dict[str, Node] = {}
    for first in edit.program.graph.nodes:
        origin = Origin.of(first)
        if first.op != "placeholder" and (origin is None or origin.step != edit.number):
            break
        if origin is not None:
            made[origin.label] = first
    if size > length and "intrinsic_block" not in made:
        padding = [0, size - length]
        made["intrinsic_block"] = _write(edit, first, "", "block", aten.constant_pad_nd.default, theta, padding)
    for factor in factors:
        if f"intrinsic_hadamard{factor}_matrix" not in made:
            write = partial(_write, edit, first, f"hadamard{factor}_")
            matrix = projections.hadamard(write, factor, value.dtype, value.device)
            made[f"intrinsic_hadamard{factor}_matrix"] = matrix
    vector = made["intrinsic_block"] if size > length else theta
    return vector, {factor: made[f"intrinsic_hadamard{factor}_matrix"] for factor in factors}


def _check_options(intrinsic: Intrinsic) -> None:
    dimension: Any = intrinsic.dimension  # what a configuration file holds is not yet known
    seed: Any = intrinsic.seed
    if not isinstance(dimension, int) or isinstance(dimension, bool) or not 1 <= dimension <= projections.LONGEST:
        raise UsageError(f"dimension is {dimension!r}", fix="A dimension is a whole number of at least 1.")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UsageError(f"seed is {seed!r}", fix="A seed is a whole number.")
    if intrinsic.projection not in PROJECTIONS:
        raise UsageError(f"projection is {intrinsic.projection!r}", fix=f"One of {', '.join(PROJECTIONS)}.")
    if not isinstance(intrinsic.layer_scale, bool):
        raise UsageError(f"layer_scale is {intrinsic.layer_scale!r}", fix="true or false.")
    if not intrinsic.adapter or "." in intrinsic.adapter:
        raise UsageError(f"adapter is {intrinsic.adapter!r}", fix="A name without dots.")
