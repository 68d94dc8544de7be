"""Bake: what a pass computes from parameters alone is computed once."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from passes.stand_in import StandIn, settle, stand_ins
from rewriter.attention import SHAPES
from rewriter.constants import Constants
from rewriter.edit import Edit
from rewriter.errors import LawError, UsageError
from rewriter.find import Sites
from rewriter.module import TRAIN_FLAG
from rewriter.program import Origin, Program
from rewriter.transform import ROUNDING, Law

aten = torch.ops.aten
PRECISION = {"fp32": torch.float32, "fp64": torch.float64}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
NO_RESULT_OF_ITS_OWN = {*SHAPES, *CASTS, *TRAIN_FLAG}  # a parameter that only goes through these is left as it is
MODES = {  # operation -> position of its `train` flag: without it nothing about the result is random
    **TRAIN_FLAG,
    aten.lstm.input: 6,
    aten.gru.input: 6,
    aten.rnn_tanh.input: 6,
    aten.rnn_relu.input: 6,
}


@dataclass(frozen=True, slots=True)
class Baked:
    """A value that becomes the parameter `path`."""

    path: str
    node: Node
    value: Tensor


@dataclass(frozen=True, slots=True)
class Bake:
    """Compute what a pass made of parameters alone once, and keep the result in place of the computation.

        P = W₂ tanh(W₁ E + b₁) + b₂      ->      P, one parameter

    Shapes: the parameter has those of the last value that is computed; what only views, slices or permutes it stays.
    Of a prompt encoder or prefix projection `prompt_encoder.NAME` remains `prompt_embeddings.NAME`; a value that stands
    for a parameter, such as `W + scatter(indices, values)`, becomes the value of this parameter. Everything is
    computed in `precision` and rounded once. The new parameters are frozen unless `trainable`. What the model itself
    computes from its weights is left alone.

    Raises `UsageError` when no pass computes anything from parameters alone, `LawError` for results that are not
    finite.
    Source: Li & Liang 2021, arXiv 2101.00190, section 4.3; Liu et al. 2021, arXiv 2103.10385, section 2.
    """

    name: ClassVar[str] = "bake"
    source: ClassVar[str] = "Li & Liang 2021, arXiv 2101.00190, section 4.3"

    precision: Literal["fp32", "fp64"] = "fp32"
    trainable: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISION:
            raise UsageError(f"precision is {self.precision!r}", fix="One of fp32, fp64.")
        if not isinstance(self.trainable, bool):
            raise UsageError(f"trainable is {self.trainable!r}", fix="true or false.")

    @property
    def law(self) -> Law:
        return ROUNDING.because("constants are computed at once and rounded once")

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[Baked | StandIn]:
        precision = PRECISION[self.precision]
        if any(tensor.dtype is torch.float64 for tensor in program.parameters().values()):
            precision = torch.float64
        constants = _InEval(program, precision)
        stands = list({site.path: site for site in stand_ins(program, constants).values()}.values())
        nodes = _ends(program, constants, {node for site in stands for node in site.nodes.values()})
        if not nodes and not stands:
            raise UsageError(
                "nothing to bake: no pass computes anything from parameters alone",
                evidence=[f"step {step.number}: {step.name}" for step in program.steps] or ["no pass was applied"],
                fix="Bake is for prompt encoders, prefix projections and sparse changes; updates of layers are merged.",
            )
        values = constants.with_values()
        taken = set(program.tensors)
        baked = [_baked(program, constants, node, values.value(node), taken) for node in nodes]
        return Sites((*stands, *baked))

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Baked | StandIn, edit: Edit) -> None:
        if isinstance(site, StandIn):
            settle(edit, site)
            if self.trainable:
                edit.train(site.path)
            return
        made = edit.parameter(site.path, site.value, trainable=self.trainable)
        edit.redirect(site.node, made)
        edit.erase([site.node])


class _InEval(Constants):
    """Constants of a program in eval mode: what is random in training alone is constant, too."""

    def _is_constant(self, node: Node) -> bool:
        flag = MODES.get(node.target)  # type: ignore[call-overload]
        if flag is None:
            return super()._is_constant(node)
        known = node not in self.changed and all(source in self.leaves for source in node.all_input_nodes)
        return known and not node.args[flag]


def _ends(program: Program, constants: Constants, stands: set[Node]) -> list[Node]:
    """The last values that passes compute from parameters alone, of those that something else reads."""
    added = {name for step in program.steps for name in step.added}
    computed: set[Node] = set()
    ends = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node not in constants or Origin.of(node) is None:
            continue
        if _computes(node) or computed.intersection(node.all_input_nodes):
            computed.add(node)
            final = isinstance(node.meta["val"], Tensor) and not _reshapes(node) and node not in stands
            if final and constants.reads(node) & added and _escapes(node, constants, stands):
                ends.append(_squeezed(node, constants, stands))
    return ends


def _squeezed(node: Node, constants: Constants, stands: set[Node]) -> Node:
    """What follows a value when that only drops its axes of size 1, such as the batch that an LSTM needs."""
    while len(node.users) == 1:
        (user,) = node.users
        if user not in constants or user in stands or not _reshapes(user):
            break
        before, after = node.meta["val"].shape, user.meta["val"].shape
        if [size for size in before if size != 1] != list(after):
            break
        node = user
    return node


def _computes(node: Node) -> bool:
    return node.target is not operator.getitem and node.target not in NO_RESULT_OF_ITS_OWN


def _reshapes(node: Node) -> bool:
    """Whether a value holds the numbers of its input, in another shape."""
    if node.target is operator.getitem:  # a part of a split, not one of several results
        return _reshapes(node.all_input_nodes[0])
    return node.target in SHAPES


def _escapes(node: Node, constants: Constants, stands: set[Node]) -> bool:
    """Whether something that is no constant reads a value, or a view of it."""
    return any(
        user not in constants or (_reshapes(user) and user not in stands and _escapes(user, constants, stands))
        for user in node.users
    )


def _baked(program: Program, constants: Constants, node: Node, value: Any, taken: set[str]) -> Baked:
    added = {name for step in program.steps for name in step.added}
    reads = sorted(constants.reads(node) & added)
    stem = name = _name(node, reads)
    count = 0
    while name in taken:
        count += 1
        name = f"{stem}_{count}"
    taken.add(name)
    example = node.meta["val"]
    kept = value.to(device=example.device, dtype=example.dtype).contiguous()
    bad = int((~torch.isfinite(kept)).sum()) if kept.is_floating_point() else 0
    if bad:
        raise LawError(
            f"{name} would hold {bad} non-finite values",
            evidence=[f"computed from: {', '.join(reads[:6])}"],
            fix="Look for NaN or infinity in what was trained.",
        )
    return Baked(name, node, kept)


def _name(node: Node, reads: list[str]) -> str:
    """The name of a baked value, in the module that holds all the parameters it was computed from."""
    home = _common(name.split(".")[:-1] for name in reads)
    if re.search(r"(^|\.)prompt_encoder\.[^.]+$", home):
        return re.sub(r"prompt_encoder\.([^.]+)$", r"prompt_embeddings.\1", home)  # what PEFT calls it
    origin = Origin.of(node)
    assert origin is not None
    adapters = {name.rpartition(".")[2] for name in reads}
    parts = [home, origin.label, *(adapters if len(adapters) == 1 else ())]
    return ".".join(part for part in parts if part)


def _common(paths: Iterable[list[str]]) -> str:
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
