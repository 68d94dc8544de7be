"""The rooms of the house: imports point one way, and no file depends on one machine."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "runtime": {"runtime"},
    "rewriter": {"runtime", "rewriter"},
    "passes": {"runtime", "rewriter", "passes"},
}
MODULES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
MACHINE_PATH = re.compile(r"(?<![\w.<>-])/(?:home|Users|root|tmp|opt|mnt|work|scratch)/\w|\b[A-Z]:\\Users\\", re.ASCII)


def imported_names(source: str) -> Iterator[str]:
    """Yield the full name of every absolute import, wherever it stands, and of `import_module("literal")`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def wrong_imports(path: Path, source: str) -> list[str]:
    """The imports of the module at `path`, relative to the root, that point the wrong way."""
    if path.parts[:2] == ("rewriter", "cli"):
        return []
    ours = [name for name in imported_names(source) if name.partition(".")[0] in MAY_IMPORT]
    return [
        name
        for name in ours
        if name.partition(".")[0] not in MAY_IMPORT[path.parts[0]]
        or (f"{name}.".startswith("rewriter.cli.") and path.name != "__main__.py")
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    assert wrong_imports(path.relative_to(ROOT), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("runtime/a.py", "import rewriter.errors", ["rewriter.errors"]),
        ("rewriter/a.py", "def f():\n    from passes import Lora", ["passes.Lora"]),
        ("rewriter/a.py", "import importlib\nimportlib.import_module('passes')", ["passes"]),
        ("passes/a.py", "from rewriter import cli", ["rewriter.cli"]),
        ("passes/a.py", "import runtime\nfrom rewriter.edit import Edit\nfrom . import merge", []),
        ("rewriter/cli/apply.py", "import passes", []),
    ],
)
def test_a_wrong_import_is_seen(path: str, source: str, wrong: list[str]) -> None:
    assert wrong_imports(Path(path), source) == wrong


def test_no_module_builds_on_the_miscompiling_subgraph_rewriter() -> None:
    assert [path.name for path in MODULES if "subgraph_rewriter" in path.read_text(encoding="utf-8")] == []


def test_tracked_files_name_no_place_on_one_machine() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout: there is no list of tracked files")
    found = []
    for name in filter(None, listing.stdout.decode().split("\0")):
        file = ROOT / name
        if not file.is_file():
            continue
        lines = file.read_bytes().decode("utf-8", errors="replace").splitlines()
        found += [
            f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if MACHINE_PATH.search(line)
        ]
    assert found == []


@pytest.mark.parametrize("place", ["home/someone", "tmp/x", "Users/someone"])
def test_a_machine_path_is_seen(place: str) -> None:
    assert MACHINE_PATH.search(f'path = "/{place}"')
