"""A zip archive is whole and unambiguous, and opening a `.pt2` executes nothing from it."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

from rewriter.errors import RewriteError, UnsafeError
from rewriter.formats import archive as archive_module
from rewriter.formats.archive import check_pt2, check_zip, load_exported_program

SENTINEL = "EXECUTED"


class Payload:
    """Unpickling one creates the sentinel file in the working directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {SENTINEL}",)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 5)
        self.register_buffer("shift", torch.randn(5))

    def forward(self, x: torch.Tensor, options: dict[str, torch.Tensor], mode: str = "plain") -> torch.Tensor:
        return self.linear(x) + self.shift + options["extra"] + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.fixture(scope="module")
def program() -> bytes:
    torch.manual_seed(0)
    args = (torch.randn(4, 3), {"extra": torch.randn(4, 5)}, "plain")
    shapes = {"x": {0: 2 * Dim("half")}, "options": {"extra": {0: Dim.AUTO}}, "mode": None}
    buffer = io.BytesIO()
    exported = torch.export.export(Small(), args, dynamic_shapes=shapes)
    torch.export.save(exported, buffer, extra_files={"rewriter.json": '{"version": 1}'})
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path(SENTINEL).exists()


def altered(data: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    """The same archive with other members; `change` edits a mapping of names (without the root) to contents."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"model/{name}", content)
    return buffer.getvalue()


def edit_json(name: str, change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def edit(members: dict[str, bytes]) -> None:
        value = json.loads(members[name])
        change(value)
        members[name] = json.dumps(value).encode()

    return edit


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["model.pt2", "weights.safetensors", "no ending", "-ü\n.pt"])
def test_a_program_loads_under_any_name(
    tmp_path: Path, program: bytes, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    path.write_bytes(program)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, extra_files = load_exported_program(path)
    assert extra_files == {"rewriter.json": '{"version": 1}'}
    assert not caplog.records
    expected = torch.export.load(io.BytesIO(program))
    args = (torch.randn(6, 3), {"extra": torch.randn(6, 5)}, "plain")
    torch.testing.assert_close(loaded.module()(*args), expected.module()(*args), rtol=0, atol=0)


def test_rewriting_an_archive_without_a_change_keeps_it_loadable(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "model"
    path.write_bytes(altered(program, lambda members: None))
    load_exported_program(path)


def test_output_types_of_transformers_are_imported(tmp_path: Path) -> None:
    from transformers.modeling_outputs import BaseModelOutput

    class Typed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> BaseModelOutput:
            return BaseModelOutput(last_hidden_state=x * 2)

    path = tmp_path / "typed.pt2"
    torch.export.save(torch.export.export(Typed(), (torch.randn(2, 3),)), path)
    script = (
        "import sys; from pathlib import Path; from rewriter.formats.archive import load_exported_program\n"
        "assert 'transformers' not in sys.modules\n"
        "program, _ = load_exported_program(Path(sys.argv[1]))\n"
        "import torch; print(type(program.module()(torch.ones(2, 3))).__name__)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.stdout.strip() == "BaseModelOutput", done.stderr


# -- damage -------------------------------------------------------------------------------------------------------


def _flip(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        member = next(item for item in archive.infolist() if item.filename.endswith("weight_0"))
    start = member.header_offset + 26
    name_length, extra_length = struct.unpack("<HH", data[start : start + 4])
    place = member.header_offset + 30 + name_length + extra_length + 17
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def _deflated(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("model/bomb", bytes(3_000_000))
    return buffer.getvalue()


def _with_member(name: str) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        buffer = io.BytesIO(data)
        with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as archive:
            warnings.simplefilter("ignore")
            archive.writestr(name, "x")
        return buffer.getvalue()

    return change


def _overlapping(data: bytes) -> bytes:
    """Two directory entries for the bytes of one large member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("a/archive_format", "a/models/model.json"):
            archive.writestr(name, "{}")
        archive.writestr("a/b", bytes(9000))
        archive.filelist += [_copy(archive.filelist[-1], f"a/c{index}") for index in range(3)]
    return buffer.getvalue()


def _copy(member: zipfile.ZipInfo, name: str) -> zipfile.ZipInfo:
    other = zipfile.ZipInfo(name)
    for key in ("compress_type", "CRC", "compress_size", "file_size", "header_offset"):
        setattr(other, key, getattr(member, key))
    return other


def _comment(data: bytes) -> bytes:
    return data[:-2] + struct.pack("<H", 5) + b"hello"


DAMAGED: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("cut", lambda data: data[: len(data) // 2], "truncated or damaged zip"),
    ("cut by one", lambda data: data[:-1], "truncated or damaged zip"),
    ("header only", lambda data: data[:30], "truncated or damaged zip"),
    ("flipped bit", _flip, "checksum of .*weight_0"),
    ("deflated", _deflated, "is compressed"),
    ("parent", _with_member("archive/../../x"), "leads out of the archive"),
    ("absolute", _with_member("/etc/x"), "absolute name"),
    ("drive", _with_member("C:/x"), "absolute name"),
    ("backslash", _with_member("a\\..\\x"), "backslash"),
    ("duplicate", _with_member("archive/archive_format"), "appears twice"),
    ("duplicate but for case", _with_member("archive/Archive_Format"), "appears twice"),
    ("overlapping members", _overlapping, "unpacks to more"),
    ("before it", lambda data: b"#!/bin/sh\n" + data, "is a text file|unknown format|truncated"),
    ("after it", lambda data: data + b"PK\x05\x06" + bytes(30), "truncated or damaged zip|something else"),
    ("comment", _comment, "truncated or damaged zip"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED])
def test_damage_is_refused(tmp_path: Path, program: bytes, change: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "model.pt2"
    data = change(_renamed(program))
    path.write_bytes(data)
    with pytest.raises(RewriteError, match=message) as caught:
        load_exported_program(path)
    assert caught.value.exit_code == 1
    assert caught.value.fix
    assert path.read_bytes() == data


def _renamed(data: bytes) -> bytes:
    """The archive with a root of known name, which the rows above refer to."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(f"archive/{name.partition('/')[2]}", old.read(name))
    return buffer.getvalue()


def test_checksums_can_be_skipped(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(_flip(program))
    check_zip(path, verify=False)
    load_exported_program(path, verify=False)


def test_too_many_members(tmp_path: Path, program: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(program)
    monkeypatch.setattr(archive_module, "MEMBER_LIMIT", 9)
    with pytest.raises(RewriteError, match="the limit is 9"):
        check_zip(path)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, program: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    for change, message in ((lambda: path.write_bytes(program + b"x"), "changed while"), (path.unlink, "disappeared")):
        path.write_bytes(program)

        def load(*args: Any, change: Callable[[], Any] = change, **kwargs: Any) -> None:
            change()
            raise RuntimeError("half a file")

        monkeypatch.setattr(torch.export, "load", load)
        with pytest.raises(RewriteError, match=message):
            load_exported_program(path)


def test_an_unreadable_program_shows_the_reason_of_torch(tmp_path: Path, program: bytes) -> None:
    def other_version(model: Any) -> None:
        model["schema_version"]["major"] = 999

    path = tmp_path / "model.pt2"
    path.write_bytes(altered(program, edit_json("models/model.json", other_version)))
    with pytest.raises(RewriteError, match="cannot be loaded by torch") as caught:
        load_exported_program(path)
    assert caught.value.evidence


# -- code ---------------------------------------------------------------------------------------------------------

EVIL_TEXT = f"__import__('os').system('touch {SENTINEL}')"
PREFIX = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


def _use_pickle(members: dict[str, bytes]) -> None:
    def change(config: Any) -> None:
        config["config"]["linear.weight"]["use_pickle"] = True

    edit_json(PREFIX, change)(members)
    members["data/weights/weight_0"] = pickled(Payload())


def _opaque(members: dict[str, bytes]) -> None:
    def change(config: Any) -> None:
        next(iter(config["config"].values()))["path_name"] = "opaque_obj_0"

    edit_json(CONSTANTS, change)(members)
    members["data/constants/opaque_obj_0"] = pickle.dumps(Payload())


def _capitals(members: dict[str, bytes]) -> None:
    del members["data/sample_inputs/model.pt"]
    members["data/sample_inputs/MODEL.PT"] = pickled((Payload(), {}))


def _member(name: str, content: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({name: content})


def _in_model(change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    return edit_json("models/model.json", change)


def _symbol(model: Any) -> None:
    values = model["graph_module"]["graph"]["tensor_values"]
    sizes = [size for value in values.values() for size in value["sizes"] if "as_expr" in size]
    sizes[0]["as_expr"]["expr_str"] = EVIL_TEXT


def _target(target: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model["graph_module"]["graph"]["nodes"][0]["target"] = target

    return change


def _spec(change: Callable[[str], str]) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        signature["in_spec"] = change(signature["in_spec"])

    return edit


def _context(context: Any) -> Callable[[str], str]:
    def change(text: str) -> str:
        protocol, spec = json.loads(text)
        spec["children_spec"][1]["context"] = json.dumps(context)
        return json.dumps([protocol, spec])

    return change


def _parameter(model: Any) -> None:
    for item in model["graph_module"]["signature"]["input_specs"]:
        if "parameter" in item:
            item["parameter"]["parameter_name"] = f'x") + {EVIL_TEXT} + ("'


def _argument(model: Any) -> None:
    model["graph_module"]["graph"]["inputs"][-1] = {"as_string": f"' or {EVIL_TEXT} or '"}


def _placeholder(model: Any) -> None:
    model["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"] = f"x={EVIL_TEXT}"


def _keyword(model: Any) -> None:
    model["graph_module"]["graph"]["nodes"][0]["inputs"][0]["name"] = f"a={EVIL_TEXT}, b"


def _forward_names(model: Any) -> None:
    model["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [f"x={EVIL_TEXT}"]


SEQUENCE = {"_t": "seq", "p": "os:system", "v": [f"touch {SENTINEL}"]}
REACHABLE = {"_t": "seq", "p": "transformers.utils.import_utils:os", "v": []}
UNSAFE: dict[str, Callable[[dict[str, bytes]], None]] = {
    "sample inputs": _member("data/sample_inputs/model.pt", pickled((Payload(), {}))),
    "sample inputs in capitals": _capitals,
    "plain pickle as sample inputs": _member("data/sample_inputs/model.pt", pickle.dumps(Payload())),
    "weights in the old place": _member("data/weights/model.pt", pickled({"w": Payload()})),
    "constants in the old place": _member("data/constants/model.pt", pickled({"c": Payload()})),
    "pickled weight": _use_pickle,
    "opaque constant not called a pickle": _opaque,
    "compiled code": _member("data/aotinductor/model/kernel.so", b"\x7fELF"),
    "size expression": _in_model(_symbol),
    "guard": _in_model(lambda model: model["guards_code"].append(EVIL_TEXT)),
    "guard method": _in_model(lambda model: model["guards_code"].append("L['x'].numpy().tofile('EXECUTED')")),
    "operator os.system": _in_model(_target("torch.os.system")),
    "operator load_library": _in_model(_target("torch.ops.load_library.__call__")),
    "operator methodcaller": _in_model(_target("_operator.methodcaller")),
    "operator extension": _in_model(_target("#other:operator")),
    "parameter name": _in_model(_parameter),
    "literal argument": _in_model(_argument),
    "placeholder": _in_model(_placeholder),
    "keyword": _in_model(_keyword),
    "argument names": _in_model(_forward_names),
    "keyword names": _in_model(_spec(_context([f"x={EVIL_TEXT}"]))),
    "class in a tree": _in_model(_spec(_context(SEQUENCE))),
    "class reached through transformers": _in_model(_spec(_context(REACHABLE))),
    "factory in a tree": _in_model(
        _spec(_context({"default_factory_module": "os", "default_factory_name": "abort", "dict_context": []}))
    ),
    "enumeration in a tree": _in_model(_spec(_context({"__enum__": True, "fqn": "antigravity:x", "name": "y"}))),
}


@pytest.mark.parametrize("change", list(UNSAFE.values()), ids=list(UNSAFE))
def test_code_in_a_program_is_refused_before_it_runs(
    tmp_path: Path, program: bytes, change: Callable[[dict[str, bytes]], None]
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(altered(program, change))
    for act in (check_pt2, load_exported_program):
        with pytest.raises(UnsafeError) as caught:
            act(path)
        assert caught.value.exit_code == 3
        assert "--trust-pickle" in caught.value.fix
    assert "antigravity" not in sys.modules


def test_a_second_program_beside_the_first_is_refused(tmp_path: Path, program: bytes) -> None:
    """torch falls back to the format of 2.7, which is pickles, when the new one raises."""
    buffer = io.BytesIO(program)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("version", "8.8")
        archive.writestr("serialized_state_dict.pt", pickled(Payload()))
    path = tmp_path / "model.pt2"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(UnsafeError, match="outside the program"):
        load_exported_program(path)


def test_trusted_pickles_are_loaded(tmp_path: Path, program: bytes) -> None:
    args = (torch.randn(4, 3), {"extra": torch.randn(4, 5)}, Path("a class the restricted reader does not know"))
    path = tmp_path / "model.pt2"
    path.write_bytes(altered(program, _member("data/sample_inputs/model.pt", pickled((args, {})))))
    with pytest.raises(UnsafeError, match="sample_inputs"):
        load_exported_program(path)
    load_exported_program(path, trust_pickle=True)


def test_not_a_program_names_the_format(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.save({"w": torch.randn(3, 5)}, path)
    with pytest.raises(RewriteError, match="is a torch checkpoint"):
        load_exported_program(path)
