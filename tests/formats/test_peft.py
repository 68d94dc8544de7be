"""PEFT directories that must not be taken for good, and unusual ones that are: one clear message each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from passes.peft import read_adapter
from rewriter.errors import LawError, RewriteError, RewriteWarning, UnsafeError, UsageError
from rewriter.formats import peft
from rewriter.program import Program
from tests.models import traced

Tensors = dict[str, torch.Tensor]
P = "base_model.model."
LAYER = P + "model.layers.0.self_attn.q_proj."
CONFIG = {
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


def good() -> Tensors:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in (0, 1):
        for name, width in (("q_proj", 24), ("v_proj", 12)):
            key = f"{P}model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, 24, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(width, 4, generator=generator)
    return tensors


def write(directory: Path, tensors: Tensors | None = None, /, **fields: Any) -> Path:
    directory.mkdir()
    config = {name: value for name, value in {**CONFIG, **fields}.items() if value is not ...}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(good() if tensors is None else tensors, directory / "adapter_model.safetensors")
    return directory


def without(*endings: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: t for key, t in tensors.items() if not key.endswith(endings)}


def with_(**changes: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **changes}


def each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: change(t).contiguous() for key, t in tensors.items()}


def message(directory: Path, error: type[RewriteError], program: Program | None = None, **options: Any) -> str:
    with pytest.raises(error) as caught:
        read_adapter(directory, program or traced("llama"), **options)
    assert type(caught.value) is error
    return str(caught.value).replace(f"{directory}", "DIR")


FIELDS: list[tuple[dict[str, Any], type[RewriteError], str]] = [
    (
        {"peft_type": "lora"},
        RewriteError,
        """DIR/adapter_config.json: peft_type is 'lora'
  supported: LORA, IA3, LOHA, LOKR, VERA, ADALORA, LN_TUNING, TRAINABLE_TOKENS, PREFIX_TUNING, PROMPT_TUNING, P_TUNING
Merge this adapter in PEFT and trace the merged model, or trace the PEFT model itself.""",
    ),
    (
        {"peft_type": "OFT"},
        RewriteError,
        """DIR/adapter_config.json: peft_type is 'OFT'
  supported: LORA, IA3, LOHA, LOKR, VERA, ADALORA, LN_TUNING, TRAINABLE_TOKENS, PREFIX_TUNING, PROMPT_TUNING, P_TUNING
Merge this adapter in PEFT and trace the merged model, or trace the PEFT model itself.""",
    ),
    (
        {"peft_type": ...},
        RewriteError,
        """DIR/adapter_config.json is neither a PEFT nor an AdapterHub configuration
  PEFT has the key peft_type; AdapterHub has config, and model_type or version (adapters.*)
  keys: peft_version, r, lora_alpha, target_modules, task_type
Save the adapter again with `save_pretrained`.""",
    ),
    (
        {"peft_type": ..., "config": {"architecture": "lora"}, "version": "adapters.1.3.0"},
        RewriteError,
        """DIR is an AdapterHub adapter directory
  expected a PEFT adapter directory
Pass it with --adapter (the pass adapterhub), together with its base model.""",
    ),
    (
        {"r": 0, "lora_alpha": "16"},
        RewriteError,
        """DIR/adapter_config.json is not valid
  r: 0, input should be greater than or equal to 1
  lora_alpha: '16', input should be a valid number
Correct these fields.""",
    ),
    (
        {"r": 4.0},
        RewriteError,
        """DIR/adapter_config.json is not valid
  r: 4.0, input should be a valid integer
Correct these fields.""",
    ),
    (
        {"r": True, "rank_pattern": {"q_proj": -1}, "bias": "some"},
        RewriteError,
        """DIR/adapter_config.json is not valid
  r: True, input should be a valid integer
  rank_pattern.q_proj: -1, input should be greater than or equal to 1
  bias: 'some', input should be 'none', 'all' or 'lora_only'
Correct these fields.""",
    ),
    (
        {"use_bdlora": {"nblocks": 2}, "layer_replication": [[0, 2], [1, 2]], "trainable_token_indices": None},
        RewriteError,
        """DIR/adapter_config.json uses what is not supported
  layer_replication: [[0, 2], [1, 2]]
  use_bdlora: {'nblocks': 2}
Merge this adapter in PEFT and trace the merged model.""",
    ),
    (
        {"use_magic": True},
        UsageError,
        """DIR/adapter_config.json has 1 unknown fields
  use_magic: True
  peft_version: 0.21.2; known up to 0.21
Remove them if they mean nothing for this adapter.""",
    ),
    (
        {"init_lora_weights": "pissa_niter_16"},
        RewriteError,
        """DIR/adapter_config.json: init_lora_weights is 'pissa_niter_16'
  it changed the base weights in a way that cannot be repeated from this directory
Save it with `path_initial_model_for_weight_conversion`, which makes it a plain LoRA.""",
    ),
    (
        {"target_modules": None},
        RewriteError,
        """DIR/adapter_config.json: target_modules is missing
Save the adapter again with PEFT.""",
    ),
    (
        {"target_modules": ["q_proj", "v_proj", "v_projj"]},
        UsageError,
        """DIR: target_modules 'v_projj' matches no module
  adapted modules: model.layers.0.self_attn.q_proj, model.layers.0.self_attn.v_proj, \
model.layers.1.self_attn.q_proj, model.layers.1.self_attn.v_proj
Remove it from adapter_config.json, or use the model that has such a module.""",
    ),
    (
        {"alpha_pattern": {"k_proj": 3}},
        UsageError,
        """DIR: alpha_pattern 'k_proj' matches no module
  adapted modules: model.layers.0.self_attn.q_proj, model.layers.0.self_attn.v_proj, \
model.layers.1.self_attn.q_proj, model.layers.1.self_attn.v_proj
Remove it from adapter_config.json, or use the model that has such a module.""",
    ),
    (
        {"target_modules": ["q_proj", "v_proj", "k_proj"]},
        RewriteError,
        """DIR: modules that the configuration targets, but the weights lack: 2
  model.layers.0.self_attn.k_proj
  model.layers.1.self_attn.k_proj
Use the adapter_config.json that belongs to these weights.""",
    ),
    (
        {"target_modules": ["q_proj"]},
        RewriteError,
        """DIR: modules that the weights hold, but the configuration does not target: 2
  model.layers.0.self_attn.v_proj
  model.layers.1.self_attn.v_proj
Use the adapter_config.json that belongs to these weights.""",
    ),
    (
        {"target_modules": "(q_proj"},
        UsageError,
        """'(q_proj' is not a regular expression: missing ), unterminated subpattern at position 0
Quote the pattern, or give names with commas.""",
    ),
    (
        {"rank_pattern": {"q_proj": 3}},
        RewriteError,
        """DIR: tensors of 2 of 4 modules do not have the configured rank
  model.layers.0.self_attn.q_proj: A [4, 24], B [24, 4], configured rank 3
  model.layers.1.self_attn.q_proj: A [4, 24], B [24, 4], configured rank 3
Correct r and rank_pattern in adapter_config.json, or use the weights that belong to it.""",
    ),
    (
        {"use_dora": True},
        RewriteError,
        """DIR/adapter_model.safetensors: model.layers.0.self_attn.q_proj has no lora_magnitude_vector
  adapter_config.json says use_dora: true
Use the configuration that belongs to these weights.""",
    ),
    (
        {"modules_to_save": ["lm_head"]},
        UsageError,
        """DIR: modules_to_save 'lm_head' matches no saved tensor
  saved: none
The adapter is incomplete: save or download it again.""",
    ),
]


@pytest.mark.parametrize(("fields", "error", "expected"), FIELDS, ids=lambda value: str(value)[:40])
def test_a_bad_configuration_is_refused(
    fields: dict[str, Any], error: type[RewriteError], expected: str, tmp_path: Path
) -> None:
    assert message(write(tmp_path / "a", **fields), error) == expected


WEIGHTS: list[tuple[str, Callable[[Tensors], Tensors], type[RewriteError], str]] = [
    (
        "B missing",
        without("0.self_attn.q_proj.lora_B.weight"),
        RewriteError,
        """DIR/adapter_model.safetensors: model.layers.0.self_attn.q_proj has no lora_B
  it has: lora_A
The adapter is incomplete: save or download it again.""",
    ),
    (
        "A only",
        without("lora_B.weight"),
        RewriteError,
        """DIR/adapter_model.safetensors: model.layers.0.self_attn.q_proj has no lora_B
  it has: lora_A
The adapter is incomplete: save or download it again.""",
    ),
    (
        "layers the base lacks",
        lambda t: {**t, **{key.replace("layers.1", "layers.7"): value.clone() for key, value in t.items()}},
        RewriteError,
        """DIR: 2 of 6 modules and tensors have no place in the program
  model.layers.7.self_attn.q_proj
  model.layers.7.self_attn.v_proj
Use the model this adapter was trained on; `rewriter inspect MODEL` lists its layers.""",
    ),
    (
        "a parameter the base lacks",
        with_(**{P + "classifier.weight": torch.ones(2, 24)}),
        RewriteError,
        """DIR: 1 of 5 modules and tensors have no place in the program
  classifier.weight
Use the model this adapter was trained on; `rewriter inspect MODEL` lists its layers.""",
    ),
    (
        "an unknown tensor",
        with_(**{LAYER + "lora_C.weight": torch.ones(2)}),
        RewriteError,
        """DIR/adapter_model.safetensors: model.layers.0.self_attn.q_proj.lora_C.weight is no tensor of LORA
  known endings: lora_A.weight, lora_B.weight, lora_B.bias, lora_embedding_A, lora_embedding_B, lora_magnitude_vector
Save the adapter again with PEFT.""",
    ),
    (
        "transposed",
        each(torch.t),
        RewriteError,
        """DIR: tensors of 4 of 4 modules do not have the configured rank
  model.layers.0.self_attn.q_proj: A [24, 4], B [4, 24], configured rank 4 (stored transposed)
  model.layers.0.self_attn.v_proj: A [24, 4], B [4, 12], configured rank 4 (stored transposed)
  model.layers.1.self_attn.q_proj: A [24, 4], B [4, 24], configured rank 4 (stored transposed)
  model.layers.1.self_attn.v_proj: A [24, 4], B [4, 12], configured rank 4 (stored transposed)
Correct r and rank_pattern in adapter_config.json, or use the weights that belong to it.""",
    ),
    (
        "another size of the base",
        with_(**{LAYER + "lora_A.weight": torch.ones(4, 26)}),
        RewriteError,
        """model.layers.0.self_attn.q_proj: the adapter was made for another size of this layer
  adapter: A [4, 26], B [24, 4]
  program: A [4, 24], B [24, 4]
Use the base model this adapter was trained on.""",
    ),
    (
        "empty",
        with_(**{LAYER + "lora_A.weight": torch.ones(0, 24), LAYER + "lora_B.weight": torch.ones(24, 0)}),
        RewriteError,
        """DIR/adapter_model.safetensors: model.layers.0.self_attn.q_proj has an empty A or B
  A [0, 24], B [24, 0]""",
    ),
    (
        "not finite",
        with_(**{LAYER + "lora_B.weight": torch.full((24, 4), torch.inf)}),
        LawError,
        """DIR/adapter_model.safetensors holds NaN or infinity
  base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight: 96 of 96 values
Train again; or allow it: --allow-nonfinite.""",
    ),
    (
        "integers",
        with_(**{LAYER + "lora_B.weight": torch.ones(24, 4, dtype=torch.int8)}),
        RewriteError,
        """DIR/adapter_model.safetensors: the tensors of an adapter must be floating-point
  base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight: int8
Save it without quantisation.""",
    ),
    (
        "an unexpected bias of B",
        with_(**{LAYER + "lora_B.bias": torch.ones(24)}),
        RewriteError,
        """DIR/adapter_model.safetensors: model.layers.0.self_attn.q_proj has a lora_B_bias
  adapter_config.json says lora_bias: false
Use the configuration that belongs to these weights.""",
    ),
    (
        "a resized vocabulary",
        with_(**{P + "model.embed_tokens.weight": torch.ones(33, 24)}),
        RewriteError,
        """model.embed_tokens.weight has another shape in the adapter
  adapter: [33, 24]
  program: [31, 24]
A resized vocabulary needs the resized base model; else use the base this adapter was trained on.""",
    ),
    (
        "no LoRA",
        lambda _: {P + "lm_head.weight": torch.ones(31, 24)},
        RewriteError,
        """DIR/adapter_model.safetensors holds nothing of LORA at all
  lm_head.weight
Check what saved it.""",
    ),
]


@pytest.mark.parametrize(("change", "error", "expected"), [row[1:] for row in WEIGHTS], ids=[row[0] for row in WEIGHTS])
def test_bad_weights_are_refused(
    change: Callable[[Tensors], Tensors], error: type[RewriteError], expected: str, tmp_path: Path
) -> None:
    assert message(write(tmp_path / "a", change(good())), error) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"[]", "DIR/adapter_config.json holds a list, an object {...} was expected"),
        (b'{"r": 1,}', "DIR/adapter_config.json is not valid JSON"),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', "DIR/adapter_config.json is not valid JSON"),
        (b'{"r": 1, "r": 2}', "DIR/adapter_config.json is not valid JSON"),
        (b'\xef\xbb\xbf{"peft_type": "LORA"}', "DIR/adapter_config.json starts with a byte order mark"),
    ],
)
def test_a_configuration_two_readers_could_read_differently_is_refused(
    data: bytes, expected: str, tmp_path: Path
) -> None:
    directory = write(tmp_path / "a")
    (directory / "adapter_config.json").write_bytes(data)
    assert message(directory, RewriteError).splitlines()[0] == expected


def test_missing_files_are_named(tmp_path: Path) -> None:
    directory = write(tmp_path / "a")
    (directory / "adapter_model.safetensors").rename(directory / "weights")
    assert message(directory, RewriteError) == (
        "DIR has no adapter_model.safetensors\n  it holds: adapter_config.json, weights\nDownload it again."
    )
    shutil.rmtree(directory)
    directory.mkdir()
    assert message(directory, RewriteError).splitlines()[0] == (
        "DIR is a directory without config.json or adapter_config.json"
    )


def test_another_base_is_refused_unless_forced(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", base_model_name_or_path="someone/other-llama")
    base = traced("llama")
    named = Program(base.exported, (), {"huggingface": {"directory": "tiny-llama"}})
    assert message(directory, RewriteError, named) == (
        "DIR was trained on another base model\n  adapter: someone/other-llama\n  program: tiny-llama\n"
        "Use the base it was trained on; if it is the same under another name, add --force-base."
    )
    assert len(read_adapter(directory, named, force_base=True).sites) == 4


def test_a_saved_module_needs_all_its_weights(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    keys = {f"{P}encoder.layer.{n}.attention.self.query": 24 for n in (0, 1)}
    tensors = {f"{k}.lora_A.weight": torch.randn(4, w, generator=generator) for k, w in keys.items()}
    tensors |= {f"{k}.lora_B.weight": torch.randn(w, 4, generator=generator) for k, w in keys.items()}
    tensors[f"{P}pooler.dense.bias"] = torch.ones(24)
    directory = write(tmp_path / "a", tensors, target_modules=["query"], modules_to_save=["pooler"])
    assert message(directory, RewriteError, traced("bert")) == (
        "DIR: modules_to_save without their weights\n  pooler.dense.weight\n"
        "The adapter is incomplete: save or download it again."
    )


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix(P),
        lambda key: P + key,
        lambda key: "_orig_mod." + key,
        lambda key: "module." + key,
        lambda key: "_fsdp_wrapped_module." + key.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
        lambda key: key.replace(".weight", ".default.weight"),
    ],
)
def test_known_other_spellings_of_keys_are_read_and_reported(rename: Callable[[str], str], tmp_path: Path) -> None:
    tensors = good()
    plain = read_adapter(write(tmp_path / "plain"), traced("llama"))
    odd = write(tmp_path / "odd", {rename(key): tensor for key, tensor in tensors.items()})
    with pytest.warns(RewriteWarning, match="keys are not as PEFT writes them"):
        read = read_adapter(odd, traced("llama"))
    assert read.pass_ == plain.pass_
    assert [site.path for site in read.sites] == [site.path for site in plain.sites]


def test_fields_of_a_newer_peft_are_reported_or_refused_when_strict(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", peft_version="0.30.0", use_magic=True)
    with pytest.warns(RewriteWarning, match="unknown fields are ignored: use_magic: True"):
        read_adapter(directory, traced("llama"))
    assert message(directory, UsageError, strict=True).startswith("DIR/adapter_config.json has 1 unknown fields")


def test_an_adapter_without_effect_is_reported(tmp_path: Path) -> None:
    zeros = {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in good().items()}
    with pytest.warns(RewriteWarning, match="every B is zero, the adapter has no effect"):
        read_adapter(write(tmp_path / "a", zeros), traced("llama"))
    with pytest.warns(RewriteWarning, match="alpha is 0: the adapter has no effect"):
        read_adapter(write(tmp_path / "b", lora_alpha=0), traced("llama"))


def test_a_legacy_file_is_read_and_one_with_code_is_not(tmp_path: Path) -> None:
    directory = write(tmp_path / "a")
    tensors = load_file(directory / "adapter_model.safetensors")
    (directory / "adapter_model.safetensors").unlink()
    torch.save(tensors, directory / "adapter_model.bin")
    read = peft.read(directory)
    assert torch.equal(read.modules["model.layers.0.self_attn.q_proj"]["lora_A"], tensors[LAYER + "lora_A.weight"])
    torch.save({"a": torch.nn.Linear(2, 3)}, directory / "adapter_model.bin")
    assert "executes code" in message(directory, UnsafeError)


def test_half_precision_is_taken_in_the_type_of_the_program(tmp_path: Path) -> None:
    half = {key: t.to(torch.float16 if "lora_A" in key else torch.bfloat16) for key, t in good().items()}
    program = read_adapter(write(tmp_path / "a", half), traced("llama")).apply(traced("llama")).program
    name = "model.layers.0.self_attn.q_proj.lora_A.default"
    assert program.tensor(name).dtype == torch.float32
    assert torch.equal(program.tensor(name), half[LAYER + "lora_A.weight"].float())


def test_not_finite_is_taken_when_allowed(tmp_path: Path) -> None:
    tensors = {**good(), LAYER + "lora_B.weight": torch.full((24, 4), torch.nan)}
    read = read_adapter(write(tmp_path / "a", tensors), traced("llama"), allow_nonfinite=True)
    program = read.apply(traced("llama"), check=False).program
    assert program.tensor("model.layers.0.self_attn.q_proj.lora_B.default").isnan().all()


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        peft.write(tmp_path / "a", {"lora_alpha": float("nan")}, good(), overwrite=False)
    assert list(tmp_path.iterdir()) == []
    written = peft.write(tmp_path / "a", CONFIG, good(), overwrite=False)
    with pytest.raises(RewriteError, match="already exists"):
        peft.write(written, CONFIG, good(), overwrite=False)
    text = (written / "adapter_config.json").read_text()
    assert text == json.dumps(CONFIG, indent=2, sort_keys=True) + "\n"
    assert all(torch.equal(t, good()[key]) for key, t in load_file(written / "adapter_model.safetensors").items())
