"""Undo gives back the program before a step, in text and in every bit, or says which later step is in the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from passes.lora import Lora
from rewriter.diff import diff
from rewriter.edit import Edit
from rewriter.errors import RewriteError, UsageError
from rewriter.program import Origin, Program, Step
from rewriter.text import text
from rewriter.transform import apply
from rewriter.undo import undo
from tests.models import traced

aten = torch.ops.aten
SITES = {
    "llama_tied": ("q_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj"),
    "bert": ("query", "dense"),
    "conv": ("signal", "head"),
    "mlp": ("up", "down"),
}


def lora(program: Program, name: str, adapter: str, rank: int) -> Program:
    """The program with a trained adapter: nothing in it is zero."""
    return apply(program, Lora(rank=rank, targets=SITES[name], adapter=adapter, init="both"), check=False).program


def equal(one: Program, other: Program) -> bool:
    return text(one) == text(other) and diff(one, other).same and [*one.tensors] == [*other.tensors]


def step(program: Program, name: str, change: object) -> Program:
    """Apply a hand-written step."""
    clone = program.clone()
    edit = Edit(clone, number=len(program.steps) + 1, name=name)
    change(edit)  # type: ignore[operator]
    edit.finish()
    before = program if edit.removes else None
    done = Step(edit.number, name, {}, tuple(edit.added), tuple(edit.trainable), edit.originals, before)
    return Program(clone.exported, (*program.steps, done), clone.metadata)


@pytest.mark.parametrize("name", SITES)
def test_steps_are_taken_back_one_by_one(name: str) -> None:
    base = traced(name)
    one = lora(base, name, "first", 3)
    two = lora(one, name, "second", 2)
    back = undo(two)
    assert equal(back, one)
    assert [each.number for each in back.steps] == [1]
    assert equal(undo(back), base)
    assert undo(back).steps == ()
    assert all(tensor is base.tensors[key] for key, tensor in undo(back).tensors.items())


@pytest.mark.parametrize("name", SITES)
def test_an_earlier_step_is_taken_from_under_a_later_one(name: str) -> None:
    base = traced(name)
    both = lora(lora(base, name, "first", 3), name, "second", 2)
    rest = undo(both, 1)
    assert [each.number for each in rest.steps] == [2]
    alone = rest.with_tensors({key: torch.zeros_like(rest.tensor(key)) for key in rest.steps[0].added})
    args, kwargs = base.exported.example_inputs
    one, other = (torch.utils._pytree.tree_leaves(p(*args, **kwargs)) for p in (base, alone))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True) if isinstance(x, torch.Tensor))
    assert equal(undo(rest), base)


def test_a_step_is_named_by_its_number_or_its_pass() -> None:
    both = lora(lora(traced("mlp"), "mlp", "first", 3), "mlp", "second", 2)
    assert equal(undo(both, "lora"), undo(both, 2))
    assert not equal(undo(both, 1), undo(both, 2))


def test_replaced_and_trained_values_return() -> None:
    base = traced("mlp")

    def change(edit: Edit) -> None:
        edit.set_value("norm.weight", torch.full((22,), 2.0))
        edit.train("head.bias")

    after = step(base, "selective", change)
    trained = after.with_tensors({"head.bias": torch.full((7,), 3.0)})
    assert set(diff(base, trained).to_json()["tensors"]["changed"][0]) > {"name"}
    back = undo(trained)
    assert equal(back, base)
    assert back.tensor("head.bias") is base.tensor("head.bias")
    assert isinstance(back.tensor("norm.weight"), torch.nn.Parameter)


def remove_relu(edit: Edit) -> None:
    for node in list(edit.program.graph.nodes):
        if node.target is aten.relu.default:
            edit.redirect(node, node.args[0])
            edit.erase([node])


def test_a_step_that_removed_operations_comes_back_whole_and_only_last() -> None:
    base = lora(traced("mlp"), "mlp", "first", 3)
    removed = step(base, "drop", remove_relu)
    assert "relu" not in text(removed)
    assert undo(removed) is base
    later = apply(removed, Lora(rank=2, targets=("head",), adapter="late"), check=False).program
    with pytest.raises(UsageError, match="step 2: drop cannot be undone before later steps") as refused:
        undo(later, "drop")
    assert "step 3: lora came after it" in str(refused.value)
    with pytest.raises(UsageError, match="step 2: drop removed operations"):
        undo(later, 1)
    assert equal(undo(undo(undo(later))), traced("mlp"))


def test_a_step_whose_values_a_later_step_uses_stays() -> None:
    base = lora(traced("mlp"), "mlp", "first", 3)

    def scale(edit: Edit) -> None:
        inserted = (node for node in edit.program.graph.nodes if node.op == "call_function" and Origin.of(node))
        down = next(inserted)
        edit.replace(down, edit.call(aten.mul.Tensor, down, 1.5, like=down, label="scaled"))

    with pytest.raises(UsageError, match="step 2: scale uses it: %up/scaled = mul") as refused:
        undo(step(base, "scale", scale), 1)
    assert refused.value.exit_code == 2
    assert equal(undo(undo(step(base, "scale", scale), 2)), traced("mlp"))


def test_a_step_whose_tensors_a_later_step_changed_stays() -> None:
    base = lora(traced("mlp"), "mlp", "first", 3)
    name = base.steps[0].added[0]
    after = step(base, "mask", lambda edit: edit.set_value(name, torch.zeros_like(base.tensor(name))))
    with pytest.raises(UsageError, match=f"step 2: mask also changed {name}"):
        undo(after, 1)
    assert equal(undo(after), base)


def test_an_unknown_step_is_refused_with_the_list_of_steps() -> None:
    program = lora(traced("mlp"), "mlp", "first", 3)
    with pytest.raises(UsageError, match="no step 'lorra'") as refused:
        undo(program, "lorra")
    assert refused.value.evidence == ("step 1: lora",)
    assert "'lora'" in refused.value.fix
    with pytest.raises(UsageError, match="no step 7"):
        undo(program, 7)
    with pytest.raises(UsageError, match="no pass was applied"):
        undo(traced("mlp"))


def test_a_broken_provenance_is_refused_and_nothing_is_changed() -> None:
    program = lora(traced("mlp"), "mlp", "first", 3)
    shown = text(program)
    broken = program.clone()
    for node in broken.graph.nodes:
        origin = Origin.of(node)
        if origin and origin.stands_for:
            replace(origin, stands_for="gone").write(node)
    with pytest.raises(RewriteError, match="stands for an operation that is not there"):
        undo(broken)
    undo(program)
    assert text(program) == shown
