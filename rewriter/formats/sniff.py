"""What a path holds, decided from content, never from the name."""

from __future__ import annotations

import re
import stat
import zipfile
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from rewriter.errors import RewriteError, UnsafeError
from rewriter.formats.files import open_regular, status
from rewriter.formats.json import read_json


class Kind(StrEnum):
    """What a file or directory is; the value is its name in messages."""

    PROGRAM = "a torch.export program (.pt2)"
    OLD_PROGRAM = "a torch.export program of torch 2.7 or older"
    STATE_DICT = "a torch checkpoint (zip)"
    LEGACY_PICKLE = "a torch checkpoint of before torch 1.6"
    PICKLED_MODULE = "pickled Python objects (torch.save of a whole module)"
    PICKLE = "a plain Python pickle"
    TORCHSCRIPT = "a TorchScript archive"
    SAFETENSORS = "a safetensors file"
    GGUF = "a GGUF file"
    NPZ = "a NumPy .npz archive"
    NPY = "a NumPy .npy array"
    HDF5 = "an HDF5 (.h5) file"
    ONNX = "an ONNX model"
    ORT_ADAPTER = "an ONNX Runtime adapter"
    LFS_POINTER = "a git-lfs pointer, not the file itself"
    HTML = "an HTML page"
    JSON = "a JSON file"
    TEXT = "a text file"
    ZIP = "a zip archive of something else"
    EMPTY = "an empty file"
    UNKNOWN = "a file of an unknown format"
    HUGGINGFACE = "a Hugging Face model directory"
    PEFT_ADAPTER = "a PEFT adapter directory"
    ADAPTERHUB = "an AdapterHub adapter directory"
    DIRECTORY = "a directory without config.json or adapter_config.json"


_WEIGHTS = (
    "It holds weights but no graph: also name the model they belong to (--model); "
    "LoRAs of loralib go onto a model with `rewriter apply --pass loralib --file`."
)
ADVICE = {
    Kind.PROGRAM: "It already has a graph: pass it to `rewriter apply` or `rewriter inspect`.",
    Kind.OLD_PROGRAM: "Load it in the torch that wrote it and save it again with torch 2.8 or newer.",
    Kind.STATE_DICT: _WEIGHTS,
    Kind.LEGACY_PICKLE: _WEIGHTS,
    Kind.PICKLED_MODULE: "If you trust its author, add --trust-pickle; else ask for safetensors or a .pt2 program.",
    Kind.PICKLE: "Save the tensors with torch.save or safetensors.",
    Kind.TORCHSCRIPT: "TorchScript is no longer developed: export the original module with torch.export.",
    Kind.SAFETENSORS: _WEIGHTS,
    Kind.GGUF: "Use the original Hugging Face model directory it was made from.",
    Kind.NPZ: "Save the arrays as safetensors (safetensors.numpy.save_file).",
    Kind.NPY: "Save the arrays as safetensors (safetensors.numpy.save_file).",
    Kind.HDF5: "Save the weights as safetensors from the framework that wrote it.",
    Kind.ONNX: "Start from the torch model this file was exported from.",
    Kind.ORT_ADAPTER: "It is made for ONNX Runtime; use the PEFT directory it came from.",
    Kind.LFS_POINTER: "Fetch the real file: run `git lfs pull` in its repository.",
    Kind.HTML: "A download gave a web page (often a login page): download again, signed in.",
    Kind.JSON: "Name the directory that holds it, or the weights beside it.",
    Kind.TEXT: "Check that the download gave the file and not a message.",
    Kind.ZIP: "Unpack it and name the model inside.",
    Kind.EMPTY: "Download or save it again.",
    Kind.UNKNOWN: "Check that the file is complete and what wrote it.",
    Kind.HUGGINGFACE: "Pass it where a model is expected.",
    Kind.PEFT_ADAPTER: "Pass it with --adapter, together with its base model.",
    Kind.ADAPTERHUB: "Pass it with --adapter (the pass adapterhub), together with its base model.",
    Kind.DIRECTORY: "Name a model file, or a directory that has config.json.",
}

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAGIC = (
    (b"GGUF", Kind.GGUF),
    (b"\x93NUMPY", Kind.NPY),
    (b"\x89HDF\r\n\x1a\n", Kind.HDF5),
    (b"version https://git-lfs.github.com/spec/", Kind.LFS_POINTER),
    (_LEGACY_MAGIC, Kind.LEGACY_PICKLE),
)
_HEAD_BYTES = 4096


def sniff(path: Path) -> Kind:
    """What `path` holds; `RewriteError` when it is missing, unreadable, no regular file, or a cut-off zip archive."""
    if stat.S_ISDIR(status(path).st_mode):
        return _directory(path)
    with open_regular(path) as file:
        head = file.read(_HEAD_BYTES)
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return _zip(path, file)
        return _magic(head) or _text(head, path.stat().st_size) or _onnx(file) or _pickle(head) or Kind.UNKNOWN


def require(path: Path, *kinds: Kind) -> Kind:
    """`sniff(path)` when it is one of `kinds`; else an error that names the real format and what to do."""
    kind = sniff(path)
    if kind in kinds:
        return kind
    wanted = " or ".join(kinds)
    error = UnsafeError if kind in (Kind.PICKLED_MODULE, Kind.PICKLE) else RewriteError
    raise error(f"{path} is {kind}", evidence=[f"expected {wanted}"], fix=ADVICE[kind])


def _magic(head: bytes) -> Kind | None:
    if not head:
        return Kind.EMPTY
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[4:8] == b"TORT":
        return Kind.ORT_ADAPTER
    # Eight bytes of header length, then the header's opening brace; text would give a length of exabytes.
    if head[8:9] == b"{" and head[5:8] == b"\0\0\0":
        return Kind.SAFETENSORS
    return None


def _text(head: bytes, size_bytes: int) -> Kind | None:
    if b"\0" in head:
        return None
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # A character may be cut where the head ends.
        if size_bytes <= len(head) or error.start < len(head) - 4:
            return None
        text = head[: error.start].decode("utf-8-sig")
    if any(ord(character) < 32 and character not in "\t\n\v\f\r\x1b" for character in text):
        return None
    start = text.lstrip().lower()
    if start.startswith(("<!doctype html", "<html", "<head", "<body")) or re.match(
        r"<\?xml[^>]*>\s*<(!doctype )?html", start
    ):
        return Kind.HTML
    return Kind.JSON if start.startswith(("{", "[")) else Kind.TEXT


def _pickle(head: bytes) -> Kind | None:
    return Kind.PICKLE if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and len(head) > 1 else None


def _zip(path: Path, file: BinaryIO) -> Kind:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError, UnicodeDecodeError) as error:
        raise truncated(path, error) from None
    inner = {name.partition("/")[2] for name in names}
    if "archive_format" in inner or any(re.fullmatch(r"models/[^/]+\.json", name) for name in inner):
        return Kind.PROGRAM
    if "serialized_exported_program.json" in names:
        return Kind.OLD_PROGRAM
    if "data.pkl" in inner and ("constants.pkl" in inner or any(name.startswith("code/") for name in inner)):
        return Kind.TORCHSCRIPT
    if "data.pkl" in inner:
        return Kind.PICKLED_MODULE if unsafe_globals(path) else Kind.STATE_DICT
    return Kind.NPZ if names and all(name.endswith(".npy") for name in names) else Kind.ZIP


def truncated(path: Path, reason: Exception) -> RewriteError:
    """The error for a zip archive whose directory cannot be read."""
    evidence = [str(reason), f"{path.stat().st_size} bytes on disk"]
    return RewriteError(f"{path} is a truncated or damaged zip archive", evidence=evidence, fix="Download it again.")


def unsafe_globals(path: Path) -> list[str]:
    """The functions and classes that unpickling a torch zip would call beyond tensors; nothing is executed."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # noqa: BLE001 - the scanner has no error of its own: a malformed pickle raises anything
        raise RewriteError(
            f"{path} holds a malformed pickle", evidence=[str(error).split("\n")[0]], fix="Download it again."
        ) from None


def _onnx(file: BinaryIO) -> Kind | None:
    """An ONNX file is a protobuf message: version first (field 1), and a graph (field 7) among at most a few fields."""
    file.seek(0, 2)
    size = file.tell()
    position = 0
    fields: list[int] = []
    while position < size and len(fields) < 100_000:
        file.seek(position)
        window = file.read(20)
        key, used = _varint(window)
        value, more = _varint(window[used:])
        number, wire = key >> 3, key & 7
        if not used or not more or not 1 <= number <= 100 or wire not in (0, 2) or (not fields and key != 8):
            return None
        fields.append(number)
        position += used + more + (value if wire == 2 else 0)
    return Kind.ONNX if 7 in fields else None


def _varint(data: bytes) -> tuple[int, int]:
    """A protobuf number and the bytes it took; none when `data` does not start with one."""
    value = 0
    for index, byte in enumerate(data[:10]):
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            return value, index + 1
    return 0, 0


def _directory(path: Path) -> Kind:
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise RewriteError(f"{path} cannot be listed: {error.strerror}", fix="Change its permissions.") from None
    if "adapter_config.json" in names:
        return _adapter(path / "adapter_config.json")
    if names & {"adapter_setup.json", "adapter_fusion_config.json"}:
        return Kind.ADAPTERHUB
    return Kind.HUGGINGFACE if "config.json" in names else Kind.DIRECTORY


def _adapter(path: Path) -> Kind:
    config = read_json(path)
    if "peft_type" in config:
        return Kind.PEFT_ADAPTER
    if "config" in config and ("model_type" in config or str(config.get("version", "")).startswith("adapters.")):
        return Kind.ADAPTERHUB
    raise RewriteError(
        f"{path} is neither a PEFT nor an AdapterHub configuration",
        evidence=[
            "PEFT has the key peft_type; AdapterHub has config, and model_type or version (adapters.*)",
            f"keys: {', '.join(list(config)[:12]) or 'none'}",
        ],
        fix="Save the adapter again with `save_pretrained`.",
    )
