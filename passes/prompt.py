"""Prompt tuning and P-tuning: trained embeddings in front of the tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from passes.extend import TokenInput, caches, cut, fill, lengthen, refuse_without_room, returned, token_input
from passes.extend_inputs import Layout, shape
from passes.prompt_encoder import PromptEncoder, drawn, normal
from passes.prompt_ensemble import copied, spread, vote
from passes.weight_update import check_adapter, check_choice, check_number, check_seed
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.find import Sites
from rewriter.program import Program
from rewriter.transform import FREE, Law

DEFAULT_TOKENS = 20
DEFAULT_SIGMA = 0.02
INITS = ("random", "vocabulary", "text", "mean")
LARGEST = 1_000_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """Put trained embeddings in front of the tokens (prompt tuning), or what a small network makes of some (P-tuning).

        E(ids) [b, t, d]      ->      [P ; E(ids)] [b, p + t, d]

    Shapes: P [p, d] with p = `virtual_tokens`; it is the parameter `prompt_embeddings.<adapter>`. The inputs are
    lengthened by p, so that masks, positions and all sizes follow: masks are 1 there, token types 0, and positions
    count on. By default (`outputs=tokens`) every output loses the positions of the prompt again; a returned cache
    keeps them.

    `init`: `random` N(0, sigma²); `vocabulary` random rows of the embedding; `text` the rows of `init_tokens`,
    repeated or cut to p; `mean` their mean in every row.
    `encoder`: with `lstm` or `mlp` P = MLP(LSTM(E)) or MLP(E), of `encoder_hidden` numbers (0: d) per position; its
    parameters are `prompt_encoder.<adapter>.*`.
    `template`: where virtual tokens, anchors and the input stand; `3 a:17 3 input 2` has token 17 as an anchor.
    `ensemble`: so many prompts, each over a copy of the batch, P [ensemble, p, d]; outputs are their mean, or with
    `vote=majority` the first output is the share of copies whose highest score along the last dimension is that class.
    `input`: the name of the token ids where a program has several; an encoder's come before a decoder's.

    Position 0 is the prompt's: what pools the first position (BERT's `pooler_output`) reads the prompt, as in PEFT;
    `template="input 20"` keeps the first token first. What pools a mean over tokens sees the prompt as well.

    Raises `UsageError` when the program looks up no token ids, has a fixed length, no room, or takes a cache.
    Source: Lester et al. 2021, arXiv 2104.08691; P-tuning: Liu et al. 2021, arXiv 2103.10385.
    """

    name: ClassVar[str] = "prompt"
    source: ClassVar[str] = "Lester et al. 2021, arXiv 2104.08691"

    virtual_tokens: int = DEFAULT_TOKENS
    init: Literal["random", "vocabulary", "text", "mean"] = "random"
    init_tokens: tuple[int, ...] = ()
    sigma: float = DEFAULT_SIGMA
    outputs: Literal["tokens", "all"] = "tokens"
    encoder: Literal["none", "lstm", "mlp"] = "none"
    encoder_layers: int = 2
    encoder_hidden: int = 0
    encoder_dropout: float = 0.0
    template: str = ""
    ensemble: int = 1
    vote: Literal["mean", "majority"] = "mean"
    input: str = ""
    adapter: str = "default"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_options(self)

    @property
    def law(self) -> Law:
        return FREE.because("tokens see a prompt from the start")

    @property
    def layout(self) -> Layout:
        """Where the prompt stands."""
        return parse_template(self.template) if self.template else Layout.ahead(self.virtual_tokens)

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[TokenInput]:
        place = token_input(program, self.input)
        _refuse_cache(program, self.ensemble)
        layout = self.layout
        refuse_without_room(program, shape(place.source)[1], len(layout))
        anchors = [each for each in (*layout.before, *layout.after) if each is not None]
        for what, tokens in (("init_tokens", self.init_tokens), ("template", anchors)):
            unknown = [token for token in tokens if token >= place.rows]
            if unknown:
                raise UsageError(
                    f"{what} names token {unknown[0]}, the embedding {place.path} has {place.rows} rows",
                    fix=f"Give token ids below {place.rows}.",
                )
        return Sites((place,))

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, place: TokenInput, edit: Edit) -> None:
        extended = lengthen(edit, place, self.layout)
        ensemble = copied(edit, extended, self.ensemble) if self.ensemble > 1 else None
        rows = self._rows(place, edit, extended.embeddings[0])
        if ensemble is None:
            fill(edit, extended, rows)
        else:
            extended = ensemble.extended
            fill(edit, extended, spread(edit, ensemble, rows))
        if self.outputs == "tokens":
            cut(edit, extended)
        if ensemble is not None:
            vote(edit, ensemble, self.vote)

    def _rows(self, place: TokenInput, edit: Edit, at: Node) -> Node:
        """The prompt [p, d], or the prompts of an ensemble [n, p, d]."""
        table, count = edit.program.tensor(place.weight).detach(), self.layout.given
        if self.encoder == "none":
            name = f"prompt_embeddings.{self.adapter}"
            return edit.parameter(name, self._start(name, table, count, at.meta["val"].shape[-1]))
        width = at.meta["val"].shape[-1]
        encoder = PromptEncoder(
            edit=edit,
            at=at,
            like=table,
            kind=self.encoder,
            hidden=self.encoder_hidden or width,
            layers=self.encoder_layers,
            dropout=self.encoder_dropout,
            adapter=self.adapter,
            seed=self.seed,
        )
        return encoder.rows(count, width, self.ensemble)

    def _start(self, name: str, table: Tensor, count: int, width: int) -> Tensor:
        many = (self.ensemble,) if self.ensemble > 1 else ()
        shape = (*many, count, width)
        if self.init == "random" or table.device.type == "meta":
            return drawn(shape, table, self.seed, name, normal(self.sigma))
        if self.init == "vocabulary":
            rows = len(table)
            chosen = drawn((*many, count), torch.empty(0, dtype=torch.long), self.seed, name, _below(rows))
            return table[chosen.to(table.device)].clone()
        given = table[torch.tensor(self.init_tokens, device=table.device)]
        if self.init == "mean":
            start = given.mean(dim=0, keepdim=True).expand(count, -1)
        else:
            start = given.repeat(-(-count // len(given)), 1)[:count]
        return start.expand(shape).clone()


def _below(rows: int) -> Any:
    return lambda value, generator: value.random_(0, rows, generator=generator)


def parse_template(text: str) -> Layout:
    """`3 a:17 3 input 2` -> three virtual tokens, token 17, three virtual tokens, the input, two virtual tokens."""
    parts = text.split()
    if parts.count("input") != 1:
        raise UsageError(
            f"the template {text!r} has `input` {parts.count('input')} times", fix="Name the input exactly once."
        )
    sides: tuple[list[int | None], list[int | None]] = ([], [])
    side = sides[0]
    for part in parts:
        if part == "input":
            side = sides[1]
        elif re.fullmatch(r"a:\d+", part):
            side.append(int(part[2:]))
        elif re.fullmatch(r"[1-9]\d{0,5}", part):
            side.extend([None] * int(part))
        else:
            raise UsageError(
                f"the template {text!r} has a part {part!r}",
                fix="Parts are counts of virtual tokens, anchors such as a:17, and `input`.",
            )
    layout = Layout(tuple(sides[0]), tuple(sides[1]))
    if not layout.given:
        raise UsageError(f"the template {text!r} has no virtual tokens", fix="Give a count, such as `3 input`.")
    return layout


def _refuse_cache(program: Program, ensemble: int) -> None:
    """Refuse a program that takes keys and values of earlier tokens, for the prompt is among those."""
    cached = caches(program)
    taken = [node.name for node in program.inputs() if node in cached]
    if taken:
        raise UsageError(
            f"the program takes the keys and values of earlier tokens: {taken[0]}",
            evidence=["a prompt enters once, before the first token; later steps find it in the cache"],
            fix="Add the prompt to a trace that takes no cache. Later steps need a mask that counts the prompt.",
        )
    if ensemble > 1 and cached & set(returned(program)):
        raise UsageError("several prompts have no one cache to return", fix="Trace with use_cache=False.")


def _check_options(prompt: Prompt) -> None:
    counts: list[tuple[str, Any, int]] = [  # Any: what a configuration file holds is not yet known
        ("virtual_tokens", prompt.virtual_tokens, 1),
        ("encoder_layers", prompt.encoder_layers, 1),
        ("encoder_hidden", prompt.encoder_hidden, 0),
        ("ensemble", prompt.ensemble, 1),
    ]
    for name, count, least in counts:
        if not isinstance(count, int) or isinstance(count, bool) or not least <= count <= LARGEST:
            raise UsageError(f"{name} is {count!r}", fix=f"A whole number of at least {least}.")
    check_choice("init", prompt.init, INITS)
    check_choice("outputs", prompt.outputs, ("tokens", "all"))
    check_choice("encoder", prompt.encoder, ("none", "lstm", "mlp"))
    check_choice("vote", prompt.vote, ("mean", "majority"))
    check_seed("seed", prompt.seed)
    check_adapter(prompt.adapter)
    check_number("sigma", prompt.sigma)
    check_number("encoder_dropout", prompt.encoder_dropout)
    if prompt.sigma < 0:
        raise UsageError(f"sigma is {prompt.sigma!r}", fix="A standard deviation of at least 0.")
    if not 0 <= prompt.encoder_dropout < 1:
        raise UsageError(f"encoder_dropout is {prompt.encoder_dropout!r}", fix="At least 0 and below 1.")
    _check_tokens(prompt)
    _check_template(prompt)
    _check_encoder(prompt)


def _check_tokens(prompt: Prompt) -> None:
    tokens: Any = prompt.init_tokens
    if isinstance(tokens, str) or not all(type(token) is int and token >= 0 for token in tokens):
        raise UsageError(f"init_tokens is {tokens!r}", fix="A sequence of token ids.")
    if bool(tokens) != (prompt.init in ("text", "mean")):
        given = "without" if not tokens else "with"
        raise UsageError(
            f"init={prompt.init} {given} init_tokens", fix="init_tokens belong to init=text and init=mean."
        )


def _check_template(prompt: Prompt) -> None:
    texts: list[tuple[str, Any]] = [("template", prompt.template), ("input", prompt.input)]
    for name, text in texts:
        if not isinstance(text, str):
            raise UsageError(f"{name} is {text!r}", fix=f"{name} is a text.")
    given = prompt.layout.given
    if prompt.virtual_tokens not in (DEFAULT_TOKENS, given):
        raise UsageError(
            f"virtual_tokens is {prompt.virtual_tokens}, the template has {given}",
            fix="Leave virtual_tokens out: the template says how many there are.",
        )


def _check_encoder(prompt: Prompt) -> None:
    if prompt.encoder != "none" and (prompt.init != "random" or prompt.sigma != DEFAULT_SIGMA):
        raise UsageError(
            f"encoder={prompt.encoder} makes the prompt itself", fix="init and sigma belong to encoder=none."
        )
    if prompt.encoder != "lstm" and prompt.encoder_dropout:
        raise UsageError(
            f"encoder={prompt.encoder} has no dropout", fix="encoder_dropout acts between layers of encoder=lstm."
        )
