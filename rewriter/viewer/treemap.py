"""The parameters of a model as rectangles: area is how many numbers a module holds (Bruls et al. 2000, by squarify)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import squarify  # type: ignore[import-untyped]

from rewriter.program import Program
from rewriter.quantised import held_numbers

WIDTH, HEIGHT = 360.0, 300.0
LEAST = 9.0  # an area below this, in the units of the width, is drawn with its neighbours as one
MOST = 60  # rectangles side by side in one module

Kind = Literal["plain", "adapter", "bits4"]


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A module (or what is left of one) with the numbers that it holds itself."""

    x: float
    y: float
    width: float
    height: float
    path: str
    numbers: int
    kind: Kind


@dataclass(slots=True)
class _Module:
    path: str
    numbers: dict[Kind, int] = field(default_factory=dict)
    children: dict[str, _Module] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.numbers.values())


def treemap(program: Program) -> list[Rectangle]:
    """The rectangles of all modules that hold parameters themselves, inside [0, 360] x [0, 300]."""
    top = _modules(program)
    found: list[Rectangle] = []
    waiting = [(top, 0.0, 0.0, WIDTH, HEIGHT)]
    while waiting:
        module, x, y, width, height = waiting.pop()
        children = sorted(module.children.values(), key=lambda child: child.total, reverse=True)
        if not children or width * height < LEAST * 4:
            kind = max(module.numbers, key=lambda kind: module.numbers[kind])
            found.append(Rectangle(x, y, width, height, module.path, module.total, kind))
            continue
        shown, rest = children[:MOST], children[MOST:]
        if rest:
            other = _Module(module.path)
            for child in rest:
                for kind, count in child.numbers.items():
                    other.numbers[kind] = other.numbers.get(kind, 0) + count
            shown.append(other)
        areas = squarify.normalize_sizes([child.total for child in shown], width, height)
        for child, place in zip(shown, squarify.squarify(areas, x, y, width, height), strict=True):
            waiting.append((child, place["x"], place["y"], place["dx"], place["dy"]))
    return found


def _modules(program: Program) -> _Module:
    """Modules in modules, each with the numbers below it; of a tensor with several names the first counts."""
    held, tied = held_numbers(program), {name for group in program.tied() for name in group[1:]}
    added = {name for step in program.steps for name in step.added}
    top = _Module("")
    for name, tensor in {**program.parameters(), **{name: program.tensor(name) for name in held}}.items():
        if name in tied:
            continue
        kind: Kind = "bits4" if name in held else "adapter" if name in added else "plain"
        count = held[name][1] if name in held else tensor.numel()
        if not count:
            continue
        module = top
        module.numbers[kind] = module.numbers.get(kind, 0) + count
        for part in name.split("."):
            path = f"{module.path}.{part}" if module.path else part
            module = module.children.setdefault(part, _Module(path))
            module.numbers[kind] = module.numbers.get(kind, 0) + count
    return top
