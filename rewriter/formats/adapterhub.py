"""Directories of the `adapters` library (AdapterHub): `adapter_config.json` beside `pytorch_adapter.bin`."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rewriter.errors import LawError, RewriteError, RewriteWarning
from rewriter.formats import pickle, safetensors
from rewriter.formats.adapterhub_config import CONFIG, AdapterHubConfig, read_config
from rewriter.formats.atomic import write_directory
from rewriter.formats.files import open_regular
from rewriter.formats.sniff import Kind, require

WEIGHTS = "pytorch_adapter.bin"  # what `load_adapter` opens when nothing else is said
SAFE_WEIGHTS = "adapter.safetensors"
HEAD = "head_config.json"
# What the keys were called before the library's version 2.
_LEGACY_NAMES = (
    "attention_text_task_adapters",
    "attention_text_lang_adapters",
    "layer_text_task_adapters",
    "layer_text_lang_adapters",
)
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class AdapterHubFiles:
    """What an adapter directory holds.

    `modules` is path of the module that holds the adapter -> name inside the adapter -> tensor; `sha256` is over the
    bytes of the configuration and the weights.
    """

    directory: Path
    config: AdapterHubConfig
    modules: Mapping[str, Mapping[str, torch.Tensor]]
    sha256: str


def read(directory: Path, *, allow_nonfinite: bool = False) -> AdapterHubFiles:
    """Read and check an adapter directory by itself, without the model it belongs to.

    Raises `RewriteError` when a file is missing or damaged, for another method than a bottleneck, and for tensors of
    another adapter than the configuration names; `LawError` for NaN or infinity unless `allow_nonfinite`.
    """
    weights = _weights(directory)
    config = read_config(directory)
    held = _load(weights[0])
    if len(weights) > 1:
        _check_equal(weights, held, _load(weights[1]))
    _check_numbers(weights[0], held, allow_nonfinite)
    if (directory / HEAD).exists():
        warnings.warn(f"{directory}: the prediction head beside the adapter is not read", RewriteWarning, stacklevel=3)
    return AdapterHubFiles(directory, config, _sorted(weights[0], config, held), digest(directory))


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter directory under the names they are stored by, as they are."""
    return _load(_weights(directory)[0])


def digest(directory: Path) -> str:
    """The SHA-256 over the bytes of an adapter's configuration and weights."""
    total = hashlib.sha256()
    for path in (directory / CONFIG, *_weights(directory)):
        with open_regular(path) as file:
            while block := file.read(_BLOCK_BYTES):
                total.update(block)
    return total.hexdigest()


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, overwrite: bool) -> Path:
    """Write a directory as the library does and compare it, read back, with what was meant.

    `tensors` are under the keys of the file. Raises `RewriteError` when the place cannot be written.
    """
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with write_directory(directory, overwrite=overwrite) as partial:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
        (partial / CONFIG).write_text(text, encoding="utf-8")
        torch.save(kept, partial / WEIGHTS)
        found = pickle.load_state_dict(partial / WEIGHTS)
        wrong = _different(kept, found)
        if wrong:
            raise RewriteError(f"{directory} read back differs", evidence=wrong[:8], fix="Check the disk.")
    return directory


def _weights(directory: Path) -> list[Path]:
    """The weights files of one adapter, at least one."""
    require(directory, Kind.ADAPTERHUB)
    names = sorted(entry.name for entry in directory.iterdir())
    evidence = [f"it holds: {', '.join(names[:12])}"]
    if CONFIG not in names:
        what, fix = "holds a composition of adapters, no single one", f"Name a directory with {CONFIG} in it."
        raise RewriteError(f"{directory} {what}", evidence=evidence, fix=fix)
    found = [directory / name for name in (SAFE_WEIGHTS, WEIGHTS) if name in names]
    if not found:
        what = f"{directory} has no {WEIGHTS} and no {SAFE_WEIGHTS}"
        raise RewriteError(what, evidence=evidence, fix="Download it again.")
    return found


def _load(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.load(path) if path.name == SAFE_WEIGHTS else pickle.load_state_dict(path)


def _different(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        bits = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)

    return sorted({*one} ^ {*other}) or [name for name in one if not same(one[name], other[name])]


def _check_equal(paths: list[Path], one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    wrong = _different(one, other)
    if wrong:
        raise RewriteError(
            f"{paths[0].parent} holds two different adapters, in {paths[0].name} and {paths[1].name}",
            evidence=wrong[:8],
            fix="Remove the one that is not meant.",
        )


def _check_numbers(path: Path, held: Mapping[str, torch.Tensor], allow_nonfinite: bool) -> None:
    integers = [f"{name}: {t.dtype}".replace("torch.", "") for name, t in held.items() if not t.is_floating_point()]
    if integers:
        raise RewriteError(
            f"{path}: the tensors of an adapter must be floating-point",
            evidence=integers[:8],
            fix="Save it without quantisation.",
        )
    bad = {name: int((~torch.isfinite(tensor.float())).sum()) for name, tensor in held.items()}
    lines = [f"{name}: {count} of {held[name].numel()} values" for name, count in bad.items() if count]
    if lines and not allow_nonfinite:
        raise LawError(
            f"{path} holds NaN or infinity", evidence=lines[:8], fix="Train again; or allow it: --allow-nonfinite."
        )


def _sorted(
    path: Path, config: AdapterHubConfig, held: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    modules: dict[str, dict[str, torch.Tensor]] = {}
    foreign: list[str] = []
    for key, tensor in held.items():
        name = key
        for old in _LEGACY_NAMES:
            name = name.replace(f".{old}.", ".adapters.")
        where, mark, inside = name.partition(f".adapters.{config.name}.")
        if not mark:
            foreign.append(key)
        elif inside in modules.setdefault(where, {}):
            raise RewriteError(f"{path}: two tensors are both {name}", evidence=[key], fix="Save it again.")
        else:
            modules[where][inside] = tensor
    if foreign:
        raise RewriteError(
            f"{path}: {len(foreign)} of {len(held)} tensors are not of a bottleneck adapter {config.name!r}",
            evidence=[*foreign[:8], *([f"and {len(foreign) - 8} more"] if len(foreign) > 8 else [])],
            fix="Use the adapter_config.json that belongs to these weights.",
        )
    return modules
