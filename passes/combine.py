"""Several low-rank updates as one: weighted sums, pruning, sign election, truncation.

Every update is a stack of factors, a [g, r, i] and b [g, o, r], meaning b @ a: one matrix for a linear or an embedding
layer, one for each group of a convolution, one for each expert. All numbers are fp64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rewriter.view import Conv, Experts, Site

Sign = Literal["total", "frequency"]


@dataclass(frozen=True, slots=True)
class Update:
    """`b @ a` for each matrix of a stack: a [g, r, i], b [g, o, r]."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return int(self.a.shape[1])

    def product(self) -> Tensor:
        return self.b @ self.a

    def times(self, factor: float) -> Update:
        return Update(self.a * factor, self.b)


def read(site: Site, a: Tensor, b: Tensor) -> Update:
    """The tensors of a LoRA as a stack; of a convolution, every group's share of the rank apart."""
    a, b = a.detach().double(), b.detach().double()
    if isinstance(site, Experts):
        return Update(a, b)
    groups = site.groups if isinstance(site, Conv) else 1
    return Update(a.reshape(groups, a.shape[0] // groups, -1), b.reshape(groups, b.shape[0] // groups, -1))


def written(site: Site, update: Update, kernel: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A and B of a LoRA for the layer, the inverse of `read`; `kernel` is that of A."""
    if isinstance(site, Experts):
        return update.a, update.b
    a, b = update.a.flatten(0, 1), update.b.flatten(0, 1)
    if isinstance(site, Conv):
        return a.reshape(a.shape[0], -1, *kernel), b.reshape(*b.shape, *[1] * len(kernel))
    return a, b


# -- sums of factors ----------------------------------------------------------------------------------------------


def joined(updates: Sequence[Update]) -> Update:
    """The exact sum, with the sum of the ranks."""
    return Update(torch.cat([u.a for u in updates], dim=1), torch.cat([u.b for u in updates], dim=2))


def truncated(update: Update, rank: int) -> Update:
    """The nearest update of a rank no larger than `rank`, in the Frobenius norm; no full matrix is made."""
    left, core, right = _core(update)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    root = s[:, :rank].sqrt()
    return Update(root[..., None] * (vh[:, :rank] @ right.mT), left @ (u[..., :rank] * root[:, None]))


def factored(matrices: Tensor, rank: int) -> Update:
    """The nearest update of a rank no larger than `rank` to full matrices [g, o, i]."""
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    root = s[:, :rank].sqrt()
    return Update(root[..., None] * vh[:, :rank], u[..., :rank] * root[:, None])


def relative_error(update: Update, exact: Update) -> float:
    """‖update − exact‖ / ‖exact‖."""
    size = float(_core(exact)[1].norm())
    return float(_core(joined([update, exact.times(-1)]))[1].norm()) / size if size else 0.0


def _core(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """(q, c, p) with b @ a = q c pᵀ, the columns of q and p orthonormal: c holds the norm and the singular values."""
    left, upper = torch.linalg.qr(update.b)
    right, lower = torch.linalg.qr(update.a.mT)
    return left, upper @ lower.mT, right


# -- sums of tensors ----------------------------------------------------------------------------------------------


def merged(
    method: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    keys: Sequence[str],
    *,
    density: float | None,
    majority_sign: Sign,
) -> Tensor:
    """One tensor of several by a method's rule: reduce each to a share of its entries, elect signs, sum.

    `method` is a name of PEFT's, without `_svd`; `keys` seed what DARE keeps, one for each tensor.
    """
    if density is not None and method.startswith("dare"):
        tensors = [rescaled_at_random(tensor, density, key) for tensor, key in zip(tensors, keys, strict=True)]
    elif density is not None:
        tensors = [largest(tensor, density) for tensor in tensors]
    if method.endswith("ties"):
        return elected_mean(tensors, weights, majority_sign)
    return weighted_sum(tensors, weights)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([weight * tensor for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)


def elected_mean(tensors: Sequence[Tensor], weights: Sequence[float], majority_sign: Sign) -> Tensor:
    """TIES: per entry the mean of the weighted values whose sign won; `total` sums the values, `frequency` counts them.

    The election is held before the weights, as Yadav et al. and PEFT hold it; a tie goes to plus.
    """
    stack = torch.stack(list(tensors))
    votes = stack.sum(0) if majority_sign == "total" else stack.sign().sum(0)
    winner = torch.where(votes >= 0, 1.0, -1.0).to(stack.dtype)
    agrees = stack.sign() == winner
    scaled = torch.stack([weight * tensor for tensor, weight in zip(tensors, weights, strict=True)])
    return (scaled * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def largest(tensor: Tensor, density: float) -> Tensor:
    """The share `density` of the entries that is largest in magnitude, zero elsewhere."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_put((kept,), flat[kept]).view_as(tensor)


def rescaled_at_random(tensor: Tensor, density: float, key: str) -> Tensor:
    """DARE: each entry kept with the probability `density` and divided by it, else zero."""
    return tensor * keep_mask(tuple(tensor.shape), density, key).to(tensor.device) / density


def keep_mask(shape: tuple[int, ...], density: float, key: str) -> Tensor:
    """Which entries DARE keeps: the same for the same shape, density and key, and for no other key."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) < density
