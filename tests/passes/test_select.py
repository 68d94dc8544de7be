"""BitFit, last blocks and globs: which parameters train, and that nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes import Lora, Select
from passes.select_parameters import stacks
from rewriter.errors import UsageError
from tests.models import randomise, traced
from tests.oracle import distance, example, operations, run


def chosen(name: str, **options: Any) -> set[str]:
    after = rewriter.apply(traced(name), Select(**options)).program
    assert operations(after) == operations(traced(name))
    assert distance(run(after, name), run(traced(name), name)) == 0
    return set(after.trainable)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "whisper", "conv", "mlp"])
def test_bitfit_trains_what_modules_call_their_bias(name: str) -> None:
    ours = chosen(name)
    assert ours == {n for n in traced(name).parameters() if n.endswith("bias")}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_bitfit_refuses_a_model_without_bias(name: str) -> None:
    with pytest.raises(UsageError, match="no layer or norm of this model has a bias") as error:
        rewriter.apply(traced(name), Select())
    assert any("has no bias" in line for line in error.value.evidence)


class Unnamed(nn.Module):
    """Biases that are called otherwise, and one that a product by hand adds; a shift of the input is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(10, 14)), nn.Parameter(torch.ones(14))
        self.shift = nn.Parameter(torch.ones(10))
        self.last = nn.Linear(14, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu((x * 2 + self.shift) @ self.weight + self.offset))


def test_a_bias_is_found_by_what_it_does_and_a_layer_without_one_is_named() -> None:
    program = rewriter.trace(randomise(Unnamed()), (torch.ones(3, 5, 10),))
    result = rewriter.apply(program, Select())
    assert result.program.trainable == ("offset",)
    assert [(miss.path, miss.reason) for miss in result.missed] == [("last", "has no bias")]


def test_the_head_trains_too() -> None:
    assert chosen("vit", head=True) - chosen("vit") == {"classifier.weight"}
    with pytest.raises(UsageError, match="has no head"):
        chosen("bert", head=True)


def test_a_tied_head_trains_apart_from_the_embedding() -> None:
    before = traced("llama_tied")
    after = rewriter.apply(before, Select(method="last", last=1, head=True)).program
    assert "lm_head.weight" in after.trainable
    assert "model.embed_tokens.weight" not in after.trainable
    changed = after.with_tensors({"lm_head.weight": after.tensor("lm_head.weight") + 1})
    assert torch.equal(changed.tensor("model.embed_tokens.weight"), before.tensor("model.embed_tokens.weight"))
    assert distance(run(changed, "llama_tied"), run(before, "llama_tied")) > 1


LAST = {
    "llama": ("model.layers.1.",),
    "gpt2": ("transformer.h.1.",),
    "vit": ("vit.layers.1.",),
    "t5": ("encoder.block.1.", "decoder.block.1."),
    "whisper": ("model.encoder.layers.1.", "model.decoder.layers.1."),
}


@pytest.mark.parametrize("name", LAST)
def test_the_last_block_of_every_stack(name: str) -> None:
    assert chosen(name, method="last", last=1) == {n for n in traced(name).parameters() if n.startswith(LAST[name])}


def test_blocks_choose_a_stack() -> None:
    assert stacks(traced("t5")) == {
        "encoder.block": ["encoder.block.0", "encoder.block.1"],
        "decoder.block": ["decoder.block.0", "decoder.block.1"],
    }
    ours = chosen("t5", method="last", last=2, blocks=("decoder.block",))
    assert ours == {n for n in traced("t5").parameters() if n.startswith("decoder.block.")}
    with pytest.raises(UsageError, match=r"'decoder\.blok' is no list of blocks"):
        chosen("t5", method="last", last=1, blocks=("decoder.blok",))
    with pytest.raises(UsageError, match=r"last is 3, but model\.layers has 2 blocks"):
        chosen("llama", method="last", last=3)
    with pytest.raises(UsageError, match="no list of repeated blocks"):
        chosen("mlp", method="last", last=1)


def test_globs() -> None:
    assert chosen("mlp", method="paths", paths=("up.*", "*.bias")) == {"up.weight", "up.bias", "norm.bias", "head.bias"}
    with pytest.raises(UsageError, match=r"path 'up.w\?' matches no parameter"):
        chosen("mlp", method="paths", paths=("up.*", "up.w?"))
    both = chosen("llama_tied", method="paths", paths=("model.embed_tokens.weight",))
    assert both == {"model.embed_tokens.weight", "lm_head.weight"}  # one tensor, which trains under both names


def test_training_changes_what_was_declared_and_nothing_else() -> None:
    program = rewriter.apply(
        traced("llama_tied"), Select(method="paths", paths=("lm_head.weight", "model.norm.*"))
    ).program
    module = program.module()
    _, inputs = example("llama_tied")
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module(**inputs).logits.square().mean().backward()
    optimiser.step()
    after = program.with_weights(module)
    moved = {n for n in program.parameters() if not torch.equal(program.tensor(n), after.tensor(n))}
    assert moved == set(program.trainable) == {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}


def test_it_goes_together_with_lora() -> None:
    lora = rewriter.apply(traced("gpt2"), Lora(rank=3)).program
    both = rewriter.apply(lora, Select()).program
    assert set(both.trainable) == set(lora.trainable) | chosen("gpt2")
    assert set(rewriter.undo(both).trainable) == set(lora.trainable)
    assert rewriter.diff(rewriter.undo(both, "select"), lora).same


def test_options_are_checked() -> None:
    for options, match in (
        ({"method": "all"}, "method is 'all'"),
        ({"density": 0.1}, "density means nothing to method=bitfit"),
        ({"method": "last"}, "last is 0"),
        ({"method": "last", "last": True}, "last is True"),
        ({"method": "last", "last": 1, "paths": ("*",)}, "paths means nothing to method=last"),
        ({"method": "paths"}, "method=paths has no paths"),
        ({"method": "paths", "paths": "up.*"}, "paths is 'up.*'"),
        ({"head": 1}, "head is 1"),
        ({"method": "fish_mask", "density": 0.0}, "density is 0.0"),
        ({"method": "fish_mask", "adapter": "a.b"}, "adapter is 'a.b'"),
        ({"method": "diff_pruning", "stretch": (0.0, 1.1)}, "stretch is"),
        ({"method": "diff_pruning", "temperature": 0}, "temperature is 0"),
        ({"method": "diff_pruning", "log_alpha": float("nan")}, "log_alpha is nan"),
    ):
        with pytest.raises(UsageError, match=match.replace(".", r"\.").replace("*", r"\*")):
            Select(**options)


def test_what_it_changes(golden: Callable[[str, str], None]) -> None:
    before = traced("llama_tied")
    golden(
        "select.diff",
        str(rewriter.diff(before, rewriter.apply(before, Select(method="last", last=1, head=True)).program)),
    )
