"""What each pass does to a small model, as a reader sees it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import rewriter
from passes import Lora, Merge
from rewriter.program import Program
from rewriter.transform import Pass
from tests.models import Perceptron, randomise, traced

Golden = Callable[[str, str], None]


def adapted(name: str, pass_: Pass) -> Program:
    """A trained adapter whose numbers are the same on every machine: the differences print three digits."""
    program = rewriter.apply(traced(name), pass_).program
    values = {
        name: (torch.arange(program.tensor(name).numel()) % 7 - 3).reshape(program.tensor(name).shape) / 8
        for step in program.steps
        for name in step.added
    }
    return program.with_tensors(values)


LORA = {
    "lora": ("mlp", Lora(targets=("up", "down"), rank=4, alpha=7)),
    "lora_dora": ("mlp", Lora(targets=("up",), rank=4, alpha=7, dora=True)),
    "lora_bias_dropout": ("mlp", Lora(targets=("down",), rank=4, lora_bias=True, dropout=0.1, rslora=True)),
    "lora_conv": ("conv", Lora(targets=("grouped", "signal", "classes"), rank=4)),
    "lora_slices": ("gpt2", Lora(targets=("h.1.attn.c_attn",), rank=4, enable=("q", "v"))),
    "lora_llama": ("llama", Lora(targets=("q_proj", "v_proj"), rank=4)),
}


@pytest.mark.parametrize("case", LORA)
def test_what_lora_adds(case: str, golden: Golden) -> None:
    name, pass_ = LORA[case]
    golden(f"{case}.diff", str(rewriter.diff(traced(name), rewriter.apply(traced(name), pass_).program)))


@pytest.mark.parametrize("case", ["lora", "lora_dora", "lora_slices"])
def test_what_merge_removes(case: str, golden: Golden) -> None:
    name, pass_ = LORA[case]
    before = adapted(name, pass_)
    golden(f"merge_{case}.diff", str(rewriter.diff(before, rewriter.apply(before, Merge()).program)))


def test_what_merge_leaves_of_a_hand_written_layer(golden: Golden) -> None:
    class Hand(Perceptron):
        def __init__(self) -> None:
            super().__init__()
            self.A, self.B = torch.nn.Parameter(torch.zeros(4, 10)), torch.nn.Parameter(torch.zeros(22, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.norm(torch.relu(self.up(x) + 1.75 * (x @ self.A.t() @ self.B.t())))
            return self.head(x + self.down(self.dropout(hidden)))

    before = rewriter.trace(randomise(Hand()), (torch.ones(3, 5, 10),))
    golden("merge_by_hand.diff", str(rewriter.diff(before, rewriter.apply(before, Merge()).program)))


def test_undo_leaves_no_difference(golden: Golden) -> None:
    for name, pass_ in LORA.values():
        after = rewriter.undo(rewriter.apply(traced(name), pass_).program)
        golden("undo.diff", str(rewriter.diff(traced(name), after)))
