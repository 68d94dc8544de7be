"""The bottleneck of an adapter: its parameters, how they start, and the operations that apply them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from rewriter.edit import Edit

if TYPE_CHECKING:
    from passes.adapter import Adapter

aten = torch.ops.aten
ACTIVATIONS = {
    "relu": aten.relu.default,
    "gelu": aten.gelu.default,
    "silu": aten.silu.default,
    "tanh": aten.tanh.default,
}
CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
NORM_EPSILON = 1e-5


class Bottleneck:
    """`scale · W_up act(W_down norm(z))` with parameters under one name.

    `inputs -> size -> outputs` features; with `dims`, 1x1 convolutions over that many spatial dimensions.
    """

    def __init__(
        self, adapter: Adapter, edit: Edit, name: str, *, inputs: int, outputs: int, like: torch.Tensor, dims: int = 0
    ) -> None:
        self.adapter, self.edit, self.name, self.dims, self.like = adapter, edit, name, dims, like
        self.size = adapter.size_of(inputs)
        kernel = [1] * dims
        self.norm_before = self._norm("norm_before", inputs) if adapter.norm_before else None
        self.down = self._weight("down", [self.size, inputs, *kernel])
        self.up = self._weight("up", [outputs, self.size, *kernel])
        self.norm_after = self._norm("norm_after", outputs) if adapter.norm_after else None
        self.scale: Node | float = adapter.scale
        if adapter.learned_scale:
            scale = like.new_full([outputs if adapter.scale_per_channel else 1], adapter.scale)
            self.scale = edit.parameter(f"{name}.scale", scale)

    # -- parameters ---------------------------------------------------------------------------------------------

    def _weight(self, kind: str, shape: list[int]) -> tuple[Node, Node | None]:
        """The weight and bias of one projection: Kaiming-uniform down and zero up, or both Xavier-uniform."""
        value = torch.zeros(shape, dtype=torch.float32, device="meta" if self.like.is_meta else "cpu")
        digest = hashlib.sha256(f"{self.adapter.seed}/{self.name}/{kind}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        if not self.like.is_meta and self.adapter.init == "xavier":
            torch.nn.init.xavier_uniform_(value, generator=generator)
        elif not self.like.is_meta and kind == "down":
            torch.nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
        weight = self.edit.parameter(f"{self.name}.{kind}.weight", value.to(self.like))
        if not self.adapter.bias:
            return weight, None
        return weight, self.edit.parameter(f"{self.name}.{kind}.bias", self.like.new_zeros(shape[0]))

    def _norm(self, kind: str, width: int) -> tuple[Node, Node]:
        weight = self.edit.parameter(f"{self.name}.{kind}.weight", self.like.new_ones(width))
        return weight, self.edit.parameter(f"{self.name}.{kind}.bias", self.like.new_zeros(width))

    # -- operations ---------------------------------------------------------------------------------------------

    def call(self, like: Node, label: str, operation: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert one operation beside `like`, labelled with what it is and the adapter's name."""
        suffix = "" if self.adapter.adapter == "default" else f"_{self.adapter.adapter}"
        return self.edit.call(operation, *args, like=like, label=f"adapter_{label}{suffix}", **kwargs)

    def update(self, like: Node, z: Node, stride: list[int] | None = None) -> Node:
        """`scale · W_up act(W_down norm(z))` behind its dropout."""
        dtype = self.down[0].meta["val"].dtype
        if z.meta["val"].dtype != dtype:
            z = self.call(like, "cast", aten.to.dtype, z, dtype)
        if self.norm_before is not None:
            z = self.normed(like, "norm_before", z, self.norm_before)
        low = self._project(like, "down", z, self.down, stride)
        active = self.call(like, self.adapter.activation, ACTIVATIONS[self.adapter.activation], low)
        high = self._project(like, "up", active, self.up, None)
        if isinstance(self.scale, Node) or self.scale != 1:
            high = self.call(like, "scaled", aten.mul.Tensor, high, self._scale(like))
        if self.adapter.dropout:
            high = self.call(like, "dropout", aten.dropout.default, high, self.adapter.dropout, False)
        return high

    def added(self, like: Node, base: Node, update: Node) -> Node:
        """`base + update`, with the adapter's own norm on the update or on the sum."""
        norm = self.norm_after
        if norm is not None and not self.adapter.norm_sum:
            update = self.normed(like, "norm_after", update, norm)
        total = self.call(like, "sum", aten.add.Tensor, base, update)
        if norm is not None and self.adapter.norm_sum:
            total = self.normed(like, "norm_after", total, norm)
        return total

    def normed(self, like: Node, label: str, x: Node, norm: tuple[Node, Node]) -> Node:
        width = norm[0].meta["val"].shape[0]
        return self.call(like, label, aten.layer_norm.default, x, [width], *norm, NORM_EPSILON)

    def _project(
        self, like: Node, label: str, x: Node, layer: tuple[Node, Node | None], stride: list[int] | None
    ) -> Node:
        if not self.dims:
            return self.call(like, label, aten.linear.default, x, *(node for node in layer if node is not None))
        geometry = [stride or [1] * self.dims, [0] * self.dims, [1] * self.dims]
        return self.call(like, label, CONVOLUTIONS[self.dims], x, *layer, *geometry)

    def _scale(self, like: Node) -> Node | float:
        if isinstance(self.scale, Node) and self.dims:
            return self.call(like, "scale", aten.view.default, self.scale, [-1, *[1] * self.dims])
        return self.scale
