"""The group of verbs, and how every run of it ends: one readable message and an exit code."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import click

from rewriter.cli.output import close_quietly, note, safe_streams
from rewriter.errors import RewriteError, RewriteWarning

VERBS = ("trace", "passes", "inspect", "show", "plan", "apply", "merge", "undo", "extract", "diff", "verify", "export")
OURS = ("rewriter", "passes", "runtime")
INTERRUPTED = 130
TERMINATED = 128 + signal.SIGTERM


@dataclass(slots=True)
class State:
    """What a run knows of itself before its command line is parsed."""

    verbose: bool = False


class Verbs(click.Group):
    """A group whose commands are imported when they are named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"rewriter.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in VERBS:
            raise click.exceptions.NoSuchCommand(name, possibilities=VERBS, ctx=ctx)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run and exit; `standalone_mode` has no effect."""
        extra["standalone_mode"] = False
        state = State()
        with ExitStack() as stack:
            stack.enter_context(safe_streams())
            stack.enter_context(_terminating())
            stack.enter_context(_warning())
            try:
                code = super().main(*args, obj=state, **extra)
                sys.stdout.flush()
            except BrokenPipeError:
                close_quietly()
                code = 1
            except Exception as error:  # noqa: BLE001 - the last place: everything ends as a message and a code
                code = _report(error, state)
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception, state: State) -> int:
    """Tell what went wrong on stderr; returns the exit code."""
    if isinstance(error, click.Abort):
        note("interrupted")
        return INTERRUPTED
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show(sys.stderr)
        return error.exit_code
    if state.verbose:
        note(*"".join(traceback.format_exception(error)).splitlines())
    if isinstance(error, RewriteError):
        note(f"error: {error}")
        return error.exit_code
    if isinstance(error, click.ClickException):
        note(f"error: {error.format_message()}")
        ctx = getattr(error, "ctx", None)
        if ctx is not None:
            note(f"`{ctx.command_path} --help` tells what it takes.")
        return error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] not in OURS:
        note(f"error: {error.name} is not installed", "Install what rewriter needs: pip install 'rewriter[cpu]'")
        return 1
    first = str(error).strip().partition("\n")[0]
    note(f"error: unexpected {type(error).__name__}{': ' * bool(first)}{first}")
    if not state.verbose:
        note("Run it again with -v to see where.")
    return 1


@contextmanager
def _terminating() -> Iterator[None]:
    """Let SIGTERM leave through every `with` and `finally`, as an interrupt does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _warning() -> Iterator[None]:
    """Show our own warnings as one line each, once; those of libraries are about their internals."""
    seen: set[str] = set()

    def show(message: Warning | str, *_place: Any, **_more: Any) -> None:
        text = f"warning: {message}"
        if text not in seen:
            seen.add(text)
            note(text)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", RewriteWarning)
        warnings.showwarning = show
        yield
