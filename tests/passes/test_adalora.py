"""AdaLoRA: its parameters, numbers by hand and in PEFT, how it starts and trains, its files, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rewriter
from passes import Adalora, Lora, Merge
from rewriter.errors import RewriteWarning, UsageError
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

CONVOLUTIONS = ("stem", "signal", "head")


def by_hand(alpha: float, rank: int) -> Callable[[Any, Mapping[str, Tensor]], Tensor]:
    """The sum over singular values e of e · b aᵀ, scaled by alpha over the rank that training starts with."""

    def update(site: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        a, b, e = (named(site, f"lora_{letter}", tensors) for letter in "ABE")
        assert a is not None
        assert b is not None
        assert e is not None
        total = torch.zeros(b.shape[0], a.shape[1], dtype=a.dtype)
        for r in range(a.shape[0]):
            total += float(e[r]) * torch.outer(b[:, r], a[r])
        shape = tensors[site.weight].shape if site.kind == "conv" else total.shape
        return (alpha / (rank + 1e-5) * total).reshape(shape)

    return update


def test_parameters() -> None:
    pass_ = Adalora(targets=("stem", "head"), rank=3, rank_pattern={"head": 2})
    program = rewriter.apply(traced("conv"), pass_).program
    assert {name: list(t.shape) for name, t in added(program).items()} == {
        "stem.lora_A.default": [3, 45],
        "stem.lora_B.default": [8, 3],
        "stem.lora_E.default": [3, 1],
        "stem.ranknum.default": [1],
        "head.lora_A.default": [2, 14],
        "head.lora_B.default": [6, 2],
        "head.lora_E.default": [2, 1],
        "head.ranknum.default": [1],
    }
    assert set(program.trainable) == {name for name in added(program) if "lora" in name}
    assert all(float(t) == 3.0 for name, t in added(program).items() if "ranknum" in name)


CASES: dict[str, tuple[str, Adalora, float]] = {
    "llama": ("llama", Adalora(targets=("q_proj", "down_proj"), rank=3, alpha=7, dropout=0.2), 7),
    "stored transposed": ("gpt2", Adalora(targets=("c_attn", "mlp.c_proj"), rank=3, alpha=7), 7),
    "slices": ("gpt2", Adalora(rank=3, alpha=5), 5),
    "convolutions": ("conv", Adalora(targets=CONVOLUTIONS, rank=3, alpha=1), 1),
    "pruned": ("mlp", Adalora(targets=("up", "down"), rank=6, rank_pattern={"up": 2}), 8),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_by_hand(case: str) -> None:
    name, pass_, alpha = CASES[case]
    check_numbers(name, pass_, by_hand(alpha, pass_.rank))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_nothing_changes_at_the_start(name: str) -> None:
    check_start(name, Adalora())


def test_start() -> None:
    def start(**options: Any) -> dict[str, Tensor]:
        return added(rewriter.apply(traced("llama"), Adalora(targets=("down_proj",), rank=20, **options)).program)

    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    new, other = start(), start(seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert all(not tensor.any() for name, tensor in new.items() if "lora_E" in name)
    for kind in ("lora_A", "lora_B"):
        name = f"model.layers.0.mlp.down_proj.{kind}.default"
        assert float(new[name].std()) == pytest.approx(0.02, rel=0.1)
        assert not torch.equal(new[name], new[name.replace(".0.", ".1.")])
        assert not torch.equal(new[name], other[name])


def test_a_layer_of_rank_0_gets_no_update() -> None:
    result = rewriter.apply(traced("mlp"), Adalora(targets=("up", "down"), rank=3, rank_pattern={"up": 0}))
    assert [site.path for site in result.sites] == ["down"]
    assert [(miss.path, miss.reason) for miss in result.missed] == [("up", "its rank is 0")]
    with pytest.raises(UsageError, match="leaves no layer a rank"):
        rewriter.apply(traced("mlp"), Adalora(targets=("up",), rank_pattern={"up": 0}))


@pytest.mark.parametrize(("name", "target"), [("llama", "q_proj"), ("conv", "signal")])
def test_training(name: str, target: str) -> None:
    pass_ = Adalora(targets=(target,), rank=3)
    new = added(rewriter.apply(traced(name), pass_).program)
    check_training(name, pass_, {key for key in new if "lora" in key})


def test_dropout_follows_the_mode() -> None:
    module = filled(rewriter.apply(traced("mlp"), Adalora(targets=("up",), rank=3, dropout=0.5)).program).module()
    x = TINY["mlp"]()[1][0]
    module.eval()
    one, two = module(x), module(x)
    assert torch.equal(one, two)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "slices").mkdir()
    check_files("gpt2", Adalora(rank=3, alpha=5), tmp_path / "slices")
    check_files("conv", Adalora(targets=("signal", "head"), rank=3, alpha=1), tmp_path)


def test_called_twice() -> None:
    check_called_twice(Adalora(targets=("layer",), rank=4, alpha=40))


def test_another_adapter_and_a_lora_add_up_and_merge_together() -> None:
    base = traced("llama")
    program = filled(rewriter.apply(base, Adalora(rank=3), Lora(rank=3, adapter="two")).program)
    merged = rewriter.apply(program, Merge()).program
    assert operations(merged) == operations(base)
    assert distance(run(program, "llama"), run(base, "llama")) > 1e-2
    assert distance(run(merged, "llama"), run(program, "llama")) < 1e-5
    with pytest.raises(UsageError, match=r"already has a parameter 'model.*lora_A\.default'"):
        rewriter.apply(program, Adalora(rank=2))


PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "convolution": ("conv", {"target_modules": ["stem", "head"]}),
}


@pytest.mark.parametrize("case", PEFT)
def test_parity_with_peft(case: str) -> None:
    from peft import AdaLoraConfig

    name, options = PEFT[case]
    config = AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=10, **options)
    dropout = options.get("lora_dropout", 0.0)
    check_peft(name, config, Adalora(targets=tuple(options["target_modules"]), rank=3, alpha=5, dropout=dropout))


def test_parity_with_a_pruned_adapter_of_peft() -> None:
    from peft import AdaLoraConfig, get_peft_model

    module, args, kwargs = TINY["llama"]()
    theirs = get_peft_model(
        module, AdaLoraConfig(init_r=4, target_r=2, lora_alpha=5, total_step=10, target_modules=["q_proj"])
    ).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    kept = {f"model.layers.{i}.self_attn.q_proj.lora_E": mask for i, mask in enumerate([[1, 0, 1, 0], [0, 0, 0, 1]])}
    masks = {name: [bool(value) for value in mask] for name, mask in kept.items()}
    theirs.base_model.resize_modules_by_rank_pattern(masks, "default")
    ranks = {name.removesuffix(".lora_E"): sum(mask) for name, mask in kept.items()}
    program = rewriter.apply(traced("llama"), Adalora(targets=("q_proj",), rank=4, alpha=5, rank_pattern=ranks)).program
    saved = {name.removeprefix("base_model.model."): value.detach() for name, value in theirs.state_dict().items()}
    program = program.with_tensors({name: saved[name] for name in added(program) if "lora" in name})
    with torch.no_grad():
        expected = theirs(*args, **kwargs).logits
    assert distance(run(program, "llama"), run(traced("llama"), "llama")) > 1e-2
    assert distance(run(program, "llama"), [expected]) < 1e-5


@pytest.mark.parametrize(
    ("case", "name", "pass_"),
    [
        ("adalora", "mlp", Adalora(targets=("up", "down"), rank=4, alpha=7)),
        ("adalora_conv", "conv", Adalora(targets=("stem",), rank=3, dropout=0.1)),
    ],
)
def test_what_it_adds(case: str, name: str, pass_: Adalora, golden: Callable[[str, str], None]) -> None:
    golden(f"{case}.diff", str(rewriter.diff(traced(name), rewriter.apply(traced(name), pass_).program)))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"rank": 0}, "rank is 0"),
    "rank a text": ({"rank": "3"}, "rank is '3'"),
    "rank pattern negative": ({"rank_pattern": {"up": -1}}, "rank_pattern 'up' is -1"),
    "rank pattern a mask": ({"rank_pattern": {"up": [True]}}, r"rank_pattern 'up' is \[True\]"),
    "alpha NaN": ({"alpha": math.nan}, "alpha is nan"),
    "alpha a boolean": ({"alpha": True}, "alpha is True"),
    "dropout 1": ({"dropout": 1.0}, r"dropout is 1\.0"),
    "adapter with a dot": ({"adapter": "a.b"}, r"adapter is 'a\.b'"),
    "seed a float": ({"seed": 0.5}, r"seed is 0\.5"),
    "target unmatched": ({"targets": ("upp",)}, "'upp' matches no layer"),
    "pattern unmatched": ({"rank_pattern": {"down": 2}}, "'down' matches no target"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant(case: str) -> None:
    options, said = REFUSED[case]
    with pytest.raises(UsageError, match=said):
        rewriter.apply(traced("mlp"), Adalora(**{"targets": ("up",), **options}))


@pytest.mark.parametrize(
    ("target", "said"), [("grouped", "AdaLoRA on a grouped convolution"), ("classes", "which is an embedding")]
)
def test_layers_it_cannot_update(target: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        rewriter.apply(traced("conv"), Adalora(targets=(target,), rank=4))


def test_warnings() -> None:
    with pytest.warns(RewriteWarning, match="alpha is 0: the adapter has no effect"):
        Adalora(alpha=0)
    with pytest.warns(RewriteWarning, match="up: rank 12 exceeds 10"):
        rewriter.apply(traced("mlp"), Adalora(targets=("up",)))
