"""ONNX files: written from a program and compared with it in ONNX Runtime before they appear; read strictly."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

import rewriter
from rewriter.errors import RewriteError, UsageError
from rewriter.formats.atomic import write_file
from rewriter.formats.files import open_regular, unchanged
from rewriter.formats.fingerprint import fingerprint
from rewriter.formats.onnx_check import PROVIDER, Trial, compare, judge, load_runtime
from rewriter.formats.onnx_graph import convert, quiet
from rewriter.formats.onnx_nf4 import NO_FOLDING, EightBit, Nf4Report, use_eight_bit_activations
from rewriter.program import Program

SCHEMA = 1
LARGEST_BYTES = 2**31 - 2**26  # protobuf's limit, less room for the graph
_SMALL_BYTES = 1024  # tensors below stay in the model file
_PLAIN = "Use plain files beside the model; from a Hugging Face cache, `hf download --local-dir` makes them."


@dataclass(frozen=True, slots=True)
class OnnxReport:
    """What was written: names with types and sizes, how many initializers, and how it compared with the program.

    `nf4` says how layers with 4-bit weights were written; None where there are none.
    """

    path: Path
    size_bytes: int
    opset: int
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    initializers: int
    provider: str
    errors: tuple[Trial, ...]
    nf4: Nf4Report | None = None

    @property
    def max_abs_error(self) -> float:
        return max((trial.max_abs_error for trial in self.errors), default=0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "opset": self.opset,
            "inputs": dict(self.inputs),
            "outputs": dict(self.outputs),
            "initializers": self.initializers,
            "provider": self.provider,
            "max_abs_error": self.max_abs_error,
            "errors": [
                {"shapes": {name: list(shape) for name, shape in trial.shapes.items()}, "max_abs": trial.max_abs_error}
                for trial in self.errors
            ],
            "nf4": self.nf4.to_json() if self.nf4 else None,
        }


def export_onnx(
    program: Program,
    path: Path,
    *,
    overwrite: bool = False,
    external_data: bool | None = None,
    tolerance: float = 1e-4,
    opset: int | None = None,
    trials: int = 2,
    seed: int = 0,
    nf4: str | None = None,
    keep_double_quant: bool = False,
) -> OnnxReport:
    """Write a program, in evaluation mode, as an ONNX model, and compare it with the program in ONNX Runtime.

    Weights go to `<path>.data` beside the model with `external_data`, by default only when they pass 2 GB. The
    comparison is on `trials` sets of random inputs, each in other sizes of the dynamic dimensions. The files appear
    when it is done, whole, or not at all.

    Layers with 4-bit weights are written as `nf4` says: bnb4 (the default), codebook or int8. The first two hold the
    program's own bytes; with `keep_double_quant` its quantised scales too, otherwise these are expanded. With int8 the
    comparison that must hold is with a program of 8-bit levels; the errors reported are those against the program.

    Raises `LawError` when an output is further than `tolerance` from the program's, `UsageError` for options that
    cannot be meant, and `RewriteError` when the program cannot be expressed, run or written.
    """
    if trials < 1:
        raise UsageError(f"{trials} trials compare nothing", fix="Give at least one.")
    runtime = load_runtime()
    with ExitStack() as stack:
        # The model file is entered first, so that it is the last to appear: it never points at data that is not there.
        partial = stack.enter_context(write_file(path, overwrite=overwrite))
        stack.enter_context(quiet())
        model, written = convert(program, opset=opset, nf4=nf4, keep_double_quant=keep_double_quant)
        _describe(model, program, written.sources if written else ())
        data = _data_path(model, path, external_data)
        partial_data = stack.enter_context(write_file(data, overwrite=overwrite)) if data else None
        ir.save(
            model, partial, external_data=partial_data.name if partial_data else None, size_threshold_bytes=_SMALL_BYTES
        )
        if partial_data and not partial_data.exists():
            partial_data.touch()  # every weight is small enough to stay in the model
        errors = _measure(runtime, partial, program, written, trials, seed, path, tolerance)
        if data:
            _relocate(partial, data.name)
        sizes = [part.stat().st_size for part in (partial, partial_data) if part]
    return OnnxReport(
        path=path,
        size_bytes=sum(sizes),
        opset=int(model.opset_imports[""]),
        inputs={str(value.name): _type(value) for value in model.graph.inputs},
        outputs={str(value.name): _type(value) for value in model.graph.outputs},
        initializers=len(model.graph.initializers),
        provider=PROVIDER,
        errors=errors,
        nf4=written,
    )


def _measure(
    runtime: Any,
    file: Path,
    program: Program,
    written: Nf4Report | None,
    trials: int,
    seed: int,
    path: Path,
    limit: float,
) -> tuple[Trial, ...]:
    """Compare and judge; 8-bit levels are judged by what they stand for, before activations are rounded too."""
    if written is None or written.form != "int8":
        disabled = NO_FOLDING if written is not None and written.form == "codebook" else ()
        errors = compare(runtime, file, program, trials, seed, disabled=disabled)
        judge(path, errors, limit)
        return errors
    with EightBit():  # type: ignore[no-untyped-call]
        judge(path, compare(runtime, file, program, trials, seed), limit)
    model = onnx.load(file, load_external_data=False)
    use_eight_bit_activations(model)
    file.write_bytes(model.SerializeToString())
    return compare(runtime, file, program, trials, seed)


def _data_path(model: ir.Model, path: Path, wanted: bool | None) -> Path | None:
    total = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if wanted is False and total > LARGEST_BYTES:
        raise UsageError(
            f"{total / 1e9:.1f} GB of weights do not fit into one ONNX file, which may have 2 GB",
            fix="Allow external data.",
        )
    return path.with_name(f"{path.name}.data") if wanted or total > LARGEST_BYTES else None


def _type(value: ir.Value) -> str:
    sizes = ", ".join(str(size) for size in value.shape) if value.shape is not None else "?"
    return f"{value.dtype.numpy() if value.dtype else 'unknown'}[{sizes}]"


# -- what the file says about itself ------------------------------------------------------------------------------


def _describe(model: ir.Model, program: Program, sources: Sequence[str]) -> None:
    """Write version, recipe, adapters and the hash of the weights into the model's metadata."""
    steps = [{"name": step.name, "options": _portable(step.options)} for step in program.steps]
    recipe = json.dumps(steps, sort_keys=True, separators=(",", ":"))
    # `sources` are in the file too, in another form
    names = dict.fromkeys([*model.graph.initializers, *sources])
    written = {name: program.tensor(name) for name in names if name in program.tensors}
    adapters = [
        {"step": step.number, "name": step.name, "parameters": [name for name in step.added if name in written]}
        for step in program.steps
        if any(name in written for name in step.added)
    ]
    model.producer_name, model.producer_version = "rewriter", rewriter.__version__
    model.metadata_props.clear()
    model.metadata_props.update(
        {
            "rewriter.version": rewriter.__version__,
            "rewriter.recipe": recipe,
            "rewriter.recipe_sha256": sha256(recipe.encode()).hexdigest(),
            "rewriter.base_sha256": fingerprint(written),
            "rewriter.adapters": json.dumps(adapters, separators=(",", ":")),
        }
    )


def _portable(value: Any) -> Any:
    """Options as plain data in which a place on this machine is reduced to its last name."""
    if isinstance(value, Mapping):
        return {str(key): _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_portable(item) for item in value]
        return items if isinstance(value, list | tuple) else sorted(items, key=repr)
    if isinstance(value, bool | int | float | None):
        return value
    text = str(value)
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(text).is_absolute() or isinstance(value, Path):
            return kind(text).name
    return text


# -- reading ------------------------------------------------------------------------------------------------------


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model in an ONNX file; external data is checked and stays on disk, where the model says.

    Raises `RewriteError` for a file that is empty, cut off or no ONNX model, and for external data that is missing,
    shorter than its tensor, or anything but a plain file in the directory of the model; the tensor is named.
    """
    with unchanged(path), open_regular(path) as file:
        content = file.read()
    model = onnx.ModelProto()
    try:
        if not content:
            raise RewriteError(f"{path} is empty", fix="Export or download it again.")
        model.ParseFromString(content)
    except DecodeError as error:
        raise RewriteError(
            f"{path} is not an ONNX file, or was cut off", evidence=[str(error)], fix="Export or download it again."
        ) from error
    if not model.ir_version or not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise RewriteError(f"{path} is not an ONNX model: it has no graph", fix="Export or download it again.")
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, path)
    return model


def _relocate(file: Path, name: str) -> None:
    """Point the external tensors of a model file at the name their data is about to get."""
    model = onnx.load(file, load_external_data=False)
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    file.write_bytes(model.SerializeToString())


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers, sparse ones, and those in attributes, in subgraphs and functions too."""
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        scope = waiting.pop()
        if isinstance(scope, onnx.GraphProto):
            yield from scope.initializer
            for sparse in scope.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for attribute in (attribute for node in scope.node for attribute in node.attribute):
            yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
            waiting += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    what = f"{path}: tensor {tensor.name!r}"
    parts = PureWindowsPath(location).parts  # splits at both kinds of slash
    if not location or ".." in parts or PureWindowsPath(location).anchor or PurePosixPath(location).is_absolute():
        raise RewriteError(f"{what} lies outside the model's directory: {location!r}", fix=_PLAIN)
    file = path.parent / location
    if not os.path.lexists(file):
        raise RewriteError(f"{what} needs {location!r}, which does not exist", fix="Put it beside the model file.")
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or path.parent.resolve() not in file.resolve().parents:
        raise RewriteError(f"{what} is in {location!r}, which is a link or no plain file", fix=_PLAIN)
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or _nbytes(tensor))
    except ValueError:
        raise RewriteError(f"{what} has an offset or length that is no number", fix="Export it again.") from None
    if min(offset, length) < 0 or length < _nbytes(tensor) or offset + length > status.st_size:
        raise RewriteError(
            f"{what} is not all in {location!r}",
            evidence=[
                f"bytes {offset} to {offset + length} of a file of {status.st_size}, {_nbytes(tensor)} are needed"
            ],
            fix="Download or export it again.",
        )


def _nbytes(tensor: onnx.TensorProto) -> int:
    """The bytes of a tensor by its type and shape; 0 for types without a fixed size."""
    if any(size < 0 for size in tensor.dims) or tensor.data_type not in ir.DataType._value2member_map_:
        raise RewriteError(f"tensor {tensor.name!r} has no valid type and shape", fix="Export it again.")
    kind = ir.DataType(tensor.data_type)
    if kind in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return 0
    bits: int = math.prod(tensor.dims) * kind.bitwidth
    return (bits + 7) // 8
