"""Where adapters stand: sublayers found by data flow, in models of every kind and in blocks written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rewriter
from passes import Adapter
from rewriter import verify
from rewriter.errors import UsageError
from rewriter.program import Program
from rewriter.transform import Result
from tests.models import TINY, randomise, traced
from tests.oracle import distance, example, run, traced_double, trained

ENDS = {
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "phi3": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "mixtral": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.experts.down_proj"),
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "opt": ("model.decoder.layers.{}.self_attn.out_proj", "model.decoder.layers.{}.fc2"),
    "bert": ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"),
    "vit": ("vit.layers.{}.attention.o_proj", "vit.layers.{}.mlp.fc2"),
    "t5": (
        "encoder.block.{}.layer.0.SelfAttention.o",
        "encoder.block.{}.layer.1.DenseReluDense.wo",
        "decoder.block.{}.layer.0.SelfAttention.o",
        "decoder.block.{}.layer.1.EncDecAttention.o",
        "decoder.block.{}.layer.2.DenseReluDense.wo",
    ),
    "whisper": (
        "model.encoder.layers.{}.self_attn.out_proj",
        "model.encoder.layers.{}.fc2",
        "model.decoder.layers.{}.self_attn.out_proj",
        "model.decoder.layers.{}.encoder_attn.out_proj",
        "model.decoder.layers.{}.fc2",
    ),
    "clip": (
        "text_model.encoder.layers.{}.self_attn.out_proj",
        "text_model.encoder.layers.{}.mlp.fc2",
        "vision_model.encoder.layers.{}.self_attn.out_proj",
        "vision_model.encoder.layers.{}.mlp.fc2",
    ),
}


def applied(base: Program, pass_: Adapter) -> Result:
    """Without the law's check, which takes time: what is tested here is stronger."""
    return rewriter.apply(base, pass_, check=False)


FORMS: dict[str, dict[str, Any]] = {
    "series": {},
    "parallel": {"form": "parallel"},
    "parallel of the carried value": {"form": "parallel", "pre_norm": False},
    "around the norm": {"original_norm": "both"},
    "behind the norm": {"original_norm": "before"},
}


def paths(name: str, **options: Any) -> set[str]:
    return {site.path for site in Adapter(**options).find(traced(name))}


def is_attention(path: str) -> bool:
    return "attn" in path or "ttention" in path


@pytest.mark.parametrize("name", ENDS)
def test_sublayers_end_at_their_output_projections(name: str) -> None:
    expected = {end.format(layer) for end in ENDS[name] for layer in (0, 1)}
    assert paths(name) == expected
    assert paths(name, placement="attention") == {path for path in expected if is_attention(path)}
    assert paths(name, placement="pfeiffer") == {path for path in expected if not is_attention(path)}
    crossing = {path for path in expected if "EncDec" in path or "encoder_attn" in path}
    assert paths(name, cross_attention=False) == expected - crossing
    assert paths(name, layers=(1,)) == {
        path for path in expected if ".1." in path.replace(".layer.1", "", "t5" in name)
    }


EVERYWHERE = [(name, form) for name in ENDS for form in ("series", "parallel")]
AROUND = [(name, form) for name in ("gpt2", "bert", "t5") for form in FORMS if form not in ("series", "parallel")]


@pytest.mark.parametrize(("name", "form"), EVERYWHERE + AROUND)
def test_outputs_keep_every_bit_and_undo_leaves_no_difference(name: str, form: str) -> None:
    base = traced(name)
    result = applied(base, Adapter(bottleneck=3, dropout=0.2, **FORMS[form]))
    assert len(result.sites) == 2 * len(ENDS[name])
    assert all(torch.equal(a, b) for a, b in zip(run(base, name), run(result.program, name), strict=True))
    assert rewriter.text(rewriter.undo(result.program)) == rewriter.text(base)


# -- against the model with the formula hooked in -----------------------------------------------------------------


def formula(program: Program, path: str, z: Tensor, *, scale: float = 1.0) -> Tensor:
    """`scale · W_up relu(W_down z)`, one output after the other."""
    path = f"{path}_adapter" if path in program.tensors else path
    down, down_bias, up, up_bias = (
        program.tensor(f"{path}.adapter.default.{name}").detach()
        for name in ("down.weight", "down.bias", "up.weight", "up.bias")
    )
    low = torch.stack([(z * row).sum(-1) + bias for row, bias in zip(down, down_bias, strict=True)], -1).clamp(min=0)
    return scale * torch.stack([(low * row).sum(-1) + bias for row, bias in zip(up, up_bias, strict=True)], -1)


def hooked(name: str, change: Callable[[nn.Module], None]) -> list[Tensor]:
    """The outputs of the original model in fp64 after `change` put hooks on its modules."""
    module = TINY[name]()[0].double()
    if name == "mixtral":
        module.set_experts_implementation("eager")  # torch's grouped product does not take fp64
    args, kwargs = example(name, double=True)
    change(module)
    with torch.no_grad():
        return verify.outputs(module(*args, **kwargs))


@pytest.mark.parametrize("name", ENDS)
def test_series_adapters_read_what_the_output_projections_give(name: str) -> None:
    base = traced_double(name)
    result = applied(base, Adapter(bottleneck=3, scale=1.5))
    program = trained(result.program)

    def change(module: nn.Module) -> None:
        for site in result.sites:
            owner = module.get_submodule(site.path.removesuffix(".experts.down_proj"))
            owner.register_forward_hook(lambda _, __, h, path=site.path: h + formula(program, path, h, scale=1.5))

    found = run(program, name)
    assert distance(found, hooked(name, change)) < 1e-10
    assert distance(found, run(base, name)) > 1e-2


INPUTS = {  # the module whose output the sublayer's first layers read, for every output projection
    "llama": {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
    "mixtral": {"self_attn.o_proj": "input_layernorm", "mlp.experts.down_proj": "post_attention_layernorm"},
    "gpt2": {"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"},
    "opt": {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},
    "vit": {"attention.o_proj": "layernorm_before", "mlp.fc2": "layernorm_after"},
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("pre_norm", [True, False])
def test_parallel_adapters_read_what_the_sublayer_reads(name: str, pre_norm: bool) -> None:
    base = traced_double(name)
    result = applied(base, Adapter(form="parallel", bottleneck=3, pre_norm=pre_norm))
    program = trained(result.program)

    def change(module: nn.Module) -> None:
        for site in result.sites:
            tail = next(tail for tail in INPUTS[name] if site.path.endswith(tail))
            norm = module.get_submodule(site.path.removesuffix(tail) + INPUTS[name][tail])
            owner = module.get_submodule(site.path.removesuffix(".experts.down_proj"))
            seen: dict[str, Tensor] = {}
            norm.register_forward_hook(lambda _, given, out, seen=seen: seen.update(z=out if pre_norm else given[0]))
            owner.register_forward_hook(
                lambda _, __, h, seen=seen, path=site.path: h + formula(program, path, seen["z"]).reshape(h.shape)
            )

    found = run(program, name)
    assert distance(found, hooked(name, change)) < 1e-10
    assert distance(found, run(base, name)) > 1e-2


# -- blocks written by hand ---------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (each.unflatten(-1, (4, 6)).transpose(1, 2) for each in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(6)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(24, 52), nn.GELU(), nn.Linear(52, 24))


class Block(nn.Module):
    """A block of any shape; `after` is applied to what each sublayer gives, before it is added."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attention, self.mlp = SelfAttention(), FeedForward()
        self.one, self.two = nn.LayerNorm(24), nn.LayerNorm(24)
        self.gain = nn.Parameter(torch.ones(24))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "pre-norm":
                x = x + self.dropout(self.attention(self.one(x)))
                return x + self.dropout(self.mlp(self.two(x)))
            case "post-norm":
                x = self.one(self.dropout(self.attention(x)) + x)
                return self.two(self.dropout(self.mlp(x)) + x)
            case "norm in the branch":
                x = x + self.one(self.attention(x))
                return x + self.two(self.mlp(x))
            case "gain in the branch":
                x = x + self.gain * self.attention(self.one(x))
                return x + self.gain * self.mlp(self.two(x))
            case "side by side":
                return self.dropout(self.attention(self.one(x))) + self.dropout(self.mlp(self.one(x))) + x
            case "one after the other":
                return (x + self.attention(self.one(x))) + self.mlp(self.one(x))
        raise AssertionError(self.kind)


class Blocks(nn.Module):
    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.norm, self.head = blocks, nn.LayerNorm(24), nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)))


KINDS = ("pre-norm", "post-norm", "norm in the branch", "gain in the branch", "side by side", "one after the other")
X = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def blocks(kind: str) -> nn.Module:
    return randomise(Blocks(nn.Sequential(Block(kind), Block(kind)))).double()


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_written_by_hand(kind: str) -> None:
    module = blocks(kind)
    base = rewriter.trace(module, (X,))
    result = applied(base, Adapter(bottleneck=3))
    program = trained(result.program)
    expected = [f"blocks.{i}.{end}" for i in (0, 1) for end in ("attention.proj", "mlp.2")]
    assert [site.path for site in result.sites] == expected
    for path in expected:
        module.get_submodule(path).register_forward_hook(lambda _, __, h, path=path: h + formula(program, path, h))
    assert distance([program(X)], [module(X).detach()]) < 1e-10
    assert distance([program(X)], [base(X)]) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_parallel_adapter_in_a_block_written_by_hand(kind: str) -> None:
    module = blocks(kind)
    base = rewriter.trace(module, (X,))
    program = trained(applied(base, Adapter(form="parallel", bottleneck=3)).program)
    for block in (0, 1):
        for end in ("attention", "mlp"):
            path = f"blocks.{block}.{'attention.proj' if end == 'attention' else 'mlp.2'}"
            owner = module.get_submodule(f"blocks.{block}.{end}")
            owner.register_forward_hook(lambda _, given, h, path=path: h + formula(program, path, given[0]))
    assert distance([program(X)], [module(X).detach()]) < 1e-10
    assert distance([program(X)], [base(X)]) > 1e-2


def test_a_norm_at_the_end_of_a_pre_norm_model_is_none_of_its_blocks() -> None:
    """Around the block: of a post-norm model with its norm, of a pre-norm model the sum alone."""
    module = blocks("pre-norm")
    base = rewriter.trace(module, (X,))
    adapter = Adapter(bottleneck=3, original_norm="both", placement="pfeiffer", layers=(1,))
    program = trained(applied(base, adapter).program)
    block = module.get_submodule("blocks.1")
    middle = module.get_submodule("blocks.0")(X)
    middle = middle + block.attention(block.one(middle))
    h = block.mlp(block.two(middle))
    expected = module.head(module.norm(middle + h + formula(program, "blocks.1.mlp.2", middle + h)))
    assert distance([program(X)], [expected.detach()]) < 1e-10


def test_adapters_around_and_behind_the_norm_of_a_block() -> None:
    module = blocks("post-norm")
    base = rewriter.trace(module, (X,))
    for kind in ("both", "before"):
        adapter = Adapter(bottleneck=3, original_norm=kind, placement="pfeiffer")  # type: ignore[arg-type]
        program = trained(applied(base, adapter).program)
        x = X
        for index in (0, 1):
            block, path = module.get_submodule(f"blocks.{index}"), f"blocks.{index}.mlp.2"
            x = block.one(block.attention(x) + x)
            h = block.mlp(x)
            u = block.two(h + x)
            x = u + formula(program, path, u) if kind == "before" else block.two(h + formula(program, path, u) + x)
        assert distance([program(X)], [module.head(module.norm(x)).detach()]) < 1e-10
        assert distance([program(X)], [base(X)]) > 1e-2


def test_side_by_side_sublayers_have_no_block_of_their_own() -> None:
    base = rewriter.trace(blocks("side by side"), (X,))
    with pytest.raises(UsageError, match="no sublayer can take") as error:
        applied(base, Adapter(original_norm="both"))
    assert "adds another sublayer too" in str(error.value)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_torchs_own_encoder_layer(norm_first: bool, form: str) -> None:
    layer = nn.TransformerEncoderLayer(24, 4, 52, dropout=0.1, batch_first=True, norm_first=norm_first)
    module = randomise(Blocks(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))).double()
    base = rewriter.trace(module, (X,))
    result = applied(base, Adapter(bottleneck=3, **FORMS[form]))
    ends = [f"blocks.layers.{i}.{end}" for i in (0, 1) for end in ("self_attn.out_proj", "linear2")]
    assert [site.path for site in result.sites] == ends
    assert torch.equal(result.program(X), base(X))
    assert distance([trained(result.program)(X)], [base(X)]) > 1e-2


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block("pre-norm")

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


@pytest.mark.parametrize("form", ["series", "parallel"])
def test_a_block_called_twice_has_one_adapter(form: Any) -> None:
    module = randomise(Shared()).double()
    base = rewriter.trace(module, (X,))
    result = applied(base, Adapter(form=form, bottleneck=3))
    assert [(site.path, len(site.places)) for site in result.sites] == [("block.attention.proj", 2), ("block.mlp.2", 2)]
    assert result.applied[0].added == 2 * (3 * 24 + 3 + 24 * 3 + 24)
    assert result.applied[0].notes["block.mlp.2"]["added_flops_per_token"] == 2 * 2 * 3 * (24 + 24)
    program = trained(result.program)
    for end, name in (("attention", "attention.proj"), ("mlp", "mlp.2")):
        module.get_submodule(f"block.{end}").register_forward_hook(
            lambda _, given, h, path=f"block.{name}": h + formula(program, path, h if form == "series" else given[0])
        )
    assert distance([program(X)], [module(X).detach()]) < 1e-10


def test_a_mask_that_is_added_to_scores_is_no_residual() -> None:
    """From the second layer on, scores are computed from the mask too."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.ModuleList(nn.Linear(24, 24) for _ in range(2)) for _ in range(4))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for q, k, v, o in zip(self.q, self.k, self.v, self.o, strict=True):
                weights = functional.softmax(q(x) @ k(x).transpose(1, 2) + mask, dim=-1)
                x = x + o(weights @ v(x))
            return x

    module = randomise(Masked()).double()
    base = rewriter.trace(module, (X, torch.zeros(3, 5, 5, dtype=torch.float64)))
    sites = Adapter(bottleneck=3).find(base)
    assert [site.path for site in sites] == ["o.0", "o.1"]
    assert sites.missed == ()


class Mixer(nn.Module):
    """Mixes positions: the output projection's width is not the last dimension of what is added."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.channels = nn.Linear(5, 5), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(x.transpose(1, 2)).transpose(1, 2)
        return x + self.channels(x)


def test_an_adapter_has_the_width_of_its_projection() -> None:
    base = rewriter.trace(randomise(Mixer()).double(), (X,), dynamic_shapes=None)
    program = trained(applied(base, Adapter(bottleneck=3)).program)
    assert program.tensor("positions.adapter.default.down.weight").shape == (3, 5)
    module = randomise(Mixer()).double()
    for path in ("positions", "channels"):
        module.get_submodule(path).register_forward_hook(lambda _, __, h, path=path: h + formula(program, path, h))
    assert distance([program(X)], [module(X).detach()]) < 1e-10


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x)))


def test_a_block_of_convolutions_is_refused_with_the_reason() -> None:
    base = rewriter.trace(Residual(), (torch.randn(2, 6, 9, 8),))
    with pytest.raises(UsageError, match="no sublayer with a residual addition") as error:
        applied(base, Adapter())
    assert "two: it ends in a convolution" in str(error.value)
    assert "form=layer" in error.value.fix
