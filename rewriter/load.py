"""Anything a user calls a model -> Program: told apart by content, never by name."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rewriter.errors import RewriteError, UsageError, closest
from rewriter.formats import huggingface, pickle, pt2, safetensors
from rewriter.formats.huggingface import Inputs, split_inputs
from rewriter.formats.huggingface_shapes import load_shapes
from rewriter.formats.sniff import ADVICE, Kind, require
from rewriter.program import Program
from rewriter.trace import trace

FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
WEIGHTS = (Kind.SAFETENSORS, Kind.STATE_DICT, Kind.LEGACY_PICKLE)


@dataclass(frozen=True, slots=True)
class Untraced:
    """A module with what it is called with in its trace."""

    module: torch.nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def load(
    source: str | Path,
    *,
    model: str | Path | None = None,
    architecture: str | None = None,
    trust_pickle: bool = False,
    verify: bool = True,
    inputs: Inputs | None = None,
    dtype: torch.dtype | None = None,
    weights: bool = True,
) -> Program:
    """Load a program, or trace a model, whatever it is stored as.

    `source` is a `.pt2` program under any name, a Hugging Face directory, `package.module:factory` (called; returns a
    module, `(module, args)` or `(module, args, kwargs)`), a state dict (safetensors or torch) together with `model`
    (a factory or Hugging Face directory whose module takes it strictly), or a pickled module with `trust_pickle`.
    `inputs` are the example inputs of the trace, positional as a tuple or by name; `architecture` names the class of a
    Hugging Face directory whose configuration does not; `verify=False` skips checksums. With
    `weights=False` a Hugging Face directory, which then needs config.json alone, gives tensors that are shapes only.

    Raises `UnsafeError` for what could execute code, `UsageError` for options that do not go together, `RewriteError`
    for everything else that cannot be used, with the name of what it is.
    """
    if not isinstance(source, (str, Path)):
        raise UsageError(
            f"load needs a path or `package.module:factory`, got {type(source).__name__}",
            fix="Give a module in memory to `rewriter.trace`, with its example inputs.",
        )
    if _is_factory(source):
        _refuse(str(source), "a factory", model=model, architecture=architecture)
        return _trace(_call_factory(str(source)), inputs, dtype)
    path = Path(source)
    kind = require(path, Kind.PROGRAM, Kind.HUGGINGFACE, *WEIGHTS, Kind.PICKLED_MODULE)
    pickled = kind is Kind.PICKLED_MODULE or (kind is Kind.LEGACY_PICKLE and trust_pickle and model is None)
    if kind is Kind.PROGRAM:
        _refuse(str(path), kind, model=model, architecture=architecture, inputs=inputs, dtype=dtype)
        return pt2.load(path, verify=verify, trust_pickle=trust_pickle)
    if kind is Kind.HUGGINGFACE:
        _refuse(str(path), kind, model=model)
        if not weights:
            _refuse(f"{path} without weights", kind, inputs=inputs)
            return load_shapes(path, architecture=architecture, dtype=dtype)
        return huggingface.load(path, architecture=architecture, dtype=dtype, inputs=inputs)
    if pickled and model is None:
        module = pickle.load_pickled_module(path, trust_pickle=trust_pickle, verify=verify)
        return _trace(Untraced(module), inputs, dtype)
    if model is None:
        raise RewriteError(f"{path} is {kind}", evidence=["a model to trace was expected"], fix=ADVICE[kind])
    tensors = safetensors.load(path) if kind is Kind.SAFETENSORS else pickle.load_state_dict(path, verify=verify)
    return _trace(_filled(path, tensors, model, architecture), inputs, dtype)


def _is_factory(source: str | Path) -> bool:
    return isinstance(source, str) and FACTORY.fullmatch(source) is not None and not Path(source).exists()


def _refuse(source: str, kind: str, **options: object) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{source} is {kind}: {', '.join(given)} cannot be used with it", fix="Leave it out.")


def _trace(what: Untraced, inputs: Inputs | None, dtype: torch.dtype | None) -> Program:
    module, args, kwargs = what.module.eval(), what.args, what.kwargs
    if inputs is not None:
        args, kwargs = split_inputs(inputs)
    if dtype is not None:
        module = module.to(dtype)
        args, kwargs = torch.utils._pytree.tree_map(lambda leaf: _to(leaf, dtype), (args, dict(kwargs)))
    if isinstance(module, PreTrainedModel):
        return huggingface.trace_model(module, args, kwargs)
    if not args and not kwargs:
        raise RewriteError(
            f"{type(module).__name__} can only be traced with example inputs",
            fix="Give inputs, or name a factory that returns (module, args) or (module, args, kwargs).",
        )
    return trace(module, args, kwargs)


def _to(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


# -- weights of a model that is given apart -----------------------------------------------------------------------


def _filled(path: Path, tensors: dict[str, torch.Tensor], model: str | Path, architecture: str | None) -> Untraced:
    """The module that `model` names, holding `tensors`."""
    if not _is_factory(model):
        require(Path(model), Kind.HUGGINGFACE)
        loaded = huggingface.load_model(Path(model), architecture=architecture, tensors=tensors)
        return Untraced(loaded)
    made = _call_factory(str(model))
    _load_strictly(path, made.module, tensors)
    return made


def _load_strictly(path: Path, module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    own = module.state_dict(keep_vars=True)
    given = {id(own[name]) for name in tensors if name in own}
    missing = [name for name, tensor in own.items() if name not in tensors and id(tensor) not in given]
    lines = [f"missing: {name}" for name in missing]
    lines += [f"unexpected: {name}" for name in tensors if name not in own]
    lines += [
        f"{name}: {list(tensor.shape)} given, {list(own[name].shape)} in the model"
        for name, tensor in tensors.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if lines:
        shown = [*lines[:16], *([f"and {len(lines) - 16} more"] if len(lines) > 16 else [])]
        what = f"the tensors in {path} do not fit {type(module).__name__}"
        raise RewriteError(what, evidence=shown, fix="Give the model that these weights belong to.")
    on_meta = any(tensor.device.type == "meta" for tensor in own.values())
    module.load_state_dict(tensors, strict=False, assign=on_meta)


# -- factories ----------------------------------------------------------------------------------------------------


def _call_factory(name: str) -> Untraced:
    factory = _find_factory(name)
    with _explained(f"{name}() failed"):
        made = factory()
    match made:
        case torch.nn.Module():
            return Untraced(made)
        case (torch.nn.Module() as module, tuple() | list() as args):
            return Untraced(module, tuple(args))
        case (torch.nn.Module() as module, tuple() | list() as args, Mapping() as kwargs):
            return Untraced(module, tuple(args), dict(kwargs))
    raise _wrong_result(name, made)


def _find_factory(name: str) -> Callable[[], Any]:
    module_name, _, attributes = name.partition(":")
    with _here(), _explained(f"importing {module_name} failed"):
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if not (error.name and f"{module_name}.".startswith(f"{error.name}.")):
                raise
            raise UsageError(
                f"there is no module {error.name!r} for {name!r}",
                evidence=["looked in the working directory and in what is installed"],
                fix="Name it as package.module:factory.",
            ) from None
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            known = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            evidence = [f"similar: {near}" for near in closest(attribute, known)]
            raise UsageError(f"{module_name} has no {attributes!r}", evidence=evidence, fix="Check the name.")
        found = getattr(found, attribute)
    if not callable(found):
        raise UsageError(f"{name} cannot be called: {type(found).__name__}", fix="Name a function or a class.")
    factory: Callable[[], Any] = found
    return factory


def _wrong_result(name: str, made: Any) -> RewriteError:
    shown = f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else type(made).__name__
    return RewriteError(
        f"{name}() returned {shown}",
        evidence=["expected a module, (module, args) or (module, args, kwargs)"],
        fix="Return one of these; args is a tuple, kwargs a mapping.",
    )


@contextmanager
def _here() -> Iterator[None]:
    """Modules of the working directory can be imported, as with `python -m`."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what the user's code raises into an error that names the line that raised it."""
    try:
        yield
    except RewriteError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        own = [frame for frame in frames if "site-packages" not in frame.filename and frame.line] or frames[-1:]
        place = [f"{frame.filename}:{frame.lineno}: {frame.line}" for frame in own[-1:]]
        raise RewriteError(
            what, evidence=[*place, f"{type(error).__name__}: {error}"], fix="Correct the code there."
        ) from error
