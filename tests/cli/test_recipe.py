"""Recipes: written from a program's steps, replayed to the same program, checked when they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rewriter
from passes import Lora, Merge
from rewriter import recipe
from rewriter.cli.registry import registry
from rewriter.errors import RewriteError
from tests.cli.conftest import Run
from tests.models import traced

PASSES = (
    Lora(
        targets=("q_proj", "v_proj"),
        rank=4,
        alpha=6.5,
        init="both",
        rank_pattern={"v_proj": 3},
        layers=(1,),
        seed=5,
    ),
    Merge(precision="fp64"),
)


def _kinds() -> dict[str, Any]:
    return {name: entry.kind for name, entry in registry().items()}


def _replayed(path: Path) -> tuple[Any, ...]:
    return recipe.build(recipe.read(path), _kinds(), folder=path.parent)


def test_a_recipe_says_what_was_applied_and_no_more(golden: Callable[[str, str], None]) -> None:
    golden("cli/recipe.yaml", recipe.write(rewriter.apply(traced("llama"), *PASSES, check=False).program.steps))


def test_a_replay_gives_the_same_text_and_bits(tmp_path: Path) -> None:
    program = rewriter.apply(traced("llama"), *PASSES).program
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.write(program.steps), encoding="utf-8")
    assert _replayed(path) == PASSES
    again = rewriter.apply(traced("llama"), *_replayed(path)).program
    assert rewriter.text(again) == rewriter.text(program)
    assert rewriter.diff(program, again).same
    assert recipe.write(again.steps) == path.read_text(encoding="utf-8")


def test_the_command_line_records_and_replays(folder: Path, run: Run) -> None:
    run("apply", "--pass", "lora", "--targets", "up", "--init", "both", "--rank", "3", "mlp.pt", "-o", "one.pt")
    (folder / "r.yaml").write_text(run("inspect", "one.pt", "--recipe").stdout, encoding="utf-8")
    run("apply", "--recipe", "r.yaml", "mlp.pt", "-o", "two.pt")
    assert run("diff", "one.pt", "two.pt", "--exit-code").stdout == "no difference\n"


def test_an_adapter_is_found_beside_the_recipe(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "kept").mkdir()
    run("apply", "--pass", "lora", "--targets", "up", "--init", "both", "mlp.pt", "-o", "one.pt")
    run("export", "one.pt", "--to", "peft", "-o", "kept/adapter")
    run("apply", "--adapter", "kept/adapter", "mlp.pt", "-o", "two.pt")
    text = run("inspect", "two.pt", "--recipe").stdout
    assert str(folder) not in text
    (folder / "kept" / "r.yaml").write_text(text, encoding="utf-8")
    run("apply", "--recipe", "kept/r.yaml", "mlp.pt", "-o", "three.pt")
    assert run("diff", "two.pt", "three.pt", "--exit-code").stdout == "no difference\n"


HEAD = "schema: 1\npasses:\n"


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("pass", HEAD + "- pass: lorra\n", 2),
        ("option", HEAD + "- pass: lora\n  options: {rnk: 3}\n", 2),
        ("type", HEAD + "- pass: lora\n  options: {rank: '3'}\n", 2),
        ("boolean", HEAD + "- pass: lora\n  options: {rank: true}\n", 2),
        ("choice", HEAD + "- pass: lora\n  options: {init: zeros}\n", 2),
        ("schema", "schema: 2\npasses: []\n", 2),
        ("form", "- lora\n", 2),
        ("entry", HEAD + "- lora\n", 2),
        ("names", HEAD + "- pass: lora\n  options: {3: 4}\n", 2),
        ("twice", HEAD + "- pass: lora\n  options: {rank: 3, rank: 4}\n", 1),
        ("yaml", "passes: [\n", 1),
        ("code", "!!python/object/apply:os.system ['true']\n", 1),
    ],
)
def test_what_is_no_recipe(
    name: str, text: str, code: int, tmp_path: Path, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("r.yaml")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RewriteError) as error:
        _replayed(path)
    assert error.value.exit_code == code
    golden(f"cli/recipe_{name}.txt", f"{error.value}\n")


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match="cannot be read"):
        recipe.read(tmp_path / "absent.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (recipe.LARGEST_BYTES + 1))
    with pytest.raises(RewriteError, match="less than"):
        recipe.read(tmp_path / "large.yaml")


def test_an_option_without_a_default_must_be_given() -> None:
    @dataclasses.dataclass(frozen=True)
    class Needs:
        size: int

    entries = [{"pass": "needs", "options": {}}]
    with pytest.raises(RewriteError, match="gives needs no size"):
        recipe.build(entries, {"needs": Needs}, folder=Path())  # type: ignore[dict-item]
