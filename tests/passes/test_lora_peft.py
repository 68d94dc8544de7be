"""Parity with PEFT for every LoRA feature, in both directions: its directories here, our directories there."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import rewriter
from passes import Lora
from passes.peft import PeftAdapter, read_adapter
from passes.peft_write import write_adapter
from rewriter import verify
from rewriter.errors import RewriteError, RewriteWarning, UsageError
from rewriter.program import Program
from rewriter.text import text
from rewriter.undo import undo
from tests.models import TINY, traced

TOLERANCE = 1e-5

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}),
    "all-linear, rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3, "r": 3}),
    "patterns, dora": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "use_dora": True,
            "rank_pattern": {"v_proj": 3, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, ".*1.mlp.down_proj": 7},
        },
    ),
    "patterns, rslora": (
        "llama",
        {"target_modules": ["q_proj", "o_proj"], "use_rslora": True, "rank_pattern": {"o_proj": 5}, "lora_alpha": 7},
    ),
    "bias all, lora_bias": ("bert", {"target_modules": ["query", "output.dense"], "bias": "all", "lora_bias": True}),
    "regex, bias lora_only": ("bert", {"target_modules": r".*layer\.1.*(query|value)", "bias": "lora_only"}),
    "layers, modules_to_save": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head", "norm"]},
    ),
    "tied, head saved": (
        "llama_tied",
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": 1,
            "layers_pattern": "layers",
            "modules_to_save": ["lm_head"],
        },
    ),
    "tied, both saved": (
        "llama_tied",
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "tied, embedding": ("llama_tied", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied, head": ("llama_tied", {"target_modules": ["lm_head", "v_proj"]}),
    "embedding, dora": ("llama", {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True}),
    "convolution, dora": ("conv", {"target_modules": ["stem", "classes", "head"], "use_dora": True}),
    "grouped convolution, buffers": (
        "conv",
        {"target_modules": ["stem", "grouped", "classes"], "modules_to_save": ["norm"]},
    ),
    "conv1d, bias all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"]}),
    "conv1d, dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "conv1d, pissa": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa"}),
    "olora": ("llama", {"target_modules": ["q_proj", "k_proj"], "init_lora_weights": "olora", "lora_alpha": 5}),
    "excluded": (
        "t5",
        {"target_modules": ["q", "v", "wo"], "exclude_modules": ["decoder.block.0.layer.0.SelfAttention.q"]},
    ),
}


def run(model: Callable[..., Any], name: str) -> torch.Tensor:
    _, args, kwargs = TINY[name]()
    with torch.no_grad():
        return torch.cat([t.flatten() for t in verify.outputs(model(*args, **kwargs))])


def trained(name: str, directory: Path, *, adapter: str = "default", **options: Any) -> torch.Tensor:
    """Write a PEFT adapter with random weights to a directory; returns what the PEFT model gives."""
    config = LoraConfig(**{"r": 4, **options})
    model = get_peft_model(TINY[name]()[0], config, adapter_name=adapter)
    size = 0.05 if config.init_lora_weights in ("pissa", "olora") else 0.3
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return run(model.eval(), name)


def randomised(program: Program) -> Program:
    generator = torch.Generator().manual_seed(5)
    values = {name: program.tensor(name) for name in program.trainable}
    return program.with_tensors({n: v + 0.3 * torch.randn(v.shape, generator=generator) for n, v in values.items()})


def in_peft(directory: Path, name: str) -> torch.Tensor:
    return run(PeftModel.from_pretrained(TINY[name]()[0], directory).eval(), name)


def assert_same(program: Program, other: Program) -> None:
    assert str(text(program)) == str(text(other))
    assert program.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensor(name)) for name, tensor in program.tensors.items())


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    base = traced(name)
    reference = trained(name, tmp_path / "theirs", **options)
    program = read_adapter(tmp_path / "theirs", base).apply(base).program
    assert (run(base, name) - reference).abs().max() > 100 * TOLERANCE
    assert (run(program, name) - reference).abs().max() < TOLERANCE
    assert_same(undo(program), base)
    written = write_adapter(program, tmp_path / "ours")
    assert (in_peft(written, name) - reference).abs().max() < TOLERANCE


OWN: dict[str, tuple[str, list[Lora]]] = {
    "slices of a fused projection": ("gpt2", [Lora(targets=("c_attn",), enable=("q", "v"), rank=3, alpha=5)]),
    "slices, another layer, lora_bias": (
        "gpt2",
        [
            Lora(targets=("c_attn",), enable=("q", "v"), rank=3, alpha=5, lora_bias=True),
            Lora(targets=("c_fc",), rank=4, alpha=4),
        ],
    ),
    "slices, rslora": ("phi3", [Lora(targets=("qkv_proj",), enable=("k", "v"), rank=3, alpha=5, rslora=True)]),
    "one slice by one step": (
        "phi3",
        [Lora(targets=("qkv_proj",), enable=("k",), rank=3), Lora(targets=("qkv_proj",), enable=("v",), rank=2)],
    ),
    "tied embedding saved": ("llama_tied", [Lora(targets=("q_proj",), modules_to_save=("embed_tokens",))]),
    "dora on a tied embedding": ("llama_tied", [Lora(targets=("embed_tokens",), rank=3, dora=True)]),
    "olora": ("llama", [Lora(targets=("v_proj",), rank=3, init="olora", alpha=2)]),
    "by data flow": ("bert", [Lora(rank=2, alpha=3, bias="lora_only")]),
}


@pytest.mark.parametrize("case", OWN)
def test_our_own_is_read_by_peft(case: str, tmp_path: Path) -> None:
    name, steps = OWN[case]
    program = randomised(rewriter.apply(traced(name), *steps).program)
    reference = run(program, name)
    assert (run(traced(name), name) - reference).abs().max() > 100 * TOLERANCE
    written = write_adapter(program, tmp_path / "ours", base_model="someone/base")
    assert (in_peft(written, name) - reference).abs().max() < TOLERANCE
    again = read_adapter(written, traced(name)).apply(traced(name)).program
    assert (run(again, name) - reference).abs().max() < TOLERANCE


def test_in_double_precision_nothing_but_rounding_differs(tmp_path: Path) -> None:
    module, args, kwargs = TINY["llama"]()
    base = rewriter.trace(module.double(), args, kwargs)
    model = get_peft_model(module, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_dora=True))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = (parameter + 0.3 * torch.randn(parameter.shape)).double()
    model.save_pretrained(tmp_path / "theirs")
    reference = run(model.eval(), "llama")
    program = read_adapter(tmp_path / "theirs", base).apply(base).program
    assert (run(program, "llama") - reference).abs().max() < 1e-10


def test_several_adapters_add_up_and_are_written_apart(tmp_path: Path) -> None:
    base = traced("llama")
    first = Lora(targets=("q_proj",), rank=3)
    second = Lora(targets=("q_proj", "v_proj"), rank=2, adapter="second")
    program = randomised(rewriter.apply(base, first, second).program)
    assert write_adapter(program, tmp_path / "both") == tmp_path / "both"
    assert write_adapter(program, tmp_path / "both", adapter="second") == tmp_path / "both" / "second"
    model = PeftModel.from_pretrained(TINY["llama"]()[0], tmp_path / "both")
    model.load_adapter(tmp_path / "both" / "second", "second")
    model.base_model.set_adapter(["default", "second"])
    reference = run(program, "llama")
    assert (run(model.eval(), "llama") - reference).abs().max() < TOLERANCE
    read = [PeftAdapter(tmp_path / "both"), PeftAdapter(tmp_path / "both" / "second", adapter="second")]
    assert (run(rewriter.apply(base, *read).program, "llama") - reference).abs().max() < TOLERANCE


def test_a_named_adapter_of_peft_is_read_from_its_subdirectory(tmp_path: Path) -> None:
    reference = trained("llama", tmp_path, adapter="mine", target_modules=["q_proj"])
    program = read_adapter(tmp_path / "mine", traced("llama"), adapter="mine").apply(traced("llama")).program
    assert (run(program, "llama") - reference).abs().max() < TOLERANCE
    assert "model.layers.0.self_attn.q_proj.lora_A.mine" in program.tensors


def test_the_flag_fan_in_fan_out_is_not_believed(tmp_path: Path) -> None:
    reference = trained("gpt2", tmp_path / "a", target_modules=["attn.c_proj"], fan_in_fan_out=True)  # square
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "fan_in_fan_out": False}))
    program = read_adapter(tmp_path / "a", traced("gpt2")).apply(traced("gpt2")).program
    assert (run(program, "gpt2") - reference).abs().max() < TOLERANCE


def test_an_adapter_of_the_whole_model_fits_its_body_and_back(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM, LlamaModel

    whole, args, kwargs = TINY["llama"]()
    assert isinstance(whole, LlamaForCausalLM)
    trained(
        "llama", tmp_path / "whole", target_modules=r"model\.layers.*(q|v)_proj", rank_pattern={"^model.*q_proj": 2}
    )
    body = rewriter.trace(whole.model, args, kwargs)
    with pytest.warns(RewriteWarning, match="'model.' was dropped"):
        adapter = read_adapter(tmp_path / "whole", body)
    program = adapter.apply(body).program
    assert isinstance(whole.model, LlamaModel)
    theirs = PeftModel.from_pretrained(TINY["llama"]()[0], tmp_path / "whole").eval()
    got, expected = program(*args, **kwargs).last_hidden_state, theirs.base_model.model.model(*args, **kwargs)
    assert (got - expected.last_hidden_state).abs().max() < TOLERANCE
    write_adapter(program, tmp_path / "body")
    with pytest.warns(RewriteWarning, match="'model.' was put before every name"):
        back = read_adapter(tmp_path / "body", traced("llama")).apply(traced("llama")).program
    assert (run(back, "llama") - run(theirs, "llama")).abs().max() < TOLERANCE


def test_the_step_records_name_and_digest_and_no_place(tmp_path: Path) -> None:
    trained("mlp", tmp_path / "mine", target_modules=["up"])
    program = read_adapter(tmp_path / "mine", traced("mlp")).apply(traced("mlp")).program
    (step,) = program.steps
    assert step.name == "peft"
    assert set(step.options) == {"directory", "sha256"}
    assert step.options["directory"] == "mine"
    pass_ = PeftAdapter(tmp_path / "mine")
    assert pass_.sha256 == step.options["sha256"]
    with pytest.raises(RewriteError, match="is not the adapter that was meant"):
        rewriter.apply(traced("mlp"), dataclasses.replace(pass_, sha256="0" * 64))


def test_trained_further_here_and_written_again(tmp_path: Path) -> None:
    trained("bert", tmp_path / "a", target_modules=["query"], bias="all", modules_to_save=["key"])
    program = randomised(read_adapter(tmp_path / "a", traced("bert")).apply(traced("bert")).program)
    written = write_adapter(program, tmp_path / "b")
    assert (in_peft(written, "bert") - run(program, "bert")).abs().max() < TOLERANCE


@pytest.mark.parametrize("targets", [("@attention.query",), "all-linear", ("@mlp",)])
def test_a_second_adapter_is_put_beside_the_layers_not_beside_the_first(targets: Any) -> None:
    first = rewriter.apply(traced("llama"), Lora(targets=("q_proj", "up_proj"))).program
    expected = rewriter.apply(traced("llama"), Lora(targets=targets)).sites
    second = rewriter.apply(first, Lora(targets=targets, adapter="second"))
    assert [site.path for site in second.sites] == [site.path for site in expected]


def test_what_peft_would_not_understand_is_not_written(tmp_path: Path) -> None:
    def written(*steps: Any, adapter: str = "default") -> None:
        write_adapter(rewriter.apply(traced("llama"), *steps).program, tmp_path / "x", adapter=adapter)

    with pytest.raises(UsageError, match="no adapter named 'other'"):
        written(Lora(targets=("q_proj",)), adapter="other")
    with pytest.raises(RewriteError, match="use_dora is not the same for all layers"):
        written(Lora(targets=("q_proj",)), Lora(targets=("v_proj",), dora=True))
    with pytest.raises(RewriteError, match="lora_dropout is not the same for all layers"):
        written(Lora(targets=("q_proj",)), Lora(targets=("v_proj",), dropout=0.5))
    assert not (tmp_path / "x").exists()


def test_the_same_adapter_twice_is_refused(tmp_path: Path) -> None:
    trained("mlp", tmp_path / "a", target_modules=["up"])
    step = PeftAdapter(tmp_path / "a")
    with pytest.raises(UsageError, match=r"already has a parameter 'up\.lora_A\.default'"):
        rewriter.apply(traced("mlp"), step, step)


def test_nothing_unusual_is_reported_for_what_peft_writes(tmp_path: Path) -> None:
    trained("gpt2", tmp_path / "a", target_modules=["c_attn"], bias="all", modules_to_save=["ln_f"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RewriteWarning)
        read_adapter(tmp_path / "a", traced("gpt2"))
