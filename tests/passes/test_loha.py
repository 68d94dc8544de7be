"""LoHa: its parameters, numbers by hand and in PEFT, how it starts and trains, its files, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rewriter
from passes import Loha, Lora, Merge
from rewriter.errors import RewriteWarning, UsageError
from tests.models import traced
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

CONVOLUTIONS = ("stem", "grouped", "signal", "head")


def by_hand(scale: float) -> Callable[[Any, Mapping[str, Tensor]], Tensor]:
    def update(site: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        products = []
        for number in "12":
            a, b, t = (named(site, kind.format(number), tensors) for kind in ("hada_w{}_a", "hada_w{}_b", "hada_t{}"))
            assert a is not None
            assert b is not None
            if t is None:
                product = sum(a[:, r, None] * b[None, r] for r in range(b.shape[0]))
            else:
                product = sum(
                    a[p, :, None, None, None] * b[q, None, :, None, None] * t[p, q]
                    for p in range(t.shape[0])
                    for q in range(t.shape[1])
                )
            products.append(product)
        shape = tensors[site.weight].shape if site.kind == "conv" else products[0].shape
        return scale * (products[0] * products[1]).reshape(shape)

    return update


@pytest.mark.parametrize("effective", [False, True])
def test_parameters(effective: bool) -> None:
    pass_ = Loha(targets=CONVOLUTIONS, rank=2, use_effective_conv2d=effective, rank_pattern={"head": 3})
    shapes = {name: list(t.shape) for name, t in added(rewriter.apply(traced("conv"), pass_).program).items()}
    assert {n: s for n, s in shapes.items() if n.startswith("head")} == {
        "head.hada_w1_a.default": [6, 3],
        "head.hada_w1_b.default": [3, 14],
        "head.hada_w2_a.default": [6, 3],
        "head.hada_w2_b.default": [3, 14],
    }
    grouped = {n: s for n, s in shapes.items() if n.startswith("grouped.hada_") and "1" in n.split(".")[1]}
    signal = {n: s for n, s in shapes.items() if n.startswith("signal.hada_") and "1" in n.split(".")[1]}
    if effective:
        assert list(grouped.values()) == [[2, 2, 3, 3], [2, 12], [2, 2]]
        assert list(signal.values()) == [[2, 2, 3, 1], [2, 14], [2, 12]]
    else:
        assert list(grouped.values()) == [[12, 2], [2, 18]]
        assert list(signal.values()) == [[14, 2], [2, 36]]


CASES: dict[str, tuple[str, Loha, float]] = {
    "llama": ("llama", Loha(targets=("q_proj", "down_proj"), rank=3, alpha=7), 7 / 3),
    "stored transposed": ("gpt2", Loha(targets=("c_attn", "mlp.c_proj"), rank=3, alpha=7), 7 / 3),
    "slices": ("gpt2", Loha(rank=3, alpha=5), 5 / 3),
    "convolutions": ("conv", Loha(targets=CONVOLUTIONS, rank=2, alpha=1), 1 / 2),
    "effective convolutions": ("conv", Loha(targets=CONVOLUTIONS, rank=2, alpha=1, use_effective_conv2d=True), 1 / 2),
    "patterns": ("mlp", Loha(targets=("up",), rank_pattern={"u.": 4}, alpha_pattern={"up": 3}), 3 / 4),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_by_hand(case: str) -> None:
    name, pass_, scale = CASES[case]
    check_numbers(name, pass_, by_hand(scale))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_nothing_changes_at_the_start(name: str) -> None:
    check_start(name, Loha())


def test_start() -> None:
    new = added(rewriter.apply(traced("mlp"), Loha(targets=("up",), rank=8)).program)
    zero = {name for name, tensor in new.items() if not tensor.any()}
    assert zero == {"up.hada_w2_b.default"}
    for name, fan in (("hada_w1_a", 8), ("hada_w1_b", 10), ("hada_w2_a", 8)):
        value, limit = new[f"up.{name}.default"], 1 / math.sqrt(fan)
        assert 0.8 * limit < float(value.abs().max()) <= limit
    random = rewriter.apply(traced("mlp"), Loha(targets=("up",), rank=8, init="random"))
    assert all(bool(tensor.any()) for tensor in added(random.program).values())
    assert Loha(init="random").law.kind == "free"
    assert distance(run(random.program, "mlp"), run(traced("mlp"), "mlp")) > 1e-3


def test_a_start_depends_on_seed_and_name_alone() -> None:
    def start(seed: int, *targets: str, **options: Any) -> dict[str, Tensor]:
        program = rewriter.apply(traced("llama"), Loha(targets=targets, rank=3, seed=seed, **options)).program
        return {name: tensor for name, tensor in added(program).items() if "w2_b" not in name}

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = start(1, "q_proj", "v_proj"), start(1, "v_proj"), start(2, "v_proj")
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    assert not any(torch.equal(other[name], tensor) for name, tensor in two.items())
    values = [tensor for tensor in one.values() if tensor.shape == (24, 3)]
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize(("name", "effective"), [("llama", False), ("conv", True)])
def test_training(name: str, effective: bool) -> None:
    pass_ = Loha(targets=("stem",) if effective else ("q_proj",), rank=2, use_effective_conv2d=effective)
    check_training(name, pass_, set(added(rewriter.apply(traced(name), pass_).program)))


@pytest.mark.parametrize("case", ["slices", "effective convolutions"])
def test_files(case: str, tmp_path: Path) -> None:
    name, pass_, _ = CASES[case]
    if case == "slices":
        check_files(name, pass_, tmp_path)
    else:
        check_files("conv", Loha(targets=("head", "signal"), rank=2, alpha=1, use_effective_conv2d=True), tmp_path)


def test_called_twice() -> None:
    check_called_twice(Loha(targets=("layer",), rank=4, alpha=7))


def test_two_adapters_and_a_lora_add_up_and_merge_together() -> None:
    base = traced("llama")
    steps = [Loha(rank=3), Loha(rank=2, adapter="two"), Lora(rank=3)]
    program = filled(rewriter.apply(base, *steps).program)
    merged = rewriter.apply(program, Merge()).program
    assert operations(merged) == operations(base)
    assert distance(run(program, "llama"), run(base, "llama")) > 1e-2
    assert distance(run(merged, "llama"), run(program, "llama")) < 1e-5
    with pytest.raises(UsageError, match="already has a parameter"):
        rewriter.apply(program, Loha(rank=2))


PEFT: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 5}}, False),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}, True),
    "convolutions": ("conv", {"target_modules": list(CONVOLUTIONS)}, False),
    "effective convolutions": (
        "conv",
        {"target_modules": list(CONVOLUTIONS), "use_effective_conv2d": True, "alpha_pattern": {"stem": 5}},
        False,
    ),
}


@pytest.mark.parametrize("case", PEFT)
def test_parity_with_peft(case: str) -> None:
    from peft import LoHaConfig

    name, options, plain = PEFT[case]
    ours = {key: value for key, value in options.items() if key != "target_modules"}
    pass_ = Loha(targets=tuple(options["target_modules"]), rank=2, alpha=1, **ours)
    check_peft(name, LoHaConfig(r=2, alpha=1, **options), pass_, plain=plain)


@pytest.mark.parametrize(
    ("case", "name", "pass_"),
    [
        ("loha", "mlp", Loha(targets=("up", "down"), rank=4, alpha=7)),
        ("loha_conv", "conv", Loha(targets=("grouped", "signal"), rank=4, use_effective_conv2d=True)),
        ("loha_slices", "gpt2", Loha(rank=4, layers=(1,))),
    ],
)
def test_what_it_adds(case: str, name: str, pass_: Loha, golden: Callable[[str, str], None]) -> None:
    golden(f"{case}.diff", str(rewriter.diff(traced(name), rewriter.apply(traced(name), pass_).program)))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"rank": 0}, "rank is 0"),
    "rank a boolean": ({"rank": True}, "rank is True"),
    "rank a text": ({"rank": "8"}, "rank is '8'"),
    "rank pattern 0": ({"rank_pattern": {"up": 0}}, "rank_pattern 'up' is 0"),
    "alpha NaN": ({"alpha": math.nan}, "alpha is nan"),
    "alpha a boolean": ({"alpha": True}, "alpha is True"),
    "alpha pattern a text": ({"alpha_pattern": {"up": "3"}}, "alpha_pattern 'up' is '3'"),
    "init unknown": ({"init": "ones"}, "init is 'ones'"),
    "effective a text": ({"use_effective_conv2d": "yes"}, "use_effective_conv2d is 'yes'"),
    "adapter with a dot": ({"adapter": "a.b"}, r"adapter is 'a\.b'"),
    "adapter a number": ({"adapter": 3}, "adapter is 3"),
    "seed a text": ({"seed": "1"}, "seed is '1'"),
    "target unmatched": ({"targets": ("up", "upp")}, "'upp' matches no layer"),
    "pattern unmatched": ({"rank_pattern": {"down": 2}}, "'down' matches no target"),
    "everything excluded": ({"exclude": ("up",)}, "excluded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant(case: str) -> None:
    options, said = REFUSED[case]
    with pytest.raises(UsageError, match=said):
        rewriter.apply(traced("mlp"), Loha(**{"targets": ("up",), **options}))


def test_an_embedding_is_refused() -> None:
    with pytest.raises(UsageError, match="which is an embedding"):
        rewriter.apply(traced("conv"), Loha(targets=("classes",)))


def test_warnings() -> None:
    with pytest.warns(RewriteWarning, match="alpha is 0: the adapter has no effect"):
        Loha(alpha=0)
    with pytest.warns(RewriteWarning, match="up: rank 11 exceeds 10"):
        rewriter.apply(traced("mlp"), Loha(targets=("up",), rank=11))
