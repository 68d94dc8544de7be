"""Module -> Program, once, by `torch.export`."""

from __future__ import annotations

import inspect
import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any, Literal

import torch
from torch.export import Dim, ShapesCollection

from rewriter.errors import RewriteError, UsageError
from rewriter.program import Program


def trace(
    module: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Literal["auto"] | Any = "auto",
    *,
    metadata: Mapping[str, Any] | None = None,
) -> Program:
    """Trace a module into a `Program`, in evaluation mode and without gradients.

    `dynamic_shapes="auto"` lets every tensor dimension vary that the model allows to vary; anything else is given to
    `torch.export.export` as it is. A dimension of size 0 or 1 in the example is taken as constant, so give examples
    with at least two rows. A transformers model needs no example: its configuration says what goes in; its cache is
    off unless the inputs ask for one. Dropout stays in the graph and follows `module.train()` later.

    Raises `RewriteError` when the model cannot be traced, with the reason torch gives.
    """
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"trace needs an nn.Module, got {type(module).__name__}")
    library = sys.modules.get("transformers")  # imported by whoever built such a model, and by nobody else
    if library is None or not any(isinstance(child, library.PreTrainedModel) for child in module.modules()):
        return trace_plainly(module, args, kwargs, dynamic_shapes, metadata=metadata)
    from rewriter.formats.huggingface import trace_model, without_cache

    if isinstance(module, library.PreTrainedModel):
        return trace_model(module, args, kwargs, dynamic_shapes, metadata=metadata)
    with without_cache(module, kwargs or {}):
        return trace_plainly(module, args, kwargs, dynamic_shapes, metadata=metadata)


def trace_plainly(
    module: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Literal["auto"] | Any = "auto",
    *,
    metadata: Mapping[str, Any] | None = None,
) -> Program:
    """Trace a module as it is, without what `trace` does for models of transformers; otherwise as `trace`."""
    kwargs = dict(kwargs or {})
    meta = [name for name, p in module.named_parameters() if type(p).__name__ == "DTensor"]
    if meta:
        raise RewriteError(f"{meta[0]} is a DTensor shard", fix="Materialise the model on one device first.")
    modes = {child: child.training for child in module.modules()}
    try:
        with torch.no_grad(), _without_dumps(), _named_inputs(module, args, kwargs):
            shapes = _automatic(module, args, kwargs) if isinstance(dynamic_shapes, str) else dynamic_shapes
            exported = torch.export.export(module.eval(), args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        raise RewriteError(
            f"{type(module).__name__} cannot be traced by torch.export",
            evidence=lines[:8] or [type(error).__name__],
            fix="Check that the inputs run through the model, and that its control flow does not depend on data.",
        ) from error
    finally:
        for child, mode in modes.items():
            child.training = mode
    return Program.adopt(exported, metadata)


@contextmanager
def _without_dumps() -> Iterator[None]:
    """Keep the logs and the graphs that torch writes to stderr off it; the error says what went wrong.

    What else the block wrote to stderr is shown when it succeeds. Whoever asks torch for logs gets them all.
    """
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    held = io.StringIO()
    known = list(logging.Logger.manager.loggerDict)
    loggers = [logging.getLogger(name) for name in known if name.partition(".")[0] == "torch"]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with redirect_stderr(held):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    sys.stderr.write(held.getvalue())


def _automatic(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dim.AUTO for every dimension of every tensor input, laid out as the module's signature wants it."""
    shapes = ShapesCollection()
    for leaf in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor):
            shapes[leaf] = dict.fromkeys(range(leaf.ndim), Dim.AUTO)
    return shapes.dynamic_shapes(module, args, kwargs)


@contextmanager
def _named_inputs(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Give a forward that takes `**kwargs` (a wrapper's) the names that are really passed, as torch.export needs."""
    parameters = inspect.signature(module.forward).parameters.values()
    if args or not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        yield
        return
    original = module.forward

    def forward(**given: Any) -> Any:
        return original(**given)

    names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in kwargs]
    forward.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
