"""Plans: the table everybody knows, counts by hand, sizes that a model cannot take."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from passes.ia3 import Ia3
from passes.lora import Lora
from rewriter.errors import RewriteError, RewriteWarning, UnsafeError, UsageError
from rewriter.examples import examples
from rewriter.formats.huggingface import trace_model
from rewriter.formats.huggingface_shapes import load_shapes
from rewriter.formats.json import read_json
from rewriter.plan import Case, Options, amount, default_targets, in_type, nf4_bytes, optimiser_bytes, plan
from rewriter.program import Program
from rewriter.trace import trace
from rewriter.training_sizes import training_sizes
from rewriter.transform import apply
from tests.models import TINY, traced

BILLION = 10**9
LLAMA_70B = 68_976_648_192


def adapted(program: Program, rank: int = 3) -> Program:
    return apply(program, Lora(rank=rank, targets=default_targets(program)), check=False).program


def saved(folder: Path, name: str, **changes: object) -> Path:
    """A directory with the configuration of a tiny model and nothing else."""
    model = TINY[name]()[0]
    model.config.architectures = [type(model).__name__]
    for key, value in changes.items():
        setattr(model.config, key, value)
    model.config.save_pretrained(folder)
    return folder


# -- the common table ---------------------------------------------------------------------------------------------


def test_seventy_billion_parameters_take_560_gb_in_16_bit() -> None:
    weights, gradients = 2 * 70 * BILLION, 2 * 70 * BILLION
    states, copy = optimiser_bytes(70 * BILLION, 2, Options())
    assert (weights, gradients, states, copy) == (140 * BILLION, 140 * BILLION, 280 * BILLION, 0)
    assert amount(weights + gradients + states) == "560.00 GB"


@pytest.mark.parametrize(
    ("width", "options", "expected"),
    [
        (2, Options(), (4, 0)),
        (2, Options(states="fp32"), (8, 0)),
        (2, Options(master=True), (8, 4)),
        (4, Options(), (8, 0)),
        (4, Options(master=True), (8, 0)),
        (2, Options(optimizer="adamw8bit"), (2, 0)),
        (2, Options(optimizer="adamw8bit", master=True), (2, 4)),
    ],
)
def test_bytes_of_the_optimiser(width: int, options: Options, expected: tuple[int, int]) -> None:
    assert optimiser_bytes(1, width, options) == expected


def test_full_fine_tuning_takes_eight_or_sixteen_bytes_a_parameter() -> None:
    program = trace(nn.Linear(6, 5, dtype=torch.bfloat16), (torch.randn(3, 7, 6, dtype=torch.bfloat16),))
    for options, each in ((Options(), 8), (Options(master=True), 16), (Options(states="fp32"), 12)):
        (cost,) = plan([Case("full", program, everything=True)], replace(options, length=7)).costs
        assert cost.states == each * (6 * 5 + 5)
        assert cost.activations.saved == 2 * 1 * 7 * 6  # its input


@pytest.mark.parametrize(("shape", "bits", "plain"), [((4096, 4096), 4.127, 4.5), ((8192, 28672), 4.127, 4.5)])
def test_bits_of_nf4(shape: tuple[int, int], bits: float, plain: float) -> None:
    count = shape[0] * shape[1]
    assert 8 * nf4_bytes(count) / count == pytest.approx(bits, abs=5e-5)
    assert 8 * nf4_bytes(count, double_quantise=False) / count == plain
    assert nf4_bytes(65) == 33 + 2 + 4 + 4  # two blocks, one scale of scales, one offset


# -- the shapes of Llama 2 ------------------------------------------------------------------------------------------


def cut(name: str, count: int) -> Program:
    """An example with so many blocks."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**read_json(examples()[name]), "num_hidden_layers": count}
        Path(folder, "config.json").write_text(json.dumps(settings), encoding="utf-8")
        return load_shapes(Path(folder), dtype=torch.bfloat16)


def test_the_parameters_of_70b() -> None:
    one, two = (plan([Case("full", cut("llama-2-70b", n), everything=True)]).costs[0].parameters for n in (1, 2))
    assert read_json(examples()["llama-2-70b"])["num_hidden_layers"] == 80
    assert one + 79 * (two - one) == LLAMA_70B


def test_lora_on_four_projections_of_7b() -> None:
    program = load_shapes(examples()["llama-2-7b"], dtype=torch.bfloat16)
    made = plan([Case("lora", low := adapted(program, 16)), Case("qlora", low, quantised=True)])
    lora, qlora = made.costs
    assert (lora.parameters - lora.trainable, lora.trainable) == (6_738_415_616, 16_777_216)
    assert lora.weights == pytest.approx(2 * lora.parameters, rel=1e-6)
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert qlora.quantised == linear
    assert 8 * qlora.quantised_bytes / linear == pytest.approx(4.127, abs=5e-5)
    assert qlora.weights == lora.weights - 2 * linear + qlora.quantised_bytes
    assert lora.activations == qlora.activations
    assert lora.activations.checkpointed < lora.activations.saved / 10


# -- counts by hand ---------------------------------------------------------------------------------------------------


def test_qlora_quantises_linear_layers_and_keeps_the_rest() -> None:
    program = traced("llama")
    (cost,) = plan([Case("qlora", adapted(program), quantised=True)], Options(length=7)).costs
    shapes = 2 * [(24, 24), (12, 24), (12, 24), (24, 24), (28, 24), (28, 24), (24, 28)]
    assert cost.quantised == sum(o * i for o, i in shapes)
    assert cost.quantised_bytes == sum(nf4_bytes(o * i) for o, i in shapes)
    rest = 2 * 31 * 24 + 5 * 24 + cost.trainable + sum(b.numel() for n, b in program.tensors.items() if "inv_freq" in n)
    assert cost.weights == cost.quantised_bytes + 4 * rest
    assert cost.loss == 4 * 7 * 31


@pytest.mark.parametrize("name", ["gpt2", "llama_tied"])
def test_a_tied_tensor_counts_once(name: str) -> None:
    count = sum(parameter.numel() for parameter in TINY[name]()[0].parameters())
    for program in (traced(name), in_type(traced(name), torch.bfloat16)):
        (cost,) = plan([Case("full", program, everything=True)]).costs
        assert cost.parameters == cost.trainable == count


def test_a_program_is_planned_as_its_passes_left_it() -> None:
    program = apply(traced("llama"), Ia3(), check=False).program
    (cost,) = plan([Case("program", program)]).costs
    assert cost.trainable == 2 * (12 + 12 + 28)


def test_another_type_halves_what_is_held() -> None:
    single, half = (
        plan([Case("full", each, everything=True)], Options(length=9)).costs[0]
        for each in (traced("gpt2"), in_type(traced("gpt2"), torch.bfloat16))
    )
    assert 2 * half.weights == single.weights
    assert 2 * half.gradients == single.gradients
    assert single.activations.saved / 2 <= half.activations.saved < 0.6 * single.activations.saved


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_a_configuration_is_enough(name: str, tmp_path: Path) -> None:
    program = load_shapes(saved(tmp_path, name), dtype=torch.bfloat16)
    made = plan([Case("full", program, everything=True), Case("lora", adapted(program))], Options(batch=4))
    full, lora = made.costs
    assert full.parameters == sum(parameter.numel() for parameter in TINY[name]()[0].parameters())
    assert made.length == {"llama": 64, "gpt2": 43, "vit": None}[name]
    assert 0 < lora.activations.saved < full.activations.saved
    assert program.tensors[next(iter(program.parameters()))].dtype is torch.bfloat16


def test_a_configuration_that_asks_for_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeError):
        load_shapes(saved(tmp_path, "llama", auto_map={"AutoModel": "code.Model"}))
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": "wide"}')
    with pytest.raises(RewriteError, match="cannot build"):
        load_shapes(tmp_path)


# -- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_follow_batch_and_length() -> None:
    program = traced("t5")  # the length of the decoder's tokens is a size of its own
    sizes = training_sizes(program, batch=6, length=11)
    assert (sizes.batch, sizes.length) == (6, 11)
    assert sorted(sizes.symbols.values()) == [6, 6, 11, 11]
    assert training_sizes(traced("vit"), batch=2).length is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"batch": 0}, "batch is 0"),
        ("llama", {"batch": -3}, "batch is -3"),
        ("llama", {"length": 0}, "length is 0"),
        ("llama", {"batch": True}, "batch is True"),
        ("vit", {"length": 9}, "none of its inputs is a sequence"),
        ("bert", {"length": 44}, "at most 43 positions"),
    ],
)
def test_sizes_that_cannot_be_meant(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        training_sizes(traced(name), **options)


def test_sizes_that_a_trace_fixed() -> None:
    fixed = trace(nn.Linear(6, 5), (torch.randn(3, 7, 6),), dynamic_shapes=None)
    assert training_sizes(fixed, batch=3).batch == 3
    with pytest.raises(UsageError, match="fixed at 3"):
        training_sizes(fixed, batch=1)


def test_more_positions_than_the_model_was_made_for() -> None:
    module = TINY["llama"]()[0]
    program = trace_model(module)  # type: ignore[arg-type]
    assert training_sizes(program).length == 64
    with pytest.warns(RewriteWarning, match="more than the 64 positions"):
        assert training_sizes(program, length=65).length == 65


# -- what is shown --------------------------------------------------------------------------------------------------


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="optimizer is 'adam'") as caught:
        Options(optimizer="adam")
    assert "adamw, adamw8bit" in str(caught.value)
    with pytest.raises(UsageError, match="batch is -3"):
        Options(batch=-3)
    with pytest.raises(UsageError, match="states is 'fp8'"):
        Options(states="fp8")
    with pytest.raises(UsageError, match="no method"):
        plan([])


def test_the_json_is_plain_and_adds_up() -> None:
    low = adapted(traced("bert"))
    made = plan([Case("lora", low), Case("qlora", low, quantised=True)], Options(master=True, checkpointing=True))
    record = json.loads(json.dumps(made.to_json()))
    assert record["assumptions"] == list(made.assumptions)
    for cost in record["methods"].values():
        held = cost["activations"]
        states = cost["weights"] + cost["gradients"] + cost["optimiser"] + cost["master_copy"]
        assert cost["total"] == states + held["saved"] + held["outputs"] + cost["loss"]
        assert cost["total_checkpointed"] == states + held["checkpointed"] + held["outputs"] + cost["loss"]
        assert held["checkpointed"] == held["block_inputs"] + held["outside_blocks"] + held["largest_block"]


def test_the_table_shows_what_was_asked_for_first() -> None:
    case = Case("full", traced("gpt2"), everything=True)
    titles = [row[0] for row in plan([case]).rows()]
    assert titles[-2:] == ["total", "total, checkpointed"]
    assert "fp32 copy of weights" not in titles
    turned = [row[0] for row in plan([case], Options(checkpointing=True, master=True)).rows()]
    assert turned[-2:] == ["total, checkpointed", "total"]
    assert "fp32 copy of weights" in turned


def test_every_assumption_follows_the_options() -> None:
    low = adapted(traced("gpt2"))
    text = "\n".join(plan([Case("qlora", low, quantised=True)], Options(double_quantise=False)).assumptions)
    assert "4 + 32/64 bits a weight" in text
    assert "applied: lora(targets=@attention, rank=3)" in text
    assert "the inputs of the 2 blocks" in text
    assert "16 bytes a parameter" in "\n".join(plan([Case("program", low)], Options(master=True)).assumptions)


def test_amounts_are_in_powers_of_a_thousand() -> None:
    assert [amount(n) for n in (0, 999, 137_953_296_384)] == ["0 bytes", "999 bytes", "137.95 GB"]
