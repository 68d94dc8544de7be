"""Bottleneck adapters against numbers of the `adapters` library, which tools/adapters_reference.py recorded."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rewriter
from passes.adapter_config import names_of, options_of
from rewriter.errors import UsageError
from rewriter.program import Program
from tests.oracle import distance
from tools.adapters_reference import CASES, FIXTURE, SEED, base_model, inputs

RECORD: dict[str, Any] = json.loads(FIXTURE.with_suffix(".json").read_text(encoding="utf-8"))
TENSORS = load_file(FIXTURE.with_suffix(".safetensors"))
KNOWN = [f"{kind}/{case}" for kind, cases in CASES.items() for case in cases]


@functools.cache
def base(kind: str) -> Program:
    return rewriter.trace(base_model(kind), (), inputs(kind))


def output(program: Program, kind: str) -> torch.Tensor:
    result: torch.Tensor = program(**inputs(kind)).last_hidden_state
    return result


def test_the_record_is_of_these_cases() -> None:
    assert sorted(RECORD["cases"]) == sorted(KNOWN)
    assert RECORD["seed"] == SEED
    assert RECORD["versions"]["adapters"] == "1.3.0"


@pytest.mark.parametrize("kind", CASES)
def test_the_base_models_agree(kind: str) -> None:
    assert distance([output(base(kind), kind)], [TENSORS[f"{kind}/base"]]) < 1e-5


@pytest.mark.parametrize("case", KNOWN)
def test_same_weights_give_the_same_outputs(case: str) -> None:
    kind, config = case.split("/")[0], RECORD["cases"][case]["config"]
    pass_ = options_of(config, name="mine")
    result = rewriter.apply(base(kind), pass_)
    assert len(result.sites) == len(RECORD["cases"][case]["paths"])
    values = {
        f"{site.path}.adapter.mine.{ours}": TENSORS[f"{case}/{index}/{theirs}"]
        for index, site in enumerate(result.sites)
        for theirs, ours in names_of(config).items()
    }
    assert set(values) == set(result.program.trainable)
    found = output(result.program.with_tensors(values), kind)
    assert distance([found], [TENSORS[f"{case}/output"]]) < 1e-5
    assert distance([found], [TENSORS[f"{kind}/base"]]) > 1e-2


@pytest.mark.parametrize(
    "change",
    [
        {"phm_layer": True},
        {"use_gating": True},
        {"inv_adapter": "nice"},
        {"stochastic_depth": 0.1},
        {"leave_out": [0]},
        {"non_linearity": "leakyrelu"},
        {"reduction_factor": {"1": 8, "default": 16}},
        {"cross_adapter": True},
        {"output_adapter": False},
        {"original_ln_after": False},
        {"residual_before_ln": "post_add"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_has_no_counterpart_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="which the pass adapter does not have"):
        options_of({**RECORD["cases"]["bert/seq_bn"]["config"], **change})
