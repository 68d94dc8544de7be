"""(IA)³: what it scales, how it starts, what trains, what merges, and parity with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor, nn

import rewriter
from passes import Ia3, Lora, Merge
from passes.ia3 import mlp_outputs
from rewriter import verify
from rewriter.errors import UsageError
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from tests.models import TINY, randomise, traced
from tests.oracle import distance, example, operations, run, traced_double, trained

CONVOLUTIONS = Ia3(targets=("stem", "signal"), feedforward_targets=("grouped", "head"))


def vectors(program: Program) -> dict[str, Tensor]:
    return {name: program.tensor(name).detach() for step in program.steps for name in step.added}


# -- where, and what it adds --------------------------------------------------------------------------------------


def test_keys_values_and_the_last_layer_of_every_mlp_of_a_llama() -> None:
    result = rewriter.apply(traced("llama"), Ia3())
    assert {name: list(t.shape) for name, t in vectors(result.program).items() if ".0." in name} == {
        "model.layers.0.self_attn.k_proj.ia3_l.default": [12, 1],
        "model.layers.0.self_attn.v_proj.ia3_l.default": [12, 1],
        "model.layers.0.mlp.down_proj.ia3_l.default": [1, 28],
    }
    assert result.applied[0].added == result.applied[0].trainable == 2 * (12 + 12 + 28)
    assert result.program.trainable == tuple(vectors(result.program))


def test_of_a_fused_projection_the_slices_of_key_and_value() -> None:
    new = vectors(rewriter.apply(traced("gpt2"), Ia3()).program)
    assert {name: list(t.shape) for name, t in new.items() if ".h.1." in name} == {
        "transformer.h.1.attn.c_attn.ia3_l.default.key": [24, 1],
        "transformer.h.1.attn.c_attn.ia3_l.default.value": [24, 1],
        "transformer.h.1.mlp.c_proj.ia3_l.default": [1, 52],
    }


ENDS = {
    "llama": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "bert": "output.dense",
    "t5": "DenseReluDense.wo",
    "vit": "mlp.fc2",
    "whisper": "fc2",
    "phi3": "mlp.down_proj",
}


@pytest.mark.parametrize("name", ENDS)
def test_mlps_are_found_by_their_residual_addition(name: str) -> None:
    found = [site.path for site in mlp_outputs(traced(name))]
    assert len(found) == (4 if name in ("t5", "whisper") else 2)
    assert all(path.endswith(ENDS[name]) and "attention" not in path for path in found)


def test_norms_layer_scales_and_parallel_branches_do_not_hide_an_mlp() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.side = nn.Linear(6, 11), nn.Linear(11, 6), nn.Linear(6, 6)
            self.norm, self.scale = nn.LayerNorm(6), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            branch = self.scale * self.norm(self.down(torch.relu(self.up(x))))
            gate = self.side(x) * torch.sigmoid(x)
            return x + (branch + gate)

    program = rewriter.trace(randomise(Block()), (torch.randn(2, 3, 6),))
    assert [site.path for site in mlp_outputs(program)] == ["down"]


def test_a_layer_in_both_lists_is_a_feedforward_one_as_in_peft() -> None:
    targets = ("k_proj", "v_proj", "down_proj")
    one = rewriter.apply(traced("llama"), Ia3(targets=targets, feedforward_targets=("down_proj",))).program
    two = rewriter.apply(traced("llama"), Ia3()).program
    assert rewriter.text(one) == rewriter.text(two)


def test_a_path_that_only_ends_like_an_mlp_is_not_meant() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 11), nn.Linear(11, 6)
            self.other = nn.ModuleDict({"down": nn.Linear(6, 5)})

        def forward(self, x: Tensor) -> Tensor:
            return self.other["down"](x + self.down(torch.relu(self.up(x))))

    program = rewriter.trace(randomise(Two()), (torch.randn(2, 3, 6),))
    assert [site.path for site in rewriter.apply(program, Ia3(targets=())).sites] == ["down"]


# -- how it starts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "conv"])
def test_outputs_keep_every_bit_and_undo_leaves_no_difference(name: str) -> None:
    base = traced(name)
    result = rewriter.apply(base, CONVOLUTIONS if name == "conv" else Ia3())
    assert all(bool((t == 1).all()) for t in vectors(result.program).values())
    assert all(torch.equal(a, b) for a, b in zip(run(base, name), run(result.program, name), strict=True))
    back = rewriter.undo(trained(result.program))
    assert rewriter.text(back) == rewriter.text(base)
    assert rewriter.diff(base, back).same


def test_a_random_start_depends_on_the_seed_and_the_name_alone() -> None:
    one = vectors(rewriter.apply(traced("llama"), Ia3(init="normal", seed=4)).program)
    two = vectors(rewriter.apply(traced("llama"), Ia3(init="normal", seed=4, targets=("v_proj",))).program)
    three = vectors(rewriter.apply(traced("llama"), Ia3(init="normal", seed=5)).program)
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    assert all(not torch.equal(one[name], tensor) for name, tensor in three.items())
    assert Ia3(init="normal").law.kind == "free"


# -- numbers ------------------------------------------------------------------------------------------------------


def by_hand(name: str, l: dict[str, Tensor]) -> nn.Module:  # noqa: E741 - the paper's letter
    """The model of `TINY` in fp64 with every vector multiplied into its weight and bias."""
    model: Any = TINY[name]()[0].double()
    with torch.no_grad():
        for key, vector in l.items():
            path, _, tail = key.partition(".ia3_l.default")
            module = model.get_submodule(path)
            if name == "gpt2":
                if tail:
                    start = {".key": 24, ".value": 48}[tail]
                    module.weight[:, start : start + 24].mul_(vector.reshape(1, -1))
                    module.bias[start : start + 24].mul_(vector.reshape(-1))
                else:
                    module.weight.mul_(vector.reshape(-1, 1))
            elif path == "grouped":
                for o in range(12):  # 4 groups of 3 outputs, which read 2 inputs each
                    for i in range(2):
                        module.weight[o, i] *= vector[0, 2 * (o // 3) + i, 0, 0]
            elif isinstance(module, nn.Linear) and vector.shape[0] == 1:
                module.weight.mul_(vector)
            else:
                module.weight.mul_(vector.reshape(-1, *[1] * (module.weight.ndim - 1)))
                if module.bias is not None:
                    module.bias.mul_(vector.reshape(-1))
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "conv"])
def test_training_time_and_merged_against_fp64_by_hand(name: str) -> None:
    base = traced_double(name)
    pass_ = CONVOLUTIONS if name == "conv" else Ia3()
    program = trained(rewriter.apply(base, pass_).program)
    args, kwargs = example(name, double=True)
    model = by_hand(name, vectors(program))
    with torch.no_grad():
        expected = verify.outputs(model(*args, **kwargs))
    assert distance(run(base, name), expected) > 0.1
    assert distance(run(program, name), expected) < 1e-11
    merged = rewriter.apply(program, Merge()).program
    assert distance(run(merged, name), expected) < 1e-11
    assert operations(merged) == operations(base)
    for key, tensor in model.state_dict().items():
        if key in merged.parameters():
            assert torch.allclose(merged.tensor(key), tensor, rtol=0, atol=1e-12), key


def test_a_shared_input_is_scaled_for_the_target_alone() -> None:
    base = traced("mlp")  # the input of `up` is also the residual connection
    program = trained(rewriter.apply(base, Ia3(targets=(), feedforward_targets=("up",))).program)
    model: Any = TINY["mlp"]()[0]
    with torch.no_grad():
        model.up.weight.mul_(program.tensor("up.ia3_l.default"))
        expected = model(*example("mlp")[0])
    assert distance(run(program, "mlp"), [expected]) < 1e-5
    assert distance(run(base, "mlp"), [expected]) > 0.1
    assert rewriter.undo(program) is not program
    assert rewriter.diff(base, rewriter.undo(program)).same
    assert distance(run(rewriter.apply(program, Merge()).program, "mlp"), [expected]) < 1e-5


def test_two_adapters_and_a_lora_beside_them() -> None:
    base = traced("llama")
    steps = [Ia3(), Lora(targets=("v_proj", "down_proj"), rank=3), Ia3(adapter="second", targets=("v_proj",))]
    program = trained(rewriter.apply(base, *steps).program)
    merged = rewriter.apply(program, Merge()).program
    assert distance(run(base, "llama"), run(program, "llama")) > 0.1
    assert distance(run(merged, "llama"), run(program, "llama")) < 1e-5
    assert operations(merged) == operations(base)


def test_training_moves_the_vectors_and_nothing_else() -> None:
    program = rewriter.apply(traced("mlp"), Ia3(targets=("up",), feedforward_targets=("down",))).program
    module = program.module()
    module(*example("mlp")[0]).square().sum().backward()
    reached = {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == set(program.trainable) == {"up.ia3_l.default", "down.ia3_l.default"}


def test_modules_to_save_train_too() -> None:
    pass_ = Ia3(targets=("up",), feedforward_targets=(), modules_to_save=("head",))
    program = rewriter.apply(traced("mlp"), pass_).program
    assert set(program.trainable) == {"up.ia3_l.default", "head.weight", "head.bias"}


# -- other tools --------------------------------------------------------------------------------------------------

PEFT: dict[str, tuple[str, dict[str, Any], Ia3]] = {
    "llama": (
        "llama",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        Ia3(),
    ),
    "gpt2": (
        "gpt2",
        {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
        },
        Ia3(targets=("c_attn",)),
    ),
    "bert": (
        "bert",
        {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
        Ia3(feedforward_targets=("output.dense",)),
    ),
    "conv": (
        "conv",
        {"target_modules": ["stem", "grouped", "head"], "feedforward_modules": ["grouped", "head"]},
        Ia3(targets=("stem",), feedforward_targets=("grouped", "head")),
    ),
}


@pytest.mark.parametrize("case", PEFT)
def test_the_same_vectors_give_what_peft_gives(case: str) -> None:
    name, options, pass_ = PEFT[case]
    model = get_peft_model(TINY[name]()[0], IA3Config(**options)).eval()
    generator = torch.Generator().manual_seed(3)
    theirs = {key: p for key, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in theirs.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        args, kwargs = example(name)
        expected = verify.outputs(model(*args, **kwargs))
    base = traced(name)
    values = {key.removeprefix("base_model.model."): p.detach() for key, p in theirs.items()}
    applied = rewriter.apply(base, pass_).program
    assert set(values) == set(applied.trainable)
    program = applied.with_tensors(values)
    assert distance(run(base, name), expected) > 0.1
    assert distance(run(program, name), expected) < 1e-5
    assert distance(run(rewriter.apply(program, Merge()).program, name), expected) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "conv"])
def test_saved_loaded_and_exported(name: str, tmp_path: Path) -> None:
    program = trained(rewriter.apply(traced(name), CONVOLUTIONS if name == "conv" else Ia3()).program)
    loaded = rewriter.load(program.save(tmp_path / "program.pt2"))
    assert rewriter.diff(program, loaded).same
    assert rewriter.diff(traced(name), rewriter.undo(loaded)).same
    report = export_onnx(program, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    args, kwargs = example(name)
    given = [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
    feeds = {key: value.numpy() for key, value in zip(report.inputs, given, strict=True)}
    found = [torch.from_numpy(value) for value in session.run(None, feeds)]
    assert distance(found, run(program, name)) < 1e-4


GOLDEN = {
    "ia3": ("mlp", Ia3(targets=("up",), feedforward_targets=("down",))),
    "ia3_slices": ("gpt2", Ia3(targets=("@attention.key", "@attention.value"), exclude=r".*\.h\.0\..*")),
    "ia3_conv": ("conv", CONVOLUTIONS),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_what_it_adds(case: str, golden: Callable[[str, str], None]) -> None:
    name, pass_ = GOLDEN[case]
    golden(f"{case}.diff", str(rewriter.diff(traced(name), rewriter.apply(traced(name), pass_).program)))


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "zeros"}, "init is 'zeros'"),
        ({"adapter": "a.b"}, r"adapter is 'a\.b'"),
        ({"adapter": 3}, "adapter is 3"),
        ({"seed": True}, "seed is True"),
        ({"targets": (), "feedforward_targets": ()}, "no target given"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Ia3(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {}, "@attention.key"),
        ("mixtral", {}, "stacks of experts: model.layers.0.mlp.experts"),
        ("conv", {"targets": ("stem",)}, "@mlp.output"),
        ("mlp", {"targets": ("up", "nothing")}, "'nothing'"),
        ("conv", {"targets": ("classes",), "feedforward_targets": ()}, "is an embedding"),
    ],
)
def test_what_a_model_lacks_is_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rewriter.apply(traced(name), Ia3(**options))


def test_the_same_adapter_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="already has a parameter"):
        rewriter.apply(traced("llama"), Ia3(), Ia3())
