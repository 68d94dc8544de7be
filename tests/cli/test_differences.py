"""`rewriter diff` between all kinds of sources, and `--diff` and `--html` of the verbs that change programs."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run

LORA = ("--pass", "lora", "--targets", "up", "--rank", "3", "--init", "both")
ADDED = "operations: 4 added, 0 removed, 1 changed"


def test_programs_onnx_files_and_weights(folder: Path, run: Run) -> None:
    run("apply", *LORA, "mlp.pt", "-o", "lora.pt")
    run("export", "mlp.pt", "--to", "onnx", "-o", "mlp.onnx")
    run("export", "lora.pt", "--to", "peft", "-o", "adapter")
    assert run("diff", "mlp.pt", "mlp.onnx", "--exit-code").stdout == "no difference\n"
    beside_onnx = run("diff", "mlp.onnx", "lora.pt", "--exit-code", code=1).stdout
    assert "tensors added: 2 tensors, 96 numbers" in beside_onnx
    assert "lora" in beside_onnx
    assert " removed, 1 changed" in beside_onnx
    assert run("diff", "mlp.pt", "lora.pt", "--stat").stdout.splitlines()[0] == ADDED
    assert run("diff", "adapter", "adapter", "--exit-code").stdout == "no difference\n"
    weights = json.loads(run("diff", "--weights", "mlp.onnx", "lora.pt", "--json").stdout)
    assert weights["operations"] == {"added": 0, "removed": 0, "changed": 0}
    assert weights["tensors"]["added"]["names"] == ["up.lora_A.default", "up.lora_B.default"]
    against_model = json.loads(run("diff", "llama", "adapter", "--json").stdout)
    assert against_model["tensors"]["added"]["count"] == 96
    assert against_model["tensors"]["removed"]["count"] > 96


def test_the_json_says_what_happened_to_each_operation(folder: Path, run: Run) -> None:
    run("apply", *LORA, "mlp.pt", "-o", "lora.pt")
    data = json.loads(run("diff", "mlp.pt", "lora.pt", "--json").stdout)
    assert data["schema"] == 1
    found = {node["name"]: node for node in data["nodes"]}
    assert {name: node["change"] for name, node in found.items()} == {
        "%up/lora_down": "added",
        "%up/lora_up": "added",
        "%up/lora_scaled": "added",
        "%up/lora_sum": "added",
        "%relu": "rewired",
    }
    assert found["%relu"]["paired"] == "name"
    assert found["%relu"]["before"] == "%relu = relu(%up/linear) : f32[d0,d1,22]"
    assert found["%up/lora_up"]["before"] is None
    assert data["bytes"]["after"] - data["bytes"]["before"] == 4 * 96


def test_pages(folder: Path, run: Run) -> None:
    result = run("apply", *LORA, "mlp.pt", "-o", "lora.pt", "--diff", "--html", "lora.html")
    assert ADDED in result.stdout
    assert "wrote lora.html" in result.stderr
    assert "%up/lora_down" in (folder / "lora.html").read_text()
    merged = run("merge", "lora.pt", "-o", "merged.pt", "--diff", "--html", "merged.html").stdout
    assert "operations: 0 added, 4 removed, 1 changed" in merged
    data = json.loads(run("undo", "merged.pt", "-o", "again.pt", "--diff", "--json").stdout)
    assert data["diff"]["operations"] == {"added": 4, "removed": 0, "changed": 1}
    run("diff", "mlp.pt", "merged.pt", "--html", "both.html", "--stat")
    assert {"lora.html", "merged.html", "both.html"} <= {path.name for path in folder.iterdir()}


def test_a_page_is_refused_before_the_work(folder: Path, run: Run) -> None:
    (folder / "there.html").write_text("mine")
    for verb in (("apply", *LORA, "mlp.pt"), ("apply", *LORA, "mlp.pt", "--dry-run"), ("diff", "mlp.pt", "mlp.pt")):
        refused = run(*verb, "--html", "there.html", code=1)
        assert "there.html already exists" in refused.stderr
    assert "both name" in run("apply", *LORA, "mlp.pt", "-o", "x", "--html", "x", code=2).stderr
    assert (folder / "there.html").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["llama", "mlp.pt", "model.pt", "there.html"]


def test_a_dry_run_shows_what_would_change(folder: Path, run: Run) -> None:
    shown = run("apply", *LORA, "mlp.pt", "--dry-run", "--diff").stdout
    assert ADDED in shown
    assert shown.endswith("nothing was written\n")


def test_a_model_at_a_glance(folder: Path, run: Run) -> None:
    run("apply", "--pass", "nf4", "--pass", "lora", "--targets", "all-linear", "--rank", "3", "model.pt", "-o", "q.pt")
    shown = run("show", "q.pt", "--html", "q.html")
    row = next(line for line in shown.stdout.splitlines() if "q_proj" in line)
    assert row.split() == ["model.layers.*.self_attn.q_proj", "2", "linear4bit", "[24,", "24]", "1,152", "288"]
    assert "linear4bit" in (folder / "q.html").read_text()
    data = json.loads(run("show", "q.pt", "--json").stdout)
    assert sum(layer["count"] for layer in data["layers"]) == 16
    assert "already exists" in run("show", "q.pt", "--html", "q.html", code=1).stderr
