"""Program -> plain `nn.Module` that trains and runs on any device and in any floating-point type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch.export.passes import move_to_device_pass
from torch.fx import Graph, GraphModule

from rewriter.errors import RewriteError
from rewriter.mutation import written
from rewriter.view import Linear4bit, layers

if TYPE_CHECKING:
    from rewriter.program import Program

aten = torch.ops.aten
# operation -> position of its `train` flag
TRAIN_FLAG = {
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.native_dropout.default: 2,
}
ATTENTION = aten.scaled_dot_product_attention.default
ATTENTION_DROPOUT = 4  # position of `dropout_p` in scaled_dot_product_attention


class Dropout(torch.nn.Module):
    """One dropout operation of the graph, switched by `train()` and `eval()`."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: torch.Tensor, probability: float) -> Any:
        return self.operation(x, probability, self.training)


class AttentionDropout(torch.nn.Module):
    """Scaled dot product attention whose dropout acts only in training."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.training:
            args = (*args[:ATTENTION_DROPOUT], 0.0, *args[ATTENTION_DROPOUT + 1 :])
        result: torch.Tensor = ATTENTION(*args, **kwargs)
        return result


def build(
    program: Program,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    share: bool = False,
) -> GraphModule:
    """The module of a program; with `share` its trainable tensors are the program's own and must not be trained."""
    clone = program.clone()
    if dtype is not None:
        change_dtype(clone, dtype)
    if device is not None:
        move_to_device_pass(clone.exported, torch.device(device))
    unlifted = clone.exported.module(check_guards=False)
    _follow_mode(unlifted.graph, unlifted)
    module = GraphModule(unlifted, unlifted.graph, class_name="RewrittenModule")
    _place_tensors(module, clone, set() if share else set(program.trainable))
    return module


def _follow_mode(graph: Graph, root: torch.nn.Module) -> None:
    """Make every dropout of the graph a child module, so that train() and eval() reach it."""
    for node in list(graph.nodes):
        replacement: torch.nn.Module
        if node.target in TRAIN_FLAG:
            replacement, args = Dropout(node.target), node.args[:2]
        elif node.target is ATTENTION and len(node.args) > ATTENTION_DROPOUT and node.args[ATTENTION_DROPOUT] != 0.0:
            replacement, args = AttentionDropout(), node.args
        else:
            continue
        name = f"{node.name}_mode"
        root.add_module(name, replacement)
        with graph.inserting_before(node):
            call = graph.call_module(name, args, {} if node.target in TRAIN_FLAG else dict(node.kwargs))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)


def _place_tensors(module: GraphModule, program: Program, trainable: set[str]) -> None:
    """Give the module its tensors: trainable ones as copies that require gradients, the others shared and frozen."""
    parameters = program.parameters()
    mutated = written(program)
    made: dict[int, torch.nn.Parameter] = {}
    for name, tensor in program.exported.state_dict.items():
        owner, leaf = _owner(module, name)
        if name in parameters:
            train = name in trainable
            made.setdefault(
                id(tensor),
                torch.nn.Parameter(tensor.detach().clone() if train else tensor.detach(), requires_grad=train),
            )
            delattr(owner, leaf) if hasattr(owner, leaf) else None
            owner.register_parameter(leaf, made[id(tensor)])
        elif name in mutated:
            setattr(owner, leaf, tensor.detach().clone())


def _owner(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    *path, leaf = name.split(".")
    for part in path:
        if not isinstance(getattr(module, part, None), torch.nn.Module):
            module.add_module(part, torch.nn.Module())
        module = cast(torch.nn.Module, getattr(module, part))
    return module, leaf


def change_dtype(program: Program, dtype: torch.dtype) -> torch.dtype:
    """Turn the floating-point type a clone was traced in into another one, in tensors and operations; returns the old.

    A model traced in fp32 has lost which of its casts to fp32 were meant to stay; they all follow. Load the model in
    the target type before tracing to keep, for example, fp32 normalisation inside a bf16 model. The scales of weights
    held in 4 bits stay as they are: their format stores them in fp32.
    """
    floats = [t.dtype for t in program.parameters().values() if t.is_floating_point()]
    if not floats:
        return dtype
    source = max(set(floats), key=floats.count)

    def convert(value: Any) -> Any:
        return dtype if value is source else value

    for graph in program.graphs():
        for node in graph.nodes:
            if node.op == "call_function":
                node.args = torch.fx.node.map_aggregate(node.args, convert)
                node.kwargs = torch.fx.node.map_aggregate(node.kwargs, convert)
    scales = {name for site in layers(program).values() if isinstance(site, Linear4bit) for name in site.tensors}
    converted: dict[int, torch.Tensor] = {}
    for home in (program.exported.state_dict, program.exported.constants):
        for name, tensor in list(home.items()):
            if isinstance(tensor, torch.Tensor) and tensor.dtype is source and name not in scales:
                value = converted.setdefault(id(tensor), tensor.detach().to(dtype))
                if isinstance(tensor, torch.nn.Parameter) and not isinstance(value, torch.nn.Parameter):
                    value = converted[id(tensor)] = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
                home[name] = value
    return source


def trained_values(program: Program, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trainable tensors of `module` in the program's dtype on the CPU, after checking that nothing else moved."""
    have = dict(module.named_parameters(remove_duplicate=False))
    missing = [name for name in program.parameters() if name not in have]
    if missing:
        raise RewriteError(
            f"the module lacks {len(missing)} parameters of the program",
            evidence=missing[:8],
            fix="Give the module that program.module() made.",
        )
    trainable = set(program.trainable)
    values: dict[str, torch.Tensor] = {}
    for name, before in program.parameters().items():
        now = have[name].detach()
        if name in trainable:
            values[name] = now.to(device=before.device, dtype=before.dtype, copy=True)
        elif not _same(before, now):
            raise RewriteError(
                f"{name} is frozen, but the module holds another value",
                fix="Train only the parameters that require gradients, or apply a pass that makes this one trainable.",
            )
    return values


def _same(before: torch.Tensor, now: torch.Tensor) -> bool:
    if before.shape != now.shape:
        return False
    if before.data_ptr() == now.data_ptr():
        return True
    return torch.equal(before.detach().to(now.dtype), now.to(before.device))
