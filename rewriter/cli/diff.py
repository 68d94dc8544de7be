"""`rewriter diff`: what changed between two programs."""

from __future__ import annotations

from pathlib import Path

import click

import rewriter
from rewriter.cli.options import Load, as_json, existing, free, loading, overwriting, verbosity
from rewriter.cli.output import coloured, working, write_json
from rewriter.cli.showing import html_option, write


@click.command(no_args_is_help=True)
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@click.option("--stat", is_flag=True, help="Only the summary.")
@click.option("--weights", is_flag=True, help="Compare tensors only; of a directory, those that it stores.")
@html_option
@overwriting
@click.option("--exit-code", is_flag=True, help="Exit with 1 when they differ.")
@as_json
@loading
@verbosity
def command(
    before: str,
    after: str,
    stat: bool,
    weights: bool,
    html: Path | None,
    overwrite: bool,
    exit_code: bool,
    as_json: bool,
    load: Load,
) -> int:
    """Show what changed from A to B: operations, parameters, numbers.

    A and B are programs, models, ONNX files or adapter directories. A program beside an ONNX file is converted first;
    beside weights without a graph only tensors are compared.
    """
    from rewriter.sides import sides

    if html is not None:
        free(html, overwrite, existing(before, after))
    one, other = sides(before, after, load, weights=weights)
    with working("comparing"):
        difference = rewriter.diff(one, other)
    if as_json:
        write_json(difference.to_json())
    else:
        coloured(difference.summary() if stat else str(difference))
    if html is not None:
        write(difference, html, title=f"{before} → {after}", overwrite=overwrite)
    return int(exit_code and not difference.same)
