"""Values that stand for a parameter and are constant: they can become the parameter's own value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from passes.sparse import aliases
from rewriter.constants import Constants
from rewriter.edit import Edit
from rewriter.errors import LawError
from rewriter.program import Program
from rewriter.view import top


@dataclass(frozen=True, slots=True)
class StandIn:
    """A parameter that nothing reads as it is: every reader reads a constant in its place, such as `W + P θ`.

    `nodes` are these constants by the name that they stand for: several, all of one value, for a tied tensor.
    """

    path: str
    names: tuple[str, ...]  # of the tensor
    nodes: Mapping[str, Node]
    reads: frozenset[str]  # every parameter behind the constants
    constants: Constants

    @property
    def weight(self) -> str:
        return self.path

    def value(self) -> Tensor:
        """What the readers read, in the precision of the constants."""
        value: Tensor = self.constants.with_values().value(self.nodes[self.path])
        return value


def stand_ins(program: Program, constants: Constants) -> dict[str, StandIn]:
    """Every name of a parameter of which a constant holds the place -> what stands there."""
    added = {name for step in program.steps for name in step.added}
    found: dict[str, StandIn] = {}
    for placeholder in program.graph.nodes:
        name = program.parameter_name(placeholder)
        if name is None or not placeholder.users or name in added or name in found or top(placeholder) is placeholder:
            continue
        names = aliases(program, name)
        read = {each: node for each in names if (node := program.placeholder(each)).users}
        nodes = {each: top(node) for each, node in read.items()}
        if all(_stands(constants, read[each], nodes[each]) for each in read) and _equal(
            constants, list(nodes.values())
        ):
            reads = frozenset().union(*(constants.reads(node) for node in nodes.values()))
            found |= dict.fromkeys(names, StandIn(name, names, nodes, reads, constants))
    return found


def _stands(constants: Constants, placeholder: Node, node: Node) -> bool:
    """Whether `node` is a constant of the parameter's type, and every reader of the parameter reads it through this."""
    one, other = placeholder.meta["val"], node.meta["val"]
    if node is placeholder or node not in constants or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    behind, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in behind:
                behind.add(source)
                todo.append(source)
    todo, seen = [placeholder], {placeholder}
    while todo:
        for user in todo.pop().users:
            if user not in behind:
                return False
            if user is not node and user not in seen:
                seen.add(user)
                todo.append(user)
    return True


def _equal(constants: Constants, nodes: list[Node]) -> bool:
    return len(nodes) == 1 or all(
        torch.equal(constants.with_values().value(nodes[0]), constants.with_values().value(node)) for node in nodes[1:]
    )


def settle(edit: Edit, site: StandIn, *, allow_nonfinite: bool = False) -> tuple[Tensor, Tensor]:
    """Give the parameter the value that stands in its place; returns (exact value, value before).

    Raises `LawError` when the value is not finite in the parameter's type.
    """
    before = edit.program.tensor(site.path)
    exact = site.value()
    value = exact.to(before.device, before.dtype).contiguous()
    bad = int((~torch.isfinite(value)).sum())
    if bad and not allow_nonfinite:
        raise LawError(
            f"{site.path} would hold {bad} non-finite values",
            evidence=[f"computed from: {', '.join(sorted(site.reads)[:6])}"],
            fix="Repair the adapter or the base, or allow non-finite values.",
        )
    edit.set_value(site.path, value)
    for name in site.names:
        edit.set_value(name, edit.program.tensor(site.path))
    for name, node in site.nodes.items():
        edit.redirect(node, edit.program.placeholder(name))
    edit.erase(site.nodes.values())
    return exact, before
