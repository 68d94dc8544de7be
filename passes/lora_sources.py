"""LoRAs that a pass takes out of a program, and the one it puts in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from passes import combine
from passes.combine import Update
from passes.lora import Lora
from passes.peft_branches import Branch, adapters, branches, stacked
from passes.peft_place import ParameterSite
from rewriter.edit import Edit
from rewriter.errors import RewriteError, UsageError
from rewriter.program import Origin, Program, Step
from rewriter.view import Conv, Embedding, Linear, Site, scope


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter: its name, the steps that made it, and its branch beside each layer or slice of one."""

    adapter: str
    steps: tuple[Step, ...]
    branches: tuple[Branch, ...]

    @property
    def numbers(self) -> frozenset[int]:
        return frozenset(step.number for step in self.steps)


@dataclass(frozen=True, slots=True)
class Shared:
    """A layer, or a slice of one, and the branches there: one for each source that has one, with the source's index."""

    site: Site
    branches: tuple[tuple[int, Branch], ...]

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def label(self) -> str:
        part = self.site.part if isinstance(self.site, Linear) else None
        return f"{self.path}.{part.name}" if part else self.path


# -- reading ------------------------------------------------------------------------------------------------------


def sources(program: Program, names: Sequence[str]) -> tuple[Source, ...]:
    """The adapters of these names, or all of them.

    Raises `UsageError` for a name the program has no LoRA of, `RewriteError` for one that changed the weights beside it
    and for one whose numbers are not there.
    """
    known = adapters(program)
    for name in names or known:
        if name not in known:
            raise UsageError(
                f"the program has no LoRA named {name!r}",
                evidence=[f"it has: {', '.join(known) or 'none'}"],
                fix="Apply one first, or name one of these.",
            )
    if not known:
        raise UsageError("the program has no LoRA", fix="Apply one first: the pass lora, or a PEFT directory.")
    found = [
        Source(name, tuple(known[name]), tuple(branches(program, known[name], name, whole=False)))
        for name in names or known
    ]
    for source in found:
        _refuse_moved_weights(source)
    return tuple(found)


def _refuse_moved_weights(source: Source) -> None:
    for branch in source.branches:
        name = branch.site.weight
        if any(tensor.device.type == "meta" for tensor in branch.tensors.values()):
            raise RewriteError(f"the adapter {source.adapter} has no values yet", fix="Load its weights first.")
        if any(name in step.originals and name not in step.trainable for step in source.steps):
            raise RewriteError(
                f"the adapter {source.adapter} took its start out of {name}, so its A and B are not its update",
                evidence=["init=pissa and init=olora do that"],
                fix="Write it as a PEFT directory, which makes a plain LoRA of it, and apply that to the base model.",
            )


def shared(found: Sequence[Source]) -> list[Shared]:
    """The branches of all sources, layer by layer; where one has a whole layer, the slices of others are stacked."""
    layers: dict[tuple[str, str], list[tuple[int, Branch]]] = {}
    for index, source in enumerate(found):
        for branch in source.branches:
            layers.setdefault((branch.site.path, branch.site.kind), []).append((index, branch))
    return [each for held in layers.values() for each in _by_slice(held)]


def _by_slice(held: list[tuple[int, Branch]]) -> Iterator[Shared]:
    whole = next((branch.site for _, branch in held if _part(branch) is None), None)
    if whole is None:
        parts: dict[str, list[tuple[int, Branch]]] = {}
        for index, branch in held:
            parts.setdefault(str(_part(branch)), []).append((index, branch))
        yield from (Shared(group[0][1].site, tuple(group)) for group in parts.values())
        return
    of_source: dict[int, list[Branch]] = {}
    for index, branch in held:
        of_source.setdefault(index, []).append(branch)
    yield Shared(
        whole,
        tuple((i, some[0] if _part(some[0]) is None else stacked(whole, some)) for i, some in of_source.items()),
    )


def _part(branch: Branch) -> object:
    return branch.site.part if isinstance(branch.site, Linear) else None


# -- options ------------------------------------------------------------------------------------------------------


def check_adapter(name: object) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise UsageError(f"adapter is {name!r}", fix="A name without dots.")


def check_rank(rank: object) -> None:
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise UsageError(f"rank is {rank!r}", fix="A rank is a whole number of at least 1.")


def check_density(density: object) -> None:
    fits = isinstance(density, (int, float)) and not isinstance(density, bool) and 0 < density <= 1
    if density is not None and not fits:
        raise UsageError(f"density is {density!r}", fix="A share above 0 and at most 1.")


# -- what else an adapter trained ---------------------------------------------------------------------------------


def trained_base(program: Program, found: Sequence[Source]) -> dict[str, dict[str, torch.Tensor]]:
    """Parameter of the base -> adapter -> its value under that adapter, for all the sources trained or brought."""
    result: dict[str, dict[str, torch.Tensor]] = {}
    for source in found:
        for step in source.steps:
            for name in dict.fromkeys([*step.trainable, *step.originals]):
                if name not in step.added and name in program.tensors:
                    result.setdefault(name, {})[source.adapter] = _value_after(program, step, name)
    return result


def _value_after(program: Program, step: Step, name: str) -> torch.Tensor:
    later = (other.originals[name] for other in program.steps if other.number > step.number and name in other.originals)
    return next(later, program.tensor(name))


def kept_base(program: Program, found: Sequence[Source]) -> list[ParameterSite]:
    """What the sources trained or brought of the base, as sites of the step that takes their place."""
    trained = {name for source in found for step in source.steps for name in step.trainable}
    return [
        ParameterSite(name, None if name in trained else program.tensor(name), name in trained, alone=False)
        for name in trained_base(program, found)
    ]


# -- the graph ----------------------------------------------------------------------------------------------------


def refuse_buried(site: Site, numbers: frozenset[int]) -> None:
    """Refuse sources whose sums something else than a plain LoRA builds on: it would read another value after.

    Sums of plain LoRAs may change places; a DoRA rescales what lies below it, so one that goes must be the last.
    """
    for call in site.calls:
        above = list(_above(call))
        first = next((i for i, node in enumerate(above) if _origin(node).step in numbers), len(above))
        for node in above[first:]:
            if not _is_plain(node) and not (node is above[first] is above[-1]):
                raise RewriteError(
                    f"{site.path}: {_origin(node).name} (step {_origin(node).step}) builds on the sum with the LoRA",
                    evidence=[f"%{node.name} reads it"],
                    fix="Undo that step first, and apply it again after.",
                )


def remove(site: Site, numbers: frozenset[int], edit: Edit) -> None:
    """Take the branches of these steps away from a layer, with their parameters."""
    for call in site.calls:
        for node in [node for node in _above(call) if _origin(node).step in numbers]:
            base = node.args[0]
            assert isinstance(base, Node)
            for user in node.users:
                origin = Origin.of(user)
                if origin is not None and origin.stands_for == node.name:
                    Origin(origin.step, origin.name, origin.label, base.name).write(user)
            edit.redirect(node, base)
            edit.erase([node])


def insert(
    site: Site, tensors: Mapping[str, torch.Tensor], scale: float, dropout: float, adapter: str, edit: Edit
) -> None:
    """Put a LoRA with these tensors beside a layer, or on a slice of it."""
    rank_axis = 1 if site.kind == "experts" else 0
    rank = next(value.shape[rank_axis] for kind, value in tensors.items() if kind in ("lora_A", "lora_embedding_A"))
    lora = Lora(
        targets=(site.path,),
        rank=rank,
        alpha=scale * rank,
        dropout=dropout,
        dora="lora_magnitude_vector" in tensors,
        lora_bias="lora_B_bias" in tensors,
        adapter=adapter,
    )
    lora.rewrite(site, edit)
    part = site.part if isinstance(site, Linear) else None
    for kind, value in tensors.items():
        name = ".".join([scope(edit.program, site.path), kind, adapter, *([part.name] if part else [])])
        edit.program.store(name, value.to(edit.program.tensor(name).dtype).contiguous())


def factors(branch: Branch) -> Update:
    """A and B of a branch as a stack, without its scale."""
    kind = _kind(branch.site)
    return combine.read(branch.site, branch.tensors[f"{kind}A"], branch.tensors[f"{kind}B"])


def tensors_of(site: Site, update: Update, like: Branch) -> dict[str, torch.Tensor]:
    """A and B of an update by their names; a convolution's A gets the kernel of the branch `like`."""
    kernel = tuple(like.tensors["lora_A"].shape[2:]) if isinstance(site, Conv) else ()
    a, b = combine.written(site, update, kernel)
    return {f"{_kind(site)}A": a, f"{_kind(site)}B": b}


def rank_of_each(site: Site, rank: int) -> int:
    """The rank of each matrix of a layer's stack: a grouped convolution shares its rank among its groups."""
    groups = site.groups if isinstance(site, Conv) else 1
    if rank % groups:
        raise UsageError(f"{site.path}: rank {rank} is not a multiple of its {groups} groups", fix="Choose another.")
    return rank // groups


def _kind(site: Site) -> str:
    return "lora_embedding_" if isinstance(site, Embedding) else "lora_"


def _above(call: Node) -> Iterator[Node]:
    """The values that stand, one on the other, where the operation stood."""
    node: Node | None = call
    while node is not None:
        below = node
        node = next((user for user in below.users if (o := Origin.of(user)) and o.stands_for == below.name), None)
        if node is not None:
            yield node


def _origin(node: Node) -> Origin:
    origin = Origin.of(node)
    assert origin is not None
    return origin


def _is_plain(node: Node) -> bool:
    """Whether a value is the sum of what was there and a LoRA's update."""
    update = node.args[1] if len(node.args) > 1 else None
    if not isinstance(update, Node) or (origin := Origin.of(update)) is None:
        return False
    return _origin(node).label.startswith("lora_sum") and origin.label.startswith(("lora_scaled", "lora_placed"))
