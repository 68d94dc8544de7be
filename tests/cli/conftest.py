"""The command line in this process, and tiny models in an empty working directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rewriter.cli import main
from tests.models import llama, traced

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny Llama as `model.pt` and as the Hugging Face directory `llama`, and a perceptron."""
    folder = tmp_path_factory.mktemp("models")
    traced("llama").save(folder / "model.pt")
    traced("mlp").save(folder / "mlp.pt")  # for what does not depend on the model: it is ten times faster
    llama()[0].save_pretrained(folder / "llama")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `model.pt`, `llama` and `mlp.pt` in it."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run() -> Run:
    """`run("apply", ...)`: what the command line gives; `code=` is the expected exit code."""

    def call(*arguments: str | os.PathLike[str], code: int = 0) -> Result:
        result = CliRunner(env={"COLUMNS": "80"}).invoke(
            main, [os.fspath(each) for each in arguments], prog_name="rewriter"
        )
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    return call
