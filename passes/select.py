"""Select: train a part of the model's own parameters, or a sparse change of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from passes import fish_mask
from passes.diff_pruning import STRETCH, TEMPERATURE, Gates, add_gated, add_penalty, check_adapter, check_density
from passes.saved_modules import untie
from passes.select_parameters import biases, head, last_blocks, stacks
from passes.sparse import add_sparse, aliases, held_in_4bits, matching, own_parameters
from rewriter.edit import Edit
from rewriter.errors import UsageError
from rewriter.find import Miss, Sites
from rewriter.program import Program
from rewriter.transform import EXACT, Law

BELONG = {  # method -> the options that mean something to it
    "bitfit": {"head"},
    "last": {"last", "blocks", "head"},
    "paths": {"paths"},
    "fish_mask": {"paths", "scores", "sha256", "density", "adapter"},
    "diff_pruning": {"paths", "structured", "log_alpha", "temperature", "stretch", "adapter"},
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """A parameter that trains: as it is, at `indices` alone, or behind `gates`."""

    path: str
    alone: bool = False  # apart from the names it is tied with
    indices: Tensor | None = None
    gates: Gates | None = None

    @property
    def weight(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class Select:
    """Train some of the model's own parameters: biases, last blocks, paths, a Fisher mask or a gated change.

        W      ->      W, which trains                                    bitfit, last, paths
        W      ->      W + scatter(indices, values)                       fish_mask
        W      ->      W + z ⊙ δ, and the expected number of z ≠ 0        diff_pruning

    `bitfit` trains what layers and norms add to their results; `last` the last `last` blocks of every stack, or of the
    stacks `blocks`; both with `head` the layers that make the outputs, too; `paths` what these globs match.
    `fish_mask` trains the `density` share of numbers with the largest `scores`, a file of what
    `passes.fish_mask.fisher` computed; `sha256` over it is filled in when it is empty, and checked when it is not.
    `diff_pruning` trains a change δ and hard-concrete gates z, drawn in training and fixed otherwise, one per number
    and with `structured` one more per parameter; the program then returns `(what it returned, penalty)`, to be added
    to the loss with a small factor. The pass `binarise` ends it. Both take `paths` to choose parameters.
    Shapes: δ and log α as W; indices and values [n].

    Raises `UsageError` when nothing is chosen, and for an option that the method does not have.
    Source: BitFit: Ben Zaken et al. 2021, arXiv 2106.10199; FishMask: Sung et al. 2021, arXiv 2111.09839; diff
    pruning: Guo et al. 2020, arXiv 2012.07463; gates: Louizos et al. 2017, arXiv 1712.01312.
    """

    name: ClassVar[str] = "select"
    source: ClassVar[str] = "Ben Zaken et al. 2021, arXiv 2106.10199"

    method: Literal["bitfit", "last", "paths", "fish_mask", "diff_pruning"] = "bitfit"
    last: int = 0
    blocks: tuple[str, ...] = ()
    head: bool = False
    paths: tuple[str, ...] = ()
    scores: Path | None = None
    sha256: str = ""
    density: float = 0.005
    structured: bool = False
    log_alpha: float = 5.0
    temperature: float = TEMPERATURE
    stretch: tuple[float, ...] = STRETCH
    adapter: str = "default"

    def __post_init__(self) -> None:
        _check_options(self)
        if self.scores is not None:
            object.__setattr__(self, "scores", Path(self.scores))
            if not self.sha256:
                object.__setattr__(self, "sha256", fish_mask.digest(Path(self.scores)))

    @property
    def law(self) -> Law:
        if self.method in ("fish_mask", "diff_pruning"):
            return EXACT.because("the change starts at zero")
        return EXACT.because("nothing changes until it is trained")

    # -- where --------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Sites[Chosen]:
        if self.method == "fish_mask":
            if self.scores is None:
                raise UsageError(
                    "fish_mask has no scores",
                    fix="Save what passes.fish_mask.fisher gives with safetensors, and name the file with scores.",
                )
            places = fish_mask.chosen(program, self.scores, self.sha256, self.density, self.paths)
            return Sites(tuple(Chosen(name, indices=indices) for name, indices in places.items()))
        if self.method == "diff_pruning":
            gates = Gates(self.log_alpha, self.temperature, self.stretch, self.structured, self.adapter)
            held = _held(program, self.paths or ("*",))
            if held and not self.paths:
                raise UsageError(
                    f"diff_pruning changes every parameter, but {len(held)} weights are held in 4 bits",
                    evidence=[miss.path for miss in held[:3]],
                    fix="Name the others with paths, or apply dequantise first.",
                )
            names = matching(program, self.paths) if self.paths else own_parameters(program)
            return Sites(tuple(Chosen(name, gates=gates) for name in names), held)
        return self._whole(program)

    def _whole(self, program: Program) -> Sites[Chosen]:
        """The parameters that train as they are."""
        missed: Sequence[Miss] = ()
        if self.method == "bitfit":
            names, missed = biases(program)
        elif self.method == "last":
            names = last_blocks(program, self.last, self.blocks)
            ends = [block for blocks in stacks(program, self.blocks).values() for block in blocks[-self.last :]]
            missed = _held(program, tuple(f"{block}.*" for block in ends))
        else:
            names, missed = matching(program, self.paths), _held(program, self.paths)
        usable = set(own_parameters(program))
        own = {name: next((n for n in aliases(program, name) if n in usable), None) for name in names}
        found = {name: Chosen(name) for name in own.values() if name is not None}
        if self.head:
            found |= {name: Chosen(name, alone=True) for name in head(program)}
        unread = [
            Miss(name, "the program never reads it, or it holds no floats") for name, n in own.items() if n is None
        ]
        return Sites(tuple(found.values()), (*missed, *unread))

    # -- what ---------------------------------------------------------------------------------------------------

    def rewrite(self, site: Chosen, edit: Edit) -> None:
        if site.indices is not None:
            weight = edit.program.tensor(site.path)
            add_sparse(edit, site.path, site.indices, weight.new_zeros(len(site.indices)), self.adapter)
        elif site.gates is not None:
            add_gated(edit, site.path, site.gates)
        elif site.alone:
            untie(edit, site.path)
            edit.train(site.path)
        else:
            for name in aliases(edit.program, site.path):
                edit.train(name)

    def finish(self, edit: Edit) -> None:
        if self.method == "diff_pruning":
            add_penalty(edit, self.adapter)


def _held(program: Program, globs: tuple[str, ...]) -> tuple[Miss, ...]:
    return tuple(Miss(name, "it is held in 4 bits") for name in held_in_4bits(program, globs))


def _check_options(select: Select) -> None:
    given: Any = select  # Any: what a configuration file holds is not yet known
    if given.method not in BELONG:
        raise UsageError(f"method is {given.method!r}", fix=f"One of {', '.join(BELONG)}.")
    for field in dataclasses.fields(select):
        name = field.name
        if name != "method" and name not in BELONG[given.method] and getattr(given, name) != field.default:
            owners = [method for method, names in BELONG.items() if name in names]
            raise UsageError(
                f"{name} means nothing to method={given.method}",
                evidence=[f"it belongs to {', '.join(owners)}"],
                fix=f"Leave {name} out, or choose another method.",
            )
    for name in ("paths", "blocks"):
        value = getattr(given, name)
        if not isinstance(value, (tuple, list)) or not all(isinstance(each, str) for each in value):
            raise UsageError(f"{name} is {value!r}", fix="A sequence of names.")
    if given.method == "paths" and not given.paths:
        raise UsageError("method=paths has no paths", fix="Give globs over parameter names, such as `*.bias`.")
    if type(given.last) is not int or given.last < (given.method == "last"):
        raise UsageError(f"last is {given.last!r}", fix="A whole number of at least 1.")
    for name in ("head", "structured"):
        if not isinstance(getattr(given, name), bool):
            raise UsageError(f"{name} is {getattr(given, name)!r}", fix="true or false.")
    check_density(given.density)
    _check_gates(given)
    check_adapter(given.adapter)


def _check_gates(given: Any) -> None:
    if not _is_number(given.log_alpha):
        raise UsageError(f"log_alpha is {given.log_alpha!r}", fix="A finite number; 5 opens nearly every gate.")
    if not _is_number(given.temperature) or given.temperature <= 0:
        raise UsageError(f"temperature is {given.temperature!r}", fix="A number above 0.")
    pair = given.stretch
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(_is_number, pair)):
        raise UsageError(f"stretch is {pair!r}", fix="Two numbers, such as -0.1,1.1.")
    if not (pair[0] < 0 and pair[1] > 1):
        raise UsageError(f"stretch is {pair!r}", fix="Below 0 and above 1, so that gates can be exactly 0 and 1.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
