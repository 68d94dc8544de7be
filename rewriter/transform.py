"""Passes, the laws that hold them, and applying them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, ClassVar, Protocol, runtime_checkable

from rewriter import verify
from rewriter.edit import Edit
from rewriter.errors import RewriteError, UsageError
from rewriter.find import Miss, Sites
from rewriter.program import Program, Step
from rewriter.quantised import parameter_count


@dataclass(frozen=True, slots=True)
class Law:
    """How far a pass may move outputs, and why.

    `exact`: every bit of every output stays. `rounding`: outputs move by rounding only, at most by what
    `verify.tolerance` allows for the output's type. `free`: the pass is meant to change outputs.
    """

    kind: str
    reason: str = ""

    def because(self, reason: str) -> Law:
        return Law(self.kind, reason)

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}" if self.reason else self.kind


EXACT = Law("exact")
ROUNDING = Law("rounding")
FREE = Law("free")


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose fields are its options.

    `find` only reads and returns sites; `rewrite` changes one site through the edit. The framework clones, checks
    before and after, names nodes, and records history and provenance.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    @property
    def law(self) -> Law: ...

    def find(self, program: Program) -> Sites[Any]: ...

    def rewrite(self, site: Any, edit: Edit) -> None: ...


@dataclass(frozen=True, slots=True)
class Applied:
    """One applied pass: its sites, what it cost and how far outputs moved."""

    pass_: Pass
    sites: tuple[Any, ...]
    missed: tuple[Miss, ...]
    seconds: float
    parameters_before: int
    parameters_after: int
    added: int
    trainable: int
    change: verify.Change | None
    notes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "pass": self.pass_.name,
            "options": options(self.pass_),
            "sites": [getattr(site, "path", str(site)) for site in self.sites],
            "missed": [{"path": miss.path, "reason": miss.reason} for miss in self.missed],
            "seconds": round(self.seconds, 4),
            "parameters": {
                "before": self.parameters_before,
                "after": self.parameters_after,
                "added": self.added,
                "trainable": self.trainable,
            },
            "notes": {path: dict(numbers) for path, numbers in self.notes.items()},
            "law": str(self.pass_.law),
            "largest_change": None if self.change is None else self.change.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Result:
    """What `apply` made: the new program and, for every pass, what it found and did."""

    program: Program
    applied: tuple[Applied, ...] = field(default=())

    @property
    def sites(self) -> tuple[Any, ...]:
        """All sites of all passes, in the order they were rewritten."""
        return tuple(site for applied in self.applied for site in applied.sites)

    @property
    def missed(self) -> tuple[Miss, ...]:
        return tuple(miss for applied in self.applied for miss in applied.missed)


def options(pass_: Pass) -> dict[str, Any]:
    """The options of a pass as plain data, as a recipe records them; defaults are left out."""
    given: dict[str, Any] = {}
    for entry in dataclasses.fields(pass_):  # type: ignore[arg-type]
        value = getattr(pass_, entry.name)
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        if value != default:
            given[entry.name] = plain(value)
    return given


def plain(value: Any) -> Any:
    """Tuples and mappings as JSON and YAML know them; of a path only its last part, so that no record names a place."""
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def apply(program: Program, *passes: Pass, check: bool = True) -> Result:
    """Apply passes one after the other; the given program is left as it was.

    With `check`, the program runs on random inputs before and after each pass, and a `LawError` is raised when outputs
    moved further than the pass's law allows. Structure is always checked.

    Raises `UsageError` for targets and options that cannot be meant, `RewriteError` for what cannot be done.
    """
    if not passes:
        raise UsageError("no pass given", fix="`rewriter passes` lists them.")
    applied: list[Applied] = []
    for pass_ in passes:
        program, record = _apply_one(program, pass_, check)
        applied.append(record)
    return Result(program, tuple(applied))


def _apply_one(program: Program, pass_: Pass, check: bool) -> tuple[Program, Applied]:
    if isinstance(pass_, type) or not isinstance(pass_, Pass):
        raise UsageError(f"{pass_!r} is not a pass", fix="Give an instance, such as passes.Lora(rank=8).")
    verify.structure(program)
    start = time.perf_counter()
    clone = program.clone()
    number = max((step.number for step in program.steps), default=0) + 1
    edit = Edit(clone, number=number, name=pass_.name)
    sites = pass_.find(clone)
    for site in sites.found:
        pass_.rewrite(site, edit)
    closing = getattr(pass_, "finish", None)
    if closing is not None:
        closing(edit)
    edit.finish()
    step = Step(
        number,
        pass_.name,
        options(pass_),
        tuple(edit.added),
        tuple(edit.trainable),
        edit.originals,
        program if edit.removes and not edit.discards else None,
        edit.discards,
    )
    steps = tuple(map(_sealed, program.steps)) if edit.discards else program.steps
    after = Program(clone.exported, (*steps, step), clone.metadata)
    verify.structure(after)
    change = verify.law(program, after, pass_.law, pass_.name) if check else None
    record = Applied(
        pass_,
        sites.found,
        sites.missed,
        time.perf_counter() - start,
        parameter_count(program),
        parameter_count(after),
        sum(after.tensor(name).numel() for name in edit.added if name in after.exported.state_dict),
        sum(after.tensor(name).numel() for name in after.trainable) if edit.trainable else 0,
        change,
        edit.notes,
    )
    return after, record


def _sealed(step: Step) -> Step:
    """A step before one that cannot be undone: what it would restore is gone with the weights it belonged to."""
    kept_values = step.before is not None or step.originals
    return dataclasses.replace(step, before=None, originals={}, final=True) if kept_values else step


def find(program: Program, pass_: Pass) -> Sites[Any]:
    """Where a pass would apply; reads only."""
    sites = pass_.find(program)
    if not isinstance(sites, Sites):
        raise RewriteError(f"{pass_.name}.find returned {type(sites).__name__}, not Sites")
    return sites
