"""safetensors files: every byte is accounted for, shards and index agree."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rewriter.errors import RewriteError
from rewriter.formats import safetensors as module
from rewriter.formats.safetensors import check, load, load_sharded

GIVE_UP = [HealthCheck.function_scoped_fixture]


def raw(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_tensors_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "weights.pt"
    tensors = {"a": torch.randn(3, 5).to(dtype), "empty": torch.zeros(0, 4, dtype=dtype), "b": torch.ones(()).to(dtype)}
    save_file(tensors, path, metadata={"format": "pt"})
    assert set(check(path)) == set(tensors)
    for name, tensor in load(path).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor.float(), tensors[name].float())


W = entry("F32", [3, 5], 0, 60)
REFUSED: list[tuple[str, bytes, str]] = [
    ("empty", b"", "is an empty file"),
    ("seven bytes", bytes(7), "incomplete: 7 bytes"),
    ("length 0", bytes(8) + bytes(20), "not a safetensors file"),
    ("header past the end", raw({"w": W})[:30], "incomplete: its header needs"),
    ("length 2^63", raw({"w": W}, length=2**63), "not a safetensors file"),
    ("length over the limit", raw({"w": W}, length=100_000_001), "not a safetensors file"),
    ("not JSON", raw(b"{not json at all}"), "not valid JSON"),
    ("list", raw(b"[1, 2, 3, 4]"), "not a safetensors file"),
    ("bad UTF-8", raw(b'{"\xff\xfe": 1}'), "not UTF-8"),
    ("nesting", raw(b'{"a":' * 200_000), "nested too deeply"),
    ("NaN", raw(b'{"a": NaN}'), "NaN"),
    ("duplicate key", raw(b'{"w": %b, "w": %b}' % (2 * (json.dumps(W).encode(),)), bytes(60)), "'w' appears twice"),
    ("no tensors", raw({}), "contains no tensors"),
    ("only metadata", raw({"__metadata__": {"format": "pt"}}), "contains no tensors"),
    ("metadata not text", raw({"__metadata__": {"a": 1}, "w": W}, bytes(60)), "metadata is not text"),
    ("cut", raw({"w": W}, bytes(59)), "expected 60 bytes of tensors, 59 are there"),
    ("trailing", raw({"w": W}, bytes(61)), "trailing bytes"),
    ("hole", raw({"w": W, "v": entry("U8", [4], 61, 65)}, bytes(65)), "leaves a hole of 1 bytes"),
    ("hole at the start", raw({"w": entry("U8", [4], 2, 6)}, bytes(6)), "leaves a hole of 2 bytes"),
    ("overlap", raw({"w": W, "v": entry("U8", [4], 58, 62)}, bytes(62)), "overlaps"),
    ("shape", raw({"w": entry("F32", [3, 4], 0, 60)}, bytes(60)), "needs 48 bytes, 60 are given"),
    ("negative", raw({"w": entry("F32", [-3, -5], 0, 60)}, bytes(60)), "impossible shape"),
    ("overflow", raw({"w": entry("F32", [2**62, 4], 0, 0)}), "needs 73786976294838206464 bytes"),
    ("fraction", raw({"w": entry("F32", [1.5], 0, 6)}, bytes(6)), "impossible shape"),
    ("boolean size", raw({"w": entry("F32", [True], 0, 4)}, bytes(4)), "impossible shape"),
    ("backwards", raw({"w": entry("U8", [4], 4, 0)}, bytes(4)), "are given"),
    ("type", raw({"w": entry("F128", [3], 0, 48)}, bytes(48)), "unknown type 'F128'"),
    ("entry", raw({"w": [1, 2]}), "described wrongly"),
    ("extra field", raw({"w": {**W, "more": 1}}, bytes(60)), "described wrongly"),
    ("page", b"<!DOCTYPE html><html>Sign in to continue</html>", "is an HTML page"),
    ("message", b"Entry not found, check the name", "is a text file"),
    ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "git lfs pull"),
    ("GGUF", b"GGUF\3" + bytes(40), "is a GGUF file"),
]


@pytest.mark.parametrize(("data", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_bad_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    for act in (check, load):
        with pytest.raises(RewriteError) as caught:
            act(path)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)
        assert caught.value.fix


@settings(max_examples=60, suppress_health_check=GIVE_UP, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_refused(tmp_path: Path, place: float) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(3, 5), "b": torch.randn(7)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(place * len(data))])
    with pytest.raises(RewriteError):
        load(path)


@settings(max_examples=200, suppress_health_check=GIVE_UP, deadline=None)
@given(
    header=st.recursive(
        st.none() | st.integers() | st.text(max_size=5) | st.sampled_from(["F32", "U8"]),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "w", "__metadata__"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    ),
    data=st.binary(max_size=20),
)
def test_any_header_gives_tensors_or_a_clear_error(tmp_path: Path, header: Any, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(json.dumps(header).encode(), data))
    try:
        assert load(path)
    except RewriteError as error:
        assert str(error).count("\n") < 4  # noqa: PT017 - either end is right


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(3, 5)}, path)
    original = module.check

    def slow(path: Path) -> tuple[str, ...]:
        names = original(path)
        os.utime(path, ns=(1, 1))
        return names

    monkeypatch.setattr(module, "check", slow)
    with pytest.raises(RewriteError, match="changed while it was read"):
        load(path)


# -- shards -------------------------------------------------------------------------------------------------------

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(2, 4)}
PLACED = {"a": FIRST, "b": SECOND, "c": SECOND}


def shard(directory: Path, placed: dict[str, Any], **files: tuple[str, ...]) -> None:
    for file, names in {FIRST: files.get("first", ("a",)), SECOND: files.get("second", ("b", "c"))}.items():
        if names:
            save_file({name: TENSORS[name] for name in names}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def test_shards_come_together(tmp_path: Path) -> None:
    shard(tmp_path, PLACED)
    loaded = load_sharded(tmp_path)
    assert set(loaded) == set(TENSORS)
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


def test_shards_may_be_links(tmp_path: Path) -> None:
    """The Hugging Face cache keeps links to files of other names."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file(TENSORS, tmp_path / "blobs" / "1f3a")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/1f3a")
    assert set(load_sharded(tmp_path / "snapshot")) == set(TENSORS)


BAD_SHARDS: list[tuple[str, Callable[[Path], None], str]] = [
    ("missing shard", lambda path: shard(path, PLACED, second=()), f"lacks 1 of the 2 shards.*\n.*{SECOND}"),
    ("not in the map", lambda path: shard(path, {"a": FIRST, "b": SECOND}), "tensor c in .* is not in the index"),
    ("in no shard", lambda path: shard(path, PLACED, second=("b",)), "in no shard.*\n.*c \\("),
    ("in two shards", lambda path: shard(path, PLACED, second=("a", "b", "c")), "tensor a is in both"),
    (
        "in another shard",
        lambda path: shard(path, {**PLACED, "a": SECOND}, second=("b", "c")),
        "in no shard.*\n.*a \\(",
    ),
    ("swapped", lambda path: shard(path, {"a": SECOND, "b": FIRST, "c": SECOND}), "places the tensor b in"),
    ("parent", lambda path: shard(path, {**PLACED, "a": "../x.safetensors"}), "outside its directory"),
    ("absolute", lambda path: shard(path, {**PLACED, "a": "/etc/passwd"}), "outside its directory"),
    ("drive", lambda path: shard(path, {**PLACED, "a": "C:\\x"}), "outside its directory"),
    ("number", lambda path: shard(path, {**PLACED, "a": 1}), "no map of tensor names"),
    ("empty map", lambda path: shard(path, {}), "no map of tensor names"),
    ("nothing there", lambda path: None, "model.safetensors does not exist"),
]


@pytest.mark.parametrize(("write", "message"), [row[1:] for row in BAD_SHARDS], ids=[row[0] for row in BAD_SHARDS])
def test_shards_that_disagree_are_refused(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path)
    with pytest.raises(RewriteError, match=message):
        load_sharded(tmp_path)
