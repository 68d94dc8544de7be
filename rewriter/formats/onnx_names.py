"""Names in an ONNX model that people know: the program's inputs, its output fields, batch and length, its weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from rewriter.formats.random_inputs import example_sizes
from rewriter.program import Program

_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def rename(model: ir.Model, program: Program, inputs: Sequence[str]) -> None:
    """Give a freshly converted model its readable names, in place; `inputs` are those that the exporter gave."""
    _name_weights(model, program)
    outputs = output_names(program, {*inputs, *model.graph.initializers})
    wanted = dict(zip([*model.graph.inputs, *model.graph.outputs], [*inputs, *outputs], strict=True))
    names = {*wanted.values()}
    for value in _values(model):
        if value not in wanted and value.name in names:
            value.name = f"{value.name}_"
    for value, name in wanted.items():
        value.name = name
    _name_dimensions(model, dimension_names(program))


def output_names(program: Program, taken: Collection[str]) -> list[str]:
    """The field names of what the program returns (`logits`, dictionary keys), or `output_0`, `output_1`, ..."""
    spec = program.exported.call_spec.out_spec
    names = list(_paths(spec, ""))
    kinds = program.exported.graph_signature.user_outputs
    kept = [name for name, kind in zip(names, kinds, strict=True) if isinstance(kind, str)]
    return [f"output_{name or 0}" if name in taken or not name or name.isdigit() else name for name in kept]


def _paths(spec: Any, prefix: str) -> Iterator[str]:
    """The dotted path of every leaf of a tree of results."""
    if spec.is_leaf():
        yield prefix
        return
    children = spec.children()
    for name, child in zip(_keys(spec, len(children)), children, strict=True):
        yield from _paths(child, f"{prefix}.{name}" if prefix else name)


def _keys(spec: Any, count: int) -> list[str]:
    context: Any = spec.context
    if hasattr(context, "_fields"):  # a named tuple
        return list(context._fields)
    while isinstance(context, list | tuple) and context and isinstance(context[-1], list):
        context = context[-1]  # a default dictionary keeps its keys one level down
    if isinstance(context, list) and len(context) == count and all(isinstance(key, str | int) for key in context):
        return [str(key) for key in context]
    return [str(number) for number in range(count)]


def dimension_names(program: Program) -> dict[str, str]:
    """Symbol -> name: batch, length, height, width by position; a second one is called after its input."""
    sizes = example_sizes(program)
    names: dict[str, str] = {}
    for node in program.inputs():
        for place, symbol in _dynamic(node):
            if symbol in names:
                continue
            twin = _twin(program, node, place, sizes, names)
            names[symbol] = names[twin] if twin else _fresh(node, place, set(names.values()))
    return names


def _dynamic(node: Node) -> Iterator[tuple[int, str]]:
    value = node.meta.get("val")
    shape: Any = value.shape if isinstance(value, Tensor) else ()
    for place, size in enumerate(shape):
        if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
            yield place, str(size.node.expr)


def _twin(program: Program, node: Node, place: int, sizes: Mapping[str, int], names: Mapping[str, str]) -> str | None:
    """A named symbol at the same place, of the same size, in an input that shares another dimension with this one.

    A mask's batch is the batch of the tokens it masks, though a trace that only broadcasts it need not know.
    """
    mine = dict(_dynamic(node))
    for other in program.inputs():
        theirs = dict(_dynamic(other))
        candidate = theirs.get(place)
        shared = any(at != place and theirs.get(at) == symbol for at, symbol in mine.items())
        if candidate is not None and candidate in names and shared and sizes[candidate] == sizes[mine[place]]:
            return candidate
    return None


def _fresh(node: Node, place: int, taken: set[str]) -> str:
    value: Tensor = node.meta["val"]
    by_place = {0: "batch"}
    if value.ndim in (2, 3):
        by_place[1] = "length"
    if value.ndim == 4 and value.is_floating_point():
        by_place |= {2: "height", 3: "width"}
    owner = "decoder" if node.name.startswith("decoder_") else node.name
    for name in (by_place.get(place, ""), f"{owner}_{by_place.get(place, f'dimension_{place}')}"):
        if name and name not in taken:
            return name
    return f"{node.name}_dimension_{place}"


def _name_dimensions(model: ir.Model, names: Mapping[str, str]) -> None:
    def readable(match: re.Match[str]) -> str:
        return names.get(match.group(), match.group())

    for value in _values(model):
        if value.shape is None:
            continue
        dimensions: list[int | str | None] = []
        for size in value.shape:
            text = size if isinstance(size, int) else size.value
            if isinstance(text, str):
                dimensions.append(int(text) if text.isdigit() else _SYMBOL.sub(readable, text))
            else:
                dimensions.append(text)
        value.shape = ir.Shape(dimensions)


def _name_weights(model: ir.Model, program: Program) -> None:
    """One initializer per tensor, under the first of its names: the one under which checkpoints store tied weights."""
    initializers = model.graph.initializers
    for group in program.tied():
        present = [initializers[name] for name in group if name in initializers]
        for double in present[1:]:
            double.replace_all_uses_with(present[0], replace_graph_outputs=True)
            del initializers[str(double.name)]
        if present and present[0].name != group[0]:
            del initializers[str(present[0].name)]
            present[0].name = group[0]
            if present[0].const_value is not None:
                present[0].const_value.name = group[0]
            initializers.add(present[0])


def _values(model: ir.Model) -> Iterable[ir.Value]:
    seen: dict[ir.Value, None] = dict.fromkeys([*model.graph.inputs, *model.graph.initializers.values()])
    for node in model.graph.all_nodes():
        seen.update(dict.fromkeys(node.outputs))
    return seen
