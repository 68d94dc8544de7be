"""Handwritten digits and a small ViT-like classifier that knows them mirrored: what every method is trained on.

An image of 8x8 pixels is 16 patches of 2x2; a patch is one integer, its four pixels rounded to four grey levels. The
base model is trained on mirrored images, in seconds and once per session; the task is the images as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import rewriter
from rewriter.program import Program

LEVELS, PATCHES, CLASSES = 4, 16, 10
WIDTH, HEADS, BLOCKS, POSITIONS = 32, 4, 2, 40
BATCH = 64

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Multi-head self-attention with separate projections, each with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.output = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.mlp_norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Classifier(nn.Module):
    """Patches [b, t] -> scores [b, classes]: the mean over the visible patches goes through the head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.positions = nn.Embedding(LEVELS**4, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, patches: Tensor, visible: Tensor | None = None) -> Tensor:
        x = self.patches(patches) + self.positions(torch.arange(patches.shape[1], device=patches.device))
        mask = None if visible is None else visible[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        if visible is None:
            return self.head(x.mean(1))
        weight = visible.to(x.dtype)[..., None]
        return self.head((x * weight).sum(1) / weight.sum(1))


@functools.cache
def digits(*, mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """All images as patches [1797, 16], and what they show [1797]."""
    found = load_digits()
    images = torch.tensor(found.images)
    levels = ((images.flip(-1) if mirrored else images) / 16 * (LEVELS - 1)).round().long()
    pixels = levels.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(levels), PATCHES, 4)
    return pixels @ LEVELS ** torch.arange(4), torch.tensor(found.target)


def batches(count: int, *, mirrored: bool = False, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """`count` random batches of images and classes."""
    generator = torch.Generator().manual_seed(seed)
    images, classes = digits(mirrored=mirrored)
    places = [torch.randint(len(images), (BATCH,), generator=generator) for _ in range(count)]
    return [(images[place], classes[place]) for place in places]


def cross_entropy(module: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(module(images), classes)


def train(module: nn.Module, *, steps: int, rate: float, mirrored: bool = False, loss: Loss = cross_entropy) -> None:
    """Train what requires gradients with Adam, in the order of a fixed seed."""
    torch.manual_seed(0)  # dropout and gates
    optimiser = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=rate)
    module.train()
    for images, classes in batches(steps, mirrored=mirrored):
        optimiser.zero_grad()
        loss(module, images, classes).backward()
        optimiser.step()
    module.eval()


def loss_of(module: nn.Module) -> float:
    """The cross-entropy of a program's module in eval mode, on images in the order they were not trained in."""
    with torch.no_grad():
        return sum(float(cross_entropy(module, *batch)) for batch in batches(8, seed=1)) / 8


@functools.cache
def classifier() -> Classifier:
    """The base model, trained on mirrored images."""
    torch.manual_seed(0)
    model = Classifier()
    train(model, steps=250, rate=4e-3, mirrored=True)
    return model.requires_grad_(False).eval()


@functools.cache
def traced_digits(*, masked: bool = False) -> Program:
    """The trace of the base model for any number of images and patches, with a mask of visible patches if asked for."""
    example = digits()[0][:3, :7].clone()
    return rewriter.trace(classifier(), (example, torch.ones_like(example, dtype=torch.bool)) if masked else (example,))
