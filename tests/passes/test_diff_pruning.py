"""Diff pruning: gates drawn in training and fixed otherwise, their penalty, and what remains when they are binary."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rewriter
from passes import Binarise, Lora, Merge, Select
from rewriter.errors import LawError, RewriteError, UsageError
from rewriter.program import Program
from tests.models import traced
from tests.oracle import distance, example, operations, run, traced_double
from tests.passes.selected import holds_after_saving, same_in_onnx, undone

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3


def gated(before: Program, **options: Any) -> Program:
    """Trained gates, some of them open, some closed, some between, and trained changes."""
    program = rewriter.apply(before, Select(method="diff_pruning", **options)).program
    generator = torch.Generator().manual_seed(5)
    values = {}
    for name in program.trainable:
        like = program.tensor(name)
        size = 3.0 if "log_alpha" in name else 0.3
        values[name] = (size * torch.randn(like.shape, generator=generator, dtype=torch.float64)).to(like.dtype)
        if "group" in name:
            values[name] = values[name].abs() + 0.5
    return program.with_tensors(values)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def gates(program: Program, name: str) -> Tensor:
    """The product of a number's own gate and that of its parameter, as they are when nothing is drawn."""
    product = torch.ones((), dtype=torch.float64)
    for kind in ("diff_log_alpha", "diff_log_alpha_group"):
        key = f"{name}_adapter.{kind}.default"
        if key in program.tensors:
            soft = sigmoid(program.tensor(key).detach().double()) * (HIGH - LOW) + LOW
            product = product * torch.minimum(torch.ones_like(soft), torch.maximum(torch.zeros_like(soft), soft))
    return product


def changes(program: Program) -> dict[str, Tensor]:
    names = [n.removesuffix("_adapter.diff_delta.default") for n in program.tensors if ".diff_delta." in n]
    return {n: gates(program, n) * program.tensor(f"{n}_adapter.diff_delta.default").detach().double() for n in names}


def with_changes(before: Program, moved: dict[str, Tensor]) -> Program:
    sums = {n: before.tensor(n).detach().double() + change for n, change in moved.items()}
    shared = {n: sums[g] for group in before.tied() for g in group if g in sums for n in group}
    return before.with_tensors({**sums, **shared})


def penalty(program: Program) -> float:
    """The expected number of open gates, number by number."""
    shift, total = TEMPERATURE * math.log(-LOW / HIGH), 0.0
    for name in changes(program):
        chance = 1.0
        key = f"{name}_adapter.diff_log_alpha_group.default"
        if key in program.tensors:
            chance = 1 / (1 + math.exp(shift - program.tensor(key).item()))
        alphas = program.tensor(f"{name}_adapter.diff_log_alpha.default").flatten().tolist()
        total += chance * sum(1 / (1 + math.exp(shift - alpha)) for alpha in alphas)
    return total


@pytest.mark.parametrize(("name", "structured"), [("mlp", False), ("mlp", True), ("conv", False), ("llama_tied", True)])
def test_outside_training_the_gates_are_what_the_paper_says(name: str, structured: bool) -> None:
    before = traced_double(name)
    program = gated(before, structured=structured)
    *outputs, count = run(program, name)
    oracle = run(with_changes(before, changes(program)), name)
    assert distance(oracle, run(before, name)) > 0.05
    assert distance(outputs, oracle) < 1e-9
    assert abs(float(count) - penalty(program)) < 1e-6
    assert distance(run(program, name), run(program, name)) == 0


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_it_starts_as_the_model_and_is_taken_back(name: str, tmp_path: Path) -> None:
    result = rewriter.apply(traced(name), Select(method="diff_pruning", structured=True))
    assert result.applied[0].change is not None
    assert result.applied[0].change.equal
    undone(traced(name), result.program)
    holds_after_saving(gated(traced(name)), name, tmp_path)


def test_training_draws_gates_from_the_hard_concrete_distribution() -> None:
    """The head's bias shows its gates: y(with noise) − y(without a change) = z · δ."""
    program = rewriter.apply(traced("mlp"), Select(method="diff_pruning", paths=("head.bias",))).program
    alphas = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    home = "head.bias_adapter"
    program = program.with_tensors(
        {f"{home}.diff_delta.default": torch.ones(7), f"{home}.diff_log_alpha.default": alphas}
    )
    module = program.module().train()
    module.get_submodule("dropout_mode").eval()  # the model's own dropout stays out of it
    args, _ = example("mlp")
    with torch.no_grad():
        base = run(traced("mlp"), "mlp")[0][0, 0]
        torch.manual_seed(0)
        drawn = torch.stack([module(*args)[0][0, 0] - base for _ in range(3000)])
    shift = TEMPERATURE * math.log(-LOW / HIGH)
    closed = 1 - sigmoid(alphas - shift)
    opened = sigmoid(alphas - TEMPERATURE * math.log((1 - LOW) / (HIGH - 1)))
    assert ((drawn < 1e-5).float().mean(0) - closed).abs().max() < 0.04
    assert ((drawn > 1 - 1e-5).float().mean(0) - opened).abs().max() < 0.04
    assert float(drawn.min()) > -1e-5
    assert float(drawn.max()) < 1 + 1e-5


def train(program: Program, steps: int, factor: float) -> tuple[Program, list[float], list[float]]:
    """Toward outputs that another model gives, whose head alone differs."""
    args, _ = example("mlp")
    goal = traced("mlp").with_tensors({"head.bias": traced("mlp").tensor("head.bias") + 1})(*args)
    module = program.module().train()
    module.get_submodule("dropout_mode").eval()
    optimiser = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.05)
    losses, penalties = [], []
    torch.manual_seed(0)
    for _ in range(steps):
        output, count = module(*args)
        loss = (output - goal).square().mean()
        optimiser.zero_grad()
        (loss + factor * count).backward()
        optimiser.step()
        losses.append(loss.item())
        penalties.append(count.item())
    return program.with_weights(module), losses, penalties


@pytest.mark.parametrize("structured", [False, True])
def test_the_task_is_learnt_while_the_penalty_falls(structured: bool) -> None:
    before = rewriter.apply(traced("mlp"), Select(method="diff_pruning", structured=structured)).program
    after, losses, penalties = train(before, 500, 3e-3)
    assert losses[-1] < 0.1 * losses[0]
    assert penalties[-1] < 0.5 * penalties[0]
    moved = {n for n in after.parameters() if not torch.equal(after.tensor(n), before.tensor(n))}
    assert moved == set(before.trainable) == set(before.steps[-1].added)
    args, _ = example("mlp")
    total = sum(t.numel() for t in traced("mlp").parameters().values())
    sparse = rewriter.apply(after, Binarise(density=0.25)).program
    assert sum(sparse.tensor(n).numel() for n in sparse.trainable) == round(0.25 * total)
    size = (after(*args)[0] - traced("mlp")(*args)).norm()
    assert (sparse(*args) - after(*args)[0]).norm() < 0.05 * size


@pytest.mark.parametrize("name", ["mlp", "llama_tied"])
def test_without_density_the_function_stays_and_without_gates(name: str, tmp_path: Path) -> None:
    before = traced_double(name)
    program = gated(before, structured=True)
    sparse = rewriter.apply(program, Binarise()).program
    moved = changes(program)
    assert len(run(sparse, name)) == len(run(program, name)) - 1
    assert distance(run(sparse, name), run(program, name)[:-1]) < 1e-9
    assert not [n for n in sparse.tensors if "diff_" in n]
    assert set(sparse.trainable) == {n for n in sparse.tensors if ".delta_values." in n}
    held = sum(sparse.tensor(n).numel() for n in sparse.trainable)
    assert held == sum(int((change != 0).sum()) for change in moved.values()) < sum(c.numel() for c in moved.values())
    undone(program, sparse)
    merged = rewriter.apply(sparse, Merge()).program
    assert operations(merged) == operations(before)
    assert distance(run(merged, name), run(with_changes(before, moved), name)) < 1e-9


@pytest.mark.parametrize("density", [0.003, 0.25, 1.0])
def test_a_density_is_hit_exactly_by_the_largest_changes(density: float, tmp_path: Path) -> None:
    program = gated(traced("conv"))
    moved = changes(program)
    result = rewriter.apply(program, Binarise(density=density))
    ranked = torch.cat([change.abs().flatten() for change in moved.values()]).sort(descending=True).values
    count = round(density * len(ranked))
    assert sum(len(site.indices) for site in result.sites) == count
    kept = torch.cat([site.values.double().abs() for site in result.sites]).sort(descending=True).values
    torch.testing.assert_close(kept, ranked[:count], rtol=1e-5, atol=1e-7)
    present = {n.split("_adapter")[0] for n in result.program.trainable}
    assert present == {site.path for site in result.sites if len(site.indices)}
    if density == 0.25:
        same_in_onnx(result.program, "conv", tmp_path)


def test_gradients_reach_changes_and_gates_only() -> None:
    for training in (True, False):  # in training a drawn gate of a whole parameter may be closed
        program = gated(traced("gpt2"), structured=not training)
        module = program.module().train(training)
        output, count = module(**example("gpt2")[1])
        (output.logits.square().mean() + count).backward()
        reached = {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert reached == set(program.trainable)


def test_onnx_gives_the_penalty_too(tmp_path: Path) -> None:
    same_in_onnx(gated(traced("mlp")), "mlp", tmp_path)


def test_it_goes_together_with_lora() -> None:
    lora = rewriter.apply(traced("mlp"), Lora(targets=("up",), rank=3)).program
    both = rewriter.apply(lora, Select(method="diff_pruning", paths=("up.*",))).program
    assert set(both.trainable) > set(lora.trainable)
    assert not [n for n in both.trainable if "lora_A" in n and "diff" in n]
    assert distance(run(both, "mlp")[:-1], run(lora, "mlp")) == 0


def test_refusals() -> None:
    with pytest.raises(UsageError, match="no gates of the adapter 'default'"):
        rewriter.apply(traced("mlp"), Binarise())
    program = gated(traced("mlp"))
    with pytest.raises(UsageError, match="no gates of the adapter 'other'"):
        rewriter.apply(program, Binarise(adapter="other"))
    with pytest.raises(RewriteError, match="cannot be merged"):
        rewriter.apply(program, Merge())
    for density in (0.0, 1.5, True, "1"):
        with pytest.raises(UsageError, match="density is"):
            Binarise(density=density)  # type: ignore[arg-type]
    broken = program.tensor("up.bias_adapter.diff_delta.default").detach().clone()
    broken[1] = math.nan
    with pytest.raises(LawError, match=r"trained change of up\.bias is not finite"):
        rewriter.apply(program.with_tensors({"up.bias_adapter.diff_delta.default": broken}), Binarise())


def test_what_it_adds_and_what_remains(golden: Callable[[str, str], None]) -> None:
    before = traced("mlp")
    after = rewriter.apply(
        before, Select(method="diff_pruning", paths=("up.weight", "norm.bias"), structured=True)
    ).program
    golden("diff_pruning.diff", str(rewriter.diff(before, after)))
    values = {n: (torch.arange(after.tensor(n).numel()) % 7 - 3.0).view(after.tensor(n).shape) for n in after.trainable}
    values = {n: v + 5 if "group" in n else v for n, v in values.items()}
    trained = after.with_tensors(values)
    golden(
        "diff_pruning_binarise.diff",
        str(rewriter.diff(trained, rewriter.apply(trained, Binarise(density=0.05)).program)),
    )
