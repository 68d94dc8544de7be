"""`rewriter diff`: what changed between two programs."""

from __future__ import annotations

import click

import rewriter
from rewriter.cli.options import Load, as_json, loading, verbosity
from rewriter.cli.output import coloured, working, write_json


@click.command(no_args_is_help=True)
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@click.option("--exit-code", is_flag=True, help="Exit with 1 when they differ.")
@as_json
@loading
@verbosity
def command(before: str, after: str, exit_code: bool, as_json: bool, load: Load) -> int:
    """Show what changed from A to B: operations, parameters, numbers."""
    one, other = load(before), load(after)
    with working("comparing"):
        difference = rewriter.diff(one, other)
    if as_json:
        write_json(difference.to_json())
    else:
        coloured(str(difference))
    return int(exit_code and not difference.same)
