"""`rewriter apply` and the verbs around it: what is written, what is printed, what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rewriter
from tests.cli.conftest import Run

LORA = ("apply", "--pass", "lora", "--targets", "up,down", "--rank", "3")
WIDTHS = {"q_proj": 24 + 24, "v_proj": 24 + 12}  # i + o of the two projections


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_the_command_of_the_documentation_adds_r_times_i_plus_o_per_site(folder: Path, run: Run) -> None:
    before = _digest(folder / "model.pt")
    result = run("apply", "--pass", "lora", "--targets", "q_proj,v_proj", "model.pt")
    assert "wrote model.lora.pt" in result.stdout
    assert _digest(folder / "model.pt") == before
    base, tuned = rewriter.load(folder / "model.pt"), rewriter.load(folder / "model.lora.pt")
    added: dict[str, int] = {}
    for name, tensor in tuned.parameters().items():
        if name not in base.tensors:
            site = name.split(".lora_")[0]
            added[site] = added.get(site, 0) + tensor.numel()
    assert added == {
        f"model.layers.{layer}.self_attn.{name}": 8 * width for layer in (0, 1) for name, width in WIDTHS.items()
    }


def test_every_target_must_match(folder: Path, run: Run, golden: Callable[[str, str], None]) -> None:
    before = _names(folder)
    result = run("apply", "--pass", "lora", "--targets", "q_proj,v_projj", "model.pt", code=2)
    assert "v_proj," in result.stderr
    assert result.stdout == ""
    golden("cli/unmatched_target.txt", result.stderr)
    assert _names(folder) == before


def test_options_of_every_kind_reach_the_pass(folder: Path, run: Run) -> None:
    options = ["--rank=3", "--alpha", "6", "--rslora", "--rank-pattern", "v_proj=5", "--layers", "1"]
    options += ["--init", "both", "--adapter-name", "mine", "--seed", "-4"]
    run("apply", "--pass", "lora", "--targets", "q_proj,v_proj", *options, "model.pt", "-o", "out.pt")
    (step,) = rewriter.load(folder / "out.pt").steps
    assert step.options == {
        "targets": ["q_proj", "v_proj"],
        "rank": 3,
        "alpha": 6,
        "rslora": True,
        "rank_pattern": {"v_proj": 5},
        "layers": [1],
        "init": "both",
        "adapter": "mine",
        "seed": -4,
    }


def test_a_pattern_is_a_regular_expression(folder: Path, run: Run) -> None:
    result = run(
        "apply", "--pass", "lora", "--targets", r".*\.0\.self_attn\.(q|k)_proj", "--dry-run", "--json", "model.pt"
    )
    assert json.loads(result.stdout)["applied"][0]["sites"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]


def test_options_belong_to_the_pass_before_them(folder: Path, run: Run) -> None:
    first = ["--pass", "lora", "--targets", "up", "--rank", "2", "--init", "both"]
    second = ["--pass", "lora", "--targets", "down", "--rank", "4", "--adapter-name", "b", "--pass", "merge"]
    result = run("apply", *first, *second, "--precision", "fp64", "mlp.pt")
    assert "wrote mlp.lora.merge.pt" in result.stdout
    assert "merge: update " in result.stdout
    assert "merge: error of update " in result.stdout
    steps = rewriter.load(folder / "mlp.lora.merge.pt").steps
    assert [step.name for step in steps] == ["lora", "lora", "merge"]
    assert [step.options.get("rank") for step in steps] == [2, 4, None]
    assert steps[2].options == {"precision": "fp64"}


def test_json_is_the_only_thing_on_stdout(folder: Path, run: Run) -> None:
    data = json.loads(run(*LORA, "--json", "mlp.pt").stdout)
    assert data["schema"] == 1
    assert data["output"] == "mlp.lora.pt"
    (applied,) = data["applied"]
    assert applied["parameters"] == {"before": 583, "after": 775, "added": 192, "trainable": 192}
    assert applied["largest_change"]["equal"] is True


def test_a_dry_run_shows_the_matches_and_writes_nothing(folder: Path, run: Run) -> None:
    before = _names(folder)
    arguments = ("apply", "--pass", "lora", "--targets", "q_proj,v_proj", "--rank", "3", "--layers", "1")
    arguments += ("--dry-run", "model.pt")
    shown = run(*arguments).stdout
    assert "model.layers.1.self_attn.v_proj linear [12, 24] lora_A.default [3, 24], lora_B.default [12, 3]" in shown
    assert "not: model.layers.0.self_attn.q_proj: not among the layers to transform" in shown
    assert "lora: 2 sites, 252 new parameters" in shown
    data = json.loads(run(*arguments, "--json").stdout)
    assert [match["count"] for match in data["matches"]] == [3 * WIDTHS["q_proj"], 3 * WIDTHS["v_proj"]]
    assert len(data["applied"][0]["missed"]) == 2
    assert _names(folder) == before


def test_an_adapter_directory_goes_out_and_comes_back(folder: Path, run: Run) -> None:
    run(*LORA, "--init", "both", "mlp.pt")
    run("export", "mlp.lora.pt", "--to", "peft", "-o", "adapter")
    run("apply", "--adapter", "adapter", "mlp.pt", "-o", "again.pt")
    result = run("verify", "mlp.lora.pt", "again.pt", "--tolerance", "0")
    assert "holds" in result.stdout
    assert "differ" in run("verify", "mlp.pt", "again.pt", code=4).stderr


def test_a_law_that_does_not_hold_is_exit_code_4(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from passes import Lora
    from rewriter.transform import EXACT

    monkeypatch.setattr(Lora, "law", EXACT)
    result = run(*LORA, "--init", "both", "mlp.pt", code=4)
    assert "its law allows 0" in result.stderr
    assert not (folder / "mlp.lora.pt").exists()
    run(*LORA, "--init", "both", "--no-check", "mlp.pt")


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("unknown_option", ["--pass", "lora", "--rnk", "3", "model.pt"], 2),
        ("unknown_pass", ["--pass", "lorra", "model.pt"], 2),
        ("no_pass", ["model.pt"], 2),
        ("option_without_pass", ["--rank", "3", "--pass", "lora", "model.pt"], 2),
        ("option_twice", ["--pass", "lora", "--rank", "3", "--rank=4", "model.pt"], 2),
        ("wrong_choice", ["--pass", "lora", "--init", "zeros", "model.pt"], 2),
        ("wrong_number", ["--pass", "lora", "--rank", "three", "model.pt"], 2),
        ("wrong_pair", ["--pass", "lora", "--rank-pattern", "v_proj", "model.pt"], 2),
        ("wrong_value", ["--pass", "lora", "--rank", "0", "model.pt"], 2),
        ("pass_without_name", ["model.pt", "--pass"], 2),
        ("value_missing", ["model.pt", "--pass", "lora", "--rank"], 2),
        ("recipe_and_pass", ["--recipe", "r.yaml", "--pass", "lora", "model.pt"], 2),
        ("missing_model", ["--pass", "lora", "absent.pt"], 1),
        ("output_is_input", ["--pass", "lora", "model.pt", "-o", "model.pt", "--overwrite"], 1),
        ("output_holds_input", ["--pass", "lora", "llama/model.safetensors", "-o", "llama", "--overwrite"], 1),
    ],
)
def test_what_cannot_be_meant(
    name: str, arguments: list[str], code: int, folder: Path, run: Run, golden: Callable[[str, str], None]
) -> None:
    before = {path: _digest(path) for path in folder.rglob("*") if path.is_file()}
    result = run("apply", *arguments, code=code)
    assert result.stdout == ""
    golden(f"cli/{name}.txt", result.stderr)
    assert {path: _digest(path) for path in folder.rglob("*") if path.is_file()} == before


def test_an_output_that_exists_needs_overwrite(folder: Path, run: Run) -> None:
    (folder / "mlp.lora.pt").write_bytes(b"mine")
    assert "--overwrite" in run(*LORA, "mlp.pt", code=1).stderr
    assert (folder / "mlp.lora.pt").read_bytes() == b"mine"
    run(*LORA, "mlp.pt", "--overwrite")
    assert rewriter.load(folder / "mlp.lora.pt").steps


def test_a_link_to_the_input_is_the_input(folder: Path, run: Run) -> None:
    (folder / "other.pt").hardlink_to(folder / "model.pt")
    assert "is an input" in run(*LORA, "model.pt", "-o", "other.pt", "--overwrite", code=1).stderr


def test_pickles_need_trust(folder: Path, run: Run) -> None:
    torch.save(torch.nn.Linear(3, 5), folder / "pickled.pt")
    assert "--trust-pickle" in run("apply", "--pass", "lora", "pickled.pt", code=3).stderr


def test_a_warning_is_one_line_on_stderr(folder: Path, run: Run) -> None:
    result = run("apply", "--pass", "lora", "--targets", "head", "mlp.pt")
    assert result.stderr == "warning: head: rank 8 exceeds 7\n"


def test_the_help_of_a_pass_has_its_options_and_equation(run: Run) -> None:
    shown = run("apply", "--pass", "lora", "--help").stdout
    assert "--rank INTEGER                  [default: 8]" in shown
    assert "--rank-pattern NAME=INTEGER,..." in shown
    assert "y = x Wᵀ + b      ->      y = x Wᵀ + b + scale" in shown
    assert "--untie" not in shown


def test_a_merge_without_effect_is_warned_of(folder: Path, run: Run) -> None:
    assert "warning" not in run(*LORA, "mlp.pt", "-o", "zero.pt").stderr
    warning = "warning: 2 of 2 merged updates are zero: the adapter has no effect\n"
    assert warning in run("merge", "zero.pt", "-o", "merged.pt").stderr
    shown = run("merge", "zero.pt", "-o", "again.pt", "--json")
    assert warning in shown.stderr
    assert len(json.loads(shown.stdout)["applied"][0]["notes"]) == 2
    run("apply", "--pass", "lora", "--targets", "up,down", "--init", "both", "mlp.pt", "-o", "random.pt")
    assert "zero" not in run("merge", "random.pt", "-o", "merged_random.pt").stderr
