"""FishMask: the few numbers of a model that matter most to its loss, by their Fisher information."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.sparse import largest, matching, own_parameters
from rewriter.errors import LawError, RewriteError, UsageError, closest
from rewriter.formats import safetensors
from rewriter.formats.files import open_regular
from rewriter.program import Program

BLOCK_BYTES = 1 << 20
Loss = Callable[[Any, Any], Tensor]


def fisher(
    program: Program, batches: Iterable[Any], loss: Loss, *, paths: tuple[str, ...] = ("*",)
) -> dict[str, Tensor]:
    """The empirical Fisher information of every parameter of the model, for `Select(method="fish_mask")`.

        F = Σ over samples of (∂ loss / ∂ W)²

    Shapes: those of the parameters. A batch is a mapping of keyword arguments, a tuple of positional ones, or one
    tensor; `loss(outputs, batch)` gives one number per sample [b], or a single one when the batch is one sample. The
    program runs in eval mode; `paths` are globs over parameter names. Save the result with
    `safetensors.torch.save_file(scores, path)`.

    Raises `UsageError` for a loss that cannot be used and when there is no batch, `LawError` for scores that are not
    finite.
    Source: Sung et al. 2021, arXiv 2111.09839, eq. 4.
    """
    module = program.module().eval()
    have = dict(module.named_parameters(remove_duplicate=False))
    tensors = {name: have[name].requires_grad_() for name in matching(program, paths)}
    scores = {
        name: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for name, t in tensors.items()
    }
    for number, batch in enumerate(batches):
        losses = _losses(module, batch, loss, number)
        for index, each in enumerate(losses):
            kept = index + 1 < len(losses)
            gradients = torch.autograd.grad(each, list(tensors.values()), retain_graph=kept, allow_unused=True)
            for score, gradient in zip(scores.values(), gradients, strict=True):
                if gradient is not None:
                    score += gradient.to(score.dtype).square()
    if not any(score.any() for score in scores.values()):
        raise UsageError(
            "no parameter has any Fisher information", fix="Give batches, and a loss that depends on them."
        )
    for name, score in scores.items():
        _check_finite(name, score)
    return scores


def _losses(module: torch.nn.Module, batch: Any, loss: Loss, number: int) -> list[Tensor]:
    if isinstance(batch, Mapping):
        outputs = module(**batch)
    else:
        outputs = module(*batch) if isinstance(batch, (tuple, list)) else module(batch)
    value: Any = loss(outputs, batch)  # what a user's function gives is not yet known
    if not isinstance(value, Tensor) or value.ndim > 1 or not value.requires_grad:
        shape = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(
            f"the loss of batch {number} is {shape}",
            fix="It is one number per sample [b], or a single number, and depends on the outputs.",
        )
    return list(value.reshape(-1).unbind())


def digest(path: Path) -> str:
    """The SHA-256 of a file of scores."""
    total = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()


def chosen(program: Program, path: Path, sha256: str, density: float, globs: tuple[str, ...]) -> dict[str, Tensor]:
    """Parameter -> the flat indices of its numbers among the `density` share with the largest scores in the file.

    Raises `RewriteError` when the file is not the one that was meant or does not fit the program.
    """
    scores = safetensors.load(path)
    found = digest(path)
    if found != sha256:
        raise RewriteError(
            f"{path} is not the file of scores that was meant",
            evidence=[f"meant: sha256 {sha256}", f"found: sha256 {found}"],
            fix="Give the file as it was, or leave the sha256 out.",
        )
    known = own_parameters(program)
    for name, score in scores.items():
        _check_score(program, path, known, name, score)
    wanted = set(matching(program, globs)) if globs else set(known)
    scores = {name: scores[name] for name in known if name in scores and name in wanted}
    if not scores:
        raise UsageError(f"{path} holds no score of a chosen parameter", fix="Compute scores for these paths.")
    total = sum(score.numel() for score in scores.values())
    return largest(scores, max(1, round(density * total)))


def _check_score(program: Program, path: Path, known: tuple[str, ...], name: str, score: Tensor) -> None:
    if name not in known:
        raise RewriteError(
            f"{path} holds scores of {name}, which is no parameter that the model reads",
            evidence=[f"closest: {', '.join(closest(name, known))}"],
            fix="Compute the scores with this program.",
        )
    shape = program.tensor(name).shape
    if score.shape != shape or not score.is_floating_point():
        raise RewriteError(
            f"{path}: the scores of {name} do not fit",
            evidence=[f"scores: {score.dtype} {list(score.shape)}", f"parameter: {list(shape)}"],
            fix="Compute the scores with this program.",
        )
    _check_finite(name, score)
    if bool((score < 0).any()):
        raise RewriteError(f"{path}: {name} has negative scores", fix="Scores are sums of squares: compute them again.")


def _check_finite(name: str, score: Tensor) -> None:
    bad = int((~torch.isfinite(score)).sum())
    if bad:
        raise LawError(
            f"the Fisher scores of {name} hold {bad} NaN or infinite values",
            fix="Look at the loss and the batches; in half precision, compute the scores in fp32.",
        )
