"""The command line as a process: what is imported, signals, pipes, encodings, terminals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from rewriter.cli import group, main, output
from rewriter.errors import LawError, RewriteError, RewriteWarning, UnsafeError, UsageError
from tests.cli.conftest import Run

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}


def _process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        check=False,
        text=True,
        encoding=environment.get("PYTHONIOENCODING", "utf-8"),
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["apply", "--help"], ["nonsense"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom rewriter.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    )
    assert _process(code).returncode == 0, _process(code).stderr


def _failing(error: BaseException) -> None:
    @click.command(cls=group.Verbs, invoke_without_command=True)
    def fails() -> None:
        raise error

    fails.main([], prog_name="rewriter")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RewriteError("no", evidence=["seen"], fix="Do it."), 1, "error: no\n  seen\nDo it.\n"),
        (UsageError("no"), 2, "error: no\n"),
        (UnsafeError("no"), 3, "error: no\n"),
        (LawError("no"), 4, "error: no\n"),
        (ValueError("odd\nmore"), 1, "error: unexpected ValueError: odd\nRun it again with -v to see where.\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (RewriteError("a\x1b[31mb\x07"), 1, "error: a\\x1b[31mb\\x07\n"),
        (ModuleNotFoundError(name="onnxruntime"), 1, "error: onnxruntime is not installed\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_end_is_a_message_and_a_code(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        _failing(error)
    assert end.value.code == code
    assert capsys.readouterr().err.startswith(text)


def test_a_traceback_only_when_asked(folder: Path, run: Run) -> None:
    assert "Traceback" not in run("inspect", "absent.pt", code=1).stderr
    for arguments in (["-v", "inspect", "absent.pt"], ["inspect", "-v", "absent.pt"]):
        assert "Traceback" in run(*arguments, code=1).stderr


def test_our_warnings_are_shown_once_and_others_never(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command(cls=group.Verbs, invoke_without_command=True)
    def warns() -> None:
        for _ in range(2):
            warnings.warn("mind this", RewriteWarning, stacklevel=1)
            warnings.warn("an internal of a library", UserWarning, stacklevel=1)

    with pytest.raises(SystemExit):
        warns.main([], prog_name="rewriter")
    assert capsys.readouterr().err == "warning: mind this\n"


def test_a_reader_that_leaves_is_no_error(folder: Path) -> None:
    code = "from rewriter.cli import main; main(['inspect', 'mlp.pt', '--text'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_an_encoding_without_our_letters() -> None:
    code = "from rewriter.cli import main; main(['apply', '--pass', 'lora', '--help'])"
    done = _process(code, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert "y = x W\\u1d40 + b" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process can handle")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_through_every_finally(number: int, code: int, tmp_path: Path) -> None:
    waiting = (
        "import sys, time, click\nfrom pathlib import Path\nfrom rewriter.cli.group import Verbs\n"
        "from rewriter.formats.atomic import write_file\n"
        "@click.command(cls=Verbs, invoke_without_command=True)\n"
        "def waits():\n    with write_file(Path('out.pt')) as partial:\n        partial.write_bytes(b'half')\n"
        "        print('ready', flush=True)\n        time.sleep(60)\nwaits.main([])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", waiting], env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"ready"
        process.send_signal(number)
        _, shown = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


class _Terminal:
    """A stream that says it is a terminal and keeps what is written."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_colours_and_widths_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    output.coloured("+added\n-removed\n same\n")
    assert terminal.text.startswith("\x1b[32m+added\x1b[0m\n\x1b[31m-removed\x1b[0m\n same\n")
    terminal.text = ""
    output.table(("name", "a long title", "number"), [("a.very.long.path.of.a.layer", "\x1b[2J[bold]x", 3)], right=(2,))
    assert "\x1b[2J" not in terminal.text
    assert all(len(click.unstyle(line)) <= 20 for line in terminal.text.splitlines())


def test_numbers_that_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    output.write_json({"a": [float("nan"), float("inf")], "b": {"c": -0.5}})
    assert capsys.readouterr().out.replace(" ", "").replace("\n", "") == (
        '{"schema":1,"a":["nan","inf"],"b":{"c":-0.5}}'
    )


def test_without_arguments_the_help_is_shown() -> None:
    result = CliRunner().invoke(main, [], prog_name="rewriter")
    assert result.exit_code == 2
    assert "Commands:" in result.output
