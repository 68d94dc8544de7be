"""The three ways to write a linear layer with a 4-bit weight in ONNX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.errors import RewriteError
from runtime.nf4 import NESTED_BLOCK, NESTED_CODE, dequantize_flat

MICROSOFT = "com.microsoft"
LARGEST_BLOCK = 256  # of ONNX Runtime's kernels; larger blocks are written as several with the same scale
SMALLEST_BLOCK = 16
TABLES = {"nf4": "nf4_levels", "fp4": "fp4_levels", "nested": "nf4_scale_levels"}
EXACT_ACTIVATIONS, EIGHT_BIT_ACTIVATIONS = 1, 4  # accuracy levels of MatMulNBits


@dataclass(slots=True)
class Layer:
    """A layer to write: its values in the model, the numbers they hold, and the nodes made for it so far."""

    path: str
    key: str  # the name of its packed weight, which names of derived weights start with
    x: ir.Value
    bias: ir.Value | None
    stored: Mapping[str, ir.Value | None]
    packed: Tensor
    absmax: Tensor  # fp32, whatever the program stores
    in_features: int
    out_features: int
    block_size: int
    kind: str
    keep_double_quant: bool
    made: dict[str, ir.Value]  # new weights and tables by name, shared by all layers
    metadata: Mapping[str, str]
    nodes: list[ir.Node] = field(default_factory=list)

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def dtype(self) -> ir.DataType:
        return self.x.dtype or ir.DataType.FLOAT

    def op(
        self, op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None, domain: str = ""
    ) -> ir.Value:
        """A new node, named after the layer's module path; its output."""
        double = sum(node.op_type == op_type for node in self.nodes)
        name = f"{self.path}/{op_type}" + (f"_{double}" if double else "")
        node = ir.node(
            op_type, inputs, attributes, domain=domain, name=name, metadata_props=dict(self.metadata), num_outputs=1
        )
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant of the layer."""
        return self.op("Constant", [], {"value": ir.tensor(np.asarray(value, dtype=dtype))})

    def weight(self, suffix: str, value: Tensor) -> ir.Value:
        """A new initializer that replaces stored numbers of the program."""
        return self._made(f"{self.key}.{suffix}", value)

    def table(self, name: str, value: Tensor) -> ir.Value:
        """A constant that all layers read."""
        return self._made(name, value)

    def _made(self, name: str, value: Tensor) -> ir.Value:
        if name not in self.made:
            tensor = ir.tensor(value.contiguous().numpy(), name=name)
            shape, kind = ir.Shape(value.shape), ir.TensorType(tensor.dtype)
            self.made[name] = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
        return self.made[name]

    def bytes(self) -> ir.Value:
        """The packed weight as the program stores it, flat."""
        value = self.stored["packed"]
        assert value is not None
        if value.shape is not None and len(value.shape) == 1:
            return value
        return self.op("Reshape", [value, self.constant([-1])])


# -- com.microsoft.MatMulBnb4 -----------------------------------------------------------------------------------------


def bnb4(layer: Layer) -> tuple[ir.Value, float]:
    """MatMulBnb4 on the program's bytes. Raises `RewriteError` for a type of x that ONNX Runtime's kernel lacks."""
    _check_activations(layer, "MatMulBnb4", ir.DataType.FLOAT, ir.DataType.FLOAT16)
    block = min(layer.block_size, LARGEST_BLOCK)
    if block < SMALLEST_BLOCK:
        raise _refusal(layer, f"MatMulBnb4 has no blocks of {block}", "codebook")
    scale = _scales(layer, block)
    if layer.dtype != ir.DataType.FLOAT:
        scale = layer.op("Cast", [scale], {"to": int(layer.dtype)})
    attributes = {
        "K": layer.in_features,
        "N": layer.out_features,
        "block_size": block,
        "quant_type": {"fp4": 0, "nf4": 1}[layer.kind],
        "training_mode": 0,
        "transB": 1,
    }
    return layer.op("MatMulBnb4", [layer.x, layer.bytes(), scale], attributes, MICROSOFT), 0.0


def _check_activations(layer: Layer, operator: str, *taken: ir.DataType) -> None:
    if layer.dtype not in taken:
        types = " and ".join(each.name.lower() for each in taken)
        reason = f"its activations are {layer.dtype.name.lower()}; on a CPU {operator} takes {types}"
        if layer.dtype == ir.DataType.BFLOAT16:  # nothing multiplies these on a CPU, where the export is checked
            raise RewriteError(f"{layer.path} cannot be exported: {reason}", fix="Trace the model in float32.")
        raise _refusal(layer, reason, "codebook")


def _refusal(layer: Layer, reason: str, *others: str) -> RewriteError:
    forms = " or ".join(f"--nf4 {other}" for other in others)
    return RewriteError(f"{layer.path} cannot be written in this form: {reason}", fix=f"Export with {forms}.")


def _scales(layer: Layer, block: int) -> ir.Value:
    """One fp32 scale per block of `block` weights, which divides the program's block size."""
    repeats = layer.block_size // block
    count = -(-layer.weights // block)
    if layer.keep_double_quant:
        value = _nested_scales(layer)
        return value if repeats == 1 else _repeat(layer, value, repeats, count)
    plain = layer.stored["absmax"]
    assert plain is not None
    if repeats == 1 and "nested_absmax" not in layer.stored and plain.shape is not None and len(plain.shape) == 1:
        return plain
    return layer.weight(f"scales_{block}", layer.absmax.repeat_interleave(repeats)[:count])


def _nested_scales(layer: Layer) -> ir.Value:
    """The scales of the double quantisation, computed from its codes: code[absmax] · nested scale + offset."""
    codes, nested, offset = (layer.stored[name] for name in ("absmax", "nested_absmax", "nested_offset"))
    assert codes is not None
    assert nested is not None
    assert offset is not None
    table = layer.table(TABLES["nested"], NESTED_CODE)
    flat = layer.op("Reshape", [layer.op("Cast", [codes], {"to": int(ir.DataType.INT32)}), layer.constant([-1])])
    steps = _repeat(layer, nested, NESTED_BLOCK, layer.absmax.numel())
    product = layer.op("Mul", [layer.op("Gather", [table, flat]), steps])
    return layer.op("Add", [product, layer.op("Reshape", [offset, layer.constant([1])])])


def _repeat(layer: Layer, value: ir.Value, times: int, count: int) -> ir.Value:
    """Each number `times` times in a row, the first `count` of them."""
    column = layer.op("Reshape", [value, layer.constant([-1, 1])])
    table = layer.op("Expand", [column, layer.constant([1, times])])
    flat = layer.op("Reshape", [table, layer.constant([-1])])
    return layer.op("Slice", [flat, layer.constant([0]), layer.constant([count])])


# -- standard operators -----------------------------------------------------------------------------------------------


def codebook(layer: Layer) -> tuple[ir.Value, float]:
    """Dequantise with standard operators, then MatMul.

    One Gather reads both levels of a byte from a table of 256 pairs: half the indices that a uint4 tensor needs, which
    measured twice as fast, the program's bytes as they are, and no opset newer than the exporter's own.
    """
    every_byte = torch.arange(256, dtype=torch.uint8)
    pairs = _levels(every_byte, 512, layer.kind).reshape(256, 2)
    index = layer.op("Cast", [layer.bytes()], {"to": int(ir.DataType.INT32)})
    levels = layer.op("Gather", [layer.table(TABLES[layer.kind], pairs), index])
    blocks = layer.absmax.numel()
    missing = blocks * layer.block_size - 2 * layer.packed.numel()
    if missing:  # the last block is not full
        flat = layer.op("Reshape", [levels, layer.constant([-1])])
        levels = layer.op("Pad", [flat, layer.constant([0, missing])])
    rows = layer.op("Reshape", [levels, layer.constant([blocks, layer.block_size])])
    column = layer.op("Reshape", [_scales(layer, layer.block_size), layer.constant([-1, 1])])
    weight = layer.op("Mul", [rows, column])
    if blocks * layer.block_size != layer.weights:
        flat = layer.op("Reshape", [weight, layer.constant([-1])])
        weight = layer.op("Slice", [flat, layer.constant([0]), layer.constant([layer.weights])])
    weight = layer.op("Reshape", [weight, layer.constant([layer.out_features, layer.in_features])])
    if layer.dtype != ir.DataType.FLOAT:
        weight = layer.op("Cast", [weight], {"to": int(layer.dtype)})
    return layer.op("MatMul", [layer.x, layer.op("Transpose", [weight], {"perm": [1, 0]})]), 0.0


def _levels(packed: Tensor, count: int, kind: str) -> Tensor:
    """The level, between -1 and 1, of each of `count` weights."""
    ones = torch.ones(-(-count // 4096), dtype=torch.float32)
    return dequantize_flat(packed.reshape(-1), ones, numel=count, block_size=4096, kind=kind, dtype=torch.float32)


# -- com.microsoft.MatMulNBits ----------------------------------------------------------------------------------------


def int8(layer: Layer) -> tuple[ir.Value, float]:
    """MatMulNBits with the levels rounded to 8 bits: level ≈ round(127 · level) / 127; and how far that is off.

    Its blocks lie within one row, so the block size is the largest that divides a row and the program's blocks.
    """
    # float16 runs too, but with activations in 8 bits ONNX Runtime 1.32 returns wrong numbers
    _check_activations(layer, "MatMulNBits", ir.DataType.FLOAT)
    block = math.gcd(layer.in_features, layer.block_size, LARGEST_BLOCK)
    if block < SMALLEST_BLOCK:
        reason = f"its {layer.in_features} inputs are no multiple of the block size {layer.block_size}"
        raise _refusal(layer, f"{reason}, nor of {SMALLEST_BLOCK}", "bnb4", "codebook")
    levels = _levels(layer.packed, layer.weights, layer.kind)
    codes = (levels * 127).round().to(torch.int16) + 128
    shape = layer.out_features, layer.in_features // block
    scale = (layer.absmax / 127).repeat_interleave(layer.block_size // block)[: shape[0] * shape[1]]
    inputs = [
        layer.weight("levels_int8", codes.to(torch.uint8).reshape(*shape, block)),
        layer.weight("scales_int8", scale.reshape(shape)),
    ]
    attributes = {
        "K": layer.in_features,
        "N": layer.out_features,
        "block_size": block,
        "bits": 8,
        "accuracy_level": EXACT_ACTIVATIONS,
    }
    output = layer.op("MatMulNBits", [layer.x, *inputs], attributes, MICROSOFT)
    return output, _error(layer, levels)


def _error(layer: Layer, levels: Tensor) -> float:
    """How far the 8-bit weight is from the 4-bit one, relative to it: root mean square."""
    scale = layer.absmax.repeat_interleave(layer.block_size)[: layer.weights]
    weight = (levels * scale).double()
    rounded = eight_bit_weight(layer.packed, layer.absmax, layer.weights, layer.block_size, layer.kind).double()
    norm = weight.norm()
    return float((rounded - weight).norm() / norm) if norm else 0.0


def eight_bit_weight(packed: Tensor, absmax: Tensor, count: int, block_size: int, kind: str) -> Tensor:
    """The flat weight that 8-bit levels stand for."""
    levels = (_levels(packed, count, kind) * 127).round()
    return levels * (absmax.reshape(-1) / 127).repeat_interleave(block_size)[:count]
