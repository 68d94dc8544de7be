"""What leaves a verb: text and JSON on stdout, notes on stderr; nothing in it that a terminal would obey."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import click

SCHEMA = 1
STYLES = {"+": "green", "-": "red", "@": "cyan"}


def out(text: str) -> None:
    """Write lines to stdout."""
    for line in text.removesuffix("\n").split("\n"):
        _write(sys.stdout, _safe(line))


def note(*texts: str) -> None:
    """Write lines to stderr."""
    for text in texts:
        for line in text.split("\n"):
            _write(sys.stderr, _safe(line))


def coloured(text: str) -> None:
    """Write a diff to stdout, in colours when it is a terminal."""
    for line in text.splitlines():
        style = STYLES.get(line[:1])
        _write(sys.stdout, click.style(_safe(line), fg=style) if style and sys.stdout.isatty() else _safe(line))


def write_json(data: Mapping[str, Any]) -> None:
    """Write one JSON document of our schema to stdout."""
    _write(sys.stdout, json.dumps({"schema": SCHEMA, **_finite(data)}, indent=2, allow_nan=False))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[int] = ()) -> None:
    """Write a table to stdout: as wide as the terminal, or as it needs to be where there is none."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for index, title in enumerate(head):
        made.add_column(Text(title), justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(_safe(str(cell))) for cell in row))
    is_terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, highlight=False, width=None if is_terminal else 100_000)
    with console.capture() as captured:
        console.print(made)
    for line in captured.get().splitlines():
        _write(sys.stdout, line.rstrip())


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on a terminal that something takes time."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(_safe(what))):
        yield


@contextmanager
def safe_streams() -> Iterator[None]:
    """Let stdout and stderr write what their encoding cannot express as escapes, in place of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    yield


def close_quietly() -> None:
    """After a broken pipe: send what is still buffered nowhere, so that the interpreter can end without a word."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(stream: TextIO, line: str) -> None:
    stream.write(f"{line}\n")


def _safe(line: str) -> str:
    """A line without characters that a terminal would obey."""
    if line.isprintable():
        return line
    from rewriter.text import printable

    return printable(line)


def _finite(value: Any) -> Any:
    """Plain data in which numbers that JSON does not have are text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
