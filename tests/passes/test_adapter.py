"""Bottleneck adapters: what they add, compute, train and cost, what they refuse, and how they go with other passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes import Adapter, Lora, Merge
from rewriter.errors import RewriteError, RewriteWarning, UsageError
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from tests.models import traced
from tests.oracle import distance, example, operations, run, traced_double, trained

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (1 - torch.exp(-2 * x)) / (1 + torch.exp(-2 * x)),
}


def added(program: Program) -> dict[str, Tensor]:
    return {name: program.tensor(name).detach() for step in program.steps for name in step.added}


def parts(program: Program, path: str, adapter: str = "default") -> dict[str, Tensor]:
    prefix = f"{path}.adapter.{adapter}."
    return {name.removeprefix(prefix): t for name, t in added(program).items() if name.startswith(prefix)}


def shapes(program: Program, path: str) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in parts(program, path).items()}


# -- parameters and cost ------------------------------------------------------------------------------------------


def test_a_bottleneck_has_two_matrices_with_biases() -> None:
    result = rewriter.apply(traced("llama"), Adapter(bottleneck=5))
    assert shapes(result.program, "model.layers.1.mlp.down_proj") == {
        "down.weight": [5, 24],
        "down.bias": [5],
        "up.weight": [24, 5],
        "up.bias": [24],
    }
    record = result.applied[0]
    assert record.added == record.trainable == 4 * (2 * 24 * 5 + 5 + 24)
    assert result.program.trainable == tuple(added(result.program))
    assert record.notes["model.layers.0.mlp.down_proj"] == {"added_flops_per_token": 4 * 5 * 24}
    for name, tensor in traced("llama").tensors.items():
        assert result.program.tensor(name) is tensor


def test_options_add_their_parameters() -> None:
    adapter = Adapter(
        bottleneck=3, bias=False, norm_before=True, norm_after=True, learned_scale=True, scale=0.5, adapter="task"
    )
    new = parts(rewriter.apply(traced("mlp"), adapter).program, "down", "task")
    assert {name: list(tensor.shape) for name, tensor in new.items()} == {
        "norm_before.weight": [10],
        "norm_before.bias": [10],
        "down.weight": [3, 10],
        "up.weight": [10, 3],
        "norm_after.weight": [10],
        "norm_after.bias": [10],
        "scale": [1],
    }
    assert new["scale"].tolist() == [0.5]
    channels = Adapter(learned_scale=True, scale_per_channel=True)
    assert shapes(rewriter.apply(traced("mlp"), channels).program, "down")["scale"] == [10]


@pytest.mark.parametrize(("reduction", "size"), [(16, 1), (5, 2), (4.9, 2), (2, 5), (0.5, 20), (100, 1)])
def test_the_reduction_gives_the_size(reduction: float, size: int) -> None:
    program = rewriter.apply(traced("mlp"), Adapter(reduction=reduction)).program
    assert shapes(program, "down")["down.weight"] == [size, 10]


def test_how_it_starts() -> None:
    torch.manual_seed(0)
    base = rewriter.trace(nn.Sequential(nn.Linear(400, 300), nn.ReLU()), (torch.randn(2, 400),))
    new = parts(rewriter.apply(base, Adapter(form="layer", targets=("0",), bottleneck=80)).program, "0")
    limit = 1 / math.sqrt(400)
    assert float(new["down.weight"].std()) == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert not any(new[name].any() for name in ("down.bias", "up.weight", "up.bias"))
    xavier = Adapter(form="layer", targets=("0",), bottleneck=80, init="xavier")
    other = parts(rewriter.apply(base, xavier).program, "0")
    for name, limit in (("down.weight", math.sqrt(6 / 480)), ("up.weight", math.sqrt(6 / 380))):
        assert float(other[name].std()) == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert not other["down.bias"].any()


def test_the_start_follows_from_the_seed_and_the_path() -> None:
    one, same, other = (added(rewriter.apply(traced("bert"), Adapter(seed=seed)).program) for seed in (3, 3, 4))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    downs = [name for name in one if name.endswith("down.weight")]
    assert not any(torch.equal(one[name], other[name]) for name in downs)
    assert not torch.equal(one[downs[0]], one[downs[1]])
    alone = added(rewriter.apply(traced("bert"), Adapter(seed=3, placement="pfeiffer")).program)
    assert all(torch.equal(tensor, one[name]) for name, tensor in alone.items())


def test_parameters_have_the_type_of_what_they_act_on() -> None:
    module = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)).to(torch.bfloat16)
    base = rewriter.trace(module, (torch.randn(3, 6, dtype=torch.bfloat16),))
    program = rewriter.apply(base, Adapter(form="layer", targets=("0", "2"), bottleneck=2)).program
    assert {tensor.dtype for tensor in added(program).values()} == {torch.bfloat16}


# -- what it computes ---------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def perceptron(program: Program, x: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The model of `traced("mlp")`, with `change(h, x)` of what the sublayer gives and reads."""
    t = {name: tensor.detach() for name, tensor in program.tensors.items()}
    hidden = norm(ACTIVATIONS["relu"](x @ t["up.weight"].t() + t["up.bias"]), t["norm.weight"], t["norm.bias"])
    total = x + change(hidden @ t["down.weight"].t(), x)
    return total @ t["head.weight"].t() + t["head.bias"]


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"activation": name} for name in ACTIVATIONS},
    "parallel": {"form": "parallel", "scale": 4.0},
    "without biases": {"bias": False},
    "a learned scale": {"learned_scale": True},
    "a learned scale per channel": {"learned_scale": True, "scale_per_channel": True, "form": "parallel"},
    "norms": {"norm_before": True, "norm_after": True, "scale": 0.7},
    "norms in parallel": {"norm_before": True, "norm_after": True, "form": "parallel", "activation": "silu"},
    "a norm of the sum": {"norm_after": True, "norm_sum": True},
}


@pytest.mark.parametrize("case", VARIANTS)
def test_the_formula(case: str) -> None:
    base, options = traced_double("mlp"), VARIANTS[case]
    adapter = Adapter(bottleneck=3, dropout=0.3, **options)
    program = trained(rewriter.apply(base, adapter).program)
    new = parts(program, "down")

    def change(h: Tensor, x: Tensor) -> Tensor:
        z = x if adapter.form == "parallel" else h
        if adapter.norm_before:
            z = norm(z, new["norm_before.weight"], new["norm_before.bias"])
        low = torch.einsum("...i,ri->...r", z, new["down.weight"]) + new.get("down.bias", 0)
        high = torch.einsum("...r,or->...o", ACTIVATIONS[adapter.activation](low), new["up.weight"])
        high = (high + new.get("up.bias", 0)) * new.get("scale", adapter.scale)
        if not adapter.norm_after:
            return h + high
        after = (new["norm_after.weight"], new["norm_after.bias"])
        return norm(h + high, *after) if adapter.norm_sum else h + norm(high, *after)

    (x,), _ = example("mlp", double=True)
    assert distance(run(program, "mlp"), [perceptron(program, x, change)]) < 1e-12
    assert distance(run(program, "mlp"), run(base, "mlp")) > 1e-2


def test_beside_linear_layers_of_any_shape() -> None:
    base = traced_double("mlp")
    result = rewriter.apply(base, Adapter(form="layer", targets=("up", "head"), bottleneck=3, scale=1.5))
    program = trained(result.program)
    assert shapes(program, "up") == {"down.weight": [3, 10], "down.bias": [3], "up.weight": [22, 3], "up.bias": [22]}
    t = {name: tensor.detach() for name, tensor in program.tensors.items()}

    def beside(path: str, x: Tensor) -> Tensor:
        new = parts(program, path)
        low = ACTIVATIONS["relu"](x @ new["down.weight"].t() + new["down.bias"])
        return x @ t[f"{path}.weight"].t() + t[f"{path}.bias"] + 1.5 * (low @ new["up.weight"].t() + new["up.bias"])

    (x,), _ = example("mlp", double=True)
    hidden = norm(ACTIVATIONS["relu"](beside("up", x)), t["norm.weight"], t["norm.bias"])
    expected = beside("head", x + hidden @ t["down.weight"].t())
    assert distance(run(program, "mlp"), [expected]) < 1e-12
    assert distance(run(program, "mlp"), run(base, "mlp")) > 1e-2


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "same": {"kernel_size": (5, 4), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "strided": {"kernel_size": (3, 4), "stride": (2, 3), "padding": 1},
    "padded widely": {"kernel_size": 1, "padding": (2, 0), "stride": 2},
    "dilated": {"kernel_size": (2, 5), "dilation": (3, 2), "padding": (0, 3)},
    "grouped": {"kernel_size": 3, "groups": 2, "stride": 2},
}


@pytest.mark.parametrize("case", GEOMETRIES)
def test_beside_a_convolution_it_reads_the_centre_of_each_kernel(case: str) -> None:
    geometry = GEOMETRIES[case]
    torch.manual_seed(1)
    layer = nn.Conv2d(6, 8, **geometry).double()
    image = torch.randn(2, 6, 11, 14, dtype=torch.float64)
    base = rewriter.trace(nn.Sequential(layer), (image,))
    adapter = Adapter(form="layer", targets=("0",), bottleneck=3, learned_scale=True, scale_per_channel=True)
    program = trained(rewriter.apply(base, adapter).program)
    new = parts(program, "0")
    expected = layer(image).detach()
    for row in range(expected.shape[2]):
        for column in range(expected.shape[3]):
            pixel = torch.zeros(2, 6, dtype=torch.float64)
            places = []
            for axis, position in enumerate((row, column)):
                size, step = layer.kernel_size[axis], layer.dilation[axis]
                reach = step * (size - 1)
                pad = {"same": reach // 2, "valid": 0}.get(layer.padding, 0)  # type: ignore[arg-type]
                if not isinstance(layer.padding, str):
                    pad = layer.padding[axis]
                places.append(position * layer.stride[axis] - pad + reach // 2)
            if 0 <= places[0] < 11 and 0 <= places[1] < 14:
                pixel = image[:, :, places[0], places[1]]
            low = ACTIVATIONS["relu"](pixel @ new["down.weight"].flatten(1).t() + new["down.bias"])
            high = low @ new["up.weight"].flatten(1).t() + new["up.bias"]
            expected[:, :, row, column] += high * new["scale"]
    assert distance([program(image)], [expected]) < 1e-12
    assert distance([program(image)], [base(image)]) > 1e-2


@pytest.mark.parametrize("options", [{}, {"init": "xavier"}, {"norm_after": True, "norm_sum": True}])
def test_laws(options: dict[str, Any]) -> None:
    adapter = Adapter(bottleneck=3, **options)
    change = rewriter.apply(traced("bert"), adapter).applied[0].change
    assert adapter.law.kind == ("free" if options else "exact")
    assert change is not None
    assert change.equal is not bool(options)


# -- with other passes --------------------------------------------------------------------------------------------


def bottleneck(new: dict[str, Tensor], z: Tensor) -> Tensor:
    low = ACTIVATIONS["relu"](z @ new["down.weight"].t() + new["down.bias"])
    return low @ new["up.weight"].t() + new["up.bias"]


LORA = Lora(targets=("down",), rank=4, alpha=7)


@pytest.mark.parametrize("order", ["lora first", "adapter first"])
def test_with_lora_on_the_output_projection(order: str) -> None:
    """A LoRA belongs to its layer: the adapter behind it reads the sum, whichever of the two came first."""
    base = traced_double("mlp")
    passes = (LORA, Adapter(bottleneck=3)) if order == "lora first" else (Adapter(bottleneck=3), LORA)
    program = trained(rewriter.apply(base, *passes).program)
    new, t = parts(program, "down"), program.tensors
    a, b = t["down.lora_A.default"].detach(), t["down.lora_B.default"].detach()
    hidden: list[Tensor] = []
    (x,), _ = example("mlp", double=True)
    perceptron(program, x, lambda h, x: hidden.append(h) or h)  # type: ignore[func-returns-value]
    (h,) = hidden
    inner = norm(ACTIVATIONS["relu"](x @ t["up.weight"].t() + t["up.bias"]), t["norm.weight"], t["norm.bias"])
    update = 7 / 4 * (inner @ a.t() @ b.t()).detach()
    total = h + update + bottleneck(new, h + update)
    expected = perceptron(program, x, lambda *_: total)
    assert distance(run(program, "mlp"), [expected]) < 1e-12
    for step, other in ((1, passes[1]), (2, passes[0])):
        assert rewriter.text(rewriter.undo(program, step)).count("!") == rewriter.text(
            rewriter.apply(base, other).program
        ).count("!")
    assert rewriter.text(rewriter.undo(rewriter.undo(program, 1))) == rewriter.text(base)
    assert rewriter.text(rewriter.undo(rewriter.undo(program, 2))) == rewriter.text(base)


@pytest.mark.parametrize("options", [{}, {"form": "parallel"}, {"original_norm": "both"}, {"original_norm": "before"}])
def test_two_adapters_stand_one_behind_the_other(options: dict[str, Any]) -> None:
    base = traced("bert")
    one, two = Adapter(bottleneck=3, **options), Adapter(bottleneck=2, adapter="second", **options)
    program = rewriter.apply(base, one, two).program
    assert all(torch.equal(a, b) for a, b in zip(run(base, "bert"), run(program, "bert"), strict=True))
    assert len(parts(program, "encoder.layer.1.output.dense", "second")) == 4
    first = trained(rewriter.apply(base, one).program)
    values = added(first)
    # the second starts at zero: the first, trained, gives what it gives alone
    assert distance(run(program.with_tensors(values), "bert"), run(first, "bert")) < 1e-6
    second = {n: t for n, t in added(trained(program)).items() if ".second." in n}
    assert distance(run(program.with_tensors({**values, **second}), "bert"), run(first, "bert")) > 1e-2
    assert rewriter.text(rewriter.undo(program)) == rewriter.text(rewriter.apply(base, one).program)


def test_a_series_adapter_reads_the_one_before_it() -> None:
    base = traced_double("mlp")
    adapters = (Adapter(bottleneck=3), Adapter(bottleneck=2, adapter="second"))
    program = trained(rewriter.apply(base, *adapters).program)

    def change(h: Tensor, x: Tensor) -> Tensor:
        h = h + bottleneck(parts(program, "down"), h)
        return h + bottleneck(parts(program, "down", "second"), h)

    (x,), _ = example("mlp", double=True)
    assert distance(run(program, "mlp"), [perceptron(program, x, change)]) < 1e-12


def test_around_a_block_that_has_an_adapter_behind_it_is_refused() -> None:
    behind = rewriter.apply(traced("bert"), Adapter(original_norm="before")).program
    with pytest.raises(UsageError, match="stands behind the block") as error:
        rewriter.apply(behind, Adapter(original_norm="both", adapter="second"))
    assert "original_norm=before last" in error.value.fix


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["series", "parallel"])
def test_a_merge_names_the_operation_that_is_not_affine(form: Any, activation: Any) -> None:
    program = trained(rewriter.apply(traced("mlp"), Adapter(form=form, activation=activation)).program)
    with pytest.raises(RewriteError, match=rf"down\.adapter\.default.* cannot be merged: {activation} is not") as error:
        rewriter.apply(program, Merge())
    assert any(f"adapter_{activation}" in line for line in error.value.evidence)
    assert "--keep" not in error.value.fix  # nothing would be left to merge


def test_a_merge_refuses_a_lora_beside_an_adapter_as_a_whole() -> None:
    base = traced("mlp")
    program = trained(rewriter.apply(base, Adapter(), Lora(targets=("up",), rank=3)).program)
    with pytest.raises(RewriteError, match=r"down\.adapter\.default.* cannot be merged: relu is not affine") as error:
        rewriter.apply(program, Merge())
    assert "--keep adapter" in error.value.fix
    merged = rewriter.apply(rewriter.undo(program, "adapter"), Merge()).program
    assert operations(merged) == operations(base)
    assert distance(run(merged, "mlp"), run(rewriter.undo(program, "adapter"), "mlp")) < 1e-5


def test_a_lora_merged_before_stays_merged_below_the_adapter() -> None:
    with_lora = trained(rewriter.apply(traced("mlp"), LORA).program)
    merged = rewriter.apply(with_lora, Merge()).program
    values = added(trained(rewriter.apply(traced("mlp"), Adapter(bottleneck=3)).program))
    one, two = (rewriter.apply(p, Adapter(bottleneck=3)).program.with_tensors(values) for p in (with_lora, merged))
    assert distance(run(one, "mlp"), run(two, "mlp")) < 1e-5


# -- out and back -------------------------------------------------------------------------------------------------

EVERYTHING = Adapter(
    bottleneck=3,
    activation="gelu",
    dropout=0.1,
    norm_before=True,
    norm_after=True,
    learned_scale=True,
    original_norm="both",
)
CONVOLUTIONS = Adapter(form="layer", targets=("stem", "grouped", "signal", "head"), bottleneck=3, activation="tanh")
CASES: dict[str, tuple[str, Adapter]] = {
    "llama": ("llama", Adapter(bottleneck=3, activation="silu", scale=2.0)),
    "bert": ("bert", EVERYTHING),
    "t5": ("t5", Adapter(form="parallel", bottleneck=3)),
    "conv": ("conv", CONVOLUTIONS),
}


@pytest.mark.parametrize("case", ["bert", "conv"])
def test_saved_and_loaded(case: str, tmp_path: Path) -> None:
    name, pass_ = CASES[case]
    program = trained(rewriter.apply(traced(name), pass_).program)
    loaded = rewriter.load(program.save(tmp_path / "program.pt2"))
    assert rewriter.text(loaded) == rewriter.text(program)
    assert all(torch.equal(a, b) for a, b in zip(run(loaded, name), run(program, name), strict=True))
    assert rewriter.text(rewriter.undo(loaded)) == rewriter.text(traced(name))


@pytest.mark.parametrize("case", CASES)
def test_exported_to_onnx(case: str, tmp_path: Path) -> None:
    name, pass_ = CASES[case]
    program = trained(rewriter.apply(traced(name), pass_).program, size=0.2)
    assert distance(run(program, name), run(traced(name), name)) > 1e-2
    report = export_onnx(program, tmp_path / "model.onnx")
    assert 0 <= report.max_abs_error < 1e-4


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter(bottleneck=4, dropout=0.1),
        Adapter(bottleneck=4, form="parallel", norm_before=True, norm_after=True, learned_scale=True),
        Adapter(bottleneck=4, form="layer", targets=("up", "head"), bias=False),
    ],
    ids=lambda adapter: adapter.form,
)
def test_training_moves_the_adapter_and_nothing_else(adapter: Adapter) -> None:
    program = rewriter.apply(traced("mlp"), adapter).program
    before = {name: tensor.detach().clone() for name, tensor in program.tensors.items()}
    module = program.module()
    module.train()
    torch.manual_seed(0)
    x, y = torch.randn(16, 4, 10), torch.randn(16, 4, 7)
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert {name for name, p in module.named_parameters() if p.grad is not None} == set(program.trainable)
    assert set(program.trainable) == set(added(program))
    for name, tensor in module.named_parameters():
        assert torch.equal(tensor, before[name]) is (name not in program.trainable), name
    assert torch.equal(program.with_weights(module)(x), module.eval()(x))


def test_dropout_follows_the_mode() -> None:
    program = trained(rewriter.apply(traced("vit"), Adapter(dropout=0.5)).program)
    _, kwargs = example("vit")
    module = program.module().eval()
    assert torch.equal(module(**kwargs).logits, module(**kwargs).logits)
    module.train()
    assert not torch.equal(module(**kwargs).logits, module(**kwargs).logits)


# -- refusals -----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "bottleneck 0": ({"bottleneck": 0}, "bottleneck is 0"),
    "bottleneck a float": ({"bottleneck": 8.0}, r"bottleneck is 8\.0"),
    "bottleneck a boolean": ({"bottleneck": True}, "bottleneck is True"),
    "bottleneck a text": ({"bottleneck": "8"}, "bottleneck is '8'"),
    "reduction 0": ({"reduction": 0}, "reduction is 0"),
    "reduction NaN": ({"reduction": math.nan}, "reduction is nan"),
    "reduction a boolean": ({"reduction": True}, "reduction is True"),
    "dropout 1": ({"dropout": 1.0}, r"dropout is 1\.0"),
    "dropout a text": ({"dropout": "0.1"}, "dropout is '0.1'"),
    "scale infinite": ({"scale": math.inf}, "scale is inf"),
    "scale a text": ({"scale": "learned"}, "scale is 'learned'"),
    "form unknown": ({"form": "serial"}, "form is 'serial'"),
    "placement unknown": ({"placement": "mlp"}, "placement is 'mlp'"),
    "activation unknown": ({"activation": "swish"}, "activation is 'swish'"),
    "init unknown": ({"init": "bert"}, "init is 'bert'"),
    "original_norm a boolean": ({"original_norm": True}, "original_norm is True"),
    "bias a number": ({"bias": 1}, "bias is 1"),
    "norm_before a text": ({"norm_before": "yes"}, "norm_before is 'yes'"),
    "adapter empty": ({"adapter": ""}, "adapter is ''"),
    "adapter with a dot": ({"adapter": "a.b"}, r"adapter is 'a\.b'"),
    "adapter a number": ({"adapter": 3}, "adapter is 3"),
    "seed a float": ({"seed": 0.5}, r"seed is 0\.5"),
    "targets without layer": ({"targets": ("up",)}, "targets has no meaning with form=series"),
    "layer without targets": ({"form": "layer"}, "form=layer needs targets"),
    "placement with layer": (
        {"form": "layer", "targets": ("up",), "placement": "pfeiffer"},
        "placement has no meaning",
    ),
    "original_norm in parallel": ({"form": "parallel", "original_norm": "both"}, "original_norm has no meaning"),
    "pre_norm in series": ({"pre_norm": False}, "pre_norm has no meaning"),
    "channels of a fixed scale": ({"scale_per_channel": True}, "scale_per_channel without learned_scale"),
    "norm_sum alone": ({"norm_sum": True}, "norm_sum without norm_after"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be_meant(case: str) -> None:
    options, said = OPTIONS[case]
    with pytest.raises(UsageError, match=said) as error:
        Adapter(**options)
    assert error.value.exit_code == 2
    assert error.value.fix


PLACES: dict[str, tuple[str, dict[str, Any], str]] = {
    "no residual": ("conv", {}, "no sublayer with a residual addition"),
    "no attention": ("mlp", {"placement": "attention"}, "no sublayer that placement=attention means"),
    "layer that does not exist": ("llama", {"layers": (7,)}, "excluded"),
    "everything excluded": ("mlp", {"exclude": ("down",)}, "excluded"),
    "target unmatched": ("mlp", {"form": "layer", "targets": ("upp",)}, "'upp' matches no layer"),
    "target an embedding": ("gpt2", {"form": "layer", "targets": ("wte",)}, "which is an embedding"),
    "target a slice": ("gpt2", {"form": "layer", "targets": ("@attention.query",)}, "slice of a fused projection"),
    "norm beside a convolution": ("conv", {"form": "layer", "targets": ("stem",), "norm_after": True}, "a layer norm"),
}


@pytest.mark.parametrize("case", PLACES)
def test_places_that_cannot_be_meant(case: str) -> None:
    name, options, said = PLACES[case]
    base = traced(name)
    before = rewriter.text(base)
    with pytest.raises(UsageError, match=said):
        rewriter.apply(base, Adapter(**options))
    assert rewriter.text(base) == before


def test_an_adapter_name_is_used_once_per_sublayer() -> None:
    once = rewriter.apply(traced("mlp"), Adapter()).program
    with pytest.raises(UsageError, match=r"already has a parameter 'down\.adapter\.default"):
        rewriter.apply(once, Adapter())


def test_a_scale_of_zero_is_warned_of() -> None:
    with pytest.warns(RewriteWarning, match="scale is 0: the adapter has no effect"):
        Adapter(scale=0)


# -- as a reader sees it ------------------------------------------------------------------------------------------

GOLDEN: dict[str, tuple[str, Adapter]] = {
    "adapter": ("mlp", Adapter(bottleneck=3)),
    "adapter_parallel": ("llama", Adapter(bottleneck=3, form="parallel", scale=4.0, placement="pfeiffer")),
    "adapter_around": ("bert", Adapter(bottleneck=3, original_norm="both", placement="pfeiffer", layers=(1,))),
    "adapter_norms": ("mlp", Adapter(bottleneck=3, norm_before=True, norm_after=True, learned_scale=True, dropout=0.1)),
    "adapter_conv": ("conv", Adapter(form="layer", targets=("grouped", "signal", "head"), bottleneck=3)),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_what_it_adds(case: str, golden: Callable[[str, str], None]) -> None:
    name, pass_ = GOLDEN[case]
    golden(f"{case}.diff", str(rewriter.diff(traced(name), rewriter.apply(traced(name), pass_).program)))
