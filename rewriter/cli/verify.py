"""`rewriter verify`: whether a program holds together, and computes what another one computes."""

from __future__ import annotations

import click

from rewriter.cli.options import Load, as_json, loading, verbosity
from rewriter.cli.output import out, table, working, write_json
from rewriter.errors import LawError


@click.command(no_args_is_help=True)
@click.argument("program", metavar="PROGRAM")
@click.argument("other", metavar="[OTHER]", required=False)
@click.option("--tolerance", type=click.FloatRange(min=0), help="Relative. Default: what rounding may cause.")
@click.option("--trials", type=click.IntRange(min=1), default=3, show_default=True, help="How many sizes are tried.")
@click.option("--seed", type=int, default=0, show_default=True, help="For the random inputs.")
@as_json
@loading
@verbosity
def command(
    program: str, other: str | None, tolerance: float | None, trials: int, seed: int, as_json: bool, load: Load
) -> None:
    """Check the structure of a program, its numbers, and that it runs in several sizes.

    With OTHER, compare the outputs of the two; exit code 4 when they differ by more than the tolerance.
    """
    from rewriter.trials import verified

    one, two = load(program), load(other) if other is not None else None
    with working("running"):
        seen = verified(one, two, tolerance=tolerance, trials=trials, seed=seed)
    if as_json:
        write_json(seen.to_json())
    else:
        rows = [
            (
                ", ".join(f"{name} {list(shape)}" for name, shape in each.shapes.items()),
                "yes" if each.finite else "no",
                "" if each.absolute is None else f"{each.absolute:.3g}",
                "" if each.relative is None else f"{each.relative:.3g}",
            )
            for each in seen.trials
        ]
        columns = 2 if other is None else 4
        table(("inputs", "finite", "difference", "relative")[:columns], [row[:columns] for row in rows], right=(2, 3))
    if seen.problems:
        fix = "Undo what changed it, or allow more with --tolerance." if other else "Repair the weights."
        what = f"{program} does not hold" if other is None else f"{program} and {other} do not hold together"
        raise LawError(what, evidence=seen.problems, fix=fix)
    if not as_json:
        end = "" if seen.tolerance is None else f", outputs within {seen.tolerance:.3g} relative"
        out(f"{program} holds: structure, finite, runs in {len(seen.trials)} sizes{end}")
