"""Sparse changes of parameters: the program holds their places and their values, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.edit import Edit
from rewriter.errors import UsageError, closest
from rewriter.program import Program
from rewriter.view import Linear4bit, layers, scope, top

aten = torch.ops.aten


def aliases(program: Program, name: str) -> tuple[str, ...]:
    """The names that share the tensor of a parameter, its own among them."""
    return next((group for group in program.tied() if name in group), (name,))


def own_parameters(program: Program) -> tuple[str, ...]:
    """The floating-point parameters of the model that its graph reads, tied ones once; none that a pass added."""
    added = {name for step in program.steps for name in step.added}
    read = {program.parameter_name(node) for node in program.graph.nodes if node.op == "placeholder" and node.users}
    found: dict[int, str] = {}
    for name, tensor in program.parameters().items():
        if name in read and name not in added and tensor.is_floating_point():
            found.setdefault(id(tensor), name)
    return tuple(found.values())


def held_in_4bits(program: Program, globs: tuple[str, ...]) -> tuple[str, ...]:
    """The weights, under the names they had before, that are held in 4 bits and match a glob."""
    names = [s.weight.removesuffix("_packed") for s in layers(program).values() if isinstance(s, Linear4bit)]
    return tuple(name for name in names if any(fnmatchcase(name, glob) for glob in globs))


def matching(program: Program, globs: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters of the model, tied ones once, that any of the globs matches by any of their names.

    Raises `UsageError` when a glob matches none.
    """
    names = {name: aliases(program, name) for name in own_parameters(program)}
    for glob in globs:
        if not any(fnmatchcase(alias, glob) for group in names.values() for alias in group):
            if held := held_in_4bits(program, (glob,)):
                raise UsageError(
                    f"path {glob!r} matches weights held in 4 bits, which cannot train: {', '.join(held[:3])}",
                    fix="Train an adapter beside them, or apply dequantise first.",
                )
            raise UsageError(
                f"path {glob!r} matches no parameter that the model reads",
                evidence=[f"closest: {', '.join(closest(glob, list(names)) or list(names)[:5])}"],
                fix="Globs are held against whole parameter names: `*.bias`, `model.layers.1.*`.",
            )
    return tuple(name for name, group in names.items() if any(fnmatchcase(a, g) for a in group for g in globs))


def largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The places of the `count` largest scores of all tensors together: name -> flat indices [n], ascending.

    Of equal scores the earlier one is taken, so that every machine takes the same.
    """
    flat = {name: score.detach().flatten().cpu() for name, score in scores.items()}
    threshold = torch.cat(list(flat.values())).topk(count).values[-1]
    ties = count - sum(int((score > threshold).sum()) for score in flat.values())
    found = {}
    for name, score in flat.items():
        equal = (score == threshold).nonzero().flatten()[:ties]
        ties -= len(equal)
        places = torch.cat([(score > threshold).nonzero().flatten(), equal]).sort().values
        if len(places):
            found[name] = places
    return found


def readers(program: Program, name: str) -> dict[Node, list[Node]]:
    """The value of a parameter as it is read by now -> its readers, under each of the names it is tied to."""
    placeholders = [program.placeholder(alias) for alias in aliases(program, name)]
    return {value: sorted(value.users) for value in map(top, placeholders) if value.users}


def add_sparse(edit: Edit, name: str, indices: Tensor, values: Tensor, adapter: str) -> None:
    """Let everything that reads a parameter read it with `values` [n] added at the flat `indices` [n].

    W      ->      W + scatter(indices, values)
    """
    home = scope(edit.program, name)
    places = edit.buffer(f"{home}.delta_indices.{adapter}", indices.to(torch.int64).to(values.device))
    change = edit.parameter(f"{home}.delta_values.{adapter}", values)
    weight = edit.program.tensor(name)
    using = readers(edit.program, name)
    first = min(each[0] for each in using.values())

    def call(label: str, operation: Any, *args: Any) -> Node:
        label = label_of(f"sparse_{name.rpartition('.')[2]}_{label}", adapter)
        return edit.call(operation, *args, like=first, before=True, label=label)

    zeros = call("zeros", aten.new_zeros.default, change, [weight.numel()])
    flat = call("flat", aten.scatter.src, zeros, 0, places, change)
    update = call("update", aten.view.default, flat, list(weight.shape))
    for value in using:
        edit.replace(value, call("sum", aten.add.Tensor, value, update))


def label_of(label: str, adapter: str) -> str:
    return label if adapter == "default" else f"{label}_{adapter}"
