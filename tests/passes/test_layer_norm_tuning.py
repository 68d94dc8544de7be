"""LayerNorm tuning: which norms are found, what trains, what stays, and parity with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from peft import LNTuningConfig, get_peft_model
from torch import Tensor, nn

import rewriter
from passes import LayerNormTuning, Lora, Merge
from rewriter import verify
from rewriter.errors import RewriteError, UsageError
from rewriter.formats.onnx import export_onnx
from rewriter.norms import norms
from rewriter.program import Program
from tests.models import TINY, randomise, traced
from tests.oracle import distance, example, run, traced_double, trained

# -- the norms of a graph -----------------------------------------------------------------------------------------

FOUND = {
    "llama": ("rms_norm", 5),
    "gpt2": ("layer_norm", 5),
    "bert": ("layer_norm", 5),
    "t5": ("rms_norm", 12),
    "vit": ("layer_norm", 5),
    "whisper": ("layer_norm", 12),
    "mlp": ("layer_norm", 1),
    "conv": ("batch_norm", 1),
}


@pytest.mark.parametrize("name", FOUND)
def test_every_norm_of_a_model_is_found_with_its_parameters(name: str) -> None:
    module = TINY[name]()[0]
    expected = {
        path: (f"{path}.weight", f"{path}.bias" if getattr(child, "bias", None) is not None else None)
        for path, child in module.named_modules()
        if "norm" in type(child).__name__.lower()
    }
    found = norms(traced(name))
    assert {norm.path: (norm.weight, norm.bias) for norm in found} == expected
    assert ({norm.kind for norm in found}, len(found)) == ({FOUND[name][0]}, FOUND[name][1])


class Written(nn.Module):
    """A gain and a bias around a value that `normalise` makes of x."""

    def __init__(self, normalise: Callable[[Tensor], Tensor], *, bias: bool, plus_one: bool = False) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.shift = nn.Parameter(torch.zeros(6)) if bias else None
        self.normalise, self.plus_one = normalise, plus_one

    def forward(self, x: Tensor) -> Tensor:
        gain = 1.0 + self.gain.float() if self.plus_one else self.gain
        y = self.normalise(x.float()).type_as(x) * gain
        return y if self.shift is None else y + self.shift


def layer(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


def variance(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)


def root_mean_square(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def length(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)


def softmax(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("normalise", "bias", "plus_one", "kind"),
    [
        (layer, True, False, "layer_norm"),
        (variance, False, False, "layer_norm"),
        (root_mean_square, True, False, "rms_norm"),
        (root_mean_square, False, True, "rms_norm"),
        (length, False, False, "rms_norm"),
        (softmax, True, False, None),
        (torch.tanh, True, False, None),
    ],
)
def test_norms_that_are_written_out(
    normalise: Callable[[Tensor], Tensor], bias: bool, plus_one: bool, kind: str | None
) -> None:
    model = nn.ModuleDict({"norm": Written(normalise, bias=bias, plus_one=plus_one)})
    wrapped = nn.Sequential(nn.Linear(5, 6), model["norm"])
    found = norms(rewriter.trace(randomise(wrapped), (torch.randn(2, 3, 5),)))
    if kind is None:
        assert found == ()
    else:
        assert [(norm.path, norm.kind, norm.weight) for norm in found] == [("1", kind, "1.gain")]
        assert found[0].bias == ("1.shift" if bias else None)
        assert found[0].inputs[0].target is torch.ops.aten.linear.default


def test_a_norm_that_is_called_twice_is_one_and_one_without_parameters_says_so() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.bare = nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False)
            self.mix = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bare(self.norm(self.mix(self.norm(x))))

    program = rewriter.trace(randomise(Twice()), (torch.randn(2, 3, 6),))
    assert [(norm.path, len(norm.calls), norm.parameters) for norm in norms(program)] == [
        ("norm", 2, ("norm.weight", "norm.bias")),
        ("bare", 1, ()),
    ]
    result = rewriter.apply(program, LayerNormTuning())
    assert [site.path for site in result.sites] == ["norm"]
    assert [(miss.path, miss.reason) for miss in result.missed] == [("bare", "this layer_norm has no gain and no bias")]
    with pytest.raises(UsageError, match="match no norm that can train"):
        rewriter.apply(program, LayerNormTuning(targets=("bare",)))


def test_what_lora_adds_is_no_norm() -> None:
    adapted = rewriter.apply(traced("llama"), Lora(targets=("q_proj",), dora=True)).program
    assert [norm.path for norm in norms(adapted)] == [norm.path for norm in norms(traced("llama"))]


# -- the pass -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "conv"])
def test_only_gains_and_biases_train_and_nothing_changes(name: str) -> None:
    base = traced(name)
    result = rewriter.apply(base, LayerNormTuning())
    assert set(result.program.trainable) == {key for norm in norms(base) for key in norm.parameters}
    assert result.applied[0].added == 0
    assert result.applied[0].trainable == sum(base.tensor(key).numel() for key in result.program.trainable)
    assert all(torch.equal(a, b) for a, b in zip(run(base, name), run(result.program, name), strict=True))
    assert rewriter.text(result.program) == rewriter.text(base)
    assert rewriter.undo(result.program).trainable == base.trainable


def test_targets_by_name_by_pattern_and_excluded() -> None:
    def chosen(**options: Any) -> list[str]:
        return [site.path for site in rewriter.apply(traced("gpt2"), LayerNormTuning(**options)).sites]

    assert chosen(targets=("ln_1", "ln_f")) == ["transformer.h.0.ln_1", "transformer.h.1.ln_1", "transformer.ln_f"]
    assert chosen(targets=r".*\.h\.1\.ln_\d") == ["transformer.h.1.ln_1", "transformer.h.1.ln_2"]
    assert chosen(exclude=("ln_1", "ln_f")) == ["transformer.h.0.ln_2", "transformer.h.1.ln_2"]


def random_norms(program: Program) -> Program:
    generator = torch.Generator().manual_seed(2)
    values = {}
    for name in program.trainable:
        before = program.tensor(name).detach()
        values[name] = before + torch.randn(before.shape, generator=generator).to(before.dtype)
    return program.with_tensors(values)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_trained_values_against_the_model_in_fp64(name: str) -> None:
    program = random_norms(rewriter.apply(traced_double(name), LayerNormTuning()).program)
    args, kwargs = example(name, double=True)
    model = TINY[name]()[0].double()
    model.load_state_dict({key: program.tensor(key).detach() for key in program.trainable}, strict=False)
    with torch.no_grad():
        expected = verify.outputs(model(*args, **kwargs))
    assert distance(run(program, name), expected) < 1e-12
    assert distance(run(traced_double(name), name), expected) > 0.1
    assert rewriter.diff(traced_double(name), rewriter.undo(program)).same


def test_training_moves_the_norms_and_nothing_else() -> None:
    program = rewriter.apply(traced("bert"), LayerNormTuning()).program
    module = program.module()
    args, kwargs = example("bert")
    module(*args, **kwargs).last_hidden_state.pow(3).sum().backward()
    reached = {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == set(program.trainable)


def test_modules_to_save_train_too() -> None:
    program = rewriter.apply(traced("mlp"), LayerNormTuning(modules_to_save=("head",))).program
    assert set(program.trainable) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_a_merge_finds_nothing_of_it_and_keeps_its_values_beside_a_lora() -> None:
    tuned = random_norms(rewriter.apply(traced("llama"), LayerNormTuning()).program)
    with pytest.raises(RewriteError, match="nothing to merge"):
        rewriter.apply(tuned, Merge())
    both = trained(rewriter.apply(tuned, Lora(targets=("q_proj",), rank=3)).program)
    merged = rewriter.apply(both, Merge()).program
    assert all(torch.equal(merged.tensor(norm.weight), tuned.tensor(norm.weight)) for norm in norms(tuned))  # type: ignore[arg-type]
    assert distance(run(merged, "llama"), run(both, "llama")) < 1e-5


PEFT = {"llama": ["input_layernorm", "post_attention_layernorm", "norm"], "gpt2": ["ln_1", "ln_f"], "bert": "LayerNorm"}


@pytest.mark.parametrize("name", PEFT)
def test_the_same_values_give_what_peft_gives(name: str) -> None:
    targets = PEFT[name]
    targets = [targets] if isinstance(targets, str) else targets
    model = get_peft_model(TINY[name]()[0], LNTuningConfig(target_modules=targets)).eval()
    theirs = {key: p for key, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        args, kwargs = example(name)
        expected = verify.outputs(model(*args, **kwargs))
    applied = rewriter.apply(traced(name), LayerNormTuning(targets=tuple(targets))).program
    values = {
        key.removeprefix("base_model.model.").replace("ln_tuning_layers.default.", ""): p.detach()
        for key, p in theirs.items()
    }
    assert set(values) == set(applied.trainable)
    assert distance(run(applied, name), expected) > 0.1
    assert distance(run(applied.with_tensors(values), name), expected) < 1e-5


def test_saved_loaded_and_exported(tmp_path: Path) -> None:
    program = random_norms(rewriter.apply(traced("bert"), LayerNormTuning()).program)
    loaded = rewriter.load(program.save(tmp_path / "program.pt2"))
    assert rewriter.diff(program, loaded).same
    assert loaded.trainable == program.trainable
    assert rewriter.diff(traced("bert"), rewriter.undo(loaded)).same
    report = export_onnx(program, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {name: example("bert")[1][name].numpy() for name in report.inputs}
    found = [torch.from_numpy(value) for value in session.run(None, feeds)]
    assert distance(found, run(program, "bert")) < 1e-4


def test_what_training_changes(golden: Callable[[str, str], None]) -> None:
    before = traced("mlp")
    program = rewriter.apply(before, LayerNormTuning()).program
    after = program.with_tensors({name: torch.full((22,), 0.5) for name in program.trainable})
    golden("ln_tuning.diff", str(rewriter.diff(program, after)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"targets": ()}, "no target given"),
        ("mlp", {"targets": ("down",)}, "'down' matches down, which is no norm"),
        ("gpt2", {"targets": ("ln_1", "ln_3")}, "'ln_3' matches no norm"),
        ("gpt2", {"exclude": r".*ln_.*"}, "match no norm that can train"),
        ("gpt2", {"targets": "(ln"}, "not a regular expression"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rewriter.apply(traced(name), LayerNormTuning(**options))


def test_a_model_without_norms_is_named() -> None:
    program = rewriter.trace(randomise(nn.Linear(3, 4)), (torch.randn(2, 3),))
    with pytest.raises(UsageError, match="has no norm layer at all"):
        rewriter.apply(program, LayerNormTuning())
