"""Every pass that can be named, on every kind of model: it keeps its promises, or says what the model lacks."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import rewriter
from passes.sparse import own_parameters
from rewriter.cli import main
from rewriter.cli.registry import Entry, registry
from rewriter.errors import RewriteError, UsageError
from rewriter.program import Program
from rewriter.transform import Pass
from tests.models import traced
from tests.oracle import run

MODELS = ("llama", "gpt2", "bert", "t5", "vit")
REGISTRY = registry()
SELECTED: dict[str, dict[str, Any]] = {
    "select, last": {"method": "last", "last": 1},
    "select, paths": {"method": "paths"},
    "select, fish_mask": {"method": "fish_mask", "density": 0.01},
    "select, diff_pruning": {"method": "diff_pruning"},
}
MINIMAL: dict[str, dict[str, Any]] = {  # what a pass cannot do without
    "loftq": {"rank": 2},
    "prune": {"rank": 2},
    "trainable_tokens": {"token_indices": (3, 5)},
    **SELECTED,
}
PATHS = {  # the globs of a model for `select, paths`, each of which must match
    "llama": ("*norm.weight", "lm_head.*"),
    "gpt2": ("*.ln_*",),
    "bert": ("*LayerNorm.*",),
    "t5": ("*layer_norm.weight",),
    "vit": ("*.layernorm_*", "classifier.*"),
}
CASES = (*REGISTRY, *SELECTED)
TRAIN_NOTHING = {"nf4"}
CHANGE_NO_GRAPH = {"ln_tuning", "select", "select, last", "select, paths"}
NEED_ANOTHER = {  # passes that mean something only after another one, or with a file: what they say of a bare model
    "adapterhub": "no adapter directory given",
    "bake": "no pass was applied",
    "binarise": "the program has no gates of the adapter 'default'",
    "compose": "the program has no LoRA",
    "dequantise": "the program has no layer in 4 bits",
    "loralib": "no loralib file given",
    "merge": "A merge needs an update beside a base weight",
    "peft": "no adapter directory given",
    "prune": "the program has no LoRA",
}
LACKING = {  # what a model lacks for a method
    ("prompt", "vit"): "no embedding that is looked up by token ids",
    ("select", "llama"): "no layer or norm of this model has a bias",
    ("select", "t5"): "no layer or norm of this model has a bias",
    ("trainable_tokens", "vit"): "no token embedding",
}


def refusal(case: str, model: str) -> str | None:
    return NEED_ANOTHER.get(case, LACKING.get((case, model)))


def made(case: str, model: str, folder: Path) -> Pass:
    """The pass with its default options, and those without which it cannot be applied."""
    given = dict(MINIMAL.get(case, {}))
    if case == "select, paths":
        given["paths"] = PATHS[model]
    if case == "select, fish_mask":
        given["scores"] = _scores(traced(model), folder / f"{model}.safetensors")
    return REGISTRY[case.partition(",")[0]].kind(**given)


def _scores(program: Program, file: Path) -> Path:
    """A file of scores as `passes.fish_mask.fisher` makes them: positive, of every parameter that the model reads."""
    scores = {}
    for name in own_parameters(program):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        scores[name] = torch.rand(program.tensor(name).shape, generator=generator)
    save_file(scores, file)
    return file


def test_the_table_knows_every_pass() -> None:
    assert {each.partition(",")[0] for each in SELECTED} <= set(REGISTRY)
    assert set(NEED_ANOTHER) | {name for name, _ in LACKING} | CHANGE_NO_GRAPH <= set(CASES)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", [case for case in CASES if case not in NEED_ANOTHER])
def test_a_method_is_applied_or_the_model_lacks_something(case: str, model: str, tmp_path: Path) -> None:
    base, pass_ = traced(model), made(case, model, tmp_path)
    if hasattr(pass_, "keep_original"):
        pass_ = replace(pass_, keep_original=True)  # what undo needs
    reason = refusal(case, model)
    if reason is not None:
        with pytest.raises((UsageError, RewriteError), match=re.escape(reason)) as caught:
            rewriter.apply(base, pass_)
        assert "\n" in str(caught.value)  # evidence or what to do
        return

    text = rewriter.text(base)
    result = rewriter.apply(base, pass_)
    (applied,), program = result.applied, result.program
    assert applied.sites
    assert (applied.trainable > 0) == (case not in TRAIN_NOTHING)
    assert applied.change is not None
    one = run(base, model)
    two = run(program, model)[: len(one)]  # diff pruning's penalty comes last
    if pass_.law.kind == "exact":
        assert applied.change.equal
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    else:
        assert pass_.law.kind == "free"
        assert [a.shape for a in one] == [b.shape for b in two]
        assert not all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    assert rewriter.diff(base, program).same == (case in CHANGE_NO_GRAPH)
    assert rewriter.text(base) == text
    back = rewriter.undo(program)
    assert rewriter.text(back) == text
    assert rewriter.diff(back, base).same
    assert back.steps == ()


@pytest.mark.parametrize("model", ["llama", "vit"])
@pytest.mark.parametrize("case", NEED_ANOTHER)
def test_a_pass_that_needs_another_says_which(case: str, model: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, RewriteError), match=re.escape(NEED_ANOTHER[case])) as caught:
        rewriter.apply(traced(model), made(case, model, tmp_path))
    assert "\n" in str(caught.value)


# -- the command line ---------------------------------------------------------------------------------------------

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return traced("bert").save(tmp_path_factory.mktemp("methods") / "bert.pt")


@pytest.fixture
def command() -> Run:
    def call(*arguments: object, code: int = 0) -> Result:
        result = CliRunner(env={"COLUMNS": "80"}).invoke(main, [str(each) for each in arguments], prog_name="rewriter")
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    return call


def flags(entry: Entry, given: dict[str, Any]) -> list[str]:
    by_name = {field.name: field.flag for field in entry.fields}
    values = {name: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in given.items()}
    return [part for name, value in values.items() for part in (by_name[name], value)]


@pytest.mark.parametrize("name", REGISTRY)
def test_the_command_line_applies_every_pass(name: str, model_file: Path, tmp_path: Path, command: Run) -> None:
    """What it writes is what the pass makes in this process, bit for bit after a round through the file."""
    out = tmp_path / "out.pt"
    arguments = ("apply", "--pass", name, *flags(REGISTRY[name], MINIMAL.get(name, {})), model_file, "-o", out)
    reason = refusal(name, "bert")
    if reason is not None:
        said = command(*arguments, code=1 if name == "merge" else 2).stderr
        assert " ".join(reason.split()) in " ".join(said.split())
        assert not out.exists()
        return
    command(*arguments)
    loaded = rewriter.load(out)
    expected = rewriter.apply(traced("bert"), made(name, "bert", tmp_path), check=False).program
    assert rewriter.diff(loaded, expected).same
    assert rewriter.text(loaded) == rewriter.text(expected)
    assert [(step.name, step.options) for step in loaded.steps] == [(s.name, s.options) for s in expected.steps]
    assert loaded.trainable == expected.trainable


def test_passes_are_listed_with_one_line_options_and_paper(command: Run) -> None:
    listed = {each["name"]: each for each in json.loads(command("passes", "--json").stdout)["passes"]}
    assert list(listed) == list(REGISTRY)
    table = " ".join(command("passes").stdout.split())
    for name, entry in REGISTRY.items():
        each = listed[name]
        assert name in table
        assert each["summary"] == entry.summary
        assert each["summary"].endswith(".")
        assert "\n" not in each["summary"]
        assert len(each["summary"]) <= 120
        assert each["summary"] in table
        assert each["source"] in table
        assert re.search(r"arXiv \d{4}\.\d{5}|PEFT", each["source"]), name
        assert "Source:" in entry.description, name
        options = {option["name"] for option in each["options"]}
        assert options == {field.name for field in fields(entry.kind) if field.metadata.get("given", True)}


@pytest.mark.parametrize("name", REGISTRY)
def test_the_help_of_a_pass_shows_its_options(name: str, command: Run) -> None:
    shown = command("apply", "--pass", name, "--help").stdout
    for field in REGISTRY[name].fields:
        assert field.flag in shown
    assert REGISTRY[name].summary.split()[0] in shown
