"""PEFT directories of methods other than LoRA: read onto a program with PEFT's outputs, written for PEFT to load."""

from __future__ import annotations

import copy
import functools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import passes
import rewriter
from passes.peft import read_adapter
from passes.peft_write import write_adapter
from rewriter.errors import RewriteError, UsageError
from rewriter.program import Program
from rewriter.verify import outputs
from tests.models import TINY, randomise, traced
from tests.oracle import example

peft = pytest.importorskip("peft")

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "FEATURE_EXTRACTION"}
Q = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "bert": ["query", "output.dense"]}
F = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "bert": []}
MADE: dict[str, Callable[[str], Any]] = {
    "IA3": lambda name: peft.IA3Config(target_modules=[*Q[name], *F[name]], feedforward_modules=F[name]),
    "LOHA": lambda name: peft.LoHaConfig(
        r=3, alpha=5, target_modules=Q[name], rank_pattern={Q[name][0]: 2}, alpha_pattern={Q[name][1]: 7}
    ),
    "LOKR": lambda name: peft.LoKrConfig(r=2, alpha=5, target_modules=Q[name], decompose_both=True),
    "VERA": lambda name: peft.VeraConfig(r=5, target_modules=Q[name], d_initial=0.3),
    "ADALORA": lambda name: peft.AdaLoraConfig(
        init_r=5, target_r=3, lora_alpha=7, total_step=100, tinit=1, tfinal=2, target_modules=Q[name]
    ),
    "LN_TUNING": lambda name: peft.LNTuningConfig(
        target_modules={"llama": ["input_layernorm", "norm"], "gpt2": ["ln_1", "ln_f"], "bert": ["LayerNorm"]}[name]
    ),
    "TRAINABLE_TOKENS": lambda name: peft.TrainableTokensConfig(
        token_indices=[3, 11],
        target_modules=[{"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}[name]],
    ),
    "PREFIX_TUNING": lambda name: peft.PrefixTuningConfig(task_type=TASKS[name], num_virtual_tokens=5),
    "PROMPT_TUNING": lambda name: peft.PromptTuningConfig(task_type=TASKS[name], num_virtual_tokens=5),
    "P_TUNING": lambda name: peft.PromptEncoderConfig(
        task_type=TASKS[name], num_virtual_tokens=5, encoder_hidden_size=9
    ),
}


def result(model: Callable[..., Any], name: str) -> torch.Tensor:
    """The first output for the example, at tokens that are no padding; PEFT's prompts leave token types out."""
    _, kwargs = example(name)
    given = {key: value for key, value in kwargs.items() if key != "token_type_ids"}
    if name == "bert" and isinstance(model, Program):
        given["token_type_ids"] = torch.zeros_like(kwargs["token_type_ids"])
    with torch.no_grad():
        first = outputs(model(**given))[0]
    mask = kwargs["attention_mask"].bool()
    return first[:, -mask.shape[1] :][mask]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def theirs(kind: str, name: str, directory: Path) -> torch.Tensor:
    """PEFT's own directory of a method with random numbers, and its outputs for the model's example."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(TINY[name]()[0], MADE[kind](name)).eval()
    generator = torch.Generator().manual_seed(5)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and "ranknum" not in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator) + (1.0 if "ia3" in key else 0.0)
    tied = {key: value for key, value in model.named_parameters() if "trainable_tokens_delta" in key}
    for value in list(tied.values())[1:]:
        value.data = next(iter(tied.values())).data
    model.save_pretrained(directory)
    return result(model, name)


def loaded(directory: Path, name: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(TINY[name]()[0], directory).eval()
    return result(model, name)


CASES = [(kind, name) for kind in MADE for name in Q if (kind, name) not in {("LOHA", "gpt2"), ("LOKR", "gpt2")}]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_directory_of_peft_means_the_same_here(kind: str, name: str, tmp_path: Path) -> None:
    expected = theirs(kind, name, tmp_path / "theirs")
    base = traced(name)
    program = read_adapter(tmp_path / "theirs", base).apply(base).program
    got = result(program, name)
    assert difference(expected, got) < 1e-5
    assert difference(expected, result(base, name)) > 1e-2
    written = write_adapter(program, tmp_path / "ours")
    before, after = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("theirs", "ours"))
    assert {*after} <= {*before}
    assert {*before} - {*after} <= {"base_model.model.lm_head.trainable_tokens_delta"}
    assert all(torch.equal(before[key], after[key]) for key in after)
    assert difference(loaded(written, name), got) < 1e-5
    assert rewriter.text(rewriter.undo(program)) == rewriter.text(base)


OURS: dict[str, Callable[[str], Any]] = {
    "IA3": lambda name: passes.Ia3(targets=tuple(Q[name][:1]), feedforward_targets=tuple(F[name])),
    "LOHA": lambda name: passes.Loha(rank=3, alpha=5, targets=tuple(Q[name]), rank_pattern={Q[name][0]: 2}),
    "LOKR": lambda name: passes.Lokr(rank=2, alpha=5, targets=tuple(Q[name])),
    "VERA": lambda name: passes.Vera(rank=5, targets=tuple(Q[name]), projection_seed=3),
    "ADALORA": lambda name: passes.Adalora(rank=5, alpha=7, targets=tuple(Q[name]), rank_pattern={Q[name][1]: 3}),
    "LN_TUNING": lambda name: passes.LayerNormTuning(),
    "TRAINABLE_TOKENS": lambda name: passes.TrainableTokens(token_indices=(3, 11)),
    "PREFIX_TUNING": lambda name: passes.Prefix(virtual_tokens=5, sigma=0.8, projection=name == "gpt2"),
    "PROMPT_TUNING": lambda name: passes.Prompt(virtual_tokens=5, encoder="lstm" if name == "gpt2" else "none"),
}


def adapted(kind: str, name: str) -> Program:
    """The program with random numbers in everything that trains, and only there."""
    program = rewriter.apply(traced(name), OURS[kind](name)).program
    generator = torch.Generator().manual_seed(6)
    noise = {key: torch.randn(program.tensor(key).shape, generator=generator) for key in program.trainable}
    return program.with_tensors({key: program.tensor(key) + 0.3 * value for key, value in noise.items()})


@pytest.mark.parametrize(
    ("kind", "name"),
    [case for case in CASES if case[0] != "P_TUNING" and case[1] != "bert" and case != ("IA3", "gpt2")],
)
def test_a_directory_written_here_means_the_same_to_peft(kind: str, name: str, tmp_path: Path) -> None:
    program = adapted(kind, name)
    expected = result(program, name)
    assert difference(expected, result(traced(name), name)) > 1e-2
    written = write_adapter(program, tmp_path / "ours", base_model="someone/base")
    config = json.loads((written / "adapter_config.json").read_text())
    assert config["peft_type"] == kind
    assert config["base_model_name_or_path"] == "someone/base"
    assert difference(loaded(written, name), expected) < 1e-5
    again = read_adapter(written, traced(name)).apply(traced(name)).program
    assert difference(result(again, name), expected) < 1e-5  # an encoder is saved as what it gave


def test_what_a_directory_cannot_hold_is_refused(tmp_path: Path) -> None:
    sliced = rewriter.apply(traced("gpt2"), passes.Ia3()).program
    with pytest.raises(RewriteError, match="a slice of a layer"):
        write_adapter(sliced, tmp_path / "a")
    turned = rewriter.apply(traced("gpt2"), passes.Loha(targets=("mlp.c_proj",))).program
    with pytest.raises(RewriteError, match="PEFT has no LOHA for such a layer"):
        write_adapter(turned, tmp_path / "turned")
    both = rewriter.apply(adapted("LOHA", "llama"), passes.Lora(adapter="second")).program
    with pytest.raises(RewriteError, match="holds one method"):
        write_adapter(both, tmp_path / "b")
    with pytest.raises(UsageError, match="no adapter named 'other'"):
        write_adapter(adapted("IA3", "llama"), tmp_path / "c", adapter="other")
    assert not any(tmp_path.iterdir())


BAD: list[tuple[str, Callable[[dict[str, Any], dict[str, Any]], None], str]] = [
    ("LOHA", lambda config, _: config.update(r=4, rank_pattern={}), "another shape"),
    ("LOHA", lambda config, _: config.update(target_modules=["q_proj"]), "does not target"),
    ("LOHA", lambda config, _: config.update(target_modules=["q_proj", "v_proj", "k_proj"]), "the weights lack"),
    ("LOHA", lambda _, held: held.pop(next(k for k in held if "w2_b" in k)), "not those of loha"),
    ("LOKR", lambda config, _: config.update(decompose_factor=2), "another shape"),
    ("IA3", lambda config, _: config.update(feedforward_modules=[]), "another shape"),
    ("VERA", lambda config, _: config.update(r=6), "another shape"),
    ("ADALORA", lambda config, _: config.update(use_dora=True), "not supported"),
    ("TRAINABLE_TOKENS", lambda config, _: config.update(token_indices=[3, 11, 12]), "another shape"),
    ("LN_TUNING", lambda config, _: config.update(target_modules=["norm"]), "does not target"),
    ("IA3", lambda config, _: config.update(surprise=1), "unknown field"),
]


@pytest.mark.parametrize(("kind", "change", "said"), BAD)
def test_a_directory_that_disagrees_with_itself_is_refused(
    kind: str, change: Callable[[dict[str, Any], dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    theirs(kind, "llama", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    held = load_file(tmp_path / "adapter_model.safetensors")
    change(config, held)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RewriteError) as error:
        read_adapter(tmp_path, traced("llama")).apply(traced("llama"))
    assert re.search(said, str(error.value)), str(error.value)


HEADS: dict[str, Callable[[], Any]] = {
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=4, encoder_hidden_size=9),
    "LN_TUNING": lambda: peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]),
    "VERA": lambda: peft.VeraConfig(task_type="SEQ_CLS", r=5, bias="vera_only", target_modules=["query", "value"]),
    "ADALORA": lambda: peft.AdaLoraConfig(
        task_type="SEQ_CLS", init_r=4, total_step=9, tinit=1, tfinal=2, bias="all", target_modules=["query"]
    ),
    "IA3": lambda: peft.IA3Config(task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[]),
}


@functools.cache
def classifier() -> tuple[torch.nn.Module, Program]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=52,
        max_position_embeddings=43,
        num_labels=5,
    )
    module = randomise(BertForSequenceClassification(config))
    kwargs = {key: value for key, value in example("bert")[1].items() if key != "token_type_ids"}
    return module, rewriter.trace(module, (), kwargs)


@pytest.mark.parametrize("kind", HEADS)
def test_a_trained_head_and_trained_biases_come_and_go_along(kind: str, tmp_path: Path) -> None:
    module, base = classifier()
    kwargs = {key: value for key, value in example("bert")[1].items() if key != "token_type_ids"}
    model = peft.get_peft_model(copy.deepcopy(module), HEADS[kind]()).eval()
    generator = torch.Generator().manual_seed(5)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and "ranknum" not in key:
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "theirs")
    program = read_adapter(tmp_path / "theirs", base).apply(base).program
    written = write_adapter(program, tmp_path / "ours")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = model(**kwargs).logits
        again = peft.PeftModel.from_pretrained(copy.deepcopy(module), written).eval()(**kwargs).logits
    assert difference(base(**kwargs).logits, expected) > 0.1
    assert difference(program(**kwargs).logits, expected) < 1e-5
    assert difference(again, expected) < 1e-5
