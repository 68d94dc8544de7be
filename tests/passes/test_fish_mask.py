"""FishMask: Fisher information sample by sample, the exact top of it, and changes that hold places and values alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rewriter
from passes import Bake, Merge, Select
from passes.fish_mask import fisher
from passes.sparse import largest
from rewriter.errors import LawError, RewriteError, UsageError
from tests.models import Perceptron, randomise, traced
from tests.oracle import distance, example, operations, run, traced_double
from tests.passes.selected import (
    holds_after_saving,
    masked,
    moved,
    parameters_sum,
    random_scores,
    same_in_onnx,
    undone,
)


def loss(outputs: Tensor, batch: object) -> Tensor:
    return outputs.square().mean((1, 2))


def batches() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(size, 5, 10, generator=generator),) for size in (3, 2)]


def by_hand() -> dict[str, Tensor]:
    """Squared gradients of the model itself, one sample after the other."""
    model = randomise(Perceptron())
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for (batch,) in batches():
        for sample in batch:
            model.zero_grad()
            model(sample[None]).square().mean().backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                total[name] += parameter.grad**2
    return total


def test_scores_are_squared_gradients_summed_over_samples() -> None:
    ours, theirs = fisher(traced("mlp"), batches(), loss), by_hand()
    assert set(ours) == set(theirs)
    for name, score in theirs.items():
        torch.testing.assert_close(ours[name], score, rtol=1e-4, atol=1e-7)


def test_the_mask_is_the_top_of_the_scores(tmp_path: Path) -> None:
    save_file(fisher(traced("mlp"), batches(), loss), tmp_path / "fisher.safetensors")
    after = rewriter.apply(
        traced("mlp"), Select(method="fish_mask", scores=tmp_path / "fisher.safetensors", density=0.1)
    )
    ranked = sorted(((float(v), n, i) for n, s in by_hand().items() for i, v in enumerate(s.flatten())), reverse=True)
    count = round(0.1 * len(ranked))
    want = {(name, index) for _, name, index in ranked[:count]}
    got = {(site.path, int(i)) for site in after.sites for i in site.indices}
    assert len(got) == count
    assert got == want


def test_equal_scores_fall_to_the_first() -> None:
    scores = {"a": torch.tensor([[1.0, 2.0], [2.0, 0.0]]), "b": torch.tensor([2.0, 5.0, 2.0])}
    assert {n: i.tolist() for n, i in largest(scores, 3).items()} == {"a": [1, 2], "b": [1]}
    assert {n: i.tolist() for n, i in largest(scores, 7).items()} == {"a": [0, 1, 2, 3], "b": [0, 1, 2]}


@pytest.mark.parametrize("name", ["mlp", "conv", "llama_tied", "gpt2", "vit"])
def test_trained_and_merged_it_is_the_model_with_these_numbers_moved(name: str, tmp_path: Path) -> None:
    before = traced_double(name)
    path = tmp_path / "scores.safetensors"
    random_scores(before, path)
    applied = rewriter.apply(before, Select(method="fish_mask", scores=path, density=0.1))
    assert applied.applied[0].change is not None
    assert applied.applied[0].change.equal
    trained = moved(applied.program)
    sums = parameters_sum(trained)
    shared = {n: sums[g] for group in before.tied() for g in group if g in sums for n in group}
    oracle = before.with_tensors({**sums, **shared})
    assert distance(run(oracle, name), run(before, name)) > 0.05
    assert distance(run(trained, name), run(oracle, name)) < 1e-9
    for pass_ in (Merge(), Bake()):
        merged = rewriter.apply(trained, pass_).program
        assert distance(run(merged, name), run(oracle, name)) < 1e-9
        assert operations(merged) == operations(before)
        assert set(merged.tensors) == set(before.tensors)
        assert merged.tied() == before.tied()
        undone(trained, merged)


@pytest.mark.parametrize("name", ["mlp", "llama_tied"])
def test_it_is_taken_back_saved_and_exported(name: str, tmp_path: Path) -> None:
    trained = masked(traced(name), tmp_path, density=0.1)
    undone(traced(name), trained)
    holds_after_saving(trained, name, tmp_path)
    if name == "mlp":
        same_in_onnx(trained, name, tmp_path)


def test_a_checkpoint_holds_places_and_values_only(tmp_path: Path) -> None:
    program = masked(traced("gpt2"), tmp_path, density=0.2)
    added = {name: program.tensor(name).detach().clone() for name in program.steps[-1].added}
    save_file(added, tmp_path / "adapter.safetensors")
    count = round(0.2 * sum(t.numel() for t in load_file(tmp_path / "scores.safetensors").values()))
    held = sum(tensor.numel() * tensor.element_size() for tensor in added.values())
    assert held == count * (4 + 8)
    assert (tmp_path / "adapter.safetensors").stat().st_size < held + 200 * len(added)


def test_gradients_reach_the_values_only(tmp_path: Path) -> None:
    program = masked(traced("gpt2"), tmp_path, density=0.1)
    module = program.module()
    _, inputs = example("gpt2")
    module(**inputs).logits.square().mean().backward()
    reached = {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == set(program.trainable) == {n for n in program.steps[-1].added if ".delta_values." in n}


def test_paths_and_other_adapters(tmp_path: Path) -> None:
    one = masked(traced("mlp"), tmp_path, density=0.1, paths=("up.*",))
    assert {n.split("_adapter")[0] for n in one.steps[-1].added} == {"up.weight", "up.bias"}
    two = masked(one, tmp_path, density=0.05, adapter="more")
    merged = rewriter.apply(two, Merge()).program
    assert distance(run(two, "mlp"), run(one, "mlp")) > 0.01
    assert distance(run(merged, "mlp"), run(two, "mlp")) < 1e-5
    assert operations(merged) == operations(traced("mlp"))
    assert rewriter.diff(rewriter.undo(two), one).same


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    path, program = tmp_path / "scores.safetensors", traced("mlp")
    scores = random_scores(program, path)
    good = Select(method="fish_mask", scores=path)
    assert rewriter.transform.options(good) == {"method": "fish_mask", "scores": path.name, "sha256": good.sha256}
    with pytest.raises(UsageError, match="fish_mask has no scores"):
        rewriter.apply(program, Select(method="fish_mask"))
    with pytest.raises(RewriteError, match="does not exist"):
        Select(method="fish_mask", scores=tmp_path / "scores")
    for change, kind, match in (
        ({"up.weight": scores["up.weight"].t().contiguous()}, RewriteError, r"up\.weight do not fit"),
        ({"up.wait": scores["up.weight"].clone()}, RewriteError, r"scores of up\.wait, which is no parameter"),
        ({"up.bias": -scores["up.bias"]}, RewriteError, "negative scores"),
        ({"up.bias": scores["up.bias"] / 0}, LawError, "NaN or infinite"),
    ):
        save_file({**scores, **change}, path)
        with pytest.raises(kind, match=match):
            rewriter.apply(program, dataclasses.replace(good, sha256=""))
    with pytest.raises(RewriteError, match="not the file of scores that was meant"):
        rewriter.apply(program, good)
    with pytest.raises(UsageError, match=r"the loss of batch 0 is a tensor \[3, 5, 7\]"):
        fisher(program, batches(), lambda outputs, batch: outputs)
    with pytest.raises(UsageError, match="no parameter has any Fisher information"):
        fisher(program, [], loss)


def test_what_it_adds(golden: Callable[[str, str], None], tmp_path: Path) -> None:
    scores = {name: torch.arange(traced("mlp").tensor(name).numel()) % 11.0 for name in ("up.weight", "norm.bias")}
    save_file({n: s.view(traced("mlp").tensor(n).shape) for n, s in scores.items()}, tmp_path / "s.safetensors")
    after = rewriter.apply(traced("mlp"), Select(method="fish_mask", scores=tmp_path / "s.safetensors", density=0.1))
    golden("fish_mask.diff", str(rewriter.diff(traced("mlp"), after.program)))
