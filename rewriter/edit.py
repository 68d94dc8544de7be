"""The only code that changes a graph.

An `Edit` adds parameters and operations to a program, keeps type, module path and origin of every node, and records
what it did, so that a step can be shown, replayed and taken back. Passes change programs through it and through
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, TensorArgument
from torch.fx import Node

from rewriter.errors import RewriteError, UsageError
from rewriter.outputs import add_output, remove_output
from rewriter.program import LABEL, Origin, Program, module_path
from rewriter.retype import evaluate, fake_mode, retype


class Edit:
    """The changes of one step to one program that nobody else has seen yet."""

    def __init__(self, program: Program, *, number: int, name: str) -> None:
        self.program = program
        self.number = number
        self.name = name
        self.added: list[str] = []
        self.trainable: list[str] = []
        self.originals: dict[str, torch.Tensor] = {}
        self.notes: dict[str, dict[str, float]] = {}
        self.removes = False  # True once an operation that was there before is rewired or removed
        self.discards = False  # True when the step does not keep what undoing it would need
        self._inserted: set[Node] = set()
        self._moved: dict[Node, Node] = {}

    # -- tensors ------------------------------------------------------------------------------------------------

    def parameter(self, name: str, value: torch.Tensor, *, trainable: bool = True) -> Node:
        """Add a parameter under a new name and return its placeholder."""
        return self._tensor(name, torch.nn.Parameter(value.detach(), requires_grad=trainable), InputKind.PARAMETER)

    def buffer(self, name: str, value: torch.Tensor) -> Node:
        """Add a tensor that never trains."""
        return self._tensor(name, value.detach(), InputKind.BUFFER)

    def hold(self, name: str, value: torch.Tensor) -> Node:
        """Add a tensor that takes the place of one of the model's own: it counts as the model's, not as added.

        A buffer, or a parameter when it is an `nn.Parameter`.
        """
        kind = InputKind.PARAMETER if isinstance(value, torch.nn.Parameter) else InputKind.BUFFER
        return self._tensor(name, value, kind, owned=False)

    def _tensor(self, name: str, value: torch.Tensor, kind: InputKind, *, owned: bool = True) -> Node:
        exported = self.program.exported
        if name in exported.state_dict or name in exported.constants:
            raise UsageError(
                f"the program already has a parameter {name!r}",
                fix="Give this adapter another name, or undo the first.",
            )
        # InputSpecs come in the order of the placeholders: parameters, buffers, constants, then what a caller passes.
        signature = exported.graph_signature
        before = (InputKind.PARAMETER,) if kind is InputKind.PARAMETER else (InputKind.PARAMETER, InputKind.BUFFER)
        position = max((i + 1 for i, s in enumerate(signature.input_specs) if s.kind in before), default=0)
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        prefix = "p_" if kind is InputKind.PARAMETER else "b_"
        with self.program.graph.inserting_before(
            placeholders[position] if position < len(placeholders) else self._first_operation()
        ):
            node: Node = self.program.graph.placeholder(prefix + _identifier(name))
        with torch.no_grad():
            node.meta["val"] = fake_mode(self.program).from_tensor(value, static_shapes=True)
        if owned:
            Origin(self.number, self.name, name).write(node)
            self.added.append(name)
        persistent = True if kind is InputKind.BUFFER else None
        signature.input_specs.insert(position, InputSpec(kind, TensorArgument(node.name), name, persistent))
        exported.state_dict[name] = value
        self.program.__dict__.pop("specs", None)
        if kind is InputKind.PARAMETER and value.requires_grad:
            self.trainable.append(name)
        return node

    def train(self, name: str) -> None:
        """Declare a parameter that was there before trainable; its present value is kept for undo."""
        self.originals.setdefault(name, self.program.tensor(name))
        if name not in self.trainable:
            self.trainable.append(name)

    def set_value(self, name: str, value: torch.Tensor) -> None:
        """Put another tensor of the same shape and type under a name; the one that was there is kept for undo."""
        before = self.program.tensor(name)
        if before.shape != value.shape or before.dtype != value.dtype:
            raise RewriteError(
                f"{name} cannot take a tensor of another shape or type",
                evidence=[f"{before.dtype} {tuple(before.shape)} -> {value.dtype} {tuple(value.shape)}"],
            )
        self.originals.setdefault(name, before)
        self.program.store(name, value)

    # -- operations ---------------------------------------------------------------------------------------------

    def call(
        self,
        operation: Any,
        *args: Any,
        like: Node,
        label: str,
        path: str | None = None,
        before: bool = False,
        **kwargs: Any,
    ) -> Node:
        """Insert `operation(*args, **kwargs)` after `like` and its own inputs; its module path is that of `like`.

        With `before`, insert it just before `like`, which will read it.

        `label` names the value in the program's text. The type follows from the inputs' types. What is inserted after
        an input of the program comes after all of them.
        """
        graph = self.program.graph
        needed = [node for node in _nodes((args, kwargs)) if node.op != "placeholder"]
        place = max([like, *needed])
        if place.op == "placeholder":
            place, before = self._first_operation(), True
        with graph.inserting_before(place if before else place.next):
            where = module_path(like) if path is None else path
            node: Node = graph.create_node(
                "call_function", operation, args, kwargs, name=_identifier(f"{where}_{label}" if where else label)
            )
        node.meta["val"] = evaluate(fake_mode(self.program), operation, *_values(args), **_values(kwargs))
        if "nn_module_stack" in like.meta:
            node.meta["nn_module_stack"] = dict(like.meta["nn_module_stack"])
        Origin(self.number, self.name, label).write(node)
        self._inserted.add(node)
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Let `new`, which this edit inserted, stand where `old` stood: every other user of `old` now uses `new`."""
        origin = Origin.of(new)
        assert origin is not None
        Origin(origin.step, origin.name, origin.label, old.name).write(new)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: not (user in self._inserted and user <= new))

    def rewire(self, node: Node, old: Node, new: Node) -> None:
        """Let one operation read another value. Not undone by provenance: the step keeps the program before it."""
        self.removes = True
        node.replace_input_with(old, new)

    def set_argument(self, node: Node, index: int, value: Node) -> None:
        """Give an operation another operand at a position, or its first one there."""
        self.removes = True
        operands = [*node.args, *[None] * (index + 1 - len(node.args))]
        operands[index] = value
        node.args = tuple(operands)

    def turn(self, node: Node, operation: Any, *args: Any) -> None:
        """Give an operation another way to compute its value, in place: its name, path and users stay, in the text too.

        What only it read before is removed.
        """
        self.removes = True
        before = node.all_input_nodes
        label = node.target._schema.name.rpartition("::")[2]  # type: ignore[union-attr]
        node.meta["custom"] = {LABEL: label, **node.meta.get("custom", {})}
        node.target, node.args, node.kwargs = operation, args, {}
        node.meta["val"] = evaluate(fake_mode(self.program), operation, *_values(args))
        self.erase(source for source in before if not source.users)

    def redirect(self, old: Node, new: Node) -> None:
        """Let every user of `old` read `new`, an operation that was there before."""
        self.removes = True
        self._moved[old] = new
        old.replace_all_uses_with(new)

    def current(self, node: Node) -> Node:
        """The value that stands for `node` after this edit's redirections."""
        while node in self._moved:
            node = self._moved[node]
        return node

    def erase(self, nodes: Iterable[Node]) -> None:
        """Remove operations, latest first, then whatever only they read: operations and tensors."""
        self.removes = True
        todo = sorted(nodes, reverse=True)
        orphans: set[Node] = set()
        while todo:
            node = todo.pop(0)
            if node.users or node in orphans:
                continue
            orphans.add(node)
            sources = node.all_input_nodes
            if node.op == "placeholder":
                continue
            self.program.graph.erase_node(node)
            if node.op == "get_attr" and not any(n.target == node.target for n in self.program.graph.nodes):
                self.program.exported.graph_module.delete_submodule(str(node.target))
            todo = sorted({*todo, *(source for source in sources if not source.users)}, reverse=True)
        names = {name for node in orphans if node.op == "placeholder" and (name := self.program.parameter_name(node))}
        remove_tensors(self.program, names)

    def retype(self) -> None:
        """Derive all types again after sizes have changed; see `rewriter.retype`."""
        retype(self.program, self._inserted)

    def add_output(self, value: Node) -> None:
        """Let the program return `(what it returned, value)`."""
        self.removes = True
        add_output(self.program, value)

    def remove_output(self, value: Node) -> None:
        """Take an added output away again."""
        self.removes = True
        remove_output(self.program, value)

    def note(self, path: str, **numbers: float) -> None:
        """Record numbers about one site, for the report of the step."""
        self.notes[path] = numbers

    # -- inside -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Bring the signature and the generated code in line with the graph."""
        settle(self.program)

    def _first_operation(self) -> Node:
        first: Node = next(node for node in self.program.graph.nodes if node.op != "placeholder")
        return first


def settle(program: Program) -> None:
    """Bring output names, signature and generated code of a changed program in line with its graph."""
    specs = program.exported.graph_signature.output_specs
    results = next(iter(reversed(program.graph.nodes))).args[0]
    for spec, value in zip(specs, results, strict=True):
        if spec.kind in (OutputKind.USER_OUTPUT, OutputKind.BUFFER_MUTATION) and isinstance(value, Node):
            spec.arg.name = value.name
    program.__dict__.pop("specs", None)
    program.__dict__.pop("_runnable", None)
    program.exported.graph_module.recompile()


def remove_tensors(program: Program, names: set[str]) -> None:
    """Remove tensors by name, with their placeholders and signature entries."""
    signature = program.exported.graph_signature
    gone = {spec.arg.name for spec in signature.input_specs if spec.target in names}
    for node in list(program.graph.nodes):
        if node.op == "placeholder" and node.name in gone:
            program.graph.erase_node(node)
    signature.input_specs[:] = [spec for spec in signature.input_specs if spec.arg.name not in gone]
    for name in names:
        program.exported.state_dict.pop(name, None)
        program.exported.constants.pop(name, None)
    program.__dict__.pop("specs", None)


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).lstrip("_") or "value"


def _nodes(tree: Any) -> list[Node]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Node)]


def _values(tree: Any) -> Any:
    return torch.fx.node.map_arg(tree, lambda node: node.meta["val"])
