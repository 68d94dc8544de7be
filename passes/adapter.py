"""Bottleneck adapters: a small trained network behind, beside or around the sublayers of a frozen model."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch
from torch.fx import Node

from passes.adapter_branch import Bottleneck
from passes.adapter_place import Place, Sublayer, standing, sublayers
from rewriter.edit import Edit
from rewriter.errors import RewriteWarning, UsageError
from rewriter.find import Miss, Sites, Targets, select
from rewriter.program import Program
from rewriter.quantised import weight_like
from rewriter.transform import EXACT, FREE, Law
from rewriter.view import Conv, Experts, Linear, Linear4bit, computed, scope

aten = torch.ops.aten
END = 2**63 - 1  # of a slice without one


@dataclass(frozen=True, slots=True)
class Adapter:
    """Add a trainable bottleneck network behind or beside attention and feed-forward sublayers, or beside layers.

        series:    h = sublayer(x)      ->      h + scale · W_up act(W_down h)
        parallel:  h = sublayer(x)      ->      h + scale · W_up act(W_down x)
        layer:     y = layer(x)         ->      y + scale · W_up act(W_down x)

    Shapes: W_down [r, i], W_up [o, r] and biases; r is `bottleneck`, or ⌊i / reduction⌋ and at least 1. A sublayer ends
    at a residual addition: h is what is added, behind the output projection and its dropout, and x what the sublayer's
    first layers read, behind a pre-norm; both are found in the data flow. Beside a convolution W_down and W_up are 1x1
    and W_down has its stride, over the input at the centre of each kernel. W_up starts at zero: nothing changes.

    `placement` takes attention and feed-forward (houlsby), feed-forward (pfeiffer) or attention sublayers, and
    `cross_attention` those of a decoder that reads an encoder. The model's own norm (of a post-norm model; else the
    residual addition alone) comes after the adapter, or with `original_norm`: both, the adapter reads what this norm
    gives and its sum is normed again; before, the adapter stands behind the norm. Without `pre_norm` a parallel adapter
    reads the value carried over. `norm_before` and `norm_after` are norms of the adapter's own; `norm_sum` puts the
    last behind its sum. The scale may be learned, also per channel. A LoRA or another update of a layer joins below the
    sublayer's adapter also when it is applied later; beside an adapter of form layer, it acts on the sum with it and
    merges only when it was applied first.

    Raises `UsageError` when the program has no such sublayer or an option cannot be meant.
    Source: Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, arXiv 2005.00247; He et al. 2021, arXiv
    2110.04366.
    """

    name: ClassVar[str] = "adapter"
    source: ClassVar[str] = "Houlsby et al. 2019, arXiv 1902.00751"

    form: Literal["series", "parallel", "layer"] = "series"
    placement: Literal["houlsby", "pfeiffer", "attention"] = "houlsby"
    targets: Targets = ()
    bottleneck: int | None = None
    reduction: float = 16
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    dropout: float = 0.0
    bias: bool = True
    scale: float = 1.0
    learned_scale: bool = False
    scale_per_channel: bool = False
    init: Literal["zero_up", "xavier"] = "zero_up"
    norm_before: bool = False
    norm_after: bool = False
    norm_sum: bool = False
    original_norm: Literal["after", "both", "before"] = "after"
    pre_norm: bool = True
    cross_attention: bool = True
    exclude: Targets = ()
    layers: tuple[int, ...] = ()
    adapter: str = "default"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        _check_options(self)
        _check_together(self)

    @property
    def law(self) -> Law:
        if self.init == "xavier":
            return FREE.because("W_up starts non-zero")
        if self.norm_sum:
            return FREE.because("a norm of the adapter's own acts on the sublayer's output")
        return EXACT.because("W_up starts at zero")

    def size_of(self, inputs: int) -> int:
        """The width r of the bottleneck for a layer of so many inputs."""
        return self.bottleneck if self.bottleneck is not None else max(1, int(inputs // self.reduction))

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[Any]:
        if self.form == "layer":
            return self._layers(program)
        everything = sublayers(program)
        wanted = {site.path: site for site in everything if self._is_placed(site)}
        if not wanted:
            raise _nothing(self, program, everything)
        usable = select(
            program,
            tuple(wanted),
            kinds=(Linear, Linear4bit, Experts),
            exclude=self.exclude,
            layers_to_transform=self.layers,
        )
        chosen = [site.path for site in usable if site.path in wanted]
        missed = [miss for miss in usable.missed if miss.path in wanted]
        for path in list(chosen):
            reason = self._unfit(wanted[path])
            if reason:
                chosen.remove(path)
                missed.append(Miss(path, reason))
        if not chosen:
            raise UsageError(
                f"no sublayer can take an adapter of form {self.form}",
                evidence=[f"{miss.path}: {miss.reason}" for miss in missed[:6]],
                fix="Use form=layer with targets, or another placement.",
            )
        return Sites(tuple(wanted[path] for path in chosen), (*missed, *everything.missed))

    def _layers(self, program: Program) -> Sites[Any]:
        sites = select(
            program,
            self.targets,
            kinds=(Linear, Linear4bit, Conv),
            exclude=self.exclude,
            layers_to_transform=self.layers,
        )
        for site in sites:
            if isinstance(site, Linear) and site.part is not None:
                raise UsageError(
                    f"{site.path} is found as the {site.part.name} slice of a fused projection",
                    fix=f"Name the whole layer: targets={site.path}.",
                )
            if isinstance(site, Conv) and (self.norm_before or self.norm_after):
                raise UsageError(f"a layer norm beside the convolution {site.path}", fix="Adapt it without norms.")
        return Sites(sites.found, sites.missed)

    def _is_placed(self, site: Sublayer) -> bool:
        if site.kind == "feed_forward":
            return self.placement != "attention"
        return self.placement != "pfeiffer" and (site.kind == "attention" or self.cross_attention)

    def _unfit(self, site: Sublayer) -> str:
        for place in site.places:
            source = place.input if self.pre_norm else place.skip
            shapes = [", ".join(str(size) for size in node.meta["val"].shape) for node in (source, place.output)]
            if self.form == "parallel" and shapes[0] != shapes[1]:
                return f"its input [{shapes[0]}] and its output [{shapes[1]}] differ in shape"
            if self.original_norm != "after" and place.end not in place.sum.args:
                return "its residual addition adds another sublayer too"
            if self.original_norm != "after" and place.sum.target is not aten.add.Tensor:
                return "its residual addition is in place"
        return ""

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Any, edit: Edit) -> None:
        name = f"{scope(edit.program, site.path)}.adapter.{self.adapter}"
        weight = weight_like(edit.program, site)
        if isinstance(site, Sublayer):
            inputs = outputs = site.width
            value, dims = site.places[0].output, 0
        else:
            inputs, outputs = site.in_features, site.out_features
            value, dims = site.calls[0], weight.ndim - 2
        like = weight.new_empty(0, dtype=value.meta["val"].dtype)
        bottleneck = Bottleneck(self, edit, name, inputs=inputs, outputs=outputs, like=like, dims=dims)
        if isinstance(site, Sublayer):
            for place in site.places:
                self._at(place, bottleneck)
        else:
            for call in site.calls:
                _beside(site, call, bottleneck)
        times = len(site.places if isinstance(site, Sublayer) else site.calls)
        edit.note(site.path, added_flops_per_token=2.0 * bottleneck.size * (inputs + outputs) * times)

    def _at(self, place: Place, bottleneck: Bottleneck) -> None:
        """Put the adapter at one call of a sublayer."""
        if self.original_norm == "both":
            _around(place, bottleneck)
            return
        base = standing(place.output if self.original_norm == "after" else place.norm or place.sum)
        source = base
        if self.form == "parallel":
            source = standing(place.input if self.pre_norm else place.skip)
        total = bottleneck.added(base, base, bottleneck.update(base, source))
        bottleneck.edit.replace(base, total)


def _around(place: Place, bottleneck: Bottleneck) -> None:
    """The adapter reads the block's normed sum; its own sum takes the branch's place and is added and normed again."""
    stand = standing(place.norm or place.sum)
    total = stand if place.norm is None else stand.args[0]
    index = place.sum.args.index(place.end)
    if not isinstance(total, Node) or total.target is not place.sum.target or standing(place.skip) not in total.args:
        raise UsageError(
            f"%{stand.name} stands behind the block that ends at %{place.sum.name}",
            fix="Apply the adapter with original_norm=before last.",
        )
    end = total.args[index]
    assert isinstance(end, Node)
    branch = bottleneck.added(stand, end, bottleneck.update(stand, stand))
    operands = [branch if position == index else operand for position, operand in enumerate(total.args)]
    again = bottleneck.call(stand, "again", total.target, *operands, **total.kwargs)
    if place.norm is not None:
        again = bottleneck.call(stand, "normed_again", stand.target, again, *stand.args[1:], **stand.kwargs)
    bottleneck.edit.replace(stand, again)


def _beside(site: Linear | Conv, call: Node, bottleneck: Bottleneck) -> None:
    base, x, stride = standing(call), site.input(call), None
    if isinstance(site, Conv):
        stride, x = _centres(base, call, x, bottleneck)
    bottleneck.edit.replace(base, bottleneck.added(base, base, bottleneck.update(base, x, stride)))


def _centres(base: Node, call: Node, x: Node, bottleneck: Bottleneck) -> tuple[list[int], Node]:
    """(stride, input cut off or padded so that a 1x1 convolution of this stride reads the centre of each kernel)."""
    kernel = call.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
    stride, padding, dilation = (
        _each(call.args[index] if index < len(call.args) else default, kernel)
        for index, default in ((3, 1), (4, 0), (5, 1))
    )
    pads: list[int] = []  # two numbers per dimension, the last dimension first
    for dim, (size, given, step) in enumerate(zip(kernel, padding, dilation, strict=True), -len(kernel)):
        reach = step * (size - 1)
        whole = {"same": reach, "valid": 0}.get(given, 2 * given)
        before = whole // 2 - reach // 2
        after = whole - reach - before
        if min(before, after) < 0:
            stop = after if after < 0 else END
            x = bottleneck.call(base, "centre", aten.slice.Tensor, x, dim, max(0, -before), stop)
        pads = [max(0, before), max(0, after), *pads]
    if any(pads):
        x = bottleneck.call(base, "padded", aten.constant_pad_nd.default, x, pads)
    return stride, x


def _each(value: Any, kernel: Any) -> list[Any]:
    """One value per dimension: a list of one, a number and a word mean all dimensions."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values if len(values) == len(kernel) else values * len(kernel)


# -- options --------------------------------------------------------------------------------------------------------


def _check_types(adapter: Adapter) -> None:
    for name, hint in get_type_hints(Adapter).items():
        value = getattr(adapter, name)
        if hint is bool and not isinstance(value, bool):
            raise UsageError(f"{name} is {value!r}", fix="true or false.")
        if getattr(hint, "__origin__", None) is Literal and value not in get_args(hint):
            raise UsageError(f"{name} is {value!r}", fix=f"One of {', '.join(get_args(hint))}.")


def _check_options(adapter: Adapter) -> None:
    size: Any = adapter.bottleneck  # what a configuration file holds is not yet known
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= 1_000_000):
        raise UsageError(f"bottleneck is {size!r}", fix="A whole number of at least 1.")
    if not _is_number(adapter.reduction) or adapter.reduction <= 0:
        raise UsageError(f"reduction is {adapter.reduction!r}", fix="A number above 0.")
    if not _is_number(adapter.dropout) or not 0 <= adapter.dropout < 1:
        raise UsageError(f"dropout is {adapter.dropout!r}", fix="A probability of at least 0 and below 1.")
    if not _is_number(adapter.scale):
        raise UsageError(f"scale is {adapter.scale!r}", fix="A finite number.")
    if adapter.scale == 0 and not adapter.learned_scale:
        warnings.warn("scale is 0: the adapter has no effect", RewriteWarning, stacklevel=3)
    name: Any = adapter.adapter
    if not isinstance(name, str) or not name or "." in name:
        raise UsageError(f"adapter is {name!r}", fix="A name without dots.")
    seed: Any = adapter.seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UsageError(f"seed is {seed!r}", fix="A whole number.")


def _check_together(adapter: Adapter) -> None:
    """Refuse options that have no meaning in the chosen form."""
    given = {
        "targets": bool(adapter.targets) and adapter.form != "layer",
        "placement": adapter.placement != "houlsby" and adapter.form == "layer",
        "cross_attention": not adapter.cross_attention and adapter.form == "layer",
        "original_norm": adapter.original_norm != "after" and adapter.form != "series",
        "pre_norm": not adapter.pre_norm and adapter.form != "parallel",
    }
    for name in (name for name, wrong in given.items() if wrong):
        raise UsageError(
            f"{name} has no meaning with form={adapter.form}", fix=f"Leave {name} out, or change the form."
        )
    if adapter.form == "layer" and not adapter.targets:
        raise UsageError("form=layer needs targets", fix="Name linear or convolution layers, such as all-linear.")
    if adapter.scale_per_channel and not adapter.learned_scale:
        raise UsageError("scale_per_channel without learned_scale", fix="Set learned_scale too.")
    if adapter.norm_sum and not adapter.norm_after:
        raise UsageError("norm_sum without norm_after", fix="Set norm_after too.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _nothing(adapter: Adapter, program: Program, everything: Sites[Sublayer]) -> UsageError:
    kinds = sorted({site.kind.replace("_", "-") for site in everything})
    if kinds:
        what = f"the program has no sublayer that placement={adapter.placement} means"
        return UsageError(what, evidence=[f"found: {', '.join(kinds)}"], fix="Choose another placement.")
    made = list(dict.fromkeys(computed(program).values()))
    if made:
        return UsageError(
            f"the pass {made[-1]} computes weights of this program, and no sublayer without such a weight was found",
            fix=f"Apply the adapter before {made[-1]}, or merge or undo {made[-1]} first.",
        )
    return UsageError(
        "the program has no sublayer with a residual addition behind a linear layer",
        evidence=[f"{miss.path}: {miss.reason}" for miss in everything.missed[:6]],
        fix="Use form=layer with targets.",
    )
