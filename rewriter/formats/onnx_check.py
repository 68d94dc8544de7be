"""An ONNX file against the program it was made of, in ONNX Runtime, on fresh random inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from rewriter.errors import LawError, RewriteError
from rewriter.formats.random_inputs import different_sizes, random_inputs
from rewriter.program import Program

PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True)
class Trial:
    """One comparison with the program on random inputs: their shapes by name, and the largest absolute difference."""

    shapes: Mapping[str, tuple[int, ...]]
    max_abs_error: float


def load_runtime() -> Any:
    """The module `onnxruntime`; `RewriteError` with the command that installs it where it is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RewriteError(
            "ONNX Runtime is not installed, and no ONNX file is called done before it ran there",
            fix="Install it: pip install 'rewriter[cpu]'",
        ) from error
    return onnxruntime


def compare(
    runtime: Any, file: Path, program: Program, trials: int, seed: int, *, disabled: Sequence[str] = ()
) -> tuple[Trial, ...]:
    """Run the file and the program on `trials` sets of random inputs, each in other sizes of the dynamic dimensions.

    `disabled` names optimizers of ONNX Runtime that the model must run without.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors arrive as exceptions
    try:
        session = runtime.InferenceSession(
            str(file), options, providers=[PROVIDER], disabled_optimizers=list(disabled) or None
        )
    except Exception as error:
        raise _not_run(error) from error
    return tuple(_trial(session, program, trial, seed + trial) for trial in range(trials))


def _trial(session: Any, program: Program, trial: int, seed: int) -> Trial:
    args, kwargs = random_inputs(program, sizes=different_sizes(program, trial), seed=seed)
    expected = [leaf for leaf in pytree.tree_leaves(program(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
    leaves = pytree.tree_leaves((args, kwargs))
    given = {
        node.name: torch.as_tensor(leaf)
        for node, leaf in zip(program.inputs(), leaves, strict=True)
        if isinstance(node.meta.get("val"), torch.Tensor | torch.SymInt)
    }
    feeds = {value.name: given[value.name].numpy() for value in session.get_inputs()}
    try:
        found = session.run(None, feeds)
    except Exception as error:
        raise _not_run(error) from error
    worst = max((_difference(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)
    return Trial({name: tuple(value.shape) for name, value in given.items()}, worst)


def _not_run(error: Exception) -> RewriteError:
    return RewriteError(
        f"ONNX Runtime ({PROVIDER}) cannot run the exported model",
        evidence=[str(error).strip().splitlines()[0][:300]],
        fix="Export a float32 program; where it is one, report this as a bug.",
    )


def _difference(expected: torch.Tensor, found: Any) -> float:
    """The largest absolute difference; equal infinities and NaN against NaN are none, any other NaN is infinite."""
    if tuple(expected.shape) != found.shape:
        return float("inf")
    left, right = expected.detach().to("cpu", torch.float64).numpy(), np.asarray(found, dtype=np.float64)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(left - right))
    return float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max(initial=0.0))


def judge(path: Path, errors: tuple[Trial, ...], tolerance: float) -> None:
    """Raise `LawError` with the shapes and differences of every trial when one is above the tolerance."""
    if all(trial.max_abs_error <= tolerance for trial in errors):
        return
    raise LawError(
        f"{path.name} is not written: in ONNX Runtime it differs from the program by more than {tolerance:g}",
        evidence=[
            ", ".join(f"{name}{list(shape)}" for name, shape in trial.shapes.items())
            + f": largest difference {trial.max_abs_error:.3g}"
            for trial in errors
        ],
        fix="Allow a larger tolerance if these differences are acceptable.",
    )
