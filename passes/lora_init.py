"""How A and B of a LoRA start."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rewriter.errors import UsageError
from rewriter.view import Conv, Embedding, Experts, Linear, Site

if TYPE_CHECKING:
    from passes.lora import Lora

INITS = ("kaiming", "gaussian", "both", "pissa", "olora")
REPLACES_WEIGHT = ("pissa", "olora")


@dataclass(frozen=True, slots=True)
class Start:
    """The first values of A and B, and of the weight where the init takes its share out of it."""

    a: torch.Tensor
    b: torch.Tensor
    weight: torch.Tensor | None = None


def initial(lora: Lora, site: Site, weight: torch.Tensor, rank: int, scale: float) -> Start:
    """A and B in the weight's type, the same for the same seed, path and adapter name.

    kaiming: A ~ U(±√(1/i)), B = 0; gaussian: A ~ N(0, 1/rank²), B = 0; both: A, B ~ N(0, sigma²);
    pissa: B A = the rank largest singular triples of W, over scale; olora: B A = Q[:, :rank] R[:rank] of W = Q R.
    """
    if lora.init in REPLACES_WEIGHT:
        return _decomposed(lora.init, site, weight, rank, scale)
    a, b = _empty(site, weight, rank)
    if weight.device.type == "meta":
        return Start(a, b)
    generator = torch.Generator(device="cpu").manual_seed(_seed(lora, site))
    if isinstance(site, Embedding) and lora.init != "both":  # as PEFT: an embedding's A is zero and its B is normal
        return Start(a.zero_(), b.normal_(generator=generator))
    if lora.init == "kaiming":
        matrices = a.flatten(0, 1) if isinstance(site, Experts) else a  # the fan of one expert, not of the stack
        torch.nn.init.kaiming_uniform_(matrices, a=math.sqrt(5), generator=generator)
    else:
        a.normal_(0.0, lora.sigma if lora.init == "both" else 1 / rank, generator=generator)
    b = b.normal_(0.0, lora.sigma, generator=generator) if lora.init == "both" else b.zero_()
    return Start(a, b)


def _empty(site: Site, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(site, Conv):
        if rank % site.groups:
            raise UsageError(
                f"{site.path}: rank {rank} is not a multiple of its {site.groups} groups",
                fix="Give this layer another rank by rank_pattern.",
            )
        kernel = weight.shape[2:]
        ones = [1] * len(kernel)
        return (
            weight.new_empty(rank, site.in_features, *kernel),
            weight.new_empty(site.out_features, rank // site.groups, *ones),
        )
    if isinstance(site, Experts):
        stack = site.experts
        return weight.new_empty(stack, rank, site.in_features), weight.new_empty(stack, site.out_features, rank)
    out = site.out_features
    if isinstance(site, Linear) and site.part is not None:
        out = site.part.stop - site.part.start
    return weight.new_empty(rank, site.in_features), weight.new_empty(out, rank)


def _decomposed(init: str, site: Site, weight: torch.Tensor, rank: int, scale: float) -> Start:
    if not isinstance(site, Linear) or site.part is not None:
        raise UsageError(f"init={init} needs whole linear layers, {site.path} is none", fix="Use init=kaiming.")
    if rank > min(site.in_features, site.out_features):
        raise UsageError(f"{site.path}: init={init} needs rank <= {min(site.in_features, site.out_features)}")
    full = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    full = full.t() if site.transposed else full
    if init == "pissa":
        u, s, vh = torch.linalg.svd(full, full_matrices=False)
        root = (s[:rank] / scale).sqrt()
        a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    else:
        q, r = torch.linalg.qr(full)
        a, b = r[:rank], q[:, :rank]
    a, b = a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous()
    rest = full - scale * (b.to(full.dtype) @ a.to(full.dtype))
    return Start(a, b, (rest.t() if site.transposed else rest).to(weight.dtype).contiguous())


def _seed(lora: Lora, site: Site) -> int:
    part = site.part.name if isinstance(site, Linear) and site.part else ""
    digest = hashlib.sha256(f"{lora.seed}/{site.path}/{lora.adapter}/{part}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
