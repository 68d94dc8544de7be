"""One number for a set of tensors: the same names, types, shapes and bytes give the same one, on any machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from rewriter.errors import RewriteError


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 over names in sorted order, each with its dtype, shape and raw bytes; one tensor is read at a time.

    Raises `RewriteError` for a tensor on the meta device, which has no bytes.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.device.type == "meta":
            raise RewriteError(f"{name} is on the meta device and has no values", fix="Materialise the model first.")
        dtype = str(tensor.dtype).removeprefix("torch.")
        # Lengths and separators that cannot be part of a dtype or shape: two sets never give the same stream.
        digest.update(f"{len(name.encode())}:{name}:{dtype}:{list(tensor.shape)}:".encode())
        if tensor.numel():
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
