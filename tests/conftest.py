"""What every test can ask for.

`program` is a traced tiny model, chosen by `@pytest.mark.parametrize("program", ["llama", "gpt2"], indirect=True)`.
`golden` compares a text with the file of that name under `tests/golden`; `pytest --update-golden` writes the files.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from rewriter.program import Program
from tests.models import traced

GOLDEN = Path(__file__).resolve().parent / "golden"

torch.set_num_threads(max(1, min(4, torch.get_num_threads())))


@pytest.fixture(autouse=True)
def _quiet() -> object:
    """Libraries warn about their own internals; a warning of ours is asserted where it is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(torch|transformers|onnx|onnxscript|copyreg|peft)\b.*")
        yield


@pytest.fixture(scope="session")
def program(request: pytest.FixtureRequest) -> Program:
    """The traced tiny model named by the parameter; the tiny Llama without one."""
    return traced(getattr(request, "param", "llama"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write expected texts in place of comparing them")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: the text is what `tests/golden/<name>` holds."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / name
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.is_file(), f"{name} is not there yet: run pytest --update-golden"
        assert text == file.read_text(encoding="utf-8")

    return compare
