"""A program, or two beside each other, on random inputs of several sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rewriter import verify
from rewriter.errors import RewriteError, UsageError
from rewriter.formats.random_inputs import different_sizes, example_sizes, random_inputs
from rewriter.program import Program

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: the shapes of the inputs by name, and the differences of the outputs where there are two programs.

    `absolute` is max |a - b|, `relative` the same over the largest number of the output of the first program.
    """

    shapes: Mapping[str, tuple[int, ...]]
    finite: bool
    absolute: float | None = None
    relative: float | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """What a check saw; `problems` is empty when everything held."""

    nonfinite: Mapping[str, int]
    trials: tuple[Trial, ...]
    tolerance: float | None

    @property
    def problems(self) -> list[str]:
        found = [f"{name} holds {count:,} NaN or infinite values" for name, count in self.nonfinite.items()]
        for trial in self.trials:
            shapes = ", ".join(f"{name} {list(shape)}" for name, shape in trial.shapes.items())
            if not trial.finite:
                found.append(f"outputs are not finite at {shapes}")
            elif trial.relative is not None and self.tolerance is not None and not trial.relative <= self.tolerance:
                found.append(f"outputs differ by {trial.relative:.3g} of their size at {shapes}")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "holds": not self.problems,
            "problems": self.problems,
            "nonfinite": dict(self.nonfinite),
            "tolerance": self.tolerance,
            "trials": [
                {
                    "shapes": {name: list(shape) for name, shape in trial.shapes.items()},
                    "finite": trial.finite,
                    "absolute": trial.absolute,
                    "relative": trial.relative,
                }
                for trial in self.trials
            ],
        }


def verified(
    program: Program, other: Program | None = None, *, tolerance: float | None = None, trials: int = 3, seed: int = 0
) -> Verified:
    """Check structure, finiteness and that a program runs in several sizes; with `other`, that both compute the same.

    `tolerance` is relative to the largest output and by default what rounding may cause in the outputs' type.
    Raises `RewriteError` when the structure is broken, or a program does not run or takes other inputs.
    """
    if trials < 1:
        raise UsageError(f"{trials} trials show nothing", fix="Give at least one.")
    for each in (program, other):
        if each is not None:
            verify.structure(each)
    nonfinite = dict(verify.finite(program)) | ({} if other is None else dict(verify.finite(other)))
    if other is not None:
        _refuse_other_inputs(program, other)
    runs = [_trial(program, other, trial, seed + trial) for trial in range(trials)]
    allowed = None if other is None else tolerance
    if other is not None and allowed is None:
        allowed = max(limit for _, limit in runs)
    return Verified(nonfinite, tuple(trial for trial, _ in runs), allowed)


def largest_difference(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> tuple[float, float]:
    """The largest difference of any output, absolute and relative to the largest finite number of that output.

    Equal infinities do not differ; where one of the two is NaN, so is the difference.
    """
    absolute = relative = 0.0
    for one, other in zip(expected, got, strict=True):
        if not one.numel():
            continue
        left, right = one.double(), other.double()
        difference = float(torch.where(left == right, 0.0, (left - right).abs()).max())
        size = float(torch.where(left.isfinite(), left.abs(), 0.0).max()) or 1.0
        if math.isnan(difference):
            return difference, difference
        absolute, relative = max(absolute, difference), max(relative, difference / size)
    return absolute, relative


def _refuse_other_inputs(one: Program, other: Program) -> None:
    names = [[node.name for node in each.inputs()] for each in (one, other)]
    if names[0] != names[1]:
        raise RewriteError(
            "the two programs take different inputs",
            evidence=[f"the first:  {', '.join(names[0])}", f"the second: {', '.join(names[1])}"],
            fix="Compare programs of one model.",
        )


def _trial(program: Program, other: Program | None, number: int, seed: int) -> tuple[Trial, float]:
    """One run in the sizes of the example (the first) or in others, and what rounding may cause there."""
    sizes = example_sizes(program) if number == 0 else different_sizes(program, number - 1)
    args, kwargs = random_inputs(program, sizes=sizes, seed=seed)
    leaves = pytree.tree_leaves((args, kwargs))
    shapes = {
        node.name: tuple(leaf.shape)
        for node, leaf in zip(program.inputs(), leaves, strict=True)
        if isinstance(leaf, torch.Tensor)
    }
    expected = _run(program, args, kwargs, shapes)
    if other is None:
        return Trial(shapes, _finite(expected)), 0.0
    got = _run(other, args, kwargs, shapes)
    if [t.shape for t in expected] != [t.shape for t in got]:
        raise RewriteError(
            "the two programs give outputs of different shapes",
            evidence=[f"{[list(t.shape) for t in each]}" for each in (expected, got)],
            fix="Compare programs of one model.",
        )
    absolute, relative = largest_difference(expected, got)
    return Trial(shapes, _finite([*expected, *got]), absolute, relative), verify.tolerance(expected)


def _run(program: Program, args: Any, kwargs: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[torch.Tensor]:
    if any(tensor.device.type == "meta" for tensor in program.tensors.values()):
        raise RewriteError("the program has no weights to run with", fix="Load it with its weights.")
    try:
        return verify.outputs(program(*args, **kwargs))
    except Exception as error:
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise RewriteError(
            f"the program does not run with {given}",
            evidence=[f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"],
            fix="Trace the model again with inputs of other sizes.",
        ) from error


def _finite(tensors: list[torch.Tensor]) -> bool:
    """Whether no output holds NaN; infinity is what some masks put into outputs on purpose."""
    return not any(bool(torch.isnan(tensor).any()) for tensor in tensors if tensor.is_floating_point())
