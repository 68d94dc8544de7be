"""`rewriter.load`: whatever a user calls a model, told apart by content."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rewriter.errors import RewriteError, UnsafeError, UsageError
from rewriter.load import load
from rewriter.program import Program
from tests.models import TINY, Perceptron, traced

FACTORIES = """
import torch

from tests.models import TINY, Perceptron


def module_and_args():
    module, args, kwargs = TINY["mlp"]()
    return module, args


def module_and_kwargs():
    module, args, kwargs = TINY["mlp"]()
    return module, (), {"x": args[0]}


def empty():
    torch.manual_seed(99)
    return Perceptron(), (torch.randn(3, 5, 10),)


def alone():
    return Perceptron()


def transformer():
    return TINY["bert"]()[0]


def number():
    return 7


def broken():
    raise ValueError("no such luck")


class Namespace:
    build = staticmethod(module_and_args)


value = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of factories in the working directory."""
    name = "factories_of_a_user"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("load") / "bert"
    model: Any = TINY["bert"]()[0]
    model.save_pretrained(directory)
    return directory


def x() -> torch.Tensor:
    return torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(3))


def same(program: Program) -> None:
    torch.testing.assert_close(program(x()), traced("mlp")(x()))


@pytest.mark.parametrize("name", ["program.pt", "program.pt2", "program", "program.safetensors"])
def test_a_program_under_any_name(tmp_path: Path, name: str) -> None:
    traced("mlp").save(tmp_path / name)
    same(load(tmp_path / name))
    same(load(str(tmp_path / name), verify=False))


def test_a_hugging_face_directory(bert: Path) -> None:
    program = load(bert)
    assert program.metadata["huggingface"]["directory"] == "bert"
    ids = torch.randint(3, 37, (2, 8))
    given = load(bert, inputs={"input_ids": ids})
    assert [node.name for node in given.inputs()] == ["input_ids"]
    positional = load(bert, inputs=(ids,))
    torch.testing.assert_close(positional(ids).pooler_output, given(input_ids=ids).pooler_output)


@pytest.mark.parametrize("function", ["module_and_args", "Namespace.build"])
def test_a_factory(factories: str, function: str) -> None:
    same(load(f"{factories}:{function}"))


def test_a_factory_with_named_inputs_with_none_and_with_a_transformers_model(factories: str) -> None:
    named = load(f"{factories}:module_and_kwargs")
    torch.testing.assert_close(named(x=x()), traced("mlp")(x()))
    assert load(f"{factories}:alone", inputs=(x(),))(x()).shape == (4, 6, 7)
    assert load(f"{factories}:transformer").metadata["huggingface"]["architecture"] == "BertModel"


def test_a_factory_in_another_type(factories: str) -> None:
    program = load(f"{factories}:module_and_args", dtype=torch.float64)
    assert {t.dtype for t in program.parameters().values()} == {torch.float64}


@pytest.mark.parametrize(
    ("function", "error", "text"),
    [
        ("alone", RewriteError, r"example inputs"),
        ("number", RewriteError, r"returned int"),
        ("broken", RewriteError, r"raise ValueError\(\"no such luck\"\)"),
        ("broken", RewriteError, r"factories_of_a_user\.py:\d+"),
        ("brokem", UsageError, r"similar: broken"),
        ("value", UsageError, r"cannot be called: int"),
    ],
)
def test_factories_that_cannot_be_used(factories: str, function: str, error: type[RewriteError], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        load(f"{factories}:{function}")
    assert type(caught.value) is error


def test_a_module_that_does_not_exist_or_fails(factories: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no module 'factories_of_nobody'"):
        load("factories_of_nobody:build")
    (tmp_path / "fails_on_import.py").write_text("import json\nimport factories_of_nobody\n")
    with pytest.raises(RewriteError, match=r"fails_on_import\.py:2: import factories_of_nobody"):
        load("fails_on_import:build")


# -- weights of a model given apart -------------------------------------------------------------------------------


def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in TINY["mlp"]()[0].state_dict().items()}


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy", "wrapped"])
def test_a_state_dict_with_its_model(factories: str, tmp_path: Path, form: str) -> None:
    file = tmp_path / "weights.bin"
    if form == "safetensors":
        save_file(weights(), file)
    else:
        held = {"state_dict": weights()} if form == "wrapped" else weights()
        torch.save(held, file, _use_new_zipfile_serialization=form != "legacy")
    same(load(file, model=f"{factories}:empty"))
    with pytest.raises(RewriteError, match="--model"):
        load(file)


def test_a_state_dict_for_a_hugging_face_directory(bert: Path, tmp_path: Path) -> None:
    model: Any = TINY["bert"]()[0]
    tensors = {name: tensor * 1.25 for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "weights.pt")
    program = load(tmp_path / "weights.pt", model=str(bert))
    assert torch.equal(program.tensor("pooler.dense.weight"), tensors["pooler.dense.weight"])
    tensors.pop("pooler.dense.weight")
    save_file(tensors, tmp_path / "less.pt")
    with pytest.raises(RewriteError, match=r"missing: pooler\.dense\.weight"):
        load(tmp_path / "less.pt", model=str(bert))


def test_a_state_dict_must_fit_its_model(factories: str, tmp_path: Path) -> None:
    tensors = weights()
    tensors["extra"] = tensors.pop("down.weight")
    tensors["up.bias"] = torch.ones(5)
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(RewriteError, match="do not fit Perceptron") as caught:
        load(tmp_path / "weights.safetensors", model=f"{factories}:empty")
    assert caught.value.evidence == (
        "missing: down.weight",
        "unexpected: extra",
        "up.bias: [5] given, [22] in the model",
    )


@pytest.mark.parametrize("option", [{"model": "a:b"}, {"inputs": (1,)}, {"dtype": torch.float16}])
def test_options_that_mean_nothing_for_a_program(tmp_path: Path, option: dict[str, Any]) -> None:
    traced("mlp").save(tmp_path / "program.pt")
    with pytest.raises(UsageError, match=next(iter(option))):
        load(tmp_path / "program.pt", **option)


# -- what cannot be used ------------------------------------------------------------------------------------------


class Sentinel:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_pickled_module_needs_trust_and_inputs(tmp_path: Path) -> None:
    file = tmp_path / "module.pt"
    torch.save(TINY["mlp"]()[0], file)
    with pytest.raises(UnsafeError, match="--trust-pickle"):
        load(file)
    with pytest.raises(RewriteError, match="example inputs"):
        load(file, trust_pickle=True)
    same(load(file, trust_pickle=True, inputs=(x(),)))
    assert isinstance(TINY["mlp"]()[0], Perceptron)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_is_executed(factories: str, tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"w": Sentinel(tmp_path / "sentinel")}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(RewriteError):
        load(file)
    with pytest.raises(UnsafeError):
        load(file, model=f"{factories}:empty")
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git lfs pull"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"\x93NUMPY\x01\0", "a NumPy .npy array"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"PK\x03\x04" + bytes(40), "truncated or damaged zip"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(RewriteError, match=text):
        load(tmp_path / "model.pt")


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(RewriteError, match=r"similar: .*model\.pt"):
        load(tmp_path / "modle.pt")
    with pytest.raises(RewriteError, match="without config"):
        load(tmp_path)


def test_a_module_in_memory_is_for_trace() -> None:
    with pytest.raises(UsageError, match="got Linear") as caught:
        load(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    assert "rewriter.trace" in str(caught.value)
