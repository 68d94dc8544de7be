"""Checkpoints of `microsoft/LoRA` (loralib): `lora_A` and `lora_B` in a state dict, with or without what they adapt."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from rewriter.errors import LawError, RewriteError
from rewriter.formats import pickle, safetensors
from rewriter.formats.files import open_regular
from rewriter.formats.peft import PeftFiles
from rewriter.formats.peft_config import LoraConfig
from rewriter.formats.sniff import Kind, sniff

PAIR = ("lora_A", "lora_B")
_AGAIN = "Save it again with `loralib.lora_state_dict(model)`."


def read(path: Path, *, allow_nonfinite: bool = False) -> PeftFiles:
    """Read and check a checkpoint by itself, in the terms of an adapter directory; nothing in it is executed.

    `modules` is module path -> `lora_A`, `lora_B` as they are stored, `base` all other tensors; wrappers are gone from
    the names. Raises `UnsafeError` for a file that is more than data; `RewriteError` when it is damaged, when a module
    lacks A or B, when they are empty, no matrices or no floating-point numbers; `LawError` for NaN or infinity unless
    `allow_nonfinite`.
    """
    held = safetensors.load(path) if sniff(path) is Kind.SAFETENSORS else pickle.load_state_dict(path)
    modules, base = _sort(path, _normalised(path, held))
    for module, tensors in modules.items():
        _check_pair(path, module, tensors)
    if not allow_nonfinite:
        _check_finite(path, held)
    return PeftFiles(path, LoraConfig(target_modules=list(modules)), modules, base, digest(path))


def digest(path: Path) -> str:
    """The SHA-256 over the bytes of a checkpoint."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _normalised(path: Path, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under names without what `torch.compile`, FSDP and data parallelism put into them."""
    plain = {key: re.sub(r"(^|\.)((_orig_mod|_fsdp_wrapped_module)\.)+", r"\1", key) for key in held}
    while all(name.startswith("module.") for name in plain.values()):
        plain = {key: name.removeprefix("module.") for key, name in plain.items()}
    result: dict[str, torch.Tensor] = {}
    for key, name in plain.items():
        if name in result and not torch.equal(result[name], held[key]):
            raise RewriteError(f"{path}: two different tensors are both {name}", evidence=[key], fix=_AGAIN)
        result[name] = held[key]
    return result


def _sort(
    path: Path, held: Mapping[str, torch.Tensor]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    modules: dict[str, dict[str, torch.Tensor]] = {}
    base: dict[str, torch.Tensor] = {}
    foreign = []
    for name, tensor in held.items():
        module, _, kind = name.rpartition(".")
        if kind in PAIR and module:
            modules.setdefault(module, {})[kind] = tensor
        elif any(part.startswith("lora_") for part in name.split(".")):
            foreign.append(name)
        else:
            base[name] = tensor
    if foreign:
        peft = any(".lora_A." in name or "lora_embedding_" in name for name in foreign)
        raise RewriteError(
            f"{path}: {len(foreign)} tensors of a LoRA are not named as loralib names them",
            evidence=[*foreign[:8], "loralib: MODULE.lora_A and MODULE.lora_B"],
            fix="These are PEFT's names: give its directory with --adapter." if peft else _AGAIN,
        )
    if not modules:
        raise RewriteError(f"{path} holds no lora_A and no lora_B", evidence=list(base)[:6], fix=_AGAIN)
    return modules, base


def _check_pair(path: Path, module: str, tensors: Mapping[str, torch.Tensor]) -> None:
    missing = [kind for kind in PAIR if kind not in tensors]
    if missing:
        raise RewriteError(f"{path}: {module} has no {missing[0]}", fix=f"The checkpoint is incomplete. {_AGAIN}")
    lines = [f"{kind}: {tensors[kind].dtype} {list(tensors[kind].shape)}".replace("torch.", "") for kind in PAIR]
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise RewriteError(f"{path}: A and B of {module} must be floating-point", evidence=lines, fix=_AGAIN)
    if not all(tensor.ndim == 2 and tensor.numel() for tensor in tensors.values()):
        raise RewriteError(f"{path}: A and B of {module} must be matrices with entries", evidence=lines, fix=_AGAIN)


def _check_finite(path: Path, held: Mapping[str, torch.Tensor]) -> None:
    bad = {name: int((~torch.isfinite(t)).sum()) for name, t in held.items() if t.is_floating_point()}
    lines = [f"{name}: {count} of {held[name].numel()} values" for name, count in bad.items() if count]
    if lines:
        raise LawError(
            f"{path} holds NaN or infinity", evidence=lines[:8], fix="Train again; or allow it: --allow-nonfinite."
        )
