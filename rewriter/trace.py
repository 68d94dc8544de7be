"""Module -> Program, once, by `torch.export`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    with at least two rows. A transformers model needs no example: its configuration says what goes in. Dropout stays
    in the graph and follows `module.train()` later.

    Raises `RewriteError` when the model cannot be traced, with the reason torch gives.
    """
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"trace needs an nn.Module, got {type(module).__name__}")
    kwargs = dict(kwargs or {})
    if not args and not kwargs and _is_transformers(module):
        from rewriter.formats.huggingface import trace_model

        return trace_model(module)  # type: ignore[arg-type]
    meta = [name for name, p in module.named_parameters() if type(p).__name__ == "DTensor"]
    if meta:
        raise RewriteError(f"{meta[0]} is a DTensor shard", fix="Materialise the model on one device first.")
    modes = {child: child.training for child in module.modules()}
    try:
        with torch.no_grad(), _named_inputs(module, args, kwargs):
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


def _is_transformers(module: torch.nn.Module) -> bool:
    """Whether the module is a transformers model, without importing transformers for others."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(module, library.PreTrainedModel)


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
