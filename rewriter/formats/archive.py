"""Reading zip archives that torch wrote: complete, unaltered, and without a byte that could turn into executed code."""

from __future__ import annotations

import io
import json
import logging
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from rewriter.errors import RewriteError, UnsafeError
from rewriter.formats.files import open_regular, unchanged
from rewriter.formats.program_code import check_model, named_types
from rewriter.formats.sniff import Kind, require, truncated

if TYPE_CHECKING:
    import torch

MEMBER_LIMIT = 100_000
_END_BYTES = 22


def check_zip(path: Path, *, verify: bool = True) -> None:
    """Refuse an archive that is cut off, altered, compressed, or whose member names lead elsewhere or are ambiguous.

    `verify=False` skips the checksums, which need all bytes to be read. Raises `RewriteError`.
    """
    with unchanged(path), open_regular(path) as file:
        _check_ends(path, file.read(4), _last_bytes(file))
        with _zip(path, file) as archive:
            _check_members(path, archive.infolist(), path.stat().st_size)
            if verify:
                _check_sums(path, archive)


def check_pt2(path: Path, *, verify: bool = True, trust_pickle: bool = False) -> None:
    """Refuse a `.pt2` archive which `torch.export.load` could only open by executing something from it.

    torch reads nested pickles without restriction when the restricted reader fails, so this must run before it.
    Raises `UnsafeError` for pickles, compiled code and code in the graph's texts (unless `trust_pickle`), and
    `RewriteError` for damage.
    """
    require(path, Kind.PROGRAM)
    check_zip(path, verify=verify)
    with unchanged(path), open_regular(path) as file, _zip(path, file) as archive:
        if not trust_pickle:
            for member in archive.infolist():
                _check_member(path, archive, member)


def load_exported_program(
    path: Path, *, verify: bool = True, trust_pickle: bool = False
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """The program in a `.pt2` archive of any name, and the archive's extra files by name.

    Raises what `check_pt2` raises, and `RewriteError` when torch cannot read the program.
    """
    import torch

    import runtime.nf4_linear  # noqa: F401 - registers the operators that a program of ours may hold

    with unchanged(path):
        check_pt2(path, verify=verify, trust_pickle=trust_pickle)
        _register_types(path)
        # torch replaces an empty dictionary by one of its own, which the caller would never see.
        extra_files = {"": ""}
        with open_regular(path) as file, _quiet():
            try:
                program = torch.export.load(file, extra_files=extra_files)
            except Exception as error:  # torch raises every kind of error for a bad archive
                raise RewriteError(
                    f"{path} cannot be loaded by torch {torch.__version__}",
                    evidence=[f"{type(error).__name__}: {_last_line(error)}"],
                    fix="Export it again with this version of torch; a custom operator must be imported first.",
                ) from error
    return program, {name: text for name, text in extra_files.items() if name}


def _check_ends(path: Path, start: bytes, end: bytes) -> None:
    # Bytes before the first member, after the directory or in its comment let two readers see two archives.
    if start != b"PK\x03\x04" or not end.startswith(b"PK\x05\x06") or struct.unpack("<H", end[20:22]) != (0,):
        raise truncated(path, zipfile.BadZipFile("it does not start with a member and end with the directory"))


def _last_bytes(file: Any) -> bytes:
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _END_BYTES))
    return bytes(file.read(_END_BYTES)).ljust(_END_BYTES, b"\xff")


@contextmanager
def _zip(path: Path, file: Any) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, UnicodeDecodeError) as error:
        raise truncated(path, error) from None


def _check_members(path: Path, members: list[zipfile.ZipInfo], size_bytes: int) -> None:
    fix = "Do not use this file; get it again from a source you trust."
    if len(members) > MEMBER_LIMIT:
        raise RewriteError(f"{path} has {len(members)} members, the limit is {MEMBER_LIMIT}", fix=fix)
    seen: set[str] = set()
    for member in members:
        problem = _name_problem(member)
        # torch looks members up without regard to case.
        if problem is None and member.filename.casefold() in seen:
            problem = "appears twice"
        if problem is None and (member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1):
            problem = "is compressed or encrypted, which torch never writes"
        if problem:
            raise RewriteError(f"{path}: the member {member.filename!r} {problem}", fix=fix)
        seen.add(member.filename.casefold())
    promised = sum(member.file_size for member in members)
    if promised > size_bytes:
        evidence = [f"members: {promised} bytes, file: {size_bytes} bytes"]
        raise RewriteError(f"{path} unpacks to more than it holds", evidence=evidence, fix=fix)


def _name_problem(member: zipfile.ZipInfo) -> str | None:
    name = member.orig_filename
    if "\0" in name or "\\" in name:
        return "has a name with a backslash or a zero byte"
    if name.startswith("/") or name[1:2] == ":":
        return "has an absolute name"
    return "leads out of the archive" if ".." in PurePosixPath(name).parts else None


def _check_sums(path: Path, archive: zipfile.ZipFile) -> None:
    bad = archive.testzip()
    if bad is not None:
        raise RewriteError(
            f"{path} is damaged: the checksum of {bad} does not match",
            fix="Download it again, or pass --no-verify if it was written without checksums.",
        )


def _check_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    # torch looks members up without regard to case, so names are compared in lower case.
    root, _, name = member.filename.lower().partition("/")
    if not name or root == "":
        raise UnsafeError(f"{path}: the member {member.filename!r} lies outside the program", fix=_FIX)
    if name.startswith(("data/aotinductor/", "data/executorch/", "data/mtia")):
        raise UnsafeError(f"{path} contains compiled code ({member.filename})", fix=_FIX)
    if name.startswith(("data/weights/", "data/constants/")) and name.endswith("_config.json"):
        _check_payload(path, member, _json(path, archive, member))
    elif name.startswith("data/") and name.endswith(".pt"):
        _check_pickle(path, member, archive.read(member))
    elif name.startswith("models/"):
        check_model(path, _json(path, archive, member))


_FIX = "If you trust its author, add --trust-pickle; else ask for a program saved by torch.export without pickles."


def _check_payload(path: Path, member: zipfile.ZipInfo, config: Any) -> None:
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise RewriteError(f"{path}: {member.filename} is not a list of tensors", fix="Export the program again.")
    for name, entry in entries.items():
        kind = entry.get("path_name") if isinstance(entry, dict) else None
        # Constants are unpickled by the prefix of their file, whatever `use_pickle` says.
        if not isinstance(kind, str) or entry.get("use_pickle") is not False or not kind.startswith(_TENSOR_PREFIXES):
            raise UnsafeError(f"{path}: the tensor {name} is stored as a pickle ({member.filename})", fix=_FIX)


_TENSOR_PREFIXES = ("weight_", "tensor_")


def _check_pickle(path: Path, member: zipfile.ZipInfo, data: bytes) -> None:
    import torch

    if not data:
        return
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever stops the restricted reader makes torch use the other one
        evidence = _first_globals(data) or [_last_line(error)]
        raise UnsafeError(
            f"{path}: {member.filename} is a pickle that may execute code", evidence=evidence, fix=_FIX
        ) from None


def _first_globals(data: bytes) -> list[str]:
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        return [f"it calls {name}" for name in sorted(get_unsafe_globals_in_checkpoint(io.BytesIO(data)))[:8]]
    except Exception:  # noqa: BLE001 - only evidence: a malformed pickle is refused without it
        return []


def _json(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    # Read as torch reads it: a stricter reader could see something else than what is then loaded.
    try:
        return json.loads(archive.read(member))
    except (ValueError, RecursionError) as error:
        raise RewriteError(
            f"{path}: {member.filename} is not valid JSON", evidence=[str(error)], fix="Export the program again."
        ) from None


def _register_types(path: Path) -> None:
    """Make the output and cache types of transformers known to torch: their classes register themselves on import."""
    with open_regular(path) as file, _zip(path, file) as archive:
        models = [member for member in archive.infolist() if "/models/" in member.filename]
        types = {name for member in models for name in named_types(_json(path, archive, member))}
    for name in sorted(types):
        _register_type(path, *name)


def _register_type(path: Path, module_name: str, class_name: str) -> None:
    import importlib

    import torch

    try:
        found = getattr(importlib.import_module(module_name), class_name)
        if found not in torch.utils._pytree.SUPPORTED_NODES:
            from transformers.exporters.exporter_dynamo import register_pytree_node

            register_pytree_node(found)
    except (ImportError, AttributeError) as error:
        raise RewriteError(
            f"{path} returns {module_name}.{class_name}, which the installed transformers does not have",
            evidence=[str(error)],
            fix="Install the version of transformers that the program was exported with.",
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's remarks about file names: they are not decided by the name here, and errors are raised anyway."""
    names = ("torch.export", "torch.export.pt2_archive._package", "torch._export.serde.serialize")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""
