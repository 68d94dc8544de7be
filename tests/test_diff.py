"""What differs between two programs: lines, tensors, numbers, and how people see it."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from torch import nn

from passes.lora import Lora
from rewriter.diff import _changed_lines, diff
from rewriter.difference_text import size
from rewriter.errors import UsageError
from rewriter.program import Program
from rewriter.tensor_changes import same_bits
from rewriter.text import Line, text
from rewriter.trace import trace
from rewriter.transform import apply
from tests.models import traced

MLP = """\
@@ up @@
+param @up.lora_A.default : f32[3,10]
+param @up.lora_B.default : f32[22,3]
   %up/linear = linear(%x, @up.weight, @up.bias) : f32[d0,d1,22]
+  %up/lora_down = linear(%x, @up.lora_A.default) : f32[d0,d1,3]  ! lora
+  %up/lora_up = linear(%up/lora_down, @up.lora_B.default) : f32[d0,d1,22]  ! lora
+  %up/lora_scaled = mul(%up/lora_up, 2.0) : f32[d0,d1,22]  ! lora
+  %up/lora_sum = add(%up/linear, %up/lora_scaled) : f32[d0,d1,22]  ! lora
@@ (top) @@
-  %relu = relu(%up/linear) : f32[d0,d1,22]
+  %relu = relu(%up/lora_sum) : f32[d0,d1,22]
operations: 4 added, 0 removed, 1 changed
tensors added: 2 tensors, 96 numbers, 384 bytes
"""


def adapted(name: str, *targets: str) -> Program:
    return apply(traced(name), Lora(rank=3, alpha=6, targets=targets), check=False).program


def test_a_difference_reads_as_documented() -> None:
    assert str(diff(traced("mlp"), adapted("mlp", "up"))) == MLP


def test_backwards_it_is_the_same_with_signs_exchanged() -> None:
    difference = diff(adapted("mlp", "up"), traced("mlp"))
    assert difference.operations == {"added": 0, "removed": 4, "changed": 1}
    assert "tensors removed: 2 tensors, 96 numbers, 384 bytes" in str(difference)
    assert "-  %up/lora_down = " in str(difference)


def test_equal_programs_do_not_differ_and_history_does_not_count() -> None:
    program = traced("llama_tied")
    other = Program(program.clone().exported, adapted("mlp", "up").steps, {"made": "elsewhere"})
    difference = diff(program, other)
    assert difference.same
    assert not difference
    assert str(difference) == "no difference\n"
    assert difference.to_json()["same"] is True


def test_layers_that_changed_alike_are_shown_once() -> None:
    shown = str(diff(traced("llama"), adapted("llama", "q_proj")))
    assert shown.count("@@ model.layers.*.self_attn.q_proj  (* = 0, 1: the same 6 lines in each) @@") == 1
    assert shown.count("@@ model.layers.*.self_attn  (* = 0, 1: the same 2 lines in each) @@") == 1
    assert "+param @model.layers.*.self_attn.q_proj.lora_A.default : f32[3,24]\n" in shown
    assert "layers.1" not in shown
    one = str(diff(traced("llama"), adapted("llama", "model.layers.1.self_attn.q_proj")))
    assert "@@ model.layers.1.self_attn.q_proj @@" in one
    assert "*" not in one


class Chain(nn.Module):
    """Layers of which each reads what the one before it made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_read_the_one_before_are_shown_once_too() -> None:
    program = trace(Chain(), (torch.randn(3, 6),))
    after = apply(program, Lora(rank=2, targets="all-linear"), check=False).program
    shown = str(diff(program, after))
    assert "@@ layers.*  (* = 1 … 3: the same 8 lines in each) @@" in shown
    assert "linear(%layers.*-1/lora_sum, @layers.*.lora_A.default)" in shown


def test_changed_values_are_measured() -> None:
    program = traced("mlp")
    weight = program.tensor("down.weight")
    changed = weight.clone()
    changed[3, 5] += 0.25
    difference = diff(program, program.with_tensors({"down.weight": changed}))
    (found,) = difference.changed
    assert found.name == "down.weight"
    assert found.largest == pytest.approx(0.25, rel=1e-5)
    assert found.relative == pytest.approx(0.25 / float(weight.detach().double().norm()), rel=1e-5)
    assert not difference.lines
    assert "@down.weight : f32[10,22], largest change 0.25, relative" in str(difference)


def test_one_bit_is_a_difference_and_a_copy_is_none() -> None:
    program = traced("mlp")
    zero = torch.zeros(7)
    base = program.with_tensors({"head.bias": zero})
    assert diff(base, base.with_tensors({"head.bias": zero.clone()})).same
    negative = diff(base, base.with_tensors({"head.bias": -zero}))
    assert negative.changed[0].largest == 0.0
    not_a_number = zero.index_fill(0, torch.tensor([2]), math.nan)
    broken = base.with_tensors({"head.bias": not_a_number})
    assert diff(broken, broken.with_tensors({"head.bias": not_a_number.clone()})).same
    assert math.isnan(diff(base, broken).changed[0].largest or 0.0)
    assert json.loads(json.dumps(diff(base, broken).to_json(), allow_nan=False))


def test_breaking_a_tie_is_seen() -> None:
    program = traced("llama_tied")
    untied = program.with_tensors({"lm_head.weight": program.tensor("lm_head.weight").detach().clone()})
    assert "-param @lm_head.weight = @model.embed_tokens.weight : f32[31,24]" in str(diff(program, untied))


def test_bits_of_every_type_are_compared() -> None:
    for one in (
        torch.tensor(True),
        torch.arange(5),
        torch.randn(3, 4).bfloat16(),
        torch.randn(4, 6).t(),
        torch.ones(0, 3),
    ):
        assert same_bits(one, one.clone())
        assert not same_bits(one, one.reshape(-1)) or one.ndim == 1
    assert not same_bits(torch.ones(3), torch.ones(3, dtype=torch.float64))
    assert not same_bits(torch.randn(3, 4).t(), torch.randn(4, 3))


def test_the_json_is_complete_and_plain() -> None:
    record = json.loads(json.dumps(diff(traced("llama"), adapted("llama", "q_proj", "v_proj")).to_json()))
    assert record["schema"] == 1
    assert record["same"] is False
    assert record["operations"] == {"added": 16, "removed": 0, "changed": 4}
    assert record["tensors"]["added"] == {
        "names": [
            f"model.layers.{layer}.self_attn.{part}_proj.lora_{letter}.default"
            for layer in (0, 1)
            for part in "qv"
            for letter in "AB"
        ],
        "count": 2 * (3 * (24 + 24) + 3 * (24 + 12)),
        "bytes": 4 * 2 * (3 * (24 + 24) + 3 * (24 + 12)),
    }
    assert len(record["lines"]) == 8 + 16 + 2 * 4
    assert {line["sign"] for line in record["lines"]} == {"+", "-"}


def rebuilt(old: list[Line], new: list[Line]) -> list[Line]:
    """The old lines with the changes applied, in order: what the difference claims."""
    changes = [each for each in _changed_lines(old, new) if each.sign != " "]
    gone = {each.line.key for each in changes if each.sign == "-"}
    come = {each.line.key for each in changes if each.sign == "+"}
    kept = [line for line in old if line.key not in gone]
    assert kept == [line for line in new if line.key not in come]
    return sorted([*kept, *(each.line for each in changes if each.sign == "+")], key=new.index)


@pytest.mark.parametrize("seed", range(20))
def test_the_changed_lines_lead_from_one_text_to_the_other(seed: int) -> None:
    dice = random.Random(seed)
    old = [Line(f"%{i}", "", f"%{i} = {dice.choice('ab')}") for i in range(30)]
    new = [Line(line.key, "", f"{line.key} = {dice.choice('ab')}") for line in dice.sample(old, 22)]
    new += [Line(f"%new{i}", "", "new") for i in range(3)]
    if seed % 2:
        new.sort(key=lambda line: line.key)
    assert rebuilt(old, new) == new


def test_a_large_difference_takes_one_pass() -> None:
    old = [Line(f"%{i}", str(i), f"  %{i} = f(%{i - 1})") for i in range(20_000)]
    new = [
        line for line in old for line in ([line] if int(line.path) % 7 else [line, Line(f"%x{line.path}", "x", "x")])
    ]
    assert len(list(_changed_lines(old, new))) == len(new) - len(old)


def test_a_moved_operation_is_a_difference() -> None:
    program = traced("conv")
    other = program.clone()
    nodes = [node for node in other.graph.nodes if node.op == "call_function"]
    embedding = next(node for node in nodes if node.target is torch.ops.aten.embedding.default)
    nodes[0].prepend(embedding)
    difference = diff(program, other)
    assert sorted(text(program)) == sorted(text(other))
    assert difference.operations == {"added": 0, "removed": 0, "changed": 1}


@pytest.mark.parametrize(
    ("size_bytes", "shown"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_are_readable(size_bytes: int, shown: str) -> None:
    assert size(size_bytes) == shown


@pytest.mark.parametrize("swapped", [False, True])
def test_only_programs_are_compared(swapped: bool) -> None:
    pair: list[object] = [traced("mlp"), 3]
    with pytest.raises(UsageError, match="two programs, got int"):
        diff(*(reversed(pair) if swapped else pair))  # type: ignore[arg-type]
