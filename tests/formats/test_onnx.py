"""ONNX export: names, metadata, numbers in ONNX Runtime, and what is left behind when it fails; strict reading."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.errors import LawError, RewriteError, UsageError
from rewriter.formats.fingerprint import fingerprint
from rewriter.formats.onnx import OnnxReport, export_onnx, read_onnx
from rewriter.program import Program, Step
from rewriter.trace import trace
from tests.models import Perceptron, randomise, traced

MODELS = ["llama", "llama_tied", "gpt2", "bert", "t5", "vit", "mlp"]
MACHINE = re.compile(rb"/(?:home|root|tmp|usr|opt|work|Users)/|site-packages|\.py\b(?!torch)|[A-Z]:\\\\")


@functools.cache
def exported(name: str) -> tuple[bytes, OnnxReport]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        report = export_onnx(traced(name), path)
        assert [entry.name for entry in Path(directory).iterdir()] == ["model.onnx"]
        return path.read_bytes(), report


def session(source: bytes | str) -> Any:
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", MODELS)
def test_the_report_says_how_it_ran(name: str) -> None:
    content, report = exported(name)
    assert report.provider == "CPUExecutionProvider"
    assert report.size_bytes == len(content)
    assert len(report.errors) == 2
    assert report.errors[0].shapes != report.errors[1].shapes
    assert 0 <= report.max_abs_error < 1e-4
    assert json.loads(json.dumps(report.to_json()))["opset"] == report.opset


def feeds(name: str, batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, 31, (batch, length), generator=generator)
    mask = (torch.arange(length) >= torch.arange(batch)[:, None] % 3).long()  # padding on the left
    match name:
        case "vit":
            return {"pixel_values": torch.randn(batch, 5, 18, 18, generator=generator)}
        case "mlp":
            return {"x": torch.randn(batch, length, 10, generator=generator)}
        case "bert":
            return {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
        case "t5":
            return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, : length - 3]}
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
def test_it_runs_at_other_batches_and_lengths(name: str) -> None:
    content, report = exported(name)
    model = session(content)
    for batch, length in ((2, 11), (6, 5)):
        given = feeds(name, batch, length)
        assert list(given) == list(report.inputs)
        constants = {"use_cache": False} if "input_ids" in given and name != "bert" else {}
        expected = traced(name)(*given.values()) if name == "mlp" else traced(name)(**given, **constants)
        expected = [expected] if isinstance(expected, Tensor) else list(expected.values())
        found = model.run(list(report.outputs), {key: value.numpy() for key, value in given.items()})
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        (
            "llama",
            {"input_ids": "int64[batch, length]", "attention_mask": "int64[batch, length]"},
            {"logits": "float32[batch, length, 31]"},
        ),
        (
            "t5",
            {
                "input_ids": "int64[batch, length]",
                "attention_mask": "int64[batch, length]",
                "decoder_input_ids": "int64[batch, decoder_length]",
            },
            {
                "logits": "float32[batch, decoder_length, 37]",
                "encoder_last_hidden_state": "float32[batch, length, 24]",
            },
        ),
        ("vit", {"pixel_values": "float32[batch, 5, 18, 18]"}, {"logits": "float32[batch, 7]"}),
        ("mlp", {"x": "float32[batch, length, 10]"}, {"output_0": "float32[batch, length, 7]"}),
    ],
)
def test_inputs_outputs_and_sizes_have_readable_names(
    name: str, inputs: dict[str, str], outputs: dict[str, str]
) -> None:
    report = exported(name)[1]
    assert report.inputs == inputs
    assert report.outputs == outputs


def test_output_fields_of_bert() -> None:
    assert list(exported("bert")[1].outputs) == ["last_hidden_state", "pooler_output"]


@pytest.mark.parametrize("name", MODELS)
def test_initializers_are_the_checkpoints_tensors(name: str) -> None:
    program = traced(name)
    model = onnx.load_from_string(exported(name)[0])
    onnx.checker.check_model(model)
    written = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    doubles = {double for group in program.tied() for double in group[1:]}
    assert set(program.parameters()) - doubles <= set(written) <= set(program.tensors) - doubles
    for key, value in written.items():
        np.testing.assert_array_equal(value, program.tensor(key).detach().numpy())


def test_a_tied_weight_is_written_once_under_the_name_checkpoints_give_it() -> None:
    names = [tensor.name for tensor in onnx.load_from_string(exported("llama_tied")[0]).graph.initializer]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_this_machine_is_in_the_file(name: str) -> None:
    found = MACHINE.findall(exported(name)[0].replace(b"transformers.pytorch_utils", b""))
    assert found == []


def test_nodes_know_their_modules() -> None:
    model = onnx.load_from_string(exported("llama")[0])
    scopes = [
        prop.value
        for node in model.graph.node
        for prop in node.metadata_props
        if prop.key == "pkg.torch.onnx.name_scopes"
    ]
    assert any("model.layers.1.self_attn.v_proj" in scope for scope in scopes)


def test_metadata_holds_recipe_and_hashes(tmp_path: Path) -> None:
    base = traced("mlp")
    step = Step(1, "lora", {"rank": 4, "file": tmp_path / "adapter", "more": (1, None)}, added=("up.weight",))
    export_onnx(Program(base.clone().exported, (step,)), tmp_path / "a.onnx")
    model = read_onnx(tmp_path / "a.onnx")
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    assert metadata["rewriter.version"] == rewriter.__version__
    assert json.loads(metadata["rewriter.recipe"]) == [
        {"name": "lora", "options": {"rank": 4, "file": "adapter", "more": [1, None]}}
    ]
    assert json.loads(metadata["rewriter.adapters"]) == [{"step": 1, "name": "lora", "parameters": ["up.weight"]}]
    assert len(metadata["rewriter.recipe_sha256"]) == 64
    assert metadata["rewriter.base_sha256"] == fingerprint(base.parameters())


def test_branches_keep_the_names_of_their_weights(tmp_path: Path) -> None:
    import passes

    lora = passes.Lora(targets=("q_proj", "v_proj"), rank=3, alpha=5, init="both", sigma=0.3, dropout=0.25)
    program = rewriter.apply(traced("llama"), lora).program
    export_onnx(program, tmp_path / "model.onnx")
    model = read_onnx(tmp_path / "model.onnx")
    added = set(program.parameters()) - set(traced("llama").parameters())
    assert len(added) == 8
    assert set(program.parameters()) <= {tensor.name for tensor in model.graph.initializer}
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    assert set(json.loads(metadata["rewriter.adapters"])[0]["parameters"]) == added
    given = feeds("llama", 4, 9)
    found = session(str(tmp_path / "model.onnx")).run(None, {key: value.numpy() for key, value in given.items()})[0]
    base = traced("llama")(**given, use_cache=False).logits.numpy()
    assert np.abs(found - base).max() > 0.1
    np.testing.assert_allclose(found, program(**given, use_cache=False).logits.numpy(), atol=1e-4)


def test_it_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(traced("mlp"), tmp_path / "quiet.onnx")
    assert capfd.readouterr() == ("", "")


# -- external data --------------------------------------------------------------------------------------------------


def test_external_data_lies_beside_the_model(tmp_path: Path) -> None:
    report = export_onnx(traced("gpt2"), tmp_path / "model.onnx", external_data=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert report.size_bytes == sum(entry.stat().st_size for entry in tmp_path.iterdir())
    model = read_onnx(tmp_path / "model.onnx")
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert "transformer.h.0.attn.c_attn.weight" in [tensor.name for tensor in outside]
    given = {key: value.numpy() for key, value in feeds("gpt2", 4, 9).items()}
    moved = session(str((tmp_path / "model.onnx").rename(tmp_path / "renamed.onnx"))).run(None, given)
    np.testing.assert_allclose(moved[0], session(exported("gpt2")[0]).run(None, given)[0], atol=1e-5)


def test_external_data_without_a_large_tensor(tmp_path: Path) -> None:
    program = trace(randomise(nn.Linear(3, 4)), (torch.randn(2, 3),))
    export_onnx(program, tmp_path / "small.onnx", external_data=True)
    read_onnx(tmp_path / "small.onnx")


# -- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("external", [False, True])
def test_a_model_outside_the_tolerance_is_not_left_behind(tmp_path: Path, external: bool) -> None:
    with pytest.raises(LawError, match="largest difference") as caught:
        export_onnx(traced("mlp"), tmp_path / "model.onnx", tolerance=1e-12, external_data=external)
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(RewriteError, match="already exists"):
        export_onnx(traced("mlp"), path)
    with pytest.raises(LawError):
        export_onnx(traced("mlp"), path, overwrite=True, tolerance=1e-12)
    assert path.read_bytes() == b"mine"
    export_onnx(traced("mlp"), path, overwrite=True)
    read_onnx(path)


def test_without_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RewriteError, match=r"pip install 'rewriter\[cpu\]'"):
        export_onnx(traced("mlp"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"opset": 3}, {"trials": 0}])
def test_options_that_cannot_be_meant(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        export_onnx(traced("mlp"), tmp_path / "model.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_another_opset(tmp_path: Path) -> None:
    assert export_onnx(traced("mlp"), tmp_path / "model.onnx", opset=18).opset == 18


def test_an_operation_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewriteError) as caught:
        export_onnx(traced("mixtral"), tmp_path / "model.onnx")
    assert "grouped_mm" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def traced_in_training(module: nn.Module, example: Tensor) -> Program:
    return Program.adopt(torch.export.export(module.train(), (example,)))


def test_dropout_of_a_training_trace_is_switched_off(tmp_path: Path) -> None:
    example = torch.randn(3, 5, 10)
    program = traced_in_training(randomise(Perceptron()), example)
    export_onnx(program, tmp_path / "model.onnx")
    model = session(str(tmp_path / "model.onnx"))
    expected = randomise(Perceptron())(example).detach()
    np.testing.assert_allclose(model.run(None, {"x": example.numpy()})[0], expected, atol=1e-5)


def test_batch_statistics_of_a_training_trace_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match=r"buffer|training"):
        export_onnx(traced_in_training(nn.BatchNorm1d(5), torch.randn(3, 5)), tmp_path / "model.onnx")


def test_names_that_collide_are_told_apart(tmp_path: Path) -> None:
    class Echo(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"x": x + 1, "twice": [x * 2, x * 2], "same": x}

    report = export_onnx(trace(Echo(), (torch.randn(2, 3),)), tmp_path / "model.onnx")
    assert list(report.outputs) == ["output_x", "twice.0", "twice.1", "same"]


# -- reading --------------------------------------------------------------------------------------------------------


def with_location(location: str, **entries: int) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.external_data)
        values = {entry.key: entry.value for entry in tensor.external_data}
        values |= {"location": location or values["location"], **{key: str(n) for key, n in entries.items()}}
        del tensor.external_data[:]
        for key, value in values.items():
            tensor.external_data.add(key=key, value=value)
        path.write_bytes(model.SerializeToString())

    return spoil


def shorten(name: str, left: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path.parent / name, left)


def hard_link(path: Path) -> None:
    os.link(path.parent / "model.onnx.data", path.parent / "second")


def symbolic_link(path: Path) -> None:
    (path.parent / "model.onnx.data").rename(path.parent / "second")
    (path.parent / "model.onnx.data").symlink_to("second")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "garbage": (lambda path: path.write_bytes(b"\xff\x00garbage" * 9), "not an ONNX"),
    "html": (lambda path: path.write_text("<!DOCTYPE html><title>Sign in</title>"), "not an ONNX"),
    "cut off": (shorten("model.onnx", 700), "not an ONNX|cut off"),
    "no graph": (lambda path: path.write_bytes(onnx.ModelProto(ir_version=10).SerializeToString()), "no graph"),
    "no version": (
        lambda path: path.write_bytes(onnx.ModelProto(graph=onnx.load(path).graph).SerializeToString()),
        "not an ONNX model",
    ),
    "missing file": (lambda path: path.unlink(), "does not exist"),
    "missing data": (lambda path: (path.parent / "model.onnx.data").unlink(), "model.onnx.data.*does not exist"),
    "data cut off": (shorten("model.onnx.data", 9), "not all in 'model.onnx.data'"),
    "parent": (with_location("../model.onnx.data"), "outside"),
    "hidden parent": (with_location("a/../../model.onnx.data"), "outside"),
    "absolute": (with_location("/etc/hostname"), "outside"),
    "drive": (with_location("C:\\data"), "outside"),
    "hard link": (hard_link, "is a link"),
    "symbolic link": (symbolic_link, "is a link"),
    "negative offset": (with_location("", offset=-4), "not all in"),
    "petabyte": (with_location("", length=10**15), "not all in"),
    "too few bytes": (with_location("", length=4), "not all in"),
    "directory": (with_location("."), "link or no plain file"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("pair")
    program = trace(randomise(nn.Linear(29, 23)), (torch.randn(2, 29),))
    export_onnx(program, directory / "model.onnx", external_data=True)
    return {entry.name: entry.read_bytes() for entry in directory.iterdir()}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused(case: str, tmp_path: Path, pair: dict[str, bytes]) -> None:
    for name, content in pair.items():
        (tmp_path / name).write_bytes(content)
    read_onnx(tmp_path / "model.onnx")
    spoil, message = BAD[case]
    spoil(tmp_path / "model.onnx")
    with pytest.raises(RewriteError, match=message) as caught:
        read_onnx(tmp_path / "model.onnx")
    if "data" in message or message in ("outside", "is a link", "not all in"):
        assert "'weight'" in str(caught.value)
