"""Linear layers with 4-bit weights in ONNX: what each form needs, and their nodes in place of the compiler's own."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnx.defs import OpSchema
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.errors import RewriteError, UsageError
from rewriter.formats.onnx_nf4_forms import EIGHT_BIT_ACTIVATIONS, TABLES, Layer, bnb4, codebook, eight_bit_weight, int8
from rewriter.program import Program
from runtime.nf4_linear import nf4_linear, nf4_linear_double, scales

DOMAIN = "rewriter"
FORMS = {"bnb4": bnb4, "codebook": codebook, "int8": int8}
NO_FOLDING = ("ConstantFolding",)
_OPERATORS = (nf4_linear._opoverload, nf4_linear_double._opoverload)
_INPUTS = {
    "nf4_linear": ("x", "packed", "absmax", "bias"),
    "nf4_linear_double": ("x", "packed", "absmax", "nested_absmax", "nested_offset", "bias"),
}
_SUMMARY = {
    "bnb4": "com.microsoft.MatMulBnb4, for ONNX Runtime; the program's own bytes, the same weights",
    "codebook": "standard operators, for every ONNX runtime; the program's own bytes, the same weights. ONNX Runtime "
    "unpacks them to float32 when it loads the model, unless the session is made with "
    'disabled_optimizers=["ConstantFolding"] (session entry optimization.disable_specified_optimizers)',
    "int8": "com.microsoft.MatMulNBits in 8 bits, for ONNX Runtime, which rounds activations to 8 bits too",
}


@dataclass(frozen=True, slots=True)
class Nf4Report:
    """How 4-bit layers were written; `weight_error` is that of the worst, root mean square, relative to its weight."""

    form: str
    layers: int
    keep_double_quant: bool
    weight_error: float
    sources: tuple[str, ...] = field(repr=False)  # tensors of the program that the file holds in another form

    @property
    def summary(self) -> str:
        """One line: the form, where it runs, what it needs, and what it adds to the error."""
        kept = "; scales computed in the graph" if self.keep_double_quant else ""
        added = f"; weights are off by {self.weight_error:.2%} more" if self.form == "int8" else ""
        return f"{self.layers} 4-bit layers as {_SUMMARY[self.form]}{kept}{added}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "sources": list(self.sources), "summary": self.summary}


def has_nf4(program: Program) -> bool:
    """Whether any layer of a program has a 4-bit weight."""
    return any(node.target in _OPERATORS for graph in program.graphs() for node in graph.nodes)


def check_options(program: Program, form: str | None, keep_double_quant: bool) -> None:
    """Raise `UsageError` for options about 4-bit weights that this program has no use for."""
    targets = {node.target for graph in program.graphs() for node in graph.nodes}
    if form is not None and form not in FORMS:
        raise UsageError(f"there is no form {form!r} of 4-bit weights", fix=f"Choose one of {', '.join(FORMS)}.")
    if (form is not None or keep_double_quant) and not targets & {*_OPERATORS}:
        raise UsageError(
            "the program has no 4-bit weights, so there is no form to choose for them",
            fix="Quantise it first (`rewriter apply --pass nf4`), or leave --nf4 and --keep-double-quant out.",
        )
    if keep_double_quant and (form == "int8" or _OPERATORS[1] not in targets):
        reason = "form int8 has other scales" if form == "int8" else "the program's scales are not quantised"
        raise UsageError(f"{reason}; there is no double quantisation to keep", fix="Leave --keep-double-quant out.")


# -- from torch: one node per layer, under the compiler's own name ----------------------------------------------------


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch.onnx writes for the operators of 4-bit layers: placeholders, which `lower` replaces."""
    single, double = (onnxscript.values.Op(_OPSET, name, _schema(name)) for name in _INPUTS)

    def nf4_linear(x, packed, absmax, bias, out_features: int, block_size: int, kind: str):  # type: ignore[no-untyped-def]
        return single(x, packed, absmax, bias, out_features=out_features, block_size=block_size, kind=kind)

    def nf4_linear_double(  # type: ignore[no-untyped-def]
        x, packed, absmax, nested_absmax, nested_offset, bias, out_features: int, block_size: int, kind: str
    ):
        tensors = x, packed, absmax, nested_absmax, nested_offset, bias
        return double(*tensors, out_features=out_features, block_size=block_size, kind=kind)

    return dict(zip(_OPERATORS, (nf4_linear, nf4_linear_double), strict=True))


_OPSET = onnxscript.values.Opset(DOMAIN, 1)


def _schema(name: str) -> OpSchema:
    optional, single = OpSchema.FormalParameterOption.Optional, OpSchema.FormalParameterOption.Single
    types = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "double", "uint8")]
    attributes = {"out_features": OpSchema.AttrType.INT, "block_size": OpSchema.AttrType.INT}
    return OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[
            OpSchema.FormalParameter(each, f"T_{each}", param_option=optional if each == "bias" else single)
            for each in _INPUTS[name]
        ],
        outputs=[OpSchema.FormalParameter("y", "T_x")],
        type_constraints=[(f"T_{each}", types, "") for each in _INPUTS[name]],
        attributes=[
            OpSchema.Attribute(key, kind, required=True)
            for key, kind in {**attributes, "kind": OpSchema.AttrType.STRING}.items()
        ],
    )


# -- to ONNX ----------------------------------------------------------------------------------------------------------


def lower(model: ir.Model, program: Program, form: str, keep_double_quant: bool) -> tuple[Nf4Report, set[str]]:
    """Write every 4-bit layer of a model in a form, in place; also returned are the names of the new weights.

    Raises `RewriteError`, with the layer's module path, for a layer that the form cannot hold.
    """
    first = {name: group[0] for group in program.tied() for name in group}
    made: dict[str, ir.Value] = {}
    errors, sources = [], set[str]()
    nodes = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
    for node in nodes:
        layer = _layer(node, first, made, keep_double_quant)
        errors.append(_replace(node, layer, FORMS[form]))
        sources |= {str(value.name) for value in node.inputs if value is not None and value.is_initializer()}
    for value in made.values():
        model.graph.register_initializer(value)
    model.opset_imports.pop(DOMAIN, None)
    if form != "codebook":
        model.opset_imports["com.microsoft"] = 1
    report = Nf4Report(form, len(nodes), keep_double_quant, max(errors, default=0.0), tuple(sorted(sources)))
    return report, {*made} - {*TABLES.values()}


def _layer(node: ir.Node, first: Mapping[str, str], made: dict[str, ir.Value], keep: bool) -> Layer:
    path = module_path(node) or str(node.name)
    inputs = dict(zip(_INPUTS[node.op_type], [*node.inputs, None], strict=False))
    x, bias = inputs.pop("x"), inputs.pop("bias", None)
    assert x is not None
    tensors: dict[str, torch.Tensor] = {}
    for name, value in inputs.items():
        if value is None or value.const_value is None:
            raise RewriteError(
                f"{path}: its 4-bit weight is computed while the model runs; an ONNX model needs it stored",
                fix="Bake the computation into the weight first (rewriter bake).",
            )
        tensors[name] = torch.from_numpy(value.const_value.numpy().copy())
    if node.op_type == "nf4_linear_double":
        tensors["absmax"] = scales(tensors["absmax"], tensors["nested_absmax"], tensors["nested_offset"])
    packed = inputs["packed"]
    return Layer(
        path=path,
        key=first.get(str(packed.name), str(packed.name)) if packed is not None else "",
        x=x,
        bias=bias,
        stored=inputs,
        packed=tensors["packed"].reshape(-1),
        absmax=tensors["absmax"].reshape(-1),
        in_features=_width(x, path),
        out_features=node.attributes["out_features"].as_int(),
        block_size=node.attributes["block_size"].as_int(),
        kind=node.attributes["kind"].as_string(),
        keep_double_quant=keep and node.op_type == "nf4_linear_double",
        made=made,
        metadata=dict(node.metadata_props),
    )


def _width(x: ir.Value, path: str) -> int:
    width = str(x.shape[-1]) if x.shape is not None and len(x.shape) else ""  # the exporter writes some sizes as text
    if not width.isdigit():
        raise RewriteError(f"{path}: the width of its input is not known", fix="Trace the model with a fixed width.")
    return int(width)


def _replace(node: ir.Node, layer: Layer, write: Callable[[Layer], tuple[ir.Value, float]]) -> float:
    output, error = write(layer)
    if layer.bias is not None:
        output = layer.op("Add", [output, layer.bias])
    graph = node.graph
    assert graph is not None
    old = node.outputs[0]
    output.name, output.type, output.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.insert_before(node, layer.nodes)
    graph.remove(node, safe=True)
    return error


def module_path(node: ir.Node) -> str:
    """The dotted path of the module that made a node, from what torch's exporter wrote about it."""
    scopes: list[str] = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['', '']"))
    return scopes[-2].split("@", 1)[0] if len(scopes) > 1 else ""


# -- how 8-bit levels are checked -------------------------------------------------------------------------------------


class EightBit(TorchDispatchMode):
    """Compute 4-bit layers with their levels rounded to 8 bits, the numbers that form int8 stands for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _OPERATORS:
            return func(*args, **(kwargs or {}))
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs or {}
        absmax = given["absmax"]
        if func is _OPERATORS[1]:
            absmax = scales(absmax, given["nested_absmax"], given["nested_offset"])
        x, bias, size = given["x"], given["bias"], (given["out_features"], given["x"].shape[-1])
        weight = eight_bit_weight(given["packed"], absmax, size[0] * size[1], given["block_size"], given["kind"])
        return torch.nn.functional.linear(x, weight.reshape(size).to(x.dtype), bias)


def use_eight_bit_activations(model: onnx.ModelProto) -> None:
    """Let ONNX Runtime round activations to 8 bits, in place: without it, its 8-bit kernel is slower than bnb4's."""
    waiting = [*model.graph.node]
    while waiting:
        node = waiting.pop()
        for attribute in node.attribute:
            waiting += attribute.g.node
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = EIGHT_BIT_ACTIVATIONS
