"""`rewriter passes`: what can be applied."""

from __future__ import annotations

import textwrap

import click

from rewriter.cli.options import as_json, verbosity
from rewriter.cli.output import write_json


@click.command()
@as_json
@verbosity
def command(as_json: bool) -> None:
    """List the passes with their laws, sources and options.

    What the options of one mean is shown by `rewriter apply --pass NAME --help`; types and defaults are in the JSON.
    """
    from rewriter.cli.registry import registry

    entries = registry().values()
    if as_json:
        write_json({"passes": [entry.to_json() for entry in entries]})
        return
    width = max(len(entry.name) for entry in entries)
    margin = " " * (width + 2)
    for entry in entries:
        click.echo(f"{entry.name:{width}}  {entry.summary}")
        click.echo(f"{margin}law: {entry.law}; source: {entry.kind.source}")
        flags = " ".join(field.flag for field in entry.fields)
        click.echo(textwrap.fill(flags, 116, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False))
