"""An ensemble of prompts says what its members say one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes.prompt import Prompt
from rewriter.errors import UsageError
from rewriter.program import Program
from rewriter.verify import outputs
from tests.models import randomise, traced
from tests.oracle import distance, example, run, trained

COPIES, COUNT = 3, 4


def members(name: str, ensemble: Program) -> list[Program]:
    """One program for every prompt."""
    prompts = ensemble.tensor("prompt_embeddings.default").detach()
    single = rewriter.apply(traced(name), Prompt(virtual_tokens=COUNT)).program
    return [single.with_tensors({"prompt_embeddings.default": prompt}) for prompt in prompts]


def ensemble(name: str, **options: Any) -> Program:
    pass_ = Prompt(virtual_tokens=COUNT, ensemble=COPIES, **options)
    return trained(rewriter.apply(traced(name), pass_).program, size=1.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "whisper", "clip"])
def test_the_mean_is_that_of_separate_programs(name: str) -> None:
    together = ensemble(name)
    apart = [run(member, name) for member in members(name, together)]
    means = [torch.stack(each).mean(0) for each in zip(*apart, strict=True)]
    got = run(together, name)
    assert [t.shape for t in got] == [t.shape for t in means]
    assert distance(got, means) < 1e-5
    assert distance(apart[0], apart[1]) > 1e-2
    assert rewriter.text(rewriter.undo(together)) == rewriter.text(traced(name))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_majority_is_counted_by_hand(name: str) -> None:
    together = ensemble(name, vote="majority")
    answers = [run(member, name)[0].argmax(-1) for member in members(name, together)]
    got = run(together, name)[0]
    for row in range(got.shape[0]):
        for place in range(got.shape[1]):
            counts = [0.0] * got.shape[2]
            for answer in answers:
                counts[int(answer[row, place])] += 1 / COPIES
            assert torch.allclose(got[row, place], torch.tensor(counts))
    assert len({tuple(answer.flatten().tolist()) for answer in answers}) == COPIES


def test_only_the_first_output_is_voted_on() -> None:
    together, mean = ensemble("bert", vote="majority"), ensemble("bert")
    assert distance(run(together, "bert")[1:], run(mean, "bert")[1:]) == 0
    assert torch.allclose(run(together, "bert")[0].sum(-1), torch.ones(3, 7))


def test_sizes_vary_and_one_encoder_makes_all_prompts() -> None:
    together = ensemble("llama", encoder="lstm", encoder_hidden=5)
    assert together.tensor("prompt_encoder.default.embedding.weight").shape == (COPIES * COUNT, 24)
    single = rewriter.apply(traced("llama"), Prompt(virtual_tokens=COUNT, encoder="lstm", encoder_hidden=5)).program
    names = [name for step in single.steps for name in step.added]
    for batch, length in ((2, 5), (4, 11)):
        ids = torch.randint(3, 31, (batch, length), generator=torch.Generator().manual_seed(batch))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        apart = []
        for copy in range(COPIES):
            values = {name: together.tensor(name).detach() for name in names}
            table = "prompt_encoder.default.embedding.weight"
            values[table] = values[table].view(COPIES, COUNT, 24)[copy]
            apart.append(single.with_tensors(values)(**inputs)["logits"])
        assert (together(**inputs)["logits"] - torch.stack(apart).mean(0)).abs().max() < 1e-5


class Odd(nn.Module):
    """An output that compares the rows of the batch, or one that is no floating point."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.table, self.what = nn.Embedding(19, 12), what

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).mean(1)
        return x @ x.t() if self.what == "pairs" else x.argmax(-1)


@pytest.mark.parametrize(("what", "reason"), [("pairs", "compares the rows"), ("classes", "there is no mean")])
def test_outputs_without_a_mean_are_refused(what: str, reason: str) -> None:
    ids = torch.randint(3, 19, (3, 7), generator=torch.Generator().manual_seed(0))
    program = rewriter.trace(randomise(Odd(what)), (ids,))
    rewriter.apply(program, Prompt(virtual_tokens=2))
    with pytest.raises(UsageError, match=reason):
        rewriter.apply(program, Prompt(virtual_tokens=2, ensemble=2))


def test_a_fixed_batch_is_refused() -> None:
    kwargs = {key: value[:1] if isinstance(value, Tensor) else value for key, value in example("bert")[1].items()}
    from tests.models import bert

    program = rewriter.trace(bert()[0], (), kwargs)
    assert len(outputs(rewriter.apply(program, Prompt(virtual_tokens=2)).program(**kwargs))) == 2
    with pytest.raises(UsageError, match="batch of input_ids is fixed at 1"):
        rewriter.apply(program, Prompt(virtual_tokens=2, ensemble=2))
