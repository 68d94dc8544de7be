"""LoKr: its parameters, numbers by hand and in PEFT, how it starts and trains, its files, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rewriter
from passes import Lokr, Merge
from passes.lokr import split
from rewriter.errors import RewriteWarning, UsageError
from tests.models import traced
from tests.oracle import distance, run
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
    """Block (p, q) of the update is w1[p, q] · w2, at every place of a kernel."""

    def update(site: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        def get(kind: str) -> Any:
            return named(site, kind, tensors)

        left = get("lokr_w1")
        if left is None:
            left = get("lokr_w1_a") @ get("lokr_w1_b")
        sizes = tensors[site.weight].shape[2:] if site.kind == "conv" else ()
        a, b, t = get("lokr_w2_a"), get("lokr_w2_b"), get("lokr_t2")
        if t is not None:
            right = torch.einsum("pqkl,po,qi->oikl", t, a, b)
        elif a is not None:
            right = a @ b
        else:
            right = get("lokr_w2")
        right = right.reshape(right.shape[0], -1, *sizes)
        lines = [torch.cat([value * right for value in row], dim=1) for row in left]
        return scale * torch.cat(lines, dim=0)

    return update


def test_a_size_is_split_as_near_to_the_factor_as_it_can_be() -> None:
    assert split(256) == (16, 16)
    assert split(128) == (8, 16)
    assert split(127) == (1, 127)
    assert split(128, 4) == (4, 32)
    assert split(20, 8) == (4, 5)
    assert split(24, 8) == (8, 3)
    from peft.tuners.lokr.layer import factorization

    for factor in (-1, 1, 2, 3, 4, 7, 8, 16, 50):
        assert [split(size, factor) for size in range(1, 200)] == [factorization(n, factor) for n in range(1, 200)]


SHAPES: dict[str, tuple[Lokr, dict[str, list[int]]]] = {
    "w2 decomposed": (Lokr(rank=2), {"w1": [4, 4], "w2_a": [6, 2], "w2_b": [2, 7]}),
    "both whole": (Lokr(rank=4), {"w1": [4, 4], "w2": [6, 7]}),
    "both decomposed": (
        Lokr(rank=1, decompose_both=True),
        {"w1_a": [4, 1], "w1_b": [1, 4], "w2_a": [6, 1], "w2_b": [1, 7]},
    ),
    "factor": (Lokr(rank=2, decompose_factor=2), {"w1": [2, 2], "w2_a": [12, 2], "w2_b": [2, 14]}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_parameters(case: str) -> None:
    pass_, expected = SHAPES[case]
    options = {name: getattr(pass_, name) for name in ("rank", "decompose_both", "decompose_factor")}
    pass_ = Lokr(targets=("layers.0.mlp.down_proj",), **options)  # [24, 28]
    shapes = {name: list(t.shape) for name, t in added(rewriter.apply(traced("llama"), pass_).program).items()}
    assert shapes == {f"model.layers.0.mlp.down_proj.lokr_{kind}.default": shape for kind, shape in expected.items()}


def test_parameters_of_convolutions() -> None:
    def shapes(**options: Any) -> dict[str, list[int]]:
        program = rewriter.apply(traced("conv"), Lokr(targets=("grouped", "signal"), rank=1, **options)).program
        return {name.removesuffix(".default"): list(t.shape) for name, t in added(program).items()}

    assert shapes(rank_pattern={"grouped": 2}) == {
        "grouped.lokr_w1": [3, 1],
        "grouped.lokr_w2": [4, 2, 3, 3],
        "signal.lokr_w1": [2, 3],
        "signal.lokr_w2_a": [7, 1],
        "signal.lokr_w2_b": [1, 12],
    }
    effective = shapes(use_effective_conv2d=True)
    assert {name: effective[name] for name in effective if "w2_a" in name or "t2" in name} == {
        "grouped.lokr_t2": [1, 1, 3, 3],
        "grouped.lokr_w2_a": [1, 4],
        "signal.lokr_t2": [1, 1, 3, 1],
        "signal.lokr_w2_a": [1, 7],
    }


LLAMA, PROJECTIONS = ("q_proj", "down_proj"), ("c_attn", "mlp.c_proj")
CASES: dict[str, tuple[str, Lokr, float]] = {
    "whole": ("llama", Lokr(targets=LLAMA, rank=4, alpha=7), 7 / 4),
    "both decomposed": ("llama", Lokr(targets=LLAMA, rank=1, alpha=3, decompose_both=True), 3.0),
    "stored transposed": ("gpt2", Lokr(targets=PROJECTIONS, rank=3, alpha=7), 7 / 3),
    "slices": ("gpt2", Lokr(rank=2, alpha=5), 5 / 2),
    "convolutions": ("conv", Lokr(targets=CONVOLUTIONS, rank=1, alpha=0.1), 0.1),
    "effective convolutions": (
        "conv",
        Lokr(targets=CONVOLUTIONS, rank=1, alpha=0.1, use_effective_conv2d=True),
        0.1,
    ),
    "whole convolutions": ("conv", Lokr(targets=("stem", "grouped", "head"), rank=4, alpha=1), 1 / 4),
    "patterns": ("mlp", Lokr(targets=("up",), rank_pattern={"u.": 4}, alpha_pattern={"up": 3}), 3 / 4),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_by_hand(case: str) -> None:
    name, pass_, scale = CASES[case]
    check_numbers(name, pass_, by_hand(scale))


def test_a_whole_second_matrix_of_a_signal_is_laid_out_as_in_peft() -> None:
    def update(site: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        left, right = named(site, "lokr_w1", tensors), named(site, "lokr_w2", tensors)
        assert left is not None
        assert right is not None
        (o1, i1), (o2, i2, k) = left.shape, right.shape
        blocks = torch.einsum("pq,oik->opiqk", left, right)  # outputs (o2), inputs (o1, i2) and places (i1, k)
        return blocks.reshape(o1 * o2, i1 * i2, k)

    check_numbers("conv", Lokr(targets=("signal",), rank=8, alpha=8), update)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_nothing_changes_at_the_start(name: str) -> None:
    check_start(name, Lokr())


@pytest.mark.parametrize(
    ("options", "zero"),
    [
        ({"rank": 8}, "w1"),
        ({"rank": 1, "decompose_both": True}, "w1_a"),
        ({"rank": 8, "init": "lycoris"}, "w2"),
        ({"rank": 1, "init": "lycoris"}, "w2_b"),
    ],
)
def test_start(options: dict[str, Any], zero: str) -> None:
    pass_ = Lokr(targets=("q_proj",), **options)
    result = rewriter.apply(traced("llama"), pass_)
    zeros = {name.split(".")[-2] for name, tensor in added(result.program).items() if not tensor.any()}
    assert zeros == {f"lokr_{zero}"}
    assert pass_.law.kind == "exact"
    assert result.applied[0].change is not None
    assert result.applied[0].change.equal


def test_a_random_start_moves_outputs() -> None:
    result = rewriter.apply(traced("mlp"), Lokr(targets=("up",), init="random"))
    assert Lokr(init="random").law.kind == "free"
    assert distance(run(result.program, "mlp"), run(traced("mlp"), "mlp")) > 1e-3
    same = rewriter.apply(traced("mlp"), Lokr(targets=("down", "up"), init="random"))
    other = rewriter.apply(traced("mlp"), Lokr(targets=("up",), init="random", seed=1))
    for name, tensor in added(result.program).items():
        assert torch.equal(tensor, same.program.tensor(name))
        assert not torch.equal(tensor, other.program.tensor(name))
        assert float(tensor.abs().max()) <= 1 / math.sqrt(tensor.shape[1])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"targets": ("q_proj",), "rank": 1, "decompose_both": True}),
        ("conv", {"targets": ("signal",), "rank": 1, "use_effective_conv2d": True}),
    ],
)
def test_training(name: str, options: dict[str, Any]) -> None:
    pass_ = Lokr(**options)
    check_training(name, pass_, set(added(rewriter.apply(traced(name), pass_).program)))


def test_files(tmp_path: Path) -> None:
    (tmp_path / "slices").mkdir()
    check_files("gpt2", Lokr(rank=2, alpha=5), tmp_path / "slices")
    check_files("conv", Lokr(targets=("head", "signal"), rank=1, alpha=0.1, use_effective_conv2d=True), tmp_path)


def test_called_twice() -> None:
    check_called_twice(Lokr(targets=("layer",), rank=4, alpha=7))


def test_two_adapters_add_up_and_merge_together() -> None:
    base = traced("llama")
    program = filled(rewriter.apply(base, Lokr(rank=3), Lokr(rank=1, adapter="two")).program)
    merged = rewriter.apply(program, Merge()).program
    assert merged.tensors.keys() == base.tensors.keys()
    assert distance(run(program, "llama"), run(base, "llama")) > 1e-2
    assert distance(run(merged, "llama"), run(program, "llama")) < 1e-5


PEFT: dict[str, tuple[str, dict[str, Any], bool]] = {
    "whole": ("llama", {"target_modules": list(LLAMA), "r": 4, "alpha": 7}, False),
    "both decomposed": ("llama", {"target_modules": list(LLAMA), "r": 1, "decompose_both": True}, False),
    "factor": ("llama", {"target_modules": list(LLAMA), "r": 3, "decompose_factor": 3}, False),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 2, "rank_pattern": {"c_attn": 4}}, True),
    "convolutions": ("conv", {"target_modules": list(CONVOLUTIONS), "r": 1, "alpha": 0.1}, False),
    "effective convolutions": (
        "conv",
        {
            "target_modules": list(CONVOLUTIONS),
            "r": 1,
            "alpha": 0.1,
            "use_effective_conv2d": True,
            "rank_pattern": {"signal": 2},  # PEFT itself fails on rank 1 there
        },
        False,
    ),
    "whole convolutions": ("conv", {"target_modules": list(CONVOLUTIONS), "r": 8, "alpha": 1}, False),
}


@pytest.mark.parametrize("case", PEFT)
def test_parity_with_peft(case: str) -> None:
    from peft import LoKrConfig

    name, options, plain = PEFT[case]
    renamed = {"target_modules": "targets", "r": "rank"}
    ours = {renamed.get(key, key): value for key, value in options.items()}
    check_peft(name, LoKrConfig(**options), Lokr(**{**ours, "targets": tuple(ours["targets"])}), plain=plain)


@pytest.mark.parametrize(
    ("case", "name", "pass_"),
    [
        ("lokr", "mlp", Lokr(targets=("up", "down"), rank=2, alpha=7, decompose_both=True)),
        ("lokr_conv", "conv", Lokr(targets=("grouped", "signal"), rank=1, use_effective_conv2d=True)),
    ],
)
def test_what_it_adds(case: str, name: str, pass_: Lokr, golden: Callable[[str, str], None]) -> None:
    golden(f"{case}.diff", str(rewriter.diff(traced(name), rewriter.apply(traced(name), pass_).program)))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"rank": 0}, "rank is 0"),
    "rank a float": ({"rank": 2.0}, r"rank is 2\.0"),
    "alpha infinite": ({"alpha": math.inf}, "alpha is inf"),
    "factor 0": ({"decompose_factor": 0}, "decompose_factor is 0"),
    "factor -2": ({"decompose_factor": -2}, "decompose_factor is -2"),
    "factor a boolean": ({"decompose_factor": True}, "decompose_factor is True"),
    "both a number": ({"decompose_both": 1}, "decompose_both is 1"),
    "effective a text": ({"use_effective_conv2d": "no"}, "use_effective_conv2d is 'no'"),
    "init unknown": ({"init": "peft"}, "init is 'peft'"),
    "adapter empty": ({"adapter": ""}, "adapter is ''"),
    "seed negative": ({"seed": -1}, "seed is -1"),
    "target unmatched": ({"targets": ("upp",)}, "'upp' matches no layer"),
    "pattern unmatched": ({"alpha_pattern": {"down": 2}}, "'down' matches no target"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant(case: str) -> None:
    options, said = REFUSED[case]
    with pytest.raises(UsageError, match=said):
        rewriter.apply(traced("mlp"), Lokr(**{"targets": ("up",), **options}))


def test_an_alpha_of_zero_is_warned_of() -> None:
    with pytest.warns(RewriteWarning, match="alpha is 0: the adapter has no effect"):
        Lokr(alpha=0)
