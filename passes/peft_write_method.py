"""An adapter that is no LoRA as a PEFT directory: its configuration and its tensors under PEFT's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from passes.layer_norm_tuning import LayerNormTuning
from passes.peft_methods import METHODS
from passes.peft_prompts import TABLES, table
from rewriter.errors import RewriteError
from rewriter.formats import peft
from rewriter.formats.peft_config import KNOWN_VERSION, TYPES
from rewriter.formats.peft_methods import LayerNormConfig
from rewriter.formats.peft_targets import TargetedConfig, short_names
from rewriter.program import Program, Step
from rewriter.transform import Pass
from rewriter.view import Linear, layers, modules

Kinds = dict[str, dict[str, torch.Tensor]]
_TYPES = {
    LayerNormTuning.name: "LN_TUNING",
    **{method.kind.name: type_ for type_, method in METHODS.items()},
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",  # also of an encoder: what is saved is the prompt itself
}


def type_of(step: Step) -> str | None:
    """PEFT's name of the method of a step; None for a LoRA and for what PEFT does not know."""
    config: Mapping[str, Any] = step.options.get("config", {}) if step.name == "peft" else {}
    return config.get("peft_type") or _TYPES.get(step.name)


def method_files(
    program: Program, step: Step, adapter: str, common: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the tensors, under the keys of the file, of the adapter that a step made.

    `common` are the fields that all methods share. Raises `RewriteError` for what a PEFT directory cannot hold.
    """
    type_ = type_of(step)
    assert type_ is not None
    among = [path for path in modules(program) if not {*path.split(".")} & {*TYPES[type_].endings}]
    given: Mapping[str, Any] = step.options.get("config", {}) if step.name == "peft" else {}
    base = [name for name in step.trainable if name not in step.added]
    tensors: dict[str, torch.Tensor] = {}
    if type_ == "LN_TUNING":
        names = given.get("modules_to_save") or step.options.get("modules_to_save", ())
        saved = [
            name for name in base if LayerNormConfig(target_modules=[], modules_to_save=[*names]).saves(_owner(name))
        ]
        norms = [name for name in base if name not in saved]
        fields: dict[str, Any] = {"target_modules": short_names(list(dict.fromkeys(map(_owner, norms))), among)}
        tensors |= {
            f"{peft.PREFIX}{_owner(name)}.ln_tuning_layers.{_leaf(name)}": program.tensor(name) for name in norms
        }
    elif type_ in TABLES:
        prompts = table(program, adapter)
        fields, saved = TABLES[type_].fields(program, step, prompts), base
        tensors["prompt_embeddings"] = prompts
    else:
        held = _held(program, step, type_, adapter)
        adapted = {path: kinds for path, kinds in held.items() if path}
        _check_layers(program, type_, adapted)
        fields = METHODS[type_].fields(_pass_of(step, type_, adapted), adapted, among)
        tensors |= {_key(path, kind): tensor for path, kinds in held.items() for kind, tensor in kinds.items()}
        whole = {_owner(name) for name in base if "bias" not in _leaf(name)}
        saved = [name for name in base if _owner(name) in whole]
        biases = [name for name in base if name not in saved]
        if biases:
            fields["bias"] = _bias_mode(type_, fields, biases, adapted)
        for name in biases:
            inner = "base_layer." if _owner(name) in adapted else ""
            tensors[f"{peft.PREFIX}{_owner(name)}.{inner}{_leaf(name)}"] = program.tensor(name)
        _check_meaning(type_, {**fields, "modules_to_save": list(whole)}, adapted, among)
    prefix = "base_model." if type_ in TABLES else peft.PREFIX
    tensors |= {prefix + name: program.tensor(name) for name in saved}
    config = {
        "auto_mapping": None,
        **({} if type_ in TABLES else {"exclude_modules": None}),
        "inference_mode": True,
        "peft_type": type_,
        "peft_version": ".".join(map(str, (*KNOWN_VERSION, 0))),
        "revision": None,
        **common,
        **({"task_type": given["task_type"]} if given.get("task_type") else {}),
        **fields,
        "modules_to_save": list(dict.fromkeys(map(_owner, saved))) or None,
    }
    return config, tensors


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _bias_mode(type_: str, fields: Mapping[str, Any], biases: list[str], adapted: Kinds) -> str:
    """What PEFT calls the biases that train, where a method knows of such."""
    if "bias" not in fields:
        raise RewriteError(
            f"{biases[0]} trains, and PEFT's {type_} has no trained biases", fix="Export the whole model, merged."
        )
    if {_owner(name) for name in biases} <= set(adapted):
        return "vera_only" if type_ == "VERA" else "lora_only"
    return "all"


def _held(program: Program, step: Step, type_: str, adapter: str) -> Kinds:
    """Module path -> kind -> tensor of what the step added; the empty path for what belongs to no module."""
    found: Kinds = {}
    kinds = {*TYPES[type_].endings.values()}
    for name in step.added:
        whole = name.removesuffix(f".{adapter}")
        path, _, kind = whole.rpartition(".")
        if kind in kinds:
            found.setdefault(path, {})[kind] = program.tensor(name)
        elif name in step.trainable:
            raise RewriteError(
                f"{name} belongs to a slice of a layer, and PEFT's {type_} has whole layers only",
                fix="Apply the method to the whole layer, or export the whole model.",
            )
    return found


def _key(path: str, kind: str) -> str:
    return f"{peft.PREFIX}{path}.{kind}" if path else f"base_model.{kind}"


def _pass_of(step: Step, type_: str, adapted: Kinds) -> Pass:
    """The pass with the options that made the adapter."""
    method = METHODS[type_]
    if step.name != "peft":
        return method.kind(**step.options)
    config = {name: value for name, value in step.options["config"].items() if name != "peft_type"}
    given = TYPES[type_].model_validate(config)
    return method.kind(**method.options(given, adapted, {path: path for path in adapted}))


def _check_layers(program: Program, type_: str, adapted: Kinds) -> None:
    turned = [site.path for site in layers(program).values() if isinstance(site, Linear) and site.transposed]
    refused = sorted({*turned} & {*adapted})
    if type_ in ("LOHA", "LOKR") and refused:
        raise RewriteError(
            f"{refused[0]} stores its weight [i, o], and PEFT has no {type_} for such a layer",
            fix="Export the whole model, merged.",
        )


def _check_meaning(type_: str, fields: Mapping[str, Any], adapted: Kinds, among: list[str]) -> None:
    """The configuration, read again, must mean exactly the layers it was made from."""
    read = TYPES[type_].model_validate(dict(fields))
    assert isinstance(read, TargetedConfig)
    wrong = sorted({path for path in among if read.wants(path)} ^ set(adapted))
    if wrong:
        raise RewriteError(
            "the adapted layers cannot be told apart from others by name",
            evidence=wrong[:8],
            fix="Export the whole model, merged.",
        )
