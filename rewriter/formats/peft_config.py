"""`adapter_config.json` of a PEFT adapter: every field typed, none that changes the mathematics ignored."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from rewriter.errors import RewriteError, RewriteWarning, UsageError
from rewriter.formats.json import read_json
from rewriter.formats.peft_methods import METHODS
from rewriter.formats.peft_targets import NEUTRAL, AdapterConfig, Alpha, Probability, RankedConfig, TargetedConfig

CONFIG = "adapter_config.json"
KNOWN_VERSION = (0, 21)  # the newest PEFT whose fields are all known here
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})

# Initialisations that leave the base weights as they were: the saved A and B say everything.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_BASE_INITS = ("pissa", "olora")


class LoraConfig(RankedConfig):
    """What PEFT's LoRA configuration says, with PEFT's defaults for what it leaves out."""

    peft_type = "LORA"
    endings: ClassVar[Mapping[str, str]] = {
        "lora_A.weight": "lora_A",
        "lora_B.weight": "lora_B",
        "lora_B.bias": "lora_B_bias",
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }
    neutral = NEUTRAL | {
        "corda_config",  # without init_lora_weights="corda" it says nothing
        "eva_config",
        "lora_ga_config",
        "loftq_config",
        "megatron_core",
        "merge_weights",
        "qalora_group_size",
        "velora_config",  # another backward pass only
    }
    refused = frozenset(
        {
            "alora_invocation_tokens",
            "arrow_config",
            "enable_lora",
            "ensure_weight_tying",
            "kasa_config",
            "layer_replication",
            "megatron_config",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_qalora",
        }
    )

    lora_alpha: Alpha = 8
    lora_dropout: Probability = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: bool = False  # a layer itself tells how it stores its weight
    init_lora_weights: bool | str = True

    @property
    def default_alpha(self) -> float:
        return self.lora_alpha


TYPES: dict[str, type[AdapterConfig]] = {"LORA": LoraConfig, **METHODS}


def read_config(directory: Path, *, strict: bool = False) -> AdapterConfig:
    """The configuration of a PEFT adapter directory, typed by its `peft_type`.

    Raises `RewriteError` for a field of a wrong type or impossible value, for a method that is not known, for a field
    that changes the mathematics and is not supported, and for an unknown field unless a newer PEFT wrote it; with
    `strict` then too.
    """
    path = directory / CONFIG
    held = read_json(path)
    kind = held.pop("peft_type", None)
    type_ = TYPES.get(kind) if isinstance(kind, str) else None
    if type_ is None:
        raise RewriteError(
            f"{path}: peft_type is {kind!r}",
            evidence=[f"supported: {', '.join(TYPES)}"],
            fix="Merge this adapter in PEFT and trace the merged model, or trace the PEFT model itself.",
        )
    _check_fields(path, type_, held, strict)
    if issubclass(type_, TargetedConfig) and held.get("target_modules") is None:
        raise RewriteError(f"{path}: target_modules is missing", fix="Save the adapter again with PEFT.")
    try:
        config = type_.model_validate(held)
    except ValidationError as error:
        raise RewriteError(f"{path} is not valid", evidence=_lines(error), fix="Correct these fields.") from None
    if isinstance(config, LoraConfig) and config.init_lora_weights not in (True, False, *_PLAIN_INITS, *_BASE_INITS):
        raise RewriteError(
            f"{path}: init_lora_weights is {config.init_lora_weights!r}",
            evidence=["it changed the base weights in a way that cannot be repeated from this directory"],
            fix="Save it with `path_initial_model_for_weight_conversion`, which makes it a plain LoRA.",
        )
    return config


def _check_fields(path: Path, type_: type[AdapterConfig], held: dict[str, Any], strict: bool) -> None:
    given = sorted(type_.refused & set(held))
    refused = [f"{name}: {held[name]!r}"[:120] for name in given if held[name] not in _NOTHING]
    if refused:
        raise RewriteError(
            f"{path} uses what is not supported",
            evidence=refused,
            fix="Merge this adapter in PEFT and trace the merged model.",
        )
    unknown = sorted(set(held) - set(type_.model_fields) - type_.neutral - type_.refused)
    if not unknown:
        return
    version = str(held.get("peft_version") or "")
    shown = [f"{name}: {held[name]!r}"[:120] for name in unknown]
    if strict or not _is_newer(version):
        raise UsageError(
            f"{path} has {len(unknown)} unknown fields",
            evidence=[*shown, f"peft_version: {version or 'none'}; known up to {'.'.join(map(str, KNOWN_VERSION))}"],
            fix="Remove them if they mean nothing for this adapter.",
        )
    warnings.warn(
        f"{path} was written by PEFT {version}; unknown fields are ignored: {', '.join(shown)}",
        RewriteWarning,
        stacklevel=3,
    )


def _is_newer(version: str) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found.group(1)), int(found.group(2))) > KNOWN_VERSION


def _lines(error: ValidationError) -> list[str]:
    lines: dict[str, str] = {}
    for entry in error.errors():
        where = [str(part) for part in entry["loc"]]
        field = ".".join(where[:1] if entry["loc"][0] not in ("rank_pattern", "alpha_pattern") else where[:2])
        lines.setdefault(field, f"{field}: {entry['input']!r}"[:100] + f", {entry['msg'][0].lower()}{entry['msg'][1:]}")
    return list(lines.values())
