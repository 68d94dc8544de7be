"""safetensors files, single and sharded: every byte accounted for before a tensor is mapped."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from rewriter.errors import RewriteError
from rewriter.formats.files import open_regular, unchanged
from rewriter.formats.json import parse_object, read_json
from rewriter.formats.sniff import ADVICE, Kind, sniff

HEADER_LIMIT_BYTES = 100_000_000
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_AGAIN = "Download it again."
_DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def check(path: Path) -> tuple[str, ...]:
    """The names of the tensors in a safetensors file, in file order, after reading its header alone.

    Raises `RewriteError` for a header that is cut off, too long, not strict JSON, holds a key twice, or describes
    tensors that overlap, leave holes, or need more or fewer bytes than the file has; and when there are no tensors.
    """
    with unchanged(path) as before, open_regular(path) as file:
        size = before.st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT_BYTES, size - 8):
            raise _not_safetensors(path, start, length, size)
        data = file.read(length)
    if not data.startswith(b"{"):
        raise _not_safetensors(path, start, length, size)
    header = parse_object(data, f"the header of {path}")
    _check_metadata(path, header.pop("__metadata__", {}))
    if not header:
        raise RewriteError(f"{path} contains no tensors", fix="Check what wrote it.")
    spans = sorted((*_span(path, name, entry), name) for name, entry in header.items())
    _check_spans(path, spans, size - 8 - length)
    return tuple(name for *_, name in spans)


def load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name, mapped from disk: one costs memory only when it is touched."""
    with unchanged(path):
        check(path)
        try:
            return dict(safetensors.torch.load_file(path, device="cpu"))
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
            raise RewriteError(f"{path} cannot be read", evidence=[str(error)], fix=_AGAIN) from None


def load_sharded(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint directory: `model.safetensors`, or the shards its index lists.

    Raises `RewriteError` when a shard is missing, when the index and the shards disagree about a tensor, or when the
    index names a file outside the directory.
    """
    if (directory / SINGLE).exists() or not (directory / INDEX).exists():
        return load(directory / SINGLE)
    placed = _weight_map(directory / INDEX)
    shards = {name: directory / name for name in dict.fromkeys(placed.values())}
    missing = [name for name, path in shards.items() if not path.exists()]
    if missing:
        what = f"{directory} lacks {len(missing)} of the {len(shards)} shards its index lists"
        raise RewriteError(what, evidence=missing[:8], fix="Download the missing files.")
    held: dict[str, str] = {}
    for shard, path in shards.items():
        for name in check(path):
            _check_placed(directory, name, shard, placed, held)
            held[name] = shard
    lost = [f"{name} ({shard})" for name, shard in placed.items() if name not in held]
    if lost:
        what = f"{len(lost)} tensors of the index are in no shard of {directory}"
        raise RewriteError(what, evidence=lost[:8], fix=_AGAIN)
    return {name: tensor for path in shards.values() for name, tensor in load(path).items()}


def _not_safetensors(path: Path, start: bytes, length: int, size: int) -> RewriteError:
    kind = sniff(path)
    if kind not in (Kind.SAFETENSORS, Kind.UNKNOWN, Kind.PICKLE):
        return RewriteError(f"{path} is {kind}", evidence=[f"expected {Kind.SAFETENSORS}"], fix=ADVICE[kind])
    if len(start) < 8:
        return RewriteError(f"{path} is incomplete: {size} bytes, a header needs more", fix=_AGAIN)
    if kind is Kind.SAFETENSORS and size - 8 < length <= HEADER_LIMIT_BYTES:
        what = f"{path} is incomplete: its header needs {length} bytes, {size - 8} are there"
        return RewriteError(what, fix=_AGAIN)
    evidence = [f"header length {length}, file {size} bytes, limit {HEADER_LIMIT_BYTES}"]
    return RewriteError(f"{path} is not a safetensors file", evidence=evidence, fix=_AGAIN)


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RewriteError(f"{path}: its metadata is not text by name", fix="Save the tensors again.")


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends, counted from the end of the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad_entry(path, name, f"its entry is {entry!r}"[:200])
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise _bad_entry(path, name, f"unknown type {dtype!r}"[:200])
    if not _are_sizes(shape):
        raise _bad_entry(path, name, f"impossible shape {shape!r}"[:200])
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _bad_entry(path, name, f"impossible place {offsets!r}"[:200])
    begin, end = offsets
    bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if bits != (end - begin) * 8:
        raise _bad_entry(path, name, f"{dtype}{shape} needs {math.ceil(bits / 8)} bytes, {end - begin} are given"[:300])
    return begin, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _bad_entry(path: Path, name: str, reason: str) -> RewriteError:
    return RewriteError(f"{path}: the tensor {name!r} is described wrongly", evidence=[reason], fix=_AGAIN)


def _check_spans(path: Path, spans: list[tuple[int, int, str]], held_bytes: int) -> None:
    expected = 0
    for begin, end, name in spans:
        if begin != expected:
            relation = (
                "overlaps the one before it" if begin < expected else f"leaves a hole of {begin - expected} bytes"
            )
            raise _bad_entry(path, name, f"bytes {begin} to {end}: it {relation}")
        expected = end
    if expected > held_bytes:
        evidence = [f"expected {expected} bytes of tensors, {held_bytes} are there"]
        raise RewriteError(f"{path} is incomplete", evidence=evidence, fix=_AGAIN)
    if expected < held_bytes:
        evidence = [f"expected {expected} bytes of tensors, {held_bytes} are there"]
        raise RewriteError(f"{path} has trailing bytes that belong to no tensor", evidence=evidence, fix=_AGAIN)


def _weight_map(path: Path) -> dict[str, str]:
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise RewriteError(f"{path} has no map of tensor names to files", fix=_AGAIN)
    for name, shard in placed.items():
        if shard in ("", ".", "..") or set(shard) & set("/\\:\0"):
            evidence = [f"{name} -> {shard!r}"]
            raise RewriteError(f"{path} names a file outside its directory", evidence=evidence, fix="Do not use it.")
    return placed


def _check_placed(directory: Path, name: str, shard: str, placed: dict[str, str], held: dict[str, str]) -> None:
    if name in held:
        raise RewriteError(f"{directory}: the tensor {name} is in both {held[name]} and {shard}", fix=_AGAIN)
    if name not in placed:
        raise RewriteError(f"{directory}: the tensor {name} in {shard} is not in the index", fix=_AGAIN)
    if placed[name] != shard:
        what = f"{directory}: the index places the tensor {name} in {placed[name]}, it is in {shard}"
        raise RewriteError(what, fix=_AGAIN)
