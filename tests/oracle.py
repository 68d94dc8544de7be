"""Numbers to hold passes against: programs in fp64, trained-looking adapters, and folds computed by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from passes.lora import Lora
from rewriter import verify
from rewriter.program import Program
from rewriter.trace import trace
from rewriter.view import Conv, Embedding, Linear, Site
from tests.models import TINY


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value


@functools.cache
def traced_double(name: str) -> Program:
    """The trace of a model of `TINY` in fp64."""
    module, args, kwargs = TINY[name]()
    args, kwargs = torch.utils._pytree.tree_map(_double, (args, kwargs))
    return trace(module.double(), args, kwargs)


@functools.cache
def example(name: str, *, double: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs of a model of `TINY`."""
    _, args, kwargs = TINY[name]()
    return torch.utils._pytree.tree_map(_double, (args, kwargs)) if double else (args, kwargs)


def run(program: Program, name: str) -> list[torch.Tensor]:
    """The outputs of a program for the example inputs of its model, in the program's own type."""
    double = any(tensor.dtype is torch.float64 for tensor in program.parameters().values())
    args, kwargs = example(name, double=double)
    return verify.outputs(program(*args, **kwargs))


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest absolute difference of any two outputs."""
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(one, other, strict=True))


def operations(program: Program) -> list[str]:
    """The operations of a program in order, without their names."""
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def trained(program: Program, *, size: float = 0.3, seed: int = 3) -> Program:
    """The program with random values in everything that passes added: nothing is zero, a magnitude stays near 1."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name in dict.fromkeys(name for step in program.steps for name in step.added):
        before = program.tensor(name)
        noise = size * torch.randn(before.shape, generator=generator, dtype=torch.float64).to(before.dtype)
        values[name] = before * (1 + noise) if "magnitude" in name else noise
    return program.with_tensors(values)


def update(lora: Lora, site: Site, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`scale · B A` of one site in the layout its weight is stored in, written out once more, element by element."""
    part = site.part if isinstance(site, Linear) else None
    kind = "lora_embedding_" if isinstance(site, Embedding) else "lora_"
    tail = f".{lora.adapter}" + (f".{part.name}" if part else "")
    a, b = (tensors[f"{site.path}.{kind}{letter}{tail}"].detach() for letter in "AB")
    rank = a.shape[0]
    scale = lora.alpha / (math.sqrt(rank) if lora.rslora else rank)
    for pattern, alpha in lora.alpha_pattern.items():
        if site.path == pattern or site.path.endswith("." + pattern):
            scale = alpha / (math.sqrt(rank) if lora.rslora else rank)
    weight = tensors[site.weight]
    if isinstance(site, Conv):
        result = torch.zeros_like(weight)
        outs, inner = weight.shape[0] // site.groups, rank // site.groups
        for o in range(weight.shape[0]):
            for r in range(inner):
                result[o] += b[o, r].reshape(()) * a[(o // outs) * inner + r]
        return scale * result
    if isinstance(site, Embedding):
        return scale * torch.einsum("dr,rv->vd", b, a)
    product = scale * torch.einsum("or,ri->oi", b, a)
    if part is not None:
        whole = product.new_zeros(site.out_features, site.in_features)
        whole[part.start : part.stop] = product
        product = whole
    return product.t() if site.transposed else product


def merged_weight(lora: Lora, site: Site, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """W + scale · B A, or with DoRA m · (W + scale · B A) / ‖W + scale · B A‖ per output."""
    whole = tensors[site.weight].detach() + update(lora, site, tensors)
    if not lora.dora:
        return whole
    magnitude = tensors[f"{site.path}.lora_magnitude_vector.{lora.adapter}"].detach().flatten()
    if isinstance(site, Conv):
        norm = whole.flatten(1).square().sum(1).sqrt()
        return whole * (magnitude / norm).reshape(-1, *[1] * (whole.ndim - 1))
    stored_transposed = isinstance(site, Embedding) or site.transposed
    norm = whole.square().sum(0 if stored_transposed else 1).sqrt()
    factor = magnitude / norm
    return whole * (factor[None] if stored_transposed else factor[:, None])
