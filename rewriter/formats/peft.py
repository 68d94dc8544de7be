"""PEFT adapter directories: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rewriter.errors import LawError, RewriteError, RewriteWarning
from rewriter.formats import pickle, safetensors
from rewriter.formats.atomic import write_directory
from rewriter.formats.files import open_regular
from rewriter.formats.peft_config import CONFIG, LoraConfig, read_config
from rewriter.formats.peft_targets import AdapterConfig
from rewriter.formats.sniff import Kind, require

WEIGHTS = "adapter_model.safetensors"
LEGACY_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."
ENDINGS = LoraConfig.endings
PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PeftFiles:
    """What an adapter directory holds.

    `modules` is module path -> kind -> tensor, kinds as the configuration's `endings` name them, with an empty path for
    what belongs to no module; `base` is parameter name -> tensor for what was trained or kept of the base model;
    `sha256` is over the bytes of both files.
    """

    directory: Path
    config: AdapterConfig
    modules: Mapping[str, Mapping[str, torch.Tensor]]
    base: Mapping[str, torch.Tensor]
    sha256: str


def read(directory: Path, *, strict: bool = False, allow_nonfinite: bool = False) -> PeftFiles:
    """Read and check an adapter directory by itself, without the model it belongs to.

    Raises `RewriteError` when a file is missing or damaged, when a module lacks A or B, when ranks disagree with each
    other or the configuration; `LawError` for NaN or infinity unless `allow_nonfinite`.
    """
    require(directory, Kind.PEFT_ADAPTER)
    config = read_config(directory, strict=strict)
    weights, held = _weights(directory), stored(directory)
    _check_numbers(weights, config, held, allow_nonfinite)
    modules, base = _sort(weights, config, _normalised(weights, config, held))
    if isinstance(config, LoraConfig):
        for path, tensors in modules.items():
            _check_pair(weights, path, tensors)
            _check_extras(weights, config, path, tensors)
        _check_ranks(directory, config, modules)
    return PeftFiles(directory, config, modules, base, digest(directory))


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter directory under the names they are stored by, as they are."""
    weights = _weights(directory)
    return safetensors.load(weights) if weights.name == WEIGHTS else pickle.load_state_dict(weights)


def digest(directory: Path) -> str:
    """The SHA-256 over the bytes of an adapter's configuration and weights."""
    total = hashlib.sha256()
    for path in (directory / CONFIG, _weights(directory)):
        with open_regular(path) as file:
            while block := file.read(_BLOCK_BYTES):
                total.update(block)
    return total.hexdigest()


def _weights(directory: Path) -> Path:
    for name in (WEIGHTS, LEGACY_WEIGHTS):
        if (directory / name).exists():
            return directory / name
    names = sorted(entry.name for entry in directory.iterdir())
    raise RewriteError(
        f"{directory} has no {WEIGHTS}", evidence=[f"it holds: {', '.join(names[:12])}"], fix="Download it again."
    )


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, overwrite: bool) -> Path:
    """Write a directory as PEFT does and compare it, read back, with what was meant.

    `tensors` are under the keys of the file. Raises `RewriteError` when the place cannot be written.
    """
    from safetensors.torch import save_file

    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with write_directory(directory, overwrite=overwrite) as partial:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
        (partial / CONFIG).write_text(text + "\n", encoding="utf-8")
        save_file(kept, partial / WEIGHTS, metadata={"format": "pt"})
        found = safetensors.load(partial / WEIGHTS)
        wrong = sorted({*kept} ^ {*found}) or [name for name in kept if not _same_bits(kept[name], found[name])]
        if wrong:
            raise RewriteError(f"{directory} read back differs", evidence=wrong[:8], fix="Check the disk.")
    return directory


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _check_numbers(path: Path, config: AdapterConfig, held: Mapping[str, torch.Tensor], allow_nonfinite: bool) -> None:
    kinds = set(config.endings.values())
    integers = [
        f"{name}: {tensor.dtype}".replace("torch.", "")
        for name, tensor in held.items()
        if not tensor.is_floating_point() and kinds & set(name.split("."))
    ]
    if integers:
        raise RewriteError(
            f"{path}: the tensors of an adapter must be floating-point",
            evidence=integers[:8],
            fix="Save it without quantisation.",
        )
    bad = {name: int((~torch.isfinite(t.float())).sum()) for name, t in held.items()}
    lines = [f"{name}: {count} of {held[name].numel()} values" for name, count in bad.items() if count]
    if lines and not allow_nonfinite:
        raise LawError(
            f"{path} holds NaN or infinity", evidence=lines[:8], fix="Train again; or allow it: --allow-nonfinite."
        )


def _normalised(path: Path, config: AdapterConfig, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under keys without `base_model.model.`, wrappers and adapter names; unusual ones are reported."""
    result: dict[str, torch.Tensor] = {}
    unusual: list[str] = []
    for key, tensor in held.items():
        name, usual = _normal_key(key, config)
        if ".original_module." in name:
            continue  # what a saved module was before training
        if name in result and not torch.equal(result[name], tensor):
            raise RewriteError(f"{path}: two different tensors are both {name}", evidence=[key], fix="Save it again.")
        if not usual:
            unusual.append(f"{key} -> {name}")
        result[name] = tensor
    if unusual:
        more = f" and {len(unusual) - 1} more" if len(unusual) > 1 else ""
        warnings.warn(f"{path}: keys are not as PEFT writes them: {unusual[0]}{more}", RewriteWarning, stacklevel=4)
    return result


def _normal_key(key: str, config: AdapterConfig) -> tuple[str, bool]:
    name = key.removeprefix("base_model.")
    if name in config.root:
        return name, True
    name = key
    while True:
        start = next((p for p in (*_WRAPPERS, PREFIX) if name.startswith(p)), None)
        if start is None:
            break
        name = name.removeprefix(start)
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module."):
        name = name.replace("." + wrapper, ".")
    name = re.sub(r"\.(lora_[AB])\.[^.]+\.(weight|bias)$", r".\1.\2", name)
    name = re.sub(r"\.(lora_embedding_[AB]|lora_magnitude_vector)\.(?:[^.]+)(?:\.weight)?$", r".\1", name)
    usual = key == PREFIX + name
    name = name.replace(".ln_tuning_layers.", ".")
    return re.sub(r"\.modules_to_save\.(?:default\.)?", ".", name), usual


def _sort(
    path: Path, config: AdapterConfig, held: Mapping[str, torch.Tensor]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    modules: dict[str, dict[str, torch.Tensor]] = {}
    base: dict[str, torch.Tensor] = {}
    marks = {f".{kind.partition('_')[0]}_" for kind in config.endings.values() if kind not in config.root}
    for name, tensor in held.items():
        ending = next((e for e in config.endings if f".{name}".endswith("." + e)), None)
        if ending is not None:
            modules.setdefault(name.removesuffix(ending).removesuffix("."), {})[config.endings[ending]] = tensor
        elif any(mark in name for mark in marks):
            raise RewriteError(
                f"{path}: {name} is no tensor of {config.peft_type}",
                evidence=[f"known endings: {', '.join(config.endings)}"],
                fix="Save the adapter again with PEFT.",
            )
        else:
            base[name.replace(".base_layer.", ".")] = tensor
    if config.endings and not modules:
        raise RewriteError(
            f"{path} holds nothing of {config.peft_type} at all", evidence=list(held)[:6], fix="Check what saved it."
        )
    return modules, base


def _check_pair(path: Path, module: str, tensors: Mapping[str, torch.Tensor]) -> None:
    pairs = [pair for pair in PAIRS.items() if set(pair) & set(tensors)]
    if len(pairs) != 1 or not set(pairs[0]) <= set(tensors):
        wanted = pairs[0] if pairs else ("lora_A", "lora_B")
        missing = [kind for kind in wanted if kind not in tensors]
        raise RewriteError(
            f"{path}: {module} has no {' and no '.join(missing) or 'single pair of A and B'}",
            evidence=[f"it has: {', '.join(tensors)}"],
            fix="The adapter is incomplete: save or download it again.",
        )
    a, b = (tensors[kind] for kind in pairs[0])
    if a.numel() == 0 or b.numel() == 0:
        raise RewriteError(f"{path}: {module} has an empty A or B", evidence=[f"A {_size(a)}, B {_size(b)}"])


def _check_extras(path: Path, config: LoraConfig, module: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fields and tensors must agree about DoRA's magnitude and the bias of B; an embedding has no such bias."""
    wanted = {"lora_magnitude_vector": ("use_dora", config.use_dora), "lora_B_bias": ("lora_bias", config.lora_bias)}
    for kind, (field, expected) in wanted.items():
        if expected != (kind in tensors) and not (kind == "lora_B_bias" and "lora_embedding_A" in tensors):
            raise RewriteError(
                f"{path}: {module} has {'a' if kind in tensors else 'no'} {kind}",
                evidence=[f"{CONFIG} says {field}: {str(expected).lower()}"],
                fix="Use the configuration that belongs to these weights.",
            )


def _check_ranks(directory: Path, config: LoraConfig, lora: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    wrong = []
    for path, tensors in lora.items():
        kind = next(kind for kind in PAIRS if kind in tensors)
        a, b = tensors[kind], tensors[PAIRS[kind]]
        rank = config.rank_of(path)
        if a.shape[0] != rank or (b.ndim == 2 and b.shape[1] != rank):
            turned = a.ndim == 2 and b.ndim == 2 and a.shape[1] == rank and b.shape[0] == rank
            hint = " (stored transposed)" if turned else ""
            wrong.append(f"{path}: A {_size(a)}, B {_size(b)}, configured rank {rank}{hint}")
    if wrong:
        more = [f"and {len(wrong) - 8} more modules"] if len(wrong) > 8 else []
        raise RewriteError(
            f"{directory}: tensors of {len(wrong)} of {len(lora)} modules do not have the configured rank",
            evidence=[*wrong[:8], *more],
            fix="Correct r and rank_pattern in adapter_config.json, or use the weights that belong to it.",
        )


def _size(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))
