"""Which parameters of the model a selective method means, found in the graph."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch.fx import Node

from rewriter.attention import PASS_ON, attentions
from rewriter.errors import UsageError, closest
from rewriter.find import Miss
from rewriter.norms import norms
from rewriter.program import Program, module_path
from rewriter.region import RESHAPES, readers
from rewriter.view import Embedding, computed, layers, modules, weight_of

aten = torch.ops.aten
SUMS = {aten.add.Tensor, aten.add_.Tensor}


def biases(program: Program) -> tuple[tuple[str, ...], tuple[Miss, ...]]:
    """Every parameter that a layer or norm adds to its result, in program order; and the layers that have none.

    Raises `UsageError` when there is no such parameter at all.
    """
    found: dict[str, None] = {}
    missed: list[Miss] = []
    for layer in layers(program).values():
        if not isinstance(layer, Embedding):
            _note(found, missed, layer.path, layer.bias or _added_later(program, layer.calls))
    for norm in norms(program):
        if norm.parameters:
            _note(found, missed, norm.path, norm.bias)
    made = list(dict.fromkeys(pass_ for name, pass_ in computed(program).items() if name.endswith("bias")))
    if not found and made:
        raise UsageError(
            f"the pass {made[-1]} computes the biases of this model, and none is left that trains as it is",
            fix=f"Train the biases instead of {made[-1]}: merge or undo it first.",
        )
    if not found:
        raise UsageError(
            "no layer or norm of this model has a bias",
            evidence=[f"{miss.path}: {miss.reason}" for miss in missed[:4]],
            fix="Choose another method: last, paths, fish_mask or diff_pruning, or a pass that adds parameters.",
        )
    return tuple(found), tuple(missed)


def _note(found: dict[str, None], missed: list[Miss], path: str, bias: str | None) -> None:
    if bias is None:
        missed.append(Miss(path, "has no bias"))
    else:
        found[bias] = None


def _added_later(program: Program, calls: Sequence[Node]) -> str | None:
    """The bare bias that is added to what a layer gives, as `x @ W + b` does."""
    todo = list(calls)
    while todo:
        node = todo.pop()
        for user in readers(node):
            if user.target in SUMS:
                for operand in user.args[:2]:
                    bare = weight_of(program, operand)
                    if bare is not None and program.tensor(bare[0]).ndim == 1:
                        return bare[0]
            elif user.target in RESHAPES:
                todo.append(user)
    return None


def head(program: Program) -> tuple[str, ...]:
    """The parameters of the layers that make the program's outputs.

    Raises `UsageError` when an output comes from no layer, as that of a model without a head.
    """
    by_call = {call: layer for layer in layers(program).values() for call in layer.calls}
    found: dict[str, None] = {}
    for value in next(iter(reversed(program.graph.nodes))).all_input_nodes:
        while value not in by_call and value.target in {*PASS_ON, *SUMS}:
            value = next(node for node in value.args if isinstance(node, Node))
        layer = by_call.get(value)
        if layer is not None:
            bias = layer.bias or _added_later(program, layer.calls)
            found.update(dict.fromkeys(name for name in (layer.weight, bias) if name is not None))
    if not found:
        raise UsageError(
            "no output of this program is made by a layer: it has no head",
            fix="Leave out head, or name parameters with method=paths.",
        )
    return tuple(found)


def last_blocks(program: Program, count: int, named: Sequence[str]) -> tuple[str, ...]:
    """The parameters of the last `count` blocks of every stack of blocks that is meant.

    Raises `UsageError` when there is no such stack or one has fewer blocks.
    """
    chosen: list[str] = []
    for path, blocks in stacks(program, named).items():
        if count > len(blocks):
            raise UsageError(
                f"last is {count}, but {path or 'the model'} has {len(blocks)} blocks",
                fix="Give a smaller number, or name another stack with blocks.",
            )
        chosen += [f"{block}." for block in blocks[-count:]]
    return tuple(name for name in program.parameters() if name.startswith(tuple(chosen)))


def stacks(program: Program, named: Sequence[str] = ()) -> dict[str, list[str]]:
    """Path of a list -> the paths of its blocks: `model.layers` -> `model.layers.0`, `model.layers.1`, …

    A list's blocks are modules of one class, numbered, inside no other block. Of several lists, those with attention
    are meant (encoder and decoder), otherwise the longest; `named` chooses by path.
    """
    known = modules(program)
    lists: dict[str, list[tuple[int, str]]] = {}
    for path in known:
        owner, _, number = path.rpartition(".")
        if number.isdigit() and not re.search(r"(^|\.)\d+(\.|$)", owner):
            lists.setdefault(owner, []).append((int(number), path))
    found = {
        owner: [path for _, path in sorted(blocks)]
        for owner, blocks in lists.items()
        if len(blocks) > 1 and len({known[path] for _, path in blocks}) == 1
    }
    for name in named:
        if name not in found:
            raise UsageError(
                f"blocks {name!r} is no list of blocks",
                evidence=[f"lists: {', '.join(found) or 'none'}", f"closest: {', '.join(closest(name, list(found)))}"],
                fix="Name the module that holds the numbered blocks.",
            )
    if not found:
        raise UsageError(
            "the program has no list of repeated blocks", fix="Name parameters with method=paths, such as `head.*`."
        )
    if named:
        return {owner: found[owner] for owner in found if owner in named}
    places = [module_path(attention.node) for attention in attentions(program)]
    attending = {o: b for o, b in found.items() if any(place.startswith(f"{o}.") for place in places)}
    longest = max(map(len, found.values()))
    return attending or {owner: blocks for owner, blocks in found.items() if len(blocks) == longest}
