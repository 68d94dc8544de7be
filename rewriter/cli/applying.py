"""Applying passes and showing what they did; shared by the verbs that apply any."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rewriter
from rewriter.cli.output import note, out, table, working, write_json

if TYPE_CHECKING:
    from rewriter.cli.showing import Showing
    from rewriter.program import Program
    from rewriter.transform import Applied, Pass, Result


def run(
    program: Program,
    passes: Sequence[Pass],
    path: Path,
    *,
    check: bool,
    overwrite: bool,
    inputs: Sequence[Path],
    as_json: bool,
    shown: Showing,
) -> None:
    """Apply, write, show."""
    from rewriter.formats.pt2 import save

    shown.refuse(inputs, path)
    with working(f"applying {', '.join(each.name for each in passes)}"):
        result = rewriter.apply(program, *passes, check=check)
    with working(f"writing {path}"):
        save(result.program, path, overwrite=overwrite, inputs=inputs)
    if not as_json:
        show(result)
    names = ", ".join(each.name for each in passes)
    difference = shown.show(program, result.program, title=f"{path.name}: {names}", as_json=as_json)
    if as_json:
        write_json({"output": str(path), "applied": [each.to_json() for each in result.applied], **difference})
    else:
        out(f"wrote {path}")
    for applied in result.applied:
        _warn_of_no_effect(applied)


def dry_run(program: Program, passes: Sequence[Pass], *, as_json: bool, shown: Showing) -> None:
    """Show where passes apply and what they would add; no program is written and no numbers are checked."""
    result = rewriter.apply(program, *passes, check=False)
    steps = result.program.steps[len(program.steps) :]
    rows = [
        _match(program, result.program, applied, site, step.added)
        for applied, step in zip(result.applied, steps, strict=True)
        for site in applied.sites
    ]
    names = ", ".join(each.name for each in passes)
    if as_json:
        difference = shown.show(program, result.program, title=f"dry run: {names}", as_json=True)
        done = [each.to_json() for each in result.applied]
        write_json({"dry_run": True, "matches": rows, "applied": done, **difference})
        return
    table(
        ("pass", "path", "kind", "shape", "new parameters", "count"),
        [[*(row[key] for key in ("pass", "path", "kind", "shape")), _names(row), f"{row['count']:,}"] for row in rows],
        right=(5,),
    )
    for miss in result.missed:
        out(f"not: {miss.path}: {miss.reason}")
    for applied in result.applied:
        out(
            f"{applied.pass_.name}: {len(applied.sites)} sites, {applied.added:,} new parameters, "
            f"{applied.trainable:,} trainable of {applied.parameters_after:,}"
        )
    shown.show(program, result.program, title=f"dry run: {names}", as_json=False)
    out("nothing was written" if shown.html is None else "no program was written")


def show(result: Result) -> None:
    """The table of what every pass did."""
    table(
        ("pass", "sites", "before", "after", "trainable", "seconds", "largest change", "law"),
        [_row(applied) for applied in result.applied],
        right=(1, 2, 3, 4, 5, 6),
    )
    for applied in result.applied:
        _show_notes(applied)


def _warn_of_no_effect(applied: Applied) -> None:
    """Tell of merged updates that are zero: an adapter that was never trained is easily merged by mistake."""
    updates = [numbers["update"] for numbers in applied.notes.values() if "update" in numbers]
    zero = updates.count(0.0)
    if zero:
        reason = "the adapter has no effect" if zero == len(updates) else "the adapter has no effect there"
        note(f"warning: {zero} of {len(updates)} merged updates are zero: {reason}")


def _row(applied: Applied) -> list[str]:
    change = applied.change
    moved = "not checked" if change is None else "none" if change.equal else f"{change.absolute:.3g}"
    if change is not None and not change.equal and change.allowed is not None:
        moved += f" ({change.relative:.1g} of {change.allowed:.1g} relative)"
    return [
        applied.pass_.name,
        f"{len(applied.sites):,}",
        f"{applied.parameters_before:,}",
        f"{applied.parameters_after:,}",
        f"{applied.trainable:,}",
        f"{applied.seconds:.2f}",
        moved,
        str(applied.pass_.law),
    ]


def _show_notes(applied: Applied) -> None:
    """What a pass noted of its sites: the smallest and largest of every number; of 4-bit weights, layer by layer."""
    name, every = applied.pass_.name, list(applied.notes.values())
    titles = dict.fromkeys(title for numbers in every for title in numbers)
    if "bits_per_weight" not in titles:
        for title in titles:
            out(f"{name}: {title.replace('_', ' ')} {_range(every, title)}")
        return
    groups: dict[str, list[Mapping[str, float]]] = {}
    for path, numbers in applied.notes.items():
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", path), []).append(numbers)
    table(
        (name, *(title.replace("_", " ") for title in titles)),
        [(path, *(_range(each, title) for title in titles)) for path, each in groups.items()],
        right=range(1, len(titles) + 1),
    )


def _range(notes: Sequence[Mapping[str, float]], name: str) -> str:
    values = [numbers[name] for numbers in notes if name in numbers]
    if not values or any(math.isnan(value) for value in values):
        return "not a number" if values else ""
    low, high = (
        f"{value:.4g}" if name == "bits_per_weight" else f"{value:.3g}" for value in (min(values), max(values))
    )
    return f"{low} to {high}" if low != high else low


def _match(before: Program, after: Program, applied: Applied, site: Any, added: Sequence[str]) -> dict[str, Any]:
    layer = getattr(site, "site", site)
    path = str(getattr(site, "path", site))
    weight = getattr(layer, "weight", None)
    part = getattr(layer, "part", None)
    mine = [name for name in added if name.startswith(f"{path}.") and (part is None or name.endswith(f".{part.name}"))]
    shapes = {name.removeprefix(f"{path}."): list(after.tensor(name).shape) for name in mine if name in after.tensors}
    tensors = before.tensors if weight in before.tensors else after.tensors
    return {
        "pass": applied.pass_.name,
        "path": path if part is None else f"{path}[{part.name}]",
        "kind": getattr(layer, "kind", type(layer).__name__.lower()),
        "shape": list(tensors[weight].shape) if weight in tensors else [],
        "new": shapes,
        "count": sum(math.prod(shape) for shape in shapes.values()),
    }


def _names(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in row["new"].items()) or "none"
