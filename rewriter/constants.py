"""What in a graph depends on parameters only, and its value."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch.fx import Node

from rewriter.errors import RewriteError
from rewriter.mutation import changed_in_place
from rewriter.program import Program

aten = torch.ops.aten
CREATION = {
    aten.eye.default,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.arange.default,
    aten.arange.start,
    aten.scalar_tensor.default,
}

WRAPPERS = {  # operations that run a graph under another mode of the framework
    torch.ops.higher_order.wrap_with_autocast,
    torch.ops.higher_order.wrap_with_set_grad_enabled,
}


class Constants:
    """The constant values of a program: which nodes are constant, which parameters they read, and what they hold.

    A node is constant when it depends on parameters, buffers and literals only. Values are computed on request, in
    the precision asked for, whatever types the graph names.
    """

    def __init__(self, program: Program, precision: torch.dtype = torch.float32) -> None:
        self.program = program
        self.precision = precision
        self.device = torch.device("meta")  # proofs need shapes only; `with_values` computes
        self._tensors = program.tensors
        self.leaves: dict[Node, frozenset[str]] = {}  # constant node -> the parameters it reads
        self._values: dict[Node, Any] = {}
        self._computed: set[Node] = set()
        self.changed = changed_in_place(program)
        for node in program.graph.nodes:
            name = program.parameter_name(node)
            if name is not None:
                if node not in self.changed:
                    self.leaves[node] = frozenset([name])
            elif node.op == "get_attr":
                self.leaves[node] = frozenset()
            elif node.op == "call_function" and self._is_constant(node):
                self.leaves[node] = frozenset().union(*(self.leaves[source] for source in node.all_input_nodes))

    def _is_constant(self, node: Node) -> bool:
        if node in self.changed:
            return False
        if not node.all_input_nodes:
            return node.target in CREATION
        if not all(source in self.leaves for source in node.all_input_nodes):
            return False
        if any(source.op == "get_attr" for source in node.all_input_nodes):
            return node.target in WRAPPERS and all(_is_pure(inner) for inner in self._body(node).graph.nodes)
        tags = getattr(node.target, "tags", ())
        return node.target is operator.getitem or torch.Tag.nondeterministic_seeded not in tags

    def with_values(self) -> Constants:
        """The same constants as they were at construction, with values instead of shapes alone."""
        other = copy.copy(self)
        other.device = torch.device("cpu")
        other._values, other._computed = {}, set()
        return other

    def __contains__(self, value: object) -> bool:
        """Whether an operand is constant: a literal, or a constant node."""
        return not isinstance(value, Node) or value in self.leaves

    def bare(self, value: object) -> str | None:
        """The name of the parameter, when the operand is a parameter as it is."""
        return self.program.parameter_name(value)

    def reads(self, value: object) -> frozenset[str]:
        return self.leaves[value] if isinstance(value, Node) else frozenset()

    def tensor(self, value: Any) -> torch.Tensor:
        """A number or a tensor as a tensor in the precision asked for."""
        return torch.as_tensor(value, dtype=self.precision, device=self.device)

    def value(self, operand: Any) -> Any:
        """The value of a constant operand; tensors in the precision asked for."""
        if not isinstance(operand, Node):
            return operand
        todo = [operand]
        while todo:
            node = todo[-1]
            missing = [source for source in node.all_input_nodes if source not in self._values]
            if node in self._values or missing:
                todo.extend(missing) if node not in self._values else todo.pop()
                continue
            self._values[node] = self._evaluate(node)
            self._computed.add(node)
            todo.pop()
            for source in node.all_input_nodes:  # what everybody has read by now need not stay in memory
                if self._computed.issuperset(source.users):
                    self._values.pop(source, None)
        return self._values[operand]

    def _evaluate(self, node: Node) -> Any:
        if node.op == "get_attr":
            return None  # read by `_run`
        name = self.program.parameter_name(node)
        if name is not None:
            tensor = self._tensors[name].detach()
            if tensor.device.type == "meta" and self.device.type != "meta":
                raise RewriteError(f"{name} has no values, only a shape", fix="Load the weights first.")
            return tensor.to(device=self.device, dtype=self.precision if tensor.is_floating_point() else None)
        if node.target in WRAPPERS:
            return self._run(node)
        args = torch.fx.node.map_aggregate(node.args, self._prepare)
        kwargs = torch.fx.node.map_aggregate(node.kwargs, self._prepare)
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:  # nobody writes into a tensor of a program
            args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, args)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _body(self, node: Node) -> torch.fx.GraphModule:
        """The graph that an operation wraps."""
        held = next(source for source in node.all_input_nodes if source.op == "get_attr")
        body = self.program.exported.graph_module.get_submodule(str(held.target))
        assert isinstance(body, torch.fx.GraphModule)
        return body

    def _run(self, node: Node) -> Any:
        """The results of a wrapped graph."""
        place = next(i for i, arg in enumerate(node.args) if isinstance(arg, Node) and arg.op == "get_attr")
        given = iter(torch.fx.node.map_aggregate(node.args[place + 1 :], self._prepare))
        values: dict[Node, Any] = {}
        for inner in self._body(node).graph.nodes:
            args = torch.fx.node.map_aggregate(inner.args, lambda value: self._prepare(value, values))
            kwargs = torch.fx.node.map_aggregate(inner.kwargs, lambda value: self._prepare(value, values))
            if inner.op == "output":
                return args[0]
            values[inner] = next(given) if inner.op == "placeholder" else inner.target(*args, **kwargs)
        raise AssertionError("a graph without output")

    def _prepare(self, value: Any, values: dict[Node, Any] | None = None) -> Any:
        if isinstance(value, Node):
            return (self._values if values is None else values)[value]
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return self.precision
        return self.device if isinstance(value, torch.device) else value


def _is_pure(node: Node) -> bool:
    """Whether an operation gives the same for the same and writes nowhere."""
    schema = getattr(node.target, "_schema", None)
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op in ("placeholder", "output") or not (schema is None or schema.is_mutable or random)
