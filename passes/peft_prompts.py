"""Prefix tuning, prompt tuning and P-tuning as PEFT's configurations and the passes of this project say them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from passes.bake import Bake
from passes.prefix import Prefix
from passes.prompt import Prompt
from rewriter.attention import attentions
from rewriter.errors import RewriteError
from rewriter.formats.peft_methods import PromptLearningConfig
from rewriter.program import Origin, Program, Step
from rewriter.transform import Pass, apply


@dataclass(frozen=True, slots=True)
class Table:
    """One method that PEFT saves as one table: the pass, its options for a configuration, and the other way round.

    `fields(program, step, table)` are those of the configuration that mean the table, [virtual tokens, columns].
    """

    kind: type[Pass]
    options: Callable[[Any], dict[str, Any]]
    fields: Callable[[Program, Step, torch.Tensor], dict[str, Any]]


def table(program: Program, adapter: str) -> torch.Tensor:
    """The table of an adapter; where an encoder makes it, what the encoder gives."""
    name = f"prompt_embeddings.{adapter}"
    if name not in program.tensors:
        program = apply(program, Bake(), check=False).program
    held = program.tensor(name)
    return held.reshape(-1, held.shape[-1])  # an encoder's LSTM gives a batch of one


def rows_of(directory: Path, config: PromptLearningConfig, held: torch.Tensor) -> torch.Tensor:
    """The rows of a saved table that PEFT uses: of those for two submodules, a prompt enters the first one only."""
    count = config.num_virtual_tokens
    allowed = {count * (config.num_transformer_submodules or 1)}
    if config.num_transformer_submodules is None or config.peft_type == "PREFIX_TUNING":
        allowed.add(count)
    if held.ndim != 2 or held.shape[0] not in allowed:
        raise RewriteError(
            f"{directory}: prompt_embeddings does not have num_virtual_tokens rows",
            evidence=[f"num_virtual_tokens: {count}", f"prompt_embeddings: {list(held.shape)}"],
            fix="Use the adapter_config.json that belongs to these weights.",
        )
    return held[:count]


def _prefix(config: Any) -> dict[str, Any]:
    return {"virtual_tokens": config.num_virtual_tokens, "submodules": config.num_transformer_submodules}


def _prefix_fields(program: Program, step: Step, held: torch.Tensor) -> dict[str, Any]:
    own = [name for name in ("attention", "layers", "positions") if name in step.options]
    if own:
        raise RewriteError(
            f"PEFT has prefixes for all layers and shifted positions only, not {own[0]}={step.options[own[0]]}",
            fix="Apply the prefix without this option, or export the whole model.",
        )
    heads, width = next(
        (int(node.args[1][2]), int(node.args[1][3]))
        for node in program.graph.nodes
        if (origin := Origin.of(node)) and origin.step == step.number and origin.label.endswith("_heads")
    )
    return {
        "encoder_hidden_size": heads * width,
        "init_weights": None,
        "num_attention_heads": heads,
        "num_layers": held.shape[1] // (2 * heads * width),
        "num_transformer_submodules": step.options.get("submodules"),
        "num_virtual_tokens": held.shape[0],
        "prefix_projection": False,  # PEFT too saves what the projection gave
        "token_dim": heads * width,
    }


def _prompt(config: Any) -> dict[str, Any]:
    return {"virtual_tokens": config.num_virtual_tokens}


def _prompt_fields(program: Program, step: Step, held: torch.Tensor) -> dict[str, Any]:
    own = [name for name in ("ensemble", "input", "outputs", "template") if name in step.options]
    if own:
        raise RewriteError(
            f"PEFT has one prompt in front of the tokens, not {own[0]}={step.options[own[0]]}",
            fix="Apply the prompt without this option, or export the whole model.",
        )
    found = attentions(program)
    return {
        "num_attention_heads": 1,  # neither this nor the number of layers says anything about a prompt
        "num_layers": max(len(found), 1),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": held.shape[0],
        "token_dim": held.shape[1],
    }


def _encoder_fields(program: Program, step: Step, held: torch.Tensor) -> dict[str, Any]:
    return {**_prompt_fields(program, step, held), "encoder_hidden_size": held.shape[1]}  # for training on in PEFT


TABLES: dict[str, Table] = {
    "PREFIX_TUNING": Table(Prefix, _prefix, _prefix_fields),
    "PROMPT_TUNING": Table(Prompt, _prompt, _prompt_fields),
    "P_TUNING": Table(Prompt, _prompt, _encoder_fields),
}
