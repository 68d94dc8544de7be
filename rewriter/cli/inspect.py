"""`rewriter inspect`: what a program holds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

import rewriter
from rewriter.cli.options import Load, as_json, loading, verbosity
from rewriter.cli.output import out, table, write_json

if TYPE_CHECKING:
    from rewriter.program import Program


@click.command(no_args_is_help=True)
@click.argument("source", metavar="MODEL")
@click.option("--text", "as_text", is_flag=True, help="Print the text of the program, one operation a line.")
@click.option("--recipe", is_flag=True, help="Print the recipe that made it, for `rewriter apply --recipe`.")
@as_json
@loading
@verbosity
def command(source: str, as_text: bool, recipe: bool, as_json: bool, load: Load) -> None:
    """Show the layers of a model, the steps that made it, what trains, and the memory of training it."""
    if as_text + recipe + as_json > 1:
        raise click.UsageError("--text, --recipe and --json show different things: give one of them.")
    program = load(source)
    if as_text:
        out(rewriter.text(program))
    elif recipe:
        from rewriter.recipe import write

        out(write(program.steps))
    elif as_json:
        report = rewriter.report(program).to_json()
        write_json({"layers": _layers(program), "steps": _steps(program), "report": report})
    else:
        _show(source, program)


def _show(source: str, program: Program) -> None:
    layers, steps = _layers(program), _steps(program)
    out(f"{source}: {program!r}")
    out("")
    table(
        ("layer", "kind", "shape", "role", "tied with"),
        [(each["path"], each["kind"], each["shape"], each["role"], ", ".join(each["tied"])) for each in layers],
    )
    out("")
    for each in steps:
        options = ", ".join(f"{name}={value}" for name, value in each["options"].items())
        out(f"step {each['number']}: {each['pass']}({options}), {each['added']:,} parameters added")
    out("" if steps else "no pass was applied")
    out(str(rewriter.report(program)))


def _layers(program: Program) -> list[dict[str, Any]]:
    from rewriter.quantised import weight_like
    from rewriter.view import layers

    roles = _roles(program)
    return [
        {
            "path": site.path,
            "kind": site.kind,
            "shape": list(weight_like(program, site).shape),
            "tied": list(site.tied),
            "role": roles.get(site.path, ""),
        }
        for site in layers(program).values()
    ]


def _roles(program: Program) -> dict[str, str]:
    """Path of a layer -> what it is to an attention: `query`, or `query+key+value` for a fused one."""
    from rewriter.attention import attentions
    from rewriter.find import projections

    roles: dict[str, dict[str, None]] = {}
    for attention in attentions(program):
        for role in ("query", "key", "value", "output"):
            for site in projections(attention, role):
                roles.setdefault(site.path, {})[role] = None
    return {path: "+".join(names) for path, names in roles.items()}


def _steps(program: Program) -> list[dict[str, Any]]:
    tensors = program.tensors
    return [
        {
            "number": step.number,
            "pass": step.name,
            "options": dict(step.options),
            "added": sum(math.prod(tensors[name].shape) for name in step.added if name in tensors),
        }
        for step in program.steps
    ]
