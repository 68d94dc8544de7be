"""torch checkpoints: tensors by name are read without executing anything; whole modules only when trusted."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rewriter.errors import RewriteError, UnsafeError
from rewriter.formats.archive import check_zip
from rewriter.formats.files import unchanged
from rewriter.formats.sniff import ADVICE, Kind, require, sniff, unsafe_globals

_WRAPPERS = ("model", "state_dict", "model_state_dict")
_TRUST = "If you trust its author, add --trust-pickle where you convert it once to a .pt2 program or safetensors."


def load_state_dict(path: Path, *, verify: bool = True) -> dict[str, torch.Tensor]:
    """The tensors by name in a file of `torch.save`, mapped from disk where the format allows.

    Accepts a state dict, also under the one key `model` or `state_dict`. Raises `UnsafeError` when it holds more than
    data, `RewriteError` when it is damaged or holds anything but tensors.
    """
    kind = sniff(path)
    if kind is Kind.PICKLED_MODULE:
        raise _unsafe(path, unsafe_globals(path))
    require(path, Kind.STATE_DICT, Kind.LEGACY_PICKLE)
    with unchanged(path):
        if kind is Kind.STATE_DICT:
            check_zip(path, verify=verify)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=kind is Kind.STATE_DICT)
        except pickle.UnpicklingError as error:
            named = re.findall(r"GLOBAL (\S+)", str(error))
            raise (_unsafe(path, named) if named else _damaged(path, error)) from None
        except Exception as error:  # noqa: BLE001 - a damaged pickle makes torch raise any kind of error
            raise _damaged(path, error) from None
    return _tensors(path, loaded)


def load_pickled_module(path: Path, *, trust_pickle: bool, verify: bool = True) -> torch.nn.Module:
    """The module in a file of `torch.save(module)`, on the CPU. Unpickling executes code from the file.

    Raises `UnsafeError`, listing the classes and executing nothing, unless `trust_pickle`.
    """
    kind = require(path, Kind.PICKLED_MODULE, Kind.STATE_DICT, Kind.LEGACY_PICKLE)
    if not trust_pickle:
        raise _unsafe(path, unsafe_globals(path) if kind is Kind.PICKLED_MODULE else [])
    with unchanged(path):
        if kind is not Kind.LEGACY_PICKLE:
            check_zip(path, verify=verify)
        try:
            module = torch.load(path, map_location="cpu", weights_only=False)
        except (ImportError, AttributeError) as error:
            fix = "Install or import the package that defines the class, in the version that saved it."
            raise RewriteError(f"{path} needs a class that is missing", evidence=[str(error)], fix=fix) from error
        except Exception as error:  # unpickling runs the file's own code
            raise _damaged(path, error) from error
    if not isinstance(module, torch.nn.Module):
        what = f"{path} holds a {type(module).__name__}, not a module"
        raise RewriteError(what, fix=ADVICE[Kind.STATE_DICT] if isinstance(module, dict) else "Save the module itself.")
    return module


def _tensors(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
    if isinstance(loaded, Mapping):
        inner = [loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)]
        loaded = inner[0] if len(inner) == 1 else loaded
    fix = "Save `model.state_dict()` alone."
    if not isinstance(loaded, Mapping):
        raise RewriteError(f"{path} holds a {type(loaded).__name__}, tensors by name were expected", fix=fix)
    others = [
        f"{name!r}: {type(value).__name__}"
        for name, value in loaded.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if others:
        shown = [*others[:8], *([f"and {len(others) - 8} more"] if len(others) > 8 else [])]
        raise RewriteError(f"{path} holds entries that are not tensors", evidence=shown, fix=fix)
    if not loaded:
        raise RewriteError(f"{path} contains no tensors", fix=fix)
    return dict(loaded)


def _unsafe(path: Path, named: list[str]) -> UnsafeError:
    evidence = [f"it calls {name}" for name in named[:12]]
    if len(named) > 12:
        evidence.append(f"and {len(named) - 12} more")
    return UnsafeError(f"{path} is a pickle that executes code when it is read", evidence=evidence, fix=_TRUST)


def _damaged(path: Path, error: Exception) -> RewriteError:
    line = next(iter(str(error).strip().splitlines()), "")
    return RewriteError(
        f"{path} cannot be read as a torch checkpoint",
        evidence=[f"{type(error).__name__}: {line[:300]}"],
        fix="Download it again.",
    )
