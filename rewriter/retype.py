"""Types again after a change of sizes: the shape of every value follows from its inputs, symbols included."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node

from rewriter.constants import WRAPPERS
from rewriter.errors import RewriteError

if TYPE_CHECKING:
    from rewriter.program import Program

aten = torch.ops.aten
SIZES: dict[Any, Callable[..., Any]] = {
    aten.sym_size.int: lambda tensor, dimension: tensor.shape[dimension],
    aten.sym_stride.int: lambda tensor, dimension: tensor.stride(dimension),
    aten.sym_numel.default: lambda tensor: tensor.numel(),
}


def retype(program: Program, changed: Iterable[Node]) -> None:
    """Derive the type of every value again that comes from one of the `changed` values. Only for an unseen clone.

    Sizes that varied still vary. Raises `RewriteError` at the first operation that cannot take the new sizes, and when
    a size that varied would have to be one number from now on.
    """
    before = _fixed(program)
    _retype(program, program.graph, set(changed))
    lost = _fixed(program) - before
    if lost:
        raise RewriteError(
            "the change would fix a size that varies",
            evidence=sorted(lost),
            fix="Trace the model with example inputs whose sizes all differ.",
        )


def fake_mode(program: Program) -> FakeTensorMode:
    """The mode in which the types of the program's values live."""
    for node in program.graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            mode: FakeTensorMode = node.meta["val"].fake_mode
            return mode
    raise RewriteError("the program has no tensor at all")


def evaluate(mode: FakeTensorMode, operation: Any, *args: Any, **kwargs: Any) -> Any:
    """The type of a result from the types of the operands; a size that varies stays an expression."""
    if operation in SIZES:  # called as an operation these give the number of the example
        return SIZES[operation](*args)
    # Without the dispatcher, operations written in C++ such as padding would turn sizes that vary into numbers.
    with torch.no_grad(), mode, enable_python_dispatcher():
        return operation(*args, **kwargs)


def _retype(program: Program, graph: Graph, changed: set[Node]) -> None:
    for node in graph.nodes:
        if node.op != "call_function" or not _is_stale(node, changed):
            continue
        value = _value(program, graph, node)
        if not _same(node.meta.get("val"), value):
            node.meta["val"] = value
            changed.add(node)


def _is_stale(node: Node, changed: set[Node]) -> bool:
    return "val" not in node.meta or any(source in changed for source in node.all_input_nodes)


def _value(program: Program, graph: Graph, node: Node) -> Any:
    try:
        if node.target in WRAPPERS:
            return _wrapped(program, graph, node)
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        return evaluate(fake_mode(program), node.target, *args, **kwargs)
    except RewriteError:
        raise
    except Exception as error:
        from rewriter.text import line

        raise RewriteError(
            "an operation cannot take the new sizes",
            evidence=[line(program, node), *(str(error).strip().splitlines() or [type(error).__name__])[:2]],
            fix="Trace the model so that the length of its inputs may vary.",
        ) from error


def _wrapped(program: Program, graph: Graph, node: Node) -> Any:
    """The results of an operation that runs a graph of its own, whose types follow from what is passed in."""
    held = next(source for source in node.all_input_nodes if source.op == "get_attr")
    body = getattr(graph.owning_module, str(held.target))
    assert isinstance(body, torch.fx.GraphModule)
    given = node.args[node.args.index(held) + 1 :]
    changed: set[Node] = set()
    for inner, outer in zip((n for n in body.graph.nodes if n.op == "placeholder"), given, strict=True):
        value = outer.meta["val"] if isinstance(outer, Node) else outer
        if not _same(inner.meta.get("val"), value):
            inner.meta["val"] = value
            changed.add(inner)
    _retype(program, body.graph, changed)
    result = next(iter(reversed(body.graph.nodes))).args[0]
    return torch.fx.node.map_arg(result, lambda source: source.meta["val"])


def _same(one: Any, other: Any) -> bool:
    """Whether two values have the same type: shapes are compared as expressions, without asking for their numbers."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.device == other.device and _sizes(one) == _sizes(other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return _expression(one) == _expression(other)


def _sizes(tensor: torch.Tensor) -> list[object]:
    return [_expression(size) for size in (*tensor.shape, *tensor.stride())]


def _expression(value: Any) -> object:
    return value.node.expr if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def _fixed(program: Program) -> set[str]:
    """The sizes of the inputs that are expressions no more but numbers, as the shape environment knows them by now."""
    found = set()
    for node in program.inputs():
        value = node.meta.get("val")
        shape: Iterable[Any] = value.shape if isinstance(value, torch.Tensor) else ()
        for position, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and size.node.shape_env.replace(size.node.expr).is_number:
                found.add(f"{node.name}, dimension {position}")
    return found
