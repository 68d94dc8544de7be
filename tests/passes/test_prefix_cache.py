"""A prefix in a program with a key/value cache: it enters once, and generation is that without a cache and PEFT's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

import rewriter
from passes import Lora, Prefix
from rewriter.errors import RewriteError
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from rewriter.trace import trace
from tests.models import TINY
from tests.passes.test_prefix_peft import VIRTUAL, mistral, reference

NEW = 20
HEADS = {"llama": (2, 6), "gpt2": (4, 6)}
SCALE = 0.7


def cache(name: str, batch: int, rows: int, seed: int = 0) -> Any:
    """Keys and values of earlier tokens, random."""
    from transformers import DynamicCache

    model = TINY[name]()[0]
    generator = torch.Generator().manual_seed(seed)
    made = DynamicCache(config=model.config)
    for layer in range(2):
        heads, width = HEADS[name]
        made.update(*(torch.randn(batch, heads, rows, width, generator=generator) for _ in "kv"), layer)
    return made


@functools.cache
def programs(name: str) -> tuple[Program, Program]:
    """The same model traced without and with a cache."""
    model, args, kwargs = TINY[name]()
    given = {
        "input_ids": kwargs["input_ids"],
        "attention_mask": torch.ones(3, 12, dtype=torch.long),
        "past_key_values": cache(name, 3, 5),
        "use_cache": True,
    }
    return trace(model, args, kwargs), trace(TINY[name]()[0], (), given)


def with_prefix(program: Program, *passes: Any, **options: Any) -> Program:
    adapted = rewriter.apply(program, Prefix(virtual_tokens=VIRTUAL, **options), *passes).program
    generator = torch.Generator().manual_seed(5)
    added = {name: adapted.tensor(name) for step in adapted.steps for name in step.added}
    return adapted.with_tensors(
        {name: SCALE * torch.randn(added[name].shape, generator=generator) for name in sorted(added)}
    )


def prompt(*, padded: bool = True) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 31, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :2] = not padded
    return ids, mask


def ones(mask: Tensor, count: int) -> Tensor:
    return mask.new_ones(len(mask), count)


def without_cache(program: Program) -> tuple[Tensor, list[Tensor]]:
    """Greedy generation that runs everything again for every token."""
    ids, mask = prompt()
    scores = []
    for _ in range(NEW):
        scores.append(program(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, scores[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, ones(mask, 1)], 1)
    return ids, scores


def with_cache(
    step: Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]], empty: Any, *, padded: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """Greedy generation: the whole prompt into an empty cache, then one token at a time."""
    ids, mask = prompt(padded=padded)
    new, held, scores = ids, empty, []
    for count in range(NEW):
        logits, held = step(new, mask, held)
        scores.append(logits[:, -1])
        new = scores[-1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], 1)
        mask = torch.cat([ones(mask, 0 if count else VIRTUAL), mask, ones(mask, 1)], 1)
    return ids, scores


def torch_step(program: Program) -> Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]:
    def step(ids: Tensor, mask: Tensor, held: Any) -> tuple[Tensor, Any]:
        out = program(input_ids=ids, attention_mask=mask, past_key_values=held, use_cache=True)
        return out.logits, out.past_key_values

    return step


def equal(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(one[0], other[0])
    assert max(float((a - b).abs().max()) for a, b in zip(one[1], other[1], strict=True)) < 1e-4


@pytest.mark.parametrize("positions", ["auto", "keep"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_with_a_cache_equals_generation_without(name: str, positions: str) -> None:
    plain, cached = programs(name)
    equal(
        without_cache(with_prefix(plain, positions=positions)),
        with_cache(torch_step(with_prefix(cached, positions=positions)), cache(name, 2, 0)),
    )


def test_with_projection_and_lora() -> None:
    plain, cached = programs("llama")
    passes, options = (Lora(rank=4),), {"projection": True, "hidden": 7}
    equal(
        without_cache(with_prefix(plain, *passes, **options)),
        with_cache(torch_step(with_prefix(cached, *passes, **options)), cache("llama", 2, 0)),
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_equals_that_of_peft(name: str) -> None:
    wrapped = reference(TINY[name]()[0], "CAUSAL_LM")
    rows = wrapped.prompt_encoder["default"].embedding.weight.detach()
    program = rewriter.apply(programs(name)[1], Prefix(virtual_tokens=VIRTUAL)).program
    program = program.with_tensors({"prompt_embeddings.default": rows})
    ids, mask = prompt(padded=False)  # for padded rows `generate` counts positions from the first visible token
    want = wrapped.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    got, _ = with_cache(torch_step(program), cache(name, 2, 0), padded=False)
    assert torch.equal(got, want)


def test_the_cache_holds_the_prefix_once() -> None:
    program = with_prefix(programs("llama")[1])
    step = torch_step(program)
    ids, mask = prompt()
    logits, held = step(ids, mask, cache("llama", 2, 0))
    assert held.layers[0].keys.shape[2] == VIRTUAL + ids.shape[1]
    rows = program.tensor("prompt_embeddings.default").detach().view(VIRTUAL, 4, 2, 6).permute(1, 2, 0, 3)
    for layer, entry in enumerate(held.layers):
        assert torch.equal(entry.keys[0, :, :VIRTUAL], rows[2 * layer])
        assert torch.equal(entry.values[1, :, :VIRTUAL], rows[2 * layer + 1])
    new = logits[:, -1].argmax(-1, keepdim=True)
    _, held = step(new, torch.cat([ones(mask, VIRTUAL), mask, ones(mask, 1)], 1), held)
    assert held.layers[1].values.shape[2] == VIRTUAL + ids.shape[1] + 1


def test_a_cache_that_forgets_is_refused() -> None:
    from transformers import DynamicCache

    model, _, kwargs = mistral()
    held = DynamicCache(config=model.config)
    for layer in range(2):
        held.update(torch.ones(3, 2, 5, 6), torch.ones(3, 2, 5, 6), layer)
    mask = torch.ones(3, 16, dtype=torch.long)
    given = {"input_ids": kwargs["input_ids"], "attention_mask": mask, "past_key_values": held, "use_cache": True}
    program = trace(model, (), given)
    with pytest.raises(RewriteError, match="sliding window"):
        rewriter.apply(program, Prefix(virtual_tokens=VIRTUAL))


def test_undo_leaves_no_difference() -> None:
    cached = programs("llama")[1]
    assert not rewriter.diff(cached, rewriter.undo(with_prefix(cached)))


def test_onnx_generates_the_same(tmp_path: Path) -> None:
    plain, cached = programs("llama")
    report = export_onnx(with_prefix(cached), tmp_path / "cached.onnx")
    assert report.max_abs_error < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "cached.onnx"), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def step(ids: Tensor, mask: Tensor, held: list[Any]) -> tuple[Tensor, list[Any]]:
        given = dict(zip(names, [ids.numpy(), mask.numpy(), *held], strict=True))
        logits, *rows = session.run(None, given)
        return torch.from_numpy(logits), rows

    empty = [np.zeros((2, 2, 0, 6), dtype=np.float32)] * 4
    equal(without_cache(with_prefix(plain)), with_cache(step, empty))
