"""What a forward pass keeps for the backward one, in bytes, without a number being computed.

The graph runs on the meta device in the sizes asked for, with gradients, and autograd itself says what it saves: no
table of operations can disagree with it. Only attention and dropout are told here, because what they save depends on
the kernel: attention as one that does not store its scores, dropout as one that stores a byte for every element.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from rewriter.blocks import block_of
from rewriter.constants import WRAPPERS
from rewriter.errors import RewriteError
from rewriter.module import ATTENTION, ATTENTION_DROPOUT, TRAIN_FLAG
from rewriter.program import Program

aten = torch.ops.aten
META = torch.device("meta")
DROPOUT = aten.dropout.default
LSE = torch.float32  # attention keeps one logarithm of a sum for every row, whatever the type of the data


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that live between forward and backward, every storage once, weights and buffers not among them.

    `saved` is what autograd holds, `by_operation` the same by the operation that saved it first. With gradient
    checkpointing the inputs of every block (`block_inputs`) and what lies outside of blocks (`outside`) stay, and one
    block at a time (`largest_block`) is computed again; without blocks nothing is saved. `outputs` are results of the
    program that nothing else holds; they stay either way.
    """

    saved: int
    by_operation: Mapping[str, int]
    blocks: int
    block_inputs: int
    outside: int
    largest_block: int
    outputs: int

    @property
    def checkpointed(self) -> int:
        return self.block_inputs + self.outside + self.largest_block

    def to_json(self) -> dict[str, Any]:
        """The bytes as plain data."""
        return {
            "saved": self.saved,
            "checkpointed": self.checkpointed,
            "outputs": self.outputs,
            "blocks": self.blocks,
            "block_inputs": self.block_inputs,
            "outside_blocks": self.outside,
            "largest_block": self.largest_block,
            "by_operation": dict(self.by_operation),
        }


def activations(
    program: Program, sizes: Mapping[str, int], *, trainable: Iterable[str] | None = None, train: bool = True
) -> Activations:
    """Count what training in these sizes saves; `sizes` are numbers for the program's symbols, such as `{"s0": 8}`.

    `trainable` are the names that get gradients, those of the program by default. `train` lets dropout act.

    Raises `RewriteError` for an operation whose result has no shape before its numbers are known.
    """
    run = _Run(program, set(program.trainable if trainable is None else trainable), train)
    results = run(sizes)
    return run.count(results)


class _Saved:
    """A tensor that autograd holds; gone when autograd lets go of it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass(slots=True)
class _Record:
    """One act of saving: what is left of it when the forward pass is over, and where it took place."""

    saved: weakref.ref[_Saved]
    storage: int
    node: Node


@dataclass(slots=True)
class _Run:
    """One run of a program on the meta device."""

    program: Program
    trainable: set[str]
    train: bool
    storages: dict[int, Any] = field(default_factory=dict)  # held, so that no number is given twice
    weights: set[int] = field(default_factory=set)
    records: list[_Record] = field(default_factory=list)
    reads: dict[str, set[int]] = field(default_factory=dict)  # block -> storages that come from outside of it
    node: Node | None = None
    block: dict[Node, str] = field(default_factory=dict)

    def __call__(self, sizes: Mapping[str, int]) -> list[Tensor]:
        """Run; the tensors that come back keep alive what autograd holds for them and nothing else."""
        self.block = block_of(self.program)
        values = self._tensors()
        for node in self.program.inputs():
            values[node] = _input(node.meta.get("val"), sizes)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack), torch.enable_grad():
            results = self._graph(self.program.graph, self.program.exported.graph_module, values, None)
        return [leaf for leaf in torch.utils._pytree.tree_leaves(results) if isinstance(leaf, Tensor)]

    def count(self, results: list[Tensor]) -> Activations:
        """Sum up what is still held."""
        alive = [record for record in self.records if record.saved() is not None]
        first: dict[int, Node] = {}
        inside: dict[str, set[int]] = {block: set() for block in self.block.values()}
        outside: set[int] = set()
        live: set[str] = set()
        for record in alive:
            block = self.block.get(record.node)
            if block is not None:
                live.add(block)  # also a block that saves nothing but weights is computed again
            if record.storage in self.weights:
                continue
            first.setdefault(record.storage, record.node)
            (outside if block is None else inside[block]).add(record.storage)
        entering = {s for block in live for s in self.reads.get(block, ())} - self.weights
        kept = entering | outside
        by_operation: dict[str, int] = {}
        for storage, node in first.items():
            by_operation[_name(node)] = by_operation.get(_name(node), 0) + self._size([storage])
        returned = {self._storage(tensor) for tensor in results} - self.weights
        return Activations(
            saved=self._size(first),
            by_operation=dict(sorted(by_operation.items(), key=lambda item: -item[1])),
            blocks=len(inside),
            block_inputs=self._size(entering),
            outside=self._size(outside - entering),
            largest_block=max((self._size(held - kept) for held in inside.values()), default=0),
            outputs=self._size(returned - {*first}),
        )

    def _size(self, storages: Iterable[int]) -> int:
        return sum(self.storages[storage].nbytes() for storage in storages)

    def _storage(self, tensor: Tensor) -> int:
        held = tensor.untyped_storage()
        return int(self.storages.setdefault(held._cdata, held)._cdata)

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        assert self.node is not None
        self.records.append(_Record(weakref.ref(saved), self._storage(tensor), self.node))
        return saved

    # -- running ------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[Node, Any]:
        """Parameters, buffers and constants without numbers; tied ones are one tensor."""
        tensors, parameters = self.program.tensors, self.program.parameters()
        tied: dict[Any, list[str]] = {}
        for name, tensor in tensors.items():
            tied.setdefault(identity(tensor), []).append(name)
        made: dict[str, Tensor] = {}
        for names in tied.values():
            tensor = tensors[names[0]]
            bare = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
            bare.requires_grad_(any(name in self.trainable and name in parameters for name in names))
            self.weights.add(self._storage(bare))
            made.update(dict.fromkeys(names, bare))
        names_of = {node: self.program.parameter_name(node) for node in self.program.graph.nodes}
        return {node: made[name] for node, name in names_of.items() if name is not None}

    def _graph(self, graph: Graph, owner: GraphModule, values: dict[Node, Any], outer: Node | None) -> Any:
        """Run a graph, letting go of every value after its last use; the body of a wrapper counts as its caller."""
        last = {source: node for node in graph.nodes for source in node.all_input_nodes}
        for node in graph.nodes:
            if node.op == "output":
                return torch.fx.node.map_arg(node.args[0], values.__getitem__)
            if node.op == "get_attr":
                values[node] = getattr(owner, str(node.target))
            elif node.op == "call_function":
                self.node = node if outer is None else outer
                self._enter(node, values)
                values[node] = self._call(node, values)
            for source in node.all_input_nodes:
                if last[source] is node:
                    values.pop(source, None)
        raise AssertionError("a graph without output")

    def _enter(self, node: Node, values: Mapping[Node, Any]) -> None:
        """Note which tensors a block reads from outside of it."""
        block = self.block.get(node)
        if block is None:
            return
        for source in node.all_input_nodes:
            if self.block.get(source) != block and isinstance(value := values.get(source), Tensor):
                self.reads.setdefault(block, set()).add(self._storage(value))

    def _call(self, node: Node, values: Mapping[Node, Any]) -> Any:
        def prepare(value: Any) -> Any:
            if isinstance(value, Node):
                return values[value]
            return META if isinstance(value, torch.device) else value

        args = torch.fx.node.map_aggregate(node.args, prepare)
        kwargs = torch.fx.node.map_aggregate(node.kwargs, prepare)
        if str(node.target).startswith("aten._assert"):
            return None
        try:
            if node.target in WRAPPERS:
                return self._wrapped(node, args)
            return self._operation(node.target, args, kwargs)
        except RewriteError:
            raise
        except Exception as error:
            from rewriter.text import line

            raise RewriteError(
                "an operation cannot be planned for these sizes",
                evidence=[line(self.program, node), *(str(error).strip().splitlines() or [type(error).__name__])[:2]],
                fix="Give the sizes that the model was traced with, or trace it again.",
            ) from error

    def _wrapped(self, node: Node, args: Any) -> Any:
        place = next(i for i, arg in enumerate(args) if isinstance(arg, GraphModule))
        body, given = args[place], args[place + 1 :]
        inner = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), given, strict=True))
        grad = bool(args[0]) if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled else True
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            return self._graph(body.graph, body, inner, self.node)

    def _operation(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is DROPOUT:
            acts = self.train and args[1] > 0
            return _Dropout.apply(args[0]) if acts else args[0]  # type: ignore[no-untyped-call]
        if target in TRAIN_FLAG:
            place = TRAIN_FLAG[target]
            args = (*args[:place], self.train, *args[place + 1 :])
        elif target is ATTENTION:
            query, mask = args[0], _mask(args, kwargs)
            if query.ndim == 4 and not (mask is not None and mask.requires_grad):
                return _Attention.apply(*args[:3], mask)  # type: ignore[no-untyped-call]
            args = (*args[:ATTENTION_DROPOUT], 0.0, *args[ATTENTION_DROPOUT + 1 :])
        return target(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """Attention that keeps its operands, its result and one number a row; a mask as what is added to the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, width = query.shape
        if value.shape[-1] == width:
            result = torch.empty_like(query)  # laid out as the query is, which decides whether the next view copies
        else:
            result = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, length, dtype=LSE)
        added = mask if mask is None or mask.is_floating_point() else query.new_empty(mask.shape)
        ctx.save_for_backward(query, key, value, added, result, sums)
        return result


class _Dropout(torch.autograd.Function):
    """Dropout that keeps one byte for every element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)


def identity(tensor: Tensor) -> Any:
    """Equal for two tensors that are the same view of the same storage, on the meta device too."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def number(size: Any, sizes: Mapping[str, int]) -> int:
    """A size of the graph as a number."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression.subs({symbol: sizes[str(symbol)] for symbol in expression.free_symbols}))


def _input(value: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(value, Tensor):
        return torch.empty([number(size, sizes) for size in value.shape], dtype=value.dtype, device=META)
    return number(value, sizes) if isinstance(value, torch.SymInt) else value


def _mask(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    mask: Tensor | None = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    return mask


def _name(node: Node) -> str:
    """`aten.linear.default` -> `linear`."""
    parts = str(node.target).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor
