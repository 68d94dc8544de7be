"""`rewriter extract`: a fine-tune as a LoRA."""

from __future__ import annotations

from pathlib import Path

import click

from rewriter.cli.options import Load, as_json, beside, existing, free, loading, output, overwriting, verbosity
from rewriter.cli.output import out, table, working, write_json


@click.command(no_args_is_help=True)
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@click.option("--rank", type=click.IntRange(min=1), required=True, help="The rank of every LoRA.")
@click.option("--targets", default="all-linear", show_default=True, help="The layers that get one.")
@click.option("--alpha", type=float, help="Default: the rank, so that the scale is 1.")
@click.option("--base-model", metavar="NAME", help="The name of the base that the adapter records.")
@output("a directory beside TUNED, named -lora")
@overwriting
@as_json
@loading
@verbosity
def command(
    base: str,
    tuned: str,
    rank: int,
    targets: str,
    alpha: float | None,
    base_model: str | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    load: Load,
) -> None:
    """Write the LoRA that best explains how TUNED differs from BASE, as a PEFT directory.

    Prints for every weight which share of the change's energy the LoRA holds, and what no LoRA covers.
    """
    from passes.extract import extract
    from rewriter.find import parse_targets

    path = free(output or beside(tuned, suffix="-lora"), overwrite, existing(base, tuned))
    first, second = load(base), load(tuned)
    with working("decomposing"):
        found = extract(first, second, rank=rank, targets=parse_targets(targets), alpha=alpha)
    written = found.write(path, base_model=base_model, overwrite=overwrite)
    if as_json:
        shares = {name: {"rank": each.rank, "share": each.share} for name, each in found.factors.items()}
        write_json({"output": str(written), "layers": shares, "uncovered": dict(found.uncovered)})
        return
    rows = [(name, each.rank, f"{each.share:.2%}") for name, each in found.factors.items()]
    table(("layer", "rank", "explained"), rows, right=(1, 2))
    for name, change in found.uncovered.items():
        out(f"not covered: {name}, which changed by {change:.2%} of its size")
    out(f"wrote {written}")
