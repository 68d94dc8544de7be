"""Which sublayer of a program each adapter of the `adapters` library belongs to, whatever the modules are called."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from passes.adapter_config import names_of
from passes.adapter_place import Kind, Sublayer
from rewriter.errors import RewriteError

# The modules that hold a block's adapters, where the library gives them a name of their own.
HOLDERS: dict[str, Kind] = {
    "attention_adapters": "attention",
    "cross_attention_adapters": "cross",
    "output_adapters": "feed_forward",
}
_MODEL = "Use the model this adapter was trained on; `rewriter inspect MODEL` lists its layers."


@dataclass(frozen=True, slots=True)
class Spot:
    """A module path as a block of a stack of blocks and the path within it: `encoder.layer`, 3, `output.dense`."""

    stack: str
    number: int
    inside: tuple[str, ...]

    @property
    def block(self) -> tuple[str, int]:
        return self.stack, self.number


def spot(path: str) -> Spot:
    """Where a path stands; the first number in it counts the blocks.

    Raises `RewriteError` when it has no number.
    """
    found = re.fullmatch(r"(?:(.*?)\.)?(\d+)\.(.+)", path)
    if found is None:
        raise RewriteError(f"{path} is in no numbered block", fix=_MODEL)
    return Spot(found[1] or "", int(found[2]), tuple(found[3].split(".")))


def saved_names(options: Mapping[str, Any]) -> dict[str, str]:
    """The names of the tensors that the library saves of one adapter -> ours; a norm before it is saved twice."""
    names = names_of(options)
    first = {f"adapter_down.0.{leaf}": f"norm_before.{leaf}" for leaf in ("weight", "bias")}
    return {**names, **first} if options["ln_before"] else names


def without_blocks(sites: Sequence[Sublayer], left_out: Collection[int]) -> list[Sublayer]:
    """The sublayers of the blocks whose number, counted through encoder and decoder, is not left out."""
    blocks = block_order(sites)
    return [site for site in sites if blocks.index(spot(site.path).block) not in left_out]


def block_order(sites: Sequence[Sublayer]) -> list[tuple[str, int]]:
    """The blocks of a program in the order of its data, which the numbers in their paths have to agree with."""
    blocks = list(dict.fromkeys(spot(site.path).block for site in sites))
    stacks = list(dict.fromkeys(stack for stack, _ in blocks))
    for stack in stacks:
        numbers = [number for other, number in blocks if other == stack]
        if numbers != sorted(numbers):
            raise RewriteError(
                f"the blocks of {stack} do not run in the order of their numbers",
                evidence=[f"order: {', '.join(map(str, numbers))}"],
                fix="Trace the model as it was trained.",
            )
    return [block for stack in stacks for block in blocks if block[0] == stack]


def match(paths: Sequence[str], sites: Sequence[Sublayer]) -> dict[str, Sublayer]:
    """Path of an adapter -> the sublayer it belongs to, each exactly once.

    Blocks are matched by stack and number, within a block by the kind of sublayer that the path names or by the longest
    shared path. Raises `RewriteError` when a path has no sublayer, two have the same one, or a sublayer has none.
    """
    spots = {path: spot(path) for path in paths}
    here = {site.path: spot(site.path) for site in sites}
    stacks = _stacks([each.stack for each in spots.values()], [each.stack for each in here.values()])
    found: dict[str, Sublayer] = {}
    lost: list[str] = []
    for path, there in spots.items():
        block = [site for site in sites if here[site.path].block == (stacks.get(there.stack), there.number)]
        site = _in_block(there, block, here)
        if site is None:
            lost.append(path)
        elif site in found.values():
            other = next(known for known in found if found[known] == site)
            raise RewriteError(f"{other} and {path} are both the adapter of {site.path}", fix=_MODEL)
        else:
            found[path] = site
    missing = [site.path for site in sites if site not in found.values()]
    if lost or missing:
        lines = [*(f"no place: {path}" for path in lost[:6]), *(f"no tensors: {path}" for path in missing[:6])]
        raise RewriteError(
            f"{len(lost)} of {len(paths)} adapters have no place in the program, {len(missing)} of {len(sites)} "
            "places no tensors",
            evidence=lines,
            fix=_MODEL,
        )
    return found


def _in_block(there: Spot, block: Sequence[Sublayer], here: dict[str, Spot]) -> Sublayer | None:
    holder = there.inside[-1]
    if holder in HOLDERS:
        fitting = [site for site in block if site.kind == HOLDERS[holder]]
        return fitting[0] if len(fitting) == 1 else None
    shared = {site.path: _shared(there.inside, here[site.path].inside) for site in block}
    most = max(shared.values(), default=0)
    fitting = [site for site in block if shared[site.path] == most]
    return fitting[0] if most and len(fitting) == 1 else None


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many names two paths begin with alike."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _stacks(theirs: Sequence[str], ours: Sequence[str]) -> dict[str, str]:
    """The stack here of every stack there: the only one, or the one that shares most words of its path."""
    named, known = list(dict.fromkeys(theirs)), list(dict.fromkeys(ours))
    if len(named) == len(known) == 1:
        return {named[0]: known[0]}
    result: dict[str, str] = {}
    for stack in named:
        words = {other: len({*stack.split(".")} & {*other.split(".")}) for other in known}
        best = [other for other in known if words[other] == max(words.values())]
        if len(best) == 1 and words[best[0]] and best[0] not in result.values():
            result[stack] = best[0]
    return result
