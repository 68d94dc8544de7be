"""An ONNX file -> its text, as that of a program: operations named by module path, tensors by name.

    %model.layers.0.self_attn.q_proj/MatMul = MatMul(%model.layers.0/Add, @model.layers.0.self_attn.q_proj.weight) : …

The module path is what torch's exporter wrote about a node, or else what the node's own name says (`/layers.0/MatMul`).
Small constants stand in the line of what reads them, so that names which an exporter counted up (`val_17`) are no
difference. Reading runs nothing, and tensors beside the file stay there until they are compared.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass

from rewriter.errors import RewriteError
from rewriter.formats.onnx import read_onnx
from rewriter.graph import Graph
from rewriter.text import MARK, NO_MODULE, Line, marked, printable

SCOPES = "pkg.torch.onnx.name_scopes"
INLINE = 8  # constants of at most so many numbers stand in the line that reads them


def read_graph(path: Path) -> Graph:
    """The text and the tensors of an ONNX model.

    Raises `RewriteError` for a file that is no ONNX model, is not complete, or whose functions call each other.
    """
    model = ir.from_proto(read_onnx(path))
    ir.external_data.set_base_dir(model.graph, path.parent)
    if model.functions:
        try:
            model = InlinePass()(model).model
        except (ir.passes.PassError, ValueError) as error:
            raise RewriteError(f"{path}: its functions cannot be expanded: {error}", fix="Inline them first.") from None
    return graph(model)


def graph(model: ir.Model) -> Graph:
    """The text and the tensors of a model without functions."""
    writer = _Writer(model.graph)
    facts = {
        "opset": ", ".join(f"{name or 'ai.onnx'} {number}" for name, number in sorted(model.opset_imports.items()))
    }
    facts |= {str(key): str(value) for key, value in model.metadata_props.items()}
    lines = tuple(writer.lines())
    return Graph(lines, writer.tensors, stable_names=False, facts=facts)


class _Writer:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.tensors: dict[str, torch.Tensor] = {}
        self.names: dict[ir.Value, str] = {}  # how a value stands in a template

    def lines(self) -> Iterator[Line]:
        initializers = self.graph.initializers
        for value in self.graph.inputs:
            if value.name not in initializers:
                name = "%" + printable(value.name or "")
                self.names[value] = marked(name)
                yield Line(name, "", f"input {marked(name)} : {_type(value)}", type=_type(value))
        for value in initializers.values():
            yield from self._tensor(value, value.name or "", value.const_value)
        yield from self._operations(self.graph, "  ", "")
        returned = [f"{printable(value.name or '')}={self._value(value)}" for value in self.graph.outputs]
        arguments = ", ".join(returned)
        yield Line("return", "", f"  return {arguments}", arguments=arguments)

    def _tensor(self, value: ir.Value, name: str, tensor: ir.TensorProtocol | None) -> Iterator[Line]:
        """The line of an initializer, or none where it is a small constant without a path of its own."""
        if tensor is None:
            raise RewriteError(f"the initializer {name!r} has no value", fix="Export the model again.")
        if tensor.size <= INLINE and "." not in name:
            self.names[value] = _constant(tensor)
            return
        yield self._stored(value, name, tensor)

    def _stored(self, value: ir.Value, name: str, tensor: ir.TensorProtocol) -> Line:
        key = "@" + printable(name)
        self.names[value] = marked(key)
        self.tensors[name] = _torch(tensor)
        kind = f"{_dtype(tensor.dtype)}[{','.join(map(str, tensor.shape))}]"
        return Line(key, name.rpartition(".")[0], f"param {marked(key)} : {kind}", type=kind)

    def _constant_node(self, node: ir.Node, path: str) -> Iterator[Line]:
        """A large constant is a tensor, named by what it holds: exporters only count them."""
        (attribute,) = node.attributes.values()
        output = node.outputs[0]
        tensor = attribute.as_tensor() if attribute.type is ir.AttributeType.TENSOR else None
        if tensor is None or tensor.size <= INLINE:
            self.names[output] = _attribute(attribute)
            return
        name = ".".join(part for part in (path, f"constant_{hashlib.sha256(tensor.tobytes()).hexdigest()[:8]}") if part)
        if name in self.tensors:
            self.names[output] = marked("@" + printable(name))
        else:
            yield self._stored(output, name, tensor)

    def _operations(self, graph: ir.Graph, indent: str, scope: str) -> Iterator[Line]:
        counts: dict[str, int] = {}
        for node in graph:
            path = printable(module_path(node))
            if node.op_type == "Constant" and node.domain == "" and len(node.attributes) == 1:
                yield from self._constant_node(node, path)
                continue
            stem = f"{path}/{printable(node.op_type)}" if path else printable(node.op_type)
            number = counts[stem] = counts.get(stem, -1) + 1
            key = f"%{stem}" + (f"_{number}" if number else "")
            for place, output in enumerate(node.outputs):
                self.names[output] = marked(key) + (f".{place}" if place else "")
            yield self._call(node, key, path, indent, scope)
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.GRAPH:
                    body = attribute.as_graph()
                    for value in body.inputs:
                        self.names[value] = "%" + printable(value.name or "")
                    for value in body.initializers.values():
                        assert value.const_value is not None
                        self.names[value] = _constant(value.const_value)
                    yield from self._operations(body, indent + "  ", f"{scope}{key}&{attribute.name}")

    def _call(self, node: ir.Node, key: str, path: str, indent: str, scope: str) -> Line:
        given = [self._value(value) for value in node.inputs]
        given += [f"{printable(name)}={_attribute(attribute)}" for name, attribute in sorted(node.attributes.items())]
        operation = printable(node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}")
        kind = ", ".join(_type(value) for value in node.outputs)
        kind = f"({kind})" if len(node.outputs) > 1 else kind
        arguments = ", ".join(given)
        template = f"{indent}{marked(key)} = {operation}({arguments}) : {kind}"
        if scope:
            template, arguments = template.replace(MARK, ""), arguments.replace(MARK, "")
        return Line(scope + key, path, template, operation, arguments, kind)

    def _value(self, value: ir.Value | None) -> str:
        if value is None:
            return "none"
        return self.names.get(value, "%" + printable(value.name or ""))


def module_path(node: ir.Node) -> str:
    """The dotted path of the module that made a node."""
    if SCOPES in node.metadata_props:
        try:
            scopes = ast.literal_eval(node.metadata_props[SCOPES])
            path = str(scopes[-2]).split("@", 1)[0] if len(scopes) > 1 else ""
            return "" if path == NO_MODULE else path
        except (ValueError, SyntaxError, IndexError, TypeError, MemoryError, RecursionError):
            pass  # somebody else's metadata under the same key
    parts = [part for part in (node.name or "").split("/") if part]
    return ".".join(parts[:-1]) if (node.name or "").startswith("/") else ""


def _type(value: ir.Value) -> str:
    """`f32[batch,7]`; what the file does not say is a question mark."""
    if value.dtype is None:
        return "?"
    name = _dtype(value.dtype)
    if value.shape is None:
        return f"{name}[?]"
    sizes = [str(size) if isinstance(size, int) else printable(size.value or "?") for size in value.shape]
    return f"{name}[{','.join(sizes)}]"


def _dtype(dtype: ir.DataType) -> str:
    short = {"FLOAT": "f32", "DOUBLE": "f64", "FLOAT16": "f16", "BFLOAT16": "bf16"}
    return short.get(dtype.name, dtype.name.lower().replace("uint", "u").replace("int", "i"))


def _torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    """The numbers of a tensor; types that torch lacks as their bytes."""
    values: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = np.asarray(tensor.numpy())
    if tensor.dtype is ir.DataType.BFLOAT16:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    try:
        return torch.from_numpy(values if values.flags.writeable else values.copy())
    except TypeError:
        return torch.from_numpy(np.frombuffer(tensor.tobytes(), np.uint8).copy())


def _constant(tensor: ir.TensorProtocol) -> str:
    """The numbers of a small constant: `[1, -1]`, `0.5`."""
    found = _numbers(np.asarray(tensor.numpy()))
    kind = _dtype(tensor.dtype)
    return printable(f"{found}" if kind in ("i64", "f32", "bool") else f"{kind} {found}")


def _numbers(values: np.ndarray[Any, Any]) -> Any:
    """As Python has them; fp32 with the digits that tell it from its neighbours."""
    if values.dtype != np.float32:
        return values.tolist()
    return np.array([float(str(value)) for value in values.reshape(-1)]).reshape(values.shape).tolist()


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return f"&{printable(attribute.name)}"
    if attribute.type is ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return _constant(tensor) if tensor.size <= INLINE else f"{_dtype(tensor.dtype)}{list(tensor.shape)}"
    value = attribute.value
    if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        value = _numbers(np.array(value, np.float32))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return printable(str(list(value)))
    return printable(str(value))
