"""Fresh random inputs for any program, in its example's shapes or in other sizes of its dynamic dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from rewriter.errors import UsageError, closest
from rewriter.formats.index_range import Reach, reach
from rewriter.program import Program

_SHIFTS = (2, -1, 1, 3, -2, 4, -3, 6, -4, 8, -6, 12, -8, 16, -12, -16)
_FACTORS = (2, 3)
_LARGEST = 2**40
_SMALLEST = 2  # torch.export takes sizes 0 and 1 for constants


def random_inputs(
    program: Program, *, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random `(args, kwargs)` for `program(*args, **kwargs)`; symbols missing in `sizes` keep the example's size.

    One symbol has one size everywhere. Integers that index a table stay within its rows, other integers within the
    example's range; a 0/1 mask gets random padding on the left or right and keeps one visible token per row; floats
    are normal, and what is no tensor is as in the example.

    Raises `UsageError` for a symbol that the program does not have.
    """
    known = example_sizes(program)
    for symbol in sizes or {}:
        if symbol not in known:
            raise UsageError(f"the program has no dynamic size {symbol!r}", evidence=closest(symbol, list(known)))
    chosen = {**known, **(sizes or {})}
    generator = torch.Generator().manual_seed(seed)
    found = reach(program)
    leaves = [
        _leaf(node, example, found.get(node.name), chosen, generator)
        for node, example in zip(program.inputs(), _examples(program), strict=True)
    ]
    args, kwargs = pytree.tree_unflatten(leaves, program.exported.call_spec.in_spec)
    return args, kwargs


def example_sizes(program: Program) -> dict[str, int]:
    """The symbols of the dynamic dimensions, in order of the inputs, with their sizes in the example inputs."""
    sizes: dict[str, int] = {}
    for node, example in zip(program.inputs(), _examples(program), strict=True):
        value = node.meta.get("val")
        shape = value.shape if isinstance(value, Tensor) else [value]
        actual = example.shape if isinstance(example, Tensor) else [example]
        for dimension, size in zip(shape, actual, strict=True):
            if isinstance(dimension, torch.SymInt) and dimension.node.expr.is_symbol:
                sizes.setdefault(str(dimension.node.expr), int(size))
    for symbol in (s for node in program.inputs() for s in _symbols(node)):  # those that only appear in expressions
        sizes.setdefault(symbol, max(_range(program, symbol)[0], _SMALLEST))
    return sizes


def different_sizes(program: Program, trial: int) -> dict[str, int]:
    """Sizes that differ from the example's and, where the program allows it, between trials.

    They keep to the program's ranges and guards and to the rows of its position tables. Symbols of equal size in the
    example move together: often they must be equal although the trace did not need to know. Without another
    possibility the example's sizes come back.
    """
    found = list(_possible(program, trial + 1))
    return found[trial % len(found)] if found else example_sizes(program)


def _possible(program: Program, count: int) -> Iterator[dict[str, int]]:
    example = example_sizes(program)
    if not example:
        return
    bounds = _bounds(program, example)
    allowed = _Guards(program)
    seen: list[dict[str, int]] = [example]
    proposals = [[size + shift for size in _groups(example)] for shift in _SHIFTS]
    proposals += [[size * factor for size in _groups(example)] for factor in _FACTORS]
    everything = list(_groups(example))
    for proposal in [*proposals, *_one_at_a_time(everything)]:
        moved = dict(zip(everything, proposal, strict=True))
        within = {old: new if bounds[old][0] <= new <= bounds[old][1] else _near(old, bounds[old], new)
                  for old, new in moved.items()}  # fmt: skip
        sizes = {symbol: within[size] for symbol, size in example.items()}
        if sizes not in seen and allowed(sizes):
            seen.append(sizes)
            yield sizes
            if len(seen) > count:
                return


def _groups(example: Mapping[str, int]) -> Iterable[int]:
    return dict.fromkeys(example.values())


def _one_at_a_time(everything: list[int]) -> Iterator[list[int]]:
    for shift in _SHIFTS:
        for moving in everything:
            yield [size + shift if size == moving else size for size in everything]


def _near(old: int, bound: tuple[int, int], wanted: int) -> int:
    """Another allowed size when the wanted one is out of bounds: first on the other side, as far away."""
    for new in (2 * old - wanted, old - 1, old + 1):
        if bound[0] <= new <= bound[1]:
            return new
    return old


def _bounds(program: Program, example: Mapping[str, int]) -> dict[int, tuple[int, int]]:
    """Example size -> smallest and largest size that every symbol of this size may take."""
    found: dict[int, tuple[int, int]] = {}
    tables = reach(program).positions
    for symbol, size in example.items():
        low, high = _range(program, symbol)
        high = min(high, max(size, tables.get(symbol, high)))
        before = found.get(size, (low, high))
        found[size] = (max(low, before[0], min(size, _SMALLEST)), min(high, before[1]))
    return found


def _range(program: Program, symbol: str) -> tuple[int, int]:
    for known, values in program.exported.range_constraints.items():
        if str(known) == symbol:
            low = int(values.lower) if values.lower >= 0 else 0
            return low, int(values.upper) if values.upper < _LARGEST else _LARGEST
    return _SMALLEST, _LARGEST


class _Guards:
    """The conditions on input sizes that the trace recorded, as a function of the symbols' sizes."""

    def __init__(self, program: Program) -> None:
        self.inputs = list(zip(program.inputs(), _examples(program), strict=True))
        self.check: Any = None
        if getattr(program.exported, "_guards_code", None):
            self.check = getattr(program.exported.module(check_guards=True), "_guards_fn", None)

    def __call__(self, sizes: Mapping[str, int]) -> bool:
        if self.check is None:
            return True
        try:
            self.check(*[self._leaf(node, example, sizes) for node, example in self.inputs])
        except (AssertionError, RuntimeError, ZeroDivisionError):
            return False
        return True

    @staticmethod
    def _leaf(node: Node, example: Any, sizes: Mapping[str, int]) -> Any:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return _evaluate(value, sizes)
        if isinstance(value, Tensor):
            return torch.empty(_shape(node, sizes), dtype=value.dtype, device="meta")
        return example


def _examples(program: Program) -> list[Any]:
    """The flat example inputs; where a program has none, what its placeholders know."""
    given = program.exported.example_inputs
    if given is not None:
        leaves: list[Any] = pytree.tree_leaves(given)
        if len(leaves) == len(program.inputs()):
            return leaves
    return [_example(node.meta.get("val")) for node in program.inputs()]


def _example(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.ones([_hint(size) for size in value.shape], dtype=value.dtype)
    return _hint(value) if isinstance(value, torch.SymInt) else value


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) and size.node.has_hint() else int(size)


def _symbols(node: Node) -> Iterator[str]:
    value = node.meta.get("val")
    for size in value.shape if isinstance(value, Tensor) else [value]:
        if isinstance(size, torch.SymInt):
            yield from sorted(str(symbol) for symbol in size.node.expr.free_symbols)


def _shape(node: Node, sizes: Mapping[str, int]) -> list[int]:
    return [_evaluate(size, sizes) for size in node.meta["val"].shape]


def _evaluate(size: Any, sizes: Mapping[str, int]) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression.subs({symbol: sizes[str(symbol)] for symbol in expression.free_symbols}))


def _leaf(node: Node, example: Any, limit: Reach | None, sizes: Mapping[str, int], generator: torch.Generator) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return _evaluate(value, sizes)
    if not isinstance(value, Tensor):
        return example
    made = _values(node, example, limit, sizes, generator)
    return made.to(device=value.device if value.device.type != "meta" else "cpu", dtype=value.dtype)


def _values(
    node: Node, example: Any, limit: Reach | None, sizes: Mapping[str, int], generator: torch.Generator
) -> Tensor:
    shape = _shape(node, sizes)
    dtype = node.meta["val"].dtype
    if limit is not None and not dtype.is_floating_point:
        rows = max(1, min(_evaluate(size, sizes) - offset for size, offset in limit))
        return torch.randint(0, rows, shape, generator=generator)
    if _is_mask(node, example):
        return _padding(shape, generator)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=dtype if dtype.is_complex else torch.float32)
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    low, high = (int(example.min()), int(example.max())) if example.numel() else (0, 0)
    if len(shape) == 1 and torch.equal(example.cpu().long(), low + torch.arange(len(example))):
        return low + torch.arange(shape[0])  # positions, which are read as positions
    return torch.randint(low, high + 1, shape, generator=generator)


def _is_mask(node: Node, example: Tensor) -> bool:
    """0 and 1 with something visible in every row; for floats and flat values only where the name says so."""
    if example.ndim == 0 or example.numel() == 0 or example.is_complex():
        return False
    named = "mask" in node.name
    if not named and (example.ndim < 2 or example.is_floating_point()):
        return False
    values = example.detach().float()
    return bool(((values == 0) | (values == 1)).all()) and bool((values.amax(dim=-1) == 1).all())


def _padding(shape: list[int], generator: torch.Generator) -> Tensor:
    length = shape[-1]
    padded = torch.randint(0, max(1, (length + 1) // 2), (*shape[:-1], 1), generator=generator)
    left = torch.rand((*shape[:-1], 1), generator=generator) < 0.5
    place = torch.arange(length)
    return torch.where(left, place >= padded, place < length - padded)
