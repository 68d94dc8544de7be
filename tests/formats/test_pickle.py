"""Checkpoints of torch: tensors come out, code does not run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rewriter.errors import RewriteError, UnsafeError
from rewriter.formats.pickle import load_pickled_module, load_state_dict

SENTINEL = "EXECUTED"
TENSORS = {"a.weight": torch.randn(3, 5), "a.bias": torch.arange(7), "scale": torch.tensor(2.5)}


class Payload:
    """Unpickling one creates the sentinel file in the working directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {SENTINEL}",)


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path(SENTINEL).exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_tensors_come_back(tmp_path: Path, zipped: bool, wrap: str | None) -> None:
    path = tmp_path / "weights.onnx"
    value = TENSORS if wrap is None else {wrap: TENSORS, "epoch": 3}
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    loaded = load_state_dict(path)
    assert list(loaded) == list(TENSORS)
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("value", [Payload(), {"a": Payload()}, {"a": torch.ones(3), "b": [Payload()]}])
def test_code_is_refused(tmp_path: Path, zipped: bool, value: object) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    for act in (load_state_dict, lambda path: load_pickled_module(path, trust_pickle=False)):
        with pytest.raises(UnsafeError, match="pickle") as caught:
            act(path)
        assert caught.value.exit_code == 3
        assert "--trust-pickle" in caught.value.fix
    with pytest.raises(UnsafeError, match="system"):
        load_state_dict(path)


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (torch.nn.Sequential(torch.nn.Linear(3, 5)), "torch.nn.modules.linear.Linear"),
        (torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(3, 5))), "torch.fx.graph_module"),
    ],
)
def test_a_pickled_module_needs_trust(tmp_path: Path, module: torch.nn.Module, named: str) -> None:
    path = tmp_path / "model.pt"
    torch.save(module, path)
    for act in (load_state_dict, lambda path: load_pickled_module(path, trust_pickle=False)):
        with pytest.raises(UnsafeError) as caught:
            act(path)
        assert named in str(caught.value)
    loaded = load_pickled_module(path, trust_pickle=True)
    x = torch.randn(2, 3)
    torch.testing.assert_close(loaded(x), module(x))


def _saved(value: object) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def _cut(path: Path) -> None:
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-9])


def _malformed(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}q\x00(X\x05")


def _flipped(path: Path) -> None:
    torch.save({"a": torch.zeros(40, 9)}, path)
    data = path.read_bytes()
    place = data.index(bytes(200)) + 100
    path.write_bytes(data[:place] + b"\1" + data[place + 1 :])


REFUSED: list[tuple[str, Callable[[Path], None], str]] = [
    ("empty", lambda path: path.touch(), "is an empty file"),
    ("page", lambda path: path.write_text("<html>Sign in</html>") and None, "is an HTML page"),
    ("cut legacy file", _cut, "cannot be read as a torch checkpoint"),
    ("malformed pickle", _malformed, "malformed pickle|cannot be read"),
    ("flipped bit", _flipped, "checksum"),
    ("other entries", _saved({"a": torch.ones(3), "epoch": 3}), "'epoch': int"),
    ("tensor", _saved(torch.ones(3)), "holds a Tensor"),
    ("list", _saved([torch.ones(3)]), "holds a list"),
    ("numbers as names", _saved({1: torch.ones(3)}), "1: Tensor"),
    ("nothing", _saved({}), "contains no tensors"),
    ("two wrappers", _saved({"model": TENSORS, "state_dict": TENSORS}), "'model': dict"),
]


@pytest.mark.parametrize(("write", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_other_content_is_refused(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "weights.pt"
    write(path)
    with pytest.raises(RewriteError, match=message) as caught:
        load_state_dict(path)
    assert caught.value.exit_code == 1


def test_plain_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps({"a": Payload()}))
    with pytest.raises(UnsafeError, match="plain Python pickle"):
        load_state_dict(path)


def test_trusted_files_that_hold_no_module(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(TENSORS, path)
    with pytest.raises(RewriteError, match="holds a dict, not a module"):
        load_pickled_module(path, trust_pickle=True)


def test_a_class_that_cannot_be_found(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Linear(3, 5), path)
    data = path.read_bytes().replace(b"torch.nn.modules.linear", b"torch.nn.modules.lineal")
    path.write_bytes(data)
    with pytest.raises(RewriteError, match="needs a class that is missing"):
        load_pickled_module(path, trust_pickle=True, verify=False)
