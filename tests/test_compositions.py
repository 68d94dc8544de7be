"""Random sequences of apply, undo, merge, save and load keep every promise at every step."""

from __future__ import annotations

import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rewriter
from passes import Lora, Merge
from rewriter.errors import RewriteError, UsageError
from rewriter.program import Program
from tests.models import traced
from tests.oracle import distance, operations, run, trained

LAYERS = {"mlp": ("up", "down", "head"), "llama": ("q_proj", "v_proj", "down_proj")}
ADAPTERS = ("one", "two", "three")
TOLERANCE = 2e-4

adapters = st.fixed_dictionaries(
    {
        "targets": st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
        "adapter": st.sampled_from(ADAPTERS),
        "rank": st.integers(1, 4),
        "dora": st.booleans(),
        "rslora": st.booleans(),
        "init": st.sampled_from(["kaiming", "gaussian", "both"]),
    }
)
steps = st.one_of(
    st.tuples(st.just("lora"), adapters),
    st.tuples(st.just("lora"), adapters),
    st.tuples(st.just("merge"), st.none()),
    st.tuples(st.just("undo"), st.integers(0, 5)),
    st.tuples(st.just("train"), st.integers(1, 9)),
    st.tuples(st.just("save"), st.none()),
)
tried = settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


def members(path: Path) -> dict[str, bytes]:
    """The members of an archive without the identifier that torch makes up for every file it writes."""
    with zipfile.ZipFile(path) as archive:
        inside = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    return {name: data for name, data in inside.items() if "serialization_id" not in name}


class Snapshot:
    """A program's text and bits, to see later that nobody touched it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.text = rewriter.text(program)
        self.steps = program.steps
        self.tensors = {name: (tensor, tensor.detach().clone()) for name, tensor in program.tensors.items()}

    def hold(self) -> None:
        assert rewriter.text(self.program) == self.text
        assert self.program.steps == self.steps
        assert list(self.program.tensors) == list(self.tensors)
        for name, (tensor, bits) in self.tensors.items():
            assert self.program.tensor(name) is tensor
            assert torch.equal(tensor, bits), name


def same(one: Program, two: Program) -> bool:
    return rewriter.text(one) == rewriter.text(two) and rewriter.diff(one, two).same


def saved(program: Program, folder: Path) -> Program:
    """Save, load and save again: the same program, the same bytes."""
    first = program.save(folder / "first.pt")
    loaded = rewriter.load(first)
    second = loaded.save(folder / "second.pt")
    assert same(loaded, program)
    assert members(first) == members(second)
    assert [step.name for step in loaded.steps] == [step.name for step in program.steps]
    return loaded


class Walk:
    """One random walk; `past` are the programs that undoing the last step must give back."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.base = traced(name)
        self.program, self.past = self.base, list[Program]()

    def take(self, kind: str, value: Any) -> None:
        before = Snapshot(self.program)
        getattr(self, kind)(value)
        before.hold()

    def lora(self, options: dict[str, Any]) -> None:
        chosen = tuple(LAYERS[self.name][i] for i in options["targets"])
        pass_ = Lora(**{**options, "targets": chosen}, alpha=5, dropout=0.1)
        taken = {name for step in self.program.steps for name in step.added} & set(self.program.tensors)
        if any(f".{layer}.lora_A.{pass_.adapter}" in f".{name}" for name in taken for layer in chosen):
            with pytest.raises(UsageError, match="already has a parameter"):
                rewriter.apply(self.program, pass_)
            return
        self.past.append(self.program)
        self.program = rewriter.apply(self.program, pass_).program

    def merge(self, _: None) -> None:
        last_merge = max((s.number for s in self.program.steps if s.name == "merge"), default=0)
        if not any(step.number > last_merge for step in self.program.steps):
            with pytest.raises(RewriteError, match="nothing to merge"):
                rewriter.apply(self.program, Merge())
            return
        merged = rewriter.apply(self.program, Merge()).program
        one, two = run(self.program, self.name), run(merged, self.name)
        assert distance(one, two) <= TOLERANCE * max(float(t.abs().max()) for t in one)
        assert operations(merged) == operations(self.base)
        assert list(merged.tensors) == list(self.base.tensors)
        self.past.append(self.program)
        self.program = merged

    def undo(self, which: int) -> None:
        if not self.program.steps:
            with pytest.raises(UsageError, match="no pass was applied"):
                rewriter.undo(self.program)
            return
        step = self.program.steps[-1 - which % len(self.program.steps)]
        if step is self.program.steps[-1]:
            self.program = rewriter.undo(self.program)
            expected = self.past.pop()
            assert rewriter.text(self.program) == rewriter.text(expected)
            return
        later = [s for s in self.program.steps if s.number > step.number]
        if step.before is not None or any(s.before is not None for s in later):
            with pytest.raises(UsageError, match="cannot be undone before later steps"):
                rewriter.undo(self.program, step.number)
            return
        without = rewriter.undo(self.program, step.number)
        assert [s.number for s in without.steps] == [s.number for s in self.program.steps if s is not step]
        assert not set(step.added) & set(without.tensors)
        for name, tensor in without.tensors.items():
            assert tensor is self.program.tensor(name)
        place = self.program.steps.index(step) - len(self.program.steps)
        del self.past[place]
        self.past[len(self.past) + place + 1 :] = [
            rewriter.undo(program, step.number) for program in self.past[len(self.past) + place + 1 :]
        ]
        self.program = without

    def train(self, seed: int) -> None:
        added = {name for step in self.program.steps for name in step.added} & set(self.program.tensors)
        generator = torch.Generator().manual_seed(seed)
        values = {
            name: self.program.tensor(name).detach()
            + 0.1 * torch.randn(self.program.tensor(name).shape, generator=generator)
            for name in sorted(added)
        }
        self.program = self.program.with_tensors(values)

    def save(self, _: None) -> None:
        loaded = saved(self.program, self.folder)
        one, two = run(self.program, self.name), run(loaded, self.name)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        for back in (self.program, loaded):
            if back.steps:
                assert rewriter.text(rewriter.undo(back)) == rewriter.text(self.past[-1])


def wander(name: str, walk: list[tuple[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = Snapshot(traced(name))
        walker = Walk(name, Path(folder))
        for kind, value in walk:
            walker.take(kind, value)
        while walker.program.steps:
            walker.take("undo", 0)
        assert rewriter.text(walker.program) == start.text
        assert rewriter.diff(walker.program, walker.base).same
        start.hold()


@given(st.lists(steps, min_size=4, max_size=8))
@settings(tried, max_examples=12)
def test_random_compositions(walk: list[tuple[str, Any]]) -> None:
    wander("mlp", walk)


@given(st.lists(steps, min_size=3, max_size=6))
@settings(tried, max_examples=4)
def test_random_compositions_of_a_llama(walk: list[tuple[str, Any]]) -> None:
    wander("llama", walk)


@given(st.permutations([0, 1, 2]), st.lists(st.booleans(), min_size=3, max_size=3))
@tried
def test_adapters_leave_in_any_order(order: list[int], dora: list[bool]) -> None:
    base = traced("mlp")
    program = base
    for adapter, has_dora in zip(ADAPTERS, dora, strict=True):
        program = rewriter.apply(program, Lora(targets=("up", "down"), rank=2, adapter=adapter, dora=has_dora)).program
    program = trained(program)
    numbers = [step.number for step in program.steps]
    left = program
    for place in order:
        left = rewriter.undo(left, numbers[place])
    assert same(left, base)
    assert left.steps == ()
    assert all(tensor is base.tensor(name) for name, tensor in left.tensors.items())


@given(st.permutations(["one", "two", "three"]))
@settings(tried, max_examples=4)
def test_the_order_of_adapters_does_not_matter_to_the_merge(order: list[str]) -> None:
    base, results = traced("mlp"), []
    for names in (order, list(ADAPTERS)):
        program = base
        for name in names:
            program = rewriter.apply(program, Lora(targets=("up", "down"), rank=2, adapter=name, init="both")).program
        values = {
            name: torch.randn(t.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            for name, t in program.tensors.items()
            if "lora_" in name
        }
        results.append(rewriter.apply(program.with_tensors(values), Merge()).program)
    for name, tensor in results[0].tensors.items():
        assert torch.allclose(tensor, results[1].tensor(name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["conv", "llama_tied"])
def test_a_merged_program_goes_through_a_file_and_back(name: str, tmp_path: Path) -> None:
    targets = {"conv": ("stem", "classes"), "llama_tied": ("lm_head", "q_proj")}[name]
    base = traced(name)
    adapted = trained(rewriter.apply(base, Lora(targets=targets, rank=2, alpha=5)).program)
    merged = rewriter.apply(adapted, Merge(untie=True)).program
    loaded = saved(merged, tmp_path)
    back = rewriter.undo(loaded)
    assert same(back, adapted)
    assert back.tied() == base.tied()
    assert same(rewriter.undo(back), base)
    with pytest.raises(RewriteError, match="nothing to merge"):
        rewriter.apply(loaded, Merge())
