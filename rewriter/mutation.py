"""What the operations of a graph write into: values that others still read, and tensors of the program itself."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from rewriter.program import Program

aten = torch.ops.aten
ALIASING = {  # operations whose result may be, or lie in, the memory of their first input
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    operator.getitem,
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.narrow.default,
    aten.alias.default,
    aten.detach.default,
    aten.diagonal.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
}


def changed_in_place(program: Program) -> set[Node]:
    """The values that an operation changes in place while others still read them, under this or an aliasing name.

    An in-place operation whose own result is read from then on (`x = x.add_(y)`) is harmless and not among them,
    unless what it changes is a tensor of the program: the next run reads that one changed.
    """
    changed: set[Node] = set()
    for node in program.graph.nodes:
        value = _target(node)
        if value is None:
            continue
        aliases = [value]
        for alias in aliases:  # grows while it is walked
            aliases += [user for user in alias.users if user.target in ALIASING and user.args[0] is alias]
        family = {user for alias in aliases for user in alias.users if user.target is not aten.sym_size.int}
        if value.op == "placeholder":
            changed |= set(aliases)
        if any(node < user for user in family):
            changed |= {alias for alias in aliases if alias.op == "call_function"}
            changed |= {user for user in family if node < user}
    return changed


def written(program: Program) -> set[str]:
    """The names of the buffers that running the program changes."""
    names = set(program.exported.graph_signature.buffers_to_mutate.values())
    for node in program.graph.nodes:
        name = program.parameter_name(_target(node))
        if name is not None:
            names.add(name)
    return names


def _target(node: Node) -> Node | None:
    """The value whose memory an operation writes into; None for one that writes nowhere, or a value into itself."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or not node.args or not isinstance(node.args[0], Node):
        return None
    if node.target is aten.set_.source_Tensor and node.args[0] is node.args[1]:
        return None
    return _memory(node.args[0])


def _memory(value: Node) -> Node:
    """The value whose memory an alias reads."""
    while value.op == "call_function" and value.target in ALIASING and isinstance(value.args[0], Node):
        value = value.args[0]
    return value
