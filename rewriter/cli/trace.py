"""`rewriter trace`: a model into a program."""

from __future__ import annotations

from pathlib import Path

import click

from rewriter.cli.options import Load, as_json, beside, existing, free, loading, output, overwriting, verbosity
from rewriter.cli.output import out, working, write_json

DTYPES = ("float32", "bfloat16", "float16", "float64")


@click.command(no_args_is_help=True)
@click.argument("source", metavar="SOURCE")
@output("beside a directory or file, in the working directory for a factory")
@overwriting
@click.option("--dtype", type=click.Choice(DTYPES), help="Trace in this type. Default: that of the weights.")
@as_json
@loading
@verbosity
def command(source: str, output: Path | None, overwrite: bool, dtype: str | None, as_json: bool, load: Load) -> None:
    """Trace a model once and write it as a program.

    SOURCE is a Hugging Face directory, package.module:factory, or weights together with --model.

    \b
    rewriter trace tiny-llama -o model.pt
    """
    path = free(output or beside(source, *(["trace"] if Path(source).is_file() else [])), overwrite, existing(source))
    if dtype is None:
        program = load(source)
    else:
        import torch

        program = load(source, dtype=getattr(torch, dtype))
    from rewriter.formats.pt2 import save

    with working(f"writing {path}"):
        save(program, path, overwrite=overwrite, inputs=existing(source))
    operations = sum(1 for node in program.graph.nodes if node.op == "call_function")
    count = sum(tensor.numel() for tensor in program.parameters().values())
    if as_json:
        write_json({"output": str(path), "operations": operations, "parameters": count})
        return
    out(f"{operations:,} operations, {count:,} parameters")
    out(f"wrote {path}")
