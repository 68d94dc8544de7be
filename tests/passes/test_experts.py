"""LoRA on the experts of a mixture, whose weights are stacks of matrices: exact counts, the law, and the fold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes import Lora, Merge
from rewriter.errors import RewriteError, UsageError
from rewriter.program import Program
from rewriter.text import text
from rewriter.view import Experts, layers
from tests.models import TINY, traced
from tests.oracle import distance, operations, run, traced_double, trained

EXPERTS, TOKENS, IN, OUT, RANK = 5, 11, 12, 18, 4
TARGETS = ("gate_up_proj", "down_proj")
PATHS = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in TARGETS]
MERGED, EFFECT = 1e-9, 1e-2
ROUTED = 1e-6  # Mixtral's router is in fp32, also in an fp64 model


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) / 2


def factors(program: Program, path: str) -> tuple[Tensor, Tensor]:
    a, b = (program.tensor(f"{path}_adapter.lora_{letter}.default").detach() for letter in "AB")
    return a, b


# -- a mixture of experts of transformers ---------------------------------------------------------------------------


def mixtral_by_hand(program: Program, scale: float) -> Tensor:
    """What `mlp` of layer 0 with its LoRA gives, one token and one expert at a time."""
    x = noise(TOKENS, 24, seed=4)
    gate = program.tensor("model.layers.0.mlp.gate.weight").detach()
    result = torch.zeros_like(x)
    stacks = {}
    for name in TARGETS:
        path = f"model.layers.0.mlp.experts.{name}"
        (a, b), weight = factors(program, path), program.tensor(path).detach()
        stacks[name] = [weight[e] + scale * b[e] @ a[e] for e in range(EXPERTS)]
    for token in range(TOKENS):
        chances = (gate @ x[token]).softmax(0)
        best = chances.topk(2)
        for share, expert in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
            first, second = (stacks["gate_up_proj"][expert] @ x[token]).chunk(2)
            result[token] += share * (stacks["down_proj"][expert] @ (nn.functional.silu(first) * second))
    return result


def mixtral_block(program: Program) -> Tensor:
    """The same by transformers' own block with the weights of a program that has no branches."""
    module = TINY["mixtral"]()[0].double()
    block = module.model.layers[0].mlp
    block.experts.config._experts_implementation = "eager"
    own = {name.removeprefix("model.layers.0.mlp."): t for name, t in program.tensors.items() if "layers.0.mlp" in name}
    block.load_state_dict({name: tensor.detach() for name, tensor in own.items()})
    result: Tensor = block(noise(1, TOKENS, 24, seed=4))[0].detach()
    return result


def test_views_of_the_experts() -> None:
    found = layers(traced("mixtral"))
    sites = [site for site in found.values() if isinstance(site, Experts)]
    assert [site.path for site in sites] == PATHS
    assert [(s.experts, s.in_features, s.out_features, s.transposed) for s in sites[:2]] == [
        (5, 24, 56, False),
        (5, 28, 24, False),
    ]
    assert all(len(site.calls) == 1 and site.weight == site.path for site in sites)


@pytest.mark.parametrize(
    ("targets", "paths"),
    [(TARGETS, PATHS), (r".*layers\.1.*experts\.down_proj", PATHS[3:]), (("experts.gate_up_proj",), PATHS[::2])],
)
def test_targets_by_name_and_pattern(targets: Any, paths: list[str]) -> None:
    sites = Lora(targets=targets).find(traced("mixtral"))
    assert [site.path for site in sites] == paths


def test_selectors() -> None:
    program = traced("mixtral")
    linear = [site.path for site in Lora(targets="all-linear", rank=2).find(program)]
    assert not set(PATHS) & set(linear)
    perceptrons = [site.path for site in Lora(targets=("@mlp",), rank=2).find(program)]
    assert set(PATHS) <= set(perceptrons)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_exact_at_the_start_and_counts(init: Any) -> None:
    base = traced("mixtral")
    result = rewriter.apply(base, Lora(targets=TARGETS, rank=3, init=init))
    assert distance(run(base, "mixtral"), run(result.program, "mixtral")) == 0
    expected = 2 * EXPERTS * 3 * ((24 + 56) + (28 + 24))
    assert result.applied[0].added == result.applied[0].trainable == expected
    a, b = factors(result.program, PATHS[0])
    assert (a.shape, b.shape) == ((EXPERTS, 3, 24), (EXPERTS, 56, 3))
    assert not b.any()
    spread = {"kaiming": (1 / 24 / 3) ** 0.5, "gaussian": 1 / 3}[init]  # of one expert: the stack adds nothing to a fan
    assert a.std().item() == pytest.approx(spread, rel=0.1)


def test_both_moves_the_output_at_once() -> None:
    base = traced("mixtral")
    moved = rewriter.apply(base, Lora(targets=TARGETS, rank=3, init="both", sigma=0.3)).program
    assert distance(run(base, "mixtral"), run(moved, "mixtral")) > EFFECT


def test_merge_is_the_sum_by_hand() -> None:
    base = traced_double("mixtral")
    adapted = trained(rewriter.apply(base, Lora(targets=(*TARGETS, "q_proj"), rank=3, alpha=7, dropout=0.2)).program)
    merged = rewriter.apply(adapted, Merge()).program
    assert distance(run(base, "mixtral"), run(adapted, "mixtral")) > EFFECT
    assert distance(run(merged, "mixtral"), run(adapted, "mixtral")) < MERGED
    assert operations(merged) == operations(base)
    assert list(merged.tensors) == list(base.tensors)
    for path in PATHS:
        a, b = factors(adapted, path)
        expected = base.tensor(path).detach().clone()
        for e in range(EXPERTS):
            expected[e] += 7 / 3 * b[e] @ a[e]
        assert torch.allclose(merged.tensor(path), expected, rtol=0, atol=1e-12)
    assert torch.allclose(mixtral_block(merged), mixtral_by_hand(adapted, 7 / 3), rtol=0, atol=ROUTED)
    assert float((mixtral_block(base) - mixtral_block(merged)).abs().max()) > EFFECT


def test_dropout_acts_in_training_only() -> None:
    program = rewriter.apply(
        traced("mixtral"), Lora(targets=TARGETS, rank=3, dropout=0.5, init="both", sigma=1)
    ).program
    inputs = TINY["mixtral"]()[2]
    module = program.module().eval()
    assert torch.equal(module(**inputs)["logits"], module(**inputs)["logits"])
    module.train()
    assert not torch.equal(module(**inputs)["logits"], module(**inputs)["logits"])
    module(**inputs)["logits"].square().sum().backward()
    wanted = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert wanted == set(program.trainable)


def test_undo_and_files_are_exact(tmp_path: Path) -> None:
    base = traced("mixtral")
    adapted = trained(rewriter.apply(base, Lora(targets=TARGETS, rank=3)).program)
    undone = rewriter.undo(rewriter.undo(rewriter.apply(adapted, Merge()).program))
    assert text(undone) == text(base)
    assert all(torch.equal(undone.tensor(name), base.tensor(name)) for name in base.tensors)
    loaded = rewriter.load(adapted.save(tmp_path / "adapted.pt2"))
    assert text(loaded) == text(adapted)
    assert distance(run(loaded, "mixtral"), run(adapted, "mixtral")) == 0
    assert text(rewriter.apply(loaded, Merge()).program) == text(rewriter.apply(adapted, Merge()).program)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dora": True}, "dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init": "pissa"}, "init=pissa"),
        ({"init": "olora"}, "init=olora"),
        ({"enable": ("q",)}, "enable=q"),
    ],
)
def test_refusals_name_the_option(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        Lora(targets=("down_proj",), **options).find(traced("mixtral"))
    assert "down_proj" in str(caught.value)


def test_no_peft_directory_for_experts(tmp_path: Path) -> None:
    from passes.peft_write import write_adapter

    program = rewriter.apply(traced("mixtral"), Lora(targets=("down_proj",), rank=3)).program
    with pytest.raises(RewriteError, match="parameter without a module"):
        write_adapter(program, tmp_path / "adapter")


def test_target_parameters_of_peft_fold() -> None:
    from peft import LoraConfig, get_peft_model

    module, args, inputs = TINY["mixtral"]()
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{name}" for name in TARGETS]
    )
    model = get_peft_model(module.double(), config)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data = noise(*parameter.shape, seed=seed)
    base, adapted = traced_double("mixtral"), rewriter.trace(model.eval(), args, inputs)
    merged = rewriter.apply(adapted, Merge()).program
    assert distance(run(base, "mixtral"), run(adapted, "mixtral")) > EFFECT
    assert distance(run(merged, "mixtral"), run(adapted, "mixtral")) < MERGED
    assert operations(merged) == operations(base)
    assert not any("lora_" in name for name in merged.tensors)
    assert len(merged.parameters()) == len(base.parameters())
    merged.exported.validate()


# -- other spellings ------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """A stack of matrices applied in one spelling, between two operations that are not affine."""

    def __init__(self, spelling: Callable[[Stack, Tensor], Tensor], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.W = nn.Parameter(noise(EXPERTS, OUT, IN, seed=1, dtype=dtype))
        self.Wt = nn.Parameter(noise(EXPERTS, IN, OUT, seed=2, dtype=dtype))
        self.A = nn.Parameter(noise(EXPERTS, RANK, IN, seed=3, dtype=dtype))
        self.B = nn.Parameter(noise(EXPERTS, OUT, RANK, seed=5, dtype=dtype))
        self.shared = nn.Parameter(noise(RANK, IN, seed=6, dtype=dtype))
        self.up = nn.Parameter(noise(OUT, RANK, seed=7, dtype=dtype))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.spelling(self, torch.sin(x)))


def stack(spelling: Callable[[Stack, Tensor], Tensor]) -> Program:
    return rewriter.trace(Stack(spelling), (batch(),))


def batch() -> Tensor:
    return noise(3, EXPERTS, 7, IN, seed=8)


def flat(m: Stack, x: Tensor, weight: Tensor) -> Tensor:
    """`bmm` on one batch element, so that the batch counts the experts."""
    return torch.bmm(x[0], weight)


PLAIN: dict[str, tuple[Callable[[Stack, Tensor], Tensor], str]] = {
    "bmm": (lambda m, x: flat(m, x, m.W.transpose(1, 2)), "W"),
    "bmm as stored": (lambda m, x: flat(m, x, m.Wt), "Wt"),
    "matmul": (lambda m, x: x @ m.W.mT, "W"),
    "matmul as stored": (lambda m, x: x @ m.Wt, "Wt"),
    "permuted": (lambda m, x: x @ m.W.permute(0, 2, 1), "W"),
    "einsum": (lambda m, x: torch.einsum("beti,eoi->beto", x, m.W), "W"),
    "einsum as stored": (lambda m, x: torch.einsum("bxyr,xrs->bxys", x, m.Wt), "Wt"),
    "einsum, experts last": (lambda m, x: torch.einsum("btei,eio->bteo", x.transpose(1, 2), m.Wt), "Wt"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_batched_products(name: str) -> None:
    spelling, weight = PLAIN[name]
    base = stack(spelling)
    (site,) = layers(base).values()
    assert isinstance(site, Experts)
    assert (site.path, site.experts, site.in_features, site.out_features) == (weight, EXPERTS, IN, OUT)
    assert site.transposed == (weight == "Wt")
    result = rewriter.apply(base, Lora(targets=(weight,), rank=RANK, alpha=6))
    assert torch.equal(result.program(batch()), base(batch()))
    assert result.applied[0].added == RANK * (IN + OUT) * EXPERTS
    adapted = trained(result.program)
    a, b = factors(adapted, weight)
    by_hand = Stack(spelling)
    with torch.no_grad():
        for e in range(EXPERTS):
            update = 6 / RANK * b[e] @ a[e]
            getattr(by_hand, weight)[e] += update if weight == "W" else update.t()
    assert torch.allclose(adapted(batch()), by_hand(batch()), rtol=0, atol=MERGED)
    assert float((adapted(batch()) - base(batch())).abs().max()) > EFFECT
    merged = rewriter.apply(adapted, Merge()).program
    assert operations(merged) == operations(base)
    assert torch.allclose(merged.tensor(weight), getattr(by_hand, weight), rtol=0, atol=1e-12)


FOLDS: dict[str, Callable[[Stack, Tensor], Tensor]] = {
    "computed": lambda m, x: x @ (m.W + 2 * m.B @ m.A).mT,
    "computed by baddbmm": lambda m, x: x @ torch.baddbmm(m.W, m.B, m.A, alpha=2).mT,
    "branch": lambda m, x: x @ m.W.mT + 2 * (x @ m.A.mT) @ m.B.mT,
    "shared A": lambda m, x: x @ m.W.mT + 2 * (x @ m.shared.t()) @ m.B.mT,
    "shared B": lambda m, x: x @ m.W.mT + ((x @ m.A.mT) @ m.up.t()) / 3,
    "shared update": lambda m, x: x @ m.W.mT + (x @ m.shared.t()) @ m.up.t(),
    "other spelling": lambda m, x: x @ m.W.mT + torch.einsum("beti,eri->betr", x, m.A) @ m.B.mT,
}


@pytest.mark.parametrize("name", FOLDS)
def test_handwritten_updates_fold(name: str) -> None:
    base, adapted = stack(PLAIN["matmul"][0]), stack(FOLDS[name])
    merged = rewriter.apply(adapted, Merge()).program
    assert operations(merged) == operations(base)
    assert [name for name in merged.tensors if merged.placeholder(name).users] == ["W"]
    assert float((adapted(batch()) - base(batch())).abs().max()) > EFFECT
    assert torch.allclose(merged(batch()), adapted(batch()), rtol=0, atol=MERGED)


STAYS: dict[str, Callable[[Stack, Tensor], Tensor]] = {
    "rows of other experts": lambda m, x: x @ m.W.mT + 2 * ((x.flip(1) @ m.A.mT) @ m.B.mT),
    "experts in another dimension": lambda m, x: (
        x[:, :, :EXPERTS] @ m.W.mT + torch.einsum("bsei,eoi->bseo", x[:, :, :EXPERTS], m.B @ m.A)
    ),
    "a constant per expert": lambda m, x: ((x @ m.A.mT) + 1) @ m.B.mT + x @ m.W.mT,
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_no_update_of_the_stack_stays(name: str) -> None:
    with pytest.raises(RewriteError, match="nothing to merge"):
        rewriter.apply(stack(STAYS[name]), Merge())


@pytest.mark.parametrize("rank", [3, 8])
def test_the_grouped_product_of_the_framework(rank: int) -> None:
    """`aten._grouped_mm`, which wants rows of 16 bytes: an update of any rank runs, trains and folds."""
    offsets = torch.tensor([2, 5, 5, 9, TOKENS], dtype=torch.int32)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(noise(EXPERTS, 16, 24, seed=1, dtype=torch.bfloat16))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch.nn.functional.grouped_mm(torch.sin(x), self.up.transpose(-2, -1), offs=ends).tanh()

    x = noise(TOKENS, 24, seed=3, dtype=torch.bfloat16)
    shapes = {"x": {0: torch.export.Dim.AUTO}, "ends": None}
    base = rewriter.trace(Routed(), (x, offsets), dynamic_shapes=shapes)
    adapted = trained(rewriter.apply(base, Lora(targets=("up",), rank=rank, alpha=rank)).program)
    a, b = factors(adapted, "up")
    weight = base.tensor("up").detach().double()
    expected, start = torch.zeros(TOKENS, 16, dtype=torch.float64), 0
    for e, end in enumerate(offsets.tolist()):
        for row in range(start, end):
            expected[row] = (weight[e] + b[e].double() @ a[e].double()) @ torch.sin(x[row]).double()
        start = end
    merged = rewriter.apply(adapted, Merge()).program
    assert operations(merged) == operations(base)
    assert float((expected.tanh() - base(x, offsets).double()).abs().max()) > 0.3
    for program in (adapted, merged):
        assert float((program(x, offsets).double() - expected.tanh()).abs().max()) < 0.05
    module = adapted.module()
    (module(x, offsets) * noise(TOKENS, 16, seed=4, dtype=torch.bfloat16)).sum().backward()
    assert all(p.grad.any() for name, p in module.named_parameters() if name in adapted.trainable)


# -- three-dimensional convolutions ---------------------------------------------------------------------------------


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(4, 6, (3, 2, 5), padding=(1, 0, 2), stride=(1, 2, 1))
        self.last = nn.Conv3d(6, 9, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.stem(x)))


@pytest.mark.parametrize("options", [{}, {"lora_bias": True, "dropout": 0.3}, {"dora": True}], ids=str)
def test_convolutions_of_volumes(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = noise(2, 4, 7, 9, 11)
    base = rewriter.trace(Volumes().double(), (x,))
    lora = Lora(targets=("stem", "last"), rank=4, alpha=6, **options)
    result = rewriter.apply(base, lora)
    assert float((result.program(x) - base(x)).abs().max()) < (1e-12 if lora.dora else 1e-30)
    adapted = trained(result.program)
    merged = rewriter.apply(adapted, Merge()).program
    assert operations(merged) == operations(base)
    assert float((adapted(x) - base(x)).abs().max()) > EFFECT
    assert float((adapted(x) - merged(x)).abs().max()) < MERGED
    if not lora.dora:
        a, b = (adapted.tensor(f"stem.lora_{letter}.default") for letter in "AB")
        expected = base.tensor("stem.weight") + 1.5 * torch.einsum("or,rixyz->oixyz", b.flatten(1), a)
        assert torch.allclose(merged.tensor("stem.weight"), expected, rtol=0, atol=1e-12)
