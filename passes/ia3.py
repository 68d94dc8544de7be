"""(IA)³: trained vectors that scale what layers give, or what they read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from zlib import crc32

import torch
from torch.fx import Node

from passes.lora import Lora
from rewriter.attention import PASS_ON, Residual, attentions, residuals
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.find import Miss, Sites, Targets, select
from rewriter.norms import norms
from rewriter.program import Program
from rewriter.quantised import weight_like
from rewriter.transform import EXACT, FREE, Law
from rewriter.view import Conv, Experts, Linear, Linear4bit, Part, layers, scope, top

aten = torch.ops.aten
MLP_OUTPUT = "@mlp.output"


@dataclass(frozen=True, slots=True)
class Scaled:
    """One layer to scale: what it gives, or with `feedforward` what it reads."""

    layer: Linear | Conv
    feedforward: bool

    @property
    def path(self) -> str:
        return self.layer.path


@dataclass(frozen=True, slots=True)
class Ia3:
    """Scale keys and values, and what the MLPs' output projections read, by trained vectors.

        y = W x + b      ->      y = l · (W x + b)        for `targets`
        y = W x + b      ->      y = W (l · x) + b        for `feedforward_targets`

    Shapes: l [o, 1] for `targets`, [1, i] for `feedforward_targets`; [1, channels, 1, ...] for convolutions. Of a
    fused projection, such as query, key and value in one, only the meant slice is scaled. l starts at 1: nothing
    changes until it is trained. `@mlp.output` is the last linear layer of every MLP, found from the residual addition
    it leads to; a layer in both lists is a feed-forward one.

    Raises `UsageError` when a target matches nothing or an option cannot be meant.
    Source: Liu et al. 2022, arXiv 2205.05638, section 3.3.
    """

    name: ClassVar[str] = "ia3"
    source: ClassVar[str] = "Liu et al. 2022, arXiv 2205.05638"

    targets: Targets = ("@attention.key", "@attention.value")
    feedforward_targets: Targets = (MLP_OUTPUT,)
    exclude: Targets = ()
    init: Literal["ones", "normal"] = "ones"
    modules_to_save: tuple[str, ...] = ()
    adapter: str = "default"
    seed: int = 0

    def __post_init__(self) -> None:
        seed: Any = self.seed  # Any: what a configuration file holds is not yet known
        adapter: Any = self.adapter
        if self.init not in ("ones", "normal"):
            raise UsageError(f"init is {self.init!r}", fix="One of ones, normal.")
        if not isinstance(adapter, str) or not adapter or "." in adapter:
            raise UsageError(f"adapter is {adapter!r}", fix="A name without dots.")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UsageError(f"seed is {seed!r}", fix="A whole number.")
        if not self.targets and not self.feedforward_targets:
            raise UsageError("no target given", fix="Give targets, feedforward_targets or both.")

    @property
    def law(self) -> Law:
        if self.init == "normal":
            return FREE.because("the vectors start at random values")
        return EXACT.because("the vectors start at one")

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[Scaled]:
        feedforward, missed = self._chosen(program, self.feedforward_targets)
        inputs = {site.path for site in feedforward}
        ordinary, more = self._chosen(program, self.targets)
        found = [Scaled(site, False) for site in ordinary if site.path not in inputs]
        order = {path: index for index, path in enumerate(layers(program))}
        every = sorted([*found, *(Scaled(site, True) for site in feedforward)], key=lambda s: order.get(s.path, 0))
        return Sites(tuple(every), tuple(dict.fromkeys([*missed, *more])))

    def _chosen(self, program: Program, targets: Targets) -> tuple[list[Linear | Conv], tuple[Miss, ...]]:
        names = (targets,) if isinstance(targets, str) else tuple(targets)
        if MLP_OUTPUT not in names:
            return self._selected(program, targets) if names else ([], ())
        outputs = [site.path for site in mlp_outputs(program)]
        if not outputs:
            raise _no_mlp(program)
        found, missed = self._selected(program, outputs)
        found = [site for site in found if site.path in outputs]  # these are whole paths, not ends of paths
        rest = tuple(name for name in names if name != MLP_OUTPUT)
        if rest:
            others, more = self._selected(program, rest)
            found, missed = [*found, *(site for site in others if site.path not in outputs)], (*missed, *more)
        return found, missed

    def _selected(self, program: Program, targets: Targets) -> tuple[list[Linear | Conv], tuple[Miss, ...]]:
        sites = select(program, targets, kinds=(Linear, Linear4bit, Conv), exclude=self.exclude)
        return [site for site in sites.found if isinstance(site, Linear | Conv)], sites.missed

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Scaled, edit: Edit) -> None:
        vector = edit.parameter(self._name(site, edit.program), self._initial(site, edit.program))
        if not site.feedforward:
            for call in site.layer.calls:
                base = top(call)
                factor = self._factor(site.layer, vector, call, edit)
                edit.replace(base, self._call(edit, call, "scaled", aten.mul.Tensor, base, factor))
        elif isinstance(site.layer, Conv):
            self._scale_kernel(site.layer, vector, edit)
        else:
            for call in site.layer.calls:
                self._scale_input(site.layer, vector, call, edit)

    def finish(self, edit: Edit) -> None:
        Lora(modules_to_save=self.modules_to_save).finish(edit)

    def _name(self, site: Scaled, program: Program) -> str:
        part = _part(site.layer)
        return ".".join([scope(program, site.path), "ia3_l", self.adapter, *([part.name] if part else [])])

    def _initial(self, site: Scaled, program: Program) -> torch.Tensor:
        layer, weight = site.layer, weight_like(program, site.layer)
        part = _part(layer)
        size = layer.in_features if site.feedforward else part.stop - part.start if part else layer.out_features
        shape = [1, size] if site.feedforward else [size, 1]
        if isinstance(layer, Conv):
            shape = [1, size, *[1] * (weight.ndim - 2)]
        if self.init == "ones":
            return weight.new_ones(shape)
        own_seed = crc32(f"{self.seed} {self._name(site, program)}".encode())  # whatever else is targeted
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(own_seed))
        return noise.to(weight.dtype).to(weight.device)

    def _call(self, edit: Edit, call: Node, label: str, operation: Any, *args: Any, before: bool = False) -> Node:
        suffix = "" if self.adapter == "default" else f"_{self.adapter}"
        return edit.call(operation, *args, like=call, label=f"ia3_{label}{suffix}", before=before)

    def _factor(self, layer: Linear | Conv, vector: Node, call: Node, edit: Edit) -> Node:
        """The vector laid along the layer's output; one where a fused projection gives something else."""
        if isinstance(layer, Conv):
            return vector
        flat = self._call(edit, call, "vector", aten.view.default, vector, [-1])
        part = _part(layer)
        if part is None:
            return flat
        around = [part.start, layer.out_features - part.stop]
        return self._call(edit, call, f"{part.name}_vector", aten.constant_pad_nd.default, flat, around, 1.0)

    def _scale_input(self, layer: Linear, vector: Node, call: Node, edit: Edit) -> None:
        source = layer.input(call)
        flat = self._call(edit, call, "vector", aten.view.default, vector, [-1], before=True)
        scaled = self._call(edit, call, "scaled", aten.mul.Tensor, source, flat, before=True)
        if set(source.users) == {call, scaled}:
            edit.replace(source, scaled)
        else:  # others read the same value, and keep it
            edit.rewire(call, source, scaled)

    def _scale_kernel(self, layer: Conv, vector: Node, edit: Edit) -> None:
        """`conv(l · x, W) = conv(x, l · W)`: l per input channel, which each group of the kernel holds a part of."""
        weight = edit.program.placeholder(layer.weight)
        out, inner, *kernel = weight.meta["val"].shape
        first, groups = min(weight.users), layer.groups
        factor, grouped = vector, weight
        if groups > 1:
            ones = [1] * len(kernel)
            factor = self._call(
                edit, first, "vector", aten.view.default, vector, [groups, 1, inner, *ones], before=True
            )
            shape = [groups, out // groups, inner, *kernel]
            grouped = self._call(edit, first, "groups", aten.view.default, weight, shape, before=True)
        scaled = self._call(edit, first, "kernel", aten.mul.Tensor, grouped, factor, before=True)
        if groups > 1:
            scaled = self._call(edit, first, "weight", aten.view.default, scaled, [out, inner, *kernel], before=True)
        edit.replace(weight, scaled)


def mlp_outputs(program: Program) -> list[Linear]:
    """The linear layer that ends each MLP: what a residual addition adds, and no attention's output projection."""
    found = layers(program)
    by_top = {top(call): site for site in found.values() if isinstance(site, Linear) for call in site.calls}
    sources = {call: source for norm in norms(program) for call, source in zip(norm.calls, norm.inputs, strict=True)}
    projections = {site.path for attention in attentions(program, found) for site in attention.output}
    contractions = {
        call: site.path for site in found.values() if isinstance(site, (Linear, Conv, Experts)) for call in site.calls
    }
    ends: dict[str, Linear] = {}
    for residual in residuals(program):
        inside = {contractions[node] for node in residual.branch if node in contractions}
        for site in _ends(program, residual, by_top, sources):
            if site.path not in projections and inside - {site.path}:
                ends[site.path] = site
    return list(ends.values())


def _ends(
    program: Program, residual: Residual, by_top: dict[Node, Linear], norm_inputs: dict[Node, Node]
) -> Iterator[Linear]:
    """The linear layers whose results reach the residual addition through norms, scalings, sums and shapes alone."""
    todo, seen = [residual.node], set[Node]()
    while todo:
        node = todo.pop()
        if node in seen or not residual.skip < node:
            continue
        seen.add(node)
        if node in by_top:
            if node in residual.branch:
                yield by_top[node]
        elif node in norm_inputs:
            todo.append(norm_inputs[node])
        elif node.target in PASS_ON or node.target in (aten.add.Tensor, aten.mul.Tensor):
            operands = [arg for arg in node.all_input_nodes if program.parameter_name(arg) is None]
            if node.target is not aten.mul.Tensor or len(operands) == 1:  # a gate is no layer's end
                todo.extend(operands)


def _part(layer: Linear | Conv) -> Part | None:
    return layer.part if isinstance(layer, Linear) else None


def _no_mlp(program: Program) -> UsageError:
    stacks = [site.path for site in layers(program).values() if isinstance(site, Experts)]
    return UsageError(
        f"{MLP_OUTPUT} matches no layer of the program",
        evidence=[f"its MLPs are stacks of experts: {', '.join(stacks[:4])}"]
        if stacks
        else ["no residual addition follows a layer that is no attention's output projection"],
        fix="Name the layers with feedforward_targets, or leave it empty.",
    )
