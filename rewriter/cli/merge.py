"""`rewriter merge`: the updates of a program into its weights."""

from __future__ import annotations

from pathlib import Path

import click

from rewriter.cli.applying import dry_run, run
from rewriter.cli.options import Load, as_json, beside, existing, free, loading, output, overwriting, verbosity
from rewriter.cli.showing import Showing, showing


@click.command(no_args_is_help=True)
@click.argument("source", metavar="MODEL")
@output("beside the input, named .merge")
@overwriting
@click.option("--precision", type=click.Choice(("fp32", "fp64")), default="fp32", help="Accumulate in this type.")
@click.option("--untie", is_flag=True, help="Give a merged layer whose weight is shared one of its own.")
@click.option("--keep", metavar="PASS,...", default="", help="Leave what these passes added in the graph.")
@click.option(
    "--nf4",
    type=click.Choice(("dequantise", "keep", "requantise")),
    default="dequantise",
    help="Updates beside 4-bit weights: give plain weights, leave them there, or quantise the sum again.",
)
@click.option("--lossy", is_flag=True, help="Quantise again also where that loses more than half of an update.")
@click.option("--allow-nonfinite", is_flag=True, help="Keep weights that are NaN or infinite after the merge.")
@click.option("--dry-run", "dry", is_flag=True, help="Show what would be folded; write nothing.")
@click.option("--no-check", "check", is_flag=True, default=True, flag_value=False, help="Skip the check of the law.")
@showing
@as_json
@loading
@verbosity
def command(
    source: str,
    output: Path | None,
    overwrite: bool,
    precision: str,
    untie: bool,
    keep: str,
    nf4: str,
    lossy: bool,
    allow_nonfinite: bool,
    dry: bool,
    check: bool,
    as_json: bool,
    load: Load,
    shown: Showing,
) -> None:
    """Fold every affine update into the weight beside it; `undo` takes it back bit for bit."""
    from rewriter.cli.registry import entry

    kept = tuple(filter(None, (name.strip() for name in keep.split(","))))
    options = {"precision": precision, "untie": untie, "allow_nonfinite": allow_nonfinite, "keep": kept}
    options |= {"nf4": nf4, "lossy": lossy}
    passes = (entry("merge").kind(**options),)
    if dry:
        shown.refuse(existing(source))
        dry_run(load(source), passes, as_json=as_json, shown=shown)
        return
    path = free(output or beside(source, "merge"), overwrite, existing(source))
    run(
        load(source),
        passes,
        path,
        check=check,
        overwrite=overwrite,
        inputs=existing(source),
        as_json=as_json,
        shown=shown,
    )
