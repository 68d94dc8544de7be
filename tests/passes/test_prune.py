"""Pruning one LoRA: ranks and entries against what is computed by hand in fp64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import rewriter
from passes import Lora, Merge
from passes.peft_write import write_adapter
from passes.prune import Prune
from rewriter import verify
from rewriter.errors import RewriteError, UsageError
from rewriter.program import Program
from rewriter.text import text
from tests.models import TINY, traced
from tests.oracle import distance, run, traced_double, trained
from tests.passes.test_golden import Golden

LORA = Lora(targets=("up", "down"), rank=4, alpha=3, rslora=True, rank_pattern={"down": 2})
SCALE = {"up": 3 / math.sqrt(4), "down": 3 / math.sqrt(2)}


def adapted(name: str = "mlp", *steps: Lora, double: bool = True) -> Program:
    return trained(rewriter.apply((traced_double if double else traced)(name), *(steps or (LORA,))).program)


def update(program: Program, path: str) -> torch.Tensor:
    a, b = (program.tensor(f"{path}.lora_{letter}.default").detach() for letter in "AB")
    return SCALE[path] * b @ a


def change(program: Program, path: str) -> torch.Tensor:
    name = f"{path}.weight"
    return rewriter.apply(program, Merge()).program.tensor(name).detach() - program.tensor(name).detach()


def test_a_lower_rank_is_the_best_approximation() -> None:
    program = adapted()
    result = rewriter.apply(program, Prune(rank=3))
    after, exact = result.program, update(program, "up")
    _, vectors = torch.linalg.eigh(exact.t() @ exact)
    expected = exact @ vectors[:, -3:] @ vectors[:, -3:].t()
    torch.testing.assert_close(change(after, "up"), expected, rtol=1e-8, atol=1e-10)
    error = float((expected - exact).norm() / exact.norm())
    assert result.applied[0].notes["up"]["error_of_update"] == pytest.approx(error)
    assert after.tensor("up.lora_A.default").shape == (3, 10)
    assert torch.equal(after.tensor("down.lora_A.default"), program.tensor("down.lora_A.default"))
    assert result.applied[0].notes["down"]["error_of_update"] < 1e-12
    torch.testing.assert_close(change(after, "down"), update(program, "down"))


def test_a_density_keeps_the_largest_entries() -> None:
    program = adapted()
    result = rewriter.apply(program, Prune(density=0.3))
    expected = []
    for letter in "AB":
        before = program.tensor(f"up.lora_{letter}.default").detach()
        after = result.program.tensor(f"up.lora_{letter}.default").detach()
        kept = after != 0
        assert int(kept.sum()) == int(0.3 * before.numel())
        assert torch.equal(after[kept], before[kept])
        assert float(before[kept].abs().min()) >= float(before[~kept].abs().max())
        expected.append(before * kept)
    torch.testing.assert_close(change(result.program, "up"), SCALE["up"] * expected[1] @ expected[0])
    difference = SCALE["up"] * expected[1] @ expected[0] - update(program, "up")
    error = float(difference.norm() / update(program, "up").norm())
    assert result.applied[0].notes["up"]["error_of_update"] == pytest.approx(error)


def test_both_reduce_the_rank_first() -> None:
    program = adapted()
    after = rewriter.apply(program, Prune(rank=2, density=0.5)).program
    lower = rewriter.apply(program, Prune(rank=2)).program
    by_two = rewriter.apply(lower, Prune(density=0.5)).program
    assert torch.equal(after.tensor("up.lora_A.default"), by_two.tensor("up.lora_A.default"))
    assert after.tensor("up.lora_A.default").shape == (2, 10)


@pytest.mark.filterwarnings("ignore:.*exceeds")
@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("gpt2", Lora(targets=("c_attn",), enable=("q", "v"), rank=4)),
        ("conv", Lora(targets=("stem", "grouped", "signal", "classes"), rank=8, alpha=3)),
        ("mixtral", Lora(targets=("@mlp",), rank=5)),
        ("bert", Lora(targets=("query",), rank=4, lora_bias=True, alpha=7)),
        ("mlp", Lora(targets=("up", "down"), rank=4, dora=True)),
    ],
)
def test_every_kind_of_layer(name: str, lora: Lora) -> None:
    program = adapted(name, lora)
    before = run(program, name)
    whole = rewriter.apply(program, Prune(density=1)).program
    assert distance(before, run(whole, name)) < 1e-10
    result = rewriter.apply(program, Prune(rank=4 if name == "conv" else 3))
    assert max(note["error_of_update"] for note in result.applied[0].notes.values()) > 1e-3
    assert distance(before, run(result.program, name)) > 1e-4
    back = rewriter.undo(result.program)
    assert str(text(back)) == str(text(program))
    assert set(result.program.trainable) == set(result.program.steps[-1].added)


def test_a_bias_of_b_stays() -> None:
    program = adapted("mlp", Lora(targets=("up",), rank=4, alpha=3, lora_bias=True))
    after = rewriter.apply(program, Prune(rank=2)).program
    # the scale is 3 / 4 before and 1 after
    torch.testing.assert_close(after.tensor("up.lora_B_bias.default"), 0.75 * program.tensor("up.lora_B_bias.default"))


def test_written_for_peft_and_saved(tmp_path: Path) -> None:
    steps = [
        Lora(targets=("q_proj",), rank=4, adapter="other"),
        Lora(targets=("q_proj", "v_proj"), rank=4, alpha=3, rslora=True, adapter="mine"),
    ]
    program = adapted("llama", *steps, double=False)
    after = rewriter.apply(program, Prune(adapter="mine", rank=2, density=0.8)).program
    loaded = rewriter.load(after.save(tmp_path / "pruned.pt2"))
    assert distance(run(after, "llama"), run(loaded, "llama")) == 0
    write_adapter(loaded, tmp_path / "adapters", adapter="mine")
    write_adapter(loaded, tmp_path / "adapters", adapter="other")
    model = PeftModel.from_pretrained(TINY["llama"]()[0], tmp_path / "adapters" / "mine", adapter_name="mine")
    model.load_adapter(tmp_path / "adapters" / "other", adapter_name="other")
    model.base_model.set_adapter(["mine", "other"])
    _, args, kwargs = TINY["llama"]()
    with torch.no_grad():
        found = verify.outputs(model.eval()(*args, **kwargs))
    assert distance(found, run(after, "llama")) < 1e-5
    assert distance(found, run(program, "llama")) > 1e-3


def test_it_needs_something_to_prune() -> None:
    with pytest.raises(UsageError, match="nothing to prune to"):
        rewriter.apply(adapted(), Prune())
    with pytest.raises(UsageError, match="no layer of the adapter default has a rank above 4"):
        rewriter.apply(adapted(), Prune(rank=4))
    with pytest.raises(UsageError, match="has no LoRA named 'other'"):
        rewriter.apply(adapted(), Prune(rank=2, adapter="other"))
    with pytest.raises(UsageError, match="has no LoRA"):
        rewriter.apply(traced("mlp"), Prune(rank=2))
    with pytest.raises(RewriteError, match="took its start out of"):
        rewriter.apply(adapted("mlp", Lora(targets=("up",), rank=4, init="pissa")), Prune(rank=2))
    with pytest.raises(UsageError, match="rank 3 is not a multiple of its 4 groups"):
        rewriter.apply(adapted("conv", Lora(targets=("grouped",), rank=4)), Prune(rank=3))


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"rank": True}, {"rank": 2.0}, {"density": 0}, {"density": 1.5}, {"adapter": ""}]
)
def test_options_that_cannot_be_meant(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Prune(**options)


def test_what_it_changes(golden: Golden) -> None:
    program = adapted("mlp", double=False)
    after = rewriter.apply(program, Prune(rank=3)).program
    zeros = {name: torch.zeros_like(after.tensor(name)) for name in after.steps[-1].added}
    golden("prune.diff", str(rewriter.diff(program, after.with_tensors(zeros))))
