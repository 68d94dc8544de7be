"""Linear layers with 4-bit weights: this operator, bitsandbytes' own, and plain weights, timed in turns in one run.

Run `python tools/bench/nf4_linear.py [--json FILE]`: on the GPU where torch has one, otherwise on the CPU. A round
times every contender once; the table shows medians over the rounds, and how far each is from a product in fp64 with the
weight that the 4 bits of `nf4_linear` stand for. bitsandbytes is left out where it is not installed; on a CPU with
AVX512 it computes in bf16, whatever the type.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import runtime.nf4_linear  # noqa: F401 - registers the operators
from runtime.nf4 import dequantize, quantize

SCHEMA = 1
SHAPES = ((1, 2048, 2048), (64, 2048, 2048), (1, 4096, 4096), (16, 4096, 11008))  # rows, inputs, outputs
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCK_SIZE = 64
Contender = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one shape; the error is relative to the largest output, None where the weight is another."""

    rows: int
    inputs: int
    outputs: int
    dtype: str
    contender: str
    milliseconds: float
    error: float | None


def contenders(weight: Tensor, dtype: torch.dtype) -> tuple[dict[str, Contender], Tensor]:
    """What multiplies by a weight [outputs, inputs], by name; and the weight that the 4 bits stand for, fp64."""
    single = quantize(weight, block_size=BLOCK_SIZE)
    double = quantize(weight, block_size=BLOCK_SIZE, double_quantise=True)
    assert double.nested is not None
    scales = double.absmax, double.nested.absmax, double.nested.offset
    sizes = weight.shape[0], BLOCK_SIZE, "nf4"
    plain = weight.to(dtype)
    operators = torch.ops.rewriter
    made: dict[str, Contender] = {
        "plain weights": lambda x: F.linear(x, plain),
        "nf4_linear": lambda x: operators.nf4_linear(x, single.packed, single.absmax, None, *sizes),
        "nf4_linear_double": lambda x: operators.nf4_linear_double(x, double.packed, *scales, None, *sizes),
    }
    if peer := bitsandbytes(weight.to(dtype)):
        made["bitsandbytes"] = peer
    return made, dequantize(single, torch.float32).double()


def bitsandbytes(weight: Tensor) -> Contender | None:
    """What `Linear4bit` of bitsandbytes computes, where it is installed."""
    try:
        library: Any = importlib.import_module("bitsandbytes")
    except ImportError:
        return None
    layer = library.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        compress_statistics=False,
    )
    layer.weight = library.nn.Params4bit(
        weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=False, blocksize=BLOCK_SIZE
    )
    made: Contender = layer.to(weight.device).eval()
    return made


def measure(shape: tuple[int, int, int], name: str, device: str, rounds: int) -> list[Row]:
    """Every contender at one shape and type, in turns."""
    count, inputs, outputs = shape
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(outputs, inputs, generator=generator).div_(inputs**0.5).to(device)
    x = torch.randn(count, inputs, generator=generator).to(device, TYPES[name])
    made, stands_for = contenders(weight, TYPES[name])
    expected = x.double() @ stands_for.T
    errors: dict[str, float | None] = {}
    for contender, multiply in made.items():  # also warms up
        worst = float((multiply(x).double() - expected).abs().max() / expected.abs().max())
        errors[contender] = None if contender == "plain weights" else worst
    times: dict[str, list[float]] = {contender: [] for contender in made}
    for _ in range(rounds):
        for contender, multiply in made.items():
            times[contender].append(_seconds(multiply, x))
    return [
        Row(count, inputs, outputs, name, contender, 1000 * statistics.median(taken), errors[contender])
        for contender, taken in times.items()
    ]


def _seconds(multiply: Contender, x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    multiply(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        rows = [row for shape in SHAPES for name in TYPES for row in measure(shape, name, device, given.rounds)]
    print(f"{'rows':>5} {'inputs':>7} {'outputs':>8} {'type':>9}  {'contender':<18} {'ms':>9} {'error':>9}")
    for row in rows:
        error = "" if row.error is None else f"{row.error:9.1e}"
        sizes = f"{row.rows:>5} {row.inputs:>7} {row.outputs:>8}"
        print(f"{sizes} {row.dtype:>9}  {row.contender:<18} {row.milliseconds:9.2f} {error:>9}")
    if given.json:
        machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
        about = {"device": device, "machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
        record = {"schema": SCHEMA, **about, "rounds": given.rounds, "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
