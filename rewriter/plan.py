"""How much memory training takes, by method, before any weight is loaded; every assumption is stated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.activations import Activations, activations, identity, number
from rewriter.attention import attentions, is_output_head
from rewriter.errors import UsageError, closest
from rewriter.find import Targets
from rewriter.module import change_dtype
from rewriter.plan_assumptions import assumptions, step_text
from rewriter.program import Program
from rewriter.text import dtype_name
from rewriter.training_sizes import check_sizes, training_sizes
from rewriter.view import Embedding, Linear, layers

SINGLE = 4  # bytes of a number in fp32
BLOCK, OUTER_BLOCK = 64, 256  # NF4 weights for each scale, scales for each scale of scales
# optimiser -> bytes of its two states for each trained number; None: they follow `states`
OPTIMIZERS: dict[str, int | None] = {"adamw": None, "adamw8bit": 2}
STATES = ("weight", "fp32")


@dataclass(frozen=True, slots=True)
class Case:
    """One way of training: a program, and what of it trains and is quantised.

    What trains is what the passes of the program declared, or with `everything` each of its parameters. With
    `quantised`, the weights of all linear layers but the output embedding are held in NF4.
    """

    name: str
    program: Program
    everything: bool = False
    quantised: bool = False

    def trainable(self) -> set[str]:
        """The names that get gradients."""
        names = self.program.parameters() if self.everything else self.program.trainable
        return {name for name in names if self.program.tensor(name).is_floating_point()}


@dataclass(frozen=True, slots=True)
class Options:
    """How a step of training is made; `length` None is 512 or what the model takes.

    `states` is the type of AdamW's two states: that of the weight, as torch keeps them, or fp32. `master` keeps an
    fp32 copy of trained weights of a smaller type, and then the states are fp32 too.
    """

    batch: int = 1
    length: int | None = None
    optimizer: str = "adamw"
    states: str = "weight"
    master: bool = False
    checkpointing: bool = False
    double_quantise: bool = True

    def __post_init__(self) -> None:
        check_sizes(self.batch, self.length)
        for what, value, known in (("optimizer", self.optimizer, OPTIMIZERS), ("states", self.states, STATES)):
            if value not in known:
                near = closest(str(value), list(known), 1)
                fix = f"One of {', '.join(known)}."
                raise UsageError(f"{what} is {value!r}", evidence=[f"closest: {n}" for n in near], fix=fix)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one way of training takes, in bytes."""

    name: str
    parameters: int
    trainable: int
    quantised: int  # parameters held in NF4
    quantised_bytes: int
    weights: int  # all of them, buffers included
    gradients: int
    optimiser: int
    master_copy: int
    activations: Activations
    loss: int

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters."""
        return self.trainable / self.parameters if self.parameters else 0.0

    @property
    def states(self) -> int:
        """Everything but activations."""
        return self.weights + self.gradients + self.optimiser + self.master_copy

    def total(self, *, checkpointing: bool) -> int:
        """The sum of all, with the activations of either kind."""
        held = self.activations.checkpointed if checkpointing else self.activations.saved
        return self.states + held + self.activations.outputs + self.loss

    def to_json(self) -> dict[str, Any]:
        bits = 8 * self.quantised_bytes / self.quantised if self.quantised else None
        return {
            "parameters": self.parameters,
            "trainable": self.trainable,
            "share": self.share,
            "weights": self.weights,
            "quantised": {"parameters": self.quantised, "size_bytes": self.quantised_bytes, "bits_per_weight": bits},
            "gradients": self.gradients,
            "optimiser": self.optimiser,
            "master_copy": self.master_copy,
            "activations": self.activations.to_json(),
            "loss": self.loss,
            "total": self.total(checkpointing=False),
            "total_checkpointed": self.total(checkpointing=True),
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What the methods cost side by side, the sizes they were planned for, and the assumptions."""

    batch: int
    length: int | None
    types: tuple[str, ...]  # of the weights
    options: Options
    costs: tuple[Cost, ...]
    assumptions: tuple[str, ...]

    @property
    def step(self) -> str:
        """`1 row of 512 positions`."""
        return step_text(self.batch, self.length)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data; sizes in bytes."""
        return {
            "batch": self.batch,
            "length": self.length,
            "types": list(self.types),
            "optimizer": self.options.optimizer,
            "states": self.options.states,
            "master_weights": self.options.master,
            "checkpointing": self.options.checkpointing,
            "methods": {cost.name: cost.to_json() for cost in self.costs},
            "assumptions": list(self.assumptions),
        }

    def rows(self) -> list[list[str]]:
        """A table: one line for each kind of memory, one column for each method."""
        columns: dict[str, Callable[[Cost], str]] = {
            "parameters": lambda cost: f"{cost.parameters:,}",
            "trainable": lambda cost: f"{cost.trainable:,}",
            "share": lambda cost: f"{cost.share:.4%}",
            "weights": lambda cost: amount(cost.weights),
            "gradients": lambda cost: amount(cost.gradients),
            "optimiser states": lambda cost: amount(cost.optimiser),
            **({"fp32 copy of weights": lambda cost: amount(cost.master_copy)} if self.options.master else {}),
            "activations": lambda cost: amount(cost.activations.saved),
            "activations, checkpointed": lambda cost: amount(cost.activations.checkpointed),
            "outputs and loss": lambda cost: amount(cost.activations.outputs + cost.loss),
        }
        totals: dict[str, Callable[[Cost], str]] = {
            "total": lambda cost: amount(cost.total(checkpointing=False)),
            "total, checkpointed": lambda cost: amount(cost.total(checkpointing=True)),
        }
        columns |= dict(reversed(totals.items())) if self.options.checkpointing else totals
        return [[title, *map(cell, self.costs)] for title, cell in columns.items()]


def plan(cases: Sequence[Case], options: Options | None = None) -> Plan:
    """What each way of training takes. Weights need no numbers: programs on the meta device will do.

    Raises `UsageError` for sizes that a program cannot take, `RewriteError` for a graph that cannot be followed.
    """
    if not cases:
        raise UsageError("no method given", fix="Give at least one.")
    options = options or Options()
    sizes = training_sizes(cases[0].program, batch=options.batch, length=options.length)
    seen: dict[Any, Activations] = {}
    costs = []
    for case in cases:
        key = (id(case.program), frozenset(case.trainable()))
        if key not in seen:
            seen[key] = activations(case.program, sizes.symbols, trainable=case.trainable())
        costs.append(_cost(case, options, seen[key], _logits(case.program, sizes.symbols)))
    types = _types(cases[0].program)
    facts = assumptions(
        options,
        types=types,
        batch=sizes.batch,
        length=sizes.length,
        blocks=max(cost.activations.blocks for cost in costs),
        has_loss=any(cost.loss for cost in costs),
        steps=[step for case in cases for step in case.program.steps],
        largest_quantised=max(_largest(case) for case in cases),
        quantised=next((cost.to_json()["quantised"]["bits_per_weight"] for cost in costs if cost.quantised), None),
    )
    return Plan(sizes.batch, sizes.length, types, options, tuple(costs), facts)


def default_targets(program: Program) -> Targets:
    """Where adapters go unless somebody says: the four projections of every attention, or all linear layers."""
    has_projections = any(attention.query for attention in attentions(program))
    return ("@attention",) if has_projections else "all-linear"


def in_type(program: Program, dtype: torch.dtype) -> Program:
    """The shapes of a program as if it had been traced in another floating-point type; tied tensors stay tied."""
    clone = program.clone()
    made: dict[Any, Tensor] = {}
    for name, tensor in program.exported.state_dict.items():
        bare = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, torch.nn.Parameter):
            bare = torch.nn.Parameter(bare, requires_grad=tensor.requires_grad)
        clone.exported.state_dict[name] = made.setdefault(identity(tensor), bare)
    change_dtype(clone, dtype)
    return clone


def nf4_bytes(count: int, *, double_quantise: bool = True) -> int:
    """The size of a weight of so many numbers in NF4: 4.5 bits each, or 4.127 with its scales quantised too."""
    scales = math.ceil(count / BLOCK)
    held = scales + SINGLE * math.ceil(scales / OUTER_BLOCK) + SINGLE if double_quantise else SINGLE * scales
    return math.ceil(count / 2) + held


def optimiser_bytes(count: int, width: int, options: Options) -> tuple[int, int]:
    """(states, fp32 copy of the weights) for so many trained numbers that are `width` bytes wide."""
    fixed = OPTIMIZERS[options.optimizer]
    wide = max(SINGLE, width) if options.master or options.states == "fp32" else width
    copied = options.master and width < SINGLE
    return count * (2 * wide if fixed is None else fixed), SINGLE * count if copied else 0


def amount(size_bytes: int) -> str:
    """`137953296384 -> 137.95 GB`, in powers of 1000."""
    value, units = float(size_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} bytes" if units[0] == "bytes" else f"{value:,.2f} {units[0]}"


def _cost(case: Case, options: Options, held: Activations, logits: int) -> Cost:
    tensors = case.program.tensors
    every = case.program.parameters()
    trainable, quantised = case.trainable(), set(_quantised(case))
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(identity(tensor), []).append(name)
    sums = dict.fromkeys(
        ("parameters", "trainable", "quantised", "quantised_bytes", "weights", "gradients", "optimiser", "master_copy"),
        0,
    )
    for names in groups.values():
        tensor = tensors[names[0]]
        count, plain = tensor.numel(), tensor.numel() * tensor.element_size()
        if quantised & {*names}:
            small = nf4_bytes(count, double_quantise=options.double_quantise)
            sums["quantised"] += count
            sums["quantised_bytes"] += small
        sums["weights"] += small if quantised & {*names} else plain
        sums["parameters"] += count if {*names} & {*every} else 0
        if trainable & {*names}:
            states, copy = optimiser_bytes(count, tensor.element_size(), options)
            sums["trainable"] += count
            sums["gradients"] += plain
            sums["optimiser"] += states
            sums["master_copy"] += copy
    return Cost(name=case.name, **sums, activations=held, loss=SINGLE * logits)


def _quantised(case: Case) -> list[str]:
    """The weights that NF4 would hold: those of all linear layers that are no output embedding and no lookup table."""
    if not case.quantised:
        return []
    found = layers(case.program)
    tables = {site.weight for site in found.values() if isinstance(site, Embedding)}
    sites = [s for s in found.values() if isinstance(s, Linear) and not is_output_head(s, found)]
    trainable = case.trainable()
    return [site.weight for site in sites if site.weight not in tables and site.weight not in trainable]


def _largest(case: Case) -> int:
    """The bytes of the largest quantised weight in the type it is computed in."""
    chosen = [case.program.tensor(name) for name in _quantised(case)]
    return max((tensor.numel() * tensor.element_size() for tensor in chosen), default=0)


def _logits(program: Program, symbols: Mapping[str, int]) -> int:
    """How many scores over a vocabulary the program ends in."""
    found = layers(program)
    heads = [site for site in found.values() if isinstance(site, Linear) and is_output_head(site, found)]
    return sum(math.prod(number(s, symbols) for s in call.meta["val"].shape) for site in heads for call in site.calls)


def _types(program: Program) -> tuple[str, ...]:
    return tuple(dict.fromkeys(dtype_name(tensor.dtype) for tensor in program.parameters().values()))
