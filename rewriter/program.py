"""A traced model as a value: graph, tensors and the history of the passes that made it.

A `Program` is never changed. Passes work on a clone that shares every tensor, and nobody writes into a tensor of a
program: a pass that wants another value puts another tensor under the name. That makes clones free and undo exact.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx import Graph, Node

from rewriter.errors import RewriteError, UsageError, closest

PARAMETER_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
ORIGIN = "rewriter"  # the key in node.meta["custom"] under which provenance lives; it survives torch.export.save
LABEL = "rewriter label"  # beside it, what the text calls a value whose operation was exchanged for another


@dataclass(frozen=True, slots=True)
class Step:
    """One pass that was applied: what `recipe` replays and what `undo` takes back.

    `originals` are the tensors that were there before, for every name whose tensor the step replaced or made
    trainable. `before` is the whole program before a step that removed operations (a merge); a step that only added
    operations needs none, because the provenance on its nodes says how to remove them again. A `final` step did not
    keep what it took away, such as the weights behind 4-bit ones, and cannot be undone.
    """

    number: int
    name: str
    options: Mapping[str, Any]
    added: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    originals: Mapping[str, torch.Tensor] = field(default_factory=dict)
    before: Program | None = None
    final: bool = False


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an inserted node comes from: the step that added it, its label, and the node whose place it took."""

    step: int
    name: str
    label: str
    stands_for: str | None = None

    @staticmethod
    def of(node: Node) -> Origin | None:
        found = node.meta.get("custom", {}).get(ORIGIN)
        return Origin(**found) if found else None

    def write(self, node: Node) -> None:
        mine = {"step": self.step, "name": self.name, "label": self.label}
        if self.stands_for is not None:
            mine["stands_for"] = self.stands_for
        node.meta["custom"] = {**node.meta.get("custom", {}), ORIGIN: mine}


def module_path(node: Node) -> str:
    """The dotted path of the module whose forward made this node; empty at the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path: str = list(stack.values())[-1][0]
    return path.removeprefix("L['self'].").split("@", 1)[0]  # a module called twice has a path like `up@1`


class Program:
    """A model as a graph of ATen operations over named tensors.

    `program(*args, **kwargs)` runs it, `program.module()` trains it, `program.save(path)` writes it. The graph is a
    lifted `torch.export.ExportedProgram`: parameters, buffers and constants are its first inputs, by name.
    """

    def __init__(
        self, exported: ExportedProgram, steps: tuple[Step, ...] = (), metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.exported = exported
        self.steps = steps
        self.metadata: dict[str, Any] = dict(metadata or {})

    @classmethod
    def adopt(cls, exported: ExportedProgram, metadata: Mapping[str, Any] | None = None) -> Program:
        """Make a program of a freshly traced graph: `_assert_tensor_metadata` nodes go, they pin dtypes for nobody."""
        program = cls(exported, (), metadata)
        for graph in program.graphs():
            for node in list(graph.nodes):
                if node.target is torch.ops.aten._assert_tensor_metadata.default:
                    graph.erase_node(node)
        for module in exported.graph_module.modules():
            if isinstance(module, torch.fx.GraphModule):
                module.recompile()
        return program

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> Graph:
        graph: Graph = self.exported.graph
        return graph

    def graphs(self) -> Iterator[Graph]:
        """The graph and the graphs of its higher-order operations."""
        for module in self.exported.graph_module.modules():
            if isinstance(module, torch.fx.GraphModule):
                yield module.graph

    @cached_property
    def specs(self) -> dict[str, InputSpec]:
        """Placeholder name -> what it stands for, for parameters, buffers and constants."""
        return {
            spec.arg.name: spec
            for spec in self.exported.graph_signature.input_specs
            if spec.kind in PARAMETER_KINDS and spec.target is not None
        }

    def parameter_name(self, node: object) -> str | None:
        """The fully qualified name behind a placeholder of a parameter, buffer or constant; None for anything else."""
        if isinstance(node, Node) and node.op == "placeholder" and node.name in self.specs:
            return self.specs[node.name].target
        return None

    def placeholder(self, name: str) -> Node:
        """The placeholder of the parameter, buffer or constant with this fully qualified name."""
        for node in self.graph.nodes:
            if node.op == "placeholder" and self.parameter_name(node) == name:
                found: Node = node
                return found
        raise UsageError(f"the program has no parameter {name!r}", evidence=closest(name, list(self.tensors)))

    def inputs(self) -> list[Node]:
        """The placeholders of what a caller passes in."""
        return [node for node in self.graph.nodes if node.op == "placeholder" and node.name not in self.specs]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its fully qualified name, constants included."""
        constants = {k: v for k, v in self.exported.constants.items() if isinstance(v, torch.Tensor)}
        return {**constants, **self.exported.state_dict}

    def tensor(self, name: str) -> torch.Tensor:
        tensors = self.tensors
        if name not in tensors:
            raise UsageError(f"the program has no tensor {name!r}", evidence=closest(name, list(tensors)))
        return tensors[name]

    def parameters(self) -> dict[str, torch.Tensor]:
        """The parameters by name (not buffers, not constants), tied names included."""
        kinds = {s.target: s.kind for s in self.specs.values()}
        return {k: v for k, v in self.exported.state_dict.items() if kinds.get(k) is InputKind.PARAMETER}

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names that train: what passes declared, or every floating-point parameter when no pass declared any."""
        declared = [name for step in self.steps for name in step.trainable if name in self.exported.state_dict]
        if declared:
            return tuple(dict.fromkeys(declared))
        return tuple(name for name, tensor in self.parameters().items() if tensor.is_floating_point())

    def tied(self) -> list[tuple[str, ...]]:
        """Groups of names that share one tensor."""
        groups: dict[tuple[int, tuple[int, ...], tuple[int, ...], int], list[str]] = {}
        for name, tensor in self.exported.state_dict.items():
            if tensor.device.type != "meta" and tensor.numel():
                where = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
                groups.setdefault(where, []).append(name)
        return [tuple(names) for names in groups.values() if len(names) > 1]

    # -- deriving -----------------------------------------------------------------------------------------------

    def clone(self) -> Program:
        """A program whose graph can be changed: the graph is copied, every tensor is shared."""
        tensors = [*self.exported.state_dict.values(), *self.exported.constants.values()]
        leaves = torch.utils._pytree.tree_leaves(self.exported.example_inputs)
        memo = {id(value): value for value in [*tensors, *leaves]}
        with warnings.catch_warnings():  # torch copies its own tree specs with a warning to itself
            warnings.simplefilter("ignore", FutureWarning)
            clone = Program(copy.deepcopy(self.exported, memo), self.steps, self.metadata)
        for mine, theirs in zip(self.graphs(), clone.graphs(), strict=True):
            for node, copied in zip(mine.nodes, theirs.nodes, strict=True):
                copied.name = node.name  # a copy renames values called like a builtin: the `input` of nn.Sequential
        return clone

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Program:
        """The same program with other tensors under the given names; shapes and dtypes must be the same."""
        clone = self.clone()
        for name, value in tensors.items():
            before = self.tensor(name)
            if before.shape != value.shape or before.dtype != value.dtype:
                raise RewriteError(
                    f"{name} cannot take this tensor",
                    evidence=[f"program: {_describe(before)}", f"given:   {_describe(value)}"],
                    fix="Give a tensor of the program's shape and dtype.",
                )
            clone.store(name, value)
        return clone

    def store(self, name: str, value: torch.Tensor) -> None:
        """Put a tensor under a name. Only for a clone that nobody else has seen yet."""
        home = self.exported.constants if name in self.exported.constants else self.exported.state_dict
        if isinstance(home.get(name), torch.nn.Parameter) and not isinstance(value, torch.nn.Parameter):
            value = torch.nn.Parameter(value.detach(), requires_grad=value.is_floating_point())
        home[name] = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._writes:  # every run starts from the program's own buffers
            self.__dict__.pop("_runnable", None)
        try:
            with torch.no_grad():
                return self._runnable(*args, **kwargs)
        except TypeError as error:
            raise UsageError(
                "the program cannot be called with these inputs",
                evidence=[f"it takes: {', '.join(node.name for node in self.inputs())}", *str(error).splitlines()[:2]],
                fix="Give every input that was given to the trace.",
            ) from error

    @cached_property
    def _writes(self) -> bool:
        from rewriter.mutation import written

        return bool(written(self))

    @cached_property
    def _runnable(self) -> torch.nn.Module:
        from rewriter.module import build

        return build(self, share=True).eval()

    def module(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> torch.fx.GraphModule:
        """A plain trainable `nn.Module`: `train()` and `eval()` work, base parameters keep their names and are frozen.

        Only `program.trainable` require gradients, and they are copies: training never writes into the program. The
        frozen ones are shared. Take trained values back with `program.with_weights(module)`.
        """
        from rewriter.module import build

        return build(self, device=device, dtype=dtype)

    def with_weights(self, module: torch.nn.Module) -> Program:
        """This program with the trained values of `module`, which `program.module()` made.

        Raises `RewriteError` when a parameter is missing, has another shape, or when a frozen one has changed.
        """
        from rewriter.module import trained_values

        return self.with_tensors(trained_values(self, module))

    def save(self, path: str | Path, *, overwrite: bool = True) -> Path:
        """Write a `.pt2` archive that `rewriter.load` and plain `torch.export.load` open, under any name."""
        from rewriter.formats.pt2 import save

        return save(self, Path(path), overwrite=overwrite)

    def __repr__(self) -> str:
        steps = ", ".join(step.name for step in self.steps) or "no pass applied"
        count = sum(1 for node in self.graph.nodes if node.op == "call_function")
        return f"Program({count} operations, {len(self.exported.state_dict)} tensors; {steps})"


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
