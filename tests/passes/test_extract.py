"""A fine-tune as a LoRA: the nearest one, and nothing that differs is left unsaid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from passes.extract import extract
from passes.peft import read_adapter
from rewriter import verify
from rewriter.errors import LawError, RewriteError, UsageError
from rewriter.program import Program
from rewriter.view import Linear, layers
from tests.models import TINY, traced


def shifted(program: Program, rank: int, names: tuple[str, ...], *, seed: int = 1) -> Program:
    """The program with a change of the given rank added to weights, as stored."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name in names:
        weight = program.tensor(name).detach()
        left = torch.randn(weight.shape[0], rank, generator=generator)
        right = torch.randn(rank, weight.shape[1], generator=generator)
        values[name] = weight + 0.1 * (left @ right).to(weight.dtype)
    return program.with_tensors(values)


def outputs(program: Program, name: str) -> torch.Tensor:
    _, args, kwargs = TINY[name]()
    return torch.cat([t.flatten() for t in verify.outputs(program(*args, **kwargs))])


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("gpt2", ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight")),  # stored [i, o]
        ("llama", ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight")),
        ("mlp", ("up.weight", "down.weight")),
    ],
)
def test_a_change_of_the_rank_is_found_exactly(model: str, names: tuple[str, ...], tmp_path: Path) -> None:
    base = traced(model)
    tuned = shifted(base, 3, names)
    found = extract(base, tuned, rank=3)
    assert sorted(found.factors) == sorted(name.removesuffix(".weight") for name in names)
    assert all(share > 0.999_999 for share in found.share.values())
    assert found.uncovered == {}
    applied = found.apply()
    reference, effect = outputs(tuned, model), (outputs(tuned, model) - outputs(base, model)).abs().max()
    assert (outputs(applied.program, model) - reference).abs().max() < 1e-4 * effect
    assert applied.applied[0].change is not None
    assert applied.applied[0].change.absolute > 0
    read = read_adapter(found.write(tmp_path / "adapter"), base).apply(base)
    assert torch.equal(outputs(read.program, model), outputs(applied.program, model))


def test_it_is_the_nearest_of_its_rank_and_tells_its_share() -> None:
    base = traced("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    tuned = shifted(base, 9, (name,))
    found = extract(base, tuned, rank=2, targets=("up_proj",)).factors["model.layers.0.mlp.up_proj"]
    change = tuned.tensor(name).detach() - base.tensor(name).detach()
    singular = torch.linalg.svdvals(change.double())
    rest = (change - found.b @ found.a).double().norm()
    torch.testing.assert_close(rest, singular[2:].norm(), rtol=1e-5, atol=0)
    assert found.share == pytest.approx(float(singular[:2].square().sum() / singular.square().sum()), rel=1e-5)
    torch.testing.assert_close(found.a.norm(), found.b.norm())


def test_another_alpha_and_a_rank_beyond_the_layer_change_nothing() -> None:
    base = traced("mlp")
    tuned = shifted(base, 2, ("up.weight", "head.weight"))
    reference = outputs(tuned, "mlp")
    for rank, alpha in ((2, 5.0), (9, None)):  # `head` can have rank 7 at most
        found = extract(base, tuned, rank=rank, alpha=alpha)
        assert found.factors["head"].rank == min(rank, 7)
        torch.testing.assert_close(outputs(found.apply().program, "mlp"), reference, rtol=1e-4, atol=1e-5)


def test_everything_else_that_differs_is_named() -> None:
    base = traced("bert")
    dense = "encoder.layer.0.intermediate.dense"
    tuned = dict(shifted(base, 2, (f"{dense}.weight", "embeddings.word_embeddings.weight")).exported.state_dict)
    norm = "encoder.layer.1.output.LayerNorm.bias"
    tuned[norm] = tuned[norm].detach() * 1.5
    found = extract(base, tuned, rank=2, targets=("intermediate.dense",))
    assert list(found.factors) == [dense]
    assert set(found.uncovered) == {norm, "embeddings.word_embeddings.weight"}
    assert found.uncovered[norm] == pytest.approx(0.5, rel=1e-5)


def test_a_tied_head_does_not_cover_the_embedding() -> None:
    base = traced("llama_tied")
    weights = {name: base.tensor(name).detach() + 0.1 for name in ("lm_head.weight", "model.embed_tokens.weight")}
    found = extract(base, {**base.exported.state_dict, **weights}, rank=1, targets=("lm_head",))
    assert set(found.uncovered) == set(weights)


def test_layers_keep_their_orientation() -> None:
    base = traced("gpt2")
    site = layers(base)["transformer.h.0.attn.c_proj"]  # square: a turned change would have the same shape
    assert isinstance(site, Linear)
    assert site.transposed
    tuned = shifted(base, 2, (site.weight,))
    factors = extract(base, tuned, rank=2).factors[site.path]
    change = tuned.tensor(site.weight).detach() - base.tensor(site.weight).detach()
    torch.testing.assert_close((factors.b @ factors.a).t(), change, rtol=1e-3, atol=1e-5)


def _state(changes: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    merged = {**traced("mlp").exported.state_dict, **changes}
    return {name: tensor for name, tensor in merged.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tuned", "error", "text"),
    [
        ({}, RewriteError, "no target differs between the two checkpoints"),
        ({"norm.bias": torch.ones(22)}, RewriteError, "1 other tensors differ: norm.bias"),
        ({"up.weight": None}, RewriteError, "only in the base: up.weight"),
        ({"extra.weight": torch.ones(2)}, RewriteError, "only in the tuned: extra.weight"),
        ({"up.weight": torch.ones(10, 22)}, RewriteError, "up.weight: base [22, 10], tuned [10, 22]"),
        (
            {"up.weight": torch.full((22, 10), torch.nan)},
            LawError,
            "up.weight of the tuned checkpoint holds 220 NaN or infinite values",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tuned: dict[str, torch.Tensor | None], error: type[RewriteError], text: str
) -> None:
    with pytest.raises(error) as caught:
        extract(traced("mlp"), _state(tuned), rank=2)
    assert text in str(caught.value)


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 2, "alpha": 0.0}, {"rank": 2, "targets": ("upp",)}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        extract(traced("mlp"), shifted(traced("mlp"), 2, ("up.weight",)), **options)
