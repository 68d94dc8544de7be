"""What every PEFT configuration that names modules says about them, matched exactly as PEFT matches."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from rewriter.find import full_match

V = TypeVar("V", int, float)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


Rank = Annotated[int, Field(ge=1, le=1_000_000)]
Alpha = Annotated[float, AfterValidator(_finite)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Names = list[str] | str
Ranks = Annotated[dict[str, Rank], BeforeValidator(lambda value: value or {})]
Alphas = Annotated[dict[str, Alpha], BeforeValidator(lambda value: value or {})]

# Fields of every method whose value never reaches the forward computation of a saved adapter.
NEUTRAL = frozenset({"auto_mapping", "inference_mode", "peft_version", "revision", "runtime_config", "task_type"})


class AdapterConfig(BaseModel):
    """What all configurations share, with PEFT's defaults for what is left out.

    `endings` are the ends of the keys in the weights file -> the kinds of the tensors, which are the names this
    project gives the parameters; `root` are the kinds that belong to no module.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    peft_type: ClassVar[str]
    endings: ClassVar[Mapping[str, str]]
    root: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[frozenset[str]] = NEUTRAL  # fields that say nothing about the mathematics
    refused: ClassVar[frozenset[str]] = frozenset()  # fields that change it and are not supported

    base_model_name_or_path: str | None = None
    modules_to_save: list[str] | None = None

    def saves(self, path: str) -> bool:
        """Whether `modules_to_save` holds the module at `path` or one around it."""
        return any(re.search(rf"(^|\.){re.escape(name)}(\.|$)", path) for name in self.modules_to_save or ())


class TargetedConfig(AdapterConfig):
    """The configuration of a method that adapts modules chosen by name."""

    target_modules: Names
    exclude_modules: Names | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names | None = None

    def wants(self, path: str) -> bool:
        """Whether PEFT adapts the module at `path`; `all-linear` wants every one."""
        if named(self.exclude_modules, path) or self.saves(path):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == "all-linear" or full_match(self.target_modules, path)
        return named(self.target_modules, path) and self._wants_layer(path)

    def unmatched(self, paths: Iterable[str]) -> list[str]:
        """The targets and patterns that mean none of `paths`, as `field 'value'`."""
        paths = list(paths)
        idle = []
        if not isinstance(self.target_modules, str):
            idle += [f"target_modules {t!r}" for t in self.target_modules if not any(named([t], p) for p in paths)]
        return idle

    def _wants_layer(self, path: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = self.layers_pattern or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = [m for p in patterns if (m := re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", path))]
        return bool(found) and int(found[0].group(1)) in ([wanted] if isinstance(wanted, int) else wanted)


class RankedConfig(TargetedConfig):
    """The configuration of a method with a rank and an alpha per module."""

    r: Rank = 8
    rank_pattern: Ranks = {}
    alpha_pattern: Alphas = {}

    @property
    def default_alpha(self) -> float:
        """The alpha of modules that no pattern matches."""
        raise NotImplementedError

    def rank_of(self, path: str) -> int:
        return next((rank for key, rank in self.rank_pattern.items() if pattern_matches(key, path)), self.r)

    def alpha_of(self, path: str) -> float:
        found = (alpha for key, alpha in self.alpha_pattern.items() if pattern_matches(key, path))
        return next(found, self.default_alpha)

    def unmatched(self, paths: Iterable[str]) -> list[str]:
        paths = list(paths)
        idle = super().unmatched(paths)
        for name, keys in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            idle += [f"{name} {key!r}" for key in keys if not any(pattern_matches(key, path) for path in paths)]
        return idle


def named(names: Names | None, path: str) -> bool:
    """How lists of names and regular expressions mean a module."""
    if isinstance(names, str):
        return full_match(names, path)
    return any(path == name or path.endswith("." + name) for name in names or ())


def pattern_matches(pattern: str, path: str) -> bool:
    """How keys of `rank_pattern` and `alpha_pattern` match: a regular expression for the end of a path."""
    return full_match(rf"(.*\.)?({pattern})", path)


def short_names(paths: Collection[str], among: Iterable[str]) -> list[str]:
    """Names that mean exactly `paths`: a last segment where all of `among` with that end are meant, else the path."""
    spared = {path.rpartition(".")[2] for path in among if path not in paths}
    tails = [tail if (tail := path.rpartition(".")[2]) not in spared else path for path in paths]
    return list(dict.fromkeys(tails))


def short_patterns(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """The most frequent of the values by path, and patterns for the paths that have another."""
    default = Counter(values.values()).most_common(1)[0][0]
    by_tail: dict[str, set[V]] = {}
    for path, value in values.items():
        by_tail.setdefault(path.rpartition(".")[2], set()).add(value)
    patterns = {}
    for path, value in values.items():
        tail = path.rpartition(".")[2]
        if value != default:
            patterns[re.escape(tail if len(by_tail[tail]) == 1 else path)] = value
    return default, patterns
