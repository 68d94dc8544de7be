"""Checks of programs: structure by name, and numbers against a pass's law."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rewriter.errors import LawError, RewriteError
from rewriter.program import PARAMETER_KINDS, Program

if TYPE_CHECKING:
    from rewriter.transform import Law

# Largest change relative to the largest output that rounding may cause, by the output's type.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class Change:
    """The largest change of any output element, absolute and relative to the largest output element."""

    absolute: float
    relative: float
    equal: bool
    allowed: float | None  # relative; None when the law allows any change

    def to_json(self) -> dict[str, Any]:
        return {
            "absolute": self.absolute,
            "relative": self.relative,
            "equal": self.equal,
            "allowed_relative": self.allowed,
        }


def structure(program: Program) -> None:
    """Check that graph, signature and tensors agree; raises `RewriteError` naming what does not."""
    exported = program.exported
    try:
        program.graph.lint()
        exported.validate()
    except Exception as error:
        raise RewriteError("the program is not valid", evidence=str(error).splitlines()[:6]) from error
    placeholders = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    specs = exported.graph_signature.input_specs
    names = [spec.arg.name for spec in specs]
    if placeholders != names:
        wrong = next(((a, b) for a, b in zip(placeholders, names, strict=False) if a != b), ("", ""))
        raise RewriteError(f"placeholder {wrong[0]!r} stands where the signature has {wrong[1]!r}")
    by_name = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    tensors = program.tensors
    for spec in specs:
        if spec.kind in PARAMETER_KINDS and spec.target is not None:
            if spec.target not in tensors:
                raise RewriteError(f"the program has no tensor for its parameter {spec.target!r}")
            value, typed = tensors[spec.target], by_name[spec.arg.name].meta["val"]
            if value.shape != typed.shape or value.dtype != typed.dtype:
                raise RewriteError(
                    f"{spec.target} is {value.dtype} {tuple(value.shape)}, "
                    f"the graph expects {typed.dtype} {tuple(typed.shape)}"
                )


def finite(program: Program) -> list[tuple[str, int]]:
    """The tensors that hold NaN or infinity, with how many."""
    found = []
    for name, tensor in program.tensors.items():
        if tensor.is_floating_point() and tensor.device.type != "meta":
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                found.append((name, bad))
    return found


def tolerance(outputs: list[torch.Tensor]) -> float:
    """The relative change that rounding may cause in these outputs: that of the coarsest type among them."""
    return max((TOLERANCE.get(t.dtype, 0.0) for t in outputs), default=0.0)


def compare(
    before: Program, after: Program, *, seed: int = 0, free: bool = False
) -> tuple[float, float, bool, list[torch.Tensor]]:
    """Run both programs on the same random inputs: (absolute change, relative change, every bit equal, outputs).

    An output that the second one adds after those of the first is not compared. With `free`, neither is one that
    changed its shape or is not there any more.
    """
    from rewriter.formats.random_inputs import random_inputs

    args, kwargs = random_inputs(after, seed=seed)  # a pass may have left less room for positions
    one, two = outputs(before(*args, **kwargs)), outputs(after(*args, **kwargs))
    if free:
        pairs = [(a, b) for a, b in zip(one, two, strict=False) if (a.shape, a.dtype) == (b.shape, b.dtype)]
        one, two = [a for a, _ in pairs], [b for _, b in pairs]
    two = two[: len(one)]
    if [(t.shape, t.dtype) for t in one] != [(t.shape, t.dtype) for t in two]:
        raise LawError(
            "the outputs changed their shapes or types",
            evidence=[f"{_type(a)} -> {_type(b)}" for a, b in zip(one, two, strict=False) if _type(a) != _type(b)],
        )
    distances = [_distance(a, b) for a, b in zip(one, two, strict=True)]
    absolute = _largest(distances)
    relative = _largest([distance / (_size(a) or 1.0) for distance, a in zip(distances, one, strict=True)])
    return absolute, relative, all(bool(_same(a, b).all()) for a, b in zip(one, two, strict=True)), one


def law(before: Program, after: Program, law: Law, name: str) -> Change | None:
    """Hold a pass to its law; None when the program has no weights to run with.

    Raises `LawError` when outputs moved further than the law allows, or stopped being finite.
    """
    if any(tensor.device.type == "meta" for tensor in after.tensors.values()):
        return None
    absolute, relative, equal, reference = compare(before, after, free=law.kind == "free")
    allowed = {"exact": 0.0, "rounding": tolerance(reference), "free": None}[law.kind]
    change = Change(absolute, relative, equal, allowed)
    broken = not equal if law.kind == "exact" else allowed is not None and not relative <= allowed
    if broken:
        raise LawError(
            f"{name} moved outputs by {relative:.3g} of their size, its law allows {allowed:.3g}",
            evidence=[f"law: {law}", f"largest absolute change: {absolute:.3g}"],
            fix="The result was not kept. Check the weights for non-finite or huge values, or report this pass.",
        )
    if not math.isfinite(absolute):
        raise LawError(f"{name} made outputs non-finite", fix="Look for NaN or infinity in the weights.")
    return change


def outputs(result: Any) -> list[torch.Tensor]:
    """The tensors of a model's result, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _largest(distances: list[float]) -> float:
    """The largest distance; NaN when any is, which Python's max would hide."""
    return next((distance for distance in distances if math.isnan(distance)), max(distances, default=0.0))


def _same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two outputs agree; a NaN that stays a NaN and an infinity that stays are no change."""
    return (a == b) | ((a != a) & (b != b))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    moved = ~_same(a, b)
    return float((_wide(a[moved]) - _wide(b[moved])).abs().max()) if bool(moved.any()) else 0.0


def _size(a: torch.Tensor) -> float:
    finite = _wide(a[torch.isfinite(a)])
    return float(finite.abs().max()) if finite.numel() else 0.0


def _wide(a: torch.Tensor) -> torch.Tensor:
    return a.to(torch.complex128 if a.is_complex() else torch.float64)


def _type(a: torch.Tensor) -> str:
    return f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}"
