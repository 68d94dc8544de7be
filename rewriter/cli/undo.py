"""`rewriter undo`: a step taken back, bit for bit."""

from __future__ import annotations

from pathlib import Path

import click

import rewriter
from rewriter.cli.options import Load, as_json, beside, existing, free, loading, output, overwriting, verbosity
from rewriter.cli.output import out, write_json
from rewriter.cli.showing import Showing, showing


@click.command(no_args_is_help=True)
@click.argument("source", metavar="MODEL")
@click.option("--step", type=int, help="The step of this number. Default: the last one.")
@click.option("--pass", "name", metavar="NAME", help="The last step of this pass.")
@output("beside the input, named .undo")
@overwriting
@showing
@as_json
@loading
@verbosity
def command(
    source: str,
    step: int | None,
    name: str | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    load: Load,
    shown: Showing,
) -> None:
    """Take a step back: what it added goes, what it replaced returns, every bit of it."""
    from rewriter.formats.pt2 import save

    if step is not None and name is not None:
        raise click.UsageError("--step and --pass name one step each: give one of them.")
    path = free(output or beside(source, "undo"), overwrite, existing(source))
    shown.refuse(existing(source), path)
    before = load(source)
    after = rewriter.undo(before, name if step is None else step)
    save(after, path, overwrite=overwrite, inputs=existing(source))
    kept = {each.number for each in after.steps}
    taken = [{"number": each.number, "pass": each.name} for each in before.steps if each.number not in kept]
    if not as_json:
        for each in taken:
            out(f"undone: step {each['number']}, {each['pass']}")
    difference = shown.show(before, after, title=f"{source}: undone", as_json=as_json)
    if as_json:
        steps = [each.name for each in after.steps]
        write_json({"output": str(path), "undone": taken, "steps": steps, **difference})
        return
    out(f"left: {', '.join(each.name for each in after.steps) or 'no step'}")
    out(f"wrote {path}")
