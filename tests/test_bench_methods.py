"""The table of what methods cost: it runs on a tiny model, names every method, and counts what it says it counts."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import rewriter
from rewriter.cli.registry import registry
from rewriter.transform import Pass
from tests.models import traced
from tools.bench import methods

ROOT = Path(__file__).resolve().parent.parent
WIDTH, KEYS, MLP, LAYERS, HEADS, VOCABULARY = 24, 12, 28, 2, 4, 64
TINY = ["--width", "24", "--mlp", "28", "--layers", "2", "--heads", "4", "--key-value-heads", "2", "--vocabulary", "64"]
LLAMA = {  # trainable parameters by hand: the sizes above, query and value as LoRA's layers
    "lora": LAYERS * 8 * ((WIDTH + WIDTH) + (WIDTH + KEYS)),
    "lora, DoRA": LAYERS * (8 * ((WIDTH + WIDTH) + (WIDTH + KEYS)) + WIDTH + KEYS),
    "adalora": LAYERS * 12 * ((WIDTH + WIDTH + 1) + (WIDTH + KEYS + 1)),
    "loha": LAYERS * 2 * 8 * ((WIDTH + WIDTH) + (WIDTH + KEYS)),
    "vera": LAYERS * ((256 + WIDTH) + (256 + KEYS)),
    "ia3": LAYERS * (KEYS + KEYS + MLP),
    "adapter, series": LAYERS * 2 * (2 * WIDTH + 1 + WIDTH),
    "prefix": 20 * LAYERS * 2 * KEYS,
    "prompt": 20 * WIDTH,
    "trainable_tokens, 16": 16 * WIDTH,
    "ln_tuning": (2 * LAYERS + 1) * WIDTH,
    "intrinsic, fastfood": 256,
    "intrinsic, one_hot": 256,
}
TOTAL = 2 * VOCABULARY * WIDTH + WIDTH + LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * MLP + 2 * WIDTH)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    threads, printed = torch.get_num_threads(), io.StringIO()
    with redirect_stdout(printed):
        methods.main([*TINY, "--length", "8", "--rounds", "1", "--json"])
    torch.set_num_threads(threads)
    return dict(json.loads(printed.getvalue()))


def test_every_pass_that_trains_has_a_row() -> None:
    names = {each.pass_.name for each in methods.METHODS.values() if isinstance(each.pass_, Pass)}
    assert names | methods.NOT_TRAINED == set(registry())
    assert not names & methods.NOT_TRAINED


def test_the_numbers_are_right(found: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == [name for name in methods.METHODS if name != "select, BitFit"]
    assert found["refused"] == {"select, BitFit": "no layer or norm of this model has a bias"}
    assert found["parameters"] == TOTAL
    for name, count in LLAMA.items():
        assert rows[name]["trainable"] == count, name
        assert rows[name]["share"] == pytest.approx(count / (TOTAL + (0 if name == "ln_tuning" else count)))
    assert rows["full fine-tuning"]["trainable"] == TOTAL
    assert rows["full fine-tuning"]["share"] == 1
    sparse = round(0.005 * TOTAL)
    assert rows["select, FishMask 0.5 %"]["trainable"] == sparse
    for name, row in rows.items():
        numbers = 4 * row["trainable"] + (8 * sparse if "FishMask" in name else 8 * 16 if "tokens" in name else 0)
        assert numbers < row["checkpoint_bytes"] < numbers + 20_000  # the names and shapes of the tensors
        assert min(row["training_step"], row["latency"]) > 0
        assert (row["latency_ended"] is None) == (row["ended"] in ("no", "nothing to merge"))
    assert rows["lora"]["training_step"] == 1
    assert {name for name, row in rows.items() if row["ended"] == "no"} == {
        "adapter, series",
        "adapter, parallel",
        "adapter, layer",
        "prefix",
        "prompt",
    }


def test_a_merged_model_has_the_operations_of_the_base() -> None:
    base = traced("llama")
    inputs = methods.inputs_of(base, 3, 6, 0)
    each = methods.prepared(base, methods.METHODS["lora"], inputs, 0)
    assert each.ended is not None
    assert list(each.ended.tensors) == list(base.tensors)
    assert not rewriter.diff(each.ended, base).same


def test_it_runs_from_a_clone_on_a_program_and_prints_a_table(tmp_path: Path) -> None:
    file = traced("bert").save(tmp_path / "model.pt")
    command = [sys.executable, "-m", "tools.bench.methods", str(file), "--methods", "select, BitFit; prompt"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--length", "9"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    head, _, names, line, *rows = done.stdout.splitlines()
    assert head.startswith("model.pt: ")
    assert "batch 4, length 9, 1 rounds" in head
    assert names.startswith("| method | trainable | share | checkpoint | training step / LoRA's |")
    assert [row.split(" | ")[0] for row in rows] == ["| lora", "| prompt", "| select, BitFit"]
    assert {each.count("|") for each in (names, line, *rows)} == {9}
    assert str(tmp_path) not in done.stdout


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        methods.main(["--methods", "lorra"])
    assert "there is no method 'lorra'; known: lora; " in capsys.readouterr().err
