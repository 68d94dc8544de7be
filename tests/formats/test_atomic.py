"""Outputs are whole or absent, whatever interrupts the run that writes them."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest

from rewriter.errors import RewriteError
from rewriter.formats import atomic
from rewriter.formats.atomic import write_directory, write_file

Writer = Callable[..., AbstractContextManager[Path]]
ROOT = Path(__file__).parents[2]
WRITERS = [write_file, write_directory]


def fill(writer: Writer, partial: Path, text: str) -> None:
    if writer is write_file:
        partial.write_text(text)
    else:
        (partial / "inner").mkdir()
        (partial / "inner" / "data").write_text(text)
        (partial / "config").write_text(text)


def content(path: Path) -> set[str]:
    files = [path] if path.is_file() else [path / "inner" / "data", path / "config"]
    return {file.read_text() for file in files}


def write_and_raise(writer: Writer, path: Path, error: BaseException) -> None:
    with writer(path, overwrite=True) as partial:
        fill(writer, partial, "new")
        raise error


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["model.pt", "-a b\nü", "n" * 255])
def test_an_output_appears_at_the_end(tmp_path: Path, writer: Writer, name: str) -> None:
    path = tmp_path / name
    for text, overwrite in (("one", False), ("two", True)):
        with writer(path, overwrite=overwrite) as partial:
            fill(writer, partial, text)
            assert not path.exists() or content(path) == {"one"}
        assert content(path) == {text}
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("existing", [True, False])
def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, writer: Writer, error: type[BaseException], existing: bool
) -> None:
    path = tmp_path / "out"
    if existing:
        with writer(path) as partial:
            fill(writer, partial, "old")
    with pytest.raises(error):
        write_and_raise(writer, path, error())
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    assert not existing or content(path) == {"old"}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said(tmp_path: Path, writer: Writer, number: int) -> None:
    with pytest.raises(RewriteError, match="no space left"):
        write_and_raise(writer, tmp_path / "out", OSError(number, os.strerror(number)))
    assert not list(tmp_path.iterdir())


def _made(path: Path, kind: str) -> Path:
    if kind == "file":
        path.write_text("old")
    else:
        path.mkdir()
        (path / "inside").write_text("old")
    return path


def _link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


# what is made first, what is asked for, what is said
REFUSED: list[tuple[str, Callable[[Path], AbstractContextManager[Path]], str]] = [
    ("file exists", lambda at: write_file(_made(at / "o", "file")), "already exists"),
    ("directory exists", lambda at: write_directory(_made(at / "o", "directory")), "already exists"),
    ("dangling link", lambda at: write_file(_link(at / "o", at / "nowhere")), "already exists"),
    ("directory for a file", lambda at: write_file(_made(at / "o", "directory"), overwrite=True), "is a directory"),
    ("file for a directory", lambda at: write_directory(_made(at / "o", "file"), overwrite=True), "is a file"),
    ("input", lambda at: write_file(_made(at / "o", "file"), inputs=[at / "o"], overwrite=True), "is an input"),
    (
        "link to an input",
        lambda at: write_file(_link(at / "l", _made(at / "o", "file")), inputs=[at / "o"], overwrite=True),
        "is an input",
    ),
    ("input of another spelling", lambda at: write_file(at / "x" / ".." / "o", inputs=[at / "o"]), "is an input"),
    (
        "directory of an input",
        lambda at: write_directory(_made(at / "o", "directory"), inputs=[at / "o" / "inside"], overwrite=True),
        "lies in it",
    ),
    ("directory of this run", lambda at: write_directory(Path.cwd().parent, overwrite=True), "lies in it"),
    ("no parent", lambda at: write_file(at / "a" / "b"), "does not exist"),
    ("nothing written", lambda at: write_file(at / "o"), "nothing was written"),
]


@pytest.mark.parametrize(("ask", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refusals_leave_everything_as_it_was(
    tmp_path: Path, ask: Callable[[Path], AbstractContextManager[Path]], message: str
) -> None:
    with pytest.raises(RewriteError, match=message) as caught, ask(tmp_path):
        pass
    assert caught.value.fix
    assert all(not entry.name.startswith(".") for entry in tmp_path.iterdir())
    assert all(entry.read_text() == "old" for entry in tmp_path.rglob("*") if entry.is_file())


def test_an_output_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(RewriteError, match="already exists"), write_file(path) as partial:
        shutil.copy(_made(path, "file"), partial)
    assert path.read_text() == "old"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RewriteError, match="cannot be written"), write_file(tmp_path / "out"):
        pass


@pytest.mark.parametrize("writer", WRITERS)
def test_a_second_run_is_refused_while_the_first_writes(tmp_path: Path, writer: Writer) -> None:
    path = tmp_path / "out"
    with writer(path) as partial:
        fill(writer, partial, "first")
        with pytest.raises(RewriteError, match="another run is writing"), writer(path):
            pass
        assert partial.exists()
    assert content(path) == {"first"}


def _write_often(path: str, directory: bool, text: str, seconds: float) -> None:
    writer: Any = write_directory if directory else write_file
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(RewriteError), writer(Path(path), overwrite=True) as partial:
            fill(writer, partial, text * 2000)


@pytest.mark.parametrize("writer", WRITERS)
def test_runs_at_the_same_time_do_not_mix(tmp_path: Path, writer: Writer) -> None:
    path = tmp_path / "out"
    context = multiprocessing.get_context("spawn")
    arguments = [(str(path), writer is write_directory, text, 1.0) for text in "abc"]
    processes = [context.Process(target=_write_often, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert content(path) in [{text * 2000} for text in "abc"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_killed_run_left_is_cleared(tmp_path: Path, writer: Writer, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".out.partial-999999").mkdir()
    (tmp_path / ".out.partial-999998").write_text("half")
    (tmp_path / ".other.partial-999998").write_text("not ours")
    (tmp_path / ".out.lock").touch()
    with writer(tmp_path / "out") as partial:
        fill(writer, partial, "new")
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", ".other.partial-999998"}
    assert "left by a killed run" in caplog.text


def test_an_interrupted_replacement_is_undone(tmp_path: Path) -> None:
    path = _made(tmp_path / ".out.replaced-999999", "directory")
    with pytest.raises(KeyboardInterrupt), write_directory(tmp_path / "out", overwrite=True):
        raise KeyboardInterrupt
    assert not path.exists()
    assert (tmp_path / "out" / "inside").read_text() == "old"


def test_directories_are_replaced_where_the_system_cannot_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    test_an_output_appears_at_the_end(tmp_path, write_directory, "out")


KILLED = """
import sys
from pathlib import Path
from rewriter.formats.atomic import write_directory, write_file
path, kind, size = Path(sys.argv[1]), sys.argv[2], 200_000
print("ready", flush=True)
for text in "ab" * 100_000:
    if kind == "file":
        with write_file(path, overwrite=True) as partial:
            partial.write_text(text * size)
    else:
        with write_directory(path, overwrite=True) as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / "data").write_text(text * size)
            (partial / "config").write_text(text * size)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("writer", WRITERS)
def test_killing_at_any_moment_leaves_a_whole_output(tmp_path: Path, writer: Writer) -> None:
    path = tmp_path / "out"
    chosen = random.Random(7)
    for _ in range(6):
        run = [sys.executable, "-c", KILLED, str(path), "file" if writer is write_file else "directory"]
        process = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chosen.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if path.exists():
            assert content(path) in ({"a" * 200_000}, {"b" * 200_000})
    with writer(path, overwrite=True) as partial:
        fill(writer, partial, "last")
    assert content(path) == {"last"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_what_is_written_has_the_permissions_of_any_new_file(writer: Writer, mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with writer(tmp_path / "out") as partial:
            fill(writer, partial, "new")
            for entry in [partial, *partial.rglob("*")]:
                entry.chmod(0o700 if entry.is_dir() else 0o600)
    finally:
        assert os.umask(before) == mask
    written = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(written) == (1 if writer is write_file else 4)
    for entry in written:
        assert stat.S_IMODE(entry.stat().st_mode) == (0o777 if entry.is_dir() else 0o666) & ~mask
