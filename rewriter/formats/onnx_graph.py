"""Program -> ONNX graph, by torch's exporter on the program's own graph: nothing is traced a second time."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer
import torch
from torch.fx import Node

from rewriter.errors import RewriteError, UsageError
from rewriter.formats import onnx_nf4
from rewriter.formats.onnx_names import rename
from rewriter.module import ATTENTION, ATTENTION_DROPOUT, TRAIN_FLAG
from rewriter.program import Program, module_path

aten = torch.ops.aten
OPSETS = range(18, 24)  # those the exporter writes operators for
_KEPT_METADATA = ("namespace", "pkg.torch.onnx.class_hierarchy", "pkg.torch.onnx.name_scopes")
_COLOUR = re.compile("\x1b\\[[0-9;]*m")
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
_BATCH_NORM_FLAG = {  # operation -> position of its `training` flag
    aten.batch_norm.default: 5,
    aten.native_batch_norm.default: 5,
    aten._native_batch_norm_legit.default: 5,
}


def convert(
    program: Program, *, opset: int | None = None, nf4: str | None = None, keep_double_quant: bool = False
) -> tuple[ir.Model, onnx_nf4.Nf4Report | None]:
    """The ONNX model of a program in evaluation mode, with readable names and without anything of this machine.

    4-bit layers are written in the form `nf4`, by default bnb4; the report says how, and is None without such layers.

    Raises `UsageError` for an opset the exporter cannot write, and `RewriteError` for a program that trains its
    statistics, changes its buffers, or has an operation that ONNX lacks.
    """
    if opset is not None and opset not in OPSETS:
        raise UsageError(f"opset {opset} cannot be written", fix=f"Choose one of {OPSETS[0]} to {OPSETS[-1]}.")
    onnx_nf4.check_options(program, nf4, keep_double_quant)
    mutated = program.exported.graph_signature.buffers_to_mutate
    if mutated:
        raise RewriteError(
            f"the program changes its buffer {next(iter(mutated.values()))!r}; an ONNX model keeps no state",
            fix="Trace the model without a cache and with running statistics frozen.",
        )
    clone = program.clone()
    for graph in clone.graphs():
        for node in list(graph.nodes):
            _evaluate(node)
            _own_layout(node)
    clone.exported.graph_module.recompile()
    model = _export(clone, opset)
    inputs = [str(value.name) for value in model.graph.inputs]
    weights, report = set(program.tensors), None
    if onnx_nf4.has_nf4(program):
        report, made = onnx_nf4.lower(model, program, nf4 or "bnb4", keep_double_quant)
        weights |= made
    _tidy(model, weights)
    rename(model, program, inputs)
    common_passes.NameFixPass()(model)
    return model, report


def _evaluate(node: Node) -> None:
    """Turn dropout off; statistics of a batch cannot be turned into running ones without another result."""
    if node.target in TRAIN_FLAG:
        place = TRAIN_FLAG[node.target]
        if len(node.args) > place:
            node.update_arg(place, False)
        else:
            node.update_kwarg("train", False)
    elif node.target is ATTENTION:
        if len(node.args) > ATTENTION_DROPOUT:
            node.update_arg(ATTENTION_DROPOUT, 0.0)
        elif "dropout_p" in node.kwargs:
            node.update_kwarg("dropout_p", 0.0)
    elif node.target in _BATCH_NORM_FLAG and node.args[_BATCH_NORM_FLAG[node.target]] is True:
        raise RewriteError(
            f"{module_path(node) or node.name} was traced in training mode: it normalises by its batch's statistics",
            fix="Trace the model with rewriter.trace, which traces in evaluation mode.",
        )


def _own_layout(node: Node) -> None:
    """Copy what a view looks at: the exporter's attention may have other strides than the one that was traced."""
    if node.target in _VIEWS and isinstance(node.args[0], Node):
        source = node.args[0]
        layout: dict[str, Any] = {"memory_format": torch.contiguous_format}
        with node.graph.inserting_before(node):
            copy = node.graph.call_function(aten.clone.default, (source,), layout)
        copy.meta = {**source.meta, "val": source.meta["val"].clone(**layout)}
        node.update_arg(0, copy)


def _export(program: Program, opset: int | None) -> ir.Model:
    try:
        with quiet():
            exported = torch.onnx.export(
                program.exported,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                custom_translation_table=onnx_nf4.translations(),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise RewriteError(
            "torch.onnx cannot write this program",
            evidence=list(_reasons(error))[:6],
            fix="Replace the operation it names in the model, or export with --to torch.",
        ) from error
    if exported is None:
        raise RewriteError("torch.onnx returned no model", fix="Report this as a bug.")
    model: ir.Model = exported.model
    if opset is not None and model.opset_imports.get("") != opset:
        raise RewriteError(
            f"the model needs opset {model.opset_imports.get('')}, not {opset}", fix="Leave the opset out."
        )
    return model


def _reasons(error: BaseException) -> Iterator[str]:
    """The first line of every exception in the chain, innermost first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for one in reversed(chain):
        yield _COLOUR.sub("", f"{type(one).__name__}: {one}".strip().splitlines()[0])[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch.onnx and onnxscript print, log and warn to themselves; errors still arrive as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Constants(ir.passes.InPlacePass):
    """Make every initializer that is no weight a constant in the graph: initializers are what a checkpoint holds."""

    def __init__(self, weights: set[str]) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        folded = [value for name, value in model.graph.initializers.items() if name not in self.weights]
        for value in folded:
            node = ir.node("Constant", [], attributes={"value": value.const_value})
            value.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
            node.outputs[0].name = value.name
            node.outputs[0].const_value = value.const_value
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            del model.graph.initializers[str(value.name)]
            model.graph.insert_before(model.graph[0], node)
        return ir.passes.PassResult(model, modified=bool(folded))


def _hide_completely(model: ir.Model) -> None:
    """Make the exporter's boolean attention masks infinite: it writes the smallest finite number.

    With that a row that sees nothing (padding on the left under a causal mask) attends to everything. With infinity
    its softmax is NaN, which the exporter turns into the zeros that torch returns.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Softmax" or not any(use.op_type == "IsNaN" for use in node.outputs[0].consumers()):
            continue
        scores = node.inputs[0].producer() if node.inputs[0] is not None else None
        for operand in scores.inputs if scores is not None and scores.op_type == "Add" else ():
            mask = operand.producer() if operand is not None else None
            if mask is None or mask.op_type != "Where" or mask.inputs[2] is None:
                continue
            hidden = ir.convenience.get_const_tensor(mask.inputs[2])
            if hidden is not None and hidden.size == 1 and float(hidden.numpy()) < -1e4:
                value = ir.tensor(np.full_like(hidden.numpy(), -np.inf), dtype=hidden.dtype)
                constant = ir.node("Constant", [], attributes={"value": value})
                mask.prepend(constant)
                mask.replace_input_with(2, constant.outputs[0])


def _tidy(model: ir.Model, weights: set[str]) -> None:
    """Fold what is constant, but no weight, and drop what is unused and what speaks of this machine."""

    def should_fold(node: ir.Node) -> bool | None:
        named = any(value is not None and value.is_initializer() and value.name in weights for value in node.inputs)
        return False if named else None

    with quiet():
        onnxscript.optimizer.fold_constants_ir(model, should_fold=should_fold)
        _hide_completely(model)
        # Not onnxscript's whole optimizer: it merges weights of equal value and fuses others into nameless ones.
        for cleaning in (
            _Constants(weights),
            common_passes.IdentityEliminationPass(),
            common_passes.CommonSubexpressionEliminationPass(),
            common_passes.RemoveUnusedNodesPass(),
            common_passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            common_passes.RemoveUnusedOpsetsPass(),
            common_passes.OutputFixPass(),
        ):
            cleaning(model)
    model.doc_string = model.graph.doc_string = None
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.doc_string = None
        for key in [key for key in node.metadata_props if key not in _KEPT_METADATA]:
            del node.metadata_props[key]
