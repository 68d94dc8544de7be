"""What a path holds is decided from content; what cannot be read fails at once."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rewriter.errors import RewriteError
from rewriter.formats.json import read_json
from rewriter.formats.sniff import ADVICE, Kind, require, sniff


def _program(path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(torch.export.export(torch.nn.Linear(3, 5), (torch.randn(2, 3),)), file)


def _onnx(path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [value])
    path.write_bytes(onnx.helper.make_model(graph, producer_name="test").SerializeToString())


def _torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 5)), path)


def _graph_module(path: Path) -> None:
    torch.save(torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(3, 5))), path)


def _legacy(path: Path) -> None:
    torch.save({"w": torch.randn(3, 5)}, path, _use_new_zipfile_serialization=False)


def _zip_of(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "1")

    return write


def _bytes(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def _directory(**files: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        for name, text in files.items():
            (path / f"{name}.json").write_text(text)

    return write


CONTENTS: list[tuple[Kind, Callable[[Path], None]]] = [
    (Kind.PROGRAM, _program),
    (Kind.OLD_PROGRAM, _zip_of("serialized_exported_program.json")),
    (Kind.STATE_DICT, lambda path: torch.save({"w": torch.randn(3, 5)}, path)),
    (Kind.LEGACY_PICKLE, _legacy),
    (Kind.PICKLED_MODULE, lambda path: torch.save(torch.nn.Linear(3, 5), path)),
    (Kind.PICKLED_MODULE, _graph_module),
    (Kind.PICKLE, _bytes(b"\x80\x04K\x01.")),
    (Kind.TORCHSCRIPT, _torchscript),
    (Kind.SAFETENSORS, lambda path: save_file({"w": torch.randn(3, 5)}, path)),
    (Kind.GGUF, _bytes(b"GGUF\3\0\0\0" + bytes(16))),
    (Kind.NPZ, lambda path: numpy.savez(path.open("wb"), w=numpy.ones(3))),
    (Kind.NPY, lambda path: numpy.save(path.open("wb"), numpy.ones(3))),
    (Kind.HDF5, _bytes(b"\x89HDF\r\n\x1a\n" + bytes(32))),
    (Kind.ONNX, _onnx),
    (Kind.ORT_ADAPTER, _bytes(b"\x20\0\0\0TORT" + bytes(32))),
    (Kind.LFS_POINTER, _bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")),
    (Kind.HTML, _bytes(b"\n<!DOCTYPE html><html><body>Sign in</body></html>")),
    (Kind.HTML, _bytes(b'<?xml version="1.0"?>\n<html></html>')),
    (Kind.JSON, _bytes(b'{"error": "not found"}')),
    (Kind.TEXT, _bytes("Entry not found, désolé ".encode() * 400)),
    (Kind.ZIP, _zip_of("readme.txt")),
    (Kind.EMPTY, _bytes(b"")),
    (Kind.UNKNOWN, _bytes(bytes(range(200, 256)) + bytes(40))),
    (Kind.HUGGINGFACE, _directory(config="{}")),
    (Kind.PEFT_ADAPTER, _directory(adapter_config='{"peft_type": "LORA"}')),
    (Kind.ADAPTERHUB, _directory(adapter_config='{"config": {}, "version": "adapters.1.3.0"}')),
    (Kind.ADAPTERHUB, _directory(adapter_setup="{}")),
    (Kind.DIRECTORY, _directory(notes="{}")),
]


def test_every_kind_has_an_example_and_advice() -> None:
    assert {kind for kind, _ in CONTENTS} == set(Kind) == set(ADVICE)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "-a b\nü.onnx", "n" * 255])
@pytest.mark.parametrize(("kind", "write"), CONTENTS, ids=[kind.name for kind, _ in CONTENTS])
def test_content_decides_and_not_the_name(tmp_path: Path, kind: Kind, write: Callable[[Path], None], name: str) -> None:
    path = tmp_path / name
    plain = tmp_path / "plain"  # not every writer takes every name
    write(plain)
    plain.rename(path)
    assert sniff(path) is kind
    assert require(path, kind) is kind
    other = Kind.ONNX if kind is not Kind.ONNX else Kind.PROGRAM
    with pytest.raises(RewriteError) as caught:
        require(path, other)
    assert str(kind) in str(caught.value)
    assert caught.value.fix == ADVICE[kind]
    assert caught.value.exit_code == (3 if kind in (Kind.PICKLED_MODULE, Kind.PICKLE) else 1)


def _loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _cut_zip(path: Path) -> Path:
    torch.save({"w": torch.randn(300, 5)}, path)
    path.write_bytes(path.read_bytes()[:1000])
    return path


def _bad_adapter(path: Path) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text('{"r": 8}')
    return path


UNREADABLE: list[tuple[Callable[[Path], Path], str]] = [
    (lambda path: path, "does not exist"),
    (lambda path: path / "deeper" / "x", "does not exist"),
    (_loop, "leads back to itself"),
    (_fifo, "is a pipe"),
    (lambda path: Path("/dev/zero"), "is a device"),
    (lambda path: path.with_name("x" * 300), "cannot be opened"),
    (lambda path: path.with_name("a\0b"), "cannot be opened"),
    (_cut_zip, "truncated or damaged zip"),
    (_bad_adapter, "neither a PEFT nor an AdapterHub"),
]


@pytest.mark.parametrize(("make", "message"), UNREADABLE, ids=[message for _, message in UNREADABLE])
def test_what_cannot_be_read_fails_at_once(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(RewriteError, match=message) as caught:
        sniff(make(tmp_path / "model.pt"))
    assert caught.value.exit_code == 1
    assert caught.value.fix


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").touch()
    with pytest.raises(RewriteError) as caught:
        sniff(tmp_path / "modle.pt2")
    assert str(tmp_path / "model.pt2") in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(RewriteError, match="may not be read"):
        sniff(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    start=st.sampled_from(
        [b"", b"PK\x03\x04", b"\x08\x08", b"\x80\x02", b"\x08\0\0\0\0\0\0\0{", b"{", b"\xef\xbb\xbf"]
    ),
    rest=st.binary(max_size=300),
)
def test_any_bytes_give_a_kind_or_a_clear_error(tmp_path: Path, start: bytes, rest: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(start + rest)
    with suppress(RewriteError):
        assert isinstance(sniff(path), Kind)


BAD_JSON = [
    (b"", "is empty"),
    (b"[]", "holds a list"),
    (b"3", "holds a single value"),
    (b'{"r": 8,}', "line 1, column"),
    (b'{"r": NaN}', "NaN is not a JSON number"),
    (b'{"r": -Infinity}', "-Infinity is not a JSON number"),
    (b"\xef\xbb\xbf{}", "byte order mark"),
    (b'{"r": 8, "r": 9}', "'r' appears twice"),
    (b'{"a": {"r": 8, "r": 9}}', "'r' appears twice"),
    (b'{"r": "\xff"}', "not UTF-8"),
    (b'{"a":' * 200_000, "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b'{"a": "' + b"x" * 2000 + b'"}', "too large"),
]


@pytest.mark.parametrize(("data", "message"), BAD_JSON, ids=[message for _, message in BAD_JSON])
def test_json_is_read_strictly(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(RewriteError) as caught:
        read_json(path, limit_bytes=1999 if message == "too large" else 2_000_000)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_good_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"r": 8, "ü": [1.5, null]}', encoding="utf-8")
    assert read_json(path) == {"r": 8, "ü": [1.5, None]}
