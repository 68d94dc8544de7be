"""Options that several verbs share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import rewriter
from rewriter.cli.output import working
from rewriter.errors import RewriteError

if TYPE_CHECKING:
    from rewriter.program import Program

F = TypeVar("F", bound=Callable[..., Any])
Load = Callable[..., "Program"]


def _set_verbose(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().obj.verbose = True


verbosity = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, callback=_set_verbose, help="Show the traceback of an error."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON (schema 1) in place of text.")
overwriting = click.option("--overwrite", is_flag=True, help="Replace an output that exists.")


def output(text: str) -> Callable[[F], F]:
    """`-o`, with what happens without it."""
    return click.option("-o", "--output", type=click.Path(path_type=Path), help=f"Where to write. Default: {text}.")


def loading(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every verb that reads models, given to it as `load(source) -> Program`."""

    @click.option("--model", metavar="MODEL", help="The model that weights belong to: a directory or package:factory.")
    @click.option("--architecture", metavar="CLASS", help="The class of transformers, where config.json names none.")
    @click.option("--trust-pickle", is_flag=True, help="Allow files that execute code when they are read.")
    @click.option("--no-verify", "verify", is_flag=True, default=True, flag_value=False, help="Skip checksums.")
    @functools.wraps(function)
    def wrapped(
        *args: Any, model: str | None, architecture: str | None, trust_pickle: bool, verify: bool, **kwargs: Any
    ) -> Any:
        def load(source: str, **more: Any) -> Program:
            with working(f"reading {source}"):
                return rewriter.load(
                    source, model=model, architecture=architecture, trust_pickle=trust_pickle, verify=verify, **more
                )

        return function(*args, load=load, **kwargs)

    return wrapped


def beside(source: str, *words: str, suffix: str = ".pt") -> Path:
    """The default output: `model.pt`, `lora` -> `model.lora.pt`, in the place of the input."""
    path = Path(source)
    if not path.exists():  # package.module:factory
        return Path(".".join([source.rpartition(":")[2], *words]) + suffix)
    stem = path.resolve().name if path.is_dir() else path.stem
    return path.parent / (".".join([stem, *words]) + suffix)


def free(path: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> Path:
    """The path of an output, refused before the work when it is there already or would replace an input."""
    for source in inputs:
        if path.exists() and (path.samefile(source) or path.resolve() in source.resolve().parents):
            raise RewriteError(f"{path} is an input of this run and would be replaced", fix="Choose another with -o.")
    if path.exists() and not overwrite:
        raise RewriteError(f"{path} already exists", fix="Choose another output with -o, or add --overwrite.")
    return path


def existing(*sources: str | Path | None) -> list[Path]:
    """The inputs that are files or directories, none of which an output may replace."""
    return [Path(source) for source in sources if source is not None and Path(source).exists()]
