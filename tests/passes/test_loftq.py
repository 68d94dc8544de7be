"""LoftQ: 4-bit weights beside a LoRA that starts with what they lost; and 4-bit layers made plain again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rewriter
from passes import Dequantise, Loftq, Lora, Merge, Nf4
from rewriter.errors import UsageError
from rewriter.quantised import held
from rewriter.view import Linear4bit, layers
from runtime.nf4 import dequantize, quantize
from tests.models import traced
from tests.oracle import distance, run


def by_hand(weight: torch.Tensor, rank: int, rounds: int, block: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(Q, B A) of every round, in fp64 but for the quantiser."""
    exact, product = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    found = []
    for _ in range(rounds):
        quantised = dequantize(quantize((exact - product).float(), block_size=block), torch.float64)
        u, s, v = torch.linalg.svd(exact - quantised)
        product = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
        found.append((quantised, product))
    return found


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
@pytest.mark.parametrize("rounds", [1, 4])
def test_numbers_by_hand(name: str, rounds: int) -> None:
    base = traced(name)
    result = rewriter.apply(base, Loftq(rank=3, alpha=7.5, iterations=rounds, block_size=32))
    plain = layers(base)
    for path, site in layers(result.program).items():
        if not isinstance(site, Linear4bit):
            continue
        stored = base.tensor(plain[path].weight).detach()
        weight = stored if stored.shape == (site.out_features, site.in_features) else stored.t()
        if name == "gpt2":
            weight = stored.t()
        rounds_by_hand = by_hand(weight, 3, rounds, 32)
        errors = [float((weight.double() - q - ba).norm()) for q, ba in rounds_by_hand]
        quantised, product = rounds_by_hand[errors.index(min(errors))]
        got = dequantize(held(result.program, site)).double()
        a, b = (result.program.tensor(f"{path}.lora_{x}.default").detach().double() for x in "AB")
        assert float((got - quantised).abs().max()) < 1e-6
        assert float((b @ a * 7.5 / 3 - product).abs().max()) < 1e-5
        notes = result.applied[0].notes[path]
        assert notes["relative_rmse"] == pytest.approx(min(errors) / float(weight.norm()), rel=1e-4)
        assert notes["relative_rmse"] < 0.9 * notes["without_update"]


def test_it_is_nearer_to_the_model_than_four_bits_alone() -> None:
    base = traced("llama")
    want = run(base, "llama")
    plain = run(rewriter.apply(base, Nf4()).program, "llama")
    started = run(rewriter.apply(base, Loftq(rank=6, iterations=3)).program, "llama")
    assert distance(started, want) < 0.8 * distance(plain, want)


def test_it_merges_trains_is_saved_and_undone(tmp_path: Path) -> None:
    base = traced("mlp")
    program = rewriter.apply(base, Loftq(rank=2, keep_original=True)).program
    assert all(".lora_" in name for name in program.trainable)
    assert str(rewriter.diff(base, rewriter.undo(program))) == "no difference\n"
    assert str(rewriter.diff(program, rewriter.load(program.save(tmp_path / "a.pt")))) == "no difference\n"
    merged = rewriter.apply(program, Merge()).program
    assert not any(isinstance(site, Linear4bit) for site in layers(merged).values())
    final = rewriter.apply(base, Loftq(rank=2)).program
    with pytest.raises(UsageError, match="cannot be undone"):
        rewriter.undo(final)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"iterations": 0}, "iterations is 0"),
        ({"rank": 9999}, "rank 9999 exceeds"),
        ({"alpha": 0}, "alpha is 0"),
        ({"kind": "int4"}, "kind is 'int4'"),
        ({"block_size": 7}, "block_size is 7"),
    ],
)
def test_refusals(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        rewriter.apply(traced("mlp"), Loftq(**options))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("double", [False, True])
def test_four_bits_made_plain_again(name: str, double: bool) -> None:
    program = rewriter.apply(traced(name), Nf4(double_quantise=double), Lora(rank=2, init="both")).program
    result = rewriter.apply(program, Dequantise())
    assert result.applied[0].change is not None
    assert result.applied[0].change.relative < 1e-5
    weights = {p: dequantize(held(program, s)) for p, s in layers(program).items() if isinstance(s, Linear4bit)}
    assert len(weights) == len(result.sites)
    for path, weight in weights.items():
        assert torch.equal(result.program.tensor(f"{path}.weight"), weight)
    assert not any("packed" in tensor for tensor in result.program.tensors)
    assert str(rewriter.diff(program, rewriter.undo(result.program))) == "no difference\n"
    rewriter.apply(result.program, Merge())


def test_only_what_is_named_is_made_plain() -> None:
    program = rewriter.apply(traced("llama"), Nf4()).program
    result = rewriter.apply(program, Dequantise(targets=("q_proj",)))
    assert [site.path.rpartition(".")[2] for site in result.sites] == ["q_proj", "q_proj"]
    with pytest.raises(UsageError, match="no layer in 4 bits"):
        rewriter.apply(traced("llama"), Dequantise())
