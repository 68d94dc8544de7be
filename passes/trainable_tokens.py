"""Trainable tokens: a few rows of the token embedding train, the rest of the table stays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal
from zlib import crc32

import torch
from torch.fx import Node

from rewriter.attention import PASS_ON
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.find import Sites, Targets, select
from rewriter.program import Program
from rewriter.transform import EXACT, FREE, Law
from rewriter.view import Embedding, layers

aten = torch.ops.aten
KIND = "trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class TrainableTokens:
    """Train the embedding rows of a few tokens; a tied output head follows.

        y = E[ids]      ->      y = E'[ids],    E' = E with the rows `token_indices` replaced by delta

    Shapes: E [rows, d], delta [tokens, d], which starts as the rows it replaces: nothing changes until it is trained.
    Everything that reads the table reads E', so with tied weights the output head's rows for these tokens are delta
    too. Without `targets`, the table is the largest one that an integer input of the program is looked up in.

    Raises `UsageError` when an index is no row of the table, when no table is found, or for rows that train already.
    Source: PEFT's method TRAINABLE_TOKENS; it has no paper.
    """

    name: ClassVar[str] = "trainable_tokens"
    source: ClassVar[str] = "PEFT, TRAINABLE_TOKENS"

    token_indices: tuple[int, ...]
    targets: Targets = ()
    exclude: Targets = ()
    init: Literal["rows", "normal"] = "rows"
    adapter: str = "default"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_options(self)

    @property
    def law(self) -> Law:
        if self.init == "normal":
            return FREE.because("the trained rows start at random values")
        return EXACT.because("the trained rows start as the rows they replace")

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[Embedding]:
        _refuse_twice(program)
        if self.targets:
            sites = select(program, self.targets, kinds=(Embedding,), exclude=self.exclude)
            found, missed = [site for site in sites.found if isinstance(site, Embedding)], sites.missed
        else:
            found, missed = [token_embedding(program)], ()
        tables: dict[str, Embedding] = {}
        for site in found:
            tables.setdefault(site.weight, replace(site, path=_first_name(program, site)))
        for site in tables.values():
            outside = [index for index in self.token_indices if index >= site.in_features]
            if outside:
                raise UsageError(
                    f"token index {outside[0]} is no row of {site.path}",
                    evidence=[f"it has {site.in_features} rows: 0 to {site.in_features - 1}"],
                    fix="Resize the model's embedding before it is traced, or correct the index.",
                )
        return Sites(tuple(tables.values()), missed)

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Embedding, edit: Edit) -> None:
        table = edit.program.tensor(site.weight).detach()
        index = torch.tensor(self.token_indices, dtype=torch.long, device=table.device)
        rows = edit.parameter(f"{site.path}.{KIND}.{self.adapter}", self._initial(site, table[index]))
        places = edit.buffer(f"{site.path}.token_indices.{self.adapter}", index)
        for name in _names(edit.program, site.weight):
            whole = edit.program.placeholder(name)
            if whole.users:
                first = min(whole.users)
                suffix = "" if self.adapter == "default" else f"_{self.adapter}"
                label = f"trainable_tokens_table{suffix}"
                patched = edit.call(aten.index_put.default, whole, [places], rows, like=first, label=label, before=True)
                edit.replace(whole, patched)

    def _initial(self, site: Embedding, rows: torch.Tensor) -> torch.Tensor:
        if self.init == "rows":
            return rows
        own_seed = crc32(f"{self.seed} {site.path} {self.adapter}".encode())  # whatever else is targeted
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(own_seed))
        return noise.to(rows.dtype).to(rows.device)


def token_embedding(program: Program) -> Embedding:
    """The largest table that an integer input of the program is looked up in, as it is.

    Raises `UsageError` when there is none.
    """
    inputs = {node for node in program.inputs() if _is_integer(node)}
    tables = [
        site
        for site in layers(program).values()
        if isinstance(site, Embedding) and any(_origin(site.input(call)) in inputs for call in site.calls)
    ]
    if not tables:
        names = ", ".join(node.name for node in program.inputs())
        raise UsageError(
            "the program has no token embedding",
            evidence=[f"no table is read by an integer input; inputs: {names}"],
            fix="Name an embedding with targets, or use another pass for this model.",
        )
    return max(tables, key=lambda site: site.in_features)


def _is_integer(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.dtype.is_floating_point and value.dtype is not torch.bool


def _origin(node: Node) -> Node:
    """The value behind operations that only reshape or cast."""
    while node.op == "call_function" and node.target in PASS_ON:
        node = node.all_input_nodes[0]
    return node


def _names(program: Program, weight: str) -> tuple[str, ...]:
    """All names of a table that is tied."""
    return next((group for group in program.tied() if weight in group), (weight,))


def _first_name(program: Program, site: Embedding) -> str:
    """The module that owns a table: of tied ones the first, which is where a model keeps its input embedding."""
    names = _names(program, site.weight)
    return names[0].removesuffix(".weight") if len(names) > 1 else site.path


def _refuse_twice(program: Program) -> None:
    for step in program.steps:
        taken = [name for name in step.added if f".{KIND}." in name and name in program.tensors]
        if taken:
            raise UsageError(
                f"the program has trainable tokens already: {taken[0]}",
                evidence=[f"step {step.number}: {step.name}"],
                fix="Undo or merge that step, then give all tokens to one pass.",
            )


def _check_options(tokens: TrainableTokens) -> None:
    given: Any = tokens.token_indices  # Any: what a configuration file holds is not yet known
    adapter: Any = tokens.adapter
    seed: Any = tokens.seed
    if not isinstance(given, (tuple, list)) or not given:
        raise UsageError(f"token_indices is {given!r}", fix="At least one row of the embedding, such as 31,32.")
    for index in given:
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise UsageError(f"token index {index!r}", fix="Whole numbers of at least 0: rows of the embedding.")
    twice = next((index for index in given if given.count(index) > 1), None)
    if twice is not None:
        raise UsageError(f"token index {twice} is given twice", fix="Give every token once.")
    if tokens.init not in ("rows", "normal"):
        raise UsageError(f"init is {tokens.init!r}", fix="One of rows, normal.")
    if not isinstance(adapter, str) or not adapter or "." in adapter:
        raise UsageError(f"adapter is {adapter!r}", fix="A name without dots.")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UsageError(f"seed is {seed!r}", fix="A whole number.")
