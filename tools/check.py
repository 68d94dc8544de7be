"""Run every check that continuous integration runs: formatting, lint, types, tests."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


def commands(*, fast: bool, fix: bool) -> dict[str, list[str]]:
    """The command line of every check, by name, in the order they run."""
    checks = {
        "ruff format": ["ruff", "format", "."] if fix else ["ruff", "format", "--check", "."],
        "ruff check": ["ruff", "check", "--fix", "."] if fix else ["ruff", "check", "."],
        "mypy --strict": ["mypy", "--strict"],
        "pytest": ["pytest", "-n", "2", "--dist", "worksteal"],
    }
    if fast:
        del checks["pytest"]
    return {name: [sys.executable, "-m", *command] for name, command in checks.items()}


def run(name: str, command: list[str]) -> tuple[str, int, float]:
    """Run one check with its output shown; returns its name, exit code and seconds."""
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    # One thread per pytest worker: more threads than cores is slower than fewer.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    return name, code, time.perf_counter() - start


def main() -> int:
    """Run all checks, also after one failed; 0 only when every one passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="leave pytest out")
    parser.add_argument("--fix", action="store_true", help="let ruff rewrite files instead of only reporting")
    options = parser.parse_args()

    results = [run(name, command) for name, command in commands(fast=options.fast, fix=options.fix).items()]

    table = Table("check", "result", "seconds")
    for name, code, seconds in results:
        table.add_row(name, "passed" if code == 0 else f"failed ({code})", f"{seconds:.1f}")
    Console().print(table)
    return int(any(code != 0 for _, code, _ in results))


if __name__ == "__main__":
    sys.exit(main())
