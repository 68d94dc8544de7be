"""`rewriter export`: a program into what other tools read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rewriter.cli.options import Load, as_json, beside, existing, free, loading, output, overwriting, verbosity
from rewriter.cli.output import out, working, write_json
from rewriter.cli.trace import DTYPES

if TYPE_CHECKING:
    from rewriter.program import Program

ENDINGS = {
    "onnx": ".onnx",
    "torch": ".torch.pt2",
    "huggingface": "-huggingface",
    "peft": "-adapter",
    "adapterhub": "-adapter",
}
# which format takes which option
TAKES = {
    "onnx": {"opset", "tolerance", "external_data", "nf4", "keep_double_quant"},
    "torch": {"device", "dtype"},
    "huggingface": {"dtype", "companions"},
    "peft": {"adapter", "base_model"},
    "adapterhub": {"adapter", "base_model"},
}
NF4_FORMS = ("bnb4", "codebook", "int8")
_MERGED = "Fold it into the weights with `rewriter merge`, and export the model with --to huggingface."
# passes whose parameters no PEFT directory can hold -> what to do instead
INSTEAD_OF_PEFT = {
    "adapter": "Write bottleneck adapters with --to adapterhub.",
    "adapterhub": "Write bottleneck adapters with --to adapterhub.",
    "intrinsic": _MERGED,
    "binarise": _MERGED,
    "select": "Export the model with --to huggingface, after `rewriter merge` of a change beside its weights.",
}


@click.command(no_args_is_help=True)
@click.argument("source", metavar="MODEL")
@click.option("--to", "kind", type=click.Choice(tuple(ENDINGS)), required=True, help="The format to write.")
@output("beside the input, named after the format")
@overwriting
@click.option("--opset", type=int, help="onnx: the version of the operators.")
@click.option("--tolerance", type=click.FloatRange(min=0), help="onnx: the largest error allowed. Default: 1e-4.")
@click.option("--external-data/--no-external-data", default=None, help="onnx: weights beside it. Default: past 2 GB.")
@click.option("--nf4", type=click.Choice(NF4_FORMS), help="onnx: the form of 4-bit weights. Default: bnb4.")
@click.option(
    "--keep-double-quant", is_flag=True, default=None, help="onnx: quantised scales of 4-bit weights as well."
)
@click.option("--device", help="torch: the device the program runs on.")
@click.option("--dtype", type=click.Choice(DTYPES), help="torch, huggingface: the type of the weights.")
@click.option(
    "--source",
    "companions",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="huggingface: take the tokenizer from here.",
)
@click.option("--adapter-name", "adapter", metavar="NAME", help="peft, adapterhub: which adapter. Default: default.")
@click.option("--base-model", metavar="NAME", help="peft, adapterhub: the name of the base that the adapter records.")
@as_json
@loading
@verbosity
def command(
    source: str, kind: str, output: Path | None, overwrite: bool, as_json: bool, load: Load, **options: Any
) -> None:
    """Write a model for other tools, compare it with the program first, and print the measured error."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in sorted(set(given) - TAKES[kind]):
        homes = ", ".join(each for each, names in TAKES.items() if name in names)
        raise click.UsageError(f"--{_flag(name)} is for {homes}, not for {kind}.")
    path = free(output or beside(source, suffix=ENDINGS[kind]), overwrite, existing(source, given.get("companions")))
    program = load(source)
    with working(f"writing {path}"):
        done = WRITERS[kind](program, path, overwrite, given, existing(source))
    if as_json:
        write_json({"to": kind, "output": str(path), **done})
        return
    if "max_abs_error" in done:
        out(f"largest error against the program: {done['max_abs_error']:.3g}")
    if done.get("nf4"):
        out(done["nf4"]["summary"])
    if "size_bytes" in done:
        out(f"{done['size_bytes']:,} bytes")
    out(f"wrote {done.get('path', path)}")


def _flag(name: str) -> str:
    return {"companions": "source", "adapter": "adapter-name"}.get(name, name.replace("_", "-"))


def _onnx(
    program: Program, path: Path, overwrite: bool, options: dict[str, Any], _inputs: list[Path]
) -> dict[str, Any]:
    from rewriter.formats.onnx import export_onnx

    return export_onnx(program, path, overwrite=overwrite, **options).to_json()


def _torch(
    program: Program, path: Path, overwrite: bool, options: dict[str, Any], inputs: list[Path]
) -> dict[str, Any]:
    from rewriter.formats.torch_program import export_torch

    typed = options | _dtype(options)
    return export_torch(program, path, overwrite=overwrite, inputs=inputs, **typed).to_json()


def _huggingface(
    program: Program, path: Path, overwrite: bool, options: dict[str, Any], inputs: list[Path]
) -> dict[str, Any]:
    from rewriter.formats.huggingface import save

    source = options.get("companions") or next((each for each in inputs if each.is_dir()), None)
    return {"max_abs_error": save(program, path, source=source, overwrite=overwrite, **_dtype(options))}


def _peft(
    program: Program, path: Path, overwrite: bool, options: dict[str, Any], _inputs: list[Path]
) -> dict[str, Any]:
    from passes.peft_write import write_adapter

    _refuse_for_peft(program)
    return {"path": str(write_adapter(program, path, overwrite=overwrite, **options))}


def _refuse_for_peft(program: Program) -> None:
    """Refuse what PEFT has no format for, with the way that the program can take instead."""
    from rewriter.errors import RewriteError

    held = list(dict.fromkeys(step.name for step in program.steps))
    foreign = [name for name in held if name in INSTEAD_OF_PEFT]
    if foreign:
        others = [name for name in held if name not in foreign]
        first = f"Undo {', '.join(others)} first for that, or take" if others else "Or take"
        raise RewriteError(
            f"PEFT has no format for {', '.join(foreign)}, which this program holds",
            evidence=[f"passes: {', '.join(held)}"],
            fix=f"{INSTEAD_OF_PEFT[foreign[0]]} {first} the whole program with --to onnx or torch.",
        )


def _adapterhub(
    program: Program, path: Path, overwrite: bool, options: dict[str, Any], _inputs: list[Path]
) -> dict[str, Any]:
    from passes.adapterhub_write import write_adapterhub

    return {"path": str(write_adapterhub(program, path, overwrite=overwrite, **options))}


def _dtype(options: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {"dtype": getattr(torch, options["dtype"])} if "dtype" in options else {}


WRITERS: dict[str, Callable[[Program, Path, bool, dict[str, Any], list[Path]], dict[str, Any]]] = {
    "onnx": _onnx,
    "torch": _torch,
    "huggingface": _huggingface,
    "peft": _peft,
    "adapterhub": _adapterhub,
}
