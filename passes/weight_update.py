"""What the methods that add an update to a layer's weight share: choosing layers, naming, starting, and inserting."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.edit import Edit
from rewriter.errors import RewriteWarning, UsageError
from rewriter.find import Sites, Targets, full_match, select
from rewriter.program import Program
from rewriter.quantised import weight_like
from rewriter.view import Conv, Layer, Linear, Linear4bit, scope, top

aten = torch.ops.aten
Place = Linear | Conv
V = TypeVar("V")


class Options(Protocol):
    """The options that say which layers are meant."""

    @property
    def targets(self) -> Targets: ...
    @property
    def exclude(self) -> Targets: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def layers_pattern(self) -> str | None: ...


def choose(
    program: Program,
    options: Options,
    *patterns: Mapping[str, Any],
    kinds: tuple[type[Layer], ...] = (Linear, Linear4bit, Conv),
) -> Sites[Any]:
    """The layers that the options mean.

    Raises `UsageError` for targets and patterns that match nothing.
    """
    sites = select(
        program,
        options.targets,
        kinds=kinds,
        exclude=options.exclude,
        layers_to_transform=options.layers,
        layers_pattern=options.layers_pattern,
    )
    for pattern in [pattern for mapping in patterns for pattern in mapping]:
        if not any(_matches(pattern, site.path) for site in sites):
            raise UsageError(
                f"pattern {pattern!r} matches no target",
                evidence=[f"targets: {', '.join(site.path for site in sites.found[:6])}"],
                fix="Patterns are matched against the end of a layer's path.",
            )
    return sites


def by_pattern(patterns: Mapping[str, V], path: str, default: V) -> V:
    """The value of the first pattern that matches a layer's path, as PEFT reads `rank_pattern` and `alpha_pattern`."""
    return next((value for pattern, value in patterns.items() if _matches(pattern, path)), default)


def rows(site: Place) -> int:
    """How many outputs the update has: those of the slice, where the site means one of a fused projection."""
    if isinstance(site, Linear) and site.part is not None:
        return site.part.stop - site.part.start
    return site.out_features


def warn_of_rank(site: Place, rank: int) -> None:
    """Say so when a matrix of this rank is no smaller than a full one."""
    limit = min(site.in_features, rows(site))
    if rank > limit:
        warnings.warn(f"{site.path}: rank {rank} exceeds {limit}", RewriteWarning, stacklevel=3)


# -- options ------------------------------------------------------------------------------------------------------


def check_ranks(rank: object, patterns: Mapping[str, Any], *, least: int = 1) -> None:
    """Refuse what is no rank; a pattern may give `least`."""
    given = [("rank", rank, 1), *((f"rank_pattern {pattern!r}", value, least) for pattern, value in patterns.items())]
    for name, value, minimum in given:
        if type(value) is not int or not minimum <= value <= 1_000_000:
            raise UsageError(f"{name} is {value!r}", fix=f"A rank is a whole number of at least {minimum}.")


def check_alphas(alpha: object, patterns: Mapping[str, Any]) -> None:
    """Refuse what is no finite number; zero is warned of."""
    for name, value in [("alpha", alpha), *((f"alpha_pattern {p!r}", value) for p, value in patterns.items())]:
        check_number(name, value)
        if value == 0:
            warnings.warn(f"{name} is 0: the adapter has no effect", RewriteWarning, stacklevel=4)


def check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise UsageError(f"{name} is {value!r}", fix="A finite number.")


def check_dropout(value: Any) -> None:
    check_number("dropout", value)
    if not 0 <= value < 1:
        raise UsageError(f"dropout is {value!r}", fix="A probability of at least 0 and below 1.")


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{name} is {value!r}", fix=f"One of {', '.join(known)}.")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}", fix=f"{name} is true or false.")


def check_seed(name: str, value: object) -> None:
    if type(value) is not int or not 0 <= value < 2**63:
        raise UsageError(f"{name} is {value!r}", fix="A whole number of at least 0.")


def check_adapter(value: object) -> None:
    if not isinstance(value, str) or not value or "." in value:
        raise UsageError(f"adapter is {value!r}", fix="A name without dots.")


# -- what is inserted ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Branch:
    """The parameters of one layer's update, and the operations that add it to the layer's result."""

    edit: Edit
    site: Place
    method: str  # before the names of the inserted operations
    adapter: str
    seed: int = 0

    @property
    def weight(self) -> Tensor:
        return weight_like(self.edit.program, self.site)

    def name(self, kind: str) -> str:
        """The full name of a parameter: PEFT's, and after it the slice that the site means."""
        part = [self.site.part.name] if isinstance(self.site, Linear) and self.site.part else []
        return ".".join([scope(self.edit.program, self.site.path), kind, self.adapter, *part])

    def zeros(self, kind: str, *shape: int) -> Node:
        return self.edit.parameter(self.name(kind), self.weight.new_zeros(shape))

    def kaiming(self, kind: str, *shape: int) -> Node:
        """A parameter from the uniform distribution of a linear layer's start: ±√(1 / fan-in)."""
        return self._random(kind, shape, lambda value, generator: _kaiming(value, generator))

    def normal(self, kind: str, *shape: int, deviation: float) -> Node:
        return self._random(kind, shape, lambda value, generator: value.normal_(0, deviation, generator=generator))

    def _random(self, kind: str, shape: tuple[int, ...], fill: Any) -> Node:
        name, like = self.name(kind), self.weight
        value = like.new_empty(shape)
        if like.device.type != "meta":  # drawn on the CPU, so that every device starts with the same numbers
            digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            value = fill(torch.empty(shape, dtype=like.dtype), generator).to(like.device)
        return self.edit.parameter(name, value)

    def call(self, call: Node, label: str, operation: Any, *args: Any) -> Node:
        suffix = "" if self.adapter == "default" else f"_{self.adapter}"
        return self.edit.call(operation, *args, like=call, label=f"{self.method}_{label}{suffix}")

    def input(self, call: Node, dropout: float = 0.0) -> Node:
        x = self.site.input(call)
        return self.call(call, "dropout", aten.dropout.default, x, dropout, False) if dropout else x

    def product(self, call: Node, number: int, factors: tuple[Node, ...]) -> Node:
        """A matrix as it is; a b of two factors; of three, Σ t[p, q] a[p] b[q] with the places of t's kernel last."""
        if len(factors) == 1:
            return factors[0]
        a, b, *core = factors
        if not core:
            return self.call(call, f"product_{number}", aten.mm.default, a, b)
        rank = a.meta["val"].shape[0]
        places = self.call(call, f"core_{number}", aten.view.default, core[0], [rank, rank, -1])
        return self.call(call, f"product_{number}", aten.einsum.default, "pqk,po,qi->oik", [places, a, b])

    def applied(self, call: Node, change: Node) -> Node:
        """`change` [o, i] or [o, i / groups, *kernel], applied to the layer's input as its weight is."""
        x = self.site.input(call)
        if isinstance(self.site, Conv):
            return self.call(call, "update", call.target, x, change, None, *call.args[3:])
        return self.call(call, "update", aten.linear.default, x, change)

    def add(self, call: Node, update: Node) -> None:
        """Put `y + update` where y stood."""
        part = self.site.part if isinstance(self.site, Linear) else None
        if part is not None:
            padding = [part.start, self.site.out_features - part.stop]
            update = self.call(call, "placed", aten.constant_pad_nd.default, update, padding)
        base = top(call)
        self.edit.replace(base, self.call(call, "sum", aten.add.Tensor, base, update))


def _kaiming(value: Tensor, generator: torch.Generator) -> Tensor:
    return torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)


def kernel(site: Place, weight: Tensor) -> tuple[int, ...]:
    """The kernel of a convolution's weight; empty for a linear layer."""
    return tuple(weight.shape[2:]) if isinstance(site, Conv) else ()


def _matches(pattern: str, path: str) -> bool:
    return full_match(rf"(.*\.)?({pattern})", path)
