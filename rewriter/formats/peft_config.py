"""`adapter_config.json` of a PEFT LoRA: every field typed, none that changes the mathematics ignored."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rewriter.errors import RewriteError, RewriteWarning, UsageError
from rewriter.find import full_match
from rewriter.formats.json import read_json

CONFIG = "adapter_config.json"
SUPPORTED = ("LORA",)
KNOWN_VERSION = (0, 21)  # the newest PEFT whose fields are all known here
V = TypeVar("V", int, float)
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})

# Fields whose value never reaches the forward computation of a saved adapter.
_NEUTRAL = {
    "auto_mapping",
    "corda_config",  # without init_lora_weights="corda" it says nothing
    "eva_config",
    "inference_mode",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",  # another backward pass only
}
# Fields that change the mathematics and are not supported: only "nothing" is accepted.
_REFUSED = {
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
# Initialisations that leave the base weights as they were: the saved A and B say everything.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_BASE_INITS = ("pissa", "olora")


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


Rank = Annotated[int, Field(ge=1, le=1_000_000)]
Alpha = Annotated[float, AfterValidator(_finite)]
Names = list[str] | str


class LoraConfig(BaseModel):
    """What PEFT's LoRA configuration says, with PEFT's defaults for what it leaves out."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    base_model_name_or_path: str | None = None
    r: Rank = 8
    lora_alpha: Alpha = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Names
    exclude_modules: Names | None = None
    rank_pattern: Annotated[dict[str, Rank], BeforeValidator(lambda value: value or {})] = {}
    alpha_pattern: Annotated[dict[str, Alpha], BeforeValidator(lambda value: value or {})] = {}
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: bool = False  # a layer itself tells how it stores its weight
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names | None = None
    init_lora_weights: bool | str = True

    def wants(self, path: str) -> bool:
        """Whether PEFT puts a LoRA on the module at `path`; `all-linear` wants every one."""
        if _named(self.exclude_modules, path) or self.saves(path):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == "all-linear" or full_match(self.target_modules, path)
        return _named(self.target_modules, path) and self._wants_layer(path)

    def saves(self, path: str) -> bool:
        """Whether `modules_to_save` holds the module at `path` or one around it."""
        return any(re.search(rf"(^|\.){re.escape(name)}(\.|$)", path) for name in self.modules_to_save or ())

    def rank_of(self, path: str) -> int:
        return next((rank for key, rank in self.rank_pattern.items() if pattern_matches(key, path)), self.r)

    def alpha_of(self, path: str) -> float:
        return next((a for key, a in self.alpha_pattern.items() if pattern_matches(key, path)), self.lora_alpha)

    def unmatched(self, paths: Iterable[str]) -> list[str]:
        """The targets and patterns that mean none of `paths`, as `field 'value'`."""
        paths = list(paths)
        idle = []
        if not isinstance(self.target_modules, str):
            idle += [f"target_modules {t!r}" for t in self.target_modules if not any(_named([t], p) for p in paths)]
        for name in ("rank_pattern", "alpha_pattern"):
            keys = getattr(self, name)
            idle += [f"{name} {key!r}" for key in keys if not any(pattern_matches(key, path) for path in paths)]
        return idle

    def _wants_layer(self, path: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = self.layers_pattern or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = [m for p in patterns if (m := re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", path))]
        return bool(found) and int(found[0].group(1)) in ([wanted] if isinstance(wanted, int) else wanted)


def _named(names: Names | None, path: str) -> bool:
    if isinstance(names, str):
        return full_match(names, path)
    return any(path == name or path.endswith("." + name) for name in names or ())


def pattern_matches(pattern: str, path: str) -> bool:
    """How keys of `rank_pattern` and `alpha_pattern` match: a regular expression for the end of a path."""
    return full_match(rf"(.*\.)?({pattern})", path)


def short_names(paths: Collection[str], among: Iterable[str]) -> list[str]:
    """Names that mean exactly `paths`: a last segment where all of `among` with that end are meant, else the path."""
    spared = {path.rpartition(".")[2] for path in among if path not in paths}
    tails = [tail if (tail := path.rpartition(".")[2]) not in spared else path for path in paths]
    return list(dict.fromkeys(tails))


def short_patterns(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """The most frequent of the values by path, and patterns for the paths that have another."""
    default = Counter(values.values()).most_common(1)[0][0]
    by_tail: dict[str, set[V]] = {}
    for path, value in values.items():
        by_tail.setdefault(path.rpartition(".")[2], set()).add(value)
    patterns = {}
    for path, value in values.items():
        tail = path.rpartition(".")[2]
        if value != default:
            patterns[re.escape(tail if len(by_tail[tail]) == 1 else path)] = value
    return default, patterns


def read_config(directory: Path, *, strict: bool = False) -> LoraConfig:
    """The LoRA configuration of a PEFT adapter directory.

    Raises `RewriteError` for a field of a wrong type or impossible value, for a method other than LoRA, for a field
    that changes the mathematics and is not supported, and for an unknown field unless a newer PEFT wrote it; with
    `strict` then too.
    """
    path = directory / CONFIG
    held = read_json(path)
    kind = held.pop("peft_type", None)
    if kind not in SUPPORTED:
        raise RewriteError(
            f"{path}: peft_type is {kind!r}",
            evidence=[f"supported: {', '.join(SUPPORTED)}"],
            fix="Merge this adapter in PEFT and trace the merged model, or trace the PEFT model itself.",
        )
    _check_fields(path, held, strict)
    if held.get("target_modules") is None:
        raise RewriteError(f"{path}: target_modules is missing", fix="Save the adapter again with PEFT.")
    try:
        config = LoraConfig.model_validate(held)
    except ValidationError as error:
        raise RewriteError(f"{path} is not valid", evidence=_lines(error), fix="Correct these fields.") from None
    if config.init_lora_weights not in (True, False, *_PLAIN_INITS, *_BASE_INITS):
        raise RewriteError(
            f"{path}: init_lora_weights is {config.init_lora_weights!r}",
            evidence=["it changed the base weights in a way that cannot be repeated from this directory"],
            fix="Save it with `path_initial_model_for_weight_conversion`, which makes it a plain LoRA.",
        )
    return config


def _check_fields(path: Path, held: dict[str, Any], strict: bool) -> None:
    refused = [f"{name}: {held[name]!r}"[:120] for name in sorted(_REFUSED & set(held)) if held[name] not in _NOTHING]
    if refused:
        raise RewriteError(
            f"{path} uses what is not supported",
            evidence=refused,
            fix="Merge this adapter in PEFT and trace the merged model.",
        )
    unknown = sorted(set(held) - set(LoraConfig.model_fields) - _NEUTRAL - _REFUSED)
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
