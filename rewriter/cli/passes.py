"""`rewriter passes`: what can be applied."""

from __future__ import annotations

import click

from rewriter.cli.options import as_json, verbosity
from rewriter.cli.output import table, write_json


@click.command()
@as_json
@verbosity
def command(as_json: bool) -> None:
    """List the passes with their laws and sources.

    The options of one are shown by `rewriter apply --pass NAME --help`; all are in the JSON.
    """
    from rewriter.cli.registry import registry

    entries = registry().values()
    if as_json:
        write_json({"passes": [entry.to_json() for entry in entries]})
        return
    table(
        ("pass", "what it does", "law", "source"),
        [(entry.name, entry.summary, entry.law, entry.kind.source) for entry in entries],
    )
