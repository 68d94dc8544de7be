"""Plain `.pt2` programs for `torch.export.load`, on any device and in any floating-point type, without our history."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.export.passes import move_to_device_pass
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from rewriter.errors import LawError, RewriteError, UsageError
from rewriter.formats.atomic import write_file
from rewriter.formats.random_inputs import random_inputs
from rewriter.module import change_dtype
from rewriter.program import Program
from rewriter.trials import largest_difference
from rewriter.verify import outputs, tolerance

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class TorchReport:
    """What was written, and its largest output difference to the program, absolute and relative to the outputs."""

    path: Path
    size_bytes: int
    device: str
    dtype: str
    max_abs_error: float
    max_relative_error: float

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "device": self.device,
            "dtype": self.dtype,
            "max_abs_error": self.max_abs_error,
            "max_relative_error": self.max_relative_error,
        }


def export_torch(
    program: Program,
    path: Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    seed: int = 0,
) -> TorchReport:
    """Write a program for plain `torch.export.load`, and compare it, loaded again, with the program before it appears.

    The inputs of the written program are on `device` and in `dtype`, too. Raises `UsageError` for a device that is not
    there or a type that is not floating point, `LawError` when the outputs are not finite, or differ although neither
    the type nor the device was changed, `RewriteError` when the program cannot be expressed or written.
    """
    place = _device(device)
    if dtype is not None and not dtype.is_floating_point:
        raise UsageError(f"{dtype} is no floating-point type", fix="Give float32, bfloat16, float16 or float64.")
    clone = program.clone()
    source = None if dtype is None else _retype(clone, dtype)
    exported = clone.exported if place is None else move_to_device_pass(clone.exported, place)
    args, kwargs = random_inputs(program, seed=seed)
    expected = outputs(program(*args, **kwargs))
    given = pytree.tree_map(lambda leaf: _moved(leaf, place, source, dtype), (args, kwargs))
    with write_file(path, inputs=inputs, overwrite=overwrite) as partial:
        with partial.open("wb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tensors that are not the whole of their storage
            torch.export.save(exported, file)
        got = _run(partial, *given)
        absolute, relative = largest_difference(expected, [tensor.cpu() for tensor in got])
        is_same = place is None and dtype in (None, source)
        if not math.isfinite(absolute) or (is_same and not relative <= tolerance(expected)):
            raise LawError(
                f"{path} would not compute what the program computes",
                evidence=[f"largest difference {absolute:.3g}, {relative:.3g} of the largest output"],
                fix="Choose a type with a larger range, such as bfloat16." if dtype else "Report this as a bug.",
            )
        size_bytes = partial.stat().st_size
    floats = Counter(str(t.dtype) for t in clone.parameters().values() if t.is_floating_point())
    common = floats.most_common(1)[0][0] if floats else str(dtype or torch.get_default_dtype())
    return TorchReport(path, size_bytes, str(place or "cpu"), common.removeprefix("torch."), absolute, relative)


def _device(name: torch.device | str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"there is no device {str(name)!r}", evidence=[first], fix="Give one that torch has."
        ) from None
    return device


def _retype(clone: Program, dtype: torch.dtype) -> torch.dtype:
    """Change the type of a clone, of its example inputs and of what is known of its values; returns the old type."""
    source = change_dtype(clone, dtype)
    inputs = [node for node in clone.graph.nodes if node.op == "placeholder"]
    known = [node.meta["val"] for node in inputs]
    stays = {name for name, tensor in clone.tensors.items() if tensor.dtype is source}  # scales of 4-bit weights
    mode = detect_fake_mode(known)
    exported = clone.exported
    if mode is not None:
        with mode:
            turned = [
                value if clone.parameter_name(node) in stays else _moved(value, None, source, dtype)
                for node, value in zip(inputs, known, strict=True)
            ]
        FakeTensorProp(exported.graph_module, mode).propagate_dont_convert_inputs(*turned)
    exported.example_inputs = pytree.tree_map(lambda leaf: _moved(leaf, None, source, dtype), exported.example_inputs)
    return source


def _moved(leaf: Any, device: torch.device | None, source: torch.dtype | None, dtype: torch.dtype | None) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.to(device=device, dtype=dtype if dtype is not None and leaf.dtype is source else None)


def _run(file: Path, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The outputs of the program in a file, as plain torch computes them."""
    try:
        with warnings.catch_warnings(), torch.no_grad(), file.open("rb") as opened:
            warnings.simplefilter("ignore")
            # An open file: torch wants names to end in .pt2.
            return outputs(torch.export.load(opened).module()(*args, **kwargs))
    except Exception as error:
        lines = str(error).strip().splitlines()[:4]
        raise RewriteError(
            "the written program does not run", evidence=lines, fix="Choose another type or device, or none."
        ) from error
