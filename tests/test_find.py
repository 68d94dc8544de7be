"""Targets: names, patterns and layers as PEFT matches them, and selectors that go by data flow in any model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rewriter
from passes import TrainableTokens
from rewriter.errors import UsageError
from rewriter.find import Sites, parse_targets, select
from rewriter.program import Program
from rewriter.view import Conv, Embedding, Linear, layers
from tests.models import TINY, traced

KINDS = (Linear, Conv, Embedding)


@functools.cache
def names(model: str) -> tuple[str, ...]:
    """The modules of a model that PEFT's LoRA can adapt."""
    module, _, _ = TINY[model]()
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)
    return tuple(name for name, child in module.named_modules() if isinstance(child, kinds))


def by_peft(model: str, **options: Any) -> set[str]:
    """The supported layers that PEFT's own rule chooses."""
    config = LoraConfig(**options)
    return {name for name in names(model) if LoraModel._check_target_module_exists(config, name)}


def by_us(program: Program, **options: Any) -> set[str]:
    return {site.path for site in select(program, options.pop("targets"), kinds=KINDS, **options)}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["self_attn.q_proj", "1.mlp.down_proj"]}),
    ("llama", {"target_modules": ["model.layers.1.self_attn.k_proj"]}),
    ("llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    ("llama", {"target_modules": r".*\.(q|v)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.1\.mlp\.(?!gate).*_proj"}),
    ("llama", {"target_modules": r".*(?<!down)_proj"}),
    ("llama", {"target_modules": "lm_head"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1.*"}),
    ("llama", {"target_modules": r".*_proj", "exclude_modules": ["q_proj", "o_proj"]}),
    ("gpt2", {"target_modules": ["c_proj"]}),
    ("gpt2", {"target_modules": ["attn.c_proj", "c_fc"]}),
    ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": "h"}),
    ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [1]}),
    ("gpt2", {"target_modules": r".*h\.[0-9]+\.attn\..*"}),
    ("gpt2", {"target_modules": ["wte", "wpe"]}),
    ("bert", {"target_modules": ["dense"]}),
    ("bert", {"target_modules": ["output.dense"]}),
    ("bert", {"target_modules": ["attention.output.dense", "query"], "layers_to_transform": [1]}),
    ("bert", {"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": "layer"}),
    ("bert", {"target_modules": r".*encoder\.layer\.\d\.(intermediate|output)\.dense"}),
    ("t5", {"target_modules": ["q", "v"]}),
    ("t5", {"target_modules": ["o", "wo"]}),
    ("t5", {"target_modules": ["EncDecAttention.q"]}),
    ("t5", {"target_modules": r"decoder\.block\.\d+\.layer\.1\..*\.[qkvo]"}),
    ("t5", {"target_modules": ["q"], "layers_to_transform": [1]}),
    ("t5", {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "block"}),
    ("t5", {"target_modules": ["q", "k"], "exclude_modules": r"encoder\..*"}),
]


@pytest.mark.parametrize(("model", "options"), CASES, ids=[f"{model}-{i}" for i, (model, _) in enumerate(CASES)])
def test_matching_is_that_of_peft(model: str, options: dict[str, Any]) -> None:
    expected = by_peft(model, **options)
    ours = {
        "targets": options["target_modules"],
        "exclude": options.get("exclude_modules", ()),
        "layers_to_transform": options.get("layers_to_transform", ()),
        "layers_pattern": options.get("layers_pattern"),
    }
    assert expected
    assert by_us(traced(model), **ours) == expected


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5"])
def test_all_linear_is_that_of_peft(model: str) -> None:
    from peft import get_peft_model

    module, _, _ = TINY[model]()
    adapted = get_peft_model(module, LoraConfig(target_modules="all-linear")).base_model.model
    expected = {name.removesuffix(".base_layer") for name, _ in adapted.named_modules() if name.endswith("base_layer")}
    assert by_us(traced(model), targets="all-linear") == expected
    assert by_us(traced(model), targets=("all-linear",)) == expected


def test_what_the_command_line_gives() -> None:
    assert parse_targets("q_proj,v_proj") == ("q_proj", "v_proj")
    assert parse_targets(" q_proj , v_proj ") == ("q_proj", "v_proj")
    assert parse_targets("all-linear") == "all-linear"
    assert parse_targets("@attention.query,@mlp") == ("@attention.query", "@mlp")
    assert parse_targets("model.layers.0.self_attn.q_proj") == ("model.layers.0.self_attn.q_proj",)
    assert parse_targets(r".*\.(q|v)_proj") == r".*\.(q|v)_proj"


def test_sites_come_in_the_order_of_the_program() -> None:
    sites = select(traced("llama"), ("down_proj", "q_proj"), kinds=KINDS)
    assert [site.path.split(".", 2)[2] for site in sites] == [
        *("0.self_attn.q_proj", "0.mlp.down_proj", "1.self_attn.q_proj", "1.mlp.down_proj")
    ]


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "targets", "said", "evidence"),
    [
        ("llama", ("q_proj", "v_projj"), "'v_projj' matches no layer", "v_proj"),
        ("llama", ("q_prj",), "'q_prj' matches no layer", "q_proj"),
        ("llama", ("proj",), "'proj' matches no layer", "_proj"),
        ("gpt2", ("attn",), "'attn' matches transformer.h.0.attn", "c_attn"),
        ("llama", ("mlp",), "'mlp' matches model.layers.0.mlp, which is a LlamaMLP", "gate_proj"),
        ("llama", ("norm",), "'norm' matches model.norm, which is a LlamaRMSNorm", ""),
        ("llama", ("q_proj", "q_proj"), "'q_proj' is given twice", ""),
        ("llama", (), "no target given", "all-linear"),
        ("llama", r".*(", "is not a regular expression", ""),
        ("llama", r"q_proj", "'q_proj' matches no layer", "whole path"),
        ("llama", ("@attention.q",), "unknown selector '@attention.q'", "@attention.query"),
        ("mlp", ("@attention.query",), "'@attention.query' matches no layer", ""),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(model: str, targets: Any, said: str, evidence: str) -> None:
    with pytest.raises(UsageError) as error:
        select(traced(model), targets, kinds=KINDS)
    assert said in error.value.what
    assert evidence in str(error.value)
    assert error.value.exit_code == 2


def test_a_pattern_without_end_is_given_up() -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a" * 48, nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return next(self.children())(x)

    program = rewriter.trace(Long(), (torch.randn(2, 4),))
    with pytest.raises(UsageError, match=r"takes too long|matches no layer"):
        select(program, r"(a|aa)+(a|aa)+(a|aa)+(a|aa)+$b", kinds=KINDS)


def test_misses_have_reasons() -> None:
    program = traced("conv")
    found: Sites[Any] = select(program, r"stem|head|classes", kinds=(Linear,))
    assert [site.path for site in found] == ["head"]
    assert {miss.path: miss.reason for miss in found.missed} == {
        "stem": "conv is not supported by this pass",
        "classes": "embedding is not supported by this pass",
    }


# -- by data flow -------------------------------------------------------------------------------------------------

PROJECTIONS = {
    "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "opt": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    "mixtral": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "bert": ("self.query", "self.key", "self.value", "attention.output.dense"),
    "vit": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "t5": ("SelfAttention.q|EncDecAttention.q", "Attention.k", "Attention.v", "Attention.o"),
    "whisper": ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"),
    "clip": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    "gpt2": ("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"),
    "phi3": ("self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.o_proj"),
}
COUNTS = {"t5": 6, "whisper": 6, "clip": 4}  # attentions; the others have two
MLP = {
    "llama": ("gate_proj", "up_proj", "down_proj"),
    "opt": ("fc1", "fc2"),
    "bert": ("intermediate.dense", "output.dense"),
    "t5": ("wi", "wo"),
    "whisper": ("fc1", "fc2"),
    "clip": ("fc1", "fc2"),
    "gpt2": ("c_fc", "mlp.c_proj"),
    "phi3": ("gate_up_proj", "down_proj"),
}


@pytest.mark.parametrize("model", PROJECTIONS)
def test_attention_is_found_by_data_flow(model: str) -> None:
    program = traced(model)
    for role, tail in zip(("query", "key", "value", "output"), PROJECTIONS[model], strict=True):
        sites = select(program, (f"@attention.{role}",), kinds=KINDS).found
        assert len(sites) == COUNTS.get(model, 2), role
        ends = tuple(tail.split("|"))
        assert all(site.path.endswith(ends) for site in sites), (role, [site.path for site in sites])
    everything = select(program, ("@attention",), kinds=KINDS)
    assert len(everything) == 4 * COUNTS.get(model, 2)


@pytest.mark.parametrize("model", MLP)
def test_the_feed_forward_part_is_found_by_data_flow(model: str) -> None:
    sites = select(traced(model), ("@mlp",), kinds=KINDS).found
    assert sites
    assert {site.path for site in sites} == {
        name for name in names(model) if name.endswith(MLP[model]) and not name.endswith("attention.output.dense")
    }


@pytest.mark.parametrize(
    ("model", "width", "slices"),
    [
        ("gpt2", 72, {"query": (0, 24), "key": (24, 48), "value": (48, 72)}),
        ("phi3", 48, {"query": (0, 24), "key": (24, 36), "value": (36, 48)}),
    ],
)
def test_a_fused_projection_is_cut(model: str, width: int, slices: dict[str, tuple[int, int]]) -> None:
    for role, (start, stop) in slices.items():
        for site in select(traced(model), (f"@attention.{role}",), kinds=KINDS):
            assert isinstance(site, Linear)
            assert site.out_features == width
            assert site.part is not None
            assert (site.part.name, site.part.start, site.part.stop) == (role, start, stop)


class Strange(nn.Module):
    """A block that no name gives away: eager softmax attention, value first, odd module names."""

    def __init__(self) -> None:
        super().__init__()
        self.lantern, self.copper = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.otter = nn.Linear(12, 12)
        self.harbour = nn.Linear(12, 12)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 12)
        self.before, self.between = nn.LayerNorm(12), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.before(x)

        def heads(y: Tensor) -> Tensor:
            return y.reshape(batch, length, 3, 4).transpose(1, 2)

        v, q, k = heads(self.otter(h)), heads(self.lantern(h)), heads(self.copper(h))
        scores = (q @ k.transpose(-1, -2)) / 2.0
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        x = x + self.harbour((weights @ v).transpose(1, 2).flatten(2))
        return x + self.second(torch.relu(self.first(self.between(x))))


class Fused(Strange):
    """The same with one projection, its parts in the order value, query, key."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(12, 36)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        v, q, k = (
            part.reshape(batch, length, 3, 4).transpose(1, 2) for part in self.all(self.before(x)).chunk(3, dim=-1)
        )
        weights = torch.einsum("bhid,bhjd->bhij", q, k).div(2.0).softmax(-1)
        attended = torch.einsum("bhij,bhjd->bhid", weights, v)
        x = x + self.harbour(attended.permute(0, 2, 1, 3).reshape(batch, length, 12))
        return x + self.second(torch.relu(self.first(self.between(x))))


def strange(kind: type[nn.Module]) -> Program:
    torch.manual_seed(0)
    return rewriter.trace(kind().eval(), (torch.randn(2, 7, 12),))


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("@attention.query", {"lantern"}),
        ("@attention.key", {"copper"}),
        ("@attention.value", {"otter"}),
        ("@attention.output", {"harbour"}),
        ("@attention", {"lantern", "copper", "otter", "harbour"}),
        ("@mlp", {"first", "second"}),
    ],
)
def test_a_hand_written_block_with_any_names(selector: str, expected: set[str]) -> None:
    assert by_us(strange(Strange), targets=(selector,)) == expected


def test_a_hand_written_fused_block() -> None:
    program = strange(Fused)
    slices = {"value": (0, 12), "query": (12, 24), "key": (24, 36)}
    for role, (start, stop) in slices.items():
        (site,) = select(program, (f"@attention.{role}",), kinds=KINDS)
        assert isinstance(site, Linear)
        assert site.path == "all"
        assert site.part is not None
        assert (site.part.start, site.part.stop) == (start, stop)
    assert by_us(program, targets=("@attention.output",)) == {"harbour"}
    assert by_us(program, targets=("@mlp",)) == {"first", "second"}


def test_a_layer_whose_weight_a_pass_computes_is_found_but_not_changed_again() -> None:
    base = traced("llama")
    program = rewriter.apply(base, TrainableTokens(token_indices=(3, 11))).program
    before, after = layers(base), layers(program)
    assert list(after) == list(before)
    assert [path for path, site in after.items() if site.patched] == ["model.embed_tokens"]
    assert after["model.embed_tokens"].weight == "model.embed_tokens.weight"
    assert len(select(program, "all-linear", kinds=(Linear,)).found) == len(
        select(base, "all-linear", kinds=(Linear,)).found
    )
    with pytest.raises(UsageError, match=r"embed_tokens applies a weight that the pass trainable_tokens computes"):
        select(program, ("embed_tokens",), kinds=(Embedding,))
    tied = rewriter.apply(traced("llama_tied"), TrainableTokens(token_indices=(3, 11))).program
    assert {path for path, site in layers(tied).items() if site.patched} == {"model.embed_tokens", "lm_head"}
