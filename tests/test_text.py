"""The text of a program: what it says, and that it depends on nothing but the program."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import sympy
import torch
from torch import nn
from torch.utils._sympy.functions import Max, Min

from passes.lora import Lora
from rewriter.program import Origin, Program
from rewriter.text import around, dtype_name, line, lines, printable, settled, text
from rewriter.trace import trace
from rewriter.transform import apply
from tests.models import traced

ROOT = Path(__file__).resolve().parent.parent

MLP = """\
param @up.weight : f32[22,10]
param @up.bias : f32[22]
param @norm.weight : f32[22]
param @norm.bias : f32[22]
param @down.weight : f32[10,22]
param @head.weight : f32[7,10]
param @head.bias : f32[7]
input %x : f32[d0,d1,10]
  %up/linear = linear(%x, @up.weight, @up.bias) : f32[d0,d1,22]
  %relu = relu(%up/linear) : f32[d0,d1,22]
  %norm/layer_norm = layer_norm(%relu, [22], @norm.weight, @norm.bias, 1e-05, false) : f32[d0,d1,22]
  %dropout/dropout = dropout(%norm/layer_norm, 0.5, false) : f32[d0,d1,22]
  %down/linear = linear(%dropout/dropout, @down.weight) : f32[d0,d1,10]
  %add = add(%x, %down/linear) : f32[d0,d1,10]
  %head/linear = linear(%add, @head.weight, @head.bias) : f32[d0,d1,7]
  return %head/linear
"""


class Everything(nn.Module):
    """Branches, a mixed-precision region, a mutated buffer, a constant, nested outputs, arithmetic on sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.offset = torch.arange(6.0)
        self.register_buffer("steps", torch.ones(6))
        self.register_buffer("scratch", torch.ones(5), persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        x = torch.cond(x.sum() > 0, lambda x: self.up(x) + 1, lambda x: self.up(x) - 1, (x,))
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.relu(x @ torch.ones(6, 6))
        left, right = x.split((2, 4), -1)
        self.steps.add_(1)
        total = self.offset.sum() + self.steps.sum() + self.scratch.sum()
        return {"flat": left.reshape(x.shape[0] * 2) + total, "list": [right, 3, None]}


@pytest.fixture(scope="module")
def everything() -> Program:
    return trace(Everything(), (torch.randn(5, 4),))


def test_the_text_reads_as_documented() -> None:
    assert text(traced("mlp")) == MLP


def test_an_insertion_adds_lines_and_renumbers_nothing() -> None:
    before = traced("llama")
    after = apply(before, Lora(rank=3, targets=("model.layers.1.self_attn.q_proj",)), check=False).program
    old, new = set(text(before).splitlines()), set(text(after).splitlines())
    path = "model.layers.1.self_attn.q_proj"
    assert [each for each in sorted(new - old) if f"%{path}/" not in each and f"@{path}." not in each] == []
    assert len(old - new) == 1  # the one operation that reads the new sum
    added = [each for each in new - old if each.endswith("  ! lora")]
    assert added
    assert all(each.startswith(f"  %{path}/lora") for each in added)


def test_higher_order_graphs_are_indented_and_outputs_are_named(everything: Program) -> None:
    shown = text(everything)
    assert "  %cond = cond(%gt, &0, &1, [" in shown
    assert "\n    &1 (%0 : f32[" in shown
    assert "\n      %sub = sub(%linear, 1) : f32[d0,6]\n      return %sub\n" in shown
    assert "buffer @steps : f32[6]\nbuffer @scratch : f32[5]\nconst @offset : f32[6]\n" in shown
    assert " : 2*d0\n" in shown
    assert shown.rstrip().splitlines()[-1].startswith("  return flat=%")
    assert "list.1=3, list.2=none" in shown


def test_keys_are_unique_also_across_nested_graphs(everything: Program) -> None:
    keys = [each.key for each in lines(everything)]
    assert len(keys) == len(set(keys))


def test_a_tied_name_shows_what_it_is_tied_to() -> None:
    expected = "param @lm_head.weight = @model.embed_tokens.weight : f32[31,24]\n"
    assert expected in text(traced("llama_tied"))
    assert " = @" not in text(traced("llama")).partition("input %")[0]


@pytest.mark.parametrize("name", ["t5", "gpt2", "mixtral", "conv"])
def test_the_text_survives_torch_save_and_load(name: str) -> None:
    program = traced(name)
    buffer = io.BytesIO()
    torch.export.save(program.exported, buffer)
    buffer.seek(0)
    assert text(Program(torch.export.load(buffer))) == text(program)


def test_the_text_does_not_depend_on_names_of_nodes_or_order_of_dictionaries() -> None:
    program = traced("llama_tied")
    other = Program(copy.deepcopy(program.exported))
    for number, node in enumerate(other.graph.nodes):
        if node.op == "call_function":
            node.name = f"renamed_{number}"
    for home in (other.exported.state_dict, other.exported.constants):
        backwards = dict(reversed(home.items()))
        home.clear()
        home.update(backwards)
    tied = other.exported.state_dict["model.embed_tokens.weight"]
    other.exported.state_dict["lm_head.weight"] = tied
    assert text(other) == text(program)


def test_the_text_is_the_same_in_another_process() -> None:
    code = "from rewriter.text import text; from tests.models import traced; print(text(traced('conv')), end='')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == text(traced("conv"))


def test_evidence_shows_a_node_and_its_neighbours() -> None:
    program = traced("mlp")
    node = next(node for node in program.graph.nodes if node.target is torch.ops.aten.layer_norm.default)
    shown = line(program, node)
    assert shown.startswith("%norm/layer_norm = layer_norm(%relu, [22], ")
    near = around(program, node, context=1)
    assert [each.split(" = ")[0].strip() for each in near] == ["%relu", "%norm/layer_norm", "%dropout/dropout"]


def test_names_cannot_command_a_terminal() -> None:
    assert printable("plain.név") == "plain.név"
    assert printable("a\x1b[31m\n\u202eb\x9b") == "a\\x1b[31m\\n\\u202eb\\x9b"
    program = traced("mlp").clone()
    node = next(node for node in program.graph.nodes if node.op == "call_function")
    Origin(1, "evil\x1b]0;title\x07", "label\r\n\x1b[2J").write(node)
    assert all(each.isprintable() for each in text(program).splitlines())
    assert "! evil\\x1b]0;title\\x07" in text(program)


def test_an_inserted_label_that_repeats_is_numbered_and_never_takes_a_name_of_the_base() -> None:
    program = traced("mlp").clone()
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in nodes[1:3]:
        node.meta["nn_module_stack"] = dict(nodes[0].meta["nn_module_stack"])
        Origin(1, "lora", "linear").write(node)
    keys = [each.key for each in lines(program)]
    assert keys.count("%up/linear") == 1
    assert [key for key in keys if key.startswith("%up/")] == ["%up/linear", "%up/linear_1", "%up/linear_2"]
    assert line(program, nodes[0]).startswith("%up/linear = ")


def test_a_size_reads_the_same_before_and_after_torch_has_simplified_it() -> None:
    size = sympy.Symbol("s0", integer=True, positive=True)
    assert settled(Min(24, 24 * size)) == 24
    assert str(settled(2 + Max(5, size))) == str(2 + sympy.Max(5, size))
    assert settled(size) is size


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "bf16"),
        (torch.float32, "f32"),
        (torch.uint8, "u8"),
        (torch.int64, "i64"),
        (torch.bool, "bool"),
        (torch.complex64, "c64"),
        (torch.float8_e4m3fn, "f8_e4m3fn"),
    ],
)
def test_types_are_short(dtype: torch.dtype, name: str) -> None:
    assert dtype_name(dtype) == name
