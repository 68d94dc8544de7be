"""Random inputs: right shapes, right ranges, everywhere the same size for the same symbol."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from rewriter.errors import UsageError
from rewriter.formats.random_inputs import different_sizes, example_sizes, random_inputs
from rewriter.program import Program
from rewriter.trace import trace
from tests.models import TINY, traced

NAMES = list(TINY)


def leaves(inputs: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(inputs) if leaf is not None]


@pytest.mark.parametrize("name", NAMES)
def test_the_program_runs_on_them_in_other_sizes(name: str) -> None:
    program = traced(name)
    example = example_sizes(program)
    chosen = [different_sizes(program, trial) for trial in range(3)]
    assert all(sizes[symbol] != example[symbol] for sizes in chosen[:2] for symbol in example)
    assert chosen[0] != chosen[1]
    for trial, sizes in enumerate(chosen):
        args, kwargs = random_inputs(program, sizes=sizes, seed=trial)
        outputs = [leaf for leaf in leaves(program(*args, **kwargs)) if isinstance(leaf, Tensor)]
        assert outputs
        assert all(torch.isfinite(output).all() for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_without_sizes_they_look_like_the_example(name: str) -> None:
    program = traced(name)
    given = program.exported.example_inputs
    for seed in (0, 1):
        made = random_inputs(program, seed=seed)
        for old, new in zip(leaves(given), leaves(made), strict=True):
            if isinstance(old, Tensor):
                assert (old.shape, old.dtype) == (new.shape, new.dtype)
            else:
                assert old == new


def test_a_seed_gives_the_same_inputs_and_another_seed_others() -> None:
    program = traced("bert")
    one, same, other = (random_inputs(program, seed=seed)[1] for seed in (4, 4, 5))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in ("input_ids", "token_type_ids"))


def test_integers_stay_within_the_rows_they_index() -> None:
    program = traced("bert")
    ids, types = set(), set()
    for seed in range(40):
        kwargs = random_inputs(program, seed=seed)[1]
        ids |= set(kwargs["input_ids"].flatten().tolist())
        types |= set(kwargs["token_type_ids"].flatten().tolist())
    assert ids == set(range(37))
    assert types == {0, 1}


def test_masks_pad_on_both_sides_and_hide_no_row() -> None:
    program = traced("llama")
    masks = torch.cat([random_inputs(program, seed=seed)[1]["attention_mask"] for seed in range(20)])
    assert set(masks.flatten().tolist()) == {0, 1}
    assert masks.sum(dim=1).min() >= 1
    assert (masks[:, 0] == 0).any()
    assert (masks[:, -1] == 0).any()
    assert ((masks[:, 0] == 1) | (masks[:, -1] == 1)).all()
    assert (masks.diff(dim=1).abs().sum(dim=1) <= 1).all()  # padding is one block


class Uses(nn.Module):
    """Indices that reach their table through a sum, through index_select, and through a slice of a position table."""

    def __init__(self) -> None:
        super().__init__()
        self.shifted = nn.Embedding(13, 4)
        self.table = nn.Parameter(torch.randn(11, 4))
        self.positions = nn.Embedding(9, 4)

    def forward(self, a: Tensor, b: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        at = torch.arange(a.shape[1])
        sum_ = self.shifted(a.to(torch.int64) + 2) + self.positions(at)
        return sum_ * options["scale"], self.table.index_select(0, b) + options["shift"]


def uses(length: int) -> Program:
    options = {"scale": torch.rand(1), "shift": 3.0}
    args = (torch.ones(3, length, dtype=torch.int32), torch.tensor([5, 1, 6, 2]), options)
    return trace(Uses(), args)


def test_data_flow_finds_the_tables() -> None:
    program = uses(5)
    seen_a, seen_b = set(), set()
    for seed in range(40):
        (a, b, options), _ = random_inputs(program, seed=seed)
        assert options["shift"] == 3.0
        assert a.dtype == torch.int32
        seen_a |= set(a.flatten().tolist())
        seen_b |= set(b.tolist())
    assert seen_a == set(range(11))  # 13 rows, two are skipped by the sum
    assert seen_b == set(range(11))


def test_positions_do_not_run_past_their_table() -> None:
    program = uses(9)
    for trial in range(4):
        sizes = different_sizes(program, trial)
        args, kwargs = random_inputs(program, sizes=sizes, seed=trial)
        assert args[0].shape[1] < 9
        program(*args, **kwargs)


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.sum() + y.sum()


def test_sizes_that_follow_from_others() -> None:
    size = Dim("size", min=3, max=8)
    program = trace(Add(), (torch.randn(4, 2), torch.randn(8)), dynamic_shapes={"x": {0: size}, "y": {0: 2 * size}})
    found = {tuple(leaf.shape[0] for leaf in random_inputs(program, sizes=different_sizes(program, t))[0])
             for t in range(4)}  # fmt: skip
    assert len(found) > 1
    assert all(y == 2 * x and 3 <= x <= 8 and x != 4 for x, y in found)


def test_a_guard_of_the_trace_is_kept() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], 2, -1)

    program = trace(Halves(), (torch.randn(3, 10),))
    for trial in range(3):
        sizes = different_sizes(program, trial)
        args, kwargs = random_inputs(program, sizes=sizes)
        assert args[0].shape[1] % 2 == 0
        program(*args, **kwargs)


def test_a_program_of_fixed_sizes() -> None:
    program = trace(Add(), (torch.randn(4, 2), torch.zeros(3, dtype=torch.bool)), dynamic_shapes=None)
    assert example_sizes(program) == different_sizes(program, 1) == {}
    args, kwargs = random_inputs(program)
    assert [tuple(arg.shape) for arg in args] == [(4, 2), (3,)]
    program(*args, **kwargs)


def test_a_program_that_lost_its_example() -> None:
    program = traced("bert").clone()
    program.exported._example_inputs = None
    args, kwargs = random_inputs(program, sizes=different_sizes(program, 0))
    assert kwargs["input_ids"].shape == kwargs["attention_mask"].shape
    program(*args, **kwargs)


def test_an_unknown_symbol_is_refused() -> None:
    with pytest.raises(UsageError, match="no dynamic size 's999'"):
        random_inputs(traced("vit"), sizes={"s999": 4})
