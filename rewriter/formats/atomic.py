"""Outputs that appear complete or not at all: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rewriter.errors import RewriteError

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux
_HERE = -100  # AT_FDCWD


@contextmanager
def write_file(path: Path, *, inputs: Sequence[Path] = (), overwrite: bool = False) -> Iterator[Path]:
    """Write a file under the yielded name; it takes the name `path` at the end of the block, and nothing is left
    when the block raises.

    Raises `RewriteError` when `path` is one of `inputs`, exists (unless `overwrite`), is being written by another run,
    or when the disk refuses or is full.
    """
    if path.is_dir():
        raise RewriteError(f"{path} is a directory, a file is to be written", fix="Name a file inside it.")
    with _partial(path, inputs, overwrite) as partial:
        yield partial
        if not partial.is_file():
            raise RewriteError(f"nothing was written for {path}", fix="Report this as a bug.")
        _give_usual_mode(partial)
        _flush(partial)
        _refuse_existing(path, overwrite)
        partial.replace(path)


@contextmanager
def write_directory(path: Path, *, inputs: Sequence[Path] = (), overwrite: bool = False) -> Iterator[Path]:
    """Fill the yielded directory; it takes the name `path` at the end of the block, whole, and nothing is left when
    the block raises. With `overwrite` it replaces the directory there in one step where the system can.

    Raises `RewriteError` as `write_file`, and when `path` holds one of `inputs` or the working directory.
    """
    if path.exists() and not path.is_dir():
        raise RewriteError(f"{path} is a file, a directory is to be written", fix="Choose another output.")
    for inside in (*inputs, Path.cwd()):
        if path.exists() and path.resolve() in inside.resolve().parents:
            raise RewriteError(f"{path} would be replaced, but {inside} lies in it", fix="Choose another output.")
    with _partial(path, inputs, overwrite) as partial:
        partial.mkdir()
        yield partial
        for entry in [*sorted(partial.rglob("*")), partial]:
            _give_usual_mode(entry)
            _flush(entry)
        _refuse_existing(path, overwrite)
        _swap(partial, path)


@contextmanager
def _partial(path: Path, inputs: Sequence[Path], overwrite: bool) -> Iterator[Path]:
    for source in inputs:
        if path.resolve() == source.resolve() or (path.exists() and source.exists() and path.samefile(source)):
            raise RewriteError(f"{path} is an input of this run and would be replaced", fix="Choose another output.")
    _refuse_existing(path, overwrite)
    partial = _beside(path, f"partial-{os.getpid()}")
    with _lock(path):
        try:
            _recover(path)
            yield partial
            _flush(path.parent)
        except OSError as error:
            if error.errno not in (*_FULL, errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise _unwritable(path, error) from error
        finally:
            _remove(partial)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(path):
        raise RewriteError(f"{path} already exists", fix="Choose another output, or allow it to be overwritten.")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the right to write `path`; the system gives it back when the process dies."""
    if not path.parent.is_dir():
        raise RewriteError(f"the directory {path.parent} does not exist", fix="Create it first.")
    lock = FileLock(_beside(path, "lock"), timeout=0, is_singleton=False)
    try:
        lock.acquire()
    except Timeout:
        raise RewriteError(f"another run is writing {path}", fix="Wait for it, or choose another output.") from None
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        yield
    finally:
        # Removed while it is still held: whoever waits for the old file finds it gone and tries the new one.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _recover(path: Path) -> None:
    """Clear what killed runs left beside `path`. The lock is held, so none of it belongs to a living one."""
    for old in _left_beside(path, "replaced"):
        if path.exists():
            _remove(old)
        else:
            _log.warning("restored %s, which a killed run was replacing", path)
            old.rename(path)
    for stale in _left_beside(path, "partial"):
        _log.warning("removed %s, left by a killed run", stale)
        _remove(stale)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{_short(path.name)}.{suffix}")


def _left_beside(path: Path, word: str) -> list[Path]:
    start = f".{_short(path.name)}.{word}-"
    return [entry for entry in path.parent.iterdir() if entry.name.startswith(start)]


def _short(name: str) -> str:
    """The name itself, or a shorter one as good as unique where the ending would pass the system's 255 bytes."""
    if len(os.fsencode(name)) <= 200:
        return name
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _give_usual_mode(path: Path) -> None:
    """Give a file or directory the permissions of any new one: libraries write through temporary files of mode 600."""
    if path.is_symlink() or os.name == "nt":
        return
    mask = os.umask(0o077)  # it can only be read by setting it; a file of another thread is never made too open
    os.umask(mask)
    mode = path.stat().st_mode
    # the bits above are the system's, such as the group that a directory hands on
    usual = (mode & 0o7000) | ((0o777 if path.is_dir() else 0o666) & ~mask)
    if stat.S_IMODE(mode) != usual:
        with suppress(OSError):  # a file system without permissions
            path.chmod(usual)


def _flush(path: Path) -> None:
    if path.is_symlink() or (os.name == "nt" and path.is_dir()):
        return
    number = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _swap(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
    elif _exchange(partial, path):
        _remove(partial)  # which is the old directory now
    else:
        old = _beside(path, f"replaced-{os.getpid()}")
        path.rename(old)
        try:
            partial.rename(path)
        except BaseException:
            old.rename(path)
            raise
        _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Give two paths each other's content in one step; False where the system or file system has no such call."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0)


def _unwritable(path: Path, error: OSError) -> RewriteError:
    if error.errno in _FULL:
        return RewriteError(
            f"no space left while writing {path}", evidence=[str(error)], fix="Free space and run again."
        )
    return RewriteError(
        f"{path} cannot be written: {error.strerror}", fix="Choose an output in a directory you may write to."
    )
