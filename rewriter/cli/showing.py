"""`--diff` and `--html`: what a verb changed, printed or as a page; shared by the verbs that change programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import rewriter
from rewriter.cli.options import free
from rewriter.cli.output import coloured, note, working

if TYPE_CHECKING:
    from rewriter.diff import Difference
    from rewriter.program import Program


@dataclass(frozen=True, slots=True)
class Showing:
    """What the user wants to see of a change."""

    diff: bool
    html: Path | None
    overwrite: bool

    def refuse(self, inputs: Sequence[Path], output: Path | None = None) -> None:
        """Refuse a page that cannot be written, before the work."""
        if self.html is None:
            return
        free(self.html, self.overwrite, inputs)
        if output is not None and self.html.resolve() == output.resolve():
            raise click.UsageError(f"-o and --html both name {self.html}.")

    def show(self, before: Program, after: Program, *, title: str, as_json: bool) -> dict[str, Any]:
        """Print the difference and write its page, as wanted; returns what the JSON says of it."""
        if not self.diff and self.html is None:
            return {}
        with working("comparing"):
            difference = rewriter.diff(before, after)
        if self.diff and not as_json:
            coloured(str(difference))
        if self.html is not None:
            write(difference, self.html, title=title, overwrite=self.overwrite)
        return {"diff": difference.to_json()} if self.diff else {}


html_option = click.option(
    "--html",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also write what changed as a page to click through.",
)


def showing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a verb that changes a program, given to it as `shown`; it has `--overwrite` too."""

    @click.option("--diff", is_flag=True, help="Print what changed, as `rewriter diff` does.")
    @html_option
    @functools.wraps(function)
    def wrapped(*args: Any, diff: bool, html: Path | None, overwrite: bool, **kwargs: Any) -> Any:
        shown = Showing(diff, html, overwrite)
        return function(*args, overwrite=overwrite, shown=shown, **kwargs)

    return wrapped


def write(difference: Difference, path: Path, *, title: str, overwrite: bool) -> None:
    from rewriter.viewer.page import write_page

    with working(f"writing {path}"):
        write_page(difference, path, title=title, overwrite=overwrite)
    note(f"wrote {path}")
