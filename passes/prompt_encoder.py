"""P-tuning's prompt encoder: the prompt as what a small network makes of trained embeddings."""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.edit import Edit

aten = torch.ops.aten
Draw = Callable[[Tensor, torch.Generator], Tensor]


def drawn(shape: tuple[int, ...], like: Tensor, seed: int, name: str, draw: Draw) -> Tensor:
    """A first value in the type of `like`, the same for the same seed and name on every device."""
    if like.device.type == "meta":
        return like.new_empty(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return draw(torch.empty(shape, dtype=like.dtype), generator).to(like.device)


def normal(deviation: float) -> Draw:
    return lambda value, generator: value.normal_(0, deviation, generator=generator)


def uniform(bound: float) -> Draw:
    return lambda value, generator: value.uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """E [p, d]  ->  P = MLP(LSTM(E)), or MLP(E): architecture and names of parameters are those of PEFT.

    lstm: a bidirectional LSTM [d -> 2 hidden] of `layers` layers, then Linear(2 hidden, 2 hidden), ReLU,
    Linear(2 hidden, d). mlp: Linear(d, hidden), ReLU, Linear(hidden, hidden), ReLU, Linear(hidden, d).
    """

    edit: Edit
    at: Node  # where the operations are inserted, and whose type the parameters have
    like: Tensor
    kind: Literal["lstm", "mlp"]
    hidden: int
    layers: int
    dropout: float
    adapter: str
    seed: int

    def rows(self, count: int, width: int, copies: int) -> Node:
        """The prompt [count, width], or one per copy [copies, count, width], which share the network."""
        embedding = self._parameter("embedding.weight", (copies * count, width), normal(1.0))
        value = self._call("batched", aten.view.default, embedding, [copies, count, width])
        if self.kind == "lstm":
            value = self._lstm(value, width)
            sizes = [2 * self.hidden, 2 * self.hidden, width]
        else:
            sizes = [width, self.hidden, self.hidden, width]
        value = self._mlp(value, sizes)
        return value if copies > 1 else self._call("rows", aten.view.default, value, [count, width])

    def _lstm(self, value: Node, width: int) -> Node:
        """Layer by layer, so that the dropout between layers is an operation that follows `train()` and `eval()`."""
        bound = 1 / math.sqrt(self.hidden)
        copies = value.meta["val"].shape[0]
        start = self._call("lstm_start", aten.new_zeros.default, value, [2, copies, self.hidden])
        for layer in range(self.layers):
            inputs = width if layer == 0 else 2 * self.hidden
            shapes = {
                "weight_ih": (4 * self.hidden, inputs),
                "weight_hh": (4 * self.hidden, self.hidden),
                "bias_ih": (4 * self.hidden,),
                "bias_hh": (4 * self.hidden,),
            }
            weights = [
                self._parameter(f"lstm_head.{kind}_l{layer}{direction}", shape, uniform(bound))
                for direction in ("", "_reverse")
                for kind, shape in shapes.items()
            ]
            if layer and self.dropout:
                value = self._call("lstm_dropout", aten.dropout.default, value, self.dropout, False)
            options = (True, 1, 0.0, False, True, True)  # biases, layers, dropout, train, bidirectional, batch first
            result = self._call("lstm", aten.lstm.input, value, [start, start], weights, *options)
            value = self._call("lstm_output", operator.getitem, result, 0)
        return value

    def _mlp(self, value: Node, sizes: list[int]) -> Node:
        for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            if index:
                value = self._call("relu", aten.relu.default, value)
            bound = 1 / math.sqrt(inputs)
            weight = self._parameter(f"mlp_head.{2 * index}.weight", (outputs, inputs), uniform(bound))
            bias = self._parameter(f"mlp_head.{2 * index}.bias", (outputs,), uniform(bound))
            value = self._call("linear", aten.linear.default, value, weight, bias)
        return value

    def _parameter(self, kind: str, shape: tuple[int, ...], draw: Draw) -> Node:
        name = f"prompt_encoder.{self.adapter}.{kind}"
        return self.edit.parameter(name, drawn(shape, self.like, self.seed, name, draw))

    def _call(self, label: str, operation: Any, *args: Any) -> Node:
        return self.edit.call(operation, *args, like=self.at, label=f"prompt_{label}", path="")
