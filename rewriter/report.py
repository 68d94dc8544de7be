"""What a program holds and what training it takes: parameters, bytes, memory, with every assumption stated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rewriter.difference_text import size
from rewriter.program import Program
from rewriter.quantised import held_numbers
from rewriter.text import dtype_name, printable

SCHEMA = 1
MASTER_BYTES = 4  # an fp32 copy of a weight, and each of Adam's two states in fp32
ASSUMPTIONS = (
    "weights in the type they are stored in, tied ones once; gradients and Adam states for trainable parameters only",
    "weights held in 4 bits: the numbers they stand for, in the bytes of their codes and scales; they do not train",
    "plain: gradients and both Adam states in the type of the weight",
    "mixed: gradients in the type of the weight, Adam states in fp32, and an fp32 copy of weights of a smaller type",
    "without activations, which depend on batch and length, and without what the allocator and CUDA take",
)


@dataclass(frozen=True, slots=True)
class Amount:
    """Some tensors: how many, how many numbers, how many of them train, how many bytes."""

    tensors: int
    count: int
    trainable: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that training needs, apart from activations."""

    weights: int
    gradients: int
    optimiser: int
    master_copy: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.master_copy


@dataclass(frozen=True, slots=True)
class Report:
    """The parameters of a program and the memory of training it; `full` is the same with every parameter trained."""

    parameters: Amount
    other: Amount
    by_type: dict[str, Amount]
    by_module: dict[str, Amount]
    by_step: dict[str, Amount]
    memory: dict[str, Memory]
    full: dict[str, Memory]

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters."""
        return self.parameters.trainable / self.parameters.count if self.parameters.count else 0.0

    def to_json(self) -> dict[str, Any]:
        """The report as plain data; sizes in bytes."""
        return {
            "schema": SCHEMA,
            "parameters": {**asdict(self.parameters), "share": self.share},
            "other_tensors": asdict(self.other),
            "by_type": {key: asdict(amount) for key, amount in self.by_type.items()},
            "by_module": {key: asdict(amount) for key, amount in self.by_module.items()},
            "by_step": [{"step": key, **asdict(amount)} for key, amount in self.by_step.items()],
            "memory": {key: {**asdict(memory), "total": memory.total} for key, memory in self.memory.items()},
            "memory_full": {key: {**asdict(memory), "total": memory.total} for key, memory in self.full.items()},
            "assumptions": list(ASSUMPTIONS),
        }

    def __str__(self) -> str:
        amounts = [["parameters", *_cells(self.parameters)], ["buffers and constants", *_cells(self.other)]]
        for title, group in (("type", self.by_type), ("module", self.by_module), ("step", self.by_step)):
            amounts += [[f"{title} {key}", *_cells(amount)] for key, amount in group.items()]
        memory = [
            [f"{what}, {kind}", *(size(n) for n in (m.weights, m.gradients, m.optimiser, m.master_copy, m.total))]
            for what, each in (("this program", self.memory), ("full fine-tuning", self.full))
            for kind, m in each.items()
        ]
        lines = [
            f"{self.parameters.trainable:,} of {self.parameters.count:,} parameters train ({self.share:.4%})",
            "",
            *_table(["", "tensors", "numbers", "trainable", "size"], amounts),
            "",
            *_table(["memory of training", "weights", "gradients", "Adam", "fp32 copy", "total"], memory),
            *(f"  {assumption}" for assumption in ASSUMPTIONS),
        ]
        return "\n".join(line.rstrip() for line in lines) + "\n"


def report(program: Program) -> Report:
    """Count the parameters of a program by type, module and step, and estimate the memory of training it."""
    tensors = program.tensors
    aliases = {name for group in program.tied() for name in _ordered(program, group)[1:]}
    in_4_bits = held_numbers(program)
    every = {*program.parameters(), *in_4_bits}
    parameters = [name for name in _ordered(program, every) if name not in aliases]
    trainable = {*program.trainable}
    for group in program.tied():  # a tied tensor trains when one of its names does
        if trainable & {*group}:
            trainable.update(group)

    def amount(names: Iterable[str]) -> Amount:
        chosen = {name: tensors[name] for name in names}
        return Amount(
            len(chosen),
            sum(in_4_bits[name][1] if name in in_4_bits else tensor.numel() for name, tensor in chosen.items()),
            sum(tensor.numel() for name, tensor in chosen.items() if name in trainable),
            sum(_size_bytes(tensor) for tensor in chosen.values()),
        )

    def grouped(keys: dict[str, str]) -> dict[str, Amount]:
        return {key: amount(n for n, k in keys.items() if k == key) for key in dict.fromkeys(keys.values())}

    types = {name: dtype_name(tensors[name].dtype) for name in parameters}
    everything = {name for name in parameters if tensors[name].is_floating_point() and name not in in_4_bits}
    return Report(
        amount(parameters),
        amount(name for name in _ordered(program, tensors) if name not in every),
        grouped({name: in_4_bits[name][0] if name in in_4_bits else types[name] for name in parameters}),
        grouped(_modules(parameters)),
        {f"{s.number} {printable(s.name)}": amount(n for n in s.added if n in tensors) for s in program.steps},
        _memory(tensors, parameters, trainable),
        _memory(tensors, parameters, everything),
    )


def _ordered(program: Program, names: Iterable[str]) -> list[str]:
    rank = {str(spec.target): i for i, spec in enumerate(program.specs.values())}
    return sorted(names, key=lambda name: (rank.get(name, len(rank)), name))


def _modules(names: list[str]) -> dict[str, str]:
    """Name -> the first part of its path that tells the parameters apart."""
    parts = [name.split(".")[:-1] for name in names]
    columns = enumerate(zip(*parts, strict=False))
    depth = next((i for i, column in columns if len({*column}) > 1), min(map(len, parts), default=0))
    return {name: printable(".".join(part[: depth + 1])) or "(top)" for name, part in zip(names, parts, strict=True)}


def _memory(tensors: dict[str, torch.Tensor], parameters: list[str], trainable: set[str]) -> dict[str, Memory]:
    weights = sum(_size_bytes(tensors[name]) for name in parameters)
    training = [tensors[name] for name in parameters if name in trainable]
    gradients = sum(_size_bytes(tensor) for tensor in training)
    states = sum(2 * max(MASTER_BYTES, tensor.element_size()) * tensor.numel() for tensor in training)
    copies = sum(MASTER_BYTES * tensor.numel() for tensor in training if tensor.element_size() < MASTER_BYTES)
    return {
        "plain": Memory(weights, gradients, 2 * gradients, 0),
        "mixed": Memory(weights, gradients, states, copies),
    }


def _size_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cells(amount: Amount) -> list[str]:
    return [f"{amount.tensors:,}", f"{amount.count:,}", f"{amount.trainable:,}", size(amount.size_bytes)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
