"""Every verb once, on a tiny Llama: what it prints and what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rewriter
from rewriter.cli.group import VERBS
from tests.cli.conftest import Run

LORA = ("apply", "--pass", "lora", "--targets", "up,down", "--rank", "3", "--init", "both", "mlp.pt")


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(verb: str, run: Run, golden: Callable[[str, str], None]) -> None:
    golden(f"cli/help_{verb or 'rewriter'}.txt", run(*filter(None, [verb]), "--help").stdout)


def test_passes(run: Run) -> None:
    data = json.loads(run("passes", "--json").stdout)
    assert data["schema"] == 1
    found = {each["name"]: each for each in data["passes"]}
    assert {"lora", "merge", "peft"} <= set(found)
    for each in found.values():
        assert {"name", "summary", "options", "law", "source"} == set(each)
        assert all({"name", "flag", "type", "required"} <= set(option) for option in each["options"])
    rank = next(option for option in found["lora"]["options"] if option["name"] == "rank")
    assert rank == {"name": "rank", "flag": "--rank", "type": "int", "required": False, "default": 8}
    table = run("passes").stdout
    assert all(name in table for name in found)


def test_trace(folder: Path, run: Run) -> None:
    assert "wrote llama.pt" in run("trace", "llama").stdout
    assert (
        json.loads(run("trace", "llama", "-o", "half.pt", "--dtype", "bfloat16", "--json").stdout)["output"]
        == "half.pt"
    )
    assert rewriter.load(folder / "half.pt").tensor("lm_head.weight").dtype is torch.bfloat16
    assert "already exists" in run("trace", "llama", code=1).stderr


def test_trace_of_a_factory_and_of_weights(folder: Path, run: Run) -> None:
    (folder / "made_here.py").write_text(
        "import torch\ndef tiny():\n    return torch.nn.Linear(3, 5), (torch.ones(2, 3),)\n", encoding="utf-8"
    )
    assert "wrote tiny.pt" in run("trace", "made_here:tiny").stdout
    torch.save({"weight": torch.ones(5, 3), "bias": torch.zeros(5)}, folder / "weights.pt")
    assert "--model" in run("trace", "weights.pt", code=1).stderr
    assert "wrote weights.trace.pt" in run("trace", "weights.pt", "--model", "made_here:tiny").stdout
    assert bool((rewriter.load(folder / "weights.trace.pt").tensor("weight") == 1).all())


def test_inspect(folder: Path, run: Run) -> None:
    assert "model.layers.1.self_attn.k_proj linear    [12, 24] key" in run("inspect", "model.pt").stdout
    run(*LORA)
    shown = run("inspect", "mlp.lora.pt").stdout
    assert "step 1: lora(targets=['up', 'down'], rank=3, init=both), 192 parameters added" in shown
    assert "192 of 775 parameters train" in shown
    data = json.loads(run("inspect", "mlp.lora.pt", "--json").stdout)
    assert data["steps"][0]["added"] == 192
    assert {"path", "kind", "shape", "tied", "role"} == set(data["layers"][0])
    text = run("inspect", "mlp.lora.pt", "--text").stdout
    assert text == rewriter.text(rewriter.load(folder / "mlp.lora.pt"))
    assert "one of them" in run("inspect", "model.pt", "--text", "--json", code=2).stderr


def test_merge_undo_and_diff(folder: Path, run: Run) -> None:
    run(*LORA)
    data = json.loads(run("merge", "mlp.lora.pt", "--json").stdout)
    notes = data["applied"][0]["notes"]
    assert len(notes) == 2
    assert all({"update", "error_of_update"} == set(each) for each in notes.values())
    assert "already exists" in run("merge", "mlp.lora.pt", code=1).stderr
    assert "nothing to merge" in run("merge", "mlp.pt", code=1).stderr
    undone = run("undo", "mlp.lora.merge.pt", "--pass", "merge", "-o", "back.pt").stdout
    assert "undone: step 2, merge" in undone
    assert run("diff", "back.pt", "mlp.lora.pt", "--exit-code").stdout == "no difference\n"
    run("undo", "back.pt", "--step", "1", "-o", "base.pt")
    assert json.loads(run("diff", "base.pt", "mlp.pt", "--exit-code", "--json").stdout)["same"] is True
    changed = run("diff", "mlp.pt", "mlp.lora.pt", "--exit-code", code=1).stdout
    assert "+param @up.lora_A.default" in changed
    assert "\x1b" not in changed
    run("diff", "mlp.pt", "mlp.lora.pt")
    assert "no pass was applied" in run("undo", "mlp.pt", code=2).stderr
    run("undo", "back.pt", "--step", "1", "--pass", "lora", code=2)


def test_extract(folder: Path, run: Run) -> None:
    run(*LORA, "--pass", "merge")
    result = run("extract", "mlp.pt", "mlp.lora.merge.pt", "--rank", "3", "-o", "adapter")
    assert "down     3   100.00%" in result.stdout
    assert (folder / "adapter" / "adapter_config.json").is_file()
    run("apply", "--adapter", "adapter", "mlp.pt", "-o", "again.pt")
    run("verify", "again.pt", "mlp.lora.merge.pt")
    low = json.loads(run("extract", "mlp.pt", "mlp.lora.merge.pt", "--rank", "1", "-o", "low", "--json").stdout)
    assert all(0 < each["share"] < 0.9 for each in low["layers"].values())


def test_verify(folder: Path, run: Run) -> None:
    data = json.loads(run("verify", "mlp.pt", "--trials", "2", "--json").stdout)
    assert data["holds"] is True
    assert data["trials"][0]["shapes"] != data["trials"][1]["shapes"]
    run(*LORA)
    failed = run("verify", "mlp.pt", "mlp.lora.pt", "--json", code=4)
    assert json.loads(failed.stdout)["holds"] is False
    assert "outputs differ by" in failed.stderr
    run("verify", "mlp.pt", "mlp.lora.pt", "--tolerance", "1")
    program = rewriter.load(folder / "mlp.pt")
    bad = program.tensor("head.weight").detach().clone()
    bad[0, 0] = float("nan")
    program.with_tensors({"head.weight": bad}).save(folder / "nan.pt")
    assert "head.weight holds 1 NaN" in run("verify", "nan.pt", code=4).stderr


@pytest.mark.parametrize(
    ("passes", "instead"),
    [
        (("adapter",), "Write bottleneck adapters with --to adapterhub. Or take the whole program with --to onnx"),
        (("lora", "adapter"), "--to adapterhub. Undo lora first for that, or take the whole program"),
        (("intrinsic",), "with `rewriter merge`, and export the model with --to huggingface"),
        (("select",), "export the model with --to huggingface"),
    ],
)
def test_what_peft_cannot_hold_goes_out_another_way(
    folder: Path, run: Run, passes: tuple[str, ...], instead: str
) -> None:
    targets = ("--targets", "up,down") if "lora" in passes else ()
    run(
        "apply",
        *[word for name in passes for word in ("--pass", name, *(targets if name == "lora" else ()))],
        "mlp.pt",
        "-o",
        "x.pt",
    )
    shown = run("export", "x.pt", "--to", "peft", "-o", "out", code=1).stderr
    assert f"PEFT has no format for {passes[-1]}, which this program holds" in shown
    assert instead.lower() in shown.lower()
    assert not (folder / "out").exists()


def test_export_to_torch_and_hugging_face(folder: Path, run: Run) -> None:
    data = json.loads(run("export", "mlp.pt", "--to", "torch", "--dtype", "float64", "--json").stdout)
    assert data["dtype"] == "float64"
    assert data["max_abs_error"] < 1e-4
    plain = torch.export.load(folder / "mlp.torch.pt2")
    assert plain.state_dict["head.weight"].dtype is torch.float64
    assert (
        "no device 'nowhere'"
        in run("export", "mlp.pt", "--to", "torch", "--device", "nowhere", "-o", "x", code=2).stderr
    )
    run("trace", "llama")
    assert "largest error" in run("export", "llama.pt", "--to", "huggingface", "-o", "out").stdout
    assert (folder / "out" / "config.json").is_file()
    assert "--opset is for onnx" in run("export", "mlp.pt", "--to", "peft", "--opset", "18", code=2).stderr


def test_export_to_onnx(folder: Path, run: Run) -> None:
    pytest.importorskip("onnxruntime")
    data = json.loads(run("export", "mlp.pt", "--to", "onnx", "--external-data", "--json").stdout)
    assert data["max_abs_error"] < 1e-4
    assert (folder / "mlp.onnx.data").is_file()
    assert "is an input" in run("export", "mlp.pt", "--to", "onnx", "-o", "mlp.pt", "--overwrite", code=1).stderr


def test_an_unknown_verb_names_the_closest(run: Run) -> None:
    assert "Did you mean 'apply'?" in run("aply", code=2).stderr
