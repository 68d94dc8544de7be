"""Trainable tokens: which table is meant, what trains, tied heads, merging, and parity with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from peft import TrainableTokensConfig, get_peft_model
from torch import Tensor

import rewriter
from passes import Lora, Merge, TrainableTokens
from rewriter import verify
from rewriter.errors import UsageError
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from tests.models import TINY, traced
from tests.oracle import distance, example, operations, run, traced_double

TABLES = {
    "llama": "model.embed_tokens",
    "llama_tied": "model.embed_tokens",
    "gpt2": "transformer.wte",
    "bert": "embeddings.word_embeddings",
    "t5": "shared",
    "conv": "classes",
}


def tokens(name: str) -> tuple[int, ...]:
    """Rows the example inputs read, in no order, and row 0."""
    args, kwargs = example(name)
    ids = args[1] if name == "conv" else kwargs["input_ids"]
    seen = list(dict.fromkeys(ids.flatten().tolist()))[:3]
    return (seen[2], seen[0], 0, seen[1]) if name != "conv" else (8, 0, 4)


def delta(program: Program) -> str:
    (name,) = (name for name in program.trainable if "trainable_tokens_delta" in name)
    return name


def randomised(program: Program) -> Program:
    before = program.tensor(delta(program))
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return program.with_tensors({delta(program): noise.to(before.dtype)})


def applied(base: Program, name: str, **options: Any) -> Program:
    return rewriter.apply(base, TrainableTokens(token_indices=tokens(name), **options)).program


# -- what it adds and how it starts -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_the_token_table_is_found_and_outputs_keep_every_bit(name: str) -> None:
    base = traced(name)
    result = rewriter.apply(base, TrainableTokens(token_indices=tokens(name)))
    program, table = result.program, base.tensor(result.sites[0].weight)
    assert [site.path for site in result.sites] == [TABLES[name]]
    assert program.trainable == (f"{TABLES[name]}.trainable_tokens_delta.default",)
    assert torch.equal(program.tensor(delta(program)), table[list(tokens(name))])
    assert result.applied[0].trainable == len(tokens(name)) * table.shape[1]
    assert all(torch.equal(a, b) for a, b in zip(run(base, name), run(program, name), strict=True))
    back = rewriter.undo(randomised(program))
    assert rewriter.text(back) == rewriter.text(base)
    assert rewriter.diff(base, back).same


def test_a_table_by_name() -> None:
    pass_ = TrainableTokens(token_indices=(1,), targets=("token_type_embeddings",))
    program = rewriter.apply(traced("bert"), pass_).program
    assert program.trainable == ("embeddings.token_type_embeddings.trainable_tokens_delta.default",)


def test_a_random_start() -> None:
    one = applied(traced("gpt2"), "gpt2", init="normal", seed=4)
    two = applied(traced("gpt2"), "gpt2", init="normal", seed=5)
    rows = one.tensor(delta(one))
    assert not torch.equal(rows, two.tensor(delta(two)))
    assert 0.7 < float(rows.detach().std()) < 1.3
    assert TrainableTokens(token_indices=(1,), init="normal").law.kind == "free"


# -- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_tied", "t5", "conv"])
def test_training_time_and_merged_against_fp64_by_hand(name: str) -> None:
    base = traced_double(name)
    program = randomised(applied(base, name))
    model = TINY[name]()[0].double()
    table: Any = model.get_parameter(f"{TABLES[name]}.weight")
    with torch.no_grad():
        for row, token in enumerate(tokens(name)):
            table[token] = program.tensor(delta(program))[row]
        args, kwargs = example(name, double=True)
        expected = verify.outputs(model(*args, **kwargs))
    assert distance(run(base, name), expected) > 0.1
    assert distance(run(program, name), expected) < 1e-12
    merged = rewriter.apply(program, Merge()).program
    assert distance(run(merged, name), expected) < 1e-12
    assert operations(merged) == operations(base)
    assert merged.tied() == base.tied()
    assert torch.equal(merged.tensor(f"{TABLES[name]}.weight"), table)


def test_a_tied_head_follows() -> None:
    base = traced("llama_tied")
    program = randomised(applied(base, "llama_tied"))
    before, after = run(base, "llama_tied")[0], run(program, "llama_tied")[0]
    unused = [token for token in tokens("llama_tied") if token == 0]
    assert not torch.allclose(before[..., unused], after[..., unused])


def test_gradients_reach_the_rows_and_nothing_else() -> None:
    program = applied(traced("llama"), "llama")
    module = program.module()
    module(*example("llama")[0], **example("llama")[1]).logits.square().sum().backward()
    reached = {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == {delta(program)}
    (rows,) = (p.grad for name, p in module.named_parameters() if name == delta(program))
    assert rows is not None
    assert [bool(row.any()) for row in rows] == [True, True, False, True]  # row 0 is never read


def test_beside_a_lora() -> None:
    base = traced("llama")
    lora = Lora(targets=("q_proj", "embed_tokens"), rank=3, init="both", sigma=0.3)
    program = randomised(rewriter.apply(base, lora, TrainableTokens(token_indices=tokens("llama"))).program)
    merged = rewriter.apply(program, Merge()).program
    assert distance(run(merged, "llama"), run(program, "llama")) < 1e-5
    assert operations(merged) == operations(base)
    assert rewriter.diff(base, rewriter.undo(rewriter.undo(program))).same


# -- other tools --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "bert"])
def test_the_same_rows_give_what_peft_gives(name: str) -> None:
    config = TrainableTokensConfig(token_indices=list(tokens(name)))
    model = get_peft_model(TINY[name]()[0], config).eval()
    theirs = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {key.removeprefix("base_model.model.") for key in theirs} == {
        f"{TABLES[name]}.trainable_tokens_delta.default"
    }
    program = randomised(applied(traced(name), name))
    with torch.no_grad():
        for key, parameter in theirs.items():
            parameter.copy_(program.tensor(key.removeprefix("base_model.model.")))
        args, kwargs = example(name)
        expected = verify.outputs(model(*args, **kwargs))
    assert distance(run(traced(name), name), expected) > 0.1
    assert distance(run(program, name), expected) < 1e-5
    assert distance(run(rewriter.apply(program, Merge()).program, name), expected) < 1e-5


@pytest.mark.parametrize("name", ["llama_tied", "conv"])
def test_saved_loaded_and_exported(name: str, tmp_path: Path) -> None:
    program = randomised(applied(traced(name), name))
    loaded = rewriter.load(program.save(tmp_path / "program.pt2"))
    assert rewriter.diff(program, loaded).same
    assert rewriter.diff(traced(name), rewriter.undo(loaded)).same
    assert distance(run(rewriter.apply(loaded, Merge()).program, name), run(program, name)) < 1e-5
    report = export_onnx(program, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    args, kwargs = example(name)
    given = [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
    feeds = {key: value.numpy() for key, value in zip(report.inputs, given, strict=True)}
    found = [torch.from_numpy(value) for value in session.run(None, feeds)]
    assert distance(found, run(program, name)) < 1e-4


@pytest.mark.parametrize("name", ["llama_tied", "conv"])
def test_what_it_adds(name: str, golden: Callable[[str, str], None]) -> None:
    case = "trainable_tokens_tied" if name == "llama_tied" else "trainable_tokens"
    golden(f"{case}.diff", str(rewriter.diff(traced(name), applied(traced(name), name))))


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_indices": ()}, r"token_indices is \(\)"),
        ({"token_indices": 3}, "token_indices is 3"),
        ({"token_indices": (4, -1)}, "token index -1"),
        ({"token_indices": (True,)}, "token index True"),
        ({"token_indices": ("4",)}, "token index '4'"),
        ({"token_indices": (4, 7, 4)}, "token index 4 is given twice"),
        ({"token_indices": (4,), "init": "zeros"}, "init is 'zeros'"),
        ({"token_indices": (4,), "adapter": ""}, "adapter is ''"),
        ({"token_indices": (4,), "seed": 1.5}, r"seed is 1\.5"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainableTokens(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"token_indices": (4, 31)}, "31 is no row of model.embed_tokens"),
        ("vit", {}, "no token embedding"),
        ("llama", {"targets": ("lm_head",)}, "lm_head, which is a linear"),
        ("llama", {"targets": ("wte",)}, "'wte' matches no layer"),
    ],
)
def test_what_a_model_lacks_is_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rewriter.apply(traced(name), TrainableTokens(**{"token_indices": (4,), **options}))


def test_a_second_pass_on_the_same_program_is_refused_until_the_first_is_merged() -> None:
    program = randomised(applied(traced("gpt2"), "gpt2"))
    with pytest.raises(UsageError, match="trainable tokens already"):
        applied(program, "gpt2", adapter="second")
    merged = rewriter.apply(program, Merge()).program
    again = applied(merged, "gpt2", adapter="second")
    assert distance(run(again, "gpt2"), run(merged, "gpt2")) == 0
