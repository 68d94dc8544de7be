"""Linear layers with 4-bit weights as operators: numbers, gradients, tracing, sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import runtime.nf4_linear as operators
from runtime.nf4 import NESTED_CODE, Quantised, quantize

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
TWELFTHS = [0, 0.0625, 8, 12, 4, 6, 2, 3]
TABLES = {"nf4": NF4, "fp4": [sign * value / 12 for sign in (1, -1) for value in TWELFTHS]}
CASES = [  # outputs, inputs, block size, kind
    (20, 48, 32, "nf4"),
    (7, 33, 64, "nf4"),  # an odd number of weights, blocks across rows, the last one not full
    (20, 48, 64, "fp4"),
    (3, 5, 4096, "fp4"),
]


def packed(outputs: int, inputs: int, block_size: int, kind: str, double: bool = False) -> Quantised:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    return quantize(weight, block_size=block_size, kind=kind, double_quantise=double)


def oracle(it: Quantised) -> Tensor:
    """The weight in fp64, one code at a time."""
    codes = [code for byte in it.packed.flatten().tolist() for code in (byte >> 4, byte & 15)]
    scales = it.absmax.tolist()
    if it.nested is not None:
        steps, offset = it.nested.absmax.tolist(), float(it.nested.offset)
        scales = [float(NESTED_CODE[scale]) * steps[place // 256] + offset for place, scale in enumerate(scales)]
    count = it.shape[0] * it.shape[1]
    weights = [TABLES[it.kind][codes[place]] * scales[place // it.block_size] for place in range(count)]
    return torch.tensor(weights, dtype=torch.float64).reshape(it.shape)


def arguments(it: Quantised, x: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    nested = () if it.nested is None else (it.nested.absmax, it.nested.offset)
    return x, it.packed, it.absmax, *nested, bias, it.shape[0], it.block_size, it.kind


def call(it: Quantised, x: Tensor, bias: Tensor | None = None) -> Tensor:
    space = torch.ops.rewriter
    operator = space.nf4_linear if it.nested is None else space.nf4_linear_double
    y: Tensor = operator(*arguments(it, x, bias))
    return y


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0, 3)])
def test_numbers(case: tuple[int, int, int, str], double: bool, leading: tuple[int, ...]) -> None:
    it = packed(*case, double)
    x, bias = torch.randn(*leading, case[1]), torch.randn(case[0])
    expected = x.double() @ oracle(it).T
    torch.testing.assert_close(call(it, x).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(call(it, x, bias).double(), expected + bias.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_size", [64, 4096])
def test_weights_larger_than_a_chunk(block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_CHUNK_WEIGHTS", 600)
    it = packed(130, 96, block_size, "nf4")
    x, bias = torch.randn(3, 96), torch.randn(130)
    expected = x.double() @ oracle(it).T + bias
    torch.testing.assert_close(call(it, x, bias).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_weight_is_brought_to_the_type_of_x(dtype: torch.dtype) -> None:
    it = packed(*CASES[0])
    x, bias = torch.randn(5, 48).to(dtype), torch.randn(20)
    weight = oracle(it).float().to(dtype)
    y = call(it, x, bias)
    assert y.dtype == dtype
    expected = nn.functional.linear(x, weight, bias.to(dtype))
    torch.testing.assert_close(y, expected, atol=0.05 if dtype == torch.bfloat16 else 0.01, rtol=0.01)


@pytest.mark.parametrize("double", [False, True])
def test_gradients_reach_x_and_bias_and_nothing_else(double: bool) -> None:
    it = packed(7, 33, 64, "nf4", double)
    x, bias = torch.randn(2, 3, 33, requires_grad=True), torch.randn(7, requires_grad=True)
    given = torch.randn(2, 3, 7)
    y = call(it, x, bias)
    kept = [tensor.numel() for tensor in y.grad_fn.saved_tensors if tensor is not None]  # type: ignore[union-attr]
    assert max(kept) < 33 * 7  # not the weight
    y.backward(given)
    assert x.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(x.grad.double(), given.double() @ oracle(it), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bias.grad, given.sum((0, 1)))
    frozen = call(it, x.detach(), bias)
    (of_bias,) = torch.autograd.grad(frozen.sum(), bias)
    assert torch.equal(of_bias, torch.full((7,), 6.0))


def test_a_second_derivative() -> None:
    it = packed(7, 12, 32, "nf4")
    x = torch.randn(3, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(call(it, x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    weight = oracle(it)
    expected = 2 * torch.ones(3, 12).double() @ weight.T @ weight
    torch.testing.assert_close(second.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_framework_accepts_the_operators(double: bool, with_bias: bool) -> None:
    it = packed(7, 33, 64, "nf4", double)
    bias = torch.randn(7, requires_grad=True) if with_bias else None
    given = arguments(it, torch.randn(2, 3, 33, requires_grad=True), bias)
    name = "nf4_linear_double" if double else "nf4_linear"
    torch.library.opcheck(getattr(torch.ops.rewriter, name).default, given)
    if not double:
        weight = (it.packed, it.absmax, 7, 33, 64, "nf4", torch.float32)
        torch.library.opcheck(torch.ops.rewriter.nf4_weight.default, weight)


class Layer(nn.Module):
    def __init__(self, it: Quantised) -> None:
        super().__init__()
        self.it = it
        self.register_buffer("packed", it.packed)
        self.register_buffer("absmax", it.absmax)
        self.bias = nn.Parameter(torch.randn(it.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.it.shape[0], self.it.block_size, self.it.kind
        return torch.ops.rewriter.nf4_linear(torch.relu(x), self.packed, self.absmax, self.bias, *sizes)


def test_compiled_whole() -> None:
    layer = Layer(packed(*CASES[0]))
    x = torch.randn(3, 48, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    (ours,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(ours, torch.autograd.grad(layer(x).sum(), x)[0])


def test_exported_with_symbolic_sizes_and_read_where_only_the_runtime_is(tmp_path: Path) -> None:
    layer = Layer(packed(*CASES[0]))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.export.export(layer, (torch.randn(3, 5, 48),), dynamic_shapes=({0: batch, 1: length},))
    x = torch.randn(2, 7, 48)
    torch.testing.assert_close(program.module()(x), layer(x))
    torch.export.save(program, tmp_path / "layer.pt2")
    torch.save((x, layer(x).detach()), tmp_path / "example.pt")
    script = (
        "import sys, torch, runtime.nf4_linear\n"
        "x, y = torch.load(sys.argv[2])\n"
        "found = torch.export.load(sys.argv[1]).module()(x)\n"
        "assert torch.allclose(found, y, atol=1e-5)\n"
        "assert not any(name.split('.')[0] in ('rewriter', 'passes') for name in sys.modules)\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", script, str(tmp_path / "layer.pt2"), str(tmp_path / "example.pt")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-600:]


@pytest.mark.parametrize("double", [False, True])
def test_without_values(double: bool) -> None:
    it = packed(7, 33, 64, "nf4", double)
    given = [
        value.to("meta") if isinstance(value, Tensor) else value for value in arguments(it, torch.randn(2, 33), None)
    ]
    name = "nf4_linear_double" if double else "nf4_linear"
    y = getattr(torch.ops.rewriter, name)(*given)
    assert y.device.type == "meta"
    assert y.shape == (2, 7)


WRONG: dict[str, tuple[dict[int, Any], str]] = {
    "width": ({0: torch.randn(3, 40)}, r"a weight \[20, 40\] needs 400 uint8 in `packed`, not 480 of uint8"),
    "bytes": ({1: torch.zeros(479, dtype=torch.uint8)}, r"needs 480 uint8 in `packed`, not 479"),
    "type": ({1: torch.zeros(480, dtype=torch.int8)}, r"not 480 of int8"),
    "scales": ({2: torch.ones(31)}, r"960 weights in blocks of 32 needs 30 float32 in `absmax`, not 31"),
    "codes as scales": ({2: torch.ones(30, dtype=torch.uint8)}, r"not 30 of uint8"),
    "bias": ({3: torch.ones(21)}, r"bias of 20 outputs has shape \[20\], not \[21\]"),
    "block": ({5: 48}, "power of two, not 48"),
    "kind": ({6: "int4"}, "nf4 or fp4, not 'int4'"),
    "whole numbers": ({0: torch.ones(3, 48, dtype=torch.int64)}, "floating-point"),
    "no dimension": ({0: torch.tensor(1.0)}, "at least one dimension"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", WRONG)
def test_sizes_that_cannot_be(case: str, device: str) -> None:
    given = list(arguments(packed(*CASES[0]), torch.randn(3, 48), torch.randn(20)))
    changes, message = WRONG[case]
    for place, value in changes.items():
        given[place] = value
    moved = [value.to(device) if isinstance(value, Tensor) else value for value in given]
    with pytest.raises(ValueError, match=message):
        torch.ops.rewriter.nf4_linear(*moved)


def test_double_scales_of_a_wrong_size() -> None:
    it = packed(*CASES[0], double=True)
    given = list(arguments(it, torch.randn(3, 48), None))
    given[3] = torch.ones(2)
    with pytest.raises(ValueError, match=r"30 quantised scales in blocks of 256 needs 1 float32 in `nested_absmax`"):
        torch.ops.rewriter.nf4_linear_double(*given)
    given[2] = it.absmax.float()
    with pytest.raises(ValueError, match="double quantisation needs 30 uint8 in `absmax`"):
        torch.ops.rewriter.nf4_linear_double(*given)
