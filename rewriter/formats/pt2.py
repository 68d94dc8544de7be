"""Programs as `.pt2` archives: what `torch.export.load` opens, with the history of the program beside its graph.

The history is the extra file `rewriter.json`. Tensors that only the history holds travel among the weights under
reserved names, which no signature names and torch therefore ignores; a tensor that the program holds anyway is only
referred to. The program before a step is a second archive without tensors inside an extra file.
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram

import rewriter
from rewriter.errors import RewriteError
from rewriter.formats.archive import load_exported_program
from rewriter.formats.atomic import write_file
from rewriter.formats.json import parse_object
from rewriter.program import Origin, Program, Step
from rewriter.text import settled

HISTORY = "rewriter.json"
RESERVED = ("rewriter.original.", "rewriter.before.")
SCHEMA = 1


def save(program: Program, path: Path, *, overwrite: bool = True, inputs: Sequence[Path] = ()) -> Path:
    """Write a program with its history; the same program gives the same bytes in every process.

    Raises `RewriteError` when the place cannot be written, is one of `inputs`, or when options or metadata are not
    plain data.
    """
    writer = _Writer(program)
    record = {"schema": SCHEMA, "version": rewriter.__version__, **writer.history(program, "")}
    files = {HISTORY: _json(record), **writer.files}
    with write_file(path, inputs=inputs, overwrite=overwrite) as partial, partial.open("wb") as file:
        # An open file rather than a name: torch would put the name of the file into the archive.
        _export(writer.archived(program), file, files)
    return path


def load(path: Path, *, verify: bool = True, trust_pickle: bool = False) -> Program:
    """Read a program that `save` or `torch.export.save` wrote, under any name, without executing anything from it.

    Raises `UnsafeError` for what could execute code, `RewriteError` for a damaged file or history.
    """
    exported, files = load_exported_program(path, verify=verify, trust_pickle=trust_pickle)
    _share(exported)
    if HISTORY not in files:
        return Program.adopt(exported)
    record = parse_object(files[HISTORY].encode(), f"{path}: {HISTORY}")
    if record.get("schema") != SCHEMA:
        raise RewriteError(
            f"{path} has a history of schema {record.get('schema')!r}",
            evidence=[f"written by rewriter {record.get('version')!r}; this version reads schema {SCHEMA}"],
            fix="Install the version of rewriter that wrote it.",
        )
    reader = _Reader(exported, files, trust_pickle=trust_pickle)
    try:
        return reader.program(exported, record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RewriteError(
            f"the history in {path} is damaged",
            evidence=[f"{type(error).__name__}: {error}"],
            fix="Load it with torch.export.load, which ignores the history.",
        ) from error


class _Writer:
    """Collects what the history of a program needs and the program itself does not hold."""

    def __init__(self, program: Program) -> None:
        taken = [name for name in program.tensors if name.startswith(RESERVED)]
        if taken:
            raise RewriteError(f"the parameter {taken[0]!r} has a reserved name", fix="Rename it in the model.")
        self.places = {_place(tensor): name for name, tensor in reversed(program.tensors.items())}
        self.tensors: dict[str, torch.Tensor] = {}
        self.files: dict[str, str] = {}

    def archived(self, program: Program) -> ExportedProgram:
        """The program as it is saved: with the tensors of its history."""
        exported = _normal(program)
        exported.state_dict.update(self.tensors)
        return exported

    def history(self, program: Program, scope: str) -> dict[str, Any]:
        steps = [self._step(step, f"{scope}{step.number}") for step in program.steps]
        return {"metadata": program.metadata, "steps": steps}

    def _step(self, step: Step, scope: str) -> dict[str, Any]:
        originals = {name: self._keep(f"{RESERVED[0]}{scope}.{name}", t) for name, t in step.originals.items()}
        return {
            "number": step.number,
            "name": step.name,
            "options": dict(step.options),
            "added": list(step.added),
            "trainable": list(step.trainable),
            "originals": originals,
            "before": None if step.before is None else self._before(step.before, scope),
            **({"final": True} if step.final else {}),
        }

    def _before(self, before: Program, scope: str) -> dict[str, Any]:
        prefix = f"{RESERVED[1]}{scope}"
        names = {name: self._keep(f"{prefix}.{name}", tensor) for name, tensor in before.tensors.items()}
        exported = _normal(before)
        _hollow(exported.state_dict)
        _hollow(exported.constants)
        buffer = io.BytesIO()
        _export(exported, buffer, {})
        self.files[prefix] = base64.b64encode(buffer.getvalue()).decode()
        return {"file": prefix, "tensors": names, **self.history(before, f"{scope}-")}

    def _keep(self, name: str, tensor: torch.Tensor) -> str:
        """The name under which the archive holds a tensor: the program's own, or the reserved one given."""
        held = self.places.setdefault(_place(tensor), name)
        if held == name:
            self.tensors[name] = tensor
        return held


class _Reader:
    """Puts programs and steps together from the tensors and extra files of an archive."""

    def __init__(self, exported: ExportedProgram, files: Mapping[str, str], *, trust_pickle: bool) -> None:
        self.stored = Program(exported).tensors
        self.files = files
        self.trust_pickle = trust_pickle
        for name in [name for name in exported.state_dict if name.startswith(RESERVED)]:
            del exported.state_dict[name]

    def program(self, exported: ExportedProgram, record: Mapping[str, Any]) -> Program:
        program = Program(exported, tuple(self._step(step) for step in record["steps"]), record["metadata"])
        for step in program.steps:  # torch does not save what is known of placeholders
            for node in program.graph.nodes:
                if program.parameter_name(node) in step.added:
                    Origin(step.number, step.name, str(program.parameter_name(node))).write(node)
        return program

    def _step(self, record: Mapping[str, Any]) -> Step:
        return Step(
            record["number"],
            record["name"],
            dict(record["options"]),
            tuple(record["added"]),
            tuple(record["trainable"]),
            {name: self.stored[held] for name, held in record["originals"].items()},
            None if record["before"] is None else self._before(record["before"]),
            bool(record.get("final", False)),
        )

    def _before(self, record: Mapping[str, Any]) -> Program:
        data = base64.b64decode(self.files[record["file"]], validate=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "before.pt2"
            path.write_bytes(data)
            exported, _ = load_exported_program(path, trust_pickle=self.trust_pickle)
        tensors = {name: self.stored[held] for name, held in record["tensors"].items()}
        for home in (exported.state_dict, exported.constants):
            filled = {name: tensors.get(name, home[name]) for name in (*(n for n in tensors if n in home), *home)}
            home.clear()
            home.update(filled)
        return self.program(exported, record)


def _export(exported: ExportedProgram, file: Any, files: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tensors that are not the whole of their storage
        torch.export.save(exported, file, extra_files=files)


def _json(record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(record, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RewriteError(
            "the options of a step or the metadata are not plain data",
            evidence=[str(error)],
            fix="Use text, numbers, lists and mappings.",
        ) from error


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same view of the same memory."""
    parameter = isinstance(tensor, torch.nn.Parameter)
    if tensor.device.type == "meta" or not tensor.numel():
        return (id(tensor),)
    layout = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    return (tensor.data_ptr(), layout, parameter, tensor.requires_grad)


def _share(exported: ExportedProgram) -> None:
    """Make one object of tensors that share their memory, as they were before they were saved."""
    first: dict[tuple[Any, ...], torch.Tensor] = {}
    for name, tensor in exported.state_dict.items():
        exported.state_dict[name] = first.setdefault(_place(tensor), tensor)


def _hollow(home: dict[str, Any]) -> None:
    """Replace tensors by ones of the same shape and type that take the place of one number per type."""
    numbers: dict[torch.dtype, torch.Tensor] = {}
    for name, tensor in home.items():
        if isinstance(tensor, torch.Tensor):
            number = numbers.setdefault(tensor.dtype, torch.zeros((), dtype=tensor.dtype))
            hollow = number.expand(tensor.shape)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            home[name] = torch.nn.Parameter(hollow, requires_grad=False) if is_parameter else hollow


def _normal(program: Program) -> ExportedProgram:
    """A copy of the graph whose types are what torch makes of them when it loads them, so that saving is final."""
    clone = program.clone()
    for graph in clone.graphs():
        for node in graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = torch.utils._pytree.tree_map(_as_loaded, node.meta["val"])
    return clone.exported


def _as_loaded(value: Any) -> Any:
    """Views that start at zero, and sizes and strides with what sympy knows of minimum and maximum."""
    if isinstance(value, torch.SymInt):
        expression = settled(value.node.expr)
        if expression is value.node.expr:
            return value
        return value.node.shape_env.create_symintnode(expression, hint=value.node.hint)
    if not isinstance(value, FakeTensor):
        return value
    old = value.size(), value.stride()
    sizes, strides = (tuple(map(_as_loaded, each)) for each in old)
    offset = value.storage_offset()
    kept = all(new is was for new, was in zip((*sizes, *strides), (*old[0], *old[1]), strict=True))
    if kept and isinstance(offset, int) and offset == 0:
        return value
    shape_env = value.fake_mode.shape_env
    with value.fake_mode, shape_env.suppress_guards() if shape_env else nullcontext(), torch.no_grad():
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
