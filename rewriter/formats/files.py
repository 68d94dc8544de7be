"""Opening what a user named: only regular files, without waiting for anything, and noticing when one changes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rewriter.errors import RewriteError, closest


def status(path: Path) -> os.stat_result:
    """The status of what a path names, links followed; `RewriteError` when there is nothing to look at."""
    try:
        return path.stat()
    except FileNotFoundError:
        raise RewriteError(f"{path} does not exist", evidence=_similar(path), fix="Check the path.") from None
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; devices, pipes and directories are refused before anything is read."""
    mode = status(path).st_mode
    if stat.S_ISDIR(mode):
        raise RewriteError(f"{path} is a directory, a file was expected", fix="Name the file inside it.")
    if not stat.S_ISREG(mode):
        raise RewriteError(f"{path} is a {_special(mode)}, not a regular file", fix="Copy the data to a file first.")
    try:
        # The path may have become a pipe since it was looked at: opening one without this flag waits for a writer.
        return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    except OSError as error:
        raise _unusable(path, error) from None


@contextmanager
def unchanged(path: Path) -> Iterator[os.stat_result]:
    """Read a file inside this block; `RewriteError` at its end when the file changed meanwhile."""
    before = status(path)
    try:
        yield before
    finally:
        # Raised also over an error of the reader, which then only describes half of an old and half of a new file.
        try:
            after: os.stat_result | None = path.stat()
        except OSError:
            after = None
        if after is None or _identity(after) != _identity(before):
            happened = "disappeared" if after is None else "changed"
            raise RewriteError(f"{path} {happened} while it was read", fix="Run again when nothing writes to it.")


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _similar(path: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return [f"the directory {path.parent} does not exist either"]
    near = closest(path.name, names) or [name for name in names if Path(name).stem == path.stem]
    return [f"similar: {path.parent / name}" for name in near]


def _special(mode: int) -> str:
    kinds = {stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "special file")


def _unusable(path: Path, error: OSError | ValueError) -> RewriteError:
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return RewriteError(f"{path} is a symbolic link that leads back to itself", fix="Remove or correct the link.")
    if isinstance(error, PermissionError):
        return RewriteError(f"{path} may not be read by this user", fix="Change its permissions or copy it.")
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return RewriteError(f"{str(path)!r} cannot be opened: {reason}", fix="Check the path.")
