"""How fast weights are brought to 4 bits and back on the CPU, beside bitsandbytes in the same run.

`python tools/bench/quantise.py [--json FILE]`: a round times every case once, ours and bitsandbytes in turns, and the
table shows medians over the rounds and the median of the rounds' ratios, so that other work on the machine slows both.
Without bitsandbytes its columns stay empty.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from runtime import nf4

SCHEMA = 1
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Call = Callable[[], object]
Case = tuple[str, str, str]  # operation, type, kind


@dataclass(frozen=True, slots=True)
class Row:
    """Weights per second in millions; `ratio` is ours over bitsandbytes'."""

    operation: str
    dtype: str
    kind: str
    ours: float
    bitsandbytes: float | None
    ratio: float | None


def bitsandbytes_functions() -> Any:
    try:
        import bitsandbytes.functional as functions
    except ImportError:
        return None
    return functions


def cases(rows: int, columns: int, block_size: int) -> dict[Case, tuple[Call, Call | None]]:
    """By operation, type and kind: what is timed of ours, and of bitsandbytes."""
    library = bitsandbytes_functions()
    base = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    found: dict[Case, tuple[Call, Call | None]] = {}
    for (name, dtype), kind in itertools.product(TYPES.items(), nf4.KINDS):
        weight = base.to(dtype)
        quantise = partial(nf4.quantize, weight, block_size=block_size, kind=kind)
        it = quantise()
        theirs: tuple[Call | None, Call | None] = None, None
        if library is not None:
            quantise_theirs = partial(library.quantize_4bit, weight, blocksize=block_size, quant_type=kind)
            packed, state = quantise_theirs()
            if not torch.equal(packed.reshape(-1), it.packed):
                raise SystemExit(f"the bytes of {kind} from {name} differ from bitsandbytes'")
            theirs = quantise_theirs, partial(library.dequantize_4bit, packed, state)
        found["quantise", name, kind] = quantise, theirs[0]
        found["dequantise", name, kind] = partial(nf4.dequantize, it), theirs[1]
    return found


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured(options: argparse.Namespace) -> list[Row]:
    timed = cases(options.rows, options.columns, options.block_size)
    ours: dict[Case, list[float]] = {case: [] for case in timed}
    theirs: dict[Case, list[float]] = {case: [] for case in timed}
    for round_ in range(options.rounds + 1):
        for case, (mine, other) in timed.items():
            pair = seconds(mine), seconds(other) if other is not None else None
            if round_:  # the first warms up
                ours[case].append(pair[0])
                theirs[case] += [] if pair[1] is None else [pair[1]]
    million = options.rows * options.columns / 1e6
    rows = []
    for case in timed:
        ratios = [other / mine for mine, other in zip(ours[case], theirs[case], strict=False)]
        rate = million / statistics.median(theirs[case]) if ratios else None
        ratio = statistics.median(ratios) if ratios else None
        rows.append(Row(*case, million / statistics.median(ours[case]), rate, ratio))
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        "| operation | weight | kind | ours, M weights/s | bitsandbytes, M weights/s | ratio |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        other = "" if row.bitsandbytes is None else f"{row.bitsandbytes:.0f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.1f}"
        lines.append(f"| {row.operation} | {row.dtype} | {row.kind} | {row.ours:.0f} | {other} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measured(options)
    print(table(rows))
    if options.json:
        about = {
            "schema": SCHEMA,
            "shape": [options.rows, options.columns],
            "block_size": options.block_size,
            "rounds": options.rounds,
            "threads": options.threads,
            "torch": torch.__version__,
            "bitsandbytes": version("bitsandbytes") if bitsandbytes_functions() is not None else None,
            "processor": platform.processor() or platform.machine(),
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
