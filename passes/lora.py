"""LoRA: a trainable low-rank update beside a layer."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Node

from passes.lora_experts import check_experts, experts_update
from passes.lora_init import INITS, REPLACES_WEIGHT, initial
from passes.saved_modules import untie
from rewriter.edit import Edit
from rewriter.errors import RewriteWarning, UsageError
from rewriter.find import Sites, Targets, full_match, fused_parts, select
from rewriter.program import Program
from rewriter.quantised import weight_like
from rewriter.transform import EXACT, FREE, ROUNDING, Law
from rewriter.view import Conv, Embedding, Experts, Linear, Linear4bit, Site, scope, top

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Lora:
    """Add a trainable low-rank update beside linear, convolution and embedding layers and stacks of experts.

        y = x Wᵀ + b      ->      y = x Wᵀ + b + scale · (dropout(x) Aᵀ) Bᵀ

    Shapes: W [o, i], A [rank, i], B [o, rank]; scale = alpha / rank, or alpha / √rank with `rslora`. With `dora`, the
    sum is scaled per output to a trained magnitude m [o]: y = m / ‖W + scale · B A‖ · (x Wᵀ + scale · x Aᵀ Bᵀ) + b.
    By default A is Kaiming-uniform and B is zero: nothing changes until B is trained.
    Convolutions get A with the layer's kernel and B 1x1; embeddings A [rank, rows] and B [width, rank]; the experts of
    a 3-D weight one update each, A [experts, rank, i] and B [experts, o, rank]. `enable` puts one update on each named
    slice of a fused query-key-value projection.

    Raises `UsageError` when a target matches nothing or an option cannot be meant.
    Source: Hu et al. 2021, arXiv 2106.09685, eq. 3; rsLoRA arXiv 2312.03732; DoRA arXiv 2402.09353; PiSSA arXiv
    2404.02948; OLoRA arXiv 2406.01775.
    """

    name: ClassVar[str] = "lora"
    source: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"

    targets: Targets = ("@attention.query", "@attention.value")
    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian", "both", "pissa", "olora"] = "kaiming"
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    enable: tuple[str, ...] = ()
    exclude: Targets = ()
    layers: tuple[int, ...] = ()
    layers_pattern: str | None = None
    modules_to_save: tuple[str, ...] = ()
    adapter: str = "default"
    sigma: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        _check_options(self)

    @property
    def law(self) -> Law:
        if self.init in REPLACES_WEIGHT:
            return ROUNDING.because("the weight gives up what the update starts with, so their sum moves by rounding")
        if self.init == "both":
            return FREE.because("A and B both start non-zero")
        if self.lora_bias or not self.dora:
            return EXACT.because("B starts at zero")
        return EXACT.because("B starts at zero and the magnitude at the weight's own norm")

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[Site]:
        sites = select(
            program,
            self.targets,
            kinds=(Linear, Linear4bit, Conv, Embedding, Experts),
            exclude=self.exclude,
            layers_to_transform=self.layers,
            layers_pattern=self.layers_pattern,
        )
        found = list(sites.found)
        if self.enable:
            found = [part for site in found for part in _parts(program, site, self.enable)]
        saved = [site.path for site in found if _is_saved(site.path, self.modules_to_save)]
        if saved:
            raise UsageError(
                f"{saved[0]} is both a target and in modules_to_save", fix="Name it in one of the two only."
            )
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            if not any(_pattern_matches(pattern, site.path) for site in found):
                raise UsageError(
                    f"pattern {pattern!r} matches no target",
                    evidence=[f"targets: {', '.join(site.path for site in found[:6])}"],
                    fix="Patterns are matched against the end of a layer's path.",
                )
        for site in found:
            if isinstance(site, Experts):
                check_experts(self, site)
            limit = min(site.in_features, site.out_features)
            if self.rank_of(site) > limit:
                warnings.warn(f"{site.path}: rank {self.rank_of(site)} exceeds {limit}", RewriteWarning, stacklevel=2)
        return Sites(tuple(found), sites.missed)

    def rank_of(self, site: Site) -> int:
        return next((r for p, r in self.rank_pattern.items() if _pattern_matches(p, site.path)), self.rank)

    def scale_of(self, site: Site) -> float:
        alpha = next((a for p, a in self.alpha_pattern.items() if _pattern_matches(p, site.path)), self.alpha)
        rank = self.rank_of(site)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Site, edit: Edit) -> None:
        branch = _Branch(self, site, edit)
        for call in site.calls:
            base = top(call)
            update = branch.update(call)
            total = branch.magnitude(call, base, update) if self.dora else branch.plain(call, base, update)
            edit.replace(base, total)

    def finish(self, edit: Edit) -> None:
        adapted = {name.rsplit(".lora_", 1)[0] for name in edit.added}
        for name in self.trained_beside(edit.program, adapted):
            if name in edit.added:
                continue
            if _is_saved(name.rpartition(".")[0], self.modules_to_save):
                untie(edit, name)
            edit.train(name)

    def trained_beside(self, program: Program, adapted: Collection[str]) -> list[str]:
        """What else trains when the layers at the paths `adapted` are: the modules to save and the biases."""
        present = list(program.parameters())
        chosen: dict[str, None] = {}
        for name in self.modules_to_save:
            inside = [p for p in present if _is_saved(p.rsplit(".", 1)[0], (name,))]
            if not inside:
                raise UsageError(f"modules_to_save {name!r} matches no module with parameters")
            chosen.update(dict.fromkeys(inside))
        for parameter in present:
            owner, _, leaf = parameter.rpartition(".")
            if (self.bias == "all" and "bias" in leaf) or (
                self.bias == "lora_only" and leaf == "bias" and owner in adapted
            ):
                chosen[parameter] = None
        return list(chosen)


class _Branch:
    """The parameters of one site and the operations that apply them."""

    def __init__(self, lora: Lora, site: Site, edit: Edit) -> None:
        self.lora, self.site, self.edit = lora, site, edit
        self.scale = lora.scale_of(site)
        self.scope = scope(edit.program, site.path)
        self.weight = edit.program.placeholder(site.weight)
        _refuse_combination(lora, site)
        start = initial(lora, site, weight_like(edit.program, site), lora.rank_of(site), self.scale)
        if start.weight is not None:
            _refuse_tied(site, lora.init)
            edit.set_value(site.weight, start.weight)
        kind = "lora_embedding_" if isinstance(site, Embedding) else "lora_"
        self.a = edit.parameter(self._name(f"{kind}A"), start.a)
        self.b = edit.parameter(self._name(f"{kind}B"), start.b)
        self.bias = None
        if lora.lora_bias:
            self.bias = edit.parameter(self._name("lora_B_bias"), start.b.new_zeros(start.b.shape[0]))
        if lora.dora:
            norm = _norm(
                site, edit.program.tensor(site.weight).detach() + self.scale * _product(site, start.a, start.b)
            )
            self.m = edit.parameter(self._name("lora_magnitude_vector"), norm)

    def _name(self, kind: str) -> str:
        part = self.site.part if isinstance(self.site, Linear) else None
        return ".".join([self.scope, kind, self.lora.adapter, *([part.name] if part else [])])

    def _call(self, call: Node, label: str, operation: Any, *args: Any) -> Node:
        suffix = "" if self.lora.adapter == "default" else f"_{self.lora.adapter}"
        return self.edit.call(operation, *args, like=call, label=f"lora_{label}{suffix}")

    def update(self, call: Node) -> Node:
        """`scale · B A x`, for the slice of the output that the site means."""
        x = self.site.input(call)
        if self.lora.dropout and not isinstance(self.site, Embedding):
            x = self._call(call, "dropout", aten.dropout.default, x, self.lora.dropout, False)
        if isinstance(self.site, Linear):
            low = self._call(call, "down", aten.linear.default, x, self.a)
            high = self._call(call, "up", aten.linear.default, low, self.b, *([self.bias] if self.bias else []))
        elif isinstance(self.site, Embedding):
            table = self._call(call, "table", aten.t.default, self.a)
            low = self._call(call, "down", aten.embedding.default, table, x, *call.args[2:])
            high = self._call(call, "up", aten.linear.default, low, self.b)
        elif isinstance(self.site, Experts):
            high = experts_update(partial(self._call, call), call, x, self.a, self.b)
        else:
            geometry = list(call.args[3:6])
            low = self._call(call, "down", call.target, x, self.a, None, *geometry)
            dims = self.a.meta["val"].ndim - 2
            pointwise = [[1] * dims, [0] * dims, [1] * dims, self.site.groups]
            high = self._call(call, "up", _default(call.target), low, self.b, self.bias, *pointwise)
        scaled = self._call(call, "scaled", aten.mul.Tensor, high, self.scale)
        part = self.site.part if isinstance(self.site, Linear) else None
        if part is not None:
            padding = [part.start, self.site.out_features - part.stop]
            scaled = self._call(call, "placed", aten.constant_pad_nd.default, scaled, padding)
        return scaled

    def plain(self, call: Node, base: Node, update: Node) -> Node:
        return self._call(call, "sum", aten.add.Tensor, base, update)

    def magnitude(self, call: Node, base: Node, update: Node) -> Node:
        """DoRA: y + (f - 1)(y - b) + f · update with f = m / ‖W + scale · B A‖, whose norm gets no gradient."""
        site = self.site
        delta = self._product(call)
        weight = self._call(call, "weight", aten.add.Tensor, self.weight, delta)
        dims = _norm_dims(site, weight.meta["val"].ndim)
        norm = self._call(call, "norm", aten.linalg_vector_norm.default, weight, 2, dims, isinstance(site, Conv))
        if isinstance(site, Conv):
            norm = self._call(call, "norm_channels", aten.transpose.int, norm, 0, 1)
        fixed = self._call(call, "norm_fixed", aten.detach.default, norm)
        safe = self._call(call, "norm_safe", aten.clamp_min.default, fixed, torch.finfo(norm.meta["val"].dtype).tiny)
        factor = self._call(call, "factor", aten.div.Tensor, self.m, safe)
        bare = base
        if site.bias is not None:
            bias = self.edit.program.placeholder(site.bias)
            if isinstance(site, Conv):
                bias = self._call(call, "bias", aten.view.default, bias, [1, -1, *[1] * (base.meta["val"].ndim - 2)])
            bare = self._call(call, "bare", aten.sub.Tensor, base, bias)
        less = self._call(call, "factor_less_one", aten.sub.Tensor, factor, 1.0)
        stretch = self._call(call, "stretch", aten.mul.Tensor, bare, less)
        turned = self._call(call, "turned", aten.mul.Tensor, update, factor)
        total = self._call(call, "change", aten.add.Tensor, stretch, turned)
        return self._call(call, "sum", aten.add.Tensor, base, total)

    def _product(self, call: Node) -> Node:
        """`scale · B A`, laid out as the weight is stored."""
        a, b, site = self.a, self.b, self.site
        if isinstance(site, Conv):
            rank = self.a.meta["val"].shape[0]
            flat_a = self._call(call, "A_flat", aten.view.default, a, [rank, -1])
            flat_b = self._call(call, "B_flat", aten.view.default, b, [-1, rank])
            product = self._call(call, "product", aten.mm.default, flat_b, flat_a)
            product = self._call(call, "kernel", aten.view.default, product, list(self.weight.meta["val"].shape))
        else:
            product = self._call(call, "product", aten.mm.default, b, a)
            if _stored_transposed(site):
                product = self._call(call, "product_t", aten.t.default, product)
        return self._call(call, "product_scaled", aten.mul.Tensor, product, self.scale)


def _stored_transposed(site: Site) -> bool:
    return isinstance(site, Embedding) or (isinstance(site, Linear) and site.transposed)


def _default(operation: Any) -> Any:
    """`conv2d.padding` -> `conv2d.default`: B is 1x1 and takes no padding, whatever the layer's was."""
    return operation.overloadpacket.default


def _product(site: Site, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if isinstance(site, Conv):
        return (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])
    return (b @ a).t() if _stored_transposed(site) else b @ a


def _norm_dims(site: Site, ndim: int) -> list[int]:
    if isinstance(site, Conv):
        return list(range(1, ndim))
    return [0] if _stored_transposed(site) else [1]


def _norm(site: Site, weight: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(weight, 2, _norm_dims(site, weight.ndim), isinstance(site, Conv))
    return norm.transpose(0, 1) if isinstance(site, Conv) else norm


def _parts(program: Program, site: Site, names: Sequence[str]) -> list[Linear]:
    if not isinstance(site, Linear):
        raise UsageError(f"enable={','.join(names)} needs linear layers, {site.path} is {site.kind}")
    return fused_parts(program, replace(site, part=None), names)


def _pattern_matches(pattern: str, path: str) -> bool:
    return full_match(rf"(.*\.)?({pattern})", path)


def _is_saved(path: str, names: Sequence[str]) -> bool:
    return any(re.search(rf"(^|\.){re.escape(name)}(\.|$)", path) for name in names)


def _refuse_combination(lora: Lora, site: Site) -> None:
    if lora.lora_bias and isinstance(site, Embedding):
        raise UsageError(f"lora_bias on the embedding {site.path}", fix="An embedding has no bias.")
    if isinstance(site, Linear4bit) and (lora.dora or lora.init in REPLACES_WEIGHT):
        what = "DoRA reads" if lora.dora else f"init={lora.init} changes"
        raise UsageError(
            f"{what} the weight of {site.path}, which is held in 4 bits",
            fix="Apply it before nf4, or use plain LoRA" + ("." if lora.dora else ", or the pass loftq before nf4."),
        )
    if lora.dora and isinstance(site, Linear) and site.part is not None:
        raise UsageError(f"{site.path}: DoRA on a slice of a fused projection", fix="Use LoRA, or the whole layer.")
    if lora.dora and isinstance(site, Conv) and site.groups > 1:
        raise UsageError(f"{site.path}: DoRA on a grouped convolution", fix="Use LoRA on this layer.")


def _refuse_tied(site: Site, init: str) -> None:
    if site.tied:
        raise UsageError(
            f"init={init} changes the weight of {site.path}, which is tied",
            evidence=[f"also used as: {', '.join(site.tied)}"],
            fix="Use init=kaiming or gaussian on a tied weight.",
        )


def _check_options(lora: Lora) -> None:
    ranks: list[tuple[str, Any]] = [("rank", lora.rank)]  # Any: what a configuration file holds is not yet known
    alphas: list[tuple[str, Any]] = [("alpha", lora.alpha)]
    ranks += [(f"rank_pattern {pattern!r}", value) for pattern, value in lora.rank_pattern.items()]
    alphas += [(f"alpha_pattern {pattern!r}", value) for pattern, value in lora.alpha_pattern.items()]
    for name, rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= 1_000_000:
            raise UsageError(f"{name} is {rank!r}", fix="A rank is a whole number of at least 1.")
    for name, alpha in alphas:
        if not _is_number(alpha):
            raise UsageError(f"{name} is {alpha!r}", fix="alpha is a finite number.")
        if alpha == 0:
            warnings.warn(f"{name} is 0: the adapter has no effect", RewriteWarning, stacklevel=3)
    if not _is_number(lora.dropout) or not 0 <= lora.dropout < 1:
        raise UsageError(f"dropout is {lora.dropout!r}", fix="A probability of at least 0 and below 1.")
    if not _is_number(lora.sigma) or lora.sigma < 0:
        raise UsageError(f"sigma is {lora.sigma!r}", fix="A standard deviation of at least 0.")
    if lora.init not in INITS:
        raise UsageError(f"init is {lora.init!r}", fix=f"One of {', '.join(INITS)}.")
    if lora.bias not in ("none", "all", "lora_only"):
        raise UsageError(f"bias is {lora.bias!r}", fix="One of none, all, lora_only.")
    if not lora.adapter or "." in lora.adapter:
        raise UsageError(f"adapter is {lora.adapter!r}", fix="A name without dots.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
