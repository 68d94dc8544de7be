"""The bottleneck adapter of a program as a directory of the `adapters` library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from passes.adapter import Adapter
from passes.adapter_config import ACTIVATIONS, ORIGINAL_NORM, PLACEMENTS, options_of
from passes.adapter_place import Sublayer, sublayers
from passes.adapterhub_place import HOLDERS, block_order, saved_names, spot
from rewriter.errors import RewriteError, UsageError
from rewriter.formats import adapterhub
from rewriter.formats.adapterhub_config import KNOWN_VERSION, Bottleneck
from rewriter.program import Program, Step
from rewriter.view import scope

STEPS = ("adapter", "adapterhub")
_WHOLE = "Export the whole model, such as with --to torch."


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the library keeps the adapters of a model type: the module for a sublayer, within its block."""

    holder: Callable[[Sublayer], str]
    stack: tuple[str, str] = ("", "")  # what the blocks are called here, and in the transformers the library pins


def _around(site: Sublayer) -> str:
    """The module around the output projection."""
    return ".".join(spot(site.path).inside[:-1])


def _numbered(site: Sublayer) -> str:
    """The numbered part of the block, `layer.1`."""
    return ".".join(spot(site.path).inside[:2])


def _of_block(site: Sublayer) -> str:
    """A module of the block's own for each kind of sublayer."""
    return next(name for name, kind in HOLDERS.items() if kind == site.kind)


def _of_image_block(site: Sublayer) -> str:
    return "output.output_adapters" if site.kind == "feed_forward" else _of_block(site)


LAYOUTS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), Layout(_around)),
    **dict.fromkeys(("gpt2", "llama", "mistral"), Layout(_of_block)),
    **dict.fromkeys(("t5", "mt5"), Layout(_numbered)),
    "vit": Layout(_of_image_block, ("layers", "encoder.layer")),
}


def write_adapterhub(
    program: Program,
    directory: Path,
    *,
    adapter: str = "default",
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the bottleneck adapter named `adapter` as the directory that the library's `load_adapter` reads.

    It keeps its name, and a bottleneck without biases gets zeros for them. Returns where it is.

    Raises `UsageError` when the program has no such adapter, `RewriteError` for what such a directory cannot hold.
    """
    step = _step(program, adapter)
    layout = _layout(program)
    sites = _sites(program, step, adapter)
    if step.name == "adapterhub":
        options = Bottleneck(**step.options["config"]).model_dump()
    else:
        options = _options(program, Adapter(**step.options), sites)
    tensors = {
        f"{_holder(layout, site)}.adapters.{adapter}.{theirs}": tensor
        for site in sites
        for theirs, tensor in _tensors(program, site, adapter, options).items()
    }
    record = program.metadata["huggingface"]
    config = {
        "config": options,
        "hidden_size": sites[0].width,
        "model_class": record["architecture"],
        "model_name": base_model or record.get("directory") or None,
        "model_type": record["config"]["model_type"],
        "name": adapter,
        "version": KNOWN_VERSION,
    }
    Path(directory).parent.mkdir(parents=True, exist_ok=True)
    return adapterhub.write(Path(directory), config, tensors, overwrite=overwrite)


# -- what is written ------------------------------------------------------------------------------------------------


def _step(program: Program, adapter: str) -> Step:
    found = [step for step in program.steps if step.name in STEPS]
    named = {str(step.options.get("adapter", "default")): step for step in found}
    if adapter not in named:
        raise UsageError(
            f"the program has no bottleneck adapter named {adapter!r}",
            evidence=[f"it has: {', '.join(named) or 'none'}"],
            fix="Apply one first, or name one of these.",
        )
    foreign = [step.name for step in program.steps if step.name not in STEPS]
    if foreign:
        raise RewriteError(
            f"the program also has the pass {foreign[0]}, which a directory of a bottleneck adapter cannot hold",
            evidence=[f"passes: {', '.join(step.name for step in program.steps)}"],
            fix="Undo it first, or export the whole model.",
        )
    return named[adapter]


def _layout(program: Program) -> Layout:
    kind = program.metadata.get("huggingface", {}).get("config", {}).get("model_type")
    if kind not in LAYOUTS:
        raise RewriteError(
            f"where the `adapters` library keeps adapters of the model type {kind!r} is not known"
            if kind
            else "the program does not say which Hugging Face model it is, and such a directory must",
            evidence=[f"known: {', '.join(sorted(LAYOUTS))}"],
            fix=_WHOLE,
        )
    return LAYOUTS[kind]


def _sites(program: Program, step: Step, adapter: str) -> list[Sublayer]:
    """The sublayers that the step gave an adapter, in program order."""
    sites = [site for site in sublayers(program) if f"{_name(program, site, adapter)}.up.weight" in step.added]
    ups = [name for name in step.added if name.endswith(".up.weight")]
    if len(sites) != len(ups):
        raise RewriteError(
            "an adapter beside single layers is none that the `adapters` library has",
            evidence=[name.removesuffix(f".adapter.{adapter}.up.weight") for name in ups[:6]],
            fix=_WHOLE,
        )
    return sites


def _name(program: Program, site: Sublayer, adapter: str) -> str:
    return f"{scope(program, site.path)}.adapter.{adapter}"


def _holder(layout: Layout, site: Sublayer) -> str:
    """The path of the module that holds the adapter of a sublayer, in the library's model."""
    there = spot(site.path)
    stack = there.stack.removesuffix(layout.stack[0]) + layout.stack[1]
    return f"{stack}.{there.number}.{layout.holder(site)}"


def _tensors(program: Program, site: Sublayer, adapter: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of one adapter under the library's names."""
    prefix = _name(program, site, adapter)
    result: dict[str, torch.Tensor] = {}
    for theirs, ours in saved_names(options).items():
        name = f"{prefix}.{ours}"
        if name in program.tensors:
            result[theirs] = program.tensor(name)
        else:
            weight = program.tensor(f"{name.removesuffix('bias')}weight")
            result[theirs] = weight.new_zeros(weight.shape[0])
    return result


# -- the configuration ----------------------------------------------------------------------------------------------


def _options(program: Program, pass_: Adapter, sites: Sequence[Sublayer]) -> dict[str, Any]:
    """The options of the library that mean this pass; read back, they must mean it again."""
    norm = next(key for key, value in ORIGINAL_NORM.items() if value == pass_.original_norm)
    places = next(key for key, value in PLACEMENTS.items() if value == pass_.placement)
    learned = "channel" if pass_.scale_per_channel else "learned"
    options: dict[str, Any] = {
        "mh_adapter": places[0],
        "output_adapter": places[1],
        "cross_adapter": any(site.kind == "cross" for site in sites),
        "reduction_factor": _reduction(pass_, sites),
        "non_linearity": next(name for name in reversed(ACTIVATIONS) if ACTIVATIONS[name] == pass_.activation),
        "original_ln_before": norm[0],
        "original_ln_after": norm[1],
        "residual_before_ln": norm[2],
        "ln_before": pass_.norm_before,
        "ln_after": pass_.norm_after,
        "adapter_residual_before_ln": pass_.norm_sum,
        "is_parallel": pass_.form == "parallel",
        "scaling": learned if pass_.learned_scale else float(pass_.scale),
        "dropout": pass_.dropout,
        "init_weights": "mam_adapter" if pass_.init == "zero_up" else "bert",
        "leave_out": _left_out(program, pass_, sites),
    }
    given = Bottleneck(**options).model_dump()
    _check_meaning(pass_, given, sites)
    return given


def _reduction(pass_: Adapter, sites: Sequence[Sublayer]) -> float:
    """The factor by which the library divides the width, rounding down, to get the size of the bottleneck."""
    width = sites[0].width
    if pass_.bottleneck is None:
        factor = float(pass_.reduction)
    else:
        factor = width / pass_.bottleneck
        if int(width // factor) != pass_.bottleneck:  # the quotient was rounded up
            factor = math.nextafter(factor, 0)
    return int(factor) if factor.is_integer() else factor


def _left_out(program: Program, pass_: Adapter, sites: Sequence[Sublayer]) -> list[int]:
    """The numbers of the blocks without an adapter; refused where a block has only some of those that are placed."""
    whole = replace(pass_, layers=(), exclude=()).find(program).found
    chosen = {site.path for site in sites}
    blocks = block_order(whole)
    left = {spot(site.path).block for site in whole if site.path not in chosen}
    partly = [site.path for site in sites if spot(site.path).block in left]
    if partly:
        raise RewriteError(
            "a block has some of its adapters only, which the `adapters` library can leave out by whole blocks",
            evidence=[f"has one: {path}" for path in partly[:4]],
            fix=_WHOLE,
        )
    return [number for number, block in enumerate(blocks) if block in left]


def _check_meaning(pass_: Adapter, given: dict[str, Any], sites: Sequence[Sublayer]) -> None:
    meant = options_of({**given, "leave_out": []}, name=pass_.adapter)
    width = sites[0].width
    differing = [
        name
        for name in ("form", "placement", "activation", "dropout", "norm_before", "norm_after", "norm_sum")
        if getattr(meant, name) != getattr(pass_, name)
    ]
    if pass_.form == "parallel" and pass_.pre_norm and any(p.input is not p.skip for s in sites for p in s.places):
        differing.append("pre_norm")
    if meant.size_of(width) != pass_.size_of(width):
        differing.append("bottleneck")
    if differing:
        raise RewriteError(
            f"the `adapters` library has no adapter with this {differing[0]}",
            evidence=[f"{name}: {getattr(pass_, name)!r}" for name in differing],
            fix=_WHOLE,
        )
