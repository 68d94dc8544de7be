"""Directories of the `adapters` library that must not be taken for good, and unusual ones that are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rewriter
from passes import AdapterHubAdapter, PeftAdapter
from rewriter import verify
from rewriter.errors import LawError, RewriteError, RewriteWarning, UnsafeError, UsageError
from rewriter.formats.adapterhub_config import NAMED, Bottleneck, read_config
from rewriter.program import Program
from tests import models
from tools.adapterhub_fixture import FOLDER, given, traced

Tensors = dict[str, torch.Tensor]
LAYER = "encoder.layer.0.output.adapters.mine."


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of what the library saved for BERT, one adapter in each of two blocks."""
    return Path(shutil.copytree(FOLDER / "bert_seq_bn", tmp_path / "a"))


def change(directory: Path, **fields: Any) -> Path:
    """Set fields of the configuration, `...` removes one; those of the adapter are under `config`."""
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    inner = fields.pop("config", {})
    if isinstance(inner, dict):
        config["config"] = _without({**config["config"], **inner})
    else:
        config["config"] = inner
    path.write_text(json.dumps(_without({**config, **fields})))
    return directory


def _without(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not ...}


def reweigh(directory: Path, function: Callable[[Tensors], Tensors]) -> Path:
    path = directory / "pytorch_adapter.bin"
    torch.save(function(torch.load(path, weights_only=True)), path)
    return directory


def message(directory: Path, error: type[RewriteError], program: Program | None = None, **options: Any) -> str:
    with pytest.raises(error) as raised:
        AdapterHubAdapter(directory, **options).find(program or traced("bert"))
    assert type(raised.value) is error
    return str(raised.value).replace(str(directory), "DIR")


def output(directory: Path, **options: Any) -> torch.Tensor:
    pass_ = AdapterHubAdapter(directory, **options)
    program = rewriter.apply(traced("bert"), pass_, check=False).program
    return verify.outputs(program(**given("bert")))[0]


CONFIGS: list[tuple[dict[str, Any], type[RewriteError], str]] = [
    ({"config": {"architecture": "lora"}}, RewriteError, "architecture is 'lora'"),
    ({"config": {"architecture": "prefix_tuning"}}, RewriteError, "architecture is 'prefix_tuning'"),
    ({"config": {"architecture": "union", "configs": []}}, RewriteError, "architecture is 'union'"),
    ({"config": {"architecture": ["lora"]}}, RewriteError, r"architecture is \['lora'\]"),
    ({"config": "lora"}, RewriteError, "config is 'lora', no bottleneck configuration"),
    ({"config": "9076f36a74755ac4"}, RewriteError, "a hash, which names no options"),
    ({"config": None}, RewriteError, "config: None, should be a valid dictionary, or should be a valid string"),
    ({"config": 7}, RewriteError, "config: 7"),
    ({"name": ...}, RewriteError, "name: missing"),
    ({"name": ""}, RewriteError, "name: ''"),
    ({"hidden_size": "24"}, RewriteError, "hidden_size: '24'"),
    ({"config": {"mh_adapter": ...}}, RewriteError, "mh_adapter: missing"),
    ({"config": {"output_adapter": "yes"}}, RewriteError, "output_adapter: 'yes'"),
    ({"config": {"reduction_factor": "16"}}, RewriteError, "reduction_factor"),
    ({"config": {"reduction_factor": True}}, RewriteError, "reduction_factor"),
    ({"config": {"reduction_factor": 0}}, UsageError, "reduction is 0"),
    ({"config": {"reduction_factor": -4}}, UsageError, "reduction is -4"),
    ({"config": {"reduction_factor": {"1": 8, "default": 16}}}, UsageError, "reduction_factor"),
    ({"config": {"scaling": "big"}}, RewriteError, "scaling"),
    ({"config": {"dropout": 1.5}}, RewriteError, "dropout: 1.5"),
    ({"config": {"leave_out": "0"}}, RewriteError, "leave_out: '0'"),
    ({"config": {"leave_out": [0, 1]}}, UsageError, "leave_out leaves no block"),
    ({"config": {"leave_out": [1]}}, RewriteError, "no place: encoder.layer.1.output"),
    ({"config": {"non_linearity": "leakyrelu"}}, UsageError, "non_linearity leakyrelu"),
    ({"config": {"phm_layer": True}}, UsageError, "phm_layer True"),
    ({"config": {"use_gating": True}}, UsageError, "use_gating True"),
    ({"config": {"inv_adapter": "nice"}}, UsageError, "inv_adapter nice"),
    ({"config": {"mh_adapter": True}}, RewriteError, "no tensors: encoder.layer.0.attention.output.dense"),
    ({"config": {"mh_adapter": True, "output_adapter": False}}, RewriteError, "no place: encoder.layer.0.output"),
    ({"config": {"ln_before": True}}, RewriteError, "no adapter_down.1.bias"),
    ({"config": {"scaling": "learned"}}, RewriteError, "no scaling"),
    ({"name": "yours"}, RewriteError, "are not of a bottleneck adapter 'yours'"),
    ({"hidden_size": 32}, RewriteError, "another size of model"),
    ({"model_type": "roberta"}, RewriteError, "was trained on another model type"),
    ({"peft_type": "LORA"}, RewriteError, "is a PEFT adapter directory"),
]


@pytest.mark.parametrize(("fields", "error", "said"), CONFIGS, ids=lambda value: str(value)[:60])
def test_a_bad_configuration_is_refused(
    fields: dict[str, Any], error: type[RewriteError], said: str, directory: Path
) -> None:
    with pytest.raises(error, match=said) as raised:
        AdapterHubAdapter(change(directory, **fields)).find(traced("bert"))
    assert type(raised.value) is error


def without(ending: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {key: tensor for key, tensor in held.items() if not key.endswith(ending)}


WEIGHTS: dict[str, tuple[Callable[[Tensors], Tensors], type[RewriteError], str]] = {
    "a tensor is missing": (
        without("layer.1.output.adapters.mine.adapter_up.bias"),
        RewriteError,
        """DIR: the tensors are not those of its configuration
  encoder.layer.1.output: no adapter_up.bias
Use the adapter_config.json that belongs to these weights.""",
    ),
    "a tensor is too many": (
        lambda held: {**held, LAYER + "gate.weight": torch.ones(1, 24)},
        RewriteError,
        """DIR: the tensors are not those of its configuration
  encoder.layer.0.output: unexpected gate.weight
Use the adapter_config.json that belongs to these weights.""",
    ),
    "a block is missing": (
        lambda held: {key: tensor for key, tensor in held.items() if ".1." not in key},
        RewriteError,
        """0 of 1 adapters have no place in the program, 1 of 2 places no tensors
  no tensors: encoder.layer.1.output.dense
Use the model this adapter was trained on; `rewriter inspect MODEL` lists its layers.""",
    ),
    "a block too many": (
        lambda held: {**held, **{key.replace("layer.1", "layer.7"): tensor for key, tensor in held.items()}},
        RewriteError,
        """1 of 3 adapters have no place in the program, 0 of 2 places no tensors
  no place: encoder.layer.7.output
Use the model this adapter was trained on; `rewriter inspect MODEL` lists its layers.""",
    ),
    "a tensor of another method": (
        lambda held: {**held, "encoder.layer.0.attention.self.query.loras.mine.lora_A": torch.ones(4, 24)},
        RewriteError,
        """DIR/pytorch_adapter.bin: 1 of 9 tensors are not of a bottleneck adapter 'mine'
  encoder.layer.0.attention.self.query.loras.mine.lora_A
Use the adapter_config.json that belongs to these weights.""",
    ),
    "integers": (
        lambda held: {**held, LAYER + "adapter_up.bias": torch.ones(24, dtype=torch.int8)},
        RewriteError,
        """DIR/pytorch_adapter.bin: the tensors of an adapter must be floating-point
  encoder.layer.0.output.adapters.mine.adapter_up.bias: int8
Save it without quantisation.""",
    ),
    "not finite": (
        lambda held: {**held, LAYER + "adapter_up.bias": torch.full((24,), torch.nan)},
        LawError,
        """DIR/pytorch_adapter.bin holds NaN or infinity
  encoder.layer.0.output.adapters.mine.adapter_up.bias: 24 of 24 values
Train again; or allow it: --allow-nonfinite.""",
    ),
}


@pytest.mark.parametrize(("function", "error", "expected"), WEIGHTS.values(), ids=list(WEIGHTS))
def test_bad_weights_are_refused(
    function: Callable[[Tensors], Tensors], error: type[RewriteError], expected: str, directory: Path
) -> None:
    assert message(reweigh(directory, function), error) == expected


def test_a_tensor_of_another_size_is_refused(directory: Path) -> None:
    reweigh(directory, lambda held: {**held, LAYER + "adapter_down.0.weight": torch.ones(5, 24)})
    with pytest.raises(RewriteError, match="has another shape in the adapter") as raised:
        rewriter.apply(traced("bert"), AdapterHubAdapter(directory))
    assert "adapter: [5, 24]" in str(raised.value)
    assert "program: [6, 24]" in str(raised.value)


def test_a_norm_that_was_saved_twice_and_differs_is_refused(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FOLDER / "roberta_seq_bn", tmp_path / "a"))
    reweigh(directory, lambda held: {**held, LAYER + "adapter_norm_before.bias": torch.ones(24)})
    found = message(directory, RewriteError, traced("roberta"))
    assert "adapter_norm_before.bias is not adapter_down.0.bias, and both are norm_before.bias" in found


def test_nan_can_be_allowed(directory: Path) -> None:
    reweigh(directory, lambda held: {**held, LAYER + "adapter_up.bias": torch.full((24,), torch.nan)})
    assert output(directory, allow_nonfinite=True).isnan().any()


def test_an_adapter_without_effect_is_reported(directory: Path) -> None:
    silent = {"weight": torch.zeros(24, 6), "bias": torch.zeros(24)}
    reweigh(
        directory,
        lambda held: {k: silent[k.rpartition(".")[2]] if "adapter_up" in k else t for k, t in held.items()},
    )
    with pytest.warns(RewriteWarning, match="every W_up is zero, the adapter has no effect"):
        AdapterHubAdapter(directory).find(traced("bert"))


def test_another_model_is_refused_unless_it_is_the_same_under_another_name(directory: Path) -> None:
    assert message(directory, RewriteError, traced("gpt2")) == (
        "DIR was trained on another model type\n  adapter: bert\n  program: gpt2\n"
        "Use the base it was trained on; if it is the same under another name, add --force-base."
    )
    assert "no place: encoder.layer.0.output" in message(directory, RewriteError, traced("gpt2"), force_base=True)
    change(directory, model_name="someone/bert-large")
    base = traced("bert")
    named = Program(base.exported, (), {"huggingface": {**base.metadata["huggingface"], "directory": "bert-base"}})
    assert "adapter: bert-large\n  program: bert-base" in message(directory, RewriteError, named)
    AdapterHubAdapter(directory, force_base=True).find(named)
    AdapterHubAdapter(directory).find(base)  # which does not say what it was loaded from
    with pytest.raises(UsageError, match="no sublayer"):
        AdapterHubAdapter(directory).find(models.traced("conv"))


# -- files -------------------------------------------------------------------------------------------------------------


def test_each_kind_of_adapter_directory_is_told_from_the_other(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match="is an AdapterHub adapter directory") as raised:
        PeftAdapter(directory)
    assert "the pass adapterhub" in str(raised.value)
    other = tmp_path / "peft"
    other.mkdir()
    (other / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert message(other, RewriteError).splitlines()[:2] == [
        "DIR is a PEFT adapter directory",
        "  expected an AdapterHub adapter directory",
    ]


def test_missing_and_foreign_files_are_named(directory: Path, tmp_path: Path) -> None:
    assert "DIR does not exist" in message(tmp_path / "b", RewriteError)
    (directory / "pytorch_adapter.bin").unlink()
    assert message(directory, RewriteError) == (
        "DIR has no pytorch_adapter.bin and no adapter.safetensors\n  it holds: adapter_config.json\nDownload it again."
    )
    (directory / "adapter_config.json").rename(directory / "adapter_fusion_config.json")
    assert "holds a composition of adapters, no single one" in message(directory, RewriteError)
    with pytest.raises(UsageError, match="no adapter directory given"):
        AdapterHubAdapter().find(traced("bert"))
    with pytest.raises(UsageError, match="A name without dots"):
        AdapterHubAdapter(adapter="a.b")


def test_a_pickle_that_executes_code_is_refused(directory: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"a": Evil()}, directory / "pytorch_adapter.bin")
    assert "executes code" in message(directory, UnsafeError)
    assert not (tmp_path / "executed").exists()


def test_safetensors_beside_the_pickle_must_hold_the_same(directory: Path) -> None:
    expected = output(directory)
    held = torch.load(directory / "pytorch_adapter.bin", weights_only=True)
    save_file(held, directory / "adapter.safetensors")
    assert torch.equal(output(directory), expected)
    save_file({**held, LAYER + "adapter_up.bias": torch.ones(24)}, directory / "adapter.safetensors")
    assert message(directory, RewriteError) == (
        "DIR holds two different adapters, in adapter.safetensors and pytorch_adapter.bin\n"
        f"  {LAYER}adapter_up.bias\nRemove the one that is not meant."
    )


def test_a_prediction_head_and_unknown_options_are_reported(directory: Path) -> None:
    expected = output(directory)
    (directory / "head_config.json").write_text("{}")
    change(directory, config={"use_magic": 1}, version="adapters.9.0.0")
    with pytest.warns(RewriteWarning) as caught:
        assert torch.equal(output(directory), expected)
    said = " ".join(str(each.message) for each in caught)
    assert "the prediction head beside the adapter is not read" in said
    assert "written by adapters.9.0.0; unknown options are ignored: use_magic" in said


# -- older ones --------------------------------------------------------------------------------------------------------


def test_keys_and_options_of_before_are_understood(directory: Path) -> None:
    expected = output(directory)
    reweigh(directory, lambda held: {k.replace(".adapters.", ".layer_text_task_adapters."): t for k, t in held.items()})
    old = {"invertible_adapter": {"block_type": "nice", "reduction_factor": 2}, "inv_adapter": ...}
    change(directory, type="text_task", version=..., config=old)
    assert torch.equal(output(directory), expected)
    change(directory, version="3.2.1")
    assert torch.equal(output(directory), expected)


def test_gelu_of_before_versions_is_the_approximation(directory: Path) -> None:
    change(directory, config={"non_linearity": "gelu"}, version=...)
    assert "non_linearity gelu_new" in message(directory, UsageError)


SAVED = {
    **dict.fromkeys(("seq_bn", "pfeiffer"), "gpt2_seq_bn_safe"),
    **dict.fromkeys(("double_seq_bn", "houlsby"), "gpt2_double_seq_bn"),
    **dict.fromkeys(("par_bn", "parallel"), "gpt2_par_bn"),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_name_means_the_options_that_the_library_saves(name: str) -> None:
    named = Bottleneck(**NAMED[name]).model_dump()
    assert named == {**read_config(FOLDER / SAVED[name]).options, "reduction_factor": named["reduction_factor"]}


def test_a_configuration_may_be_a_name(directory: Path) -> None:
    def narrow(held: Tensors) -> Tensors:
        cut: dict[str, tuple[slice, ...]] = {
            "adapter_down.0.weight": (slice(1),),
            "adapter_down.0.bias": (slice(1),),
            "adapter_up.weight": (slice(None), slice(1)),
        }
        return {k: t[cut.get(k.partition(".mine.")[2], ())].clone() for k, t in held.items()}

    expected = output(change(reweigh(directory, narrow), config={"reduction_factor": 16}))
    assert torch.equal(output(change(directory, config="pfeiffer")), expected)
