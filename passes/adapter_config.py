"""A bottleneck configuration of the `adapters` library as options of ours, and its parameter names as our names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from passes.adapter import Adapter
from rewriter.errors import UsageError

ACTIVATIONS: dict[str, Literal["relu", "gelu", "silu", "tanh"]] = {
    "relu": "relu",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
PLACEMENTS: dict[tuple[bool, bool], Literal["houlsby", "pfeiffer", "attention"]] = {
    (True, True): "houlsby",  # mh_adapter, output_adapter
    (False, True): "pfeiffer",
    (True, False): "attention",
}
ORIGINAL_NORM: dict[tuple[bool, bool, object], Literal["after", "both", "before"]] = {
    (False, True, True): "after",  # original_ln_before, original_ln_after, residual_before_ln
    (False, True, False): "after",
    (True, True, True): "both",
    (True, False, False): "before",
}
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # option -> the value that means it is not used
    "use_gating": (False,),
    "phm_layer": (False,),
    "inv_adapter": (None, "None"),
    "stochastic_depth": (0, 0.0),
    "leave_out": ([], ()),
}


def options_of(config: Mapping[str, Any], *, name: str = "default") -> Adapter:
    """The pass that adds what a bottleneck configuration of the `adapters` library means.

    Its names: mh_adapter and output_adapter are `placement`, cross_adapter is `cross_attention`; is_parallel is
    `form=parallel` without `pre_norm`; original_ln_before and original_ln_after are `original_norm`; ln_before and
    ln_after are `norm_before` and `norm_after`; adapter_residual_before_ln is `norm_sum`; reduction_factor and
    non_linearity are `reduction` and `activation`; scaling is `scale`, "learned" or "channel" is `learned_scale`.

    Raises `UsageError` for what has no counterpart.
    """
    for option, unused in UNSUPPORTED.items():
        if config.get(option, unused[0]) not in unused:
            raise _unsupported(option, config[option])
    places = (bool(config["mh_adapter"]), bool(config["output_adapter"]))
    cross = bool(config.get("cross_adapter", False))
    if places not in PLACEMENTS or (cross and not places[0]):
        raise _unsupported("cross_adapter" if cross else "mh_adapter", cross)
    if config["non_linearity"].lower() not in ACTIVATIONS:
        raise _unsupported("non_linearity", config["non_linearity"])
    if not isinstance(config["reduction_factor"], int | float):
        raise _unsupported("reduction_factor", config["reduction_factor"])
    scaling = config.get("scaling", 1.0)
    parallel, learned = bool(config.get("is_parallel", False)), scaling in ("learned", "channel")
    return Adapter(
        form="parallel" if parallel else "series",
        placement=PLACEMENTS[places],
        reduction=config["reduction_factor"],
        activation=ACTIVATIONS[config["non_linearity"].lower()],
        dropout=config.get("dropout", 0.0),
        scale=1.0 if learned else scaling,
        learned_scale=learned,
        scale_per_channel=scaling == "channel",
        norm_before=bool(config.get("ln_before", False)),
        norm_after=bool(config.get("ln_after", False)),
        norm_sum=not parallel and bool(config.get("ln_after")) and bool(config.get("adapter_residual_before_ln")),
        original_norm=_original_norm(config, parallel),
        pre_norm=not parallel,
        cross_attention=cross,
        adapter=name,
    )


def names_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The library's parameter names inside one adapter -> ours after `<path>.adapter.<name>.`."""
    down = 1 if config.get("ln_before") else 0  # the norm is the first module of the library's `adapter_down`
    names = {"adapter_up": "up", f"adapter_down.{down}": "down"}
    if config.get("ln_before"):
        names["adapter_norm_before"] = "norm_before"
    if config.get("ln_after"):
        names["adapter_norm_after"] = "norm_after"
    found = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in names.items() for kind in ("weight", "bias")}
    return {**found, "scaling": "scale"} if config.get("scaling") in ("learned", "channel") else found


def _original_norm(config: Mapping[str, Any], parallel: bool) -> Literal["after", "both", "before"]:
    before, after = bool(config.get("original_ln_before", False)), bool(config.get("original_ln_after", True))
    key = (before, after, config.get("residual_before_ln", True))
    if parallel and after:
        return "after"  # what a parallel adapter reads is before any norm
    if parallel or key not in ORIGINAL_NORM:
        shown = f"{before}, original_ln_after {after}, residual_before_ln {key[2]}"
        raise _unsupported("original_ln_before", shown)
    return ORIGINAL_NORM[key]


def _unsupported(option: str, value: object) -> UsageError:
    return UsageError(
        f"the bottleneck configuration has {option} {value}, which the pass adapter does not have",
        fix="Use an adapter without it.",
    )
