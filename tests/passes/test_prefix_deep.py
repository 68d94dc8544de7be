"""Deep prompts: the model itself, with its blocks' inputs overwritten by hooks, is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes import Prefix
from rewriter.errors import UsageError
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from rewriter.trace import trace
from tests.models import TINY, llama_config, randomise, traced
from tests.oracle import distance, run, trained

P = 3
NAME = "prompt_embeddings.default"
BLOCKS = {"gpt2": "transformer.h", "bert": "encoder.layer", "llama": "model.layers", "opt": "model.decoder.layers"}


def adapted(name: str) -> Program:
    return trained(rewriter.apply(traced(name), Prefix(virtual_tokens=P, deep=True)).program, size=0.7)


def overwritten(model: nn.Module, blocks: str, prompts: Tensor, given: dict[str, Any]) -> Tensor:
    """The model on P more tokens, every block's first P positions replaced before it runs."""

    def hook(rows: Tensor) -> Any:
        def change(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            new = torch.cat([rows.expand(len(hidden), -1, -1), hidden[:, P:]], 1)
            return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": new})

        return change

    layers = list(model.get_submodule(blocks).children())
    for layer, rows in zip(layers, prompts.chunk(len(layers), 1), strict=True):
        layer.register_forward_pre_hook(hook(rows[None]), with_kwargs=True)
    ahead = {"input_ids": 5, "attention_mask": 1, "token_type_ids": 0}
    longer = {
        key: torch.cat([value.new_full((len(value), P), ahead[key]), value], 1) if key in ahead else value
        for key, value in given.items()
    }
    with torch.no_grad():
        result: Tensor = model(**longer)[0]
    return result[:, P:]


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_blocks_whose_inputs_are_overwritten(name: str) -> None:
    model, _, given = TINY[name]()
    program = adapted(name)
    want = overwritten(model, BLOCKS[name], program.tensor(NAME).detach(), given)
    got = program(**given)[0]
    visible = given["attention_mask"].bool()
    assert got.shape == want.shape
    assert float((got - want)[visible].abs().max()) < 1e-5
    assert float((traced(name)(**given)[0] - want)[visible].abs().max()) > 0.1


@pytest.mark.parametrize(("name", "columns"), [("t5", 2 * 24), ("whisper", 2 * 24), ("llama", 2 * 24)])
def test_one_prompt_per_block(name: str, columns: int) -> None:
    assert adapted(name).tensor(NAME).shape == (P, columns)


def test_projection_makes_the_prompts() -> None:
    pass_ = Prefix(virtual_tokens=P, deep=True, projection=True, hidden=7)
    program = rewriter.apply(traced("gpt2"), pass_).program
    shapes = [tuple(program.tensor(name).shape) for name in program.trainable]
    assert shapes == [(P, 24), (7, 24), (7,), (48, 7), (48,)]


def test_undo_leaves_no_difference() -> None:
    program = adapted("gpt2")
    assert not rewriter.diff(traced("gpt2"), rewriter.undo(program))


def test_onnx_equals_torch(tmp_path: Any) -> None:
    assert export_onnx(adapted("bert"), tmp_path / "deep.onnx").max_abs_error < 1e-4


def test_other_lengths_and_the_base_stay(tmp_path: Any) -> None:
    program = adapted("llama")
    before = run(traced("llama"), "llama")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 4, 3, 8, 11]] * 2)
    assert program(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0].shape == (2, 10, 31)
    assert distance(before, run(traced("llama"), "llama")) == 0


@pytest.mark.parametrize("name", ["vit", "mlp"])
def test_a_model_without_tokens_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no embedding that is looked up by token ids"):
        rewriter.apply(traced(name), Prefix(deep=True))


def test_no_room_is_refused() -> None:
    with pytest.raises(UsageError, match="no room"):
        rewriter.apply(traced("gpt2"), Prefix(deep=True, virtual_tokens=43))


def test_a_cache_is_refused() -> None:
    from transformers import DynamicCache, LlamaForCausalLM

    config = llama_config()
    cache = DynamicCache(config=config)
    for layer in range(2):
        cache.update(torch.randn(3, 2, 5, 6), torch.randn(3, 2, 5, 6), layer)
    given = {
        "input_ids": TINY["llama"]()[2]["input_ids"],
        "attention_mask": torch.ones(3, 12, dtype=torch.long),
        "past_key_values": cache,
        "use_cache": True,
    }
    program = trace(randomise(LlamaForCausalLM(config)), (), given)
    with pytest.raises(UsageError, match="keys and values of earlier tokens"):
        rewriter.apply(program, Prefix(deep=True))
