"""Layers whose weight is held in 4 bits: what the graph holds of them, putting one there and taking it away again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from rewriter.edit import Edit
from rewriter.program import Program
from rewriter.view import Layer, Linear, Linear4bit, layers
from runtime.nf4 import Nested, Quantised, dequantize

aten = torch.ops.aten
SUFFIXES = ("packed", "absmax", "nested_absmax", "nested_offset")  # tensors beside a weight's own name


def held(program: Program, site: Linear4bit) -> Quantised:
    """The 4-bit weight of a layer, as its tensors hold it."""
    tensors = [program.tensor(name) for name in site.tensors]
    shape = (site.out_features, site.in_features)
    return assemble(tensors, shape, compute_dtype(site), site.quantisation, site.block_size)


def assemble(
    tensors: Sequence[torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, kind: str, block_size: int
) -> Quantised:
    """The 4-bit weight that these tensors hold: codes, scales, and the state of the scales when there are four."""
    packed, absmax, *nested = tensors
    return Quantised(packed, absmax, shape, dtype, kind, block_size, Nested(nested[0], nested[1]) if nested else None)


def held_numbers(program: Program) -> dict[str, tuple[str, int]]:
    """Tensor of a 4-bit weight -> its format, and how many weights it stands for: codes for all, scales for none."""
    return {
        name: (site.quantisation, 0 if index else site.out_features * site.in_features)
        for site in layers(program).values()
        if isinstance(site, Linear4bit)
        for index, name in enumerate(site.tensors)
    }


def parameter_count(program: Program) -> int:
    """How many numbers the parameters of a program hold, those in 4 bits included, tied names each."""
    stored = sum(tensor.numel() for tensor in program.parameters().values())
    return stored + sum(count for _, count in held_numbers(program).values())


def compute_dtype(site: Layer) -> torch.dtype:
    """The floating-point type a layer computes in."""
    dtype: torch.dtype = site.calls[0].meta["val"].dtype
    return dtype


def weight_value(program: Program, site: Layer) -> torch.Tensor:
    """The weight a layer applies: as it is stored, or out of 4 bits [o, i] in the type the layer computes in."""
    if isinstance(site, Linear4bit):
        return dequantize(held(program, site))
    return program.tensor(site.weight)


def weight_like(program: Program, site: Layer) -> torch.Tensor:
    """Something of the shape, type and device of the weight a layer applies, to make new parameters like it."""
    tensor = program.tensor(site.weight)
    if isinstance(site, Linear4bit):
        return tensor.new_empty((), dtype=compute_dtype(site)).expand(site.out_features, site.in_features)
    return tensor


def hold(edit: Edit, site: Linear, quantised: Quantised) -> None:
    """Let a layer read its weight out of 4 bits; the tensor it read before goes when nothing else reads it.

        y = x Wᵀ + b   ->   y = nf4_linear(x, packed, absmax, ..., b)

    The operations keep names, paths and users. `quantised` is the weight as [o, i], however it was stored.
    """
    nested = quantised.nested
    values = [quantised.packed, quantised.absmax, *([nested.absmax, nested.offset] if nested else [])]
    stem = site.weight
    tensors = [edit.hold(f"{stem}_{suffix}", value) for suffix, value in zip(SUFFIXES, values, strict=False)]
    operation = torch.ops.rewriter.nf4_linear_double if nested else torch.ops.rewriter.nf4_linear
    for call in site.calls:
        arguments = (site.input(call), *tensors, site.added(call))
        edit.turn(call, operation.default, *arguments, site.out_features, quantised.block_size, quantised.kind)


def release(edit: Edit, site: Linear4bit, weight: torch.Tensor) -> Node:
    """Let a layer read a plain weight [o, i] again, under the name it had; returns the weight's placeholder.

    y = nf4_linear(x, packed, absmax, ..., b)   ->   y = x Wᵀ + b
    """
    made = edit.hold(site.tensors[0].removesuffix("_packed"), torch.nn.Parameter(weight, requires_grad=False))
    for call in site.calls:
        bias = site.added(call)
        edit.turn(call, aten.linear.default, site.input(call), made, *([] if bias is None else [bias]))
    return made
