"""4-bit weights in the graph: the numbers by hand, the bytes of bitsandbytes, and what still works beside them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import passes
import rewriter
from passes import Adalora, Adapter, Ia3, Intrinsic, Loha, Lokr, Lora, Merge, Nf4, Prefix, Prompt, Select, Vera
from passes.extract import extract
from rewriter.errors import LawError, RewriteError, UsageError
from rewriter.formats.torch_program import export_torch
from rewriter.program import Program
from rewriter.quantised import held, weight_value
from rewriter.transform import Pass
from rewriter.view import Linear4bit, layers
from tests.models import TINY, Perceptron, llama_config, randomise, traced
from tests.oracle import distance, example, operations, run, traced_double, trained

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
HALF_FP4 = (0.0, 0.0052083333, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0)
LEVELS = {"nf4": NF4, "fp4": (*HALF_FP4, *(-level for level in HALF_FP4))}
MODELS = ("mlp", "gpt2", "llama", "bert", "t5", "vit")


def by_hand(weight: Tensor, kind: str = "nf4", size: int = 64) -> Tensor:
    """A weight [o, i] at the nearest levels of its blocks, in fp64."""
    flat, table = weight.detach().double().flatten().numpy(), np.array(LEVELS[kind])
    result = np.zeros_like(flat)
    for start in range(0, len(flat), size):
        block = flat[start : start + size]
        scale = np.abs(block).max()
        nearest = np.abs(block[:, None] / scale - table).argmin(1)
        result[start : start + size] = table[nearest] * scale
    return torch.from_numpy(result).view(weight.shape)


def applied(name: str, pass_: Nf4 | None = None) -> Program:
    return rewriter.apply(traced(name), pass_ or Nf4()).program


def held_in(program: Program) -> dict[str, Linear4bit]:
    return {path: site for path, site in layers(program).items() if isinstance(site, Linear4bit)}


def packed(program: Program) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in program.tensors.items() if name.endswith(("_packed", "absmax"))}


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind", "size"), [*((m, "nf4", 64) for m in MODELS), ("gpt2", "fp4", 32)])
def test_the_numbers_by_hand(name: str, kind: str, size: int) -> None:
    result = rewriter.apply(traced(name), Nf4(kind=kind, block_size=size))  # type: ignore[arg-type]
    base = traced_double(name)
    values = {}
    for site in result.sites:
        weight = base.tensor(site.weight).detach()
        expected = by_hand(weight.t(), kind, size).t() if site.transposed else by_hand(weight, kind, size)
        values[site.weight] = expected.contiguous()
    expected = run(base.with_tensors(values), name)
    assert distance(run(result.program, name), expected) < 1e-4
    assert distance(run(traced(name), name), expected) > 1e-2
    assert not {site.weight for site in result.sites} & set(result.program.tensors)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_the_bytes_of_bitsandbytes(kind: Any, double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    result = rewriter.apply(traced("gpt2"), Nf4(kind=kind, double_quantise=double))
    assert len(result.sites) == 8
    for site in result.sites:
        weight = traced("gpt2").tensor(site.weight).detach().t().contiguous()
        code, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
        mine = held(result.program, held_in(result.program)[site.path])
        assert torch.equal(mine.packed, code.flatten())
        assert torch.equal(mine.absmax, state.absmax)
        if double:
            assert mine.nested is not None
            assert torch.equal(mine.nested.absmax, state.state2.absmax)
            assert torch.equal(mine.nested.offset, state.offset)


def test_biases_and_everything_else_stay() -> None:
    before, after = traced("mlp"), applied("mlp")
    gone = {"up.weight", "down.weight", "head.weight"}
    assert set(before.tensors) - set(after.tensors) == gone
    for name in set(before.tensors) - gone:
        assert torch.equal(after.tensor(name), before.tensor(name))
    for before_op, after_op in zip(operations(before), operations(after), strict=True):
        assert after_op == before_op.replace("aten.linear", "rewriter.nf4_linear")
    assert set(after.trainable) == set(before.trainable) - gone


def test_what_is_reported_of_each_weight() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(256, 512, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    module = Wide()
    nn.init.normal_(module.layer.weight, generator=torch.Generator().manual_seed(0))
    program = rewriter.trace(module, (torch.ones(3, 256),))
    notes = {
        key: rewriter.apply(program, Nf4(double_quantise=key[0], search=key[1])).applied[0].notes["layer"]
        for key in itertools.product((False, True), (False, True))
    }
    assert notes[False, False]["bits_per_weight"] == 4.5
    assert notes[True, False]["bits_per_weight"] == pytest.approx(4.1270, abs=3e-4)
    weight = module.layer.weight.detach().double()
    expected = float((by_hand(weight) - weight).norm() / weight.norm())
    assert notes[False, False]["relative_rmse"] == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(0.092, abs=0.001)
    assert notes[False, True]["relative_rmse"] < 0.087
    assert notes[True, True]["relative_rmse"] < 0.088 < notes[True, False]["relative_rmse"]


@pytest.mark.parametrize("options", [{}, {"double_quantise": True}, {"search": True}])
def test_a_weight_that_moved_too_far_is_refused(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    real = passes.nf4.quantize

    def wrong(weight: Tensor, **given: Any) -> Any:
        made = real(weight, **given)
        codes = made.packed.clone()
        codes[5] ^= 0x40  # one code, four or more levels away
        return dataclasses.replace(made, packed=codes)

    monkeypatch.setattr(passes.nf4, "quantize", wrong)
    with pytest.raises(LawError, match="up moved further than its format allows in 1 blocks"):
        rewriter.apply(traced("mlp"), Nf4(**options), check=False)  # type: ignore[arg-type]


def test_blocks_of_zeros_stay_zero() -> None:
    weight = traced("mlp").tensor("up.weight").detach().clone()
    weight[:13] = 0
    program = rewriter.apply(traced("mlp").with_tensors({"up.weight": weight}), Nf4(targets=("up",))).program
    value = weight_value(program, layers(program)["up"])
    assert torch.equal(value[:13], torch.zeros(13, 10))
    assert value[13:].any()


# -- which layers -----------------------------------------------------------------------------------------------------


def test_heads_and_embeddings_stay() -> None:
    result = rewriter.apply(traced("llama"), Nf4(), check=False)
    assert len(result.sites) == 14
    assert not {"lm_head", "model.embed_tokens"} & {site.path for site in result.sites}
    named = rewriter.apply(traced("llama"), Nf4(targets=("lm_head",)), check=False)
    assert [site.path for site in named.sites] == ["lm_head"]


def test_what_is_skipped_stays() -> None:
    result = rewriter.apply(traced("llama"), Nf4(skip=("o_proj", "down_proj")), check=False)
    assert len(result.sites) == 10
    assert {miss.reason for miss in result.missed} == {"excluded"}
    assert "model.layers.1.self_attn.o_proj.weight" in result.program.tensors


def test_a_tied_weight_is_left_and_said() -> None:
    result = rewriter.apply(traced("llama_tied"), Nf4(targets=("lm_head", "q_proj")), check=False)
    assert [miss.path for miss in result.missed] == ["lm_head"]
    assert result.missed[0].reason.startswith("its weight is also used as model.embed_tokens")
    assert len(result.sites) == 2
    with pytest.raises(UsageError, match="no weight can be held in 4 bits") as error:
        rewriter.apply(traced("llama_tied"), Nf4(targets=("lm_head",)))
    assert "also used as" in error.value.evidence[0]


def test_a_layer_called_twice_is_one_weight() -> None:
    class Twice(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x) + self.up(2 * x)))

    program = rewriter.trace(randomise(Twice()), (torch.ones(3, 5, 10),))
    result = rewriter.apply(program, Nf4(targets=("up",)))
    assert operations(result.program).count("rewriter.nf4_linear.default") == 2
    (site,) = result.sites
    assert len(site.calls) == 2
    assert "up.weight" not in result.program.tensors


def test_golden(golden: Callable[[str, str], None]) -> None:
    after = applied("mlp", Nf4(targets=("up", "down"), block_size=32))
    golden("nf4.diff", str(rewriter.diff(traced("mlp"), after)))
    double = applied("mlp", Nf4(targets=("up",), double_quantise=True))
    golden("nf4_double.diff", str(rewriter.diff(traced("mlp"), double)))


# -- undo, files, types -----------------------------------------------------------------------------------------------


def test_undo_when_the_originals_are_kept() -> None:
    after = rewriter.undo(applied("gpt2", Nf4(keep_original=True)))
    difference = rewriter.diff(traced("gpt2"), after)
    assert not difference, str(difference)
    assert distance(run(after, "gpt2"), run(traced("gpt2"), "gpt2")) == 0


def test_without_them_it_is_refused_also_for_what_came_before() -> None:
    with pytest.raises(UsageError, match="step 1: nf4 cannot be undone: the weights it replaced were not kept"):
        rewriter.undo(applied("mlp"))
    lora = trained(rewriter.apply(traced("mlp"), Lora(targets=("up",), rank=3)).program)
    merged = rewriter.apply(lora, Merge(), Nf4(), check=False).program
    with pytest.raises(UsageError, match="step 2: merge cannot be undone"):
        rewriter.undo(merged, "merge")
    assert [step.final for step in merged.steps] == [False, True, True]


def test_a_lora_on_top_is_undone() -> None:
    before = applied("mlp")
    after = rewriter.apply(before, Lora(targets=("up",), rank=3)).program
    assert not rewriter.diff(before, rewriter.undo(after))


@pytest.mark.parametrize("pass_", [Nf4(), Nf4(double_quantise=True, kind="fp4", block_size=32)])
def test_files(pass_: Nf4, tmp_path: Path) -> None:
    before = rewriter.apply(applied("llama", pass_), Lora(targets=("q_proj",), rank=3)).program
    before.save(tmp_path / "model.pt2")
    after = rewriter.load(tmp_path / "model.pt2")
    assert not rewriter.diff(before, after)
    assert distance(run(before, "llama"), run(after, "llama")) == 0
    for name, tensor in packed(before).items():
        assert torch.equal(tensor, after.tensor(name))
    with pytest.raises(UsageError, match="not kept"):
        rewriter.undo(after, "nf4")


def test_on_the_meta_device() -> None:
    module, args, _ = TINY["mlp"]()
    program = rewriter.trace(module.to("meta"), tuple(arg.to("meta") for arg in args))
    for options in ({}, {"double_quantise": True, "search": True}):
        result = rewriter.apply(program, Nf4(**options), check=False)  # type: ignore[arg-type]
        real = applied("mlp", Nf4(**options))  # type: ignore[arg-type]
        for name, tensor in packed(real).items():
            made = result.program.tensor(name)
            assert made.is_meta
            assert (made.shape, made.dtype) == (tensor.shape, tensor.dtype)


def test_a_bf16_model() -> None:
    from transformers import LlamaForCausalLM

    _, _, inputs = TINY["llama"]()
    module = randomise(LlamaForCausalLM(llama_config())).bfloat16()
    program = rewriter.trace(module, (), inputs)
    result = rewriter.apply(program, Nf4())
    name = "model.layers.0.mlp.down_proj"
    assert result.program.tensor(f"{name}.weight_absmax").dtype is torch.float32
    values = {
        site.weight: by_hand(program.tensor(site.weight)).bfloat16() for site in result.sites
    }  # levels are rounded to bf16 once
    expected = program.with_tensors(values)(**inputs)
    assert distance([result.program(**inputs)["logits"]], [expected["logits"]]) < 1e-6


@pytest.mark.parametrize("double", [False, True])
def test_a_module_in_another_type_keeps_its_scales(double: bool, tmp_path: Path) -> None:
    program = rewriter.apply(applied("mlp", Nf4(double_quantise=double)), Lora(targets=("up",), rank=3)).program
    program = trained(program)
    module = program.module(dtype=torch.bfloat16).eval()
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    kept = [name for name in packed(program) if "absmax" in name or "offset" in name]
    assert len(kept) == (6 if double else 3)
    for name in packed(program):
        assert torch.equal(state[name], program.tensor(name)), name
        assert state[name].dtype is program.tensor(name).dtype
    assert state["up.bias"].dtype is state["up.lora_A.default"].dtype is torch.bfloat16
    (x,), _ = example("mlp")
    assert module(x.bfloat16()).dtype is torch.bfloat16
    expected = run(program, "mlp")
    assert distance([module(x.bfloat16()).detach()], expected) < 0.02 * float(expected[0].abs().max())
    module(x.bfloat16()).float().square().sum().backward()
    report = export_torch(program, tmp_path / "model.pt2", dtype=torch.bfloat16)
    assert report.max_relative_error < 0.02


# -- beside 4-bit layers ----------------------------------------------------------------------------------------------

BESIDE: dict[str, Pass] = {
    "lora": Lora(targets="all-linear", rank=3, lora_bias=True),
    "ia3": Ia3(),
    "vera": Vera(rank=5),
    "adalora": Adalora(),
    "loha": Loha(targets="all-linear", rank=3),
    "lokr": Lokr(targets="all-linear", rank=3),
    "adapter": Adapter(),
    "adapter_layer": Adapter(form="layer", targets="all-linear"),
    "prefix": Prefix(),
    "prompt": Prompt(),
    "bitfit": Select(),
}


def train(program: Program, inputs: dict[str, Any], steps: int = 5) -> list[float]:
    """Losses of some steps towards an output that is all zeros."""
    module = program.module().eval()  # no dropout: losses compare
    optimiser = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        output = torch.utils._pytree.tree_leaves(module(**inputs))[0]
        loss = output.float().square().mean()
        optimiser.zero_grad()
        loss.backward()
        reached = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
        assert reached == set(program.trainable)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", BESIDE)
def test_methods_train_beside_4_bit_layers(method: str) -> None:
    base = applied("gpt2")
    result = rewriter.apply(base, BESIDE[method])
    before = packed(result.program)
    losses = train(result.program, example("gpt2")[1])
    assert losses[-1] < losses[0]
    for name, tensor in before.items():
        assert torch.equal(result.program.tensor(name), tensor)


@pytest.mark.parametrize("double", [False, True])
def test_qlora_trains_the_adapter_alone(double: bool) -> None:
    """The gradient of `A` is what fp64 gives for y = x Ŵᵀ + b + s · x Aᵀ Bᵀ."""
    program = rewriter.apply(
        applied("mlp", Nf4(double_quantise=double)), Lora(targets=("up", "head"), rank=3, alpha=6)
    ).program
    program = trained(program)
    (x,), _ = example("mlp")
    module = program.module().eval()
    module(x).square().sum().backward()
    reached = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert set(reached) == {f"{layer}.lora_{side}.default" for layer in ("up", "head") for side in "AB"}
    twin = Perceptron().double().eval()
    state = {
        name: weight_value(program, layers(program)[name.removesuffix(".weight")]).double()
        if name.removesuffix(".weight") in held_in(program)
        else program.tensor(name).detach().double()
        for name in twin.state_dict()
    }
    twin.load_state_dict(state)
    a, b = (program.tensor(f"up.lora_{side}.default").detach().double() for side in "AB")
    c, d = (program.tensor(f"head.lora_{side}.default").detach().double() for side in "AB")
    a.requires_grad_()
    given = x.double()
    hidden = twin.norm(torch.relu(twin.up(given) + 2 * given @ a.t() @ b.t()))
    inner = given + twin.down(hidden)
    (twin.head(inner) + 2 * inner @ c.t() @ d.t()).square().sum().backward()
    assert a.grad is not None
    assert float((reached["up.lora_A.default"].double() - a.grad).abs().max()) < 1e-4 * float(a.grad.abs().max())


REFUSED: dict[str, tuple[Callable[[], Pass], str]] = {
    "dora": (lambda: Lora(dora=True), "DoRA reads the weight"),
    "pissa": (lambda: Lora(init="pissa"), "init=pissa changes the weight"),
    "olora": (lambda: Lora(init="olora"), "init=olora changes the weight"),
    "intrinsic": (lambda: Intrinsic(), "held in 4 bits"),
    "paths": (lambda: Select(method="paths", paths=("*.q_proj.weight",)), "matches weights held in 4 bits"),
    "diff_pruning": (lambda: Select(method="diff_pruning"), "14 weights are held in 4 bits"),
    "diff_pruning paths": (
        lambda: Select(method="diff_pruning", paths=("*.mlp.*.weight",)),
        "matches weights held in 4 bits",
    ),
    "nf4 again": (lambda: Nf4(), "held in 4 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_the_weight_refuses(case: str) -> None:
    pass_, reason = REFUSED[case]
    with pytest.raises(RewriteError, match="4 bits") as error:
        rewriter.apply(applied("llama"), pass_(), check=False)
    assert reason in str(error.value)
    assert error.value.fix


def test_what_trains_the_rest_says_what_it_leaves() -> None:
    for pass_ in (Select(method="last", last=1), Select(method="paths", paths=("model.layers.1.*",))):
        result = rewriter.apply(applied("llama"), pass_)
        assert len(result.sites) == 2
        assert [miss.reason for miss in result.missed] == ["it is held in 4 bits"] * 7
        assert all(miss.path.startswith("model.layers.1.") for miss in result.missed)


def test_no_lora_is_extracted_from_4_bits() -> None:
    with pytest.raises(RewriteError, match="held in 4 bits"):
        extract(applied("mlp"), traced("mlp"), rank=2)
    with pytest.raises(RewriteError, match="held in 4 bits"):
        extract(traced("mlp"), applied("mlp"), rank=2)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("search", [False, True])
def test_weights_that_are_not_finite(value: float, search: bool) -> None:
    weight = traced("mlp").tensor("down.weight").detach().clone()
    weight[3, 1] = value
    with pytest.raises(RewriteError, match=r"down cannot be held in 4 bits: 1 of 220 weights are not finite"):
        rewriter.apply(traced("mlp").with_tensors({"down.weight": weight}), Nf4(search=search))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_size": 48}, "block_size is 48"),
        ({"block_size": True}, "block_size is True"),
        ({"block_size": 8192}, "block_size is 8192"),
        ({"kind": "int4"}, "kind"),
        ({"search": 1}, "search"),
        ({"double_quantise": "yes"}, "double_quantise"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Nf4(**options)


@pytest.mark.parametrize(("target", "reason"), [("signal", "a conv"), ("classes", "an embedding"), ("hed", "no layer")])
def test_targets_that_are_no_linear_layers(target: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        rewriter.apply(traced("conv"), Nf4(targets=(target,)))


def test_an_fp64_model_says_what_it_can_hold() -> None:
    with pytest.raises(UsageError, match="no weight can be held in 4 bits") as error:
        rewriter.apply(traced_double("mlp"), Nf4())
    assert "its weight is float64: fp32, bf16 and fp16 can be held in 4 bits" in error.value.evidence[0]
