"""The report counts what is there, tied tensors once, and estimates memory as its assumptions say."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from passes.lora import Lora
from passes.nf4 import Nf4
from rewriter.program import Program
from rewriter.report import ASSUMPTIONS, Memory, report
from rewriter.trace import trace
from rewriter.transform import apply
from tests.models import traced

MLP_COUNT = 10 * 22 + 22 + 22 + 22 + 22 * 10 + 10 * 7 + 7


def adapted(program: Program, rank: int = 3) -> Program:
    return apply(program, Lora(rank=rank, targets=("up", "head")), check=False).program


def test_parameters_are_counted() -> None:
    found = report(traced("mlp"))
    assert found.parameters.count == found.parameters.trainable == MLP_COUNT
    assert found.parameters.size_bytes == 4 * MLP_COUNT
    assert found.share == 1.0
    assert {key: amount.count for key, amount in found.by_module.items()} == {
        "up": 242,
        "norm": 44,
        "down": 220,
        "head": 77,
    }
    assert found.by_step == {}


def test_only_the_adapter_trains() -> None:
    found = report(adapted(traced("mlp")))
    added = 3 * (10 + 22) + 3 * (10 + 7)
    assert found.parameters.trainable == added
    assert found.parameters.count == MLP_COUNT + added
    assert found.share == added / (MLP_COUNT + added)
    assert [(key, amount.count, amount.tensors) for key, amount in found.by_step.items()] == [("1 lora", added, 4)]
    assert found.memory["plain"] == Memory(4 * (MLP_COUNT + added), 4 * added, 8 * added, 0)
    assert found.full["plain"].total == 16 * (MLP_COUNT + added)


def test_sixteen_bit_training_takes_eight_or_sixteen_bytes_a_parameter() -> None:
    program = trace(nn.Linear(6, 5, dtype=torch.bfloat16), (torch.randn(3, 6, dtype=torch.bfloat16),))
    found = report(program)
    count = 6 * 5 + 5
    assert found.by_type["bf16"].size_bytes == 2 * count
    assert found.full["plain"] == Memory(2 * count, 2 * count, 4 * count, 0)
    assert found.full["plain"].total == 8 * count
    assert found.full["mixed"] == Memory(2 * count, 2 * count, 8 * count, 4 * count)
    assert found.full["mixed"].total == 16 * count


def test_a_tied_tensor_counts_once() -> None:
    tied, untied = report(traced("llama_tied")), report(traced("llama"))
    assert untied.parameters.count - tied.parameters.count == 31 * 24
    assert untied.memory["plain"].total - tied.memory["plain"].total == 16 * 31 * 24


@pytest.mark.parametrize("double", [False, True])
def test_weights_in_4_bits_count_as_the_numbers_they_stand_for(double: bool) -> None:
    base = traced("mlp")
    applied = apply(base, Nf4(targets=("up", "down"), double_quantise=double), check=False)
    assert applied.applied[0].parameters_before == applied.applied[0].parameters_after == MLP_COUNT
    found, held = report(applied.program), 22 * 10 + 10 * 22
    assert found.parameters.count == MLP_COUNT
    assert {key: amount.count for key, amount in found.by_type.items()} == {"f32": MLP_COUNT - held, "nf4": held}
    # Half a byte a code; four blocks of 64 in either weight, with fp32 scales or uint8 ones in one group with a mean.
    assert found.by_type["nf4"].size_bytes == held // 2 + 2 * (4 + 4 + 4 if double else 4 * 4)
    assert found.by_module["up"].count == report(base).by_module["up"].count
    assert found.full["plain"].gradients == 4 * (MLP_COUNT - held)  # what is in 4 bits has no gradient


def test_modules_are_told_apart_below_what_all_share() -> None:
    assert set(report(traced("gpt2")).by_module) == {f"transformer.{part}" for part in ("wte", "wpe", "h", "ln_f")}


@pytest.mark.parametrize("name", ["llama_tied", "conv"])
def test_the_json_is_plain_and_adds_up(name: str) -> None:
    record = json.loads(json.dumps(report(traced(name)).to_json()))
    assert record["schema"] == 1
    for group in ("by_type", "by_module"):
        assert sum(amount["count"] for amount in record[group].values()) == record["parameters"]["count"]
        assert sum(amount["size_bytes"] for amount in record[group].values()) == record["parameters"]["size_bytes"]
    assert record["memory"]["plain"]["total"] == sum(
        record["memory"]["plain"][part] for part in ("weights", "gradients", "optimiser", "master_copy")
    )
    assert record["assumptions"] == list(ASSUMPTIONS)


def test_the_text_states_its_assumptions() -> None:
    shown = str(report(adapted(traced("mlp"))))
    assert shown.startswith("147 of 730 parameters train (20.1370%)\n")
    assert "step 1 lora" in shown
    assert all(assumption in shown for assumption in ASSUMPTIONS)
    assert all(line == line.rstrip() for line in shown.splitlines())
