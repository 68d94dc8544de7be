"""`rewriter plan`: directories without weights, programs, examples, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.models import vit

KEYS = {
    "parameters", "trainable", "share", "weights", "quantised", "gradients", "optimiser", "master_copy",
    "activations", "loss", "total", "total_checkpointed",
}  # fmt: skip


def test_a_directory_without_weights_comes_before_an_example(folder: Path, run: Run) -> None:
    (folder / "llama" / "model.safetensors").unlink()
    (folder / "llama").rename(folder / "llama-2-7b")
    data = json.loads(run("plan", "llama-2-7b", "--rank", "3", "--length", "9", "--batch", "2", "--json").stdout)
    assert {data["schema"], data["batch"], data["length"]} == {1, 2, 9}
    assert list(data["methods"]) == ["full", "lora", "qlora"]
    assert all(set(each) == KEYS for each in data["methods"].values())
    assert data["methods"]["full"]["gradients"] == 2 * 9096
    assert data["methods"]["lora"]["trainable"] == 2 * 3 * (48 + 36 + 36 + 48)
    assert data["methods"]["qlora"]["weights"] < data["methods"]["lora"]["weights"]
    assert data["types"] == ["bf16"]


def test_the_table_and_its_assumptions(folder: Path, run: Run) -> None:
    options = ("--method", "full", "--method", "lora", "--rank", "2", "--length", "7", "--master", "--checkpointing")
    lines = run("plan", "mlp.pt", *options).stdout.splitlines()
    assert lines[0] == "mlp.pt: a step of 1 row of 7 positions"
    assert lines[2].split() == ["full", "lora"]
    titles = [line.split("  ")[0] for line in lines]
    assert titles.index("total, checkpointed") == titles.index("total") - 1
    assert "fp32 copy of weights" in titles
    assert any("16 bytes a parameter in all with adamw" in line for line in lines)


def test_a_program_is_planned_with_what_it_trains(folder: Path, run: Run) -> None:
    run("apply", "--pass", "lora", "--targets", "up,down", "--rank", "3", "mlp.pt")
    data = json.loads(run("plan", "mlp.lora.pt", "--length", "7", "--json").stdout)
    assert list(data["methods"]) == ["program"]
    assert data["methods"]["program"]["trainable"] == 192
    both = json.loads(run("plan", "mlp.lora.pt", "--method", "program,full", "--dtype", "fp16", "--json").stdout)
    assert 2 * both["methods"]["program"]["weights"] == data["methods"]["program"]["weights"]
    plain = json.loads(run("plan", "mlp.pt", "--method", "lora", "--targets", "head", "--rank", "2", "--json").stdout)
    assert plain["methods"]["lora"]["trainable"] == 2 * (10 + 7)


def test_images_have_no_length(folder: Path, run: Run) -> None:
    vit()[0].save_pretrained(folder / "vit")
    data = json.loads(run("plan", "vit", "--method", "full", "--batch", "5", "--json").stdout)
    assert data["length"] is None
    assert "none of its inputs is a sequence" in run("plan", "vit", "--length", "9", code=2).stderr


def test_the_examples(run: Run) -> None:
    assert run("plan", "--list").stdout.split() == ["llama-2-7b", "llama-2-13b", "llama-2-70b"]
    assert json.loads(run("plan", "--list", "--json").stdout)["examples"][0] == "llama-2-7b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mlp.pt", "--method", "qlra"), "closest: qlora"),
        (("mlp.pt", "--optimizer", "sgd"), "adamw, adamw8bit"),
        (("mlp.pt", "--states", "fp8"), "One of weight, fp32"),
        (("mlp.pt", "--batch", "-2"), "batch is -2"),
        (("mlp.pt", "--length", "0"), "length is 0"),
        (("mlp.pt", "--rank", "0"), "rank is 0"),
        (("mlp.pt", "--targets", "nowhere"), "matches no layer"),
        (("llama-2-8b",), "examples: llama-2-7b"),
        (("--json",), "Missing argument"),
    ],
)
def test_what_cannot_be_meant(arguments: tuple[str, ...], message: str, folder: Path, run: Run) -> None:
    assert message in run("plan", *arguments, code=2).stderr
