"""Prefix tuning against PEFT: the same prefix in the same model gives the same outputs, padding and all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

import rewriter
from passes import Prefix
from rewriter.errors import RewriteError
from rewriter.program import Program
from rewriter.trace import trace
from tests.models import TINY, Example, _decoder, llama_config, randomise, traced

VIRTUAL = 5
TASKS = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "opt": "CAUSAL_LM",
    "bert": "FEATURE_EXTRACTION",
    "t5": "SEQ_2_SEQ_LM",
}


def t5(layers: int) -> Example:
    from transformers import T5Config, T5ForConditionalGeneration

    _, args, kwargs = TINY["t5"]()
    config = T5Config(
        vocab_size=37,
        d_model=24,
        d_kv=6,
        d_ff=52,
        num_layers=2,
        num_decoder_layers=layers,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=17,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return randomise(T5ForConditionalGeneration(config)), args, kwargs


def reference(model: torch.nn.Module, task: str, **options: Any) -> peft.PeftModel:
    """The model with PEFT's prefix, every parameter of it random and none zero."""
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL, **options)
    wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in wrapped.prompt_encoder.parameters():
        parameter.data = 0.8 * torch.randn(parameter.shape, generator=generator)
    return wrapped


def adopted(program: Program, wrapped: peft.PeftModel) -> Program:
    """The program with the prefix of a PEFT model, found by name."""
    encoder = {name: value.detach() for name, value in wrapped.prompt_encoder.state_dict().items()}
    added = program.steps[-1].added
    if len(added) == 1:
        return program.with_tensors({added[0]: encoder["default.embedding.weight"]})
    return program.with_tensors({f"prompt_encoder.{name}": value for name, value in encoder.items()})


def visible(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The values at tokens that are no padding."""
    return values if mask is None else values[mask.bool()]


def compare(example: Example, task: str, program: Program, pass_: Prefix, **options: Any) -> None:
    model, _, kwargs = example
    if "token_type_ids" in kwargs:  # PEFT leaves them out
        kwargs["token_type_ids"] = torch.zeros_like(kwargs["token_type_ids"])
    given = {name: value for name, value in kwargs.items() if name not in ("use_cache", "token_type_ids")}
    wrapped = reference(model, task, **options)
    adapted = adopted(rewriter.apply(program, pass_).program, wrapped)
    mask = None if "decoder_input_ids" in kwargs else kwargs["attention_mask"]
    with torch.no_grad():
        want = visible(wrapped(**given)[0], mask)
        plain = visible(program(**kwargs)[0], mask)
    got = visible(adapted(**kwargs)[0], mask)
    assert float((got - want).abs().max()) < 1e-4
    assert float((plain - want).abs().max()) > 0.1


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_equals_peft(name: str, projection: bool) -> None:
    options = {"prefix_projection": True, "encoder_hidden_size": 11} if projection else {}
    pass_ = Prefix(virtual_tokens=VIRTUAL, projection=projection, hidden=11 if projection else None)
    compare(TINY[name](), TASKS[name], traced(name), pass_, **options)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("projection", [False, True])
def test_equals_peft_on_an_encoder_and_decoder(layers: int, projection: bool) -> None:
    example = t5(layers)
    program = trace(*example)
    options = {"prefix_projection": True, "encoder_hidden_size": 11} if projection else {}
    pass_ = Prefix(virtual_tokens=VIRTUAL, projection=projection, hidden=11 if projection else None)
    compare(example, "SEQ_2_SEQ_LM", program, pass_, num_layers=layers, **options)


def mistral() -> Example:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=64,
        sliding_window=6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _decoder(MistralForCausalLM(config), 31, length=11)


def gemma3() -> Example:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=64,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _decoder(Gemma3ForCausalLM(config), 31, length=11)


def gptj() -> Example:
    """Rotations are gathered from a repeated table, not read by rows."""
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        vocab_size=31, n_positions=64, n_embd=24, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=1, eos_token_id=2
    )
    return _decoder(GPTJForCausalLM(config), 31, length=11)


def bart() -> Example:
    """A prefix of the decoder leaves the encoder's learned positions alone."""
    from transformers import BartConfig, BartForConditionalGeneration

    _, args, kwargs = TINY["t5"]()
    config = BartConfig(
        vocab_size=37,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=36,
        decoder_ffn_dim=44,
        max_position_embeddings=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    return randomise(BartForConditionalGeneration(config)), args, kwargs


def roberta() -> Example:
    """Positions are counted from the tokens that are no padding, behind the row of the padding."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=52,
        max_position_embeddings=43,
        pad_token_id=1,
    )
    _, _, kwargs = TINY["bert"]()
    return randomise(RobertaModel(config)), (), {name: kwargs[name] for name in ("input_ids", "attention_mask")}


def eager() -> Example:
    """Attention as matmul, softmax and matmul."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llama_config())
    model.set_attn_implementation("eager")
    return _decoder(model, 31)


@pytest.mark.parametrize(
    ("build", "task"),
    [
        (roberta, "FEATURE_EXTRACTION"),
        (eager, "CAUSAL_LM"),
        (gptj, "CAUSAL_LM"),
        (bart, "SEQ_2_SEQ_LM"),
    ],
)
def test_equals_peft_on_models_written_otherwise(build: Callable[[], Example], task: str) -> None:
    compare(build(), task, trace(*build()), Prefix(virtual_tokens=VIRTUAL))


@pytest.mark.parametrize("build", [mistral, gemma3])
def test_equals_peft_where_a_window_slides(build: Callable[[], Example]) -> None:
    program = trace(*build())
    compare(build(), "CAUSAL_LM", program, Prefix(virtual_tokens=VIRTUAL))


def test_alibi_is_refused_by_name() -> None:
    from transformers import MptConfig, MptForCausalLM

    sizes = {"vocab_size": 31, "d_model": 24, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64}
    program = trace(*_decoder(MptForCausalLM(MptConfig(pad_token_id=0, **sizes)), 31))
    with pytest.raises(RewriteError, match="ALiBi"):
        rewriter.apply(program, Prefix(virtual_tokens=VIRTUAL))


def test_key_layout_is_that_of_peft() -> None:
    program = rewriter.apply(traced("llama"), Prefix(virtual_tokens=VIRTUAL)).program
    assert program.steps[-1].added == ("prompt_embeddings.default",)
    assert program.tensor("prompt_embeddings.default").shape == (VIRTUAL, 2 * 2 * 2 * 6)
