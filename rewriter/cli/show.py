"""`rewriter show`: one model at a glance, in the terminal or as a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import rewriter
from rewriter.cli.options import Load, as_json, existing, free, loading, overwriting, verbosity
from rewriter.cli.output import note, out, table, working, write_json

if TYPE_CHECKING:
    from rewriter.program import Program


@click.command(no_args_is_help=True)
@click.argument("source", metavar="MODEL")
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write a page to click through.")
@overwriting
@as_json
@loading
@verbosity
def command(source: str, html: Path | None, overwrite: bool, as_json: bool, load: Load) -> None:
    """Show a model at a glance: layers that are alike once, adapters, weights in 4 bits, parameters.

    The page has the graph module by module and the parameters as areas. `rewriter inspect` lists every layer.
    """
    if html is not None:
        free(html, overwrite, existing(source))
    program = load(source)
    rows = _rows(program)
    if as_json:
        write_json({"layers": rows, "report": rewriter.report(program).to_json()})
    else:
        out(f"{source}: {program!r}")
        out("")
        heads = ("layers", "count", "kind", "shape", "numbers", "added by passes")
        table(heads, [[row["path"], row["count"], row["kind"], row["shape"], f"{row['numbers']:,}",
                       f"{row['added']:,}" if row["added"] else ""] for row in rows], right=(1, 4, 5))  # fmt: skip
        out("")
        out(str(rewriter.report(program)))
    if html is not None:
        from rewriter.viewer.page import write_model_page

        with working(f"writing {html}"):
            write_model_page(program, html, title=source, overwrite=overwrite)
        note(f"wrote {html}")


def _rows(program: Program) -> list[dict[str, Any]]:
    """Layers whose paths differ by numbers alone, with what they hold and what passes added beside them."""
    from rewriter.quantised import weight_like
    from rewriter.view import layers

    tensors = program.tensors
    added = [name for step in program.steps for name in step.added if name in tensors]
    found: dict[tuple[str, str, tuple[int, ...]], dict[str, Any]] = {}
    for site in layers(program).values():
        path, shape = re.sub(r"(?<![^.])\d+(?![^.])", "*", site.path), tuple(weight_like(program, site).shape)
        row = found.setdefault(
            (path, site.kind, shape),
            {"path": path, "kind": site.kind, "shape": list(shape), "count": 0, "numbers": 0, "added": 0},
        )
        row["count"] += 1
        row["numbers"] += weight_like(program, site).numel()
        mine = [name for name in added if name.startswith(f"{site.path}.") and "weight_" not in name]
        row["added"] += sum(tensors[name].numel() for name in mine)
    return list(found.values())
