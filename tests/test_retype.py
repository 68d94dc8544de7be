"""Types that follow a change of sizes, and outputs that are added and taken away."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rewriter
from passes import Prompt
from rewriter.edit import Edit
from rewriter.errors import RewriteError
from rewriter.formats.random_inputs import different_sizes
from rewriter.program import Program
from rewriter.trials import verified
from rewriter.verify import outputs, structure
from tests.models import TINY, traced
from tests.oracle import example, run

aten = torch.ops.aten
EXTRA = 4


def longer(program: Program, names: tuple[str, ...]) -> Program:
    """The program with `EXTRA` ones before every row of some inputs."""
    clone = program.clone()
    edit = Edit(clone, number=1, name="longer")
    for source in [node for node in clone.inputs() if node.name in names]:
        batch = edit.call(aten.sym_size.int, source, 0, like=source, label="batch")
        ones = edit.call(aten.new_ones.default, source, [batch, EXTRA], like=source, label="ones")
        joined = edit.call(aten.cat.default, [ones, source], 1, like=source, label="joined")
        edit.replace(source, joined)
    edit.retype()
    edit.finish()
    structure(clone)
    return clone


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_every_type_follows_and_sizes_still_vary(name: str) -> None:
    changed = longer(traced(name), ("input_ids", "attention_mask", "token_type_ids"))
    for node in changed.inputs():
        if isinstance(node.meta["val"], torch.Tensor):
            assert all(isinstance(size, torch.SymInt) for size in node.meta["val"].shape)
    args, kwargs = example(name)
    ones = {key: torch.ones(3, EXTRA, dtype=torch.long) for key in kwargs if key != "decoder_input_ids"}
    extended = {k: torch.cat([ones[k], v], 1) if k in ones and k != "use_cache" else v for k, v in kwargs.items()}
    expected = outputs(traced(name)(*args, **extended))
    assert all(torch.equal(a, b) for a, b in zip(expected, run(changed, name), strict=True))
    computed = next(iter(reversed(changed.graph.nodes))).args[0]
    for value, result in zip(computed, expected, strict=True):
        assert value.meta["val"].ndim == result.ndim
        fixed = [(a, b) for a, b in zip(value.meta["val"].shape, result.shape, strict=True) if isinstance(a, int)]
        assert all(a == b for a, b in fixed)


def test_an_operation_that_cannot_take_the_new_sizes_is_named() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(11, 6)
            self.place = torch.nn.Parameter(torch.ones(5, 6))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids) + self.place

    program = rewriter.trace(Fixed(), (torch.ones(3, 5, dtype=torch.long),))
    with pytest.raises(RewriteError, match="cannot take the new sizes") as error:
        longer(program, ("ids",))
    assert "add(" in str(error.value)
    assert "@place" in str(error.value)


@pytest.mark.parametrize("name", ["llama", "mlp", "conv"])
def test_an_output_is_added_and_taken_away(name: str, tmp_path: Path) -> None:
    clone = traced(name).clone()
    edit = Edit(clone, number=1, name="penalty")
    parameter = clone.placeholder(next(iter(clone.parameters())))
    last = next(iter(reversed(clone.graph.nodes))).args[0][-1]
    edit.add_output(edit.call(aten.sum.default, parameter, like=last, label="penalty"))
    edit.finish()
    structure(clone)
    args, kwargs = example(name)
    total = next(iter(clone.parameters().values())).sum()
    clone.save(tmp_path / "with.pt2")
    for program in (clone, rewriter.load(tmp_path / "with.pt2")):
        result, penalty = program(*args, **kwargs)
        assert torch.equal(penalty, total)
        assert type(result) is type(traced(name)(*args, **kwargs))
    result, penalty = clone.module().eval()(*args, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(outputs(result), run(traced(name), name), strict=True))
    again = clone.clone()
    edit = Edit(again, number=2, name="without")
    added = next(iter(reversed(again.graph.nodes))).args[0][-1]
    edit.remove_output(added)
    edit.erase([added])
    edit.finish()
    structure(again)
    assert rewriter.text(again) == rewriter.text(traced(name))
    with pytest.raises(RewriteError, match="not the last output"):
        Edit(again, number=3, name="wrong").remove_output(parameter)


def test_positions_from_the_caller_stay_inside_the_table_after_a_prompt() -> None:
    module, args, kwargs = TINY["gpt2"]()
    kwargs["position_ids"] = torch.arange(7).repeat(3, 1)
    program = rewriter.trace(module, args, kwargs)
    result = rewriter.apply(program, Prompt(virtual_tokens=20))
    assert result.applied[0].change is not None
    assert different_sizes(result.program, 0)
    assert verified(result.program).trials
