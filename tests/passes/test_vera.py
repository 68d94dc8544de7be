"""VeRA: its shared pair, numbers by hand and in PEFT, how it starts and trains, its files, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes import Lora, Merge, Vera
from rewriter.errors import UsageError
from tests.models import TINY, traced
from tests.oracle import distance, operations, run
from tests.passes.weight_updates import (
    added,
    check_called_twice,
    check_files,
    check_numbers,
    check_peft,
    check_start,
    check_training,
    filled,
    named,
)


def by_hand(site: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """diag(λ_b) B diag(λ_d) A, of the corners of A and B that belong to the site."""
    scale_b, scale_d = (named(site, f"vera_lambda_{letter}", tensors) for letter in "bd")
    assert scale_b is not None
    assert scale_d is not None
    a, b = (tensors[f"vera_{letter}.default"] for letter in "AB")
    inputs, outputs = site.in_features, scale_b.shape[0]
    return torch.diag(scale_b) @ b[:outputs] @ torch.diag(scale_d) @ a[:, :inputs]


def test_one_pair_for_the_model_and_two_vectors_for_each_layer() -> None:
    base = traced("llama")
    result = rewriter.apply(base, Vera(targets=("v_proj", "down_proj"), rank=5, layers=(1,)))
    assert {name: list(t.shape) for name, t in added(result.program).items()} == {
        "vera_A.default": [5, 28],
        "vera_B.default": [24, 5],
        "model.layers.1.self_attn.v_proj.vera_lambda_b.default": [12],
        "model.layers.1.self_attn.v_proj.vera_lambda_d.default": [5],
        "model.layers.1.mlp.down_proj.vera_lambda_b.default": [24],
        "model.layers.1.mlp.down_proj.vera_lambda_d.default": [5],
    }
    assert set(result.program.trainable) == {name for name in added(result.program) if "lambda" in name}
    assert result.applied[0].trainable == 12 + 24 + 2 * 5
    assert not {"vera_A.default", "vera_B.default"} & set(result.program.parameters())


CASES: dict[str, tuple[str, Vera]] = {
    "llama": ("llama", Vera(targets=("q_proj", "v_proj", "down_proj"), rank=5, dropout=0.2)),
    "stored transposed": ("gpt2", Vera(targets=("c_attn", "mlp.c_proj"), rank=5)),
    "slices": ("gpt2", Vera(rank=5)),
    "one size": ("mlp", Vera(targets=("up",), rank=30)),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_by_hand(case: str) -> None:
    check_numbers(*CASES[case], by_hand)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_nothing_changes_at_the_start(name: str) -> None:
    check_start(name, Vera())


def test_start() -> None:
    new = added(rewriter.apply(traced("mlp"), Vera(targets=("up", "down"), rank=40, d_initial=0.25)).program)
    for path in ("up", "down"):
        assert not new[f"{path}.vera_lambda_b.default"].any()
        assert torch.equal(new[f"{path}.vera_lambda_d.default"], torch.full((40,), 0.25))
    for name, fan in (("vera_A.default", 22), ("vera_B.default", 40)):
        limit = math.sqrt(6 / fan)
        assert 0.95 * limit < float(new[name].abs().max()) <= limit
        assert float(new[name].std()) == pytest.approx(limit / math.sqrt(3), rel=0.05)


def test_the_pair_is_the_one_that_peft_draws() -> None:
    from peft import VeraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    module, args, kwargs = TINY["llama"]()
    theirs = get_peft_model(module, VeraConfig(r=5, target_modules=targets, projection_prng_key=11))
    program = rewriter.apply(traced("llama"), Vera(targets=tuple(targets), rank=5, projection_seed=11)).program
    other = rewriter.apply(traced("llama"), Vera(targets=tuple(targets), rank=5, projection_seed=12)).program
    double = rewriter.trace(TINY["llama"]()[0].double(), args, kwargs)
    wide = rewriter.apply(double, Vera(targets=tuple(targets), rank=5, projection_seed=11)).program
    for name in ("vera_A.default", "vera_B.default"):
        expected = theirs.state_dict()[f"base_model.{name}"]
        assert torch.equal(program.tensor(name), expected)
        assert torch.equal(wide.tensor(name), expected.double())
        assert not torch.equal(other.tensor(name), expected)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    rewriter.apply(traced("mlp"), Vera(targets=("up",), rank=3))
    assert torch.equal(torch.rand(1), expected)


def test_training_leaves_the_pair_alone() -> None:
    pass_ = Vera(targets=("q_proj", "v_proj"), rank=5)
    names = [name for name in added(rewriter.apply(traced("llama"), pass_).program) if "lambda" in name]
    check_training("llama", pass_, set(names))


def test_dropout_follows_the_mode() -> None:
    module = filled(rewriter.apply(traced("mlp"), Vera(targets=("up",), rank=5, dropout=0.5)).program).module()
    x = TINY["mlp"]()[1][0]
    assert torch.equal(module.eval()(x), module(x))
    assert "dropout" in str(rewriter.text(rewriter.apply(traced("mlp"), Vera(targets=("head",), dropout=0.5)).program))
    module.train()
    assert not torch.equal(module(x), module(x))


def test_files(tmp_path: Path) -> None:
    check_files("gpt2", Vera(rank=5), tmp_path)


def test_called_twice() -> None:
    check_called_twice(Vera(targets=("layer",), rank=20))


def test_several_adapters_have_pairs_of_their_own_and_merge_together() -> None:
    base = traced("llama")
    steps = [Vera(rank=5), Vera(targets=("down_proj",), rank=3, adapter="two", projection_seed=2), Lora(rank=3)]
    program = filled(rewriter.apply(base, *steps).program)
    merged = rewriter.apply(program, Merge()).program
    assert operations(merged) == operations(base)
    assert merged.tensors.keys() == base.tensors.keys()
    assert distance(run(program, "llama"), run(base, "llama")) > 1e-2
    assert distance(run(merged, "llama"), run(program, "llama")) < 1e-5
    with pytest.raises(UsageError, match=r"already has a parameter 'vera_A\.default'"):
        rewriter.apply(program, Vera(targets=("up_proj",), rank=5))


PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 5, "vera_dropout": 0.1}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 5, "fan_in_fan_out": True}),
    "bert, default rank": ("bert", {"target_modules": ["query", "output.dense"], "d_initial": 0.2}),
}


@pytest.mark.parametrize("case", PEFT)
def test_parity_with_peft(case: str) -> None:
    from peft import VeraConfig

    name, options = PEFT[case]
    renamed = {"r": "rank", "vera_dropout": "dropout", "d_initial": "d_initial"}
    ours = {renamed[key]: value for key, value in options.items() if key in renamed}
    check_peft(name, VeraConfig(**options), Vera(targets=tuple(options["target_modules"]), **ours))


@pytest.mark.parametrize(
    ("case", "name", "pass_"),
    [
        ("vera", "mlp", Vera(targets=("up", "down"), rank=4)),
        ("vera_slices", "gpt2", Vera(rank=4, layers=(1,), dropout=0.1)),
    ],
)
def test_what_it_adds(case: str, name: str, pass_: Vera, golden: Callable[[str, str], None]) -> None:
    golden(f"{case}.diff", str(rewriter.diff(traced(name), rewriter.apply(traced(name), pass_).program)))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"rank": 0}, "rank is 0"),
    "rank a boolean": ({"rank": True}, "rank is True"),
    "d_initial NaN": ({"d_initial": math.nan}, "d_initial is nan"),
    "d_initial a text": ({"d_initial": "0.1"}, "d_initial is '0.1'"),
    "dropout 1": ({"dropout": 1.0}, r"dropout is 1\.0"),
    "dropout a text": ({"dropout": "0.1"}, "dropout is '0.1'"),
    "seed negative": ({"projection_seed": -1}, "projection_seed is -1"),
    "seed a float": ({"projection_seed": 1.0}, r"projection_seed is 1\.0"),
    "adapter with a dot": ({"adapter": "a.b"}, r"adapter is 'a\.b'"),
    "target unmatched": ({"targets": ("up", "upp")}, "'upp' matches no layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant(case: str) -> None:
    options, said = REFUSED[case]
    with pytest.raises(UsageError, match=said):
        rewriter.apply(traced("mlp"), Vera(**{"targets": ("up",), **options}))


def test_a_convolution_is_refused() -> None:
    with pytest.raises(UsageError, match="matches stem, which is a conv"):
        rewriter.apply(traced("conv"), Vera(targets=("stem", "head")))


def test_layers_of_several_types_share_no_pair() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 7).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).double())

    base = rewriter.trace(Mixed(), (torch.randn(3, 5),))
    with pytest.raises(UsageError, match="weights of several types"):
        rewriter.apply(base, Vera(targets=("one", "two")))
