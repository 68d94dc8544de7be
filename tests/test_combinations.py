"""Two methods on one model: what works together gives what both give by hand, what makes no sense is refused."""

from __future__ import annotations

import functools
import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rewriter
from passes import (
    Adalora,
    Adapter,
    Bake,
    Binarise,
    Ia3,
    Intrinsic,
    LayerNormTuning,
    Loha,
    Lokr,
    Lora,
    Merge,
    Prefix,
    Prompt,
    Select,
    TrainableTokens,
    Vera,
)
from rewriter.errors import RewriteError, UsageError
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from rewriter.transform import Pass
from rewriter.view import Linear
from tests.models import traced
from tests.oracle import distance, merged_weight, operations, run, traced_double

EXACT = 1e-10  # of programs in fp64
LORA = Lora(rank=2, alpha=5)
BESIDE: dict[str, Pass] = {  # methods that leave the weights of LoRA's layers alone
    "prefix": Prefix(virtual_tokens=3),
    "prompt": Prompt(virtual_tokens=4),
    "ln_tuning": LayerNormTuning(),
    "bitfit": Select(),
    "adapter": Adapter(bottleneck=3),
    "adapter, parallel": Adapter(form="parallel", bottleneck=3),
    "adapter, layer": Adapter(form="layer", targets=("@attention.query",), bottleneck=3),
    "trainable_tokens": TrainableTokens(token_indices=(5, 3, 17)),
    "lora": Lora(rank=3, targets=("@attention.value", "@attention.output"), adapter="two"),
}
STAY = {"prefix", "prompt", "adapter"}  # names of passes that a merge leaves in the graph


def with_values(program: Program) -> Program:
    """Everything that trains gets a random value that depends on its name alone; a factor stays near 1."""
    added = {name for step in program.steps for name in step.added}
    values = {}
    for name in program.trainable:
        before = program.tensor(name).detach()
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = 0.4 * torch.randn(before.shape, generator=generator, dtype=torch.float64).to(before.dtype)
        values[name] = before + noise if name not in added or "ia3" in name else noise
    return program.with_tensors(values)


def applied(base: Program, *passes: Pass) -> Program:
    """The program with passes whose laws other tests measure."""
    return rewriter.apply(base, *passes, check=False).program


def both(base: Program, *passes: Pass) -> Program:
    return with_values(applied(base, *passes))


@functools.cache
def combined(model: str, name: str, lora_first: bool) -> Program:
    order = (LORA, BESIDE[name]) if lora_first else (BESIDE[name], LORA)
    return both(traced_double(model), *order)


def folded_by_hand(base: Program, program: Program, lora: Lora = LORA) -> Program:
    """The base model with `W + scale · B A` in place of the weights that the LoRA of a program adapts."""
    tensors = {**program.tensors, **base.tensors}
    return base.with_tensors({site.weight: merged_weight(lora, site, tensors) for site in lora.find(base)})


def carried(program: Program, values: Program) -> Program:
    """The program with the tensors that another one holds under the names that train here."""
    return program.with_tensors({name: values.tensor(name) for name in program.trainable})


PAIRS = [*(("bert", name) for name in BESIDE), *(("llama", name) for name in ("prefix", "prompt", "adapter"))]


@pytest.mark.parametrize("lora_first", [True, False], ids=["lora first", "lora last"])
@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_a_lora_and_another_method_act_together(model: str, name: str, lora_first: bool) -> None:
    """Both orders give what the other method gives on a model whose weights hold the LoRA."""
    base, program = traced_double(model), combined(model, name, lora_first)
    by_hand = carried(applied(folded_by_hand(base, program), BESIDE[name]), program)
    outputs = run(program, model)
    assert distance(outputs, run(by_hand, model)) < EXACT
    only_lora = carried(applied(base, LORA), program)
    only_other = carried(applied(base, BESIDE[name]), program)
    assert min(distance(outputs, run(alone, model)) for alone in (only_lora, only_other)) > 1e-3


MERGED = [(name, first) for name in BESIDE for first in (True, False) if (name, first) != ("adapter, layer", False)]


@pytest.mark.parametrize(("name", "lora_first"), MERGED)
def test_what_merges_is_merged_and_the_rest_stays(name: str, lora_first: bool) -> None:
    program = combined("bert", name, lora_first)
    other = BESIDE[name]
    keep = (other.name,) if other.name in STAY else ()
    if keep:
        with pytest.raises(RewriteError, match=f"cannot be merged(.|\n)*--keep {other.name}"):
            rewriter.apply(program, Merge())
    merged = applied(program, Merge(keep=keep))
    assert distance(run(program, "bert"), run(merged, "bert")) < EXACT
    base = traced_double("bert")
    alone = applied(base, other) if keep else base
    assert sorted(operations(merged)) == sorted(operations(alone))
    assert set(merged.tensors) == set(alone.tensors)


@pytest.mark.parametrize("lora_first", [True, False], ids=["lora first", "lora last"])
@pytest.mark.parametrize("name", BESIDE)
def test_one_of_two_is_undone_and_the_other_stays(name: str, lora_first: bool) -> None:
    order = (LORA, BESIDE[name]) if lora_first else (BESIDE[name], LORA)
    base = traced_double("bert")
    program = applied(base, *order)
    for number, left in ((2, order[0]), (1, order[1])):
        alone = applied(base, left)
        if number == 1 and {"prefix", "prompt"} & {each.name for each in order}:
            continue  # they rewire what the model had, and so only leave as the last
        back = rewriter.undo(program, number)
        assert set(back.tensors) == set(alone.tensors)
        assert sorted(operations(back)) == sorted(operations(alone))
        assert distance(run(carried(back, program), "bert"), run(carried(alone, program), "bert")) == 0


ADAPTERS = {
    "series": Adapter(bottleneck=3),
    "series, norms": Adapter(bottleneck=3, activation="gelu", norm_before=True, norm_after=True, norm_sum=True),
    "parallel": Adapter(form="parallel", bottleneck=3, activation="tanh"),
    "both": Adapter(bottleneck=3, activation="silu", original_norm="both"),
}
LINEAR: tuple[Pass, ...] = (
    Lora(targets="all-linear", rank=2, dora=True),
    Loha(targets="all-linear", rank=2),
    Ia3(targets="all-linear", feedforward_targets=()),
)


@pytest.mark.parametrize("linear", [Lora(targets="all-linear", rank=2), *LINEAR], ids=["lora", "dora", "loha", "ia3"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_linear_update_joins_its_layer_below_an_adapter_that_came_first(kind: str, linear: Pass) -> None:
    """Both orders are one model; either pass is undone as if it had never been; the update merges."""
    base, adapter = traced_double("bert"), ADAPTERS[kind]
    later = both(base, adapter, linear)
    first = carried(applied(base, linear, adapter), later)
    outputs = run(later, "bert")
    assert distance(outputs, run(first, "bert")) == 0
    alone = {1: carried(applied(base, linear), later), 2: carried(applied(base, adapter), later)}
    assert min(distance(outputs, run(one, "bert")) for one in alone.values()) > 1e-3
    for number, left in alone.items():
        back = rewriter.undo(later, number)
        assert rewriter.text(back) == rewriter.text(left)
        assert rewriter.text(rewriter.undo(back)) == rewriter.text(base)
    merged = applied(later, Merge(keep=("adapter",)))
    assert sorted(operations(merged)) == sorted(operations(alone[2]))
    assert distance(outputs, run(merged, "bert")) < EXACT


def test_updates_before_and_after_an_adapter_stack_below_it() -> None:
    base, adapter, two = traced_double("bert"), Adapter(bottleneck=3), Lora(targets="all-linear", rank=3, adapter="two")
    one = replace(two, rank=2, adapter="one")
    program = both(base, one, adapter, two)
    assert distance(run(program, "bert"), run(carried(applied(base, one, two, adapter), program), "bert")) == 0
    lefts: tuple[tuple[Pass, ...], ...] = ((adapter, two), (one, two), (one, adapter))
    for number, left in enumerate(lefts, 1):
        back = rewriter.undo(program, number)
        assert distance(run(back, "bert"), run(carried(applied(base, *left), program), "bert")) == 0
        assert rewriter.text(rewriter.undo(rewriter.undo(back))) == rewriter.text(base)
    assert distance(run(applied(program, Merge(keep=("adapter",))), "bert"), run(program, "bert")) < EXACT


def test_two_adapters_stack_above_an_update_between_them() -> None:
    base, one, two = traced_double("bert"), Adapter(bottleneck=3), Adapter(bottleneck=2, adapter="two")
    lora = Lora(targets="all-linear", rank=2)
    program = both(base, one, lora, two)
    assert distance(run(program, "bert"), run(carried(applied(base, lora, one, two), program), "bert")) == 0
    for number, left in ((1, (lora, two)), (2, (one, two)), (3, (one, lora))):
        back = rewriter.undo(program, number)
        assert distance(run(back, "bert"), run(carried(applied(base, *left), program), "bert")) == 0


def test_a_lora_after_an_adapter_beside_its_layer_is_no_part_of_the_weight() -> None:
    """Undoing the bottleneck lets the LoRA merge."""
    program = combined("bert", "adapter, layer", False)
    with pytest.raises(RewriteError, match=r"lora \(step 2\) acts on a sum with adapter \(step 1\)") as kept:
        rewriter.apply(program, Merge(keep=("adapter",)))
    assert "Apply lora before adapter" in kept.value.fix
    with pytest.raises(RewriteError, match=r"adapter\.default\.down\.weight cannot be merged: relu") as whole:
        rewriter.apply(program, Merge())
    assert "Apply lora before adapter" in whole.value.fix
    merged = applied(rewriter.undo(program, "adapter"), Merge())
    assert operations(merged) == operations(traced_double("bert"))


@pytest.mark.parametrize("keep", [(), ("select",)])
@pytest.mark.parametrize("adapter", ["default", "two"])
def test_a_merge_beside_open_gates_asks_to_close_them(adapter: str, keep: tuple[str, ...]) -> None:
    base = traced_double("llama")
    program = both(base, LORA, Select(method="diff_pruning", paths=("*.q_proj.weight",), adapter=adapter))
    with pytest.raises(RewriteError, match=r"diff pruning's gates are open.* select \(step 2\)") as error:
        rewriter.apply(program, Merge(keep=keep))
    assert "--pass binarise" in error.value.fix
    assert ("--adapter-name two" in error.value.fix) is (adapter == "two")
    closed = applied(program, Binarise(adapter=adapter))
    merged = applied(closed, Merge())
    assert operations(merged) == operations(base)
    assert distance(run(merged, "llama"), run(closed, "llama")) < EXACT


def test_a_refused_merge_says_what_breaks_it_and_where_else_and_no_more() -> None:
    base = traced_double("bert")
    program = both(base, Adapter(form="layer", targets="all-linear", bottleneck=3), Prefix(virtual_tokens=3))
    with pytest.raises(RewriteError) as error:
        rewriter.apply(program, Merge())
    what, at, *others, more, _ = str(error.value).split("\n")
    assert what.endswith("cannot be merged: relu is not affine")
    assert "adapter_relu = relu" in at
    assert len(at) < 170
    assert len({other.split(".adapter.")[0] for other in others}) == len(others) == 5
    assert re.fullmatch(r"  … and \d+ more", more)


def test_the_advice_to_keep_repeats_what_is_kept() -> None:
    program = both(traced_double("bert"), LORA, Adapter(bottleneck=3), Prefix(virtual_tokens=3))
    for keep, advice in (((), "adapter,prefix"), (("prefix",), "prefix,adapter")):
        with pytest.raises(RewriteError) as error:
            rewriter.apply(program, Merge(keep=keep))
        assert f"Merge the rest with --keep {advice}," in error.value.fix
        merged = applied(program, Merge(keep=tuple(advice.split(","))))
        assert distance(run(merged, "bert"), run(program, "bert")) < EXACT


TRAINED: tuple[Pass, ...] = (Select(), LayerNormTuning(), Select(method="last", last=1))


@pytest.mark.parametrize("pass_", TRAINED, ids=["bitfit", "ln_tuning", "last"])
def test_what_trains_the_weights_themselves_has_nothing_to_merge(pass_: Pass) -> None:
    program = both(traced_double("bert"), pass_)
    with pytest.raises(RewriteError, match=f"nothing to merge: what {pass_.name} trains are weights") as error:
        rewriter.apply(program, Merge())
    assert "export the program as it is" in error.value.fix
    assert error.value.evidence[0] in program.trainable
    with pytest.raises(RewriteError, match="nothing to merge beside adapter, which keep leaves"):
        rewriter.apply(both(program, Adapter(bottleneck=3)), Merge(keep=("adapter",)))


# -- (IA)³ scales what a LoRA adapts, so that the order matters ------------------------------------------------------


def scaled_by_hand(base: Program, program: Program) -> Program:
    """The base model with rows of keys and values, and columns of the MLP's output, times their (IA)³ vectors."""
    values = {}
    for site in Ia3().find(base):
        assert isinstance(site.layer, Linear)
        vector, weight = program.tensor(f"{site.path}.ia3_l.default").flatten(), base.tensor(site.layer.weight)
        values[site.layer.weight] = (weight * vector[None] if site.feedforward else weight * vector[:, None]).detach()
    return base.with_tensors(values)


def test_ia3_after_a_lora_scales_the_lora_too() -> None:
    base = traced_double("llama")
    program = both(base, LORA, Ia3())
    by_hand = scaled_by_hand(folded_by_hand(base, program), program)
    assert distance(run(program, "llama"), run(by_hand, "llama")) < EXACT


def test_a_lora_after_ia3_is_not_scaled() -> None:
    base = traced_double("llama")
    program = both(base, Ia3(), LORA)
    by_hand = folded_by_hand(scaled_by_hand(base, program), program)
    assert distance(run(program, "llama"), run(by_hand, "llama")) < EXACT


@pytest.mark.parametrize("order", [(LORA, Ia3()), (Ia3(), LORA)], ids=["lora first", "lora last"])
def test_ia3_and_a_lora_merge_and_are_undone(order: tuple[Pass, Pass]) -> None:
    base = traced_double("llama")
    program = both(base, *order)
    merged = applied(program, Merge())
    assert distance(run(program, "llama"), run(merged, "llama")) < EXACT
    assert operations(merged) == operations(base)
    for number, left in ((2, order[0]), (1, order[1])):
        alone = carried(applied(base, left), program)
        assert distance(run(rewriter.undo(program, number), "llama"), run(alone, "llama")) == 0


# -- other pairs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_first", [True, False])
def test_an_adapter_and_bitfit_act_together(adapter_first: bool) -> None:
    """Both orders give what the adapter gives on a model that holds the trained biases."""
    base, adapter, bitfit = traced_double("bert"), BESIDE["adapter"], Select()
    program = both(base, *((adapter, bitfit) if adapter_first else (bitfit, adapter)))
    biases = [name for name in base.tensors if name in program.trainable]
    assert biases
    trained = base.with_tensors({name: program.tensor(name) for name in biases})
    by_hand = carried(applied(trained, adapter), program)
    assert distance(run(program, "bert"), run(by_hand, "bert")) < EXACT
    assert distance(run(program, "bert"), run(carried(applied(base, adapter), program), "bert")) > 1e-3


@pytest.mark.parametrize(
    "kind",
    [LORA, Loha(rank=2), Lokr(rank=2), Vera(rank=3), Adalora(rank=2), Ia3()],
    ids=lambda kind: kind.name,
)
def test_two_of_one_kind_act_one_after_the_other(kind: Pass) -> None:
    """Two named adapters give what the second gives on a model into which the first was merged."""
    base, second = traced_double("llama"), replace(kind, adapter="two")  # type: ignore[type-var]
    program = both(base, kind, second)
    first = carried(applied(base, kind), program)
    by_hand = carried(applied(rewriter.apply(first, Merge()).program, second), program)
    assert distance(run(program, "llama"), run(by_hand, "llama")) < EXACT
    assert distance(run(program, "llama"), run(first, "llama")) > 1e-3
    assert distance(run(rewriter.undo(program, 2), "llama"), run(first, "llama")) == 0
    only_second = carried(applied(base, second), program)
    assert distance(run(rewriter.undo(program, 1), "llama"), run(only_second, "llama")) == 0
    merged = applied(program, Merge())
    assert operations(merged) == operations(base)
    assert distance(run(merged, "llama"), run(program, "llama")) < EXACT


def test_two_prefixes_are_one_after_the_other() -> None:
    base = traced_double("llama")
    program = both(base, Prefix(virtual_tokens=3), Prefix(virtual_tokens=2, adapter="two"))
    rows = [program.tensor(f"prompt_embeddings.{name}").detach() for name in ("two", "default")]
    one = applied(base, Prefix(virtual_tokens=5)).with_tensors({"prompt_embeddings.default": torch.cat(rows)})
    assert distance(run(program, "llama"), run(one, "llama")) < EXACT


def test_a_prompt_and_a_prefix_act_together() -> None:
    base = traced_double("llama")
    program = both(base, Prompt(virtual_tokens=4), Prefix(virtual_tokens=3, adapter="two"))
    turned = both(base, Prefix(virtual_tokens=3, adapter="two"), Prompt(virtual_tokens=4))
    assert distance(run(program, "llama"), run(turned, "llama")) < EXACT


# -- ONNX ------------------------------------------------------------------------------------------------------------

EXPORTED: dict[str, tuple[Pass, ...]] = {
    "lora, prefix": (LORA, Prefix(virtual_tokens=3)),
    "adapter, bitfit": (Adapter(bottleneck=3), Select()),
    "lora, prompt": (LORA, Prompt(virtual_tokens=4)),
    "prompt, lora": (Prompt(virtual_tokens=4), LORA),
    "lora, ia3, ln_tuning": (LORA, Ia3(), LayerNormTuning()),
    "adapter, adapter": (Adapter(bottleneck=3), Adapter(form="parallel", bottleneck=2, adapter="two")),
    "prefix, prompt": (Prefix(virtual_tokens=3, projection=True), Prompt(virtual_tokens=2, adapter="two")),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_a_combination_runs_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    program = both(traced("bert"), *EXPORTED[name])
    assert export_onnx(program, tmp_path / "model.onnx").max_abs_error < 1e-4


# -- refused ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[tuple[Pass, ...], Pass, str]] = {
    "the same name twice": ((LORA,), Lora(rank=3), r"already has a parameter .*q_proj\.lora_A\.default"),
    "lora under adalora's name": ((Adalora(rank=2),), LORA, r"already has a parameter .*q_proj\.lora_A\.default"),
    "adapter twice": ((Adapter(bottleneck=3),), Adapter(bottleneck=4), r"already has a parameter .*adapter\.default"),
    "prefix under the prompt's name": (
        (Prompt(virtual_tokens=4),),
        Prefix(virtual_tokens=3),
        r"already has a parameter 'prompt_embeddings\.default'",
    ),
    "intrinsic, lora": ((Intrinsic(dimension=16),), LORA, r"q_proj applies a weight that the pass intrinsic computes"),
    "diff_pruning, lora": (
        (Select(method="diff_pruning", paths=("*.q_proj.weight",)),),
        LORA,
        r"q_proj applies a weight that the pass select computes",
    ),
    "trainable_tokens, lora": (
        (TrainableTokens(token_indices=(3,)),),
        Lora(targets=("embed_tokens",), rank=2),
        r"embed_tokens applies a weight that the pass trainable_tokens computes",
    ),
    "trainable_tokens twice": (
        (TrainableTokens(token_indices=(3,)),),
        TrainableTokens(token_indices=(4,), adapter="two"),
        r"trainable tokens already: model\.embed_tokens",
    ),
    "prompt twice": (
        (Prompt(virtual_tokens=4),),
        Prompt(virtual_tokens=3, adapter="two"),
        r"input_ids was lengthened before",
    ),
    "bake without a constant": ((LORA,), Bake(), r"nothing to bake(.|\n)*lora"),
    "merge of a bottleneck": ((Adapter(bottleneck=3),), Merge(), r"adapter\.default\.down\.weight cannot be merged"),
    "merge of a prefix": ((Prefix(virtual_tokens=3),), Merge(), r"prompt_embeddings\.default cannot be merged"),
    "merge of what only trains": ((LayerNormTuning(),), Merge(), r"nothing to merge"),
    "merge keeping everything": ((Adapter(bottleneck=3),), Merge(keep=("adapter",)), r"nothing to merge"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_combination_that_makes_no_sense_is_refused(name: str) -> None:
    before, pass_, reason = REFUSED[name]
    program = rewriter.apply(traced("llama"), *before).program
    text = rewriter.text(program)
    with pytest.raises((UsageError, RewriteError)) as caught:
        rewriter.apply(program, pass_)
    assert re.search(reason, str(caught.value)), str(caught.value)
    assert "\n" in str(caught.value)
    assert rewriter.text(program) == text


GATED = Select(method="diff_pruning")


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (Intrinsic(dimension=16), Adapter(), "the pass intrinsic computes weights"),
        (GATED, Adapter(placement="pfeiffer"), "the pass select computes weights"),
        (GATED, Select(), "the pass select computes the biases"),
    ],
    ids=["intrinsic, adapter", "diff pruning, adapter", "diff pruning, bitfit"],
)
def test_a_refusal_names_the_pass_that_computes_the_weights(before: Pass, after: Pass, reason: str) -> None:
    program = applied(traced("bert"), before)
    with pytest.raises(UsageError, match=reason) as error:
        rewriter.apply(program, after)
    assert f"undo {before.name} first" in error.value.fix or "undo it first" in error.value.fix
    assert rewriter.apply(rewriter.undo(program), after).sites


@pytest.mark.parametrize("later", [Prefix(virtual_tokens=3), Prompt(virtual_tokens=4)], ids=lambda later: later.name)
def test_a_step_under_one_that_rewires_is_not_undone(later: Pass) -> None:
    program = rewriter.apply(traced("llama"), LORA, later).program
    with pytest.raises(UsageError, match=f"step 1: lora cannot be undone(.|\n)*step 2: {later.name} removed"):
        rewriter.undo(program, 1)
    back = rewriter.undo(program)
    assert rewriter.text(back) == rewriter.text(rewriter.apply(traced("llama"), LORA).program)
