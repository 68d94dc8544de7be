"""Program -> stable, readable text: one operation a line, printed only, never parsed.

A value is called `%<module path>/<label>`, so an insertion in one layer renumbers nothing in another; a parameter is
`@<its name>`; a symbolic size is `d0`, `d1`, in the order in which the inputs show them. Nothing in the text comes
from the names that torch gave to nodes or symbols, so it is the same in every process and after save and load.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node
from torch.utils._sympy.functions import Max, Min

from rewriter.program import LABEL, Origin, Program, module_path

KEYWORD = {InputKind.PARAMETER: "param", InputKind.BUFFER: "buffer", InputKind.CONSTANT_TENSOR: "const"}
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # what torch writes as the path of nodes it made itself
LARGEST = 2**63 - 1  # the end of an open slice
MARK = "\0"  # stands in no name and no constant: they are printable


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a text; `key` names what it defines and is unique within the text.

    `template` is the line with a mark around each name of a value, so that a value can be called otherwise; `arguments`
    is the part of it that an operation reads, with the same marks. `operation` is empty for what computes nothing:
    tensors, inputs, outputs, inner graphs. `origin` is the pass that added the line.
    """

    key: str
    path: str
    template: str
    operation: str = ""
    arguments: str = ""
    type: str = ""
    origin: str = ""
    node: Node | None = None

    @property
    def text(self) -> str:
        return self.template.replace(MARK, "")

    @property
    def reads(self) -> list[str]:
        """The names of the values that it reads, in order."""
        return self.arguments.split(MARK)[1::2]

    def renamed(self, names: Mapping[str, str]) -> Line:
        """The same line with other names of values, its own included."""
        if not names:
            return self
        return replace(
            self,
            key=names.get(self.key, self.key),
            template=_renamed(self.template, names),
            arguments=_renamed(self.arguments, names),
        )


def marked(name: str) -> str:
    """A name of a value, as it stands in a template."""
    return f"{MARK}{name}{MARK}"


def _renamed(template: str, names: Mapping[str, str]) -> str:
    parts = template.split(MARK)
    parts[1::2] = [names.get(name, name) for name in parts[1::2]]
    return MARK.join(parts)


def text(program: Program) -> str:
    """The whole program: parameters, inputs, operations, outputs."""
    return "".join(f"{line.text}\n" for line in lines(program))


def line(program: Program, node: Node) -> str:
    """The line of one node; for the evidence of an error."""
    return around(program, node, context=0)[0].strip()


def around(program: Program, node: Node, context: int = 2) -> list[str]:
    """The line of a node between the `context` lines before and after it."""
    everything = lines(program)
    place = next((i for i, each in enumerate(everything) if each.node is node), None)
    if place is None:
        return [printable(node.format_node() or node.name)]
    return [each.text for each in everything[max(0, place - context) : place + context + 1]]


def lines(program: Program) -> list[Line]:
    """The text of a program line by line."""
    return list(_Writer(program).program_lines())


def printable(name: str) -> str:
    """A name without characters that a terminal would obey."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in name)


@lru_cache
def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16 -> bf16`, `torch.int64 -> i64`."""
    name = str(dtype).removeprefix("torch.")
    for long, short in (("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        name = name.replace(long, short, 1)
    return name


def tensor_type(tensor: torch.Tensor) -> str:
    """`f32[4,16]` for a tensor of known sizes."""
    return f"{dtype_name(tensor.dtype)}[{','.join(map(str, tensor.shape))}]"


@lru_cache(maxsize=4096)
def settled(expression: Any) -> Any:
    """A symbolic expression as it is after save and load, when minimum and maximum are sympy's and not torch's."""
    if expression.is_Atom or not expression.has(Min, Max):
        return expression
    return expression.replace(Min, sympy.Min).replace(Max, sympy.Max)


class _Writer:
    """Everything a line needs to know of its program: names of values, names of sizes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names: dict[Node, str] = {}
        self.sizes: dict[Any, Any] = {}  # torch's symbols -> d0, d1, ...
        self.expressions: dict[Any, str] = {}

    # -- the program --------------------------------------------------------------------------------------------

    def program_lines(self) -> Iterator[Line]:
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        inputs = [node for node in placeholders if node.name not in self.program.specs]
        for node in inputs:
            self.names[node] = "%" + printable(node.name)
        yield from self._parameters([node for node in placeholders if node.name in self.program.specs])
        for node in inputs:
            name = self.names[node]
            kind = self.type(node.meta.get("val"))
            yield Line(name, "", f"input {marked(name)} : {kind}", type=kind, node=node)
        self._name_values(self.program.graph)
        yield from self._operations(self.program.graph, self.program.exported.graph_module)
        yield from self._outputs()

    def _parameters(self, placeholders: list[Node]) -> Iterator[Line]:
        specs = self.program.specs
        rank = {specs[node.name].target: i for i, node in enumerate(placeholders)}
        first: dict[str, str] = {}
        for group in self.program.tied():
            ordered = sorted((name for name in group if name in rank), key=rank.__getitem__)
            first.update(dict.fromkeys(ordered[1:], ordered[0]) if ordered else {})
        for node in placeholders:
            target = str(specs[node.name].target)
            name = self.names[node] = "@" + printable(target)
            alias = f" = {marked('@' + printable(first[target]))}" if target in first else ""
            kind = self.type(node.meta.get("val"))
            path = target.rpartition(".")[0]
            keyword = KEYWORD[specs[node.name].kind]
            yield Line(name, path, f"{keyword} {marked(name)}{alias} : {kind}", type=kind, node=node)

    def _outputs(self) -> Iterator[Line]:
        output = next(reversed(self.program.graph.nodes))
        values = list(output.args[0])
        returned = []
        for spec, value in zip(self.program.exported.graph_signature.output_specs, values, strict=True):
            if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION):
                name = printable(str(spec.target))
                new = self.value(value)
                yield Line(f"update {name}", "", f"  update {name} = {new}", arguments=new, node=output)
            else:
                returned.append(self.value(value))
        names = [printable(name) for name in _leaf_names(self.program.exported.call_spec.out_spec)]
        if len(names) != len(returned):
            names = [""] * len(returned)
        named = [f"{name}={value}" if name else value for name, value in zip(names, returned, strict=True)]
        arguments = ", ".join(named)
        yield Line("return", "", f"  return {arguments}".rstrip(), arguments=arguments, node=output)

    # -- one graph ----------------------------------------------------------------------------------------------

    def _name_values(self, graph: Graph) -> None:
        """Name what was there first, then what was inserted, so that an insertion cannot rename anything else."""
        taken = {self.names[node] for node in graph.nodes if node.op == "placeholder"}
        counts: dict[str, int] = {}
        operations = [node for node in graph.nodes if node.op == "call_function" or _is_tensor_attribute(node)]
        origins = {node: Origin.of(node) for node in operations}
        for node in sorted(operations, key=lambda node: origins[node] is not None):
            origin = origins[node]
            path = printable(_path(node))
            label = printable(origin.label if origin else _label(node))
            name = stem = f"%{path}/{label}" if path else f"%{label}"
            while name in taken:
                counts[stem] = counts.get(stem, 0) + 1
                name = f"{stem}_{counts[stem]}"
            taken.add(name)
            self.names[node] = name

    def _operations(self, graph: Graph, owner: GraphModule, indent: str = "  ", scope: str = "") -> Iterator[Line]:
        for node in graph.nodes:
            if node not in self.names or node.op == "placeholder":
                continue
            blocks = [argument for argument in node.all_input_nodes if argument not in self.names]
            self.names.update({block: f"&{i}" for i, block in enumerate(blocks)})
            yield self._call(node, indent, scope)
            name = self.names[node]
            for block in blocks:
                yield from self._block(block, getattr(owner, str(block.target)), indent + "  ", scope + name)
                del self.names[block]

    def _call(self, node: Node, indent: str, scope: str) -> Line:
        values = [self.value(argument) for argument in node.args]
        values += [f"{name}={self.value(node.kwargs[name])}" for name in sorted(node.kwargs)]
        arguments, kind, name = ", ".join(values), self.type(node.meta.get("val")), self.names[node]
        origin = Origin.of(node)
        added = printable(origin.name) if origin else ""
        call = f"{_operation(node)}({arguments}) : {kind}" + (f"  ! {added}" if added else "")
        template = f"{indent}{marked(name)} = {call}"
        if scope:  # inside a block, a value outside of it may have the same name
            template, arguments = template.replace(MARK, ""), arguments.replace(MARK, "")
        operation = _operation(node) if node.op == "call_function" else ""
        return Line(scope + name, _path(node), template, operation, arguments, kind, added, node)

    def _block(self, block: Node, module: GraphModule, indent: str, scope: str) -> Iterator[Line]:
        """The graph of a higher-order operation, under the line of the operation."""
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.names.update({node: f"%{i}" for i, node in enumerate(inputs)})
        self._name_values(module.graph)
        header = ", ".join(f"{self.names[node]} : {self.type(node.meta.get('val'))}" for node in inputs)
        scope = f"{scope}{self.names[block]}"
        yield Line(scope, _path(block), f"{indent}{self.names[block]} ({header})", node=block)
        yield from self._operations(module.graph, module, indent + "  ", scope)
        output = next(reversed(module.graph.nodes))
        values = ", ".join(self.value(value) for value in _flat(output.args[0])).replace(MARK, "")
        yield Line(f"{scope}return", _path(block), f"{indent}  return {values}".rstrip(), node=output)

    # -- values and types ---------------------------------------------------------------------------------------

    def value(self, value: Any) -> str:
        """An argument as it stands in a line."""
        if isinstance(value, Node):
            return marked(self.names[value])
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.value(item) for item in value)}]"
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{printable(str(key))}: {self.value(value[key])}" for key in sorted(value)) + "}"
        if isinstance(value, slice):
            return ":".join("" if part is None else self.value(part) for part in (value.start, value.stop, value.step))
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.expression(value)
        return _constant(value)

    def type(self, value: Any) -> str:
        """The type of a value: `f32[2,d0,24]`, `(f32[3], i64[3])`, or the expression of a symbolic number."""
        if isinstance(value, torch.Tensor):
            return f"{dtype_name(value.dtype)}[{','.join(self.expression(size) for size in value.shape)}]"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(self.type(item) for item in value)})"
        return self.value(value).replace(MARK, "")

    def expression(self, value: Any) -> str:
        """A size: a number, or an expression in d0, d1, ..."""
        if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return str(value)
        expression = value.node.expr
        if expression not in self.expressions:
            # Symbols are numbered as met; those of one expression that none showed before, by their own names.
            for symbol in sorted(expression.free_symbols, key=str):
                self.sizes.setdefault(symbol, type(symbol)(f"d{len(self.sizes)}", integer=True, positive=True))
            self.expressions[expression] = str(settled(expression).xreplace(self.sizes)).replace(" ", "")
        return self.expressions[expression]


def _path(node: Node) -> str:
    path = module_path(node)
    return "" if path == NO_MODULE else path


def _is_tensor_attribute(node: Node) -> bool:
    owner = node.graph.owning_module
    return node.op == "get_attr" and not isinstance(getattr(owner, str(node.target), None), torch.nn.Module)


def _label(node: Node) -> str:
    """The name of the operation that made a value, or that made it before a pass exchanged it for another."""
    return str(node.meta.get("custom", {}).get(LABEL) or _operation(node).rpartition(".")[2])


def _operation(node: Node) -> str:
    """`aten.linear.default -> linear`; operations of other libraries keep their namespace."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    if isinstance(target, str):
        return f"get_attr.{printable(target)}"
    return str(getattr(target, "__name__", target))


def _constant(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, (torch.layout, torch.memory_format)):
        return str(value).removeprefix("torch.")
    if isinstance(value, str):
        return printable(json.dumps(value, ensure_ascii=False))
    if isinstance(value, int):
        return "max" if value == LARGEST else str(int(value))
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    # What is left is printed as torch prints it, without the address of an object.
    return re.sub(r" at 0x[0-9a-f]+", "", printable(str(value)))


def _flat(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _leaf_names(spec: Any, prefix: str = "") -> list[str]:
    """The names of the leaves of an output: keys of a mapping or model output, positions where there are several."""
    if spec is None:
        return []
    if spec.is_leaf():
        return [prefix]
    children = spec.children()
    context = spec.context
    if isinstance(context, (list, tuple)) and len(context) == len(children):
        keys = [str(key) for key in context]
    else:
        keys = [str(i) for i in range(len(children))] if prefix or len(children) > 1 else [""]
    joined = [".".join(part for part in (prefix, key) if part) for key in keys]
    return [name for child, key in zip(children, joined, strict=True) for name in _leaf_names(child, key)]
