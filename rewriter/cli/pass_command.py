"""A command with passes: `--pass NAME` followed by the options of that pass, as often as wanted."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rewriter.errors import UsageError, closest

if TYPE_CHECKING:
    from rewriter.cli.registry import Entry
    from rewriter.transform import Pass

KEY = "rewriter.passes"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A pass that was named, and the part of the command line that belongs to it."""

    entry: Entry
    tokens: list[str] = field(default_factory=list)

    def build(self, ctx: click.Context) -> Pass:
        """The pass with its options."""
        options = click.Command(None, params=[each.option() for each in self.entry.fields], add_help_option=False)
        inner = click.Context(options, info_name=f"--pass {self.entry.name}", parent=ctx)
        options.parse_args(inner, list(self.tokens))
        given = {name: value for name, value in inner.params.items() if value is not None}
        return self.entry.kind(**given)


class PassCommand(click.Command):
    """A command whose line may name passes; the verb finds them with `chosen_passes`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for each in self.get_params(ctx) for name in (*each.opts, *each.secondary_opts)}
        rest, ctx.meta[KEY] = _split(list(args), own)
        return super().parse_args(ctx, rest)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        for chosen in ctx.meta.get(KEY, ()):
            with formatter.section(f"Options of {chosen.entry.name}, after --pass {chosen.entry.name}"):
                records = (each.option().get_help_record(ctx) for each in chosen.entry.fields)
                formatter.write_dl([record for record in records if record])
            formatter.write_paragraph()
            for line in chosen.entry.description.splitlines():
                formatter.write(f"  {line}".rstrip() + "\n")


def chosen_passes(ctx: click.Context) -> tuple[Pass, ...]:
    """The passes of the command line, in order, with their options."""
    return tuple(chosen.build(ctx) for chosen in ctx.meta[KEY])


def _split(args: list[str], own: Collection[str]) -> tuple[list[str], list[Chosen]]:
    """Take the passes and their options out of a command line."""
    rest: list[str] = []
    chosen: list[Chosen] = []
    tokens = iter(args)
    for token in tokens:
        name, equals, value = token.partition("=")
        if token == "--":
            rest += [token, *tokens]
        elif name in ("--pass", "--adapter"):
            chosen.append(_choose(name, value if equals else _value(name, tokens)))
        elif chosen and (known := _option(chosen[-1], name)) is not None:
            mine = chosen[-1].tokens
            if name in mine:
                raise UsageError(f"{name} is given twice to {chosen[-1].entry.name}", fix="Give it once.")
            # The name and its value as two tokens, whatever the spelling, so that a name is seen again.
            mine += [name] if known else [name, value if equals else _value(name, tokens)]
        elif chosen and name.startswith("--") and name not in own:
            raise _unknown(name, chosen[-1], own)
        elif not chosen and name.startswith("--") and name not in own and "--pass" in args:
            raise UsageError(f"{name} stands before every --pass", fix="The options of a pass follow its --pass.")
        else:
            rest.append(token)
    return rest, chosen


def _choose(name: str, value: str) -> Chosen:
    from rewriter.cli.registry import entry
    from rewriter.formats.sniff import Kind, sniff

    if name == "--adapter":  # short for the pass that reads such a directory
        is_adapterhub = Path(value).is_dir() and sniff(Path(value)) is Kind.ADAPTERHUB
        return Chosen(entry("adapterhub" if is_adapterhub else "peft"), ["--directory", value])
    return Chosen(entry(value))


def _value(name: str, tokens: Iterator[str]) -> str:
    value = next(tokens, None)
    if value is None:
        raise click.BadOptionUsage(name, f"Option {name!r} requires an argument.")
    return value


def _option(chosen: Chosen, name: str) -> bool | None:
    """Whether the option of a pass is a flag; None when the pass has no such option."""
    for each in chosen.entry.fields:
        if name == each.flag:
            return each.is_flag
        if each.is_flag and name == f"--no-{each.flag.removeprefix('--')}":
            return True
    return None


def _unknown(name: str, chosen: Chosen, own: Collection[str]) -> UsageError:
    options: list[Any] = [each.flag for each in chosen.entry.fields]
    near = closest(name, [*options, *own], 3)
    return UsageError(
        f"the pass {chosen.entry.name} has no option {name}",
        evidence=[f"closest: {', '.join(near)}" if near else f"its options: {', '.join(options)}"],
        fix=f"`rewriter apply --pass {chosen.entry.name} --help` explains them.",
    )
