"""Composing LoRAs: every method against sums written out by hand in fp64, PEFT as an oracle where it is right."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import rewriter
from passes import Lora, Merge
from passes.compose import Compose
from passes.peft import PeftAdapter
from passes.peft_write import write_adapter
from rewriter import verify
from rewriter.errors import RewriteError, UsageError
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from rewriter.text import text
from tests.models import TINY, traced
from tests.oracle import distance, run, traced_double, trained
from tests.passes.test_golden import Golden

A = Lora(targets=("up", "down"), rank=3, alpha=5, adapter="a")
B = Lora(targets=("up", "head"), rank=3, alpha=7, rslora=True, adapter="b")
WEIGHTS = {"a": 0.7, "b": -1.3}
SCALES = {"a": 5 / 3, "b": 7 / math.sqrt(3)}


def two(name: str = "mlp", *passes: Lora, double: bool = True) -> Program:
    return trained(rewriter.apply((traced_double if double else traced)(name), *(passes or (A, B))).program)


def factors(program: Program, path: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of each adapter that the layer has."""
    held = program.tensors
    return {
        adapter: (held[f"{path}.lora_A.{adapter}"].detach(), held[f"{path}.lora_B.{adapter}"].detach())
        for adapter in "ab"
        if f"{path}.lora_A.{adapter}" in held
    }


def updates(program: Program, path: str) -> dict[str, Tensor]:
    return {name: SCALES[name] * b @ a for name, (a, b) in factors(program, path).items()}


def composed(program: Program, **options: Any) -> Program:
    given = {"adapters": ("a", "b"), "weights": tuple(WEIGHTS.values()), "adapter": "c", **options}
    return rewriter.apply(program, Compose(**given)).program


def change(program: Program, path: str) -> Tensor:
    """What a merge adds to the weight of a layer."""
    name = f"{path}.weight"
    return rewriter.apply(program, Merge()).program.tensor(name).detach() - program.tensor(name).detach()


# -- rules, element by element ------------------------------------------------------------------------------------


def trimmed(tensor: Tensor, density: float) -> Tensor:
    order = sorted(range(tensor.numel()), key=lambda i: -abs(float(tensor.flatten()[i])))
    result = torch.zeros_like(tensor).flatten()
    for i in order[: int(density * tensor.numel())]:
        result[i] = tensor.flatten()[i]
    return result.view_as(tensor)


def elected(values: list[float], weights: list[float], rule: str) -> float:
    votes = sum(values) if rule == "total" else sum((v > 0) - (v < 0) for v in values)
    winners = [w * v for v, w in zip(values, weights, strict=True) if (v > 0 if votes >= 0 else v < 0)]
    return sum(winners) / max(len(winners), 1)


def by_ties(tensors: Mapping[str, Tensor], weights: Mapping[str, float], rule: str, density: float) -> Tensor:
    flat = [trimmed(tensor, density).flatten() for tensor in tensors.values()]
    entries = [elected([float(t[i]) for t in flat], [weights[k] for k in tensors], rule) for i in range(len(flat[0]))]
    return torch.tensor(entries, dtype=torch.float64).view_as(next(iter(tensors.values())))


def best(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank, by the eigenvectors of MᵀM."""
    _, vectors = torch.linalg.eigh(matrix.t() @ matrix)
    kept = vectors[:, -rank:]
    return matrix @ kept @ kept.t()


def signed_root(factor: float) -> float:
    return math.copysign(math.sqrt(abs(factor)), factor)


@pytest.mark.parametrize("path", ["up", "down", "head"])
def test_cat_is_the_weighted_sum(path: str) -> None:
    program = two()
    expected = sum(WEIGHTS[name] * update for name, update in updates(program, path).items())
    after = composed(program)
    torch.testing.assert_close(change(after, path), expected, rtol=1e-12, atol=1e-13)
    assert after.tensor(f"{path}.lora_A.c").shape[0] == (6 if path == "up" else 3)
    assert not [name for name in after.tensors if name.endswith((".a", ".b"))]


@pytest.mark.parametrize("path", ["up", "down", "head"])
def test_svd_is_the_best_approximation_and_notes_its_error(path: str) -> None:
    program = two()
    result = rewriter.apply(
        program, Compose(adapters=("a", "b"), weights=(0.7, -1.3), method="svd", rank=2, adapter="c")
    )
    exact = sum(WEIGHTS[name] * update for name, update in updates(program, path).items())
    assert isinstance(exact, Tensor)
    expected = best(exact, 2)
    torch.testing.assert_close(change(result.program, path), expected, rtol=1e-8, atol=1e-10)
    error = float((expected - exact).norm() / exact.norm())
    assert error > 0.01
    assert result.applied[0].notes[path]["error_of_update"] == pytest.approx(error, rel=1e-9)


def test_svd_of_enough_rank_is_exact_and_its_default_is_the_largest_rank() -> None:
    program = two()
    exact = sum(WEIGHTS[name] * update for name, update in updates(program, "up").items())
    assert isinstance(exact, Tensor)
    torch.testing.assert_close(change(composed(program, method="svd", rank=100), "up"), exact)
    assert composed(program, method="svd").tensor("up.lora_A.c").shape == (3, 10)


def test_linear_is_as_peft_defines_it_and_no_weighted_sum() -> None:
    program = two()
    a = sum(signed_root(WEIGHTS[k] * SCALES[k]) * pair[0] for k, pair in factors(program, "up").items())
    b = sum(math.sqrt(abs(WEIGHTS[k] * SCALES[k])) * pair[1] for k, pair in factors(program, "up").items())
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    found = change(composed(program, method="linear"), "up")
    torch.testing.assert_close(found, b @ a)
    exact = sum(WEIGHTS[name] * update for name, update in updates(program, "up").items())
    assert float((found - exact).norm()) > 0.1 * float(found.norm())


@pytest.mark.parametrize("rule", ["total", "frequency"])
@pytest.mark.parametrize("path", ["up", "down"])
def test_ties(path: str, rule: str) -> None:
    program = two()
    held = factors(program, path)
    roots = {k: signed_root(WEIGHTS[k] * SCALES[k]) for k in held}
    a = by_ties({k: pair[0] for k, pair in held.items()}, roots, rule, 0.6)
    b = by_ties({k: pair[1] for k, pair in held.items()}, {k: abs(r) for k, r in roots.items()}, rule, 0.6)
    after = composed(program, method="ties", density=0.6, majority_sign=rule)
    torch.testing.assert_close(after.tensor(f"{path}.lora_A.c").detach(), a)
    torch.testing.assert_close(after.tensor(f"{path}.lora_B.c").detach(), b)
    torch.testing.assert_close(change(after, path), b @ a)
    after = composed(program, method="ties_svd", density=0.6, majority_sign=rule, rank=10)
    torch.testing.assert_close(change(after, path), by_ties(updates(program, path), WEIGHTS, rule, 0.6))


def test_magnitude_pruning() -> None:
    program = two()
    held = factors(program, "up")
    a = sum(signed_root(WEIGHTS[k] * SCALES[k]) * trimmed(pair[0], 0.45) for k, pair in held.items())
    after = composed(program, method="magnitude_prune", density=0.45)
    torch.testing.assert_close(after.tensor("up.lora_A.c").detach(), a)
    expected = sum(WEIGHTS[k] * trimmed(update, 0.45) for k, update in updates(program, "up").items())
    assert isinstance(expected, Tensor)
    after = composed(program, method="magnitude_prune_svd", density=0.45, rank=4)
    torch.testing.assert_close(change(after, "up"), best(expected, 4), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_entries_at_random_and_rescales_them(method: str) -> None:
    """Without knowing the masks: every entry is what one of the four possible masks of two adapters gives."""
    program, density = two(), 0.7
    held = factors(program, "up")
    after = composed(program, method=method, density=density)
    for letter, index in (("A", 0), ("B", 1)):
        found = after.tensor(f"up.lora_{letter}.c").detach()
        roots = [signed_root(WEIGHTS[k] * SCALES[k]) for k in held]
        weights = roots if letter == "A" else [abs(root) for root in roots]
        seen = set()
        for place in itertools.product(*(range(size) for size in found.shape)):
            values = [float(pair[index][place]) / density for pair in held.values()]
            options = {}
            for mask in itertools.product((0, 1), repeat=2):
                kept = [m * v for m, v in zip(mask, values, strict=True)]
                total = sum(w * v for w, v in zip(weights, kept, strict=True))
                options[mask] = total if method == "dare_linear" else elected(kept, weights, "total")
            fits = [mask for mask, value in options.items() if math.isclose(value, float(found[place]), abs_tol=1e-12)]
            assert fits
            seen.add(fits[0])
        assert len(seen) >= 3
    other = composed(program, method=method, density=density, seed=1)
    assert not torch.equal(other.tensor("up.lora_A.c"), after.tensor("up.lora_A.c"))
    again = composed(program, method=method, density=density)
    assert torch.equal(again.tensor("up.lora_A.c"), after.tensor("up.lora_A.c"))


def test_dare_keeps_the_expected_share_of_the_updates() -> None:
    program = two("mlp", A)
    after = composed(program, adapters=("a",), weights=(1,), method="dare_linear_svd", density=0.25, rank=10)
    update, found = updates(program, "up")["a"], change(after, "up")
    kept = found.abs() > 1e-9
    torch.testing.assert_close(found[kept], update[kept] / 0.25)
    assert 0.15 < float(kept.double().mean()) < 0.35
    everything = composed(two(), method="dare_ties_svd", density=1, rank=10)
    torch.testing.assert_close(change(everything, "down"), WEIGHTS["a"] * updates(two(), "down")["a"])


# -- PEFT as the oracle -------------------------------------------------------------------------------------------


def in_peft(directory: Path, name: str = "llama", **options: Any) -> PeftModel:
    """A PEFT model with two random adapters a and b, which is also saved to the directory."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options})
    model = get_peft_model(TINY[name]()[0], config, adapter_name="a")
    model.add_adapter("b", config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return model.eval()


def outputs(model: Callable[..., Any], name: str = "llama") -> list[Tensor]:
    _, args, kwargs = TINY[name]()
    with torch.no_grad():
        return verify.outputs(model(*args, **kwargs))


def read_both(directory: Path, name: str = "llama") -> Program:
    steps = [PeftAdapter(directory / letter, adapter=letter) for letter in "ab"]
    return rewriter.apply(traced(name), *steps).program


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Program]:
    directory = tmp_path_factory.mktemp("plain")
    return in_peft(directory), read_both(directory)


PARITY: dict[str, dict[str, Any]] = {
    "cat": {},
    "linear": {},
    "svd": {"rank": 3},
    "ties": {"density": 0.5},
    "ties_svd": {"density": 0.5, "rank": 5, "majority_sign": "frequency"},
    "magnitude_prune": {"density": 0.3},
    "magnitude_prune_svd": {"density": 0.3},
}


@pytest.mark.parametrize("method", PARITY)
def test_parity_with_peft_for_plain_lora(method: str, plain: tuple[PeftModel, Program], tmp_path: Path) -> None:
    model, program = plain
    options = dict(PARITY[method])
    theirs = {"rank": "svd_rank", "majority_sign": "majority_sign_method"}
    name = f"c_{method}"
    model.add_weighted_adapter(
        ["a", "b"], [0.8, -0.5], name, combination_type=method, **{theirs.get(k, k): v for k, v in options.items()}
    )
    model.set_adapter(name)
    expected = outputs(model)
    compose = Compose(adapters=("a", "b"), weights=(0.8, -0.5), method=method, adapter="c", **options)  # type: ignore[arg-type]
    after = rewriter.apply(program, compose).program
    assert distance(outputs(after), expected) < 1e-5
    assert distance(outputs(traced("llama")), expected) > 1e-2
    written = write_adapter(after, tmp_path, adapter="c")
    loaded = PeftModel.from_pretrained(TINY["llama"]()[0], written).eval()
    assert distance(outputs(loaded), expected) < 1e-5


def both_active(model: PeftModel) -> list[Tensor]:
    model.base_model.set_adapter(["a", "b"])
    return outputs(model)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"lora_bias": True}])
def test_exact_where_peft_is_not(options: dict[str, Any], tmp_path: Path) -> None:
    model = in_peft(tmp_path / "both", **options)
    expected = both_active(model)
    after = rewriter.apply(read_both(tmp_path / "both"), Compose(adapter="c")).program
    assert distance(outputs(after), expected) < 1e-5
    written = write_adapter(after, tmp_path / "ours", adapter="c")
    loaded = PeftModel.from_pretrained(TINY["llama"]()[0], written).eval()
    assert distance(outputs(loaded), expected) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="cat")
    model.set_adapter("c")
    assert distance(outputs(model), expected) > 1e-2


# -- what the program becomes -------------------------------------------------------------------------------------

PROGRAMS: dict[str, tuple[str, list[Lora]]] = {
    "linear, tied": (
        "llama_tied",
        [
            Lora(targets=("q_proj", "embed_tokens"), rank=2, adapter="a"),
            Lora(targets=("lm_head",), rank=3, adapter="b"),
        ],
    ),
    "slices and a whole": (
        "gpt2",
        [
            Lora(targets=("c_attn",), enable=("q", "v"), rank=2, alpha=3, adapter="a"),
            Lora(targets=("c_attn", "c_fc"), rank=3, adapter="b"),
        ],
    ),
    "slices": (
        "gpt2",
        [
            Lora(targets=("c_attn",), enable=("q", "k"), rank=2, alpha=3, adapter="a"),
            Lora(targets=("c_attn",), enable=("k", "v"), rank=3, adapter="b"),
        ],
    ),
    "convolutions, embedding": (
        "conv",
        [
            Lora(targets=("stem", "grouped", "signal", "classes"), rank=4, adapter="a"),
            Lora(targets=("grouped", "stem", "head"), rank=8, alpha=3, adapter="b"),
            Lora(targets=("signal",), rank=2, adapter="third", lora_bias=True),
        ],
    ),
    "experts": (
        "mixtral",
        [Lora(targets=("@mlp",), rank=2, adapter="a"), Lora(targets=("@mlp",), rank=3, alpha=4, adapter="b")],
    ),
    "biases": (
        "bert",
        [
            Lora(targets=("query", "value"), rank=2, lora_bias=True, rslora=True, adapter="a"),
            Lora(targets=("query",), rank=3, adapter="b"),
            Lora(targets=("query",), rank=4, lora_bias=True, alpha=2, adapter="third"),
        ],
    ),
}


@pytest.mark.filterwarnings("ignore:.*exceeds")
@pytest.mark.parametrize("case", PROGRAMS)
def test_all_of_them_keep_the_function(case: str) -> None:
    name, steps = PROGRAMS[case]
    program = two(name, *steps)
    result = rewriter.apply(program, Compose())
    assert result.applied[0].pass_.law.kind == "rounding"
    before = run(program, name)
    assert distance(before, run(traced_double(name), name)) > 1e-2
    assert distance(before, run(result.program, name)) < 1e-10 * max(float(t.abs().max()) for t in before)
    added = result.program.steps[-1].added
    assert set(result.program.trainable) == set(added)
    assert {name for name in result.program.tensors if ".lora_" in name or "_adapter." in name} == set(added)
    back = rewriter.undo(result.program)
    assert str(text(back)) == str(text(program))
    assert back.tensors.keys() == program.tensors.keys()
    if case != "convolutions, embedding":  # a LoRA on a grouped convolution is no change of its weight
        merged = rewriter.apply(result.program, Merge(untie=True)).program
        assert distance(before, run(merged, name)) < 1e-6


def test_slices_stay_slices() -> None:
    name, steps = PROGRAMS["slices"]
    after = rewriter.apply(two(name, *steps), Compose(adapter="c")).program
    shapes = {n.rsplit("c_attn.", 1)[1]: tuple(after.tensor(n).shape) for n in after.steps[-1].added if "h.0." in n}
    width = after.tensor("transformer.h.0.attn.c_attn.weight").shape[0]
    assert {n: s for n, s in shapes.items() if "lora_A" in n} == {
        "lora_A.c.query": (2, width),
        "lora_A.c.key": (5, width),
        "lora_A.c.value": (3, width),
    }


def test_equal_factors_keep_every_bit_of_a_and_b() -> None:
    same = [Lora(targets=("up",), rank=rank, alpha=rank * 1.75, adapter=name) for rank, name in ((3, "a"), (2, "b"))]
    program = two("mlp", *same, double=False)
    after = composed(program, weights=(1, 1))
    expected = torch.cat([program.tensor("up.lora_A.a"), program.tensor("up.lora_A.b")])
    assert torch.equal(after.tensor("up.lora_A.c"), expected)


def test_a_third_adapter_stays_wherever_it_stands() -> None:
    other = Lora(targets=("up", "down"), rank=2, adapter="other")
    for order in itertools.permutations([A, B, other]):
        program = two("mlp", *order)
        after = composed(program, weights=(1, 1))
        assert distance(run(program, "mlp"), run(after, "mlp")) < 1e-12
        assert "up.lora_A.other" in after.tensors
        top_only = rewriter.apply(after, Compose(adapters=("other", "c"), adapter="all")).program
        assert distance(run(program, "mlp"), run(top_only, "mlp")) < 1e-12


def test_without_drop_the_new_one_is_added() -> None:
    program = two()
    after = composed(program, drop=False)
    both = updates(program, "up")
    expected = sum((1 + WEIGHTS[name]) * update for name, update in both.items())
    torch.testing.assert_close(change(after, "up"), expected)
    assert {"up.lora_A.a", "up.lora_A.b", "up.lora_A.c"} <= after.tensors.keys()
    assert str(text(rewriter.undo(after))) == str(text(program))


def test_the_new_one_may_take_the_name_of_an_old_one(tmp_path: Path) -> None:
    steps = [Lora(targets=("q_proj",), rank=2, lora_bias=True), Lora(targets=("v_proj",), rank=3, adapter="b")]
    program = two("llama", *steps, double=False)
    after = rewriter.apply(program, Compose()).program
    assert distance(run(program, "llama"), run(after, "llama")) < 1e-4
    written = write_adapter(after, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(TINY["llama"]()[0], written).eval()
    assert distance(outputs(loaded), run(after, "llama")) < 1e-5
    with pytest.raises(UsageError, match="no LoRA named 'b'"):
        write_adapter(after, tmp_path / "gone", adapter="b")


def test_what_one_adapter_trained_of_the_base_stays(tmp_path: Path) -> None:
    first = Lora(targets=("q_proj",), rank=2, adapter="a", modules_to_save=("lm_head",))
    program = two("llama", first, Lora(targets=("v_proj",), rank=3, adapter="b"), double=False)
    program = program.with_tensors({"lm_head.weight": program.tensor("lm_head.weight") * 1.5})
    after = rewriter.apply(program, Compose(weights=(1, 0.5), adapter="c")).program
    assert torch.equal(after.tensor("lm_head.weight"), program.tensor("lm_head.weight"))
    assert "lm_head.weight" in after.steps[-1].trainable
    written = write_adapter(after, tmp_path, adapter="c")
    loaded = PeftModel.from_pretrained(TINY["llama"]()[0], written).eval()
    assert distance(outputs(loaded), run(after, "llama")) < 1e-5
    with pytest.raises(RewriteError, match=r"lm_head\.weight was trained or replaced by the adapter a"):
        rewriter.apply(program, Compose(weights=(0.5, 1), adapter="c"))


def test_one_dora_can_be_renamed() -> None:
    program = two("mlp", Lora(targets=("up", "down"), rank=3, alpha=5, dora=True))
    after = rewriter.apply(program, Compose(adapter="renamed")).program
    assert distance(run(program, "mlp"), run(after, "mlp")) < 1e-12
    assert torch.equal(
        after.tensor("up.lora_magnitude_vector.renamed"), program.tensor("up.lora_magnitude_vector.default")
    )


def test_saved_and_loaded_and_in_onnx_it_is_the_same(tmp_path: Path) -> None:
    program = two("mlp", double=False)
    after = composed(program, method="ties", density=0.5)
    loaded = rewriter.load(after.save(tmp_path / "composed.pt2"))
    assert distance(run(after, "mlp"), run(loaded, "mlp")) == 0
    assert str(text(rewriter.undo(loaded))) == str(text(program))
    export_onnx(after, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(1))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, after(x).numpy(), atol=1e-4)
    assert float((after(x) - traced("mlp")(x)).abs().max()) > 1e-2


def test_gradients_reach_the_new_adapter_alone() -> None:
    after = composed(two("mlp", double=False))
    module = after.module()
    module(torch.ones(2, 3, 10)).square().sum().backward()
    reached = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == reached
    assert reached == set(after.steps[-1].added)
    assert all(float(dict(module.named_parameters())[name].grad.abs().max()) > 0 for name in reached)


# -- refusals -----------------------------------------------------------------------------------------------------

PISSA = Lora(targets=("up",), rank=3, init="pissa", adapter="b")
NORMED = Lora(targets=("up",), rank=3, dora=True, adapter="b")
UNEQUAL = Lora(targets=("up",), rank=2, adapter="b")
BIASED = Lora(targets=("up",), rank=3, lora_bias=True, adapter="b")
REFUSED: dict[str, tuple[list[Lora], Compose, str]] = {
    "dora": ([A, NORMED], Compose(adapter="c"), "b is a DoRA: its magnitudes have no weighted sum"),
    "dora, weighted": ([NORMED], Compose(weights=(0.5,)), "b is a DoRA"),
    "dora above": ([A, NORMED], Compose(adapters=("a",)), r"up: lora \(step 2\) builds on the sum"),
    "pissa": ([A, PISSA], Compose(adapter="c"), r"took its start out of up\.weight"),
    "ranks": ([A, UNEQUAL], Compose(method="linear", adapter="c"), "up: method linear .* needs equal ranks"),
    "ranks, ties": ([A, UNEQUAL], Compose(method="ties", density=0.5), "up: method ties .* needs equal ranks"),
    "bias": ([A, BIASED], Compose(method="linear"), "b has a bias of B, which method linear has no rule for"),
    "bias, ties_svd": ([A, BIASED], Compose(method="ties_svd", density=0.5), "b has a bias of B"),
    "unknown": ([A, B], Compose(adapters=("a", "z")), "no LoRA named 'z'"),
    "weights": ([A, B], Compose(weights=(1, 2, 3)), "3 weights for 2 adapters: a, b"),
    "name taken": ([A, B], Compose(adapters=("a",), adapter="b"), "already has a LoRA named 'b'"),
    "name of a source": ([A, B], Compose(adapter="b", drop=False), "already has a LoRA named 'b'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_sum_is_refused(case: str) -> None:
    steps, compose, reason = REFUSED[case]
    program = two("mlp", *steps)
    with pytest.raises((RewriteError, UsageError), match=reason):
        rewriter.apply(program, compose)


def test_biases_that_two_adapters_trained_are_refused_by_name() -> None:
    first = rewriter.apply(traced("mlp"), Lora(targets=("up",), rank=2, adapter="a", bias="lora_only")).program
    first = first.with_tensors({"up.bias": first.tensor("up.bias") + 1})
    both = rewriter.apply(first, Lora(targets=("up",), rank=2, adapter="b", bias="lora_only")).program
    assert rewriter.apply(both, Compose(adapter="c")).program.steps[-1].trainable[-1] == "up.bias"
    both = both.with_tensors({"up.bias": both.tensor("up.bias") + 1})
    with pytest.raises(RewriteError, match=r"up\.bias was trained or replaced by several adapters") as caught:
        rewriter.apply(both, Compose(adapter="c"))
    assert "a, b" in str(caught.value)


def test_without_a_lora_there_is_nothing_to_compose() -> None:
    with pytest.raises(UsageError, match="the program has no LoRA"):
        rewriter.apply(traced("mlp"), Compose())
    merged = rewriter.apply(two(), Merge()).program
    with pytest.raises(UsageError, match="the program has no LoRA"):
        rewriter.apply(merged, Compose())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "mean"}, "method is 'mean'"),
        ({"method": "ties"}, "needs a density"),
        ({"density": 0.5}, "with the method cat"),
        ({"method": "ties", "density": 0}, "density is 0"),
        ({"method": "ties", "density": True}, "density is True"),
        ({"rank": 3}, "rank=3 with the method cat"),
        ({"method": "svd", "rank": True}, "rank is True"),
        ({"majority_sign": "mean"}, "majority_sign is 'mean'"),
        ({"adapters": "ab"}, "adapters is 'ab'"),
        ({"adapters": ("a", "a")}, "'a' is given twice"),
        ({"adapters": ("a",), "weights": (1, 2)}, "2 weights for 1 adapters"),
        ({"weights": (True,)}, "weights is"),
        ({"weights": (math.nan,)}, "a weight is nan"),
        ({"adapter": "a.b"}, "adapter is 'a.b'"),
        ({"drop": 1}, "drop is 1"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Compose(**options)


def test_the_law_says_when_the_function_stays() -> None:
    assert Compose().law.kind == Compose(weights=(1, 1.0)).law.kind == "rounding"
    for free in (Compose(weights=(1, 2)), Compose(drop=False), Compose(method="svd"), Compose(method="linear")):
        assert free.law.kind == "free"
        assert free.law.reason


def test_what_it_changes(golden: Golden) -> None:
    program = two("mlp", double=False)
    after = rewriter.apply(program, Compose(adapter="c")).program
    zeros = {name: torch.zeros_like(after.tensor(name)) for name in after.steps[-1].added}
    golden("compose.diff", str(rewriter.diff(program, after.with_tensors(zeros))))
