"""One more output beside what a program returns: a value that training adds to its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.fx import Node

from rewriter.errors import RewriteError

if TYPE_CHECKING:
    from rewriter.program import Program

LEAF = torch.utils._pytree.tree_structure(0)


def add_output(program: Program, value: Node) -> None:
    """Let a clone return `(what it returned, value)`.

    A second added value would nest the first one: `((what it returned, first), second)`.
    """
    exported = program.exported
    result = next(iter(reversed(program.graph.nodes)))
    result.args = ((*result.args[0], value),)
    exported.graph_signature.output_specs.append(
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=value.name), None)
    )
    signature = exported.module_call_graph[0].signature
    assert signature is not None
    signature.out_spec = torch.utils._pytree.treespec_tuple([signature.out_spec, LEAF])


def remove_output(program: Program, value: Node) -> None:
    """Take the added output `value` away again. Raises `RewriteError` when another one was added after it."""
    exported = program.exported
    result = next(iter(reversed(program.graph.nodes)))
    *kept, last = result.args[0]
    signature = exported.module_call_graph[0].signature
    assert signature is not None
    if last is not value or signature.out_spec.type is not tuple:
        raise RewriteError(f"{value.name} is not the last output of the program", fix="Take back later outputs first.")
    result.args = (tuple(kept),)
    exported.graph_signature.output_specs.pop()
    signature.out_spec = signature.out_spec.child(0)
