"""Diff pruning: a change of the weights whose gates learn which numbers stay, and what remains of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from passes.sparse import add_sparse, label_of, largest, readers
from rewriter.edit import Edit
from rewriter.errors import LawError, UsageError
from rewriter.find import Sites
from rewriter.program import Origin, Program, Step
from rewriter.transform import FREE, Law
from rewriter.view import scope

aten = torch.ops.aten
STRETCH = (-0.1, 1.1)
TEMPERATURE = 2 / 3
PENALTY = "diff_pruning_penalty"
KINDS = ("diff_delta", "diff_log_alpha", "diff_log_alpha_group")
NOISE_MARGIN = 1e-6  # uniform noise keeps this far from 0 and 1, whose logits are infinite


@dataclass(frozen=True, slots=True)
class Gates:
    """How gates are drawn: `gate = clamp(stretched sigmoid, 0, 1)` with a part of its weight at exactly 0 and 1."""

    log_alpha: float
    temperature: float
    stretch: Sequence[float]
    structured: bool
    adapter: str

    @property
    def shift(self) -> float:
        """What the logit of a gate's chance to be open lies below its log α."""
        low, high = self.stretch
        return self.temperature * math.log(-low / high)


def add_gated(edit: Edit, name: str, gates: Gates) -> None:
    """Let everything that reads a parameter read `W + z ⊙ δ`, and count how many of its gates are open on average."""
    home = scope(edit.program, name)
    weight = edit.program.tensor(name).detach()
    names = [f"{home}.{kind}.{gates.adapter}" for kind in KINDS]
    delta = edit.parameter(names[0], torch.zeros_like(weight))
    alphas = [edit.parameter(names[1], torch.full_like(weight, gates.log_alpha))]
    if gates.structured:
        alphas.append(edit.parameter(names[2], weight.new_full((1,), gates.log_alpha)))
    using = readers(edit.program, name)
    write = _Writer(edit, min(first[0] for first in using.values()), name, gates)
    gate = write.product([write.gate(alpha, suffix) for alpha, suffix in zip(alphas, ("", "group_"), strict=False)])
    change = write("change", aten.mul.Tensor, gate, delta)
    for value in using:
        edit.replace(value, write("sum", aten.add.Tensor, value, change))
    chance = write.product([write.chance(alpha, suffix) for alpha, suffix in zip(alphas, ("", "group_"), strict=False)])
    wide = torch.promote_types(weight.dtype, torch.float32)  # half precision cannot count that far
    write("expected", aten.sum.default, chance, dtype=wide)


def add_penalty(edit: Edit, adapter: str) -> None:
    """Let the program return the expected number of open gates of all parameters that this edit gated."""
    mine = [node for node in edit.program.graph.nodes if (o := Origin.of(node)) and o.step == edit.number]
    expected = [node for node in mine if node.target is aten.sum.default]
    last = expected[-1]
    every = edit.call(aten.stack.default, expected, like=last, label=label_of("diff_expected", adapter), path="")
    edit.add_output(edit.call(aten.sum.default, every, like=every, label=label_of(PENALTY, adapter), path=""))


class _Writer:
    """The operations of one parameter's gates, just before its first reader."""

    def __init__(self, edit: Edit, first: Node, name: str, gates: Gates) -> None:
        self.edit, self.first, self.gates = edit, first, gates
        self.prefix = f"diff_{name.rpartition('.')[2]}_"

    def __call__(self, label: str, operation: Any, *args: Any, **kwargs: Any) -> Node:
        label = label_of(self.prefix + label, self.gates.adapter)
        return self.edit.call(operation, *args, like=self.first, before=True, label=label, **kwargs)

    def product(self, factors: list[Node]) -> Node:
        return factors[0] if len(factors) == 1 else self("product", aten.mul.Tensor, *factors)

    def gate(self, alpha: Node, suffix: str) -> Node:
        """A hard-concrete gate: drawn in training, fixed otherwise.

            training: clamp(σ((log α + logit u) / temperature) (high − low) + low, 0, 1),  u uniform
            else:     clamp(σ(log α) (high − low) + low, 0, 1)

        A dropout of probability 1 is the switch: it gives zeros in training and what it is given otherwise.
        """
        low, high = self.gates.stretch
        uniform = self(f"{suffix}uniform", aten.rand_like.default, alpha)
        noise = self(f"{suffix}noise", aten.logit.default, uniform, NOISE_MARGIN)
        noisy = self(f"{suffix}noisy", aten.add.Tensor, alpha, noise)
        fixed = self(f"{suffix}noisy_else", aten.dropout.default, noisy, 1.0, False)
        drawn = self(f"{suffix}noisy_training", aten.sub.Tensor, noisy, fixed)
        sharp = self(f"{suffix}sharp", aten.div.Tensor, drawn, self.gates.temperature)
        plain = self(f"{suffix}alpha_else", aten.dropout.default, alpha, 1.0, False)
        logit = self(f"{suffix}logit", aten.add.Tensor, sharp, plain)
        soft = self(f"{suffix}soft", aten.sigmoid.default, logit)
        scaled = self(f"{suffix}scaled", aten.mul.Tensor, soft, high - low)
        stretched = self(f"{suffix}stretched", aten.add.Tensor, scaled, low)
        return self(f"{suffix}gate", aten.clamp.default, stretched, 0.0, 1.0)

    def chance(self, alpha: Node, suffix: str) -> Node:
        """The probability that a drawn gate is not 0: σ(log α − temperature · log(−low / high))."""
        shifted = self(f"{suffix}shifted", aten.sub.Tensor, alpha, self.gates.shift)
        return self(f"{suffix}chance", aten.sigmoid.default, shifted)


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays of the change of one parameter: `values` [n] at the flat `indices` [n], possibly none."""

    path: str
    indices: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Binarise:
    """End diff pruning: every gate is open or closed for good, and only the numbers behind open ones are kept.

        W + z ⊙ δ      ->      W + scatter(indices, values)

    Shapes: indices and values [n], n over all parameters together = `density` times the numbers of the gated
    parameters, those with the largest |z ⊙ δ|; without `density` all that are not zero. A kept value is z δ with the
    gate as it is in eval mode, so without `density` the function stays. The penalty output goes.

    Raises `UsageError` when the program has no gates of this adapter, `LawError` when the trained change is not
    finite.
    Source: Guo et al. 2020, arXiv 2012.07463, section 3.1; gates: Louizos et al. 2017, arXiv 1712.01312, eq. 13.
    """

    name: ClassVar[str] = "binarise"
    source: ClassVar[str] = "Guo et al. 2020, arXiv 2012.07463, section 3.1"

    density: float | None = None
    adapter: str = "default"

    def __post_init__(self) -> None:
        if self.density is not None:
            check_density(self.density)
        check_adapter(self.adapter)

    @property
    def law(self) -> Law:
        if self.density is None:
            return FREE.because("the penalty is no output any more; the others move by rounding only")
        return FREE.because("small changes are dropped to reach the density")

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[Kept]:
        changes = dict(_changes(program, self.adapter))
        if not changes:
            raise UsageError(
                f"the program has no gates of the adapter {self.adapter!r}",
                evidence=[f"step {step.number}: {step.name}" for step in program.steps],
                fix="Apply select with method=diff_pruning and train it first.",
            )
        for name, change in changes.items():
            if not bool(torch.isfinite(change).all()):
                raise LawError(f"the trained change of {name} is not finite", fix="Train again with a smaller step.")
        sizes = {name: change.abs() for name, change in changes.items()}
        count = sum(int((size > 0).sum()) for size in sizes.values())
        if self.density is not None:
            count = max(1, round(self.density * sum(size.numel() for size in sizes.values())))
        places = largest(sizes, count) if count else {}
        nothing = torch.empty(0, dtype=torch.int64)
        sites = []
        for name, change in changes.items():
            indices = places.get(name, nothing).to(change.device)
            sites.append(Kept(name, indices, change.flatten()[indices].to(program.tensor(name).dtype)))
        return Sites(tuple(sites))

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Kept, edit: Edit) -> None:
        _remove_penalty(edit, self.adapter)
        delta = edit.program.placeholder(f"{scope(edit.program, site.path)}.{KINDS[0]}.{self.adapter}")
        (change,) = delta.users
        gated = list(change.users)
        for node in gated:
            base = node.args[0]
            assert isinstance(base, Node)
            edit.redirect(node, base)
        edit.erase(gated)
        if len(site.indices):
            add_sparse(edit, site.path, site.indices, site.values, self.adapter)


def _changes(program: Program, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Parameter -> z ⊙ δ with the gates of eval mode, computed in at least fp32."""
    for step, name, home in _gated(program, adapter):
        low, high = step.options.get("stretch", STRETCH)
        delta, *alphas = (
            program.tensor(f"{home}.{kind}.{adapter}").detach()
            for kind in KINDS
            if f"{home}.{kind}.{adapter}" in program.tensors
        )
        change = delta.to(torch.promote_types(delta.dtype, torch.float32))
        for alpha in alphas:
            change = change * (torch.sigmoid(alpha.to(change.dtype)) * (high - low) + low).clamp(0.0, 1.0)
        yield name, change


def _gated(program: Program, adapter: str) -> Iterator[tuple[Step, str, str]]:
    """(step, parameter, where its gates are) of every parameter that has gates."""
    tail = f".{KINDS[0]}.{adapter}"
    homes = {scope(program, name): name for name in program.tensors}
    for step in program.steps:
        for added in step.added:
            if added.endswith(tail) and added in program.tensors:
                home = added.removesuffix(tail)
                yield step, homes[home], home


def _remove_penalty(edit: Edit, adapter: str) -> None:
    """Take the penalty of an adapter away, unless it is gone already."""
    for node in edit.program.graph.nodes:
        origin = Origin.of(node)
        if origin is not None and origin.label == label_of(PENALTY, adapter):
            edit.remove_output(node)
            edit.erase([node])
            return


def check_density(density: Any) -> None:
    if not isinstance(density, (int, float)) or isinstance(density, bool) or not 0 < density <= 1:
        raise UsageError(f"density is {density!r}", fix="A share above 0 and at most 1.")


def check_adapter(adapter: Any) -> None:
    if not isinstance(adapter, str) or not adapter or "." in adapter:
        raise UsageError(f"adapter is {adapter!r}", fix="A name without dots.")
