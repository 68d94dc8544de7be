"""The adapter of a program as a PEFT adapter directory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from passes.peft_branches import STEPS, Branch, adapters, branches, on_original
from passes.peft_write_method import method_files, type_of
from rewriter.errors import RewriteError, UsageError
from rewriter.formats import peft
from rewriter.formats.peft_config import KNOWN_VERSION, LoraConfig
from rewriter.formats.peft_targets import short_names, short_patterns
from rewriter.program import Program, Step
from rewriter.view import Embedding, Linear, modules

_KEYS = {kind: ending for ending, kind in peft.ENDINGS.items()}

BASE = ("nf4", "dequantise")  # passes that change how the base is held, of which an adapter says nothing


def write_adapter(
    program: Program,
    directory: Path,
    *,
    adapter: str = "default",
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the adapter named `adapter` as the directory that `PeftModel.from_pretrained` reads; returns where it is.

    An adapter of another name than `default` goes into a subdirectory of that name, as PEFT does. LoRAs on slices of a
    fused projection become one of the summed rank. A LoRA that took its start out of the base weight (pissa, olora)
    becomes a plain one of twice the rank on the original weight: W₀ + s (B A − B₀ A₀).

    Raises `UsageError` when the program has no such adapter, `RewriteError` for what such a directory cannot hold.
    """
    place = Path(directory)
    if adapter != "default":
        place = place / adapter
    method = _method(program, adapter)
    if method is not None:
        config, tensors = method_files(program, method, adapter, _common(program, base_model))
    else:
        config, tensors = _lora_files(program, adapter, base_model)
    place.parent.mkdir(parents=True, exist_ok=True)
    return peft.write(place, config, tensors, overwrite=overwrite)


def _method(program: Program, adapter: str) -> Step | None:
    """The step that made an adapter that is no LoRA; refused beside other steps, which the directory could not hold."""
    made = [step for step in program.steps if type_of(step) and step.options.get("adapter", "default") == adapter]
    if not made:
        names = [str(step.options.get("adapter", "default")) for step in program.steps]
        if adapter not in names:
            raise UsageError(
                f"the program has no adapter named {adapter!r}",
                evidence=[f"it has: {', '.join(dict.fromkeys(names)) or 'none'}"],
                fix="Apply one first, or name one of these.",
            )
        return None
    if any(step not in made and step.name not in ("bake", *BASE) for step in program.steps):
        raise RewriteError(
            f"the program has more than the pass {made[0].name}, and a PEFT directory holds one method",
            evidence=[f"passes: {', '.join(step.name for step in program.steps)}"],
            fix="Undo the others first, or export the whole model.",
        )
    return made[0]


def _common(program: Program, base_model: str | None) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base_model or program.metadata.get("huggingface", {}).get("directory"),
        "task_type": _task(program),
    }


def _lora_files(
    program: Program, adapter: str, base_model: str | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    steps = _steps(program, adapter)
    found = [on_original(program, steps, branch) for branch in branches(program, steps, adapter)]
    saved, biases = _trained_base(steps)
    config = _config(program, found, saved, biases, base_model)
    tensors = _tensors(found)
    adapted = {branch.site.path for branch in found}
    for name in (*_inside(program, saved), *biases, *_changed(steps, found)):
        owner, _, leaf = name.rpartition(".")
        tensors[f"{peft.PREFIX}{owner}.{'base_layer.' if owner in adapted else ''}{leaf}"] = program.tensor(name)
    return config, tensors


def _steps(program: Program, adapter: str) -> list[Step]:
    foreign = [step.name for step in program.steps if step.name not in (*STEPS, *BASE)]
    if foreign:
        raise RewriteError(
            f"the program also has the pass {foreign[0]}, which a PEFT LoRA directory cannot hold",
            evidence=[f"passes: {', '.join(step.name for step in program.steps)}"],
            fix="Undo it first, or export the whole model.",
        )
    known = adapters(program)
    if adapter not in known:
        raise UsageError(
            f"the program has no LoRA named {adapter!r}",
            evidence=[f"it has: {', '.join(known) or 'none'}"],
            fix="Apply one first, or name one of these.",
        )
    return known[adapter]


# -- the rest of the base -----------------------------------------------------------------------------------------


def _trained_base(steps: list[Step]) -> tuple[list[str], list[str]]:
    """(modules saved whole, biases trained alone) among what the steps train of the base model."""
    added = {name for step in steps for name in step.added}
    trained = [name for name in dict.fromkeys(n for step in steps for n in step.trainable) if name not in added]
    saved = list(dict.fromkeys(n.rpartition(".")[0] for n in trained if "bias" not in n.rpartition(".")[2]))
    return saved, [name for name in trained if name.rpartition(".")[0] not in saved]


def _inside(program: Program, saved: list[str]) -> list[str]:
    return [name for owner in saved for name in program.exported.state_dict if name.rpartition(".")[0] == owner]


def _changed(steps: list[Step], found: list[Branch]) -> list[str]:
    """Tensors of the base that a step replaced without training them, such as a resized embedding's."""
    expressed = {branch.site.weight for branch in found if isinstance(branch.site, Linear)}
    trained = {name for step in steps for name in step.trainable}
    names = dict.fromkeys(name for step in steps for name in step.originals)
    return [name for name in names if name not in expressed and name not in trained]


# -- the files ----------------------------------------------------------------------------------------------------


def _tensors(found: list[Branch]) -> dict[str, torch.Tensor]:
    biased = any("lora_B_bias" in branch.tensors for branch in found)
    result = {}
    for branch in found:
        tensors = dict(branch.tensors)
        if biased and not isinstance(branch.site, Embedding):
            b = tensors["lora_B"]
            tensors.setdefault("lora_B_bias", b.new_zeros(b.shape[0]))
        for kind, tensor in tensors.items():
            result[f"{peft.PREFIX}{branch.site.path}.{_KEYS[kind]}"] = tensor
    return result


def _config(
    program: Program, found: list[Branch], saved: list[str], biases: list[str], base_model: str | None
) -> dict[str, Any]:
    paths = [branch.site.path for branch in found]
    ranks = {branch.site.path: branch.rank for branch in found}
    rank, rank_pattern = short_patterns(ranks)
    rslora, alphas = _alphas(found)
    alpha, alpha_pattern = short_patterns(alphas)
    dora = _one("use_dora", {b.site.path: "lora_magnitude_vector" in b.tensors for b in found})
    dropouts = {branch.site.path: branch.dropout for branch in found if branch.dropout is not None}
    known = [path for path in modules(program) if ".lora_" not in f".{path}."]
    config = {
        **_DEFAULTS,
        **_common(program, base_model),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rslora,
        "use_dora": dora,
        "lora_bias": any("lora_B_bias" in branch.tensors for branch in found),
        "lora_dropout": _one("lora_dropout", dropouts) if dropouts else 0.0,
        "bias": _bias_mode(biases, paths),
        "target_modules": short_names(paths, known),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(isinstance(b.site, Linear) and b.site.transposed for b in found),
    }
    _check_meaning(config, ranks, alphas, known)
    return config


def _alphas(found: list[Branch]) -> tuple[bool, dict[str, float]]:
    """(rank-stabilised, alpha by path): the reading of the scales, alpha / rank or alpha / √rank, with whole alphas."""
    plain = {b.site.path: _tidy(b.scale * b.rank) for b in found}
    stable = {b.site.path: _tidy(b.scale * math.sqrt(b.rank)) for b in found}
    if all(isinstance(a, int) for a in stable.values()) and not all(isinstance(a, int) for a in plain.values()):
        return True, stable
    return False, plain


def _tidy(alpha: float) -> float:
    whole = round(alpha)
    return whole if math.isclose(alpha, whole, rel_tol=1e-12) else alpha


def _one(name: str, values: dict[str, Any]) -> Any:
    """The value all layers share; PEFT's configuration has only one."""
    if len(set(values.values())) > 1:
        first = next(iter(values))
        other = next(path for path in values if values[path] != values[first])
        raise RewriteError(
            f"{name} is not the same for all layers, which a PEFT LoRA directory cannot hold",
            evidence=[f"{path}: {values[path]}" for path in (first, other)],
            fix="Give the two groups of layers adapters of different names.",
        )
    return next(iter(values.values()))


def _bias_mode(biases: list[str], paths: list[str]) -> str:
    if not biases:
        return "none"
    return "lora_only" if {name.rpartition(".")[0] for name in biases} <= set(paths) else "all"


def _task(program: Program) -> str | None:
    """PEFT's name for what the model does, where it brings no module of its own along."""
    from transformers.models.auto import modeling_auto

    architecture = program.metadata.get("huggingface", {}).get("architecture")
    if architecture in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "CAUSAL_LM"
    if architecture in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        return "SEQ_2_SEQ_LM"
    if architecture in modeling_auto.MODEL_MAPPING_NAMES.values():
        return "FEATURE_EXTRACTION"
    return None


def _check_meaning(config: dict[str, Any], ranks: dict[str, int], alphas: dict[str, float], known: list[str]) -> None:
    """The configuration, read again, must mean exactly the layers and numbers it was made from."""
    read = LoraConfig.model_validate({k: v for k, v in config.items() if k != "peft_type"})
    meant = {path for path in known if read.wants(path)}
    wrong = sorted(meant ^ set(ranks)) or [
        path for path in ranks if (read.rank_of(path), read.alpha_of(path)) != (ranks[path], alphas[path])
    ]
    if wrong:
        raise RewriteError(
            "the layers with a LoRA cannot be told apart from others by name",
            evidence=wrong[:8],
            fix="Export the whole model, merged.",
        )


_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": ".".join(map(str, (*KNOWN_VERSION, 0))),
    "qalora_group_size": 16,
    "revision": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
