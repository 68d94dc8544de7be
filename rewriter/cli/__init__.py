"""The command line: one file per verb, found by its name; torch is imported only when a verb runs."""

from __future__ import annotations

import click

import rewriter
from rewriter.cli.group import Verbs
from rewriter.cli.options import verbosity


@click.command(cls=Verbs)
@click.version_option(rewriter.__version__, prog_name="rewriter")
@verbosity
def main() -> None:
    """Parameter-efficient fine-tuning as compiler passes over traced models.

    Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 usage, 3 refused as unsafe,
    4 numbers outside what was promised, 130 interrupted.
    """
