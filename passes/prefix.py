"""Prefix tuning: trainable keys and values before those of the tokens."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Node

from passes.prefix_mask import Columns, shared_call, size_of
from passes.prefix_place import Entry, Place, ancestors, numbered, places, total
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.find import Miss, Sites
from rewriter.positions import Positions, positions
from rewriter.program import Program
from rewriter.transform import FREE, Law

aten = torch.ops.aten
END = sys.maxsize
ROLES = ("self", "encoder", "decoder", "cross")


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
    """Put trainable keys and values before those of the tokens in every attention.

        softmax(Q Kᵀ + M) V      ->      softmax(Q [P_K; K]ᵀ + [0, M]) [P_V; V]

    Shapes: K, V [b, g, t, k]; P_K, P_V [virtual_tokens, g, k] for each of L attentions; M hides keys, never the prefix.
    Without `projection` the prefix is one parameter [virtual_tokens, L · 2 · g · k]; with it, an embedding
    [virtual_tokens, d] through Linear(d, hidden), tanh, Linear(hidden, L · 2 · g · k), d = g · k, hidden = d.
    `attention` names the attentions (self, encoder, decoder, cross): all self-attentions, or as PEFT the decoder's own
    when the model has an encoder and a decoder; `submodules=2`, as PEFT does there, lets layer l read pair 2l mod L.
    `positions=shift` moves the tokens' positions by virtual_tokens as rows of a cache would; `auto` does unless the
    length is fixed. In a program with a cache the rows enter it when it is empty and count as its rows from then on.

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

    def find(self, program: Program) -> Sites[Attended | Shifted]:
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
            raise UsageError(f"layer {beyond[0]} of {max(counted.values()) + 1}", fix="Layers count from 0.")
        return chosen, missed

    def _shifted(self, program: Program, every: Sequence[Place], own: Sequence[Place]) -> list[Shifted]:
        """Where positions are read that a cache of the prefix would move: those of the sequences that get one."""
        crossing = frozenset(p.key.node for p in every if p.role == "cross")
        cone = ancestors((node for p in own for node in (p.operands.query, p.key.node)), crossing)
        read = [each for each in positions(program) if each.reader in cone]
        past = next((place.past for place in own if place.past is not None), None)
        if self.positions == "keep":
            return [Shifted(each.path, each, past) for each in read] if past is not None else []
        moved = []
        for each in read:
            full = isinstance(each.length, int) and each.rows is not None
            room = math.inf if each.rows is None else each.rows - (each.length if full else 1)  # type: ignore[operator]
            if full and self.positions == "auto" and room < self.virtual_tokens:
                continue
            if room < self.virtual_tokens:
                raise UsageError(
                    f"{self.virtual_tokens} virtual tokens do not fit before the tokens",
                    evidence=[f"{each.path} has {each.rows} positions"],
                    fix=f"Give at most {max(int(room), 0)} virtual tokens, or positions=keep.",
                )
            moved.append(Shifted(each.path, each, past))
        if self.positions == "shift" and not moved:
            raise UsageError(
                "the model has no positions that could be shifted", fix="Leave `positions` out: nothing depends on it."
            )
        return moved

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Attended | Shifted, edit: Edit) -> None:
        if isinstance(site, Shifted):
            _shift(self, site, edit)
        else:
            _Joined(self, site, edit).rewrite()

    def finish(self, edit: Edit) -> None:
        edit.retype()

    def initial(self, shape: Sequence[int], key: int) -> torch.Tensor:
        if self.init == "zero":
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(self.seed * 7919 + key)
        return self.sigma * torch.randn(shape, generator=generator)


class _Joined:
    """The rows of one attention's prefix, and what they are joined with."""

    def __init__(self, prefix: Prefix, site: Attended, edit: Edit) -> None:
        self.prefix, self.site, self.place, self.edit = prefix, site, site.place, edit
        self.label = label(prefix)

    def _call(self, operation: Any, *args: Any, like: Node, what: str) -> Node:
        return shared_call(self.edit, operation, *args, like=like, label=f"{self.label}_{what}")

    def rewrite(self) -> None:
        prefix = self._prefix()
        count = inserted(self.prefix, self.place.past, self.edit)
        scores = self.place.operands.scores
        for entry, columns in (
            (self.place.key, self.place.key_columns),
            (self.place.value, self.place.value_columns),
        ):
            self._join(entry, self._rows(prefix, entry, columns))
        extend = Columns(self.edit, count, self.label)
        if scores is None:
            _extend_mask(extend, self.place)
        else:
            _extend_scores(extend, self.place, scores)

    # -- the prefix ---------------------------------------------------------------------------------------------

    def _prefix(self) -> Node:
        """[virtual_tokens, columns], a parameter or what the projection makes of its parameters."""
        p, all_columns, adapter = self.prefix.virtual_tokens, self.site.columns, self.prefix.adapter
        like = self.place.key.node
        if not self.prefix.projection:
            return self._parameter(f"prompt_embeddings.{adapter}", (p, all_columns), 0)
        width = self.place.key.heads * self.place.key.width
        hidden = self.prefix.hidden or width
        names = f"prompt_encoder.{adapter}"
        value = self._parameter(f"{names}.embedding.weight", (p, width), 0)
        for index, (o, i) in ((0, (hidden, width)), (2, (all_columns, hidden))):
            weight = self._parameter(f"{names}.transform.{index}.weight", (o, i), 1 + index, fan_in=i)
            bias = self._parameter(f"{names}.transform.{index}.bias", (o,), 2 + index, fan_in=i)
            value = self._call(aten.linear.default, value, weight, bias, like=like, what="encoder")
            if index == 0:
                value = self._call(aten.tanh.default, value, like=like, what="encoder")
        return value

    def _parameter(self, name: str, shape: tuple[int, ...], key: int, fan_in: int | None = None) -> Node:
        if name in self.edit.added:
            return self.edit.program.placeholder(name)
        value = self.prefix.initial(shape, key)
        if fan_in is not None:  # as torch.nn.Linear starts
            generator = torch.Generator().manual_seed(self.prefix.seed * 7919 + key)
            value = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in)
        example = self.place.key.node.meta["val"]
        return self.edit.parameter(name, value.to(device=example.device, dtype=example.dtype))

    def _rows(self, prefix: Node, entry: Entry, columns: tuple[int, int]) -> Node:
        """The rows of one attention, laid out as the tensor they are put before."""
        node, p = entry.node, self.prefix.virtual_tokens
        rows = self._call(aten.slice.Tensor, prefix, 1, *columns, like=node, what="columns")
        heads = self._call(aten.view.default, rows, [1, p, entry.heads, entry.width], like=node, what="heads")
        value = self._call(aten.permute.default, heads, [0, 2, 1, 3], like=node, what="rows")
        count = entry.heads
        if entry.repeat > 1:
            shared = self._call(aten.unsqueeze.default, value, 2, like=node, what="shared")
            wide = self._call(aten.expand.default, shared, [1, count, entry.repeat, p, -1], like=node, what="repeat")
            count *= entry.repeat
            value = self._call(aten.reshape.default, wide, [1, count, p, -1], like=node, what="repeated")
        value = self._laid_out(value, entry, count)
        if entry.past is None:
            return value
        time = entry.axes[2]
        present = in_cache(self.prefix, self.place.past, self.edit)
        return self._call(aten.slice.Tensor, value, time, present, END, like=node, what="new_rows")

    def _laid_out(self, value: Node, entry: Entry, heads: int) -> Node:
        """[1, heads, p, width] in the axes of the entry, once per example."""
        node, p = entry.node, self.prefix.virtual_tokens
        batch, head, time, width = entry.axes
        if batch is not None and batch == head:
            return self._merged(value, entry, heads)
        order = [axis for axis, _ in sorted(enumerate((batch, head, time, width)), key=lambda each: _place(each[1]))]
        kept = [axis for axis in order if (batch, head, time, width)[axis] is not None]
        dropped = [axis for axis in order if axis not in kept]
        if order != [0, 1, 2, 3]:
            value = self._call(aten.permute.default, value, [*kept, *dropped], like=node, what="layout")
        if dropped:
            sizes = [{0: 1, 1: heads, 2: p, 3: entry.width}[axis] for axis in kept]
            value = self._call(aten.view.default, value, sizes, like=node, what="layout")
        if batch is None:
            return value
        sizes = [size_of(self.edit, node, batch) if axis == batch else -1 for axis in range(len(kept))]  # type: ignore[misc]
        return self._call(aten.expand.default, value, sizes, like=node, what="batch")

    def _merged(self, value: Node, entry: Entry, heads: int) -> Node:
        """For keys or values [b · heads, t, width], or with time last."""
        node, time = entry.node, entry.axes[2]
        flat = self._call(aten.squeeze.dim, value, 0, like=node, what="layout")
        if time == 2:
            flat = self._call(aten.transpose.int, flat, 1, 2, like=node, what="layout")
        size = size_of(self.edit, node, 0)
        times: Any = size // heads if isinstance(size, int) else None
        if times is None:
            times = self._call(operator.floordiv, size, heads, like=node, what="examples")
        return self._call(aten.repeat.default, flat, [times, 1, 1], like=node, what="batch")

    # -- joining ------------------------------------------------------------------------------------------------

    def _join(self, entry: Entry, rows: Node) -> None:
        edit, node, time = self.edit, entry.node, entry.axes[2]
        if entry.past is not None:
            old, new = node.args[0]  # type: ignore[misc]
            joined = self._call(aten.cat.default, [old, rows, new], time, like=node, what="joined")
            edit.redirect(node, joined)
            edit.erase([node])
        else:
            joined = self._call(aten.cat.default, [rows, node], time, like=node, what="joined")
            if edit.current(node) in entry.reader.all_input_nodes:  # keys and values may be one tensor
                edit.rewire(entry.reader, node, joined)
        if entry.sizes:
            length = self._call(aten.sym_size.int, joined, time, like=joined, what="length")
            for reader, size in entry.sizes:
                edit.rewire(reader, size, length)


def _place(axis: int | None) -> int:
    return 9 if axis is None else axis


def label(prefix: Prefix) -> str:
    return "prefix" if prefix.adapter == "default" else f"prefix_{prefix.adapter}"


# -- how many rows enter ------------------------------------------------------------------------------------------------


def in_cache(prefix: Prefix, past: Entry | None, edit: Edit) -> Node:
    """How many rows of the prefix a cache holds: all of it as soon as it is not empty."""
    assert past is not None and past.past is not None
    length = size_of(edit, past.past, past.axes[2])
    assert isinstance(length, Node)
    return shared_call(
        edit, torch.sym_min, length, prefix.virtual_tokens, like=length, label=f"{label(prefix)}_in_cache"
    )


def inserted(prefix: Prefix, past: Entry | None, edit: Edit) -> int | Node:
    """How many rows of the prefix enter now."""
    if past is None:
        return prefix.virtual_tokens
    present = in_cache(prefix, past, edit)
    return shared_call(edit, operator.sub, prefix.virtual_tokens, present, like=present, label=f"{label(prefix)}_new")


# -- masks and positions ------------------------------------------------------------------------------------------------


def _extend_mask(columns: Columns, place: Place) -> None:
    """The mask of an attention in one operation; a causal one without a mask gets one."""
    node, edit = place.operands.result, columns.edit
    args = [*node.args, *[None] * (6 - len(node.args))]
    mask, causal = args[3] or node.kwargs.get("attn_mask"), args[5] or node.kwargs.get("is_causal")
    if isinstance(mask, Node):
        edit.rewire(node, mask, columns.extended(mask, -1, mask.meta["val"].dtype is torch.bool))
    elif causal:
        query, key = place.operands.query, place.operands.key
        sizes = [size_of(edit, query, query.meta["val"].ndim - 2), size_of(edit, key, key.meta["val"].ndim - 2)]
        options = {"dtype": torch.bool, "device": query.meta["val"].device}
        ones = columns.call(aten.ones.default, sizes, like=node, label="all", **options)
        causal_mask = columns.call(aten.tril.default, ones, like=ones, label="causal")
        visible = columns.extended(causal_mask, -1, True)
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "is_causal")}
        explicit = edit.call(
            node.target, *node.args[:3], visible, args[4] or 0.0, False, like=node, label="attention", **kwargs
        )
        edit.redirect(node, explicit)
        edit.erase([node])


def _extend_scores(columns: Columns, place: Place, scores: Node) -> None:
    """What is added to the scores, scales or hides them on the way to the softmax."""
    node, edit = place.node, columns.edit
    on_the_way = [each for each in ancestors([node]) if each is not scores and scores in ancestors([each])]
    carried = {scores, *on_the_way}
    for each in sorted(on_the_way):
        own = next(source for source in each.all_input_nodes if source in carried)
        last = each.meta["val"].ndim - 1
        for operand in columns.operands(each, last, 0, own) or ():
            if operand.node not in carried:
                edit.rewire(each, operand.node, columns.extended(operand.node, operand.axis, operand.neutral))


def _shift(prefix: Prefix, site: Shifted, edit: Edit) -> None:
    """Positions plus the rows that enter now; to keep them, less the rows of the prefix in the cache."""
    values, reader = site.positions.values, site.positions.reader
    if prefix.positions == "keep":
        by: Any = shared_call(
            edit, operator.neg, in_cache(prefix, site.past, edit), like=values, label=f"{label(prefix)}_back"
        )
    else:
        by = inserted(prefix, site.past, edit)
    what = f"{label(prefix)}_positions"
    if not site.positions.sliced:
        edit.rewire(reader, values, shared_call(edit, aten.add.Tensor, values, by, like=values, label=what))
        return
    start, stop = reader.args[2] or 0, reader.args[3]
    moved = [
        start + by
        if isinstance(start, int) and isinstance(by, int)
        else shared_call(edit, operator.add, end, by, like=values, label=what)
        for end in (start, stop)
    ]
    longer = edit.call(aten.slice.Tensor, *reader.args[:2], *moved, like=reader, label=what)
    edit.redirect(reader, longer)
    edit.erase([reader])


def _check_options(prefix: Prefix) -> None:
    for name, least in (("virtual_tokens", 1), ("hidden", 1), ("seed", 0)):
        value = getattr(prefix, name)
        if value is None and name == "hidden":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(
                f"{name}={value!r} is no whole number of at least {least}", fix=f"Give {name}={max(8, least)}."
            )
    if not isinstance(prefix.sigma, (int, float)) or isinstance(prefix.sigma, bool) or not 0 <= prefix.sigma < math.inf:
        raise UsageError(f"sigma={prefix.sigma!r} is no spread of random values", fix="Give a number such as 0.02.")
    if not isinstance(prefix.projection, bool):
        raise UsageError(f"projection={prefix.projection!r} is not true or false", fix="Give true or false.")
    if prefix.hidden is not None and not prefix.projection:
        raise UsageError(
            "hidden is the width of the projection, and projection is off", fix="Give projection=True too."
        )
    for name, allowed in (("positions", ("auto", "shift", "keep")), ("init", ("random", "zero"))):
        if getattr(prefix, name) not in allowed:
            raise UsageError(
                f"{name}={getattr(prefix, name)!r} is not one of {', '.join(allowed)}", fix=f"Give {allowed[0]!r}."
            )
    if prefix.submodules not in (None, 1, 2):
        raise UsageError(f"submodules={prefix.submodules!r} is not 1 or 2", fix="Leave it out for PEFT's own.")
    if isinstance(prefix.attention, str) or not set(prefix.attention) <= set(ROLES):
        raise UsageError(
            f"attention={prefix.attention!r} holds more than {', '.join(ROLES)}", fix="Give a list of these."
        )
    if isinstance(prefix.layers, str) or any(
        not isinstance(l, int) or isinstance(l, bool) or l < 0 for l in prefix.layers
    ):
        raise UsageError(f"layers={prefix.layers!r} are no indices from 0", fix="Give a list such as 0,1.")
    if not prefix.adapter or not isinstance(prefix.adapter, str) or "." in prefix.adapter:
        raise UsageError(f"adapter={prefix.adapter!r} is no name without dots", fix="Give a name such as 'default'.")
