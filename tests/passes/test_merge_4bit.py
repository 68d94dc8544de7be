"""Merging beside 4-bit weights, under each policy; the folded weights are worked out by hand in fp64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes import Ia3, Lora, Merge, Nf4
from rewriter.errors import LawError, RewriteError, UsageError
from rewriter.program import Program
from rewriter.quantised import held, weight_value
from rewriter.view import Linear4bit, layers
from runtime.nf4 import dequantize, quantize
from tests.models import TINY, Perceptron, llama_config, randomise, traced
from tests.oracle import distance, operations, run, traced_double, trained


@functools.cache
def qlora(name: str = "mlp", *, size: float = 0.3, **options: Any) -> tuple[Program, Program]:
    """A program in 4 bits, and the same with a trained LoRA."""
    targets = options.pop("targets", "all-linear")
    bits4 = rewriter.apply(traced(name), Nf4(**options)).program
    lora = Lora(targets=targets, rank=3, alpha=6, lora_bias=name == "mlp")
    return bits4, trained(rewriter.apply(bits4, lora).program, size=size)


def levels_of(program: Program, path: str) -> Tensor:
    site = layers(program)[path]
    assert isinstance(site, Linear4bit)
    return dequantize(held(program, site), torch.float32).double()


def update(program: Program, path: str, adapter: str = "default", scale: float = 2) -> Tensor:
    a, b = (program.tensor(f"{path}.lora_{side}.{adapter}").detach().double() for side in "AB")
    return scale * torch.einsum("or,ri->oi", b, a)


def merge(program: Program, **options: Any) -> Any:
    return rewriter.apply(program, Merge(**options))


# -- dequantise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"double_quantise": True, "kind": "fp4", "block_size": 32}])
@pytest.mark.parametrize("name", ["mlp", "gpt2", "llama"])
def test_dequantised_by_hand(name: str, options: dict[str, Any]) -> None:
    bits4, program = qlora(name, **options)
    result = merge(program)
    values = {}
    for path, site in layers(bits4).items():
        if isinstance(site, Linear4bit):
            expected = levels_of(bits4, path) + update(program, path)
            merged = result.program.tensor(f"{path}.weight")
            assert merged.dtype is torch.float32
            assert float((merged.double() - expected).abs().max()) < 1e-6
            transposed = name == "gpt2"
            values[f"{path}.weight"] = expected.t().contiguous() if transposed else expected
    if name != "mlp":  # its biases change too: see below
        expected_outputs = run(traced_double(name).with_tensors(values), name)
        assert distance(run(result.program, name), expected_outputs) < 2e-4
    assert distance(run(result.program, name), run(program, name)) < 1e-4
    assert distance(run(bits4, name), run(program, name)) > 1e-2
    left = [tensor for tensor in result.program.tensors if "lora" in tensor or "packed" in tensor or "absmax" in tensor]
    assert left == []
    assert not [operation for operation in operations(result.program) if "nf4" in operation]


def test_one_rounding_in_bf16() -> None:
    from transformers import LlamaForCausalLM

    _, _, inputs = TINY["llama"]()
    base = rewriter.trace(randomise(LlamaForCausalLM(llama_config())).bfloat16(), (), inputs)
    bits4 = rewriter.apply(base, Nf4(targets=("up_proj", "down_proj"))).program
    program = trained(rewriter.apply(bits4, Lora(targets=("up_proj", "down_proj"), rank=3, alpha=6)).program)
    result = merge(program)
    for path in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"):
        merged = result.program.tensor(f"{path}.weight")
        exact = levels_of(bits4, path) + update(program, path)
        assert merged.dtype is torch.bfloat16
        assert float((merged != exact.bfloat16()).double().mean()) < 0.002  # fp32 sums beside a tie
        assert 0 < result.applied[0].notes[path]["error_of_update"] < 0.02
        assert result.applied[0].notes[path]["bits_per_weight"] == 16


def test_biases_of_the_update_are_folded() -> None:
    bits4, program = qlora("mlp")
    result = merge(program)
    for path in ("up", "head"):
        (name,) = (each for each in program.tensors if each.startswith(path) and "lora" in each and "bias" in each)
        expected = bits4.tensor(f"{path}.bias").double() + 2 * program.tensor(name).double()
        assert float((result.program.tensor(f"{path}.bias").double() - expected).detach().abs().max()) < 1e-6
    assert "down.bias" in result.program.tensors  # had none before


def test_two_adapters_fold_into_one_weight() -> None:
    bits4, _ = qlora("mlp")
    program = rewriter.apply(
        bits4,
        Lora(targets=("up",), rank=3, alpha=6),
        Lora(targets=("up",), rank=2, alpha=6, adapter="second"),
        Ia3(targets=("up",), feedforward_targets=()),
    ).program
    program = trained(program)
    (name,) = (each for each in program.tensors if "ia3" in each)
    factor = program.tensor(name).detach().double().reshape(-1, 1)
    exact = factor * (levels_of(bits4, "up") + update(program, "up") + update(program, "up", "second", 3))
    assert float((merge(program).program.tensor("up.weight").double() - exact).detach().abs().max()) < 1e-6
    again = merge(program, nf4="requantise", lossy=True).program
    expected = quantize(exact.float())
    assert torch.equal(again.tensor("up.weight_packed"), expected.packed)
    assert torch.allclose(again.tensor("up.weight_absmax"), expected.absmax, rtol=1e-6)


# -- keep -------------------------------------------------------------------------------------------------------------


def test_what_is_not_4_bit_still_merges() -> None:
    bits4 = rewriter.apply(traced("mlp"), Nf4(targets=("up",))).program
    program = trained(rewriter.apply(bits4, Lora(targets=("up", "head"), rank=3, alpha=6)).program)
    result = merge(program, nf4="keep")
    assert [site.path for site in result.sites] == ["head"]
    assert {"up.weight_packed", "up.lora_A.default"} <= set(result.program.tensors)
    assert "head.lora_A.default" not in result.program.tensors
    expected = bits4.tensor("head.weight").detach().double() + update(program, "head")
    assert float((result.program.tensor("head.weight").double() - expected).detach().abs().max()) < 1e-6
    assert distance(run(result.program, "mlp"), run(program, "mlp")) < 1e-5


def test_nothing_is_left_to_merge() -> None:
    _, program = qlora("mlp")
    with pytest.raises(
        RewriteError, match="nothing to merge: every update lies beside a weight held in 4 bits"
    ) as error:
        merge(program, nf4="keep")
    assert "--nf4 dequantise" in error.value.fix


# -- requantise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"double_quantise": True}, {"kind": "fp4", "block_size": 32}])
def test_requantised_by_hand(options: dict[str, Any]) -> None:
    bits4, program = qlora("gpt2", size=0.7, **options)
    result = merge(program, nf4="requantise")
    assert not [name for name in result.program.tensors if "lora" in name]
    for path, site in layers(bits4).items():
        if not isinstance(site, Linear4bit):
            continue
        change = update(program, path)
        exact = levels_of(bits4, path) + change
        made = quantize(
            exact.float(),
            block_size=site.block_size,
            kind=site.quantisation,
            double_quantise=bool(options.get("double_quantise")),
        )
        error = (levels_of(result.program, path) - exact).norm() / change.norm()
        note = result.applied[0].notes[path]
        assert note["error_of_update"] == pytest.approx(float(error), rel=1e-3)
        assert note["update"] == pytest.approx(float(change.norm() / levels_of(bits4, path).norm()), rel=1e-4)
        assert note["bits_per_weight"] == pytest.approx(made.bits_per_weight)
        assert note["error_of_update"] < 0.5
        same = (result.program.tensor(f"{path}.weight_packed") == made.packed).double().mean()
        assert float(same) > 0.99  # sums in fp32 and in fp64 may fall on either side of a threshold
    assert {name: t.dtype for name, t in result.program.tensors.items()} == {
        name: t.dtype for name, t in bits4.tensors.items()
    }


def test_a_small_update_is_not_thrown_away() -> None:
    _, program = qlora("gpt2", size=0.04)
    with pytest.raises(LawError, match="would lose") as error:
        merge(program, nf4="requantise")
    assert "--lossy" in error.value.fix
    result = merge(program, nf4="requantise", lossy=True)
    assert max(note["error_of_update"] for note in result.applied[0].notes.values()) > 0.5
    assert "free" in str(result.applied[0].pass_.law)


def test_without_an_update_the_bytes_stay() -> None:
    bits4, _ = qlora("mlp", double_quantise=True, search=True)
    fresh = rewriter.apply(bits4, Lora(targets=("up",), rank=3)).program
    result = merge(fresh, nf4="requantise")
    for name, tensor in bits4.tensors.items():
        assert torch.equal(tensor, result.program.tensor(name)), name


@pytest.mark.parametrize("policy", ["dequantise", "requantise"])
def test_undo_leaves_no_difference(policy: Any) -> None:
    _, program = qlora("mlp", size=0.7)
    after = rewriter.undo(merge(program, nf4=policy, lossy=True).program)
    assert not rewriter.diff(program, after)
    assert distance(run(program, "mlp"), run(after, "mlp")) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("policy", ["dequantise", "requantise"])
def test_an_adapter_that_is_not_finite(policy: Any, value: float) -> None:
    _, program = qlora("mlp")
    broken = program.tensor("up.lora_B.default").detach().clone()
    broken[2, 1] = value
    program = program.with_tensors({"up.lora_B.default": broken})
    with pytest.raises(LawError, match="non-finite"):
        merge(program, nf4=policy)
    if policy == "requantise":
        with pytest.raises(RewriteError, match="4 bits"):
            merge(program, nf4=policy, allow_nonfinite=True)


# -- a layer that is called twice -------------------------------------------------------------------------------------


class Twice(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x) + self.up(2 * x)))


@pytest.mark.parametrize("policy", ["dequantise", "requantise"])
def test_a_layer_that_is_called_twice(policy: Any) -> None:
    x = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(1))
    bits4 = rewriter.apply(rewriter.trace(randomise(Twice()), (x,)), Nf4(targets=("up",))).program
    program = trained(rewriter.apply(bits4, Lora(targets=("up",), rank=3, alpha=6)).program, size=0.7)
    result = merge(program, nf4=policy, lossy=True)
    exact = levels_of(bits4, "up") + update(program, "up")
    value = weight_value(result.program, layers(result.program)["up"]).detach().double()
    limit = 1e-6 if policy == "dequantise" else 0.2 * float(exact.abs().max())
    assert float((value - exact).abs().max()) < limit
    assert len(layers(result.program)["up"].calls) == 2
    if policy == "dequantise":
        assert distance([result.program(x)], [program(x)]) < 1e-4


class OneCall(nn.Module):
    """A layer called twice, with an update beside the first call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(10, 22), nn.Linear(22, 7)
        self.a, self.b = nn.Parameter(torch.empty(3, 10)), nn.Parameter(torch.empty(22, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.up(x) + x @ self.a.t() @ self.b.t()) + torch.relu(self.up(2 * x)))


@pytest.mark.parametrize("policy", ["dequantise", "requantise"])
def test_an_update_beside_one_call_does_not_reach_the_other(policy: Any) -> None:
    x = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(1))
    program = rewriter.apply(rewriter.trace(randomise(OneCall()), (x,)), Nf4(targets=("up",))).program
    with pytest.raises(RewriteError, match="also read elsewhere"):
        merge(program, nf4=policy)
    if policy == "requantise":
        with pytest.raises(RewriteError, match="also read elsewhere") as error:
            merge(program, nf4=policy, untie=True, lossy=True)
        assert "--nf4 dequantise --untie" in error.value.fix
    else:
        after = merge(program, nf4=policy, untie=True).program
        assert distance([after(x)], [program(x)]) < 1e-4
        assert "up.weight_packed" in after.tensors


class OwnUpdates(OneCall):
    def forward(self, x: Tensor) -> Tensor:
        change = x @ self.a.t() @ self.b.t()
        return self.out(torch.relu(self.up(x) + change) + torch.relu(self.up(x) - change))


@pytest.mark.parametrize("policy", ["dequantise", "requantise"])
def test_two_calls_with_updates_of_their_own(policy: Any) -> None:
    x = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(1))
    program = rewriter.apply(rewriter.trace(randomise(OwnUpdates()), (x,)), Nf4(targets=("up",))).program
    if policy == "requantise":
        with pytest.raises(RewriteError, match="applied twice, with updates that differ"):
            merge(program, nf4=policy, lossy=True)
    else:
        after = merge(program, nf4=policy).program
        assert distance([after(x)], [program(x)]) < 1e-4
        assert distance([after(x)], [rewriter.apply(program, Lora(targets=("up",))).program(x)]) < 1e-4


def test_options_that_cannot_be_meant() -> None:
    with pytest.raises(UsageError, match="nf4 is 'drop'"):
        Merge(nf4="drop")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="lossy"):
        Merge(lossy=1)  # type: ignore[arg-type]
