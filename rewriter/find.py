"""Targets -> the layers they mean, as PEFT matches them; and what did not match, with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import regex
from torch.fx import Node

from rewriter.attention import Attention, attentions, is_output_head, mlp_layers
from rewriter.errors import UsageError, closest
from rewriter.program import Origin, Program
from rewriter.view import Layer, Linear, Linear4bit, Site, layers, modules

V = TypeVar("V")
Targets = str | Sequence[str]
REGEX_SECONDS = 2.0
SELECTORS = (
    "@attention",
    "@attention.query",
    "@attention.key",
    "@attention.value",
    "@attention.output",
    "@mlp",
)


@dataclass(frozen=True, slots=True)
class Miss:
    """A place that looked like a site and is none, with the reason."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Sites(Generic[V]):
    """What a pass found: the sites it will rewrite, and the misses with their reasons."""

    found: tuple[V, ...]
    missed: tuple[Miss, ...] = ()

    def __iter__(self) -> Iterator[V]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def select(
    program: Program,
    targets: Targets,
    *,
    kinds: tuple[type[Layer], ...],
    exclude: Targets = (),
    layers_to_transform: Sequence[int] = (),
    layers_pattern: str | None = None,
) -> Sites[Site]:
    """The layers that `targets` mean, in program order.

    A sequence of names matches as PEFT's list does (`path == name` or `path` ends with `.name`), a string matches as
    PEFT's string does (`re.fullmatch` on the whole path), `"all-linear"` means every linear layer but the output
    embedding, and `@attention.query`, `@mlp`, … select by data flow, whatever the modules are called.

    Raises `UsageError` when any one target matches nothing, names a module that is no supported layer, or is given
    twice.
    """
    found = layers(program)
    matchers = _matchers(program, targets, found)
    excluded = {path for name in _listed(exclude) for path in found if _matches(exclude, name, path)}
    chosen: dict[tuple[str, object], Site] = {}
    missed: list[Miss] = []
    for target, match in matchers.items():
        hits = match()
        usable = [site for site in hits if _is_of(site, kinds)]
        if not usable:
            raise _unmatched(program, target, hits, kinds, found)
        for site in hits:
            if not _is_of(site, kinds):
                missed.append(Miss(site.path, f"{_noun(site)} is not supported by this pass"))
            elif site.path in excluded:
                missed.append(Miss(site.path, "excluded"))
            elif not _layer_wanted(site.path, layers_to_transform, layers_pattern):
                missed.append(Miss(site.path, "not among the layers to transform"))
            else:
                chosen.setdefault((site.path, getattr(site, "part", None)), site)
    patched = next((site for site in chosen.values() if site.patched), None)
    if patched is not None:
        name = next((o.name for node in patched.calls for o in _origins(node)), "")
        raise UsageError(
            f"{patched.path} applies a weight that the pass {name} computes",
            evidence=["a second change of this layer would act on the weight as it was before"],
            fix=f"Merge or undo {name} first, or name other layers.",
        )
    if not chosen:
        raise UsageError(
            f"targets {_shown(targets)} match only layers that are excluded",
            evidence=[f"{miss.path}: {miss.reason}" for miss in missed[:6]],
            fix="Loosen the exclusion or the list of layers.",
        )
    order = {path: index for index, path in enumerate(found)}
    return Sites(tuple(sorted(chosen.values(), key=lambda s: order.get(s.path, 0))), tuple(missed))


def _is_of(site: Site, kinds: tuple[type[Layer], ...]) -> bool:
    """Whether a layer is of a kind; one held in 4 bits is a linear layer only to a pass that says so."""
    return isinstance(site, kinds) and (not isinstance(site, Linear4bit) or Linear4bit in kinds)


def _origins(call: Node) -> list[Origin]:
    return [origin for source in call.all_input_nodes if (origin := Origin.of(source)) is not None]


def parse_targets(text: str) -> Targets:
    """What `--targets` means: a list of names, or a regular expression when it has a character names cannot have."""
    if text == "all-linear":
        return text
    if re.search(r"[\\*+?()\[\]|^${}]", text):
        return text
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _listed(targets: Targets) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else tuple(targets)


def _shown(targets: Targets) -> str:
    return ", ".join(_listed(targets))


def _matches(targets: Targets, target: str, path: str) -> bool:
    if isinstance(targets, str):
        return full_match(target, path)
    return path == target or path.endswith("." + target)


def full_match(pattern: str, path: str) -> bool:
    """`re.fullmatch` that gives up on a pattern that backtracks without end."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"{pattern!r} is not a regular expression: {error}", fix="Quote the pattern, or give names with commas."
        ) from None
    try:
        return regex.fullmatch(pattern, path, timeout=REGEX_SECONDS) is not None
    except TimeoutError:
        raise UsageError(
            f"the pattern {pattern!r} takes too long on {path!r}",
            fix="Rewrite it without nested repetition such as (a+)+.",
        ) from None


def _matchers(program: Program, targets: Targets, found: dict[str, Site]) -> dict[str, Callable[[], list[Site]]]:
    names = _listed(targets)
    if not names:
        raise UsageError("no target given", fix=f"Give layer names, all-linear, or one of {', '.join(SELECTORS)}.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"target {twice[0]!r} is given twice", fix="Give every target once.")

    def matcher(name: str) -> Callable[[], list[Site]]:
        if name.startswith("@"):
            return lambda: _by_flow(program, name, found)
        if name == "all-linear" and (isinstance(targets, str) or len(names) == 1):
            return lambda: _all_linear(found)
        return lambda: [site for path, site in found.items() if _matches(targets, name, path)]

    return {name: matcher(name) for name in names}


def _all_linear(found: dict[str, Site]) -> list[Site]:
    return [s for s in found.values() if isinstance(s, Linear) and not is_output_head(s, found)]


def _by_flow(program: Program, selector: str, found: dict[str, Site]) -> list[Site]:
    if selector not in SELECTORS:
        raise UsageError(f"unknown selector {selector!r}", evidence=[f"known: {', '.join(SELECTORS)}"])
    if selector == "@mlp":
        return list(mlp_layers(program, found))
    roles = [selector.partition(".")[2]] if "." in selector else ["query", "key", "value", "output"]
    result: dict[tuple[str, object], Site] = {}
    for attention in attentions(program, found):
        for role in roles:
            for site in projections(attention, role):
                result[(site.path, site.part)] = site
    return list(result.values())


def projections(attention: Attention, role: str) -> tuple[Linear, ...]:
    """The projections of one role: query, key, value or output."""
    sites: tuple[Linear, ...] = getattr(attention, role)
    return sites


def fused_parts(program: Program, site: Linear, names: Sequence[str]) -> list[Linear]:
    """The named slices (`q`, `query`, …) of a fused projection, found from the attention that reads them.

    Raises `UsageError` when the layer feeds no attention or has no such slice.
    """
    full = {"q": "query", "k": "key", "v": "value"}
    parts: dict[str, Linear] = {}
    for attention in attentions(program):
        for role in ("query", "key", "value"):
            for view in projections(attention, role):
                if view.weight == site.weight and view.part is not None:
                    parts[role] = view
    missing = [name for name in names if full.get(name, name) not in parts]
    if missing:
        raise UsageError(
            f"{site.path} has no slice {missing[0]!r}",
            evidence=[f"slices found from the attention: {', '.join(parts) or 'none'}"],
            fix="`enable` is for one fused projection of query, key and value whose rows lie together.",
        )
    return [replace(parts[full.get(name, name)], calls=site.calls) for name in names]


def _layer_wanted(path: str, wanted: Sequence[int], pattern: str | None) -> bool:
    if not wanted:
        return True
    if pattern:
        number = re.search(rf"(?:^|\.){re.escape(pattern)}\.(\d+)(?:\.|$)", path)
    else:
        number = re.search(r"\.(\d+)\.", "." + path)
    return number is not None and int(number.group(1)) in wanted


def _unmatched(
    program: Program, target: str, hits: list[Site], kinds: tuple[type[Layer], ...], found: dict[str, Site]
) -> UsageError:
    wanted = ", ".join(kind.__name__ for kind in kinds)
    if hits:
        bits4 = isinstance(hits[0], Linear4bit)
        return UsageError(
            f"target {target!r} matches {hits[0].path}, which is {_article(_noun(hits[0]))}",
            evidence=[f"this pass works on: {wanted}"],
            fix=f"Name another layer, or {'apply dequantise first' if bits4 else 'use a pass that supports this one'}.",
        )
    known = modules(program)
    layer = next((path for path in found if path.endswith("." + target)), None)
    if layer is not None:  # only a pattern misses a layer that ends with it
        return UsageError(
            f"the pattern {target!r} matches no layer: it is held against the whole path, such as {layer}",
            fix=f"Give a sequence of names, or the pattern '.*{target}'.",
        )
    named = [path for path in known if path == target or path.endswith("." + target)]
    if named and not target.startswith("@"):
        inside = [path for path in found if path.startswith(named[0] + ".")]
        kind = known[named[0]].rsplit(".", 1)[-1] or "module"
        return UsageError(
            f"target {target!r} matches {named[0]}, which is {_article(kind)} and no layer with a weight of its own",
            evidence=[f"layers inside it: {', '.join(inside[:6])}"] if inside else [],
            fix=f"Name layers of these kinds: {wanted}.",
        )
    near = closest(target, list(found) or list(known))
    tails = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in (near or list(found)[:8])))
    return UsageError(
        f"target {target!r} matches no layer of the program",
        evidence=[f"closest: {', '.join(tails)}"] if tails else ["the program has no layer at all"],
        fix="Every target must match. Correct the name; `rewriter inspect MODEL` lists the layers.",
    )


def _noun(site: Layer) -> str:
    return "linear layer held in 4 bits" if isinstance(site, Linear4bit) else site.kind


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
