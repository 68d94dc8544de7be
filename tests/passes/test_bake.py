"""Bake: what passes compute from parameters alone becomes one parameter; the model's own constants stay."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes import Bake, Lora, Prefix
from passes.prompt import Prompt
from rewriter.edit import Edit
from rewriter.errors import LawError, UsageError
from rewriter.find import Sites
from rewriter.program import Program
from rewriter.transform import FREE, Law
from tests.models import randomise, traced
from tests.oracle import distance, run, traced_double
from tests.passes.selected import holds_after_saving, moved, same_in_onnx, undone

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Shift:
    """Add a vector to the first sum of the program: an LSTM over three rows, its last output through dropout."""

    name: ClassVar[str] = "shift"
    source: ClassVar[str] = "none"
    law: ClassVar[Law] = FREE
    home: str = "prompt_encoder.default"

    def find(self, program: Program) -> Sites[str]:
        return Sites((self.home,))

    def rewrite(self, site: str, edit: Edit) -> None:
        place = next(node for node in edit.program.graph.nodes if node.target is aten.add.Tensor)
        generator = torch.Generator().manual_seed(2)

        def parameter(name: str, *shape: int) -> torch.fx.Node:
            value = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
            return edit.parameter(f"{site}.{name}", value.to(place.meta["val"].dtype))

        def call(operation: object, *args: object) -> torch.fx.Node:
            return edit.call(operation, *args, like=place, label="shift")

        rows = parameter("embedding.weight", 3, 1, 4)
        weights = [parameter(f"lstm_head.{n}", 40, size) for n, size in (("weight_ih_l0", 4), ("weight_hh_l0", 10))]
        weights += [parameter(f"lstm_head.{n}", 40) for n in ("bias_ih_l0", "bias_hh_l0")]
        state = call(aten.new_zeros.default, rows, [1, 1, 10])
        lstm = call(aten.lstm.input, rows, [state, state], weights, True, 1, 0.1, False, False, False)
        output = call(torch.ops.aten.select.int, edit.call(operator.getitem, lstm, 0, like=place, label="rows"), 0, 2)
        flat = call(aten.view.default, call(aten.dropout.default, output, 0.3, False), [10])
        edit.replace(place, call(aten.add.Tensor, place, flat))


def by_hand(program: Program) -> Tensor:
    """The LSTM's last output, by torch's own module."""
    lstm = nn.LSTM(4, 10).double()
    tensors = {n.rpartition(".")[2]: t.double() for n, t in program.tensors.items() if ".lstm_head." in n}
    lstm.load_state_dict(tensors)
    with torch.no_grad():
        result: Tensor = lstm(program.tensor("prompt_encoder.default.embedding.weight").double())[0][2]
    return result


def test_a_recurrent_encoder_becomes_what_it_computes(golden: Callable[[str, str], None]) -> None:
    program = rewriter.apply(traced_double("mlp"), Shift()).program
    baked = rewriter.apply(program, Bake()).program
    assert [n for n in baked.tensors if n not in traced("mlp").tensors] == ["prompt_embeddings.default"]
    kept = baked.tensor("prompt_embeddings.default")
    torch.testing.assert_close(kept.detach().flatten(), by_hand(program).flatten(), rtol=1e-12, atol=1e-12)
    assert distance(run(baked, "mlp"), run(program, "mlp")) < 1e-12
    assert not [n for n in baked.graph.nodes if n.target in (aten.lstm.input, aten.new_zeros.default)]
    undone(program, baked)
    golden("bake.diff", str(rewriter.diff(program, baked)))


class Constant(nn.Module):
    """A model that computes a shift from its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.up, self.down = nn.Parameter(torch.ones(1, 6)), nn.Linear(6, 14), nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.rows)))


def test_what_the_model_computes_from_its_weights_stays() -> None:
    program = rewriter.trace(randomise(Constant()), (torch.ones(3, 5, 10),))
    with pytest.raises(UsageError, match="nothing to bake"):
        rewriter.apply(program, Bake())
    both = rewriter.apply(program, Shift()).program
    baked = rewriter.apply(both, Bake()).program
    assert set(baked.tensors) == {*program.tensors, "prompt_embeddings.default"}
    assert rewriter.text(baked).count("= tanh(") == 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prefix_projection_leaves_the_prefix(name: str, tmp_path: Path) -> None:
    program = moved(rewriter.apply(traced(name), Prefix(virtual_tokens=5, projection=True, hidden=17)).program)
    plain = rewriter.apply(traced(name), Prefix(virtual_tokens=5)).program
    result = rewriter.apply(program, Bake(precision="fp64"))
    assert result.applied[0].change is not None
    assert result.applied[0].change.relative < 1e-5
    baked = result.program
    assert set(baked.tensors) == set(plain.tensors)
    assert [str(n.target) for n in baked.graph.nodes] == [str(n.target) for n in plain.graph.nodes]
    value = plain.with_tensors({"prompt_embeddings.default": baked.tensor("prompt_embeddings.default")})
    assert distance(run(value, name), run(baked, name)) < 1e-5
    undone(program, baked)
    holds_after_saving(baked, name, tmp_path)
    if name == "gpt2":
        same_in_onnx(baked, name, tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"encoder": "lstm", "encoder_dropout": 0.1}),
        ("gpt2", {"encoder": "mlp", "encoder_hidden": 17}),
        ("bert", {"encoder": "lstm", "template": "3 a:7 input 2"}),
    ],
)
def test_a_prompt_encoder_leaves_the_prompt(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    given = {"virtual_tokens": 5, **options} if "template" not in options else options
    program = moved(rewriter.apply(traced(name), Prompt(**given)).program)
    plain = rewriter.apply(traced(name), Prompt(**{k: v for k, v in given.items() if "encoder" not in k})).program
    baked = rewriter.apply(program, Bake()).program
    assert set(baked.tensors) == set(plain.tensors)
    assert baked.tensor("prompt_embeddings.default").shape == plain.tensor("prompt_embeddings.default").shape
    assert [str(n.target) for n in baked.graph.nodes] == [str(n.target) for n in plain.graph.nodes]
    value = plain.with_tensors({"prompt_embeddings.default": baked.tensor("prompt_embeddings.default")})
    assert distance(run(value, name), run(program, name)) < 1e-4
    undone(program, baked)
    if name == "gpt2":
        same_in_onnx(baked, name, tmp_path)


def test_the_result_trains_only_when_asked() -> None:
    program = rewriter.apply(traced("mlp"), Shift()).program
    assert rewriter.apply(program, Bake(trainable=True)).program.trainable == ("prompt_embeddings.default",)
    assert rewriter.apply(program, Bake()).program.steps[-1].trainable == ()


def test_names_follow_the_module_and_are_not_taken_twice() -> None:
    program = rewriter.apply(traced("mlp"), Shift("up.gate.mine")).program
    assert [s.path for s in rewriter.apply(program, Bake()).sites] == ["up.gate.mine.shift"]
    one = rewriter.apply(rewriter.apply(traced("mlp"), Shift()).program, Bake()).program
    two = rewriter.apply(rewriter.apply(one, Shift()).program, Bake()).program
    assert {"prompt_embeddings.default", "prompt_embeddings.default_1"} <= set(two.tensors)


def test_a_norm_of_dora_is_computed_once() -> None:
    program = moved(rewriter.apply(traced("mlp"), Lora(targets=("up",), rank=3, dora=True)).program)
    result = rewriter.apply(program, Bake())
    assert [site.path for site in result.sites] != []
    assert distance(run(result.program, "mlp"), run(program, "mlp")) < 1e-4
    assert "linalg_vector_norm" not in rewriter.text(result.program)
    assert "up.lora_A.default" in result.program.tensors


def test_refusals() -> None:
    with pytest.raises(UsageError, match="nothing to bake"):
        rewriter.apply(rewriter.apply(traced("mlp"), Lora(targets=("up",), rank=3)).program, Bake())
    with pytest.raises(UsageError, match="precision is 'fp16'"):
        Bake(precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="trainable is 1"):
        Bake(trainable=1)  # type: ignore[arg-type]
    program = rewriter.apply(traced("mlp"), Shift()).program
    name = "prompt_encoder.default.embedding.weight"
    with pytest.raises(LawError, match="non-finite"):
        rewriter.apply(program.with_tensors({name: program.tensor(name) * float("nan")}), Bake())
