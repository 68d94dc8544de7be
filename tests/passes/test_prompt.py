"""Prompt tuning against a transformer written out by hand in fp64, and everything a prompt must leave as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes.lora import Lora
from passes.prompt import Prompt, parse_template
from rewriter.errors import UsageError
from rewriter.program import Program
from rewriter.verify import outputs
from tests.models import llama, randomise, traced
from tests.oracle import distance, example, run, trained

ROWS, WIDTH, HEADS, CLASSES, ROOM = 19, 12, 3, 5, 17


class Small(nn.Module):
    """Learned positions, token types, one causal attention with a padding mask, one feed-forward layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH)
        self.places = nn.Parameter(torch.zeros(ROOM, WIDTH))
        self.types = nn.Embedding(2, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 22), nn.Linear(22, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor, kinds: Tensor) -> dict[str, Tensor]:
        x = self.table(ids) + self.places[: ids.shape[1]] + self.types(kinds)
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        count = torch.arange(length)
        seen = (count[None, :] <= count[:, None])[None, None] & mask[:, None, None].bool()
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + attended.transpose(1, 2).reshape(batch, length, WIDTH)
        x = x + self.down(torch.tanh(self.up(x)))
        return {"scores": self.head(x), "pooled": x[:, 0], "mean": x.mean(1)}


IDS = torch.randint(3, ROWS, (3, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
KINDS = torch.tensor([[0, 0, 0, 1, 1, 1]] * 3)


def small() -> Program:
    return rewriter.trace(randomise(Small()).double(), (IDS, MASK, KINDS))


def by_hand(w: dict[str, Tensor], x: Tensor, mask: Tensor, kinds: Tensor) -> dict[str, Tensor]:
    """The model on given embeddings, row by row and head by head."""
    x = x + w["places"][: x.shape[1]] + w["types.weight"][kinds]
    rows = []
    for row, visible in zip(x, mask, strict=True):
        q, k, v = (row @ w[f"{n}.weight"].t() + w[f"{n}.bias"] for n in "qkv")
        parts = []
        for head in range(HEADS):
            columns = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            result = torch.zeros_like(row[:, columns])
            for i in range(len(row)):
                weights = [
                    torch.exp(q[i, columns] @ k[j, columns] / (WIDTH // HEADS) ** 0.5)
                    if visible[j]
                    else torch.zeros(())
                    for j in range(i + 1)
                ]
                total = sum(weights)
                result[i] = sum(a / total * v[j, columns] for j, a in enumerate(weights)) if total > 0 else torch.nan
            parts.append(result)
        row = row + torch.cat(parts, 1)
        rows.append(row + torch.tanh(row @ w["up.weight"].t() + w["up.bias"]) @ w["down.weight"].t() + w["down.bias"])
    x = torch.stack(rows)
    return {"scores": x @ w["head.weight"].t() + w["head.bias"], "pooled": x[:, 0], "mean": x.mean(1)}


def around(value: Tensor, before: Tensor, after: Tensor) -> Tensor:
    return torch.cat([before.expand(len(value), *before.shape), value, after.expand(len(value), *after.shape)], 1)


def values(program: Program) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in program.tensors.items()}


def ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.long)


def test_a_prompt_stands_before_the_tokens() -> None:
    program = trained(rewriter.apply(small(), Prompt(virtual_tokens=4)).program, size=1.0)
    w = values(program)
    nothing = ones(0)
    x = around(w["table.weight"][IDS], w["prompt_embeddings.default"], torch.zeros(0, WIDTH, dtype=torch.float64))
    want = by_hand(w, x, around(MASK, ones(4), nothing), around(KINDS, 0 * ones(4), nothing))
    got = program(IDS, MASK, KINDS)
    assert got["scores"].shape == (3, 6, CLASSES)
    assert torch.allclose(got["scores"], want["scores"][:, 4:], rtol=0, atol=1e-12)
    for name in ("pooled", "mean"):
        assert torch.allclose(got[name], want[name], rtol=0, atol=1e-12)
    assert (got["scores"] - small()(IDS, MASK, KINDS)["scores"])[MASK.bool()].abs().max() > 0.1


def test_a_template_has_anchors_and_virtual_tokens_on_both_sides() -> None:
    pass_ = Prompt(template="2 a:17 1 a:4 a:5 input a:6 2", outputs="all")
    program = trained(rewriter.apply(small(), pass_).program, size=1.0)
    w = values(program)
    table, prompt = w["table.weight"], w["prompt_embeddings.default"]
    assert prompt.shape == (5, WIDTH)
    before = torch.stack([prompt[0], prompt[1], table[17], prompt[2], table[4], table[5]])
    after = torch.stack([table[6], prompt[3], prompt[4]])
    x = around(table[IDS], before, after)
    want = by_hand(w, x, around(MASK, ones(6), ones(3)), around(KINDS, 0 * ones(6), 0 * ones(3)))
    got = program(IDS, MASK, KINDS)
    assert all(torch.allclose(got[name], want[name], rtol=0, atol=1e-12) for name in want)
    only_tokens = rewriter.apply(small(), Prompt(template=pass_.template)).program.with_tensors(
        {"prompt_embeddings.default": prompt}
    )
    assert torch.equal(only_tokens(IDS, MASK, KINDS)["scores"], got["scores"][:, 6:-3])


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_an_encoder_makes_the_prompt(kind: Any) -> None:
    dropout = 0.5 if kind == "lstm" else 0.0
    pass_ = Prompt(virtual_tokens=4, encoder=kind, encoder_layers=3, encoder_hidden=7, encoder_dropout=dropout)
    program = trained(rewriter.apply(small(), pass_).program)
    w = values(program)

    def part(name: str) -> Tensor:
        return w[f"prompt_encoder.default.{name}"]

    x = part("embedding.weight")
    if kind == "lstm":
        for layer in range(3):
            x = torch.cat([direction(part, x, f"l{layer}", end) for end in ("", "_reverse")], 1)
    for index in (0, 2) if kind == "lstm" else (0, 2, 4):
        x = torch.relu(x) if index else x
        x = x @ part(f"mlp_head.{index}.weight").t() + part(f"mlp_head.{index}.bias")
    plain = rewriter.apply(small(), Prompt(virtual_tokens=4)).program.with_tensors({"prompt_embeddings.default": x})
    assert distance(outputs(program(IDS, MASK, KINDS)), outputs(plain(IDS, MASK, KINDS))) < 1e-12
    assert sum("encoder" in name for name in program.trainable) == len(program.trainable)
    if kind == "lstm":
        module = program.module().train()
        first, second = (module(IDS, MASK, KINDS)["scores"] for _ in range(2))
        assert not torch.equal(first, second)


def direction(part: Callable[[str], Tensor], x: Tensor, layer: str, end: str) -> Tensor:
    """One direction of one layer of an LSTM, gate by gate."""
    hidden = state = torch.zeros(7, dtype=x.dtype)
    result: dict[int, Tensor] = {}
    for index in range(len(x)) if not end else reversed(range(len(x))):
        gates = part(f"lstm_head.weight_ih_{layer}{end}") @ x[index] + part(f"lstm_head.bias_ih_{layer}{end}")
        gates = gates + part(f"lstm_head.weight_hh_{layer}{end}") @ hidden + part(f"lstm_head.bias_hh_{layer}{end}")
        enter, keep, new, leave = gates.chunk(4)
        state = torch.sigmoid(keep) * state + torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(leave) * torch.tanh(state)
        result[index] = hidden
    return torch.stack([result[index] for index in range(len(x))])


def test_where_a_prompt_starts() -> None:
    def start(**options: Any) -> Tensor:
        program = rewriter.apply(small(), Prompt(virtual_tokens=5, **options), check=False).program
        return program.tensor("prompt_embeddings.default").detach()

    table = small().tensor("table.weight").detach()
    assert torch.equal(start(init="text", init_tokens=(7, 4)), table[[7, 4, 7, 4, 7]])
    assert torch.equal(start(init="text", init_tokens=tuple(range(9))), table[:5])
    assert torch.allclose(start(init="mean", init_tokens=(7, 4)), ((table[7] + table[4]) / 2).expand(5, -1))
    assert all((row == table).all(1).any() for row in start(init="vocabulary"))
    assert torch.equal(start(seed=3), start(seed=3))
    assert not torch.equal(start(seed=3), start(seed=4))
    assert 1.0 < start(sigma=2.0).std() < 3.0
    ensemble = rewriter.apply(small(), Prompt(virtual_tokens=2, ensemble=3), check=False).program
    assert ensemble.tensor("prompt_embeddings.default").shape == (3, 2, WIDTH)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "opt", "whisper", "clip"])
def test_defaults_work_and_undo_leaves_no_difference(name: str) -> None:
    result = rewriter.apply(traced(name), Prompt(virtual_tokens=3)).program
    before = traced(name)
    assert [t.shape for t in run(result, name)] == [t.shape for t in run(before, name)]
    assert distance(run(result, name), run(before, name)) > 1e-3
    restored = rewriter.undo(result)
    assert rewriter.text(restored) == rewriter.text(before)
    assert all(torch.equal(a, b) for a, b in zip(run(restored, name), run(before, name), strict=True))
    sizes = [node.meta["val"].shape for node in result.inputs() if isinstance(node.meta["val"], Tensor)]
    assert sizes == [node.meta["val"].shape for node in before.inputs() if isinstance(node.meta["val"], Tensor)]


def test_what_a_prompt_adds(golden: Callable[[str, str], None]) -> None:
    cases = {
        "prompt": Prompt(virtual_tokens=4),
        "prompt_template": Prompt(template="2 a:17 input 1"),
        "prompt_lstm": Prompt(virtual_tokens=4, encoder="lstm", encoder_layers=1),
        "prompt_ensemble": Prompt(virtual_tokens=4, ensemble=3, vote="majority"),
    }
    model = rewriter.trace(randomise(Small()), (IDS, MASK, KINDS))
    for name, pass_ in cases.items():
        golden(f"{name}.diff", str(rewriter.diff(model, rewriter.apply(model, pass_).program)))


@pytest.mark.parametrize("encoder", ["none", "lstm"])
def test_save_and_load_and_other_sizes(encoder: Any, tmp_path: Path) -> None:
    program = trained(rewriter.apply(traced("gpt2"), Prompt(virtual_tokens=3, encoder=encoder)).program)
    program.save(tmp_path / "prompt.pt2")
    loaded = rewriter.load(tmp_path / "prompt.pt2")
    if encoder == "none":  # a file gives the LSTM's other results back as values, which nothing reads
        assert rewriter.text(loaded) == rewriter.text(program)
    for batch, length in ((2, 4), (5, 11)):
        ids = torch.randint(3, 37, (batch, length), generator=torch.Generator().manual_seed(length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        assert torch.equal(loaded(**inputs)["logits"], program(**inputs)["logits"])
        assert loaded(**inputs)["logits"].shape == (batch, length, 37)
    assert rewriter.text(rewriter.undo(loaded)) == rewriter.text(traced("gpt2"))


@pytest.mark.parametrize("options", [{}, {"encoder": "lstm"}, {"encoder": "mlp"}, {"ensemble": 2}])
def test_gradients_reach_the_prompt_only(options: dict[str, Any]) -> None:
    program = rewriter.apply(traced("llama"), Prompt(virtual_tokens=3, **options)).program
    module = program.module()
    args, kwargs = example("llama")
    module(*args, **kwargs)["logits"].square().mean().backward()
    reached = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name.replace("_", ".") for name in reached} == {name.replace("_", ".") for name in program.trainable}
    assert all("prompt" in name for name in program.trainable)


@pytest.mark.parametrize("targets", [("@attention.query",), ("embed_tokens",)])
def test_lora_and_prompt_in_both_orders(targets: tuple[str, ...]) -> None:
    lora, prompt = Lora(targets=targets, rank=4), Prompt(virtual_tokens=3)
    one = trained(rewriter.apply(traced("llama"), lora, prompt).program)
    two = rewriter.apply(traced("llama"), prompt, lora).program
    two = two.with_tensors({name: one.tensor(name) for step in two.steps for name in step.added})
    assert distance(run(one, "llama"), run(two, "llama")) < 1e-5
    for program in (one, two):
        plain = rewriter.undo(rewriter.undo(program))
        assert rewriter.text(plain) == rewriter.text(traced("llama"))


class Pads(nn.Module):
    """Everything a model may derive from its ids: positions and mask from padding, the last token, an end token."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(ROWS, WIDTH), nn.Embedding(40, WIDTH)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        visible = ids.ne(0)
        x = self.table(ids) + self.places(visible.long().cumsum(1) * visible)
        x = x + (x * visible[..., None]).cumsum(1)
        last = visible.long().cumsum(1).argmax(1)
        ends = ids.eq(1).long().sum(1, keepdim=True).to(x.dtype)
        return {"hidden": x, "last": x[torch.arange(len(ids)), last] + ends}


def test_virtual_tokens_are_no_padding_and_no_end() -> None:
    ids = torch.tensor([[5, 6, 7, 1, 0], [8, 9, 1, 0, 0], [4, 4, 4, 4, 1]])
    program = trained(rewriter.apply(rewriter.trace(randomise(Pads()), (ids,)), Prompt(virtual_tokens=3)).program)
    w = values(program)
    got = program(ids)
    for row, hidden, last in zip(ids, got["hidden"], got["last"], strict=True):
        real = row[row != 0]
        x = torch.cat([w["prompt_embeddings.default"], w["table.weight"][real]])
        x = x + w["places.weight"][1 : len(x) + 1]
        x = x + x.cumsum(0)
        assert torch.allclose(hidden[: len(real)], x[3:], atol=1e-5)
        assert torch.allclose(last, x[-1] + 1, atol=1e-5)


class Given(nn.Module):
    """Positions, labels and a mask that hides as inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(ROWS, WIDTH), nn.Embedding(40, WIDTH)

    def forward(self, ids: Tensor, places: Tensor, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids) + self.places(places)
        scores = (x @ x.transpose(1, 2)).masked_fill(hidden[:, None], float("-inf"))
        scores = scores.softmax(-1) @ x @ self.table.weight.t()
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()), scores


def test_positions_labels_and_a_mask_that_hides_are_inputs() -> None:
    ids = torch.randint(3, ROWS, (2, 5), generator=torch.Generator().manual_seed(2))
    places = torch.tensor([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]])
    hidden = torch.tensor([[False] * 5, [False, False, False, True, True]])
    module = randomise(Given())
    program = rewriter.trace(module, (ids, places, hidden, ids.flip(1)))
    program = trained(rewriter.apply(program, Prompt(template="2 input 1"), check=False).program)
    prompt = values(program)["prompt_embeddings.default"]
    loss, scores = program(ids, places, hidden, ids)
    x = around(module.table(ids), prompt[:2], prompt[2:]).detach()
    x = x + module.places(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 4, 5, 6, 7, 8, 9]])).detach()
    for row in range(2):
        seen = torch.cat([torch.zeros(2).bool(), hidden[row], torch.zeros(1).bool()])
        attention = (x[row] @ x[row].t()).masked_fill(seen, float("-inf")).softmax(-1)
        want = (attention @ x[row] @ module.table.weight.t()).detach()
        assert torch.allclose(scores[row], want[2:-1], atol=1e-5)
    assert torch.allclose(loss, nn.functional.cross_entropy(scores.flatten(0, 1), ids.flatten()), atol=1e-5)


def test_a_cache_is_filled_by_a_prompted_program_and_read_by_a_plain_one() -> None:
    module, _, kwargs = llama()
    ids, p = kwargs["input_ids"], 4
    asks = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True}
    first = rewriter.apply(rewriter.trace(module, (), asks), Prompt(virtual_tokens=p, sigma=1.0)).program
    alone = rewriter.apply(traced("llama"), Prompt(virtual_tokens=p, sigma=1.0)).program
    with torch.no_grad():
        past = module(input_ids=ids[:, :5], use_cache=True).past_key_values
    later = {"input_ids": ids, "attention_mask": torch.ones(3, 12, dtype=torch.long), "use_cache": True}
    later["past_key_values"] = past
    with pytest.raises(UsageError, match="takes the keys and values of earlier tokens"):
        rewriter.apply(rewriter.trace(module, (), later), Prompt())
    result = first(**asks)
    cache, tokens, answer = result["past_key_values"], ids, result["logits"]
    for _ in range(6):
        whole = alone(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)["logits"]
        assert torch.allclose(answer[:, -1], whole[:, -1], atol=1e-4)
        new = answer[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], 1)
        mask = torch.ones(3, tokens.shape[1] + p, dtype=torch.long)
        with torch.no_grad():
            answer = module(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True).logits


def test_refusals_name_what_is_missing() -> None:
    with pytest.raises(UsageError, match="no embedding that is looked up by token ids") as error:
        rewriter.apply(traced("vit"), Prompt())
    assert "pixel_values" in str(error.value)
    with pytest.raises(UsageError, match="leave no room"):
        rewriter.apply(small(), Prompt(virtual_tokens=ROOM))
    for name, room in (("gpt2", 43), ("bert", 43)):
        with pytest.raises(UsageError, match="leave no room"):
            rewriter.apply(traced(name), Prompt(virtual_tokens=room))
    fixed = rewriter.trace(randomise(Small()), (IDS, MASK, KINDS), dynamic_shapes=({0: torch.export.Dim.AUTO},) * 3)
    with pytest.raises(UsageError, match="length of ids is fixed at 6") as error:
        rewriter.apply(fixed, Prompt())
    assert "varying length" in str(error.value)
    with pytest.raises(UsageError, match="lengthened before"):
        rewriter.apply(traced("llama"), Prompt(), Prompt(adapter="second"))
    with pytest.raises(UsageError, match="has 31 rows"):
        rewriter.apply(traced("llama"), Prompt(template="1 a:31 input"))
    with pytest.raises(UsageError, match="has 31 rows"):
        rewriter.apply(traced("llama"), Prompt(init="text", init_tokens=(40,)))
    with pytest.raises(UsageError, match="no input of token ids"):
        rewriter.apply(traced("t5"), Prompt(input="attention_mask"))


def test_the_decoder_can_have_the_prompt() -> None:
    program = rewriter.apply(traced("t5"), Prompt(virtual_tokens=3, input="decoder_input_ids", outputs="all")).program
    assert [tuple(t.shape) for t in run(program, "t5")] == [(3, 8, 37), (3, 7, 24)]


@pytest.mark.parametrize(
    "options",
    [
        {"virtual_tokens": 0},
        {"virtual_tokens": True},
        {"virtual_tokens": 3, "template": "4 input"},
        {"ensemble": 0},
        {"encoder": "gru"},
        {"encoder": "lstm", "init": "vocabulary"},
        {"encoder": "mlp", "encoder_dropout": 0.1},
        {"encoder": "lstm", "encoder_dropout": 1},
        {"encoder_hidden": -1},
        {"init": "text"},
        {"init_tokens": (3,)},
        {"init": "mean", "init_tokens": "abc"},
        {"init": "mean", "init_tokens": (-1,)},
        {"sigma": -1},
        {"sigma": float("nan")},
        {"seed": 1.5},
        {"adapter": "a.b"},
        {"outputs": "none"},
        {"vote": "max"},
        {"template": "3"},
        {"template": "input input 3"},
        {"template": "a:3 input"},
        {"template": "3 word input"},
        {"template": 3},
        {"input": 3},
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Prompt(**options)


def test_a_template_is_read_from_left_to_right() -> None:
    layout = parse_template("2 a:17 1 input 3 a:4")
    assert layout.before == (None, None, 17, None)
    assert layout.after == (None, None, None, 4)
    assert layout.given == 6
