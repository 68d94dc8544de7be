"""Prefix tuning by hand: what attention with a prefix is, in fp64, for every way of writing it; and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes import Lora, Prefix
from rewriter.errors import RewriteError, UsageError
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from rewriter.trace import trace
from rewriter.transform import Pass
from tests.models import randomise, traced
from tests.oracle import distance, operations, run, traced_double, trained

P, B, T, H, G, K = 3, 2, 5, 4, 2, 6
D = 13
Golden = Callable[[str, str], None]
Style = Callable[["Attention", Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Attention with its own projections; `style` is how it is written, [b, heads, t, k] and a mask of 0 and 1 in."""

    def __init__(self, style: Style, groups: int = H) -> None:
        super().__init__()
        self.q = nn.Linear(D, H * K)
        self.k, self.v = nn.Linear(D, groups * K), nn.Linear(D, groups * K)
        self.o = nn.Linear(H * K, D)
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25, 0.125, 0.0625]))
        self.groups, self.style = groups, style

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, H, K).transpose(1, 2)
        k = self.k(x).view(b, t, self.groups, K).transpose(1, 2)
        v = self.v(x).view(b, t, self.groups, K).transpose(1, 2)
        mixed = self.style(self, q, k, v, mask)
        return self.o(mixed.transpose(1, 2).reshape(b, t, H * K))


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, **options)


def softmax(q: Tensor, k: Tensor, v: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(q @ k.transpose(-1, -2) / math.sqrt(K)).softmax(-1) @ v


def causal(t: int) -> Tensor:
    return torch.arange(t)[:, None] >= torch.arange(t)[None]


def einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(K) + (1.0 - mask[:, None, None]) * -1e9
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def merged(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, h, t, d = q.shape
    q, k, v = (each.reshape(b * h, t, d) for each in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(K)
    return torch.bmm(scores.softmax(-1), v).view(b, h, t, d)


def window(t: int) -> Tensor:
    return causal(t) & (torch.arange(t)[:, None] - torch.arange(t)[None] < 4)


def relative(t: int) -> Tensor:
    return torch.arange(t)[None] - torch.arange(t)[:, None]


STYLES: dict[str, tuple[Style, int]] = {
    "sdpa": (lambda m, q, k, v, mask: sdpa(q, k, v), H),
    "sdpa_bool": (lambda m, q, k, v, mask: sdpa(q, k, v, attn_mask=mask[:, None, None].bool()), H),
    "sdpa_float": (lambda m, q, k, v, mask: sdpa(q, k, v, attn_mask=(1.0 - mask[:, None, None]) * -1e9), H),
    "sdpa_where": (
        lambda m, q, k, v, mask: sdpa(q, k, v, attn_mask=torch.where(mask[:, None, None].bool(), 0.0, -math.inf)),
        H,
    ),
    "sdpa_causal": (lambda m, q, k, v, mask: sdpa(q, k, v, is_causal=True), H),
    "sdpa_grouped": (
        lambda m, q, k, v, mask: sdpa(q, k, v, attn_mask=mask[:, None, None].bool(), enable_gqa=True),
        G,
    ),
    "repeated": (
        lambda m, q, k, v, mask: sdpa(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True),
        G,
    ),
    "softmax": (lambda m, q, k, v, mask: softmax(q, k, v, lambda s: s), H),
    "masked_fill": (
        lambda m, q, k, v, mask: softmax(q, k, v, lambda s: s.masked_fill(mask[:, None, None] == 0, -math.inf)),
        H,
    ),
    "where": (
        lambda m, q, k, v, mask: softmax(
            q, k, v, lambda s: torch.where(causal(length_of(s)), s, torch.full_like(s, -1e9))
        ),
        H,
    ),
    "future": (
        lambda m, q, k, v, mask: softmax(
            q,
            k,
            v,
            lambda s: s.masked_fill(torch.arange(length_of(s))[None] > torch.arange(length_of(s))[:, None], -math.inf),
        ),
        H,
    ),
    "capped": (
        lambda m, q, k, v, mask: softmax(
            q, k, v, lambda s: torch.tanh(s / 2.0) * 2.0 + (1.0 - mask[:, None, None]) * -1e9
        ),
        H,
    ),
    "einsum": (lambda m, q, k, v, mask: einsum(q, k, v, mask), H),
    "merged": (lambda m, q, k, v, mask: merged(q, k, v, mask), H),
    "window": (lambda m, q, k, v, mask: sdpa(q, k, v, attn_mask=window(length_of(q))[None, None]), H),
    "alibi": (
        lambda m, q, k, v, mask: softmax(
            q, k, v, lambda s: s + m.slopes[:, None, None] * relative(length_of(s)).to(s.dtype)
        ),
        H,
    ),
}


def length_of(scores: Tensor) -> int:
    return scores.shape[2]


def inputs(length: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(B, length, dtype=torch.float64)
    mask[1, -2:] = 0
    return torch.randn(B, length, D, generator=generator, dtype=torch.float64), mask


def by_hand(name: str, module: Attention, prefix: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Attention over a prefix and tokens, key by key, with the masks and biases of a style written out again."""
    b, t, _ = x.shape
    groups = module.groups
    rows = prefix.reshape(P, 2, groups, K)
    q, k, v = (layer(x).reshape(b, t, -1, K) for layer in (module.q, module.k, module.v))
    result = torch.zeros(b, t, H * K, dtype=torch.float64)
    for n in range(b):
        for head in range(H):
            group = head * groups // H
            keys = torch.cat([rows[:, 0, group], k[n, :, group]])
            values = torch.cat([rows[:, 1, group], v[n, :, group]])
            for i in range(t):
                scores = keys @ q[n, i, head] / math.sqrt(K)
                if name == "capped":
                    scores = torch.tanh(scores / 2) * 2
                place = torch.arange(-P, t)
                if name == "alibi":
                    scores = scores + module.slopes[head] * (place - i)
                seen = torch.ones(P + t, dtype=torch.bool)
                if name in ("sdpa_causal", "repeated", "where", "future", "window"):
                    seen &= place <= i
                if name == "window":
                    seen &= i - place < 4
                if name in ("sdpa_bool", "sdpa_float", "sdpa_where", "sdpa_grouped", "masked_fill", "capped", "einsum"):
                    seen[P:] &= mask[n].bool()
                weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
                result[n, i, head * K : (head + 1) * K] = weights @ values
    return module.o(result)


@pytest.mark.parametrize("name", STYLES)
def test_equals_attention_by_hand(name: str) -> None:
    style, groups = STYLES[name]
    module = randomise(Attention(style, groups)).double()
    program = trace(module, inputs())
    adapted = trained(rewriter.apply(program, Prefix(virtual_tokens=P)).program, size=0.7)
    prefix = adapted.tensor("prompt_embeddings.default").detach()
    assert prefix.shape == (P, 2 * groups * K)
    for length in (T, 8):
        x, mask = inputs(length)
        with torch.no_grad():
            want = by_hand(name, module, prefix, x, mask)
        assert float((adapted(x, mask) - want).abs().max()) < 1e-12
        assert float((program(x, mask) - want).abs().max()) > 1e-2


def test_projection_by_hand() -> None:
    module = randomise(Attention(*STYLES["sdpa"])).double()
    program = trace(module, inputs())
    pass_ = Prefix(virtual_tokens=P, projection=True, hidden=7)
    adapted = trained(rewriter.apply(program, pass_).program, size=0.7)
    tensors = {
        name.removeprefix("prompt_encoder.default."): adapted.tensor(name).detach() for name in adapted.trainable
    }
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "embedding.weight": (P, H * K),
        "transform.0.weight": (7, H * K),
        "transform.0.bias": (7,),
        "transform.2.weight": (2 * H * K, 7),
        "transform.2.bias": (2 * H * K,),
    }
    inner = torch.tanh(tensors["embedding.weight"] @ tensors["transform.0.weight"].T + tensors["transform.0.bias"])
    prefix = inner @ tensors["transform.2.weight"].T + tensors["transform.2.bias"]
    x, mask = inputs()
    with torch.no_grad():
        assert float((adapted(x, mask) - by_hand("sdpa", module, prefix, x, mask)).abs().max()) < 1e-12


# -- what it adds -------------------------------------------------------------------------------------------------


CASES: dict[str, tuple[str, Pass]] = {
    "prefix_gpt2": ("gpt2", Prefix(virtual_tokens=4, layers=(1,))),
    "prefix_llama": ("llama", Prefix(virtual_tokens=4, layers=(1,))),
    "prefix_projection": ("vit", Prefix(virtual_tokens=4, layers=(0,), projection=True, hidden=9)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_prefix_adds(case: str, golden: Golden) -> None:
    name, pass_ = CASES[case]
    golden(f"{case}.diff", str(rewriter.diff(traced(name), rewriter.apply(traced(name), pass_).program)))


@pytest.mark.parametrize("case", CASES)
def test_undo_leaves_no_difference(case: str) -> None:
    name, pass_ = CASES[case]
    after = rewriter.undo(rewriter.apply(traced(name), pass_).program)
    assert not rewriter.diff(traced(name), after)
    assert distance(run(traced(name), name), run(after, name)) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "opt", "whisper", "clip"])
def test_defaults_work(name: str) -> None:
    result = rewriter.apply(traced(name), Prefix())
    assert result.applied[0].trainable == result.program.tensor("prompt_embeddings.default").numel()


def test_keep_and_shift_differ_by_positions_only() -> None:
    shifted, kept = (
        trained(rewriter.apply(traced_double("gpt2"), Prefix(virtual_tokens=P, positions=how)).program)
        for how in ("shift", "keep")
    )
    assert distance(run(shifted, "gpt2"), run(kept, "gpt2")) > 1e-3
    name = "transformer.wpe.weight"
    moved = shifted.tensor(name).roll(P, 0)
    assert distance(run(shifted.with_tensors({name: moved}), "gpt2"), run(kept, "gpt2")) < 1e-12


def test_the_start_does_not_depend_on_other_options() -> None:
    one, other = (
        rewriter.apply(traced("llama"), Prefix(projection=True, hidden=hidden), check=False).program
        for hidden in (5, 9)
    )
    name = "prompt_encoder.default.embedding.weight"
    assert torch.equal(one.tensor(name), other.tensor(name))
    again = rewriter.apply(traced("llama"), Prefix(projection=True, hidden=5, seed=1), check=False).program
    assert not torch.equal(one.tensor(name), again.tensor(name))


@pytest.mark.parametrize("projection", [False, True])
def test_gradients_reach_the_prefix_only(projection: bool) -> None:
    program = rewriter.apply(traced("bert"), Prefix(virtual_tokens=P, projection=projection, sigma=0.5)).program
    module = program.module()
    ids = torch.tensor([[5, 7, 9, 4], [8, 3, 6, 5]])
    out = module(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
    out[0].square().sum().backward()
    reached = {name for name, each in module.named_parameters() if each.grad is not None and bool(each.grad.any())}
    assert reached == set(program.trainable)


# -- with others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_two_prefixes_stack(name: str) -> None:
    """[P2; P1; K] is one prefix of both lengths."""
    first, second = Prefix(virtual_tokens=P, submodules=1), Prefix(virtual_tokens=2, adapter="other", submodules=1)
    both = trained(rewriter.apply(traced_double(name), first, second).program, size=0.6)
    whole = rewriter.apply(traced_double(name), Prefix(virtual_tokens=P + 2, submodules=1)).program
    rows = torch.cat([both.tensor("prompt_embeddings.other"), both.tensor("prompt_embeddings.default")])
    assert distance(run(both, name), run(whole.with_tensors({"prompt_embeddings.default": rows}), name)) < 1e-12


@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_and_prefix_compose(lora_first: bool) -> None:
    passes: list[Pass] = [Lora(rank=4), Prefix(virtual_tokens=P)]
    program = trained(rewriter.apply(traced_double("llama"), *(passes if lora_first else passes[::-1])).program)
    other = rewriter.apply(traced_double("llama"), *(passes[::-1] if lora_first else passes)).program
    values = {name: program.tensor(name) for name in program.trainable}
    assert set(other.trainable) == set(values)
    assert distance(run(program, "llama"), run(other.with_tensors(values), "llama")) < 1e-12


def test_a_name_is_given_once() -> None:
    once = rewriter.apply(traced("gpt2"), Prefix(virtual_tokens=P)).program
    with pytest.raises(UsageError, match="already has a parameter"):
        rewriter.apply(once, Prefix(virtual_tokens=P))


def test_roles_of_an_encoder_and_decoder() -> None:
    def paths(*roles: str, **options: Any) -> list[str]:
        return [site.path for site in Prefix(attention=roles, **options).find(traced("t5")) if hasattr(site, "place")]

    own = [f"decoder.block.{i}.layer.0.SelfAttention" for i in range(2)]
    crossing = [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(2)]
    encoder = [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)]
    assert paths() == paths("decoder") == own
    assert paths("encoder") == encoder
    assert paths("self") == [*encoder, *own]
    assert sorted(paths("cross", "decoder")) == sorted([*crossing, *own])
    assert paths("encoder", "cross", layers=(1,)) == [encoder[1], crossing[1]]


def test_a_prefix_for_cross_attention_moves_what_the_decoder_reads() -> None:
    program = traced_double("whisper")
    adapted = trained(rewriter.apply(program, Prefix(virtual_tokens=P, attention=("cross", "encoder"))).program)
    assert adapted.tensor("prompt_embeddings.default").shape == (P, 4 * 2 * 4 * 6)
    assert distance(run(program, "whisper"), run(adapted, "whisper")) > 1e-3


# -- files ------------------------------------------------------------------------------------------------------------


def adapted(name: str) -> Program:
    return trained(rewriter.apply(traced(name), Prefix(virtual_tokens=P)).program)


def test_saved_and_loaded(tmp_path: Path) -> None:
    program = adapted("gpt2")
    back = rewriter.load(program.save(tmp_path / "prefix.pt2"))
    assert not rewriter.diff(program, back)
    assert distance(run(program, "gpt2"), run(back, "gpt2")) == 0
    assert not rewriter.diff(traced("gpt2"), rewriter.undo(back))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_onnx_equals_torch_at_two_lengths_with_padding(name: str, tmp_path: Path) -> None:
    report = export_onnx(adapted(name), tmp_path / "prefix.onnx")
    assert len({str(trial.shapes) for trial in report.errors}) == 2
    assert report.max_abs_error < 1e-4


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"virtual_tokens": 0}, "virtual_tokens is 0"),
        ({"virtual_tokens": True}, "virtual_tokens is True"),
        ({"virtual_tokens": "3"}, "virtual_tokens is '3'"),
        ({"hidden": 4}, "projection is off"),
        ({"hidden": 0, "projection": True}, "hidden is 0"),
        ({"projection": 1}, "projection is 1"),
        ({"positions": "stay"}, "positions is 'stay'"),
        ({"attention": ("middle",)}, "attention is"),
        ({"attention": "cross"}, "attention is 'cross'"),
        ({"layers": (-1,)}, "layers is"),
        ({"init": "ones"}, "init is 'ones'"),
        ({"submodules": 3}, "submodules is 3"),
        ({"deep": True, "layers": (0,)}, "layers means nothing to deep prompts"),
        ({"sigma": math.inf}, "sigma is inf"),
        ({"adapter": "a.b"}, "adapter is 'a.b'"),
        ({"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Prefix(**options)


@pytest.mark.parametrize(
    ("name", "pass_", "message"),
    [
        ("mlp", Prefix(), "no attention"),
        ("conv", Prefix(), "no attention"),
        ("gpt2", Prefix(virtual_tokens=43), "do not fit"),
        ("opt", Prefix(virtual_tokens=43), "row 2 is that of the first token"),
        ("bert", Prefix(virtual_tokens=43), "do not fit"),
        ("gpt2", Prefix(attention=("cross",)), "no attention of the kind cross"),
        ("gpt2", Prefix(layers=(0, 2)), "layers names 2, the attentions of the model are numbered 0 to 1"),
        ("vit", Prefix(positions="shift"), "no positions that could be shifted"),
        ("t5", Prefix(positions="shift"), "no positions that could be shifted"),
    ],
)
def test_what_the_model_lacks_is_named(name: str, pass_: Prefix, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rewriter.apply(traced(name), pass_)


def test_room_is_counted_to_the_last_row() -> None:
    program = rewriter.apply(traced("gpt2"), Prefix(virtual_tokens=42), check=False).program
    ids = torch.tensor([[5], [7]])
    assert program(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0].isfinite().all()


def test_a_bias_by_position_that_cannot_be_extended_is_refused() -> None:
    def style(m: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        bias = torch.outer(m.slopes, torch.arange(length_of(q)).to(q.dtype))
        return softmax(q, k, v, lambda s: s + bias[:, None])

    program = trace(randomise(Attention(style)).double(), inputs())
    with pytest.raises(RewriteError, match="ALiBi"):
        rewriter.apply(program, Prefix(virtual_tokens=P))


def test_only_operations_that_export() -> None:
    before, after = operations(traced("gpt2")), operations(rewriter.apply(traced("gpt2"), Prefix()).program)
    added = {operation for operation in after if operation not in before}
    assert added <= {f"aten.{name}" for name in ("cat.default", "new_full.default", "permute.default")}
