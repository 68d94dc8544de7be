"""`adapter_config.json` of the `adapters` library: which adapter, of which model, with every option of a bottleneck."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rewriter.errors import RewriteError, RewriteWarning
from rewriter.formats.json import read_json

T = TypeVar("T", bound=BaseModel)
CONFIG = "adapter_config.json"
KNOWN_VERSION = "adapters.1.3.0"  # the newest whose options are all known here
_ELSEWHERE = "Trace the model with this adapter in it, or merge the adapter in the `adapters` library and trace that."


class Bottleneck(BaseModel):
    """The options of a bottleneck adapter under the library's names, with its defaults for what is left out."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: float | dict[str, float]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | Literal["learned", "channel"] = 1.0
    use_gating: bool = False
    residual_before_ln: bool | Literal["post_add"] = True
    adapter_residual_before_ln: bool = False
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    leave_out: Annotated[list[int], BeforeValidator(lambda value: value or [])] = []
    dropout: float = Field(default=0.0, ge=0, lt=1)
    phm_layer: bool = False
    phm_dim: int = 4
    factorized_phm_W: bool | None = True  # noqa: N815 - the library's spelling
    shared_W_phm: bool | None = False  # noqa: N815
    shared_phm_rule: bool | None = True
    factorized_phm_rule: bool | None = False
    phm_c_init: str | None = "normal"
    phm_init_range: float | None = 0.0001
    learn_phm: bool | None = True
    hypercomplex_nonlinearity: str | None = "glorot-uniform"
    phm_rank: int | None = 1
    phm_bias: bool | None = True
    stochastic_depth: float | None = 0.0


class _Described(BaseModel):
    """What stands around the options."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    name: str = Field(min_length=1)
    config: dict[str, Any] | str
    version: str = ""
    type: str | None = None
    model_type: str | None = None
    model_name: str | None = None
    hidden_size: int | None = None


@dataclass(frozen=True, slots=True)
class AdapterHubConfig:
    """What the configuration says: `options` are those of a `Bottleneck`, all of them."""

    name: str
    options: Mapping[str, Any]
    model_type: str | None
    model_name: str | None
    hidden_size: int | None
    legacy_task: bool  # one of before 3.0, which names invertible adapters without having any


_SEQUENTIAL = {
    "mh_adapter": False,
    "output_adapter": True,
    "reduction_factor": 16,
    "non_linearity": "relu",
    "original_ln_before": True,
}
_DOUBLE = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 16, "non_linearity": "swish"}
_PARALLEL = {
    "mh_adapter": False,
    "output_adapter": True,
    "reduction_factor": 2,
    "non_linearity": "relu",
    "init_weights": "mam_adapter",
    "is_parallel": True,
    "scaling": 4.0,
}
# The names the library has for whole configurations.
NAMED: dict[str, dict[str, Any]] = {
    "seq_bn": _SEQUENTIAL,
    "pfeiffer": _SEQUENTIAL,
    "double_seq_bn": _DOUBLE,
    "houlsby": _DOUBLE,
    "par_bn": _PARALLEL,
    "parallel": _PARALLEL,
    "scaled_par_bn": {**_PARALLEL, "scaling": "learned"},
    "scaled_parallel": {**_PARALLEL, "scaling": "learned"},
}


def read_config(directory: Path) -> AdapterHubConfig:
    """The configuration of an adapter directory.

    Raises `RewriteError` for a field of a wrong type or impossible value and for another method than a bottleneck.
    Unknown options are reported and ignored, as the library does.
    """
    path = directory / CONFIG
    described = _valid(path, _Described, read_json(path))
    given = _resolved(path, described.config)
    architecture = given.pop("architecture", None)
    if architecture not in (None, "bottleneck"):
        raise RewriteError(
            f"{path}: architecture is {architecture!r}", evidence=["supported: bottleneck adapters"], fix=_ELSEWHERE
        )
    options = _valid(path, Bottleneck, _renewed(given, described.version))
    unknown = sorted(options.model_extra or {})
    if unknown:
        warnings.warn(
            f"{path} was written by {described.version or 'an old version'}; "
            f"unknown options are ignored: {', '.join(unknown)}",
            RewriteWarning,
            stacklevel=3,
        )
    return AdapterHubConfig(
        name=described.name,
        options=options.model_dump(exclude=set(unknown)),
        model_type=described.model_type,
        model_name=described.model_name,
        hidden_size=described.hidden_size,
        legacy_task=described.type == "text_task",
    )


def _resolved(path: Path, config: dict[str, Any] | str) -> dict[str, Any]:
    if not isinstance(config, str):
        return dict(config)
    if config in NAMED:
        return dict(NAMED[config])
    kind = "a hash, which names no options" if re.fullmatch(r"[0-9a-f]{16}", config) else "no bottleneck configuration"
    raise RewriteError(
        f"{path}: config is {config!r}, {kind}",
        evidence=[f"known: {', '.join(NAMED)}"],
        fix="Save the adapter again with `save_adapter`, which writes every option.",
    )


def _renewed(given: dict[str, Any], version: str) -> dict[str, Any]:
    """The options as they are called today."""
    block = given.pop("invertible_adapter", None)
    if block:
        given["inv_adapter"] = block.get("block_type") if isinstance(block, dict) else str(block)
    if not version:  # before versions were written, gelu was the approximation
        old = {"gelu": "gelu_new", "gelu_orig": "gelu"}
        given["non_linearity"] = old.get(given.get("non_linearity", ""), given.get("non_linearity"))
    return given


def _valid(path: Path, kind: type[T], held: dict[str, Any]) -> T:
    try:
        return kind.model_validate(held)
    except ValidationError as error:
        said: dict[str, list[str]] = {}  # by field: what each of its possible types says
        for each in error.errors():
            text = each["msg"].replace("Input should", "should").replace("Field required", "missing")
            given = "" if text == "missing" else f"{each['input']!r}, "[:100]
            said.setdefault(f"{each['loc'][0]}: {given}", []).append(text)
        lines = [field + ", or ".join(texts) for field, texts in said.items()]
        raise RewriteError(f"{path} is not valid", evidence=lines[:8], fix="Correct these fields.") from None
