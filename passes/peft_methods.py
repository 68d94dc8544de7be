"""What the configurations of PEFT's methods and the passes of this project call the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from passes.adalora import Adalora
from passes.ia3 import Ia3
from passes.loha import Loha
from passes.lokr import Lokr
from passes.trainable_tokens import TrainableTokens
from passes.vera import Vera
from passes.weight_update import by_pattern
from rewriter.formats.peft_targets import short_names, short_patterns
from rewriter.transform import Pass

Tensors = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Method:
    """One method: the pass, its options for a configuration, and the fields of a configuration for its options.

    `options(config, tensors, old)` gets the adapted modules with their tensors by kind, under the program's paths;
    `old` are the paths that the configuration knows. `fields(pass_, tensors, among)` are those of PEFT's configuration,
    whose names must mean the modules of `tensors` and no other one of `among`.
    """

    kind: type[Pass]
    options: Callable[[Any, Tensors, Mapping[str, str]], dict[str, Any]]
    fields: Callable[[Any, Tensors, list[str]], dict[str, Any]]


def _ranked(config: Any, tensors: Tensors, old: Mapping[str, str]) -> dict[str, Any]:
    rank, ranks = short_patterns({path: config.rank_of(old[path]) for path in tensors})
    alpha, alphas = short_patterns({path: config.alpha_of(old[path]) for path in tensors})
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    return {"targets": tuple(tensors), "rank": rank, "alpha": alpha, **patterns}


def _ranked_fields(pass_: Any, tensors: Tensors, among: list[str]) -> dict[str, Any]:
    rank, ranks = short_patterns({path: by_pattern(pass_.rank_pattern, path, pass_.rank) for path in tensors})
    alpha, alphas = short_patterns({path: by_pattern(pass_.alpha_pattern, path, pass_.alpha) for path in tensors})
    return {
        "alpha": alpha,
        "alpha_pattern": alphas,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "module_dropout": 0.0,
        "r": rank,
        "rank_dropout": 0.0,
        "rank_pattern": ranks,
        "target_modules": short_names(tensors, among),
        "use_effective_conv2d": pass_.use_effective_conv2d,
    }


def _loha(config: Any, tensors: Tensors, old: Mapping[str, str]) -> dict[str, Any]:
    return {**_ranked(config, tensors, old), "use_effective_conv2d": config.use_effective_conv2d}


def _lokr(config: Any, tensors: Tensors, old: Mapping[str, str]) -> dict[str, Any]:
    shape = {"decompose_both": config.decompose_both, "decompose_factor": config.decompose_factor}
    return {**_loha(config, tensors, old), **shape}


def _lokr_fields(pass_: Any, tensors: Tensors, among: list[str]) -> dict[str, Any]:
    shape = {"decompose_both": pass_.decompose_both, "decompose_factor": pass_.decompose_factor}
    return {**_ranked_fields(pass_, tensors, among), "rank_dropout_scale": False, **shape}


def _ia3(config: Any, tensors: Tensors, old: Mapping[str, str]) -> dict[str, Any]:
    inputs = tuple(path for path in tensors if config.is_feedforward(old[path]))
    return {"targets": tuple(path for path in tensors if path not in inputs), "feedforward_targets": inputs}


def _ia3_fields(_pass: Any, tensors: Tensors, among: list[str]) -> dict[str, Any]:
    inputs = [path for path, held in tensors.items() if held["ia3_l"].shape[0] == 1]
    return {
        "fan_in_fan_out": False,  # PEFT corrects it by the module's type
        "feedforward_modules": short_names(inputs, among),
        "init_ia3_weights": True,
        "target_modules": short_names(tensors, among),
    }


def _vera(config: Any, tensors: Tensors, _old: Mapping[str, str]) -> dict[str, Any]:
    return {
        "targets": tuple(tensors),
        "rank": config.r,
        "d_initial": config.d_initial,
        "dropout": config.vera_dropout,
        "projection_seed": config.projection_prng_key,
    }


def _vera_fields(pass_: Any, tensors: Tensors, among: list[str]) -> dict[str, Any]:
    return {
        "bias": "none",
        "d_initial": pass_.d_initial,
        "fan_in_fan_out": False,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "projection_prng_key": pass_.projection_seed,
        "r": pass_.rank,
        "save_projection": True,
        "target_modules": short_names(tensors, among),
        "vera_dropout": pass_.dropout,
    }


def _adalora(config: Any, tensors: Tensors, _old: Mapping[str, str]) -> dict[str, Any]:
    ranks = {path: int(held["lora_A"].shape[0]) for path, held in tensors.items()}
    return {
        "targets": tuple(tensors),
        "rank": config.init_r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "rank_pattern": {re.escape(path): rank for path, rank in ranks.items() if rank != config.init_r},
    }


def _adalora_fields(pass_: Any, tensors: Tensors, among: list[str]) -> dict[str, Any]:
    ranks = {path: int(held["lora_A"].shape[0]) for path, held in tensors.items()}
    left = {
        f"{path}.lora_E": [True] * rank + [False] * (pass_.rank - rank)
        for path, rank in ranks.items()
        if rank != pass_.rank
    }
    return {
        "bias": "none",
        "fan_in_fan_out": False,
        "init_r": pass_.rank,
        "lora_alpha": pass_.alpha,
        "lora_dropout": pass_.dropout,
        "rank_pattern": left or None,
        "target_modules": short_names(tensors, among),
        "target_r": min(ranks.values()),
        "tfinal": 0,  # PEFT wants a schedule, also of an adapter whose training is over
        "tinit": 0,
        "total_step": 1,
    }


def _tokens(config: Any, tensors: Tensors, old: Mapping[str, str]) -> dict[str, Any]:
    tables = tuple(path for path in tensors if config.wants(old[path]))  # a tied output head has its own copy in PEFT
    return {"targets": tables, "token_indices": tuple(config.token_indices)}


def _tokens_fields(pass_: Any, tensors: Tensors, among: list[str]) -> dict[str, Any]:
    return {
        "init_weights": True,
        "target_modules": short_names(tensors, among),
        "token_indices": list(pass_.token_indices),
    }


METHODS: dict[str, Method] = {
    "IA3": Method(Ia3, _ia3, _ia3_fields),
    "LOHA": Method(Loha, _loha, _ranked_fields),
    "LOKR": Method(Lokr, _lokr, _lokr_fields),
    "VERA": Method(Vera, _vera, _vera_fields),
    "ADALORA": Method(Adalora, _adalora, _adalora_fields),
    "TRAINABLE_TOKENS": Method(TrainableTokens, _tokens, _tokens_fields),
}
