"""`rewriter apply`: passes onto a model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rewriter.cli.applying import dry_run, run
from rewriter.cli.options import Load, as_json, beside, existing, free, loading, output, overwriting, verbosity
from rewriter.cli.pass_command import PassCommand, chosen_passes
from rewriter.cli.showing import Showing, showing
from rewriter.errors import UsageError

if TYPE_CHECKING:
    from rewriter.transform import Pass


@click.command(cls=PassCommand, no_args_is_help=True)
@click.argument("source", metavar="MODEL")
@click.option("--pass", metavar="NAME", expose_value=False, help="Apply this pass. Its options follow it.")
@click.option("--adapter", metavar="DIR", expose_value=False, help="Apply an adapter directory of PEFT or AdapterHub.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Apply the passes of a recipe file, or of a recipe that comes along: qlora.",
)
@output("beside the input, named after the passes")
@overwriting
@click.option("--dry-run", "dry", is_flag=True, help="Show where the passes apply and what they add; write nothing.")
@click.option("--no-check", "check", is_flag=True, default=True, flag_value=False, help="Skip the check of the law.")
@showing
@as_json
@loading
@verbosity
@click.pass_context
def command(
    ctx: click.Context,
    source: str,
    recipe: Path | None,
    output: Path | None,
    overwrite: bool,
    dry: bool,
    check: bool,
    as_json: bool,
    load: Load,
    shown: Showing,
) -> None:
    """Apply passes to a model and write the result as a new program.

    \b
    rewriter apply --pass lora --targets q_proj,v_proj --rank 8 model.pt
    rewriter apply --pass lora --rank 4 --pass merge model.pt -o merged.pt
    rewriter apply --adapter DIR model.pt
    rewriter apply --recipe qlora MODEL       4-bit weights and a LoRA beside every linear layer
    rewriter apply --pass lora --help         the options of a pass
    """
    passes = chosen_passes(ctx)
    if recipe is not None:
        recipe = _shipped(recipe)
        passes = _read(recipe, bool(passes))
    if not passes:
        raise UsageError("no pass given", fix="Add --pass NAME, --adapter DIR or --recipe FILE; see `rewriter passes`.")
    if dry:
        shown.refuse(existing(source))
        dry_run(load(source), passes, as_json=as_json, shown=shown)
        return
    read = [value for each in passes for f in fields(each) if isinstance(value := getattr(each, f.name), Path)]  # type: ignore[arg-type]
    inputs = existing(source, recipe, *read)
    path = free(output or beside(source, *dict.fromkeys(each.name for each in passes)), overwrite, inputs)
    run(load(source), passes, path, check=check, overwrite=overwrite, inputs=inputs, as_json=as_json, shown=shown)


def _shipped(path: Path) -> Path:
    """The file of a recipe that comes along, where a bare name means no file; everything else as it is."""
    import passes

    if path.exists() or path.name != str(path) or path.suffix:
        return path
    known = {file.stem: file for file in sorted((Path(passes.__file__).parent / "recipes").glob("*.yaml"))}
    if path.name not in known:
        raise UsageError(
            f"there is no recipe {path.name!r}: no file of that name, and none that comes along",
            evidence=[f"these come along: {', '.join(known)}"],
            fix="Name a file, or one of these.",
        )
    return known[path.name]


def _read(path: Path, has_passes: bool) -> tuple[Pass, ...]:
    from rewriter import recipe
    from rewriter.cli.registry import registry

    if has_passes:
        raise UsageError(f"{path} and passes on the command line together", fix="Give one of them.")
    kinds = {name: entry.kind for name, entry in registry().items()}
    return recipe.build(recipe.read(path), kinds, folder=path.parent)
