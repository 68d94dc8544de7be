"""Where the tensors of a PEFT adapter go in a program whose modules may be wrapped differently."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from passes.lora import Lora
from passes.saved_modules import untie
from rewriter.edit import Edit
from rewriter.errors import RewriteError
from rewriter.formats.peft import PeftFiles
from rewriter.program import Program
from rewriter.view import Conv, Embedding, Linear, Site, layers, modules


@dataclass(frozen=True, slots=True)
class LayerSite:
    """A layer that gets a LoRA with trained tensors, by kind."""

    site: Site
    lora: Lora
    tensors: Mapping[str, torch.Tensor]

    @property
    def path(self) -> str:
        return self.site.path

    def rewrite(self, edit: Edit) -> None:
        self.lora.rewrite(self.site, edit)
        for kind, value in self.tensors.items():
            name = f"{self.path}.{kind}.{self.lora.adapter}"
            before = edit.program.tensor(name)
            if before.shape != value.shape:
                raise misfit(f"{self.path}: {kind}", before.shape, value.shape)
            edit.program.store(name, value.to(before.dtype))


@dataclass(frozen=True, slots=True)
class ParameterSite:
    """A parameter of the base model that the adapter brings (`value`), trains, or both."""

    path: str
    value: torch.Tensor | None
    trains: bool
    alone: bool  # a tied name takes the value without the names it was tied with

    def rewrite(self, edit: Edit) -> None:
        if self.alone:
            untie(edit, self.path)
        names = next((list(group) for group in edit.program.tied() if self.path in group), [self.path])
        if self.trains:
            edit.train(self.path)
        if self.value is None:
            return
        before = edit.program.tensor(self.path)
        value = self.value.to(before.dtype)
        if isinstance(before, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=False)
        for name in names:
            edit.set_value(name, value)


class Place:
    """One way to rename an adapter's module paths so that every tensor has a place: `drop` goes, `add` comes before."""

    def __init__(self, files: PeftFiles, program: Program, drop: str, add: str) -> None:
        self.files, self.program, self.drop, self.add = files, program, drop, add

    def __str__(self) -> str:
        return f"{self.drop!r} was dropped" if self.drop else f"{self.add!r} was put before every name"

    @property
    def identity(self) -> bool:
        return not self.drop and not self.add

    @property
    def paths(self) -> list[str]:
        """The adapted modules, as the adapter calls them."""
        return [path for path in self.files.modules if path]

    def there(self, path: str) -> str:
        """A path of the adapter as the program calls it."""
        return self.add + path.removeprefix(self.drop)

    def here(self, path: str) -> str:
        """A path of the program as the adapter calls it."""
        return self.drop + path.removeprefix(self.add)

    @cached_property
    def unplaced(self) -> list[str]:
        """The names in the adapter that have no place."""
        known, tensors = modules(self.program), self.program.tensors
        lost = [path for path in self.paths if not path.startswith(self.drop) or self.there(path) not in known]
        return lost + [n for n in self.files.base if not n.startswith(self.drop) or self.there(n) not in tensors]

    @cached_property
    def idle(self) -> frozenset[str]:
        """Adapter paths of modules that the program holds but never runs."""
        found = {site.path for site in layers(self.program).values()}
        unused = {
            name.rpartition(".")[0]
            for node in self.program.graph.nodes
            if (name := self.program.parameter_name(node)) and name.endswith(".weight") and not node.users
        }
        return frozenset(p for p in self.paths if self.there(p) not in found and self.there(p) in unused)

    def tied(self, path: str) -> set[str]:
        """The other modules, as the adapter calls them, that share the weight of one."""
        weight = f"{self.there(path)}.weight"
        groups = (group for group in self.program.tied() if weight in group)
        return {self.here(name.rpartition(".")[0]) for group in groups for name in group if name != weight}

    def saves(self, name: str) -> bool:
        """Whether `modules_to_save` entry `name` has a saved tensor."""
        one = self.files.config.model_copy(update={"modules_to_save": [name]})
        return any(one.saves(key.rpartition(".")[0]) for key in self.files.base)

    def layer(self, lora: Lora, path: str) -> LayerSite | None:
        """The site of one adapted module; None for one that the program never runs."""
        if path in self.idle:
            return None
        tensors = self.files.modules[path]
        embeds = "lora_embedding_A" in tensors
        there = self.there(path)
        sites = [site for site in layers(self.program).values() if site.path == there]
        site = next((site for site in sites if isinstance(site, Embedding) is embeds), None)
        if site is None:
            seen = sites[0].kind if sites else modules(self.program)[there] or "module"
            raise RewriteError(
                f"{there}: a LoRA of {'an embedding' if embeds else 'a linear or convolution layer'} does not fit here",
                evidence=[f"the program has: {seen}"],
                fix="Use the model this adapter was trained on.",
            )
        _check_shapes(site, lora, tensors)
        return LayerSite(site, lora, tensors)

    def parameters(self, trained: Collection[str]) -> list[ParameterSite]:
        """The parameters of the base that the adapter brings, or trains as `trained` says, in the adapter's order."""
        config, tensors = self.files.config, self.program.tensors
        result = []
        for key, value in self.files.base.items():
            name = self.there(key)
            if tensors[name].shape != value.shape:
                raise misfit(name, tensors[name].shape, value.shape)
            saved = config.saves(key.rpartition(".")[0])
            if name in trained or not torch.equal(tensors[name].to(value.dtype), value):
                result.append(ParameterSite(name, value, name in trained, alone=saved))
        named = {site.path for site in result}
        missing = sorted({*trained} - named)
        lost = [name for name in missing if config.saves(self.here(name).rpartition(".")[0])]
        if lost:
            raise RewriteError(
                f"{self.files.directory}: modules_to_save without their weights",
                evidence=lost[:8],
                fix="The adapter is incomplete: save or download it again.",
            )
        return [*result, *(ParameterSite(name, None, True, alone=False) for name in missing)]


def place(files: PeftFiles, program: Program) -> Place:
    """The one renaming under which every tensor of the adapter has a place.

    Raises `RewriteError` when there is none, naming what has no place, and when there are several.
    """
    same = Place(files, program, "", "")
    if not same.unplaced:  # also what names no module at all
        return same
    names = [*same.paths, *files.base]
    starts = _starts(names[0])
    shared = [start for start in starts if all(name.startswith(start) for name in names)]
    tries = [Place(files, program, start, "") for start in shared]
    tries += [Place(files, program, "", path + ".") for path in modules(program)]
    fits = [each for each in tries if not each.unplaced]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise RewriteError(
            f"{files.directory} fits the program in {len(fits)} ways",
            evidence=[f"{names[0]} -> {each.there(names[0])}" for each in fits[:6]],
            fix="Trace the part of the model that is meant.",
        )
    best = min([same, *tries], key=lambda each: len(each.unplaced))
    lost = best.unplaced
    raise RewriteError(
        f"{files.directory}: {len(lost)} of {len(names)} modules and tensors have no place in the program",
        evidence=[*lost[:8], *([f"and {len(lost) - 8} more"] if len(lost) > 8 else [])],
        fix="Use the model this adapter was trained on; `rewriter inspect MODEL` lists its layers.",
    )


def _starts(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) + "." for n in range(1, len(parts))]


def _check_shapes(site: Site, lora: Lora, tensors: Mapping[str, torch.Tensor]) -> None:
    rank = lora.rank_of(site)
    embeds = isinstance(site, Embedding)
    a = tensors["lora_embedding_A" if embeds else "lora_A"]
    b = tensors["lora_embedding_B" if embeds else "lora_B"]
    if isinstance(site, Conv):
        have = [tuple(a.shape[:2]), tuple(b.shape[:2])]
        want = [(rank, site.in_features), (site.out_features, rank // site.groups)]
    else:
        have, want = [tuple(a.shape), tuple(b.shape)], [(rank, site.in_features), (site.out_features, rank)]
    if have == want:
        return
    lines = [f"adapter: A {list(have[0])}, B {list(have[1])}", f"program: A {list(want[0])}, B {list(want[1])}"]
    turned = [shape[::-1] for shape in have] == want
    if isinstance(site, Linear) and turned:
        raise RewriteError(
            f"{site.path}: A and B are stored transposed", evidence=lines, fix="Save A as [rank, in], B as [out, rank]."
        )
    raise RewriteError(
        f"{site.path}: the adapter was made for another size of this layer",
        evidence=lines,
        fix="Use the base model this adapter was trained on.",
    )


def misfit(name: str, wanted: Iterable[int], given: Iterable[int]) -> RewriteError:
    """The error for a tensor of another shape."""
    return RewriteError(
        f"{name} has another shape in the adapter",
        evidence=[f"adapter: {list(given)}", f"program: {list(wanted)}"],
        fix="A resized vocabulary needs the resized base model; else use the base this adapter was trained on.",
    )
