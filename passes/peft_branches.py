"""The LoRAs in a program's graph, each as one A and one B for a whole layer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from rewriter.errors import RewriteError
from rewriter.formats.peft import ENDINGS, PAIRS
from rewriter.program import Origin, Program, Step
from rewriter.view import Embedding, Linear, Part, Site, layers, scope

STEPS = ("lora", "loftq", "peft", "loralib", "compose", "prune")  # the passes that put LoRAs beside layers


@dataclass(slots=True)
class Branch:
    """One LoRA as PEFT knows it: one A and one B for a whole layer."""

    site: Site
    scale: float
    dropout: float | None  # None where dropout means nothing
    start: int = 0  # first of the rows of the output it adds to
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        kind = next(kind for kind in PAIRS if kind in self.tensors)
        return int(self.tensors[kind].shape[0])


def adapters(program: Program) -> dict[str, list[Step]]:
    """The names of the LoRAs in the program and the steps that put them there; removed ones are not named."""
    held, result = program.exported.state_dict, dict[str, list[Step]]()
    for step in program.steps:
        if step.name in STEPS and any(name in held for name in step.added):
            result.setdefault(str(step.options.get("adapter", "default")), []).append(step)
    return result


def branches(program: Program, steps: list[Step], adapter: str, *, whole: bool = True) -> list[Branch]:
    """What the steps put beside the layers under one adapter name, read from the graph, in the order of the steps.

    With `whole`, only what a PEFT directory can hold: the slices of a layer are stacked, and a stack of experts is
    refused. Without, each slice is a branch whose site has that part, and experts are branches like others.
    """
    kinds = "|".join(ENDINGS.values())
    pattern = re.compile(rf"(.+)\.({kinds})\.{re.escape(adapter)}(?:\.(query|key|value))?")
    found: dict[str, dict[str, dict[str, str]]] = {}
    held = program.exported.state_dict
    for name in (name for step in steps for name in step.added if name in held):
        match = pattern.fullmatch(name)
        if match is None:
            raise RewriteError(f"{name} is no parameter of a LoRA", fix="Export the whole model.")
        path, kind, part = match.groups()
        found.setdefault(path, {}).setdefault(part or "", {})[kind] = name
    sites = list(layers(program).values())
    result = []
    for path, parts in found.items():
        embeds = any("lora_embedding_A" in names for names in parts.values())
        site = next(s for s in sites if scope(program, s.path) == path and isinstance(s, Embedding) is embeds)
        if site.path != path and whole:
            raise RewriteError(
                f"{site.path} is a parameter without a module, and a PEFT directory has LoRAs of modules only",
                fix="Export the whole model, merged.",
            )
        read = [_read(program, site, names) for names in parts.values()]
        if "" in parts:
            result.append(read[0])
        elif whole:
            result.append(stacked(site, read))
        else:
            result += [_sliced(branch, part) for part, branch in zip(parts, read, strict=True)]
    return result


def _sliced(branch: Branch, part: str) -> Branch:
    assert isinstance(branch.site, Linear)
    stop = branch.start + branch.tensors["lora_B"].shape[0]
    return replace(branch, site=replace(branch.site, part=Part(part, branch.start, stop)))


def _read(program: Program, site: Site, names: dict[str, str]) -> Branch:
    b = program.placeholder(next(name for kind, name in names.items() if kind in PAIRS.values()))
    up = _up(b)
    scaled = next(user for user in up.users if _label(user).startswith("lora_scaled"))
    placed = next((user.args[1] for user in scaled.users if _label(user).startswith("lora_placed")), (0, 0))
    scale = scaled.args[1]
    down = next(node for node in up.all_input_nodes if _label(node).startswith("lora_down"))
    assert isinstance(scale, (int, float))
    dropout = None if isinstance(site, Embedding) else 0.0
    for x in down.all_input_nodes:
        if _label(x).startswith("lora_dropout"):
            dropout = float(x.args[1])  # type: ignore[arg-type]
    tensors = {kind: program.tensor(name) for kind, name in names.items()}
    return Branch(site, float(scale), dropout, placed[0], tensors)  # type: ignore[index, arg-type]


def _up(b: Node) -> Node:
    """The product with B; experts read it padded and transposed."""
    while True:
        user = next(u for u in b.users if _label(u).startswith(("lora_up", "lora_B_aligned", "lora_B_turned")))
        if _label(user).startswith("lora_up"):
            return user
        b = user


def _label(node: Node) -> str:
    origin = Origin.of(node)
    return origin.label if origin else ""


def stacked(site: Site, parts: list[Branch]) -> Branch:
    """One LoRA of the summed rank for LoRAs on slices: the rows of A together, B zero outside each slice's block."""
    whole = Branch(site, parts[0].scale, parts[0].dropout)
    a = torch.cat([part.tensors["lora_A"] for part in parts])
    b = a.new_zeros(site.out_features, a.shape[0])
    bias = a.new_zeros(site.out_features)
    column = 0
    for part in parts:
        factor = part.scale / whole.scale
        rows = slice(part.start, part.start + part.tensors["lora_B"].shape[0])
        b[rows, column : column + part.rank] = part.tensors["lora_B"] * factor
        if "lora_B_bias" in part.tensors:
            bias[rows] = part.tensors["lora_B_bias"] * factor
        column += part.rank
    whole.tensors = {"lora_A": a, "lora_B": b}
    if any("lora_B_bias" in part.tensors for part in parts):
        whole.tensors["lora_B_bias"] = bias
    return whole


def on_original(program: Program, steps: list[Step], branch: Branch) -> Branch:
    """The same layer as a LoRA on the weight it had before the first step, where a step changed that weight."""
    name = branch.site.weight
    original = next((step.originals[name] for step in steps if name in step.originals), None)
    trained = any(name in step.trainable for step in steps)
    if original is None or trained or not isinstance(branch.site, Linear):
        return branch
    change = program.tensor(name).detach().double() - original.detach().double()
    rounding = torch.finfo(original.dtype).eps * float(original.detach().double().norm())
    change = (change.t() if branch.site.transposed else change) / branch.scale
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    rank = branch.rank
    if float(s[rank:].norm()) * abs(branch.scale) > 8 * rounding:
        raise RewriteError(
            f"{branch.site.path}: its base weight changed by more than its LoRA gave up",
            fix="Export the whole model, merged.",
        )
    root = s[:rank].sqrt()
    a, b = branch.tensors["lora_A"], branch.tensors["lora_B"]
    start_a, start_b = (root[:, None] * vh[:rank]).to(a.dtype), (u[:, :rank] * root).to(b.dtype)
    pair = {"lora_A": torch.cat([a.detach(), start_a]), "lora_B": torch.cat([b.detach(), start_b], dim=1)}
    return Branch(branch.site, branch.scale, branch.dropout, tensors={**branch.tensors, **pair})
