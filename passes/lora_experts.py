"""LoRA on the experts of a mixture: one update for each matrix of a 3-D weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from rewriter.errors import UsageError
from rewriter.grouped import grouped
from rewriter.view import Experts

if TYPE_CHECKING:
    from passes.lora import Lora

aten = torch.ops.aten
ALIGNMENT = 16  # aten._grouped_mm reads matrices whose rows start at multiples of so many bytes


def check_experts(lora: Lora, site: Experts) -> None:
    """Refuse the options that have no meaning for a stack of experts.

    Raises `UsageError` naming the option.
    """
    refused = {
        "dora": (lora.dora, "its magnitude would have to follow each row's expert, and the product gives no expert"),
        "lora_bias": (lora.lora_bias, "the product of a stack has no bias"),
        f"init={lora.init}": (lora.init in ("pissa", "olora"), "it decomposes one matrix, and this weight is a stack"),
    }
    for option, (given, reason) in refused.items():
        if given:
            raise UsageError(
                f"{option} on the experts {site.path}",
                evidence=[f"{site.experts} experts in one weight: {reason}"],
                fix="Leave it out here: exclude these layers, or give them a LoRA of their own.",
            )


def experts_update(insert: Callable[..., Node], call: Node, x: Node, a: Node, b: Node) -> Node:
    """`B_e A_e x_s` for every row s of expert e, by the operation that applies the layer's own weight."""
    if call.target is aten.einsum.default:
        return _einsum_update(insert, call, x, a, b)
    rank, width = b.meta["val"].shape[2], b.meta["val"].element_size()
    missing = -rank % (ALIGNMENT // width) if call.target is aten._grouped_mm.default else 0
    if missing:  # the rank is filled up with zeros, which change no product
        a = insert("A_aligned", aten.constant_pad_nd.default, a, [0, 0, 0, missing])
        b = insert("B_aligned", aten.constant_pad_nd.default, b, [0, missing])
    turned_a = insert("A_turned", aten.transpose.int, a, -2, -1)
    turned_b = insert("B_turned", aten.transpose.int, b, -2, -1)
    low = insert("down", call.target, x, turned_a, *call.args[2:])
    return insert("up", call.target, low, turned_b, *call.args[2:])


def _einsum_update(insert: Callable[..., Node], call: Node, x: Node, a: Node, b: Node) -> Node:
    equation: Any = call.args[0]
    product = grouped(call)
    assert product is not None
    (rows, matrices), result = equation.replace(" ", "").partition("->")[0].split(","), equation.split("->")[1].strip()
    rank = next(letter for letter in "rabcdefghijklmnopqstuvwxyz" if letter not in rows + matrices)
    expert, inner, outer, low = matrices[0], rows[-1], result[-1], rows[:-1] + rank
    down = insert("down", call.target, f"{rows},{expert}{rank}{inner}->{low}", [x, a])
    return insert("up", call.target, f"{low},{expert}{outer}{rank}->{result}", [down, b])
