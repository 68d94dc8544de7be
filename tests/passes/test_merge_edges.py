"""Merging where a graph holds state, other types, shared weights or computed weights of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

import passes
import rewriter
from rewriter import verify
from rewriter.program import Program
from rewriter.transform import ROUNDING
from tests.models import TINY, traced

INPUT = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    """A layer with a hand-written LoRA; `forward` is the test's."""

    def __init__(self, forward: Callable[[Branch, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(12, 20)
        self.out = nn.Linear(20, 5)
        self.down, self.up = nn.Parameter(torch.randn(3, 12)), nn.Parameter(torch.randn(20, 3))
        self.register_buffer("calls", torch.zeros(1))
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)

    def update(self, x: Tensor) -> Tensor:
        return x @ self.down.t() @ self.up.t()


class Shared(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.fc, self.out = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(torch.tanh(self.fc(x)))))


def counting(self: Branch, x: Tensor) -> Tensor:
    self.calls.add_(1.0)
    return self.fc(x) + self.update(x) * self.calls


def trained(program: Program) -> Program:
    generator = torch.Generator().manual_seed(3)
    names = [name for name in program.tensors if "lora" in name]
    return program.with_tensors(
        {name: 0.3 * torch.randn(program.tensor(name).shape, generator=generator) for name in names}
    )


def operations(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_a_buffer_that_the_graph_writes_is_no_constant() -> None:
    module = Branch(counting)
    program = rewriter.trace(module, (INPUT,))
    assert torch.equal(program(INPUT), program(INPUT)), "a run of a program writes into the program"
    assert float(program.tensors["calls"]) == float(module.calls) == 0.0
    trains = program.module()
    assert not torch.equal(trains(INPUT), trains(INPUT)), "the module has lost its state"
    with pytest.raises(rewriter.RewriteError, match="nothing to merge"):
        rewriter.apply(program, passes.Merge())


def test_a_weight_norm_of_the_model_stays() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(12, 20)), nn.Tanh(), nn.Linear(20, 5))
    program = rewriter.trace(model, (INPUT,))
    with pytest.raises(rewriter.RewriteError, match="nothing to merge"):
        rewriter.apply(program, passes.Merge())
    adapted = trained(rewriter.apply(program, passes.Lora(targets=("2",), rank=3)).program)
    merged = rewriter.apply(adapted, passes.Merge()).program
    assert operations(merged) == operations(program)


def test_an_update_that_widens_the_result_is_refused_naming_the_sum() -> None:
    model = Branch(lambda self, x: self.out(self.fc(x) + self.update(x.float())))
    model.fc.bfloat16()
    program = rewriter.trace(model, (INPUT.bfloat16(),))
    with pytest.raises(rewriter.RewriteError, match=r"%add: the layer gives torch.bfloat16, with its update"):
        rewriter.apply(program, passes.Merge())


@pytest.mark.parametrize("dora", [False, True])
def test_a_traced_peft_model_in_bf16_leaves_no_casts(dora: bool) -> None:
    model, args, kwargs = TINY["llama"]()
    model = model.bfloat16()
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], use_dora=dora)
    base = rewriter.trace(model, args, kwargs)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    torch.manual_seed(5)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    merged = rewriter.apply(rewriter.trace(wrapped, args, kwargs), passes.Merge())
    assert operations(merged.program) == operations(base)


@pytest.mark.parametrize("untie", [False, True])
def test_a_shared_layer_folds_weight_and_bias_of_both_calls(untie: bool) -> None:
    base = rewriter.trace(Shared(), (INPUT,))
    adapted = trained(rewriter.apply(base, passes.Lora(targets=("fc",), rank=3, lora_bias=True)).program)
    assert verify.compare(base, adapted)[0] > 0.1
    merged = rewriter.apply(adapted, passes.Merge(untie=untie)).program
    assert verify.compare(adapted, merged)[0] < 1e-6
    assert set(merged.tensors) == set(base.tensors)


def test_the_law_sees_nan_in_any_output() -> None:
    class Two(nn.Module):
        def __init__(self, second: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([second]))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x * self.scale

    good, bad = (rewriter.trace(Two(value), (INPUT,)) for value in (3.0, float("nan")))
    with pytest.raises(rewriter.LawError):
        verify.law(good, bad, ROUNDING, "a pass")


@pytest.mark.parametrize("equation", ["...i,ri->...r", "i,ri->r"])
def test_an_einsum_without_rows_is_refused(equation: str) -> None:
    model = Branch(lambda self, x: self.fc(x) + torch.einsum(equation, x, self.down) @ self.up.t())
    with pytest.raises(rewriter.RewriteError, match="einsum"):
        rewriter.apply(rewriter.trace(model, (INPUT[0],)), passes.Merge())


def test_wrong_calls_are_told_what_is_wanted() -> None:
    program = traced("llama")
    with pytest.raises(rewriter.RewriteError, match="attention_mask"):
        program(input_ids=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(rewriter.RewriteError, match="is not a pass"):
        rewriter.apply(program, passes.Lora)  # type: ignore[arg-type]
