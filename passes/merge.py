"""Merge: fold everything that is affine beside a base weight into that weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch.fx import Node

from passes.merge_4bit import POLICIES, Policy, fold_4bit, is_4bit
from passes.merge_refusal import nothing, nothing_but_4bit, stuck
from passes.stand_in import StandIn, settle, stand_ins
from passes.weight_update import check_flag
from rewriter.constants import Constants
from rewriter.edit import Edit
from rewriter.errors import LawError, RewriteError, UsageError
from rewriter.find import Miss, Sites
from rewriter.fold import folds, leftover
from rewriter.grouped import grouped
from rewriter.program import Program
from rewriter.region import BIAS_INPUT, Fold, bias_beside, entry, weight_operand
from rewriter.transform import FREE, ROUNDING, Law
from rewriter.view import BITS4, CONVOLUTIONS, swaps, weight_of

aten = torch.ops.aten
PRECISION = {"fp32": torch.float32, "fp64": torch.float64}
STORED_AS_GIVEN = {aten.linear.default, *BITS4}  # [o, i]; the others take their weight as [i, o]


@dataclass(frozen=True, slots=True)
class Merge:
    """Fold every affine update into the base weight beside it; the graph has the base model's operations again.

        y = x Wᵀ + b + scale · (x Aᵀ) Bᵀ      ->      y = x W'ᵀ + b,    W' = W + scale · B A

    No table of methods: whatever a proof shows to be affine in the layer's input folds, also in a model that another
    library built. All updates of a weight are accumulated in `precision` and rounded once. A weight that others read
    too (tied embeddings) is refused, or with `untie` gets a tensor of its own. The passes named in `keep` stay in the
    graph as they are: what cannot fold, such as an adapter's bottleneck or a prefix, beside a LoRA that can.

    `nf4` says what happens to updates beside weights held in 4 bits: `dequantise` gives the layer a plain weight again,
    `keep` leaves the update beside the 4-bit weight, `requantise` holds the sum in 4 bits again, which rounds at the
    size of the format's steps and is refused where it would lose more than half of an update, unless `lossy`.

    Raises `RewriteError` when there is nothing to merge, or when a pass's parameter is not affine, naming the
    operation; `LawError` when a folded weight is not finite.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """

    name: ClassVar[str] = "merge"
    source: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685, section 4.1"

    precision: Literal["fp32", "fp64"] = "fp32"
    untie: bool = False
    allow_nonfinite: bool = False
    keep: tuple[str, ...] = ()
    nf4: Policy = "dequantise"
    lossy: bool = False

    def __post_init__(self) -> None:
        if self.nf4 not in POLICIES:
            raise UsageError(f"nf4 is {self.nf4!r}", fix=f"One of {', '.join(POLICIES)}.")
        check_flag("lossy", self.lossy)
        if self.precision not in PRECISION:
            raise UsageError(f"precision is {self.precision!r}", fix="One of fp32, fp64.")

    @property
    def law(self) -> Law:
        if self.nf4 == "requantise":
            return FREE.because("folded 4-bit weights are rounded to the levels of their format again")
        return ROUNDING.because("products are summed in another order and rounded once")

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[Fold | StandIn]:
        precision = PRECISION[self.precision]
        if any(tensor.dtype is torch.float64 for tensor in program.parameters().values()):
            precision = torch.float64
        constants = Constants(program, precision)
        kept = self._kept(program)
        found, broken = folds(program, constants)
        beside_4bit = [fold for fold in found if self.nf4 == "keep" and is_4bit(fold)]
        kept = kept.union(*(fold.reads for fold in beside_4bit))
        found = [fold for fold in found if kept.isdisjoint(fold.reads)]
        missed = [Miss(path, f"%{error.node.name}: {error.reason}") for path, error in broken]
        stands = stand_ins(program, constants)
        if not self.untie:  # a weight of several readers is folded for all of them, where that is all there is to fold
            found = [fold for fold in found if not _is_covered(program, fold, stands)]
        folded = frozenset().union(*(fold.reads for fold in found))
        stands = {name: site for name, site in stands.items() if kept.isdisjoint(site.reads)}
        settled = {site.path: site for site in stands.values() if folded.isdisjoint(site.names)}
        held = frozenset().union(*(site.reads for site in settled.values()))
        rest = [each for each in leftover(program, constants, found, broken) if each[0] not in held | kept]
        if rest:
            raise stuck(program, rest, kept, [*(fold.reads for fold in found), held], self.keep)
        if not found and not settled:
            raise nothing(program, kept, missed) if self.keep or not beside_4bit else nothing_but_4bit(beside_4bit)
        for fold in found:
            others = _other_readers(program, fold)
            stays = self.nf4 == "requantise" and is_4bit(fold)  # its new codes would replace those the others read
            if others and (stays or not self.untie):
                raise RewriteError(
                    f"{fold.path} cannot be merged: its weight {fold.weight} is also read elsewhere",
                    evidence=[f"read by %{node.name}" for node in others[:6]],
                    fix=f"Give the merged layer its own weight with {'--nf4 dequantise ' if stays else ''}--untie.",
                )
        return Sites((*settled.values(), *found), tuple(missed))

    def _kept(self, program: Program) -> frozenset[str]:
        """The parameters of the passes that stay."""
        names = [step.name for step in program.steps]
        unknown = [name for name in self.keep if name not in names]
        if unknown:
            raise UsageError(
                f"keep names {unknown[0]!r}, which is no pass of this program",
                evidence=[f"its passes: {', '.join(dict.fromkeys(names)) or 'none'}"],
                fix="Name passes that were applied.",
            )
        return frozenset(name for step in program.steps if step.name in self.keep for name in step.added)

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Fold | StandIn, edit: Edit) -> None:
        if isinstance(site, StandIn):
            exact, before = settle(edit, site, allow_nonfinite=self.allow_nonfinite)
            edit.note(site.path, **_rounding(exact, before))
            return
        # the value before this layer may be the end of another region, which is folded by now
        site = replace(site, root=edit.current(site.root), source=edit.current(site.source))
        weight, offset, kept_offset = site.values()
        if is_4bit(site):
            self._check_finite(site.weight, site, weight, site.base.meta["val"])
            notes = fold_4bit(edit, site, weight, requantise=self.nf4 == "requantise", lossy=self.lossy)
            edit.note(site.path, **notes)
        else:
            self._fold(site, weight, edit)
        self._close(site, offset, kept_offset, edit)

    def _fold(self, site: Fold, weight: torch.Tensor, edit: Edit) -> None:
        """Put the folded weight in the place of the base operation's own."""
        others = _other_readers(edit.program, site) if self.untie else []
        base = edit.originals.get(site.weight, edit.program.tensor(site.weight))
        stored = _as_stored(edit.program, site, weight, base)
        self._check_finite(site.weight, site, stored, base)
        edit.note(site.path, **_rounding(stored, base))
        value = stored.to(base.dtype).contiguous()
        operand = _own_weight(edit, site, value) if others else _set_weight(edit, site, value)
        _apply_weight(edit, site, operand)

    def _close(self, site: Fold, offset: torch.Tensor | None, kept_offset: torch.Tensor | None, edit: Edit) -> None:
        """Give the base operation the region's constant part and input, and let it stand for the region's end."""
        self._set_bias(edit, site, offset, kept_offset)
        where = entry(site.base, site.root)
        if where is not None and where[1] is not site.source:
            edit.rewire(where[0], where[1], site.source)
        ends = list(_ends(site))
        for node in ends:
            edit.redirect(node, site.kept)
        edit.erase((site.nodes | {site.root, *ends}) - {site.base, site.kept, site.source})

    def _set_bias(self, edit: Edit, site: Fold, offset: torch.Tensor | None, kept: torch.Tensor | None) -> None:
        """Give the base operation the bias of the whole region."""
        if offset is None:
            return
        change = offset if kept is None else offset - kept
        index = BIAS_INPUT.get(site.base.target)  # type: ignore[call-overload]
        name = site.bias or bias_beside(edit.program, site)
        if name is not None:
            before = edit.originals.get(name, edit.program.tensor(name))
            own = before.detach() if site.bias is None else site.own_bias()
            value = (own.to(change.dtype) + change.reshape(before.shape)).to(before.dtype)
            self._check_finite(name, site, value, before)
            if site.bias is not None and index is not None:
                _set_bias_operand(edit, site, index, edit.program.placeholder(name))
            if not torch.equal(value, edit.program.tensor(name)):
                readers = _other_readers(edit.program, site, name)
                if readers:
                    raise RewriteError(
                        f"{site.path} cannot be merged: its bias {name} is also read elsewhere",
                        evidence=[f"read by %{node.name}" for node in readers[:6]],
                        fix="Give the layer a bias of its own before tracing.",
                    )
                _set_once(edit, name, value)
        elif bool(change.any()):
            if index is None or site.base.target is aten.addmm.default:
                raise RewriteError(f"{site.path} has no bias to take the update's constant part")
            made = edit.parameter(f"{site.path}.bias", change.to(site.base.meta["val"].dtype), trainable=False)
            _set_bias_operand(edit, site, index, made)

    def _check_finite(self, name: str, site: Fold, value: torch.Tensor, base: torch.Tensor) -> None:
        bad = int((~torch.isfinite(value.to(base.dtype))).sum())
        if bad and not self.allow_nonfinite:
            raise LawError(
                f"{name} would hold {bad} non-finite values after the merge",
                evidence=[f"folded from: {', '.join(sorted(site.reads)[:6])}"],
                fix="Repair the adapter or the base, or pass --allow-nonfinite.",
            )


def _is_covered(program: Program, fold: Fold, stands: Mapping[str, StandIn]) -> bool:
    """Whether a region holds nothing but a weight, and a bias, whose places constants hold, and others read it, too."""
    if fold.weight not in stands or not _other_readers(program, fold):
        return False
    bias = fold.bias or ""
    return fold.reads <= stands[fold.weight].reads | (stands[bias].reads if bias in stands else {bias})


def _ends(site: Fold) -> Iterator[Node]:
    """The end of the region, and the casts that change nothing from there back to what was proven."""
    node = site.end
    while node is not site.kept:
        yield node
        if node is site.proven:
            return
        source = node.args[0]
        assert isinstance(source, Node)
        node = source


def _as_stored(program: Program, site: Fold, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The region's weight [o, i] in the layout the parameter is stored in."""
    if site.base.target in CONVOLUTIONS:
        return weight
    product = grouped(site.base)
    as_given = site.base.target in STORED_AS_GIVEN if product is None else not product.inputs_first
    bare = weight_of(program, weight_operand(site.base))
    if bare is not None:
        turned = bare[1]
    else:
        _, value, turned = _computed(site.base)
        turned ^= tuple(value.meta["val"].shape) != tuple(base.shape)
    return weight if as_given != turned else weight.transpose(-2, -1)


def _computed(base: Node) -> tuple[Node, Node, bool]:
    """(reader, value, transposed): the computed weight of an operation without the transposition it is read through."""
    reader, value, transposed = base, weight_operand(base), False
    while swaps(value):
        reader, value, transposed = value, value.args[0], not transposed
    return reader, value, transposed


def _rounding(exact: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
    """The size of the update, and the error of rounding it into the weight's type, both relative."""
    update = exact - base.detach().to(exact.dtype)
    size = float(update.norm())
    error = float((exact.to(base.dtype).to(exact.dtype) - exact).norm())
    whole = float(base.detach().to(exact.dtype).norm())
    return {"update": size / whole if whole else 0.0, "error_of_update": error / size if size else 0.0}


def _set_once(edit: Edit, name: str, value: torch.Tensor) -> None:
    """Set a folded tensor; a module that is called twice must fold to one value."""
    if name in edit.originals and not torch.equal(edit.program.tensor(name), value):
        raise RewriteError(f"{name} is applied twice, with updates that differ", fix="Give each call its own weight.")
    edit.set_value(name, value)


def _set_weight(edit: Edit, site: Fold, value: torch.Tensor) -> Node:
    """Put the folded weight under its name, and under the names tied to it that nothing else reads."""
    program = edit.program
    group = next((group for group in program.tied() if site.weight in group), ())
    _set_once(edit, site.weight, value)
    for name in group:
        if name != site.weight and not _reads_name(program, name):
            edit.originals.setdefault(name, program.tensor(name))
            program.store(name, program.tensor(site.weight))
    return program.placeholder(site.weight)


def _reads_name(program: Program, name: str) -> bool:
    return bool(program.placeholder(name).users)


def _own_weight(edit: Edit, site: Fold, value: torch.Tensor) -> Node:
    """A tensor for the merged layer alone, under its own name where a tied one is free; the others keep theirs."""
    program = edit.program
    group = next((g for g in program.tied() if site.weight in g), (site.weight,))
    mine = f"{site.path}.weight"
    shared = program.placeholder(site.weight)
    if mine == site.weight:  # the graph reads the tied tensor under this layer's name: move the others
        free = [name for name in group if name != mine and not _reads_name(program, name)]
        if free:
            other = program.placeholder(free[0])
            for node in [user for user in shared.users if user not in site.together]:
                edit.rewire(node, shared, other)
            edit.set_value(mine, value)
            return shared
    elif mine in group and not _reads_name(program, mine):
        edit.set_value(mine, value)
        return program.placeholder(mine)
    name = mine if mine not in program.tensors else f"{mine}_merged"
    if name in edit.added:  # an earlier call of the same module made it
        _set_once(edit, name, value)
        return program.placeholder(name)
    return edit.parameter(name, value, trainable=False)


def _apply_weight(edit: Edit, site: Fold, operand: Node) -> None:
    """Let the base operation read the folded weight, through the transposition it read its weight through before."""
    if weight_of(edit.program, weight_operand(site.base)) is not None:
        reader, value = site.base, weight_operand(site.base)
        while value.op != "placeholder":
            reader, value = value, value.args[0]
        if value is not operand:
            edit.rewire(reader, value, operand)
        return
    reader, value, _ = _computed(site.base)
    if value.meta["val"].shape != operand.meta["val"].shape:
        operand = _transposed(edit, site, operand)
    edit.rewire(reader, value, operand)
    edit.erase([value, *_unread(edit.program, site)])


def _transposed(edit: Edit, site: Fold, operand: Node) -> Node:
    operation, dims = (aten.t.default, ()) if operand.meta["val"].ndim == 2 else (aten.transpose.int, (-2, -1))
    return edit.call(operation, operand, *dims, like=site.base, label="weight_t", before=True)


def _unread(program: Program, site: Fold) -> list[Node]:
    """Operations on the region's parameters whose results nobody reads: a weight computed once more than needed."""
    todo, seen = [program.placeholder(name) for name in site.reads], set[Node]()
    while todo:
        new = {user for user in todo.pop().users if user in site.constants.leaves} - seen
        seen |= new
        todo.extend(new)
    return [node for node in seen if not node.users]


def _set_bias_operand(edit: Edit, site: Fold, index: int, node: Node) -> None:
    """Let the base operation read a parameter as its bias, instead of what computed the bias."""
    before = site.base.args[index] if index < len(site.base.args) else None
    bare = weight_of(edit.program, before)
    if bare is not None and edit.program.placeholder(bare[0]) is node:
        return
    edit.set_argument(site.base, index, node)
    if isinstance(before, Node):
        edit.erase([before])  # the computation of the bias, when nothing else reads it


def _other_readers(program: Program, site: Fold, name: str = "") -> list[Node]:
    """The operations that read a folded weight (or the tensor `name`) and are not folded with it."""
    constants = site.constants
    todo, seen, outside = [program.placeholder(name or site.weight)], set[Node](), []
    while todo:
        for user in todo.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user in constants.leaves:
                todo.append(user)
            elif user not in site.together and user is not site.kept:
                outside.append(user)
    return sorted(outside)
