"""What every test can ask for.

`program` is a traced tiny model, chosen by `@pytest.mark.parametrize("program", ["llama", "gpt2"], indirect=True)`.
"""

from __future__ import annotations

import os
import warnings

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from rewriter.program import Program
from tests.models import traced

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
