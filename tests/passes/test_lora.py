"""LoRA: what it adds, how it starts, what trains, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes import Lora, Merge
from rewriter.errors import RewriteError, RewriteWarning, UsageError
from rewriter.program import Program
from rewriter.view import Embedding
from tests.models import TINY, traced
from tests.oracle import distance, operations, run, trained, update

TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj", "wte"),
    "bert": ("query", "output.dense"),
    "conv": ("stem", "signal", "classes", "head"),
}


def added(program: Program) -> dict[str, Tensor]:
    return {name: program.tensor(name).detach() for step in program.steps for name in step.added}


# -- parameters ---------------------------------------------------------------------------------------------------


def test_query_and_value_of_a_llama_get_r_times_i_plus_o_each() -> None:
    result = rewriter.apply(traced("llama"), Lora(targets=("q_proj", "v_proj"), rank=4))
    assert [site.path for site in result.sites] == [
        f"model.layers.{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in "qv"
    ]
    assert {name: list(t.shape) for name, t in added(result.program).items() if ".0." in name} == {
        "model.layers.0.self_attn.q_proj.lora_A.default": [4, 24],
        "model.layers.0.self_attn.q_proj.lora_B.default": [24, 4],
        "model.layers.0.self_attn.v_proj.lora_A.default": [4, 24],
        "model.layers.0.self_attn.v_proj.lora_B.default": [12, 4],
    }
    record = result.applied[0]
    assert record.added == record.trainable == 2 * (4 * (24 + 24) + 4 * (24 + 12))
    assert record.parameters_after == record.parameters_before + record.added
    assert result.program.trainable == tuple(added(result.program))


@pytest.mark.parametrize("name", TARGETS)
def test_every_site_gets_r_times_i_plus_o(name: str) -> None:
    base = traced(name)
    result = rewriter.apply(base, Lora(targets=TARGETS[name], rank=3))
    new = added(result.program)
    for site in result.sites:
        letter = "lora_embedding_" if isinstance(site, Embedding) else "lora_"
        a, b = new[f"{site.path}.{letter}A.default"], new[f"{site.path}.{letter}B.default"]
        kernel = math.prod(base.tensor(site.weight).shape[2:]) if name == "conv" else 1
        assert a.numel() + b.numel() == 3 * (site.in_features * kernel + site.out_features), site.path
    assert len(new) == 2 * len(result.sites)
    for key, tensor in base.tensors.items():
        assert result.program.tensor(key) is tensor


def test_features_add_what_they_say() -> None:
    base = traced("mlp")
    lora = Lora(targets=("up", "down"), rank=4, dora=True, lora_bias=True, rank_pattern={"down": 2})
    shapes = {name: list(t.shape) for name, t in added(rewriter.apply(base, lora).program).items()}
    assert shapes == {
        "up.lora_A.default": [4, 10],
        "up.lora_B.default": [22, 4],
        "up.lora_B_bias.default": [22],
        "up.lora_magnitude_vector.default": [22],
        "down.lora_A.default": [2, 22],
        "down.lora_B.default": [10, 2],
        "down.lora_B_bias.default": [10],
        "down.lora_magnitude_vector.default": [10],
    }


@pytest.mark.parametrize(("rslora", "scale"), [(False, 7 / 4), (True, 7 / 2)])
def test_the_scale_is_in_the_graph_once(rslora: bool, scale: float) -> None:
    program = rewriter.apply(traced("mlp"), Lora(targets=("up",), rank=4, alpha=7, rslora=rslora)).program
    scaled = [node.args[1] for node in program.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert scaled == [scale]


# -- how it starts ------------------------------------------------------------------------------------------------


def wide() -> Program:
    torch.manual_seed(0)
    return rewriter.trace(nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 5)), (torch.randn(2, 400),))


def test_kaiming_start() -> None:
    new = added(rewriter.apply(wide(), Lora(targets=("0",), rank=40)).program)
    a, limit = new["0.lora_A.default"], 1 / math.sqrt(400)
    assert not new["0.lora_B.default"].any()
    assert 0.97 * limit < float(a.abs().max()) <= limit
    assert float(a.std()) == pytest.approx(limit / math.sqrt(3), rel=0.02)  # uniform
    assert abs(float(a.mean())) < 0.02 * limit


def test_gaussian_start() -> None:
    new = added(rewriter.apply(wide(), Lora(targets=("0",), rank=40, init="gaussian")).program)
    assert not new["0.lora_B.default"].any()
    assert float(new["0.lora_A.default"].std()) == pytest.approx(1 / 40, rel=0.02)


def test_both_start_with_sigma() -> None:
    new = added(rewriter.apply(wide(), Lora(targets=("0",), rank=40, init="both", sigma=0.03)).program)
    assert float(new["0.lora_A.default"].std()) == pytest.approx(0.03, rel=0.02)
    assert float(new["0.lora_B.default"].std()) == pytest.approx(0.03, rel=0.02)


def test_an_embedding_starts_as_in_peft() -> None:
    new = added(rewriter.apply(traced("gpt2"), Lora(targets=("wte",), rank=3)).program)
    assert not new["transformer.wte.lora_embedding_A.default"].any()
    assert new["transformer.wte.lora_embedding_B.default"].all()


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("dora", [False, True])
def test_outputs_keep_every_bit(init: Any, dora: bool) -> None:
    base = traced("bert")
    program = rewriter.apply(base, Lora(targets=TARGETS["bert"], rank=3, init=init, dora=dora, dropout=0.2)).program
    assert all(torch.equal(a, b) for a, b in zip(run(base, "bert"), run(program, "bert"), strict=True))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # stored [o, i] and [i, o]
def test_the_weight_gives_up_what_the_update_starts_with(name: str, init: Any, rslora: bool) -> None:
    base = traced(name)
    lora = Lora(targets=TARGETS[name][:2], rank=3, alpha=7, init=init, rslora=rslora)
    result = rewriter.apply(base, lora)
    assert distance(run(base, name), run(result.program, name)) < 1e-5
    for site in result.sites:
        change = update(lora, site, result.program.tensors)
        before, rest = base.tensor(site.weight).detach(), result.program.tensor(site.weight).detach()
        assert torch.allclose(rest + change, before, rtol=0, atol=1e-6)
        assert float(change.norm()) > 0.3 * float(before.norm())
        largest = torch.linalg.svdvals(before)
        if init == "pissa":
            assert float(torch.linalg.svdvals(rest)[0]) == pytest.approx(float(largest[3]), rel=1e-4)
            assert torch.allclose(torch.linalg.svdvals(change)[:3], largest[:3], rtol=1e-4)
        else:
            b = result.program.tensor(f"{site.path}.lora_B.default").detach()
            assert torch.allclose(b.t() @ b, torch.eye(3), atol=1e-5)
    assert all(torch.equal(t, base.tensors[name]) for name, t in rewriter.undo(result.program).tensors.items())


def test_the_same_seed_gives_the_same_bits_whatever_else_is_targeted() -> None:
    one = added(rewriter.apply(traced("llama"), Lora(targets=("q_proj", "v_proj"), rank=3, seed=5)).program)
    torch.manual_seed(123)
    two = added(rewriter.apply(traced("llama"), Lora(targets=("v_proj",), rank=3, seed=5)).program)
    other = added(rewriter.apply(traced("llama"), Lora(targets=("v_proj",), rank=3, seed=6)).program)
    named = added(rewriter.apply(traced("llama"), Lora(targets=("v_proj",), rank=3, seed=5, adapter="x")).program)
    for name in (name for name in two if "lora_A" in name):
        assert torch.equal(one[name], two[name])
        assert not torch.equal(other[name], two[name])
        assert not torch.equal(named[name.replace("default", "x")], two[name])
    starts = [tensor for name, tensor in two.items() if "lora_A" in name]
    assert not torch.equal(*starts)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    rewriter.apply(traced("mlp"), Lora(targets=("up",), rank=3, init="both"))
    assert torch.equal(torch.rand(1), expected)


def test_dora_on_a_row_of_zeros_divides_by_nothing() -> None:
    module, args, kwargs = TINY["mlp"]()
    with torch.no_grad():
        module.up.weight[3] = 0  # type: ignore[union-attr, index, operator]
    base = rewriter.trace(module, args, kwargs)
    result = rewriter.apply(base, Lora(targets=("up",), rank=3, dora=True))
    assert result.applied[0].change is not None
    assert result.applied[0].change.equal
    model = result.program.module()
    model(*args).square().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    merged = rewriter.apply(trained(result.program), Merge()).program
    assert all(bool(t.isfinite().all()) for t in merged.tensors.values())


# -- what trains --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "expected"), [("none", set()), ("lora_only", {"up.bias"}), ("all", {"up.bias", "norm.bias", "head.bias"})]
)
def test_biases_that_train(bias: Any, expected: set[str]) -> None:
    result = rewriter.apply(traced("mlp"), Lora(targets=("up", "down"), rank=3, bias=bias))
    new = set(added(result.program))
    assert set(result.program.trainable) == new | expected
    module = result.program.module()
    assert {name for name, p in module.named_parameters() if p.requires_grad} == new | expected
    size = sum(t.numel() for t in added(result.program).values())
    beside = sum(result.program.tensor(name).numel() for name in expected)
    assert result.applied[0].trainable == size + beside


def test_modules_to_save_train_whole() -> None:
    result = rewriter.apply(traced("mlp"), Lora(targets=("up",), rank=3, modules_to_save=("head", "norm")))
    assert set(result.program.trainable) - set(added(result.program)) == {
        *("head.weight", "head.bias", "norm.weight", "norm.bias")
    }


@pytest.mark.parametrize("options", [{}, {"dora": True, "lora_bias": True, "bias": "lora_only"}])
def test_training_moves_the_adapter_and_nothing_else(options: dict[str, Any]) -> None:
    base = traced("mlp")
    program = rewriter.apply(base, Lora(targets=("up", "down"), rank=4, alpha=8, dropout=0.1, **options)).program
    before = {name: tensor.detach().clone() for name, tensor in program.tensors.items()}
    module = program.module()
    module.train()
    torch.manual_seed(0)
    x, y = torch.randn(16, 4, 10), torch.randn(16, 4, 7)
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    with_grad = {name for name, p in module.named_parameters() if p.grad is not None}
    assert with_grad == set(program.trainable)
    for name, tensor in module.named_parameters():
        assert torch.equal(tensor, before[name]) is (name not in program.trainable), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.tensors.items())
    back = program.with_weights(module)
    assert torch.equal(back(x), module.eval()(x))
    assert all(torch.equal(back.tensor(name), tensor) for name, tensor in module.named_parameters())
    again = back.with_weights(back.module())
    assert all(torch.equal(again.tensor(name), tensor) for name, tensor in back.tensors.items())


def test_dropout_follows_the_mode() -> None:
    adapted = trained(rewriter.apply(traced("llama"), Lora(targets=("q_proj",), rank=4, dropout=0.5)).program)
    _, args, kwargs = TINY["llama"]()
    module = adapted.module()
    module.eval()
    one, two = module(*args, **kwargs).logits, module(*args, **kwargs).logits
    assert torch.equal(one, two)
    module.train()
    one, two = module(*args, **kwargs).logits, module(*args, **kwargs).logits
    assert not torch.equal(one, two)


def test_a_frozen_parameter_that_moved_is_not_taken_back() -> None:
    program = rewriter.apply(traced("mlp"), Lora(targets=("up",), rank=3)).program
    module = program.module()
    with torch.no_grad():
        module.get_parameter("head.bias").data = module.get_parameter("head.bias").data + 1
    with pytest.raises(RewriteError, match=r"head\.bias is frozen"):
        program.with_weights(module)


# -- shared modules -----------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 9)
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(torch.tanh(self.layer(x))))


def test_a_layer_called_twice_is_one_site_with_two_branches() -> None:
    torch.manual_seed(0)
    base = rewriter.trace(Twice().eval(), (torch.randn(3, 9),))
    lora = Lora(targets=("layer",), rank=4, alpha=7)
    result = rewriter.apply(base, lora)
    assert len(result.sites) == 1
    assert list(added(result.program)) == ["layer.lora_A.default", "layer.lora_B.default"]
    assert operations(result.program).count("aten.linear.default") == 3 + 2 * 2
    adapted = trained(result.program)
    x = torch.randn(5, 9)
    tensors = adapted.tensors
    weight = tensors["layer.weight"] + update(lora, result.sites[0], tensors)
    hidden = torch.tanh(x @ weight.t() + tensors["layer.bias"]) @ weight.t() + tensors["layer.bias"]
    expected = hidden @ tensors["out.weight"].t() + tensors["out.bias"]
    assert torch.allclose(adapted(x), expected, atol=1e-5)
    assert distance([adapted(x)], [base(x)]) > 1e-2
    merged = rewriter.apply(adapted, Merge()).program
    assert operations(merged) == operations(base)
    assert distance([merged(x)], [adapted(x)]) < 1e-5


def test_a_parameter_read_by_two_modules_is_one_site() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    torch.manual_seed(0)
    base = rewriter.trace(Tied().eval(), (torch.randn(3, 9),))
    adapted = trained(rewriter.apply(base, Lora(targets=("second",), rank=4)).program)
    assert {name.split(".")[0] for name in added(adapted)} == {"second"}
    with pytest.raises(RewriteError, match="is also read elsewhere"):
        rewriter.apply(adapted, Merge())
    merged = rewriter.apply(adapted, Merge(untie=True)).program
    x = torch.randn(5, 9)
    assert distance([merged(x)], [adapted(x)]) < 1e-5
    assert torch.equal(merged.tensor("first.weight"), base.tensor("first.weight"))


# -- refusals -----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"rank": 0}, "rank is 0"),
    "rank negative": ({"rank": -4}, "rank is -4"),
    "rank a float": ({"rank": 8.0}, r"rank is 8\.0"),
    "rank a boolean": ({"rank": True}, "rank is True"),
    "rank a text": ({"rank": "8"}, "rank is '8'"),
    "rank huge": ({"rank": 10**9}, "rank is 1000000000"),
    "rank pattern 0": ({"rank_pattern": {"up": 0}}, "rank_pattern 'up' is 0"),
    "alpha NaN": ({"alpha": math.nan}, "alpha is nan"),
    "alpha infinite": ({"alpha": math.inf}, "alpha is inf"),
    "alpha a text": ({"alpha": "16"}, "alpha is '16'"),
    "alpha a boolean": ({"alpha": True}, "alpha is True"),
    "alpha pattern NaN": ({"alpha_pattern": {"up": math.nan}}, "alpha_pattern 'up' is nan"),
    "dropout 1": ({"dropout": 1.0}, r"dropout is 1\.0"),
    "dropout negative": ({"dropout": -0.1}, r"dropout is -0\.1"),
    "dropout NaN": ({"dropout": math.nan}, "dropout is nan"),
    "dropout a text": ({"dropout": "0.1"}, "dropout is '0.1'"),
    "sigma NaN": ({"init": "both", "sigma": math.nan}, "sigma is nan"),
    "init unknown": ({"init": "xavier"}, "init is 'xavier'"),
    "bias unknown": ({"bias": "some"}, "bias is 'some'"),
    "adapter empty": ({"adapter": ""}, "adapter is ''"),
    "adapter with a dot": ({"adapter": "a.b"}, r"adapter is 'a\.b'"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be_meant(case: str) -> None:
    options, said = OPTIONS[case]
    with pytest.raises(UsageError, match=said) as error:
        Lora(targets=("up",), **options)
    assert error.value.exit_code == 2


PLACES: dict[str, tuple[str, dict[str, Any], str]] = {
    "one target of several unmatched": ("llama", {"targets": ("q_proj", "v_projj")}, "'v_projj' matches no layer"),
    "no target": ("mlp", {"targets": ()}, "no target given"),
    "target given twice": ("mlp", {"targets": ("up", "down", "up")}, "'up' is given twice"),
    "target is no layer": ("llama", {"targets": ("self_attn",)}, "no layer with a weight of its own"),
    "target is a norm": ("mlp", {"targets": ("norm",)}, "norm"),
    "overlaps modules_to_save": ("mlp", {"targets": ("up",), "modules_to_save": ("up",)}, "both a target and in"),
    "modules_to_save unmatched": ("mlp", {"targets": ("up",), "modules_to_save": ("heads",)}, "'heads' matches no"),
    "rank pattern unmatched": ("mlp", {"targets": ("up",), "rank_pattern": {"down": 3}}, "'down' matches no target"),
    "alpha pattern unmatched": ("mlp", {"targets": ("up",), "alpha_pattern": {"upp": 3}}, "'upp' matches no target"),
    "rank pattern invalid": ("mlp", {"targets": ("up",), "rank_pattern": {"u(p": 3}}, "not a regular expression"),
    "regex invalid": ("llama", {"targets": r".*(q_proj"}, "not a regular expression"),
    "regex matches only norms": ("llama", {"targets": r".*layernorm"}, "matches"),
    "selector unknown": ("llama", {"targets": ("@attention.queries",)}, "unknown selector"),
    "everything excluded": ("mlp", {"targets": ("up",), "exclude": ("up",)}, "excluded"),
    "layer that does not exist": ("llama", {"targets": ("q_proj",), "layers": (7,)}, "excluded"),
    "slice of a plain layer": ("llama", {"targets": ("down_proj",), "enable": ("q",)}, "has no slice 'q'"),
    "slice that does not exist": ("gpt2", {"targets": ("c_attn",), "enable": ("z",)}, "has no slice 'z'"),
    "slice of an embedding": ("gpt2", {"targets": ("wte",), "enable": ("q",)}, "needs linear layers"),
    "dora on a slice": ("gpt2", {"targets": ("c_attn",), "enable": ("q",), "dora": True}, "DoRA on a slice"),
    "lora_bias on an embedding": ("gpt2", {"targets": ("wpe",), "lora_bias": True}, "lora_bias on the embedding"),
    "pissa on an embedding": ("gpt2", {"targets": ("wpe",), "init": "pissa"}, "needs whole linear layers"),
    "pissa on a tied weight": ("llama_tied", {"targets": ("lm_head",), "init": "pissa", "rank": 3}, "which is tied"),
    "olora of too high a rank": ("mlp", {"targets": ("up",), "init": "olora", "rank": 11}, "needs rank <= 10"),
    "groups": ("conv", {"targets": ("grouped",), "rank": 6}, "not a multiple of its 4 groups"),
    "dora on groups": ("conv", {"targets": ("grouped",), "rank": 8, "dora": True}, "DoRA on a grouped convolution"),
}


@pytest.mark.parametrize("case", PLACES)
def test_places_that_cannot_be_meant(case: str) -> None:
    name, options, said = PLACES[case]
    base = traced(name)
    before = rewriter.text(base)
    with pytest.raises(UsageError, match=said):
        rewriter.apply(base, Lora(**options))
    assert rewriter.text(base) == before


def test_a_catastrophic_regular_expression_ends() -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a" * 60 + "b", nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return next(self.children())(x)

    program = rewriter.trace(Long(), (torch.randn(2, 4),))
    with pytest.raises(UsageError, match=r"takes too long|matches no layer"):
        rewriter.apply(program, Lora(targets=r"((a+)+)+(c|\1)$"))


def test_an_adapter_name_is_used_once_per_layer() -> None:
    once = rewriter.apply(traced("mlp"), Lora(targets=("up",), rank=3)).program
    with pytest.raises(UsageError, match=r"already has a parameter 'up\.lora_A\.default'"):
        rewriter.apply(once, Lora(targets=("up", "down"), rank=2))
    twice = rewriter.apply(once, Lora(targets=("up",), rank=2, adapter="two")).program
    assert len(added(twice)) == 4
    other = rewriter.apply(once, Lora(targets=("down",), rank=2)).program
    assert len(added(other)) == 4


def test_unsupported_layers_are_near_misses_when_others_match() -> None:
    result = rewriter.apply(traced("llama"), Lora(targets=r"model\.layers\.0\..*(q_proj|layernorm)"))
    assert [site.path for site in result.sites] == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"alpha": 0}, "alpha is 0: the adapter has no effect"), ({"rank": 11}, "up: rank 11 exceeds 10")],
)
def test_warnings(options: dict[str, Any], said: str) -> None:
    with pytest.warns(RewriteWarning, match=said):
        rewriter.apply(traced("mlp"), Lora(targets=("up",), **options))
