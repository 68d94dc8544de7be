"""The repeated blocks of a model, as gradient checkpointing takes them: found from the module paths of the graph."""

from __future__ import annotations

from torch.fx import Node

from rewriter.program import Program
from rewriter.view import layers

FEWEST_WEIGHTS = 2  # a list of single layers is no list of blocks


def block_of(program: Program) -> dict[Node, str]:
    """Every operation inside a block -> the path of its block.

    A block is an outermost module whose path ends with a number, that holds at least two layers, and of whose class
    there are at least two.
    """
    paths = {node: _stack(node) for node in program.graph.nodes if node.op == "call_function"}
    classes = {path: kind for stack in paths.values() for path, kind in stack if path.rpartition(".")[2].isdigit()}
    weights = {site.weight for site in layers(program).values()}
    heavy = [p for p in classes if sum(name.startswith(f"{p}.") for name in weights) >= FEWEST_WEIGHTS]
    kinds = [classes[path] for path in heavy]
    blocks = {path for path in heavy if kinds.count(classes[path]) > 1}
    found = {node: next((path for path, _ in stack if path in blocks), None) for node, stack in paths.items()}
    return {node: path for node, path in found.items() if path is not None}


def _stack(node: Node) -> list[tuple[str, str]]:
    """The modules around an operation, outermost first: path and class."""
    return [
        (path.removeprefix("L['self'].").split("@", 1)[0], kind if isinstance(kind, str) else kind.__name__)
        for path, kind in (node.meta.get("nn_module_stack") or {}).values()
    ]
