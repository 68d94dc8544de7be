"""Prefix tuning: trainable keys and values before those of the tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from passes.prefix_deep import Deep, add_deep, deep_site
from passes.prefix_place import Entry, Place, ancestors, numbered, places, total
from passes.prefix_rows import Joined, shift
from passes.weight_update import check_adapter, check_choice, check_flag, check_number, check_seed
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.find import Miss, Sites
from rewriter.positions import Positions, positions
from rewriter.program import Program
from rewriter.transform import FREE, Law

ROLES = ("self", "encoder", "decoder", "cross")
LARGEST = 1_000_000


@dataclass(frozen=True, slots=True)
class Shifted:
    """A place where positions are read, which a prefix moves."""

    path: str
    positions: Positions
    past: Entry | None


@dataclass(frozen=True, slots=True)
class Attended:
    """An attention that gets a prefix, of a prefix with so many columns over all attentions."""

    path: str
    place: Place
    columns: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """Put trainable keys and values before those of the tokens in every attention (prefix tuning, P-tuning v2).

        softmax(Q Kᵀ + M) V      ->      softmax(Q [P_K; K]ᵀ + [0, M]) [P_V; V]

    Shapes: K, V [b, g, t, k]; P_K, P_V [p, g, k] with p = `virtual_tokens`, for each of L attentions; M hides keys and
    never the prefix. The prefix is one parameter `prompt_embeddings.<adapter>` [p, L · 2 · g · k] in PEFT's layout, or
    with `projection` an embedding [p, d] through Linear(d, hidden), tanh and Linear(hidden, L · 2 · g · k), where d and
    by default `hidden` are g · k. A window or a bias by distance sees the prefix just before the first token.

    `attention`: which ones (self, encoder, decoder, cross); by default all self-attentions, in a model with encoder and
    decoder the decoder's own as in PEFT. `submodules=2`, the default there, is PEFT's reading of a prefix for two
    submodules: layer l gets pair 2l mod L. `layers`: indices, counted within each kind of attention.
    `positions`: `shift` moves the positions of tokens by p, as rows of a cache do; `keep` does not; `auto` shifts but
    where a sequence of fixed length fills its table.
    `deep`: p more positions in front of the tokens in place of keys and values; the first p rows of every block's input
    are that layer's prompts [p, d], prefix [p, L · d], and the outputs lose those positions again.

    A program that takes a cache puts the prefix into it when the cache is empty, and returns it with the other rows:
    from then on a caller counts p rows more, so its mask starts with p ones. Prefill and decoding are one program.

    Raises `UsageError` for a model without attention, and when a table of positions has no room.
    Source: Li & Liang 2021, arXiv 2101.00190; P-tuning v2: Liu et al. 2021, arXiv 2110.07602.
    """

    name: ClassVar[str] = "prefix"
    source: ClassVar[str] = "Li & Liang 2021, arXiv 2101.00190"

    virtual_tokens: int = 20
    projection: bool = False
    hidden: int | None = None
    positions: Literal["auto", "shift", "keep"] = "auto"
    attention: tuple[str, ...] = ()
    submodules: int | None = None
    deep: bool = False
    layers: tuple[int, ...] = ()
    init: Literal["random", "zero"] = "random"
    sigma: float = 0.02
    adapter: str = "default"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_options(self)

    @property
    def law(self) -> Law:
        return FREE.because("a prefix takes attention away from the tokens from the start")

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[Attended | Shifted | Deep]:
        if self.deep:
            return Sites((deep_site(self, program),))
        every, missed = places(program)
        if not every:
            raise UsageError(
                "the model has no attention that a prefix could be put into",
                evidence=[f"{miss.path or 'the model'}: {miss.reason}" for miss in missed[:5]],
                fix="Use another method, such as lora or adapter.",
            )
        chosen, passed = self._chosen(every)
        own = [place for place in chosen if place.role != "cross"]
        columns = total(chosen)
        fours = self.submodules == 2 or (self.submodules is None and not self.attention and own[0].role == "decoder")
        attended = [Attended(each.path, each, columns) for each in numbered(chosen, in_fours=fours)]
        return Sites((*attended, *self._shifted(program, every, own)), (*missed, *passed))

    def _chosen(self, every: Sequence[Place]) -> tuple[list[Place], list[Miss]]:
        roles = self.attention or (("self",) if every[0].role == "self" else ("decoder",))
        fitting = [p for p in every if p.role in roles or (p.role != "cross" and "self" in roles)]
        absent = [role for role in roles if not any(p.role == role or role == "self" != p.role for p in every)]
        if absent or not fitting:
            raise UsageError(
                f"the model has no attention of the kind {', '.join(absent or roles)}",
                evidence=[f"{place.path}: {place.role}" for place in every[:6]],
                fix="Leave `attention` out.",
            )
        counted: dict[str, int] = {}
        chosen, missed = [], []
        for place in fitting:
            index = counted[place.role] = counted.get(place.role, -1) + 1
            if not self.layers or index in self.layers:
                chosen.append(place)
            else:
                missed.append(Miss(place.path, "not among the layers"))
        beyond = [layer for layer in self.layers if layer > max(counted.values())]
        if beyond:
            last = max(counted.values())
            raise UsageError(
                f"layers names {beyond[0]}, the attentions of the model are numbered 0 to {last}",
                fix="Name layers of this range, or leave `layers` out for all.",
            )
        return chosen, missed

    def _shifted(self, program: Program, every: Sequence[Place], own: Sequence[Place]) -> list[Shifted]:
        """Where positions are read that a cache of the prefix would move: those of the sequences that get one."""
        crossing = frozenset(node for p in every if p.role == "cross" for node in (p.key.node, p.value.node))
        cone = ancestors((node for p in own for node in (p.operands.query, p.key.node)), crossing)
        read = [each for each in positions(program) if each.reader in cone]
        past = next((place.past for place in own if place.past is not None), None)
        if self.positions == "keep":
            return [Shifted(each.path, each, past) for each in read] if past is not None else []
        moved = []
        for each in read:
            full = isinstance(each.length, int) and each.rows is not None
            room = math.inf if each.rows is None else each.rows - each.first - (each.length if full else 1)
            if full and self.positions == "auto" and room < self.virtual_tokens:
                continue
            if room < self.virtual_tokens:
                raise UsageError(
                    f"{self.virtual_tokens} virtual tokens do not fit before the tokens",
                    evidence=[f"{each.path} has {each.rows} rows, and row {each.first} is that of the first token"],
                    fix=f"Give at most {max(int(room), 0)} virtual tokens, or positions=keep.",
                )
            moved.append(Shifted(each.path, each, past))
        if self.positions == "shift" and not moved:
            raise UsageError(
                "the model has no positions that could be shifted", fix="Leave `positions` out: nothing depends on it."
            )
        return moved

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Attended | Shifted | Deep, edit: Edit) -> None:
        if isinstance(site, Deep):
            add_deep(self, site, edit)
        elif isinstance(site, Shifted):
            shift(self, site.positions, site.past, edit)
        else:
            Joined(self, site.place, site.columns, edit).rewrite()

    def finish(self, edit: Edit) -> None:
        edit.retype()


def _check_options(prefix: Prefix) -> None:
    tokens: Any = prefix.virtual_tokens
    hidden: Any = prefix.hidden
    for name, value in (("virtual_tokens", tokens), ("hidden", 1 if hidden is None else hidden)):
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise UsageError(f"{name} is {value!r}", fix=f"A whole number from 1 to {LARGEST}.")
    check_number("sigma", prefix.sigma)
    if prefix.sigma < 0:
        raise UsageError(f"sigma is {prefix.sigma!r}", fix="A spread of at least 0.")
    for name in ("projection", "deep"):
        check_flag(name, getattr(prefix, name))
    check_choice("positions", prefix.positions, ("auto", "shift", "keep"))
    check_choice("init", prefix.init, ("random", "zero"))
    check_seed("seed", prefix.seed)
    check_adapter(prefix.adapter)
    if prefix.submodules is not None and (type(prefix.submodules) is not int or prefix.submodules not in (1, 2)):
        raise UsageError(f"submodules is {prefix.submodules!r}", fix="1 or 2, or nothing for what PEFT does.")
    given: Any = prefix.attention
    if isinstance(given, str) or not set(given) <= set(ROLES):
        raise UsageError(f"attention is {given!r}", fix=f"A list of {', '.join(ROLES)}.")
    given = prefix.layers
    if isinstance(given, str) or any(type(index) is not int or index < 0 for index in given):
        raise UsageError(f"layers is {given!r}", fix="A list of indices from 0.")
    if hidden is not None and not prefix.projection:
        raise UsageError(
            "hidden is the width of the projection, and projection is off", fix="Give projection=True too."
        )
    if prefix.deep:
        for name, default in (("positions", "auto"), ("attention", ()), ("submodules", None), ("layers", ())):
            if getattr(prefix, name) != default:
                raise UsageError(f"{name} means nothing to deep prompts", fix=f"Leave {name} or deep out.")
