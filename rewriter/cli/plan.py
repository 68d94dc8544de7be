"""`rewriter plan`: the memory that training takes, before anything is downloaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rewriter.cli.options import Load, as_json, loading, verbosity
from rewriter.cli.output import out, table, working, write_json
from rewriter.errors import UsageError, closest

if TYPE_CHECKING:
    from passes import Lora
    from rewriter.plan import Case
    from rewriter.program import Program

METHODS = ("full", "lora", "qlora", "program")
DEFAULT_METHODS = ("full", "lora", "qlora")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class _Methods(click.ParamType[Any]):
    """`full,lora` -> ("full", "lora")."""

    name = "method,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = tuple(part.strip() for part in value.split(",") if part.strip())
        for name in names:
            if name not in METHODS:
                near = closest(name, METHODS, 1)
                self.fail(f"{name!r} is none of {', '.join(METHODS)}{f'; closest: {near[0]}' if near else ''}.")
        return names


@click.command(no_args_is_help=True)
@click.argument("source", metavar="MODEL", required=False)
@click.option("--list", "listing", is_flag=True, help="List the configurations that ship as examples.")
@click.option(
    "--method",
    "methods",
    type=_Methods(),
    multiple=True,
    help="full, lora, qlora, or program (what a program's own passes train). Default: the first three side by side.",
)
@click.option("--rank", type=int, default=16, show_default=True, help="Of the adapters of lora and qlora.")
@click.option("--alpha", type=float, help="Of the adapters; memory does not depend on it. Default: the rank.")
@click.option("--targets", metavar="NAMES", help="Where adapters go. Default: query, key, value, output (@attention).")
@click.option("--batch", type=int, default=1, show_default=True, help="Rows of one step.")
@click.option("--length", type=int, help="Positions of a row; not for images. Default: 512, or what the model takes.")
@click.option("--optimizer", default="adamw", show_default=True, help="adamw or adamw8bit.")
@click.option(
    "--states", default="weight", show_default=True, help="adamw: its states in the type of the weight or fp32."
)
@click.option("--master", is_flag=True, help="Keep an fp32 copy of trained weights, and fp32 states.")
@click.option("--dtype", type=click.Choice(tuple(DTYPES)), help="Of the weights. Default: bf16, or that of a program.")
@click.option("--checkpointing", is_flag=True, help="Put the total with gradient checkpointing first.")
@click.option(
    "--double-quant/--no-double-quant",
    "double_quantise",
    default=True,
    show_default=True,
    help="qlora: 4.127 bits, not 4.5.",
)
@as_json
@loading
@verbosity
def command(
    source: str | None, listing: bool, methods: tuple[Any, ...], as_json: bool, load: Load, **options: Any
) -> None:
    """Show what training takes in memory, method by method: weights, gradients, optimiser, activations.

    MODEL is a Hugging Face directory (config.json is enough: no weight is read), a program, a package.module:factory,
    or the name of an example. The activations are those of the model's own graph. Every assumption is printed.

    \b
    rewriter plan llama-2-70b
    rewriter plan llama-2-7b --method lora,qlora --rank 32 --batch 4 --length 2048
    rewriter plan llama-2-7b --method full --master        fp32 copy: 16 bytes a parameter
    rewriter plan model.lora.pt                            what this program trains

    JSON: model, batch, length, types, optimizer, states, master_weights, checkpointing, assumptions, and for each of
    `methods` in bytes: weights, gradients, optimiser, master_copy, activations (saved, checkpointed, outputs,
    by_operation), loss, total, total_checkpointed; the counts parameters, trainable, share, quantised.
    """
    if listing:
        _list(as_json)
        return
    if source is None:
        raise click.UsageError("Missing argument 'MODEL'; --list shows the examples.")
    from rewriter.plan import Options, plan

    names = ("batch", "length", "optimizer", "states", "master", "checkpointing", "double_quantise")
    chosen = Options(**{name: options[name] for name in names})
    lora = _lora(options["rank"], options["alpha"])
    program = _read(source, load, options["dtype"])
    cases = _cases(program, methods, lora, options["targets"])
    with working("planning"):
        made = plan(cases, chosen)
    if as_json:
        write_json({"model": source, **made.to_json()})
        return
    out(f"{source}: a step of {made.step}")
    out("")
    table(["", *(cost.name for cost in made.costs)], made.rows(), right=range(1, len(made.costs) + 1))
    out("")
    for line in made.assumptions:
        out(f"  {line}")


def _list(as_json: bool) -> None:
    from rewriter.examples import examples

    found = examples()
    if as_json:
        write_json({"examples": list(found)})
        return
    for name in found:
        out(name)


def _read(source: str, load: Load, dtype_name: str | None) -> Program:
    """The shapes of a model, and no more than that where the model is a configuration."""
    import torch

    from rewriter.examples import examples
    from rewriter.formats.huggingface_shapes import load_shapes
    from rewriter.plan import in_type

    dtype = getattr(torch, DTYPES[dtype_name]) if dtype_name else None
    path, known = Path(source), examples()
    if path.is_dir():
        return load(source, weights=False, dtype=dtype or torch.bfloat16)
    if not path.exists() and source in known:
        with working(f"tracing {source}"):
            return load_shapes(known[source], dtype=dtype or torch.bfloat16, name=source)
    if not path.exists() and ":" not in source:
        near = closest(source, list(known), 3)
        evidence = [f"examples: {', '.join(near or known)}"]
        raise UsageError(f"there is no model {source!r}", evidence=evidence, fix="Name a path or an example.")
    program = load(source)
    return in_type(program, dtype) if dtype else program


def _lora(rank: int, alpha: float | None) -> Lora:
    from passes import Lora

    return Lora(rank=rank, alpha=rank if alpha is None else alpha)


def _cases(program: Program, methods: tuple[Any, ...], lora: Lora, targets: str | None) -> list[Case]:
    """What each method makes of the model; the adapters are those of the pass itself."""
    import rewriter
    from rewriter.find import parse_targets
    from rewriter.plan import Case, default_targets

    trains = any(step.trainable for step in program.steps)
    names = dict.fromkeys(name for group in methods for name in group) or (("program",) if trains else DEFAULT_METHODS)
    adapted = program
    if {"lora", "qlora"} & {*names}:
        with working("placing adapters"):
            placed = replace(lora, targets=parse_targets(targets) if targets else default_targets(program))
            adapted = rewriter.apply(program, placed, check=False).program
    made = {
        "full": Case("full", program, everything=True),
        "lora": Case("lora", adapted),
        "qlora": Case("qlora", adapted, quantised=True),
        "program": Case("program", program),
    }
    return [made[name] for name in names]
