"""Merging our own branches: the fold equals the formula, and the base model's operations are back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rewriter
from passes import Adapter, Lora, Merge, Prefix, Prompt
from rewriter.errors import LawError, RewriteError, UsageError
from rewriter.program import Program
from rewriter.text import text
from rewriter.transform import Pass
from tests.models import TINY, traced
from tests.oracle import distance, merged_weight, operations, run, traced_double, trained

MERGED = 1e-9  # fp64; every adapter below moves outputs by more than EFFECT
EFFECT = 1e-2

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dropout": {"dropout": 0.3},
    "lora_bias": {"lora_bias": True},
    "all": {"rslora": True, "dora": True, "lora_bias": True, "dropout": 0.3},
}
TARGETS: dict[str, tuple[str, ...]] = {
    "gpt2": ("c_attn", "mlp.c_proj"),
    "bert": ("query", "output.dense", "pooler.dense"),
    "mlp": ("up", "down", "head"),
    "conv": ("stem", "signal", "head"),
}
CASES = [("mlp", feature) for feature in FEATURES]
CASES += [("conv", feature) for feature in ("plain", "dora", "lora_bias")]
CASES += [("gpt2", "plain"), ("gpt2", "all"), ("bert", "all")]


def check(base: Program, adapted: Program, name: str, *, more_tensors: bool = False) -> Program:
    """Merge, and hold the result to the unmerged forward, the base's operations and the base's tensor names."""
    before = text(adapted)
    merged = rewriter.apply(adapted, Merge()).program
    assert distance(run(base, name), run(adapted, name)) > EFFECT
    assert distance(run(merged, name), run(adapted, name)) < MERGED
    assert operations(merged) == operations(base)
    if not more_tensors:
        assert list(merged.tensors) == list(base.tensors)
    assert text(adapted) == before
    return merged


@pytest.mark.parametrize(("name", "feature"), CASES)
def test_every_feature_folds_to_its_formula(name: str, feature: str) -> None:
    base = traced_double(name)
    lora = Lora(targets=TARGETS[name], rank=4, alpha=7, **FEATURES[feature])
    result = rewriter.apply(base, lora)
    adapted = trained(result.program)
    merged = check(base, adapted, name, more_tensors=lora.lora_bias)
    for site in result.sites:
        expected = merged_weight(lora, site, adapted.tensors)
        assert torch.allclose(merged.tensor(site.weight), expected, rtol=0, atol=1e-12), site.path
    touched = {name for site in result.sites for name in (site.weight, *([site.bias] if lora.lora_bias else []))}
    for key, tensor in base.tensors.items():
        if key not in touched:
            assert torch.equal(merged.tensor(key), tensor), key


def test_patterns_give_each_layer_its_own_scale() -> None:
    base = traced_double("gpt2")
    lora = Lora(
        targets=("c_attn", "c_fc", "mlp.c_proj"),
        rank=4,
        alpha=7,
        rank_pattern={"c_fc": 2, "h.1.attn.c_attn": 5},
        alpha_pattern={"mlp.c_proj": 11, "c_fc": 3},
    )
    result = rewriter.apply(base, lora)
    adapted = trained(result.program)
    merged = check(base, adapted, "gpt2")
    ranks = {site.path: adapted.tensor(f"{site.path}.lora_A.default").shape[0] for site in result.sites}
    assert ranks["transformer.h.0.mlp.c_fc"] == 2
    assert ranks["transformer.h.0.attn.c_attn"] == 4
    assert ranks["transformer.h.1.attn.c_attn"] == 5
    for site in result.sites:
        expected = merged_weight(lora, site, adapted.tensors)
        assert torch.allclose(merged.tensor(site.weight), expected, rtol=0, atol=1e-12), site.path


@pytest.mark.parametrize("name", ["gpt2", "mlp", "conv"])
def test_two_adapters_of_one_layer_add_up(name: str) -> None:
    base = traced_double(name)
    one = Lora(targets=TARGETS[name], rank=4, alpha=7, adapter="one")
    two = Lora(targets=TARGETS[name][:2], rank=2, alpha=5, rslora=True, adapter="two")
    first = rewriter.apply(base, one)
    second = rewriter.apply(first.program, two)
    adapted = trained(second.program)
    merged = check(base, adapted, name)
    expected = {site.weight: merged_weight(one, site, adapted.tensors) for site in first.sites}
    for site in second.sites:
        expected[site.weight] = expected[site.weight] + merged_weight(two, site, adapted.tensors)
        expected[site.weight] -= base.tensor(site.weight)
    for key, value in expected.items():
        assert torch.allclose(merged.tensor(key), value, rtol=0, atol=1e-12), key


@pytest.mark.parametrize(("first", "second"), [("dora", "plain"), ("plain", "dora"), ("dora", "dora")])
def test_adapters_of_different_kinds_fold_together(first: str, second: str) -> None:
    base = traced_double("gpt2")
    one = Lora(targets=("c_attn",), rank=4, alpha=7, adapter="one", **FEATURES[first])
    two = Lora(targets=("c_attn", "c_fc"), rank=2, alpha=5, adapter="two", **FEATURES[second])
    check(base, trained(rewriter.apply(base, one, two).program), "gpt2")


def test_two_merges_with_an_adapter_each_add_up() -> None:
    base = traced_double("mlp")
    lora = Lora(targets=("up", "down"), rank=4, alpha=7)
    once = rewriter.apply(trained(rewriter.apply(base, lora).program), Merge()).program
    adapted = trained(rewriter.apply(once, lora).program, seed=5)
    merged = check(base, adapted, "mlp")
    assert [step.name for step in merged.steps] == ["lora", "merge", "lora", "merge"]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("name", "target"), [("gpt2", "wpe"), ("bert", "token_type_embeddings"), ("conv", "classes")])
def test_embeddings(name: str, target: str, dora: bool) -> None:
    base = traced_double(name)
    lora = Lora(targets=(target,), rank=3, alpha=7, dora=dora)
    result = rewriter.apply(base, lora)
    adapted = trained(result.program)
    merged = check(base, adapted, name)
    (site,) = result.sites
    expected = merged_weight(lora, site, adapted.tensors)
    assert torch.allclose(merged.tensor(site.weight), expected, rtol=0, atol=1e-12)


def test_an_update_across_the_groups_of_a_convolution_is_refused() -> None:
    lora = Lora(targets=("grouped",), rank=8, alpha=3)  # as PEFT's: A reads all groups, so no grouped weight holds it
    adapted = trained(rewriter.apply(traced("conv"), lora).program)
    with pytest.raises(RewriteError, match=r"grouped\.lora_A\.default cannot be merged: .*geometry"):
        rewriter.apply(adapted, Merge())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"targets": ("c_attn",), "enable": ("q", "v")}),
        ("gpt2", {"targets": ("c_attn",), "enable": ("key",), "lora_bias": True}),
        ("gpt2", {"targets": ("@attention.query", "@attention.value")}),
        ("phi3", {"targets": ("@attention.query", "@attention.key")}),
    ],
)
def test_slices_of_a_fused_projection(name: str, options: dict[str, Any]) -> None:
    base = traced_double(name)
    lora = Lora(rank=3, alpha=7, **options)
    result = rewriter.apply(base, lora)
    adapted = trained(result.program)
    merged = rewriter.apply(adapted, Merge()).program
    assert distance(run(base, name), run(adapted, name)) > EFFECT
    # Phi-3 computes its norms in fp32 whatever type it has
    assert distance(run(merged, name), run(adapted, name)) < (1e-5 if name == "phi3" else MERGED)
    assert operations(merged) == operations(base)
    assert list(merged.tensors) == list(base.tensors)
    expected = {site.weight: base.tensor(site.weight).detach().clone() for site in result.sites}
    for site in result.sites:
        expected[site.weight] += merged_weight(lora, site, adapted.tensors) - base.tensor(site.weight)
        rows = merged.tensor(site.weight) - base.tensor(site.weight)
        rows = rows.t() if site.transposed else rows
        assert rows[site.part.start : site.part.stop].abs().max() > 1e-3
    for key, value in expected.items():
        assert torch.allclose(merged.tensor(key), value, rtol=0, atol=1e-12), key


@pytest.mark.parametrize("name", ["llama", "vit", "mixtral"])
def test_all_linear_layers_of_real_architectures(name: str) -> None:
    base = traced(name)
    adapted = trained(rewriter.apply(base, Lora(targets="all-linear", rank=3, alpha=7)).program, size=0.1)
    result = rewriter.apply(adapted, Merge())
    assert distance(run(base, name), run(adapted, name)) > EFFECT
    assert distance(run(result.program, name), run(adapted, name)) < 2e-5
    assert operations(result.program) == operations(base)
    assert list(result.program.tensors) == list(base.tensors)


# -- a base model without an adapter ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_base_model_has_nothing_to_merge(name: str) -> None:
    with pytest.raises(RewriteError, match="nothing to merge"):
        rewriter.apply(traced(name), Merge())


def test_a_second_merge_is_refused() -> None:
    adapted = trained(rewriter.apply(traced("mlp"), Lora(targets=("up",), rank=3)).program)
    merged = rewriter.apply(adapted, Merge()).program
    with pytest.raises(RewriteError, match="nothing to merge") as error:
        rewriter.apply(merged, Merge())
    assert "merged already by step 2" in str(error.value)


# -- tied weights -------------------------------------------------------------------------------------------------


def test_a_tied_head_is_refused_and_with_untie_the_embedding_stays() -> None:
    base = traced("llama_tied")
    adapted = trained(rewriter.apply(base, Lora(targets=("lm_head",), rank=3, alpha=7)).program)
    with pytest.raises(RewriteError, match="also read elsewhere") as error:
        rewriter.apply(adapted, Merge())
    assert "lm_head" in str(error.value)
    assert "--untie" in str(error.value)
    assert "embedding" in str(error.value)
    merged = rewriter.apply(adapted, Merge(untie=True)).program
    assert distance(run(base, "llama_tied"), run(adapted, "llama_tied")) > EFFECT
    assert distance(run(merged, "llama_tied"), run(adapted, "llama_tied")) < 2e-5
    assert operations(merged) == operations(base)
    assert merged.tied() == []
    assert torch.equal(merged.tensor("model.embed_tokens.weight"), base.tensor("model.embed_tokens.weight"))
    assert not torch.equal(merged.tensor("lm_head.weight"), base.tensor("lm_head.weight"))
    assert rewriter.undo(merged).tied() == base.tied()


def test_a_tied_embedding_with_untie_leaves_the_head() -> None:
    base = traced("llama_tied")
    adapted = trained(rewriter.apply(base, Lora(targets=("embed_tokens",), rank=3, alpha=7)).program)
    with pytest.raises(RewriteError, match="also read elsewhere"):
        rewriter.apply(adapted, Merge())
    merged = rewriter.apply(adapted, Merge(untie=True)).program
    assert distance(run(base, "llama_tied"), run(adapted, "llama_tied")) > EFFECT
    assert distance(run(merged, "llama_tied"), run(adapted, "llama_tied")) < 2e-5
    assert torch.equal(merged.tensor("lm_head.weight"), base.tensor("lm_head.weight"))
    assert not torch.equal(merged.tensor("model.embed_tokens.weight"), base.tensor("lm_head.weight"))


def test_both_uses_of_a_tied_weight() -> None:
    base = traced("llama_tied")
    adapted = trained(rewriter.apply(base, Lora(targets=("embed_tokens", "lm_head"), rank=3, alpha=7)).program)
    with pytest.raises(RewriteError, match="--untie"):
        rewriter.apply(adapted, Merge())
    merged = rewriter.apply(adapted, Merge(untie=True)).program
    assert distance(run(merged, "llama_tied"), run(adapted, "llama_tied")) < 2e-5
    assert operations(merged) == operations(base)


# -- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "up.lora_A.default"), (float("inf"), "up.lora_B.default")])
def test_values_that_are_not_finite_fail_with_the_tensor_named(value: float, name: str) -> None:
    adapted = trained(rewriter.apply(traced("mlp"), Lora(targets=("up",), rank=3)).program)
    bad = adapted.tensor(name).detach().clone()
    bad[1, 2] = value
    with pytest.raises(LawError, match=r"up\.weight would hold \d+ non-finite values") as error:
        rewriter.apply(adapted.with_tensors({name: bad}), Merge())
    assert error.value.exit_code == 4
    assert name in str(error.value)


def test_a_fold_that_overflows_half_precision_fails() -> None:
    module, args, kwargs = TINY["mlp"]()
    base = rewriter.trace(module.half(), tuple(a.half() for a in args), kwargs)
    adapted = rewriter.apply(base, Lora(targets=("up",), rank=3, alpha=300)).program
    values = {name: torch.full_like(adapted.tensor(name), 30.0) for name in adapted.steps[0].added}
    with pytest.raises(LawError, match=r"up\.weight would hold 220 non-finite values"):
        rewriter.apply(adapted.with_tensors(values), Merge(), check=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_accumulated_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    module, args, kwargs = TINY["mlp"]()
    base = rewriter.trace(module.to(dtype), tuple(a.to(dtype) for a in args), kwargs)
    one = Lora(targets=("up", "down"), rank=4, alpha=7, adapter="one")
    two = Lora(targets=("up", "down"), rank=3, alpha=5, adapter="two")
    first = rewriter.apply(base, one)
    adapted = trained(rewriter.apply(first.program, two).program)
    result = rewriter.apply(adapted, Merge())
    exact = {name: tensor.detach().double() for name, tensor in adapted.tensors.items()}
    for site in first.sites:
        whole = merged_weight(one, site, exact) + merged_weight(two, site, exact) - exact[site.weight]
        once = whole.to(dtype)
        got = result.program.tensor(site.weight)
        assert got.dtype is dtype
        ulp = torch.finfo(dtype).eps * once.double().abs()
        assert ((got.double() - once.double()).abs() <= ulp).all()
        assert (got == once).double().mean() > 0.99  # fp32 and fp64 sums may round apart where they meet a tie
        notes = result.applied[0].notes[site.path]
        error = float((once.double() - whole).norm() / (whole - exact[site.weight]).norm())
        assert notes["error_of_update"] == pytest.approx(error, rel=0.05)
        size = float((whole - exact[site.weight]).norm() / exact[site.weight].norm())
        assert notes["update"] == pytest.approx(size, rel=1e-3)


def test_fp64_accumulation_gives_the_fp64_fold_rounded_once() -> None:
    module, args, kwargs = TINY["mlp"]()
    base = rewriter.trace(module.bfloat16(), tuple(a.bfloat16() for a in args), kwargs)
    lora = Lora(targets=("up", "down"), rank=4, alpha=7)
    result = rewriter.apply(base, lora)
    adapted = trained(result.program)
    merged = rewriter.apply(adapted, Merge(precision="fp64")).program
    exact = {name: tensor.detach().double() for name, tensor in adapted.tensors.items()}
    for site in result.sites:
        assert torch.equal(merged.tensor(site.weight), merged_weight(lora, site, exact).bfloat16())


@pytest.mark.parametrize("other", [Adapter(bottleneck=5), Prefix(virtual_tokens=4), Prompt(virtual_tokens=4)])
def test_what_cannot_fold_stays_when_it_is_named(other: Pass) -> None:
    base = traced("llama")
    both = trained(rewriter.apply(base, Lora(rank=3, alpha=5), other).program)
    alone = trained(rewriter.apply(base, Lora(rank=3, alpha=5)).program)
    with pytest.raises(RewriteError, match=f"--keep {other.name}"):
        rewriter.apply(both, Merge())
    merged = rewriter.apply(both, Merge(keep=(other.name,))).program
    assert not [name for name in merged.tensors if "lora_" in name]
    assert distance(run(merged, "llama"), run(both, "llama")) < 1e-4
    assert distance(run(merged, "llama"), run(alone, "llama")) > 1e-2
    kept = rewriter.apply(base, other).program
    assert len(operations(merged)) == len(operations(kept))
    assert rewriter.text(rewriter.undo(merged)) == rewriter.text(both)
    with pytest.raises(UsageError, match="no pass of this program"):
        rewriter.apply(both, Merge(keep=("adaptor",)))
    with pytest.raises(RewriteError, match="nothing to merge"):
        rewriter.apply(kept, Merge(keep=(other.name,)))
