"""Every code block of the README is run, in order, in an empty directory; `--update-golden` writes the real output."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "118")
    text, names = README.read_text(), {"__name__": "readme"}
    run = {"python": _python, "console": _console, "sh": _make}
    actual = BLOCK.sub(lambda block: f"```{block[1]}\n{run[block[1]](block[2], names)}```", text)
    if request.config.getoption("--update-golden", default=False):
        README.write_text(actual)
    else:
        assert _settled(actual) == _settled(text)


def _python(code: str, names: dict[str, Any]) -> str:
    exec(compile(code, "README.md", "exec"), names)
    return code


def _make(code: str, names: dict[str, Any]) -> str:
    """The two commands make an environment of their own: that they exist is checked; what they run has own tests."""
    targets = (ROOT / "Makefile").read_text()
    for line in code.splitlines():
        assert re.search(rf"^{line.removeprefix('make ')}:", targets, re.MULTILINE), line
    return code


def _console(session: str, names: dict[str, Any]) -> str:
    from rewriter.cli import main

    shown = []
    for line in session.splitlines():
        if line.startswith("$ rewriter "):
            result = CliRunner().invoke(main, shlex.split(line)[2:], prog_name="rewriter")
            shown += [line, *(printed.rstrip() for printed in result.output.rstrip().splitlines())]
    return "".join(f"{line}\n" for line in shown)


def _settled(text: str) -> str:
    """Without what differs from run to run: times, rounding errors, and the spaces around them."""
    text = re.sub(r"\d+(\.\d+)?e-\d+", "#e-#", text)
    text = re.sub(r"\b\d+\.\d+( s\b|(?=\s+(#e-#|none|\d+\.\d+ free)))", "#", text)
    return re.sub(r"[ ─━]+", " ", text)
