"""The two sides of a comparison, on one level: programs, ONNX graphs, or weights alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from rewriter.errors import RewriteError
from rewriter.formats import adapterhub, huggingface, onnx_text, peft, pickle, safetensors
from rewriter.formats.onnx_graph import convert
from rewriter.formats.sniff import Kind, sniff
from rewriter.graph import Graph
from rewriter.program import Program
from rewriter.text import Line, marked, printable, tensor_type

ADAPTERS = {Kind.PEFT_ADAPTER: peft.stored, Kind.ADAPTERHUB: adapterhub.stored}
FILES: dict[Kind, Callable[[Path], dict[str, torch.Tensor]]] = {
    Kind.SAFETENSORS: safetensors.load,
    Kind.STATE_DICT: pickle.load_state_dict,
    Kind.LEGACY_PICKLE: pickle.load_state_dict,
}


def sides(
    before: str | Path, after: str | Path, load: Callable[[str], Program], *, weights: bool = False
) -> tuple[Graph, Graph]:
    """Both sources as graphs that can be compared.

    A program beside an ONNX model is converted as `export` would; beside weights without a graph (adapters, state
    dicts, or with `weights` everything) only its tensors count. Raises what reading them raises.
    """
    given = str(before), str(after)
    kinds = [sniff(Path(source)) if Path(source).exists() else None for source in given]
    weights = weights or any(kind in ADAPTERS or kind in FILES for kind in kinds)
    if weights:
        one, other = (_weights(source, kind, load) for source, kind in zip(given, kinds, strict=True))
        return one, other
    if Kind.ONNX in kinds:
        one, other = (
            onnx_text.read_graph(Path(source)) if kind is Kind.ONNX else onnx_text.graph(convert(load(source))[0])
            for source, kind in zip(given, kinds, strict=True)
        )
        return one, other
    return Graph.of(load(given[0])), Graph.of(load(given[1]))


def _weights(source: str, kind: Kind | None, load: Callable[[str], Program]) -> Graph:
    if kind in ADAPTERS:
        return of_tensors(ADAPTERS[kind](Path(source)))
    if kind in FILES:
        return of_tensors(FILES[kind](Path(source)))
    if kind is Kind.HUGGINGFACE:
        return of_tensors(huggingface.stored(Path(source)))
    if kind is Kind.ONNX:
        return of_tensors(dict(onnx_text.read_graph(Path(source)).tensors))
    return of_tensors(load(source).tensors)


def of_tensors(tensors: dict[str, torch.Tensor]) -> Graph:
    """Weights as a text without operations."""
    if not tensors:
        raise RewriteError("there are no tensors to compare", fix="Name a model or an adapter that has weights.")
    lines = []
    for name, tensor in tensors.items():
        key, kind = "@" + printable(name), tensor_type(tensor)
        lines.append(Line(key, name.rpartition(".")[0], f"param {marked(key)} : {kind}", type=kind))
    return Graph(tuple(lines), tensors)
