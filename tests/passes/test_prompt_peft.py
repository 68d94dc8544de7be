"""Prompt tuning and P-tuning give PEFT's numbers, on padded batches and in generation, and leave as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes.prompt import Prompt
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from rewriter.trace import trace
from rewriter.verify import outputs
from tests.models import TINY, randomise, traced
from tests.oracle import example, trained

COUNT, HIDDEN = 4, 9
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "opt": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}


def reference(module: nn.Module, task: str, program: Program, encoder: str) -> nn.Module:
    """PEFT's model with the trained numbers of the program."""
    common = {"task_type": task, "num_virtual_tokens": COUNT, "token_dim": 24, "num_layers": 2}
    common |= {"num_attention_heads": 4, "num_transformer_submodules": 1}
    if encoder == "none":
        config: Any = peft.PromptTuningConfig(**common)
    else:
        config = peft.PromptEncoderConfig(
            **common, encoder_reparameterization_type=encoder.upper(), encoder_hidden_size=HIDDEN
        )
    model = peft.get_peft_model(module, config).eval()
    names = [name for step in program.steps for name in step.added]
    state = {_key(name): program.tensor(name).detach() for name in names}
    model.prompt_encoder["default"].load_state_dict(state)  # strict: the names are PEFT's
    return model


def _key(name: str) -> str:
    return "embedding.weight" if name == "prompt_embeddings.default" else name.removeprefix("prompt_encoder.default.")


def prompted(base: Program, encoder: Any) -> Program:
    hidden = 0 if encoder == "none" else HIDDEN
    pass_ = Prompt(virtual_tokens=COUNT, encoder=encoder, encoder_hidden=hidden)
    return trained(rewriter.apply(base, pass_).program, size=0.5)


@pytest.mark.parametrize("encoder", ["none", "lstm", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_logits_are_those_of_peft(name: str, encoder: str) -> None:
    program = prompted(traced(name), encoder)
    module, _, _ = TINY[name]()
    _compare(name, program, reference(module, TASKS[name], program, encoder))


def test_positions_from_the_mask_are_those_of_peft() -> None:
    program = prompted(traced("opt"), "none")
    _compare("opt", program, reference(TINY["opt"]()[0], "CAUSAL_LM", program, "none"))


def _compare(name: str, program: Program, model: nn.Module) -> None:
    _, kwargs = example(name)
    mask = kwargs["attention_mask"]
    for padded in (mask, mask.flip(1)):  # on the right, on the left
        given = {**kwargs, "attention_mask": padded}
        with torch.no_grad():
            want = model(**{key: value for key, value in given.items() if key != "use_cache"}).logits
        got = program(**given)["logits"]
        if name != "t5":
            want, got = want[:, COUNT:][padded.bool()], got[padded.bool()]
        assert (got - want).abs().max() < 1e-4
        base = traced(name)(**given)["logits"]
        assert (got - (base if name == "t5" else base[padded.bool()])).abs().max() > 1e-2


@pytest.mark.parametrize("encoder", ["none", "lstm", "mlp"])
def test_a_classifier_pools_the_prompt_as_in_peft(encoder: str) -> None:
    from transformers import BertForSequenceClassification

    def fresh() -> nn.Module:
        config = TINY["bert"]()[0].config
        config.num_labels = 5
        return randomise(BertForSequenceClassification(config))

    _, kwargs = example("bert")
    base = trace(fresh(), (), kwargs)
    program = prompted(base, encoder)
    with torch.no_grad():
        want = reference(fresh(), "SEQ_CLS", program, encoder)(**kwargs).logits
    got = program(**kwargs)["logits"]
    assert (got - want).abs().max() < 1e-4
    assert (got - base(**kwargs)["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_generation_is_that_of_peft(name: str) -> None:
    program = prompted(traced(name), "none")
    model = reference(TINY[name]()[0], "CAUSAL_LM", program, "none")
    ids, mask = example(name)[1]["input_ids"], example(name)[1]["attention_mask"].flip(1)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        want = model.generate(input_ids=ids, attention_mask=mask, **options, eos_token_id=None)
    assert torch.equal(_greedy(program, ids, mask)[:, -10:], want[:, -10:])


def _greedy(program: Program, ids: Tensor, mask: Tensor) -> Tensor:
    for _ in range(10):
        logits = program(input_ids=ids, attention_mask=mask, use_cache=False)["logits"]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


@pytest.mark.parametrize(("name", "encoder"), [("llama", "lstm"), ("gpt2", "none"), ("bert", "mlp"), ("t5", "none")])
def test_onnx_runtime_agrees_at_two_lengths_and_with_padding(name: str, encoder: str, tmp_path: Path) -> None:
    import onnxruntime

    program = prompted(traced(name), encoder)
    report = export_onnx(program, tmp_path / "prompt.onnx")
    assert report.max_abs_error < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "prompt.onnx", providers=["CPUExecutionProvider"])
    for batch, length in ((2, 11), (4, 5)):
        ids = torch.randint(3, 31, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = (torch.arange(length) >= torch.arange(batch)[:, None] % 3).long()
        given = {"input_ids": ids, "attention_mask": mask}
        given |= {"bert": {"token_type_ids": ids % 2}, "t5": {"decoder_input_ids": ids[:, :3]}}.get(name, {})
        off = {} if name == "bert" else {"use_cache": False}
        want = outputs(program(**given, **off))
        got = session.run(None, {key: value.numpy() for key, value in given.items()})
        assert len(got) == len(want)
        assert all((torch.from_numpy(a) - b).abs().max() < 1e-4 for a, b in zip(got, want, strict=True))
