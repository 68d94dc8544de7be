"""Bottleneck adapters of the `adapters` library: read with its outputs, written for it to load.

`tools/adapterhub_fixture.py` recorded the library's directories and outputs, and that it loads what is written here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import rewriter
from passes import Adapter, AdapterHubAdapter, Lora
from passes.adapter_place import Sublayer
from passes.adapterhub_place import match, spot
from passes.adapterhub_write import write_adapterhub
from rewriter import verify
from rewriter.cli import main
from rewriter.errors import RewriteError, UsageError
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from tests import models
from tests.oracle import trained
from tools.adapterhub_fixture import CASES, FOLDER, OURS, OUTPUTS, RECORD, fingerprint, given, traced, written

EXPECTED = load_file(OUTPUTS)
RECORDED: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
pytestmark = pytest.mark.filterwarnings("ignore:.*prediction head")


def first(program: Program, kind: str) -> torch.Tensor:
    return verify.outputs(program(**given(kind)))[0]


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def adapted(case: str = "bert_double_seq_bn", **options: Any) -> Program:
    kind, head, *_ = CASES[case]
    return rewriter.apply(traced(kind, head), AdapterHubAdapter(FOLDER / case, **options)).program


def test_the_record_is_of_these_cases() -> None:
    assert RECORDED["versions"]["adapters"] == "1.3.0"
    assert {*RECORDED["written"]} == {*CASES, *OURS}
    assert all(each["max_abs_error"] < 1e-5 for each in RECORDED["written"].values())


@pytest.mark.parametrize("case", CASES)
def test_a_directory_of_the_library_means_the_same_here(case: str, tmp_path: Path) -> None:
    kind, head, *_ = CASES[case]
    base = traced(kind, head)
    assert error(first(base, kind), EXPECTED[f"{case}/base"]) < 1e-5
    directory, program = written(case, tmp_path)
    found = first(program, kind)
    assert error(found, EXPECTED[f"{case}/output"]) < 1e-5
    assert error(found, EXPECTED[f"{case}/base"]) > 1e-2
    assert fingerprint(directory) == RECORDED["written"][case]["sha256"]
    again = rewriter.apply(base, AdapterHubAdapter(directory, force_base=True), check=False).program
    assert torch.equal(first(again, kind), found)
    assert rewriter.text(rewriter.undo(program)) == rewriter.text(base)


@pytest.mark.parametrize("case", OURS)
def test_a_directory_written_here_is_the_one_the_library_loaded(case: str, tmp_path: Path) -> None:
    kind, options = OURS[case]
    directory, program = written(case, tmp_path)
    found = first(program, kind)
    assert error(found, first(traced(kind), kind)) > 1e-2
    assert fingerprint(directory) == RECORDED["written"][case]["sha256"]
    again = rewriter.apply(traced(kind), AdapterHubAdapter(directory, force_base=True), check=False).program
    assert error(first(again, kind), found) < 1e-6
    if options.get("bias", True):
        assert {*again.trainable} == {*program.trainable}
        assert all(torch.equal(again.tensor(name), program.tensor(name)) for name in program.trainable)


@pytest.mark.parametrize(("size", "factor"), [(1, 24), (5, 4.8), (7, 24 / 7), (11, 24 / 11), (24, 1), (36, 2 / 3)])
def test_any_bottleneck_is_a_factor_that_the_library_rounds_to_it(size: int, factor: float, tmp_path: Path) -> None:
    program = rewriter.apply(traced("bert"), Adapter(bottleneck=size)).program
    write_adapterhub(program, tmp_path / "a")
    found = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["config"]["reduction_factor"]
    assert found == pytest.approx(factor)
    assert int(24 // found) == size


# -- as a step of a program --------------------------------------------------------------------------------------------


def test_only_the_adapter_trains(tmp_path: Path) -> None:
    program = adapted()
    module = program.module()
    verify.outputs(module(**given("bert")))[0].sum().backward()
    reached = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert reached == {*program.trainable}
    assert len(reached) == 4 * 4
    assert all(f".adapter.default.{kind}." in name for name in reached for kind in ["down" if "down" in name else "up"])


def test_it_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    program = adapted("bert_seq_bn")
    expected = first(program, "bert")
    program.save(tmp_path / "a.pt2")
    loaded = rewriter.load(tmp_path / "a.pt2")
    assert torch.equal(first(loaded, "bert"), expected)
    assert (
        fingerprint(write_adapterhub(loaded, tmp_path / "again", base_model="tiny"))
        == (RECORDED["written"]["bert_seq_bn"]["sha256"])
    )
    export_onnx(program, tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in given("bert").items()})[0]
    assert error(torch.from_numpy(found), expected) < 1e-4


def test_two_adapters_of_different_names_stand_on_one_model(tmp_path: Path) -> None:
    once = adapted("bert_seq_bn")
    both = rewriter.apply(once, AdapterHubAdapter(FOLDER / "bert_left_out", adapter="second")).program
    for case, name in (("bert_seq_bn", "default"), ("bert_left_out", "second")):
        directory = write_adapterhub(both, tmp_path / name, adapter=name)
        alone = rewriter.apply(traced("bert"), AdapterHubAdapter(directory)).program
        assert error(first(alone, "bert"), EXPECTED[f"{case}/output"]) < 1e-5


def test_the_recorded_sha_is_filled_in_and_checked(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "bert_seq_bn", tmp_path / "a")
    pass_ = AdapterHubAdapter(tmp_path / "a")
    (step,) = rewriter.apply(traced("bert"), pass_).program.steps
    assert step.name == "adapterhub"
    assert step.options["directory"] == "a"
    assert step.options["sha256"] == pass_.sha256
    assert step.options["config"]["reduction_factor"] == 4
    shutil.copy(FOLDER / "bert_left_out" / "adapter_config.json", tmp_path / "a")
    with pytest.raises(RewriteError, match="not the adapter that was meant"):
        pass_.find(traced("bert"))


def test_the_command_line_takes_either_kind_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, list(arguments), prog_name="rewriter")
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    monkeypatch.chdir(tmp_path)
    traced("bert").save(tmp_path / "bert.pt2")
    shutil.copytree(FOLDER / "bert_seq_bn", tmp_path / "hub")
    run("apply", "--adapter", "hub", "bert.pt2", "-o", "adapted.pt2")
    run("export", "adapted.pt2", "--to", "adapterhub", "-o", "out", "--base-model", "tiny")
    assert fingerprint(tmp_path / "out") == RECORDED["written"]["bert_seq_bn"]["sha256"]
    run("apply", "--adapter", "out", "--adapter-name", "other", "--force-base", "bert.pt2", "-o", "again.pt2")
    assert "holds" in run("verify", "adapted.pt2", "again.pt2", "--tolerance", "0").stdout
    assert "no bottleneck adapter" in run("export", "bert.pt2", "--to", "adapterhub", "-o", "x", code=2).stderr
    assert "is a PEFT adapter" not in run("apply", "--adapter", "missing", "bert.pt2", code=1).stderr


# -- refusals ----------------------------------------------------------------------------------------------------------

CANNOT: list[tuple[Any, str]] = [
    (Adapter(form="parallel"), "no adapter with this pre_norm"),
    (Adapter(form="layer", targets=("q_proj",)), "beside single layers"),
    (Adapter(exclude=("layers.0.mlp.down_proj",)), "some of its adapters only"),
    (Adapter(form="parallel", pre_norm=False, norm_after=True, norm_sum=True), "no adapter with this norm_sum"),
]


@pytest.mark.parametrize(("pass_", "said"), CANNOT, ids=lambda value: str(value)[:50])
def test_what_a_configuration_cannot_say_is_not_written(pass_: Any, said: str, tmp_path: Path) -> None:
    program = rewriter.apply(traced("llama"), pass_).program
    with pytest.raises(RewriteError, match=said):
        write_adapterhub(program, tmp_path / "a")
    assert not any(tmp_path.iterdir())


def test_what_is_no_adapter_of_a_known_model_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bottleneck adapter named 'other'"):
        write_adapterhub(adapted(), tmp_path / "a", adapter="other")
    with pytest.raises(RewriteError, match="also has the pass lora"):
        write_adapterhub(rewriter.apply(adapted(), Lora()).program, tmp_path / "a")
    mixtral = trained(rewriter.apply(models.traced("mixtral"), Adapter()).program)
    with pytest.raises(RewriteError, match="model type 'mixtral' is not known"):
        write_adapterhub(mixtral, tmp_path / "a")
    plain = Program(mixtral.exported, mixtral.steps, {})
    with pytest.raises(RewriteError, match="does not say which Hugging Face model"):
        write_adapterhub(plain, tmp_path / "a")


# -- places ------------------------------------------------------------------------------------------------------------


def site(path: str, kind: Any) -> Sublayer:
    return Sublayer(path, f"{path}.weight", kind, 24, ())


def test_a_path_is_a_stack_a_number_and_what_is_inside() -> None:
    assert spot("bert.encoder.layer.11.attention.output").block == ("bert.encoder.layer", 11)
    assert spot("0.mlp").stack == ""
    assert spot("decoder.block.0.layer.1").inside == ("layer", "1")
    with pytest.raises(RewriteError, match="is in no numbered block"):
        spot("encoder.output")


def test_stacks_are_told_apart_by_their_names_in_any_order() -> None:
    towers = [
        site(f"{tower}_model.layers.{number}.{end}", kind)
        for tower in ("vision", "text")
        for number in (0, 1)
        for end, kind in (("attn.o", "attention"), ("mlp.fc2", "feed_forward"))
    ]
    paths = [
        f"{tower}_model.encoder.layers.{number}.{holder}"
        for tower in ("text", "vision")
        for number in (0, 1)
        for holder in ("output_adapters", "attention_adapters")
    ]
    found = {path: each.path for path, each in match(paths, towers).items()}
    assert found["text_model.encoder.layers.1.output_adapters"] == "text_model.layers.1.mlp.fc2"
    assert found["vision_model.encoder.layers.0.attention_adapters"] == "vision_model.layers.0.attn.o"
    assert len({*found.values()}) == 8


def test_what_does_not_match_is_named() -> None:
    sites = [site("layer.0.attention.output.dense", "attention"), site("layer.0.output.dense", "feed_forward")]
    assert len(match(["bert.layer.0.attention.output", "bert.layer.0.output"], sites)) == 2
    with pytest.raises(RewriteError, match=r"no place: layer\.1\.output"):
        match(["layer.1.output", "layer.0.output"], sites)
    with pytest.raises(RewriteError, match=r"no tensors: layer\.0\.attention\.output\.dense"):
        match(["layer.0.output"], sites)
    with pytest.raises(RewriteError, match=r"are both the adapter of layer\.0\.output\.dense"):
        match(["layer.0.output_adapters", "layer.0.output"], sites)
    with pytest.raises(RewriteError, match=r"no place: layer\.0\.crossattention"):
        match(["layer.0.crossattention", "layer.0.output"], sites)
