"""Intrinsic dimension: its projections against dense ones computed by hand, how it starts, trains and merges."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes import Intrinsic, Lora, Merge
from rewriter.errors import UsageError
from rewriter.find import select
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from rewriter.view import Conv, Embedding, Experts, Linear
from tests.models import llama, traced
from tests.oracle import distance, operations, run, traced_double, trained

THETA = "intrinsic_theta.default"
ALL_OF_CONV = ("stem", "grouped", "signal", "classes", "head")


# -- the projections once more, dense and in numpy ------------------------------------------------------------------


def hashes(seed: int, index: int, count: int) -> np.ndarray[Any, Any]:
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    a, b = int.from_bytes(digest[:4], "little") // 2, int.from_bytes(digest[4:8], "little")
    a += a % 2 == 0
    x = (np.arange(count, dtype=np.uint64) * np.uint64(a) + np.uint64(b)) % 2**32
    x = (x ^ x // 2**16) * 0x21F0AAAD % 2**32
    x = (x ^ x // 2**15) * 0x735A2D97 % 2**32
    return x ^ x // 2**15


def sylvester(n: int) -> np.ndarray[Any, Any]:
    result = np.ones((1, 1))
    while len(result) < n:
        result = np.block([[result, result], [result, -result]])
    return result


@functools.cache
def dense(kind: str, seed: int, index: int, count: int, dimension: int, total: int) -> np.ndarray[Any, Any]:
    """The rows of P that belong to one parameter."""
    if kind == "one_hot":
        rows = np.zeros((count, dimension))
        for i, word in enumerate(hashes(seed, index, count)):
            rows[i, int(word) // 2 % dimension] = (-1) ** (int(word) % 2) * math.sqrt(dimension / total)
        return rows
    n = 2 ** math.ceil(math.log2(dimension))
    blocks = math.ceil(count / n)
    words = hashes(seed, index, 2 * blocks * n).reshape(2, blocks, n)
    made = []
    for r in range(blocks):
        signs = np.diag(1.0 - 2.0 * (words[0, r] % 2))
        order = sorted(range(n), key=lambda p: (words[0, r, p] // 2, p))
        permutation = np.eye(n)[order]
        u, v = (words[1, r] // 2**16 + 0.5) / 2**16, (words[1, r] % 2**16) / 2**16
        gauss = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)
        hadamard = sylvester(n)
        made.append(hadamard @ np.diag(gauss / np.linalg.norm(gauss)) @ permutation @ hadamard @ signs)
    return np.concatenate(made)[:count, :dimension] / math.sqrt(total)


def rows(pass_: Intrinsic, program: Program) -> dict[str, Any]:
    """Parameter -> its rows of P; layers in program order, weight before bias."""
    sites = select(program, pass_.targets, kinds=(Linear, Conv, Embedding, Experts))
    names = [name for site in sites for name in (site.weight, site.bias) if name is not None]
    sizes = [program.tensor(name).numel() for name in names]
    return {
        name: dense(pass_.projection, pass_.seed, index, size, pass_.dimension, sum(sizes))
        for index, (name, size) in enumerate(zip(names, sizes, strict=True))
    }


def by_hand(pass_: Intrinsic, base: Program, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W + λ · P θ of every parameter."""
    theta = tensors[THETA].detach().double().numpy()
    result = {}
    for name, projection in rows(pass_, base).items():
        before = base.tensor(name).detach()
        scale = tensors[f"{name.rpartition('.')[0]}.intrinsic_lambda.default"] if pass_.layer_scale else torch.ones(1)
        update = torch.from_numpy(projection @ theta).reshape(before.shape)
        result[name] = before + (scale.detach() * update).to(before.dtype)
    return result


def filled(program: Program) -> Program:
    """θ and λ random and large: the update is as large as the weights."""
    return trained(program, size=6.0)


NUMBERS = {
    "mlp": ("mlp", Intrinsic(dimension=96, seed=3)),
    "mlp, a power of two": ("mlp", Intrinsic(dimension=32, layer_scale=True)),
    "mlp, one number": ("mlp", Intrinsic(dimension=1)),
    "mlp, one entry a row": ("mlp", Intrinsic(dimension=51, projection="one_hot", layer_scale=True)),
    "stored transposed": ("gpt2", Intrinsic(targets=("c_attn", "mlp.c_proj"), dimension=200, layer_scale=True)),
    "stored transposed, one entry a row": ("gpt2", Intrinsic(dimension=200, projection="one_hot")),
    "convolutions and an embedding": ("conv", Intrinsic(targets=ALL_OF_CONV, dimension=60, layer_scale=True)),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_by_hand(case: str) -> None:
    name, pass_ = NUMBERS[case]
    base = traced_double(name)
    program = filled(rewriter.apply(base, pass_).program)
    expected = by_hand(pass_, base, program.tensors)
    outputs = run(base.with_tensors(expected), name)
    assert distance(outputs, run(base, name)) > 0.1
    assert distance(outputs, run(program, name)) < 1e-9

    merged = rewriter.apply(program, Merge()).program
    assert operations(merged) == operations(base)
    assert set(merged.tensors) == set(base.tensors)
    for key, before in base.tensors.items():
        torch.testing.assert_close(merged.tensor(key), expected.get(key, before), rtol=0, atol=1e-12)
    assert distance(outputs, run(merged, name)) < 1e-9


@pytest.mark.parametrize("projection", ["fastfood", "one_hot"])
def test_numbers_in_fp32(projection: Any) -> None:
    pass_ = Intrinsic(dimension=90, projection=projection)
    base = traced("llama")
    program = filled(rewriter.apply(base, pass_).program)
    outputs = run(base.with_tensors(by_hand(pass_, base, program.tensors)), "llama")
    assert distance(outputs, run(base, "llama")) > 0.1
    assert distance(outputs, run(program, "llama")) < 1e-4
    merged = rewriter.apply(program, Merge()).program
    assert distance(outputs, run(merged, "llama")) < 1e-4
    update = merged.tensor("model.layers.0.mlp.up_proj.weight") - base.tensor("model.layers.0.mlp.up_proj.weight")
    expected = by_hand(pass_, base, program.tensors)["model.layers.0.mlp.up_proj.weight"]
    error = update + base.tensor("model.layers.0.mlp.up_proj.weight") - expected
    assert float(error.detach().norm() / update.detach().norm()) < 1e-6


# -- what a projection is like --------------------------------------------------------------------------------------


def test_the_columns_of_fastfood_are_nearly_orthonormal() -> None:
    whole = dense("fastfood", 0, 0, 40 * 64, 64, 40 * 64)
    gram = whole.T @ whole
    np.testing.assert_allclose(np.diag(gram), 1, atol=1e-12)
    np.testing.assert_allclose(np.square(whole).sum(1), 64 / (40 * 64), atol=1e-12)
    beside = gram[~np.eye(64, dtype=bool)]
    assert np.abs(beside).max() < 8 / math.sqrt(40 * 64)
    assert abs(beside.std() * math.sqrt(40 * 64) - math.sqrt(2)) < 0.2  # the spread of g² - 1; 1 for free entries
    entries = whole.ravel() * math.sqrt(40 * 64)
    assert abs(entries.mean()) < 0.02
    assert abs(np.mean(entries**4) - 3) < 0.3


def test_the_columns_of_one_hot_are_orthogonal_and_of_norm_near_one() -> None:
    whole = dense("one_hot", 0, 0, 6400, 40, 6400)
    gram = whole.T @ whole
    assert not np.any(gram[~np.eye(40, dtype=bool)])
    assert abs(np.diag(gram).mean() - 1) < 1e-9
    assert np.abs(np.diag(gram) - 1).max() < 0.3
    assert abs(np.sign(whole.sum(1)).mean()) < 0.05


def test_hashes_are_even_and_those_of_two_parameters_have_nothing_in_common() -> None:
    one, two, other = hashes(0, 0, 4096), hashes(0, 1, 4096), hashes(1, 0, 4096)
    for bit in range(32):
        assert abs(float((one >> np.uint64(bit) & np.uint64(1)).mean()) - 0.5) < 0.04
    for a, b in ((one, two), (one, other), (one[1:], one[:-1])):
        assert abs(np.corrcoef(a.astype(float), b.astype(float))[0, 1]) < 0.06
    assert len(set(one) & (set(two) | set(other))) < 4


# -- how it starts, what is stored ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_nothing_changes_at_the_start(name: str) -> None:
    result = rewriter.apply(traced(name), Intrinsic())
    assert result.applied[0].change is not None
    assert result.applied[0].change.equal
    assert result.applied[0].added == result.applied[0].trainable == 256
    assert result.program.trainable == (THETA,)
    for before, after in zip(run(traced(name), name), run(result.program, name), strict=True):
        assert torch.equal(before, after)


def test_only_the_vector_and_the_scales_are_stored(tmp_path: Path) -> None:
    base = traced("mlp")
    program = rewriter.apply(base, Intrinsic(dimension=70, layer_scale=True)).program
    added = {name: list(program.tensor(name).shape) for name in set(program.tensors) - set(base.tensors)}
    assert added == {THETA: [70], **{f"{layer}.intrinsic_lambda.default": [1] for layer in ("up", "down", "head")}}
    assert all(bool((program.tensor(name) == ("lambda" in name)).all()) for name in added)
    assert program.trainable == tuple(program.steps[-1].added)
    assert not program.exported.constants
    for name, tensor in base.tensors.items():
        assert program.tensor(name) is tensor


@pytest.mark.parametrize("projection", ["fastfood", "one_hot"])
def test_files(projection: Any, tmp_path: Path) -> None:
    pass_ = Intrinsic(targets=("up", "head"), dimension=20, projection=projection, layer_scale=True)
    program = filled(rewriter.apply(traced("mlp"), pass_).program)
    program.save(tmp_path / "model.pt2")
    loaded = rewriter.load(tmp_path / "model.pt2")
    assert str(rewriter.diff(program, loaded)).strip() == "no difference"
    assert distance(run(program, "mlp"), run(loaded, "mlp")) == 0
    plain = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(x), program(x))
    report = export_onnx(program, tmp_path / "model.onnx")
    assert report.max_abs_error < 1e-4


def test_the_seed_makes_the_projection() -> None:
    def update(seed: int, **options: Any) -> Tensor:
        program = rewriter.apply(traced("mlp"), Intrinsic(dimension=30, seed=seed, **options)).program
        merged = rewriter.apply(filled(program), Merge()).program
        return (merged.tensor("down.weight") - traced("mlp").tensor("down.weight")).detach().flatten()

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = update(1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one, update(1))
    other = update(2)
    assert abs(float(torch.nn.functional.cosine_similarity(one, other, dim=0))) < 0.3


def test_tensors_of_two_layers_of_one_shape_move_apart() -> None:
    base = traced("llama")
    merged = rewriter.apply(filled(rewriter.apply(base, Intrinsic(targets=("up_proj",))).program), Merge()).program
    one, two = (
        (merged.tensor(name) - base.tensor(name)).detach().flatten()
        for name in (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    )
    assert abs(float(torch.nn.functional.cosine_similarity(one, two, dim=0))) < 0.2
    assert float(one.norm()) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("projection", ["fastfood", "one_hot"])
def test_a_module_in_a_short_type_has_the_same_projection(dtype: torch.dtype, projection: Any) -> None:
    program = filled(rewriter.apply(traced("mlp"), Intrinsic(dimension=100, projection=projection)).program)
    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    expected, base = program(x), traced("mlp")(x)
    actual = program.module(dtype=dtype).eval()(x.to(dtype)).float()
    assert float((expected - base).detach().norm() / base.detach().norm()) > 0.5
    assert float((actual - expected).detach().norm() / expected.detach().norm()) < 0.02


# -- gradients and training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mlp, a power of two", "mlp, one entry a row", "mlp"])
def test_the_gradient_is_that_of_the_parameters_projected_back(case: str) -> None:
    _, pass_ = NUMBERS[case]
    base = traced_double("mlp")
    program = filled(rewriter.apply(base, pass_).program)
    x = torch.randn(2, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module = program.module().eval()
    module(x).square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert set(gradients) == set(program.trainable)

    leaves = {name: value.requires_grad_() for name, value in by_hand(pass_, base, program.tensors).items()}
    hidden = torch.nn.functional.linear(x, leaves["up.weight"], leaves["up.bias"]).relu()
    norm = nn.functional.layer_norm(
        hidden, [22], base.tensor("norm.weight").detach(), base.tensor("norm.bias").detach()
    )
    result = nn.functional.linear(x + norm @ leaves["down.weight"].T, leaves["head.weight"], leaves["head.bias"])
    result.square().sum().backward()
    theta = program.tensor(THETA).detach()
    expected = {name: torch.zeros_like(program.tensor(name)).detach() for name in program.trainable}
    for name, projection in rows(pass_, base).items():
        whole = leaves[name].grad
        assert whole is not None
        back = torch.from_numpy(projection).T @ whole.flatten()
        scale = f"{name.rpartition('.')[0]}.intrinsic_lambda.default"
        expected[THETA] += back * (program.tensor(scale).detach() if pass_.layer_scale else 1)
        if pass_.layer_scale:
            expected[scale] += theta @ back
    for name, gradient in gradients.items():
        assert float(gradient.norm()) > 1e-3
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


def test_three_hundred_numbers_reach_most_of_what_all_reach() -> None:
    """A classifier of digits, then the same digits mirrored at the diagonal."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    mirrored = x.reshape(-1, 8, 8).transpose(1, 2).reshape(-1, 64).contiguous()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 44), nn.ReLU(), nn.Linear(44, 36), nn.ReLU(), nn.Linear(36, 10))

    def fit(module: nn.Module, images: Tensor, rate: float, steps: int) -> nn.Module:
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], rate)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            batch = torch.randint(0, 1200, (128,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(images[batch]), y[batch]).backward()
            optimizer.step()
        return module

    def accuracy(module: Callable[[Tensor], Tensor]) -> float:
        return float((module(mirrored[1200:]).argmax(-1) == y[1200:]).float().mean())

    fit(model, x, 3e-3, 400)
    before, whole = accuracy(model), accuracy(fit(copy.deepcopy(model), mirrored, 3e-3, 200))
    assert whole - before > 0.6
    base = rewriter.trace(model, (x[:5],))
    for projection, rate in (("fastfood", 0.1), ("one_hot", 0.1)):
        pass_ = Intrinsic(dimension=300, projection=projection)  # type: ignore[arg-type]
        program = rewriter.apply(base, pass_).program
        trained_program = program.with_weights(fit(program.module(), mirrored, rate, 200))
        assert accuracy(trained_program) - before > 0.85 * (whole - before)
        for name, tensor in base.tensors.items():
            assert torch.equal(trained_program.tensor(name), tensor)
        merged = rewriter.apply(trained_program, Merge()).program
        assert accuracy(merged) == pytest.approx(accuracy(trained_program), abs=0.005)


# -- where ----------------------------------------------------------------------------------------------------------


def test_a_slice_of_a_fused_projection_moves_alone() -> None:
    base = traced_double("gpt2")
    pass_ = Intrinsic(targets=("@attention.query", "@attention.value"), dimension=50, layer_scale=True)
    result = rewriter.apply(base, pass_)
    program = filled(result.program)
    scales = [name for name in program.trainable if "lambda" in name]
    assert scales == [
        f"transformer.h.{i}.attn.c_attn.intrinsic_lambda.default.{kind}" for i in (0, 1) for kind in ("query", "value")
    ]
    merged = rewriter.apply(program, Merge()).program
    assert distance(run(merged, "gpt2"), run(program, "gpt2")) < 1e-9
    assert distance(run(merged, "gpt2"), run(base, "gpt2")) > 0.1
    total = 2 * 2 * (24 * 24 + 24)
    theta = program.tensor(THETA).detach().numpy()
    for index, (leaf, shape) in enumerate([("weight", (24, 24)), ("bias", (24,))] * 4):
        name, start = f"transformer.h.{index // 4}.attn.c_attn", 0 if index % 4 < 2 else 48
        rows_ = dense("fastfood", 0, index, math.prod(shape), 50, total)
        scale = float(program.tensor(f"{name}.intrinsic_lambda.default.{'query' if start == 0 else 'value'}").detach())
        update = merged.tensor(f"{name}.{leaf}") - base.tensor(f"{name}.{leaf}")
        expected = torch.from_numpy(scale * rows_ @ theta).reshape(shape)
        torch.testing.assert_close(update[..., start : start + 24].detach(), expected, rtol=0, atol=1e-12)
        assert not update[..., 24:48].any()


def test_the_experts_of_a_mixture_move() -> None:
    base = traced_double("mixtral")
    pass_ = Intrinsic(targets=("gate_up_proj", "down_proj", "gate"), dimension=60, projection="one_hot")
    program = filled(rewriter.apply(base, pass_).program)
    merged = rewriter.apply(program, Merge()).program
    assert operations(merged) == operations(base)
    expected = by_hand(pass_, base, program.tensors)
    assert len(expected) == 6
    for name, value in expected.items():
        torch.testing.assert_close(merged.tensor(name), value, rtol=0, atol=1e-12)
    assert distance(run(merged, "mixtral"), run(program, "mixtral")) < 1e-9


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens", "lm_head")])
def test_a_tied_weight_moves_once_and_for_both(targets: tuple[str, ...]) -> None:
    base = traced("llama_tied")
    pass_ = Intrinsic(targets=targets, dimension=50)
    result = rewriter.apply(base, pass_)
    assert len(result.sites) == 1
    assert len(result.applied[0].missed) == len(targets) - 1
    program = filled(result.program)
    projection = dense("fastfood", 0, 0, 31 * 24, 50, 31 * 24)
    moved = base.tensor("lm_head.weight").detach() + torch.from_numpy(
        projection @ program.tensor(THETA).detach().double().numpy()
    ).reshape(31, 24).to(torch.float32)
    model, args, kwargs = llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").copy_(moved)
        expected = model(*args, **kwargs).logits
    assert float((run(program, "llama_tied")[0] - expected).abs().max()) < 1e-4
    assert float((run(base, "llama_tied")[0] - expected).abs().max()) > 1
    merged = rewriter.apply(program, Merge()).program
    assert operations(merged) == operations(base)
    assert merged.tied() == base.tied()
    assert float((run(merged, "llama_tied")[0] - expected).abs().max()) < 1e-4


def test_it_stacks_on_dora_and_each_goes_alone() -> None:
    base = traced("mlp")
    lora = rewriter.apply(base, Lora(targets=("up",), rank=3, dora=True)).program
    program = filled(rewriter.apply(lora, Intrinsic(dimension=40)).program)
    merged = rewriter.apply(program, Merge()).program
    assert operations(merged) == operations(base)
    assert distance(run(merged, "mlp"), run(program, "mlp")) < 1e-3
    alone = rewriter.undo(program, "lora")
    assert alone.trainable == (THETA,)
    direct = rewriter.apply(base, Intrinsic(dimension=40)).program.with_tensors({THETA: program.tensor(THETA)})
    assert distance(run(alone, "mlp"), run(direct, "mlp")) == 0


@pytest.mark.parametrize("case", ["mlp", "mlp, one entry a row", "stored transposed"])
def test_undo_leaves_no_difference(case: str) -> None:
    name, pass_ = NUMBERS[case]
    after = rewriter.undo(filled(rewriter.apply(traced(name), pass_).program))
    assert str(rewriter.diff(traced(name), after)).strip() == "no difference"
    for key, tensor in traced(name).tensors.items():
        assert after.tensor(key) is tensor


def test_undo_under_and_over_another_pass() -> None:
    base = traced("llama")
    lora = rewriter.apply(base, Lora()).program
    both = rewriter.apply(lora, Intrinsic(dimension=40)).program
    assert str(rewriter.diff(lora, rewriter.undo(both, "intrinsic"))).strip() == "no difference"
    assert str(rewriter.diff(base, rewriter.undo(rewriter.undo(both, "lora")))).strip() == "no difference"


# -- what is refused ------------------------------------------------------------------------------------------------


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dimension": 0}, "dimension is 0"),
    ({"dimension": True}, "dimension is True"),
    ({"dimension": 2.5}, "dimension is 2.5"),
    ({"seed": "one"}, "seed is 'one'"),
    ({"projection": "dense"}, "projection is 'dense'"),
    ({"layer_scale": 1}, "layer_scale is 1"),
    ({"adapter": "a.b"}, "adapter is 'a.b'"),
    ({"adapter": ""}, "adapter is ''"),
]


@pytest.mark.parametrize(("options", "what"), REFUSED)
def test_options_that_cannot_be_meant(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        Intrinsic(**options)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="dimension is 256, the chosen parameters have 77 numbers"):
        rewriter.apply(traced("mlp"), Intrinsic(targets=("head",)))
    with pytest.raises(UsageError, match="matches no layer"):
        rewriter.apply(traced("mlp"), Intrinsic(targets=("nowhere",)))
    with pytest.raises(UsageError, match="matches norm"):
        rewriter.apply(traced("mlp"), Intrinsic(targets=("norm",)))
    with pytest.raises(UsageError, match="only layers that are excluded"):
        rewriter.apply(traced("mlp"), Intrinsic(targets=("up",), exclude=("up",)))


def test_exclude() -> None:
    result = rewriter.apply(traced("mlp"), Intrinsic(dimension=40, exclude=("up",)))
    assert [site.path for site in result.sites] == ["down", "head"]
    other = rewriter.apply(traced("mlp"), replace(Intrinsic(dimension=40), adapter="other")).program
    assert other.trainable == ("intrinsic_theta.other",)


# -- what it adds, as a reader sees it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "pass_"),
    [
        ("intrinsic", Intrinsic(targets=("head",), dimension=24)),
        ("intrinsic_one_hot", Intrinsic(targets=("up", "down"), dimension=24, projection="one_hot", layer_scale=True)),
    ],
)
def test_what_it_adds(case: str, pass_: Intrinsic, golden: Callable[[str, str], None]) -> None:
    golden(f"{case}.diff", str(rewriter.diff(traced("mlp"), rewriter.apply(traced("mlp"), pass_).program)))
