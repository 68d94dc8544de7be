"""`rewriter.trace`: the same result whatever ran before, and nothing on stderr but our own error."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rewriter
from rewriter.errors import RewriteError

FRESH = """
import sys

import torch

import rewriter
from tests.models import llama, randomise

model, _, inputs = llama()
names = {"input_ids": inputs["input_ids"]}
if "earlier" in sys.argv:
    rewriter.trace(model)


class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = model

    def forward(self, input_ids):
        return self.inner(input_ids)


for module in (model, Wrapped()):
    program = rewriter.trace(module, kwargs=names)
    print(type(module).__name__, list(program(**names)), list(program.exported.example_inputs[1]))
assert model.config.use_cache
cached = rewriter.trace(model, kwargs={**names, "use_cache": True})
print(sorted(cached(**names, use_cache=True)))
"""


class Branching(nn.Module):
    """Control flow that depends on data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x


class Talking(nn.Module):
    """A model that writes to stderr."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("a word", file=sys.stderr)
        return x + 1


@pytest.mark.parametrize("history", ["fresh", "earlier"])
def test_a_trace_does_not_depend_on_earlier_ones(history: str) -> None:
    command = [sys.executable, "-c", FRESH, history]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "LlamaForCausalLM ['logits'] ['input_ids']",
        "Wrapped ['logits'] ['input_ids']",
        "['logits', 'past_key_values']",
    ]


def test_a_failing_trace_writes_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    with pytest.raises(RewriteError, match="Branching cannot be traced") as caught:
        rewriter.trace(Branching(), (torch.randn(2, 3),))
    assert "data-dependent" in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert logger.level == level


def test_what_a_model_writes_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    rewriter.trace(Talking(), (torch.randn(2, 3),))
    assert "a word\n" in capfd.readouterr().err
