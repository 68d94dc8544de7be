"""Checkpoints of the real loralib: the same numbers as its own layers, merged, undone, and handed on to PEFT."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from passes import LoralibAdapter, Merge
from passes.peft_write import write_adapter
from rewriter import verify
from rewriter.errors import LawError, RewriteError, RewriteWarning, UnsafeError, UsageError
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from rewriter.text import text
from tests.cli.conftest import Run, run  # noqa: F401 - `run` is a fixture
from tests.models import TINY, Example, Perceptron, randomise, traced

ALPHA = 5
Layer = Callable[[nn.Module], nn.Module]


# -- models, with and without loralib's layers --------------------------------------------------------------------


class Attention(nn.Module):
    """A causal self-attention with one fused projection stored [o, i], as GPT-2's but for the orientation."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(19, 12)
        self.qkv = nn.Linear(12, 36)
        self.out = nn.Linear(12, 12, bias=False)
        self.head = nn.Linear(12, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, 3, 4).transpose(1, 2) for t in self.qkv(x).split(width, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(mixed.transpose(1, 2).reshape(batch, length, width)))


class Images(nn.Module):
    """Square kernels of two sizes, a stride, a signal with kernel 1, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = nn.Conv2d(8, 6, 2, bias=False)
        self.signal = nn.Conv1d(6, 10, 1)
        self.grouped = nn.Conv1d(10, 4, 1, groups=2)
        self.classes = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        x = self.signal(torch.relu(self.body(torch.relu(self.stem(image)))).flatten(2))
        return self.head(self.grouped(x).mean(-1) + self.classes(label))


def _attention() -> Example:
    ids = torch.randint(0, 19, (3, 5), generator=torch.Generator().manual_seed(1))
    model = Attention()
    randomise(model)
    with torch.no_grad():
        model.words.weight.mul_(5)  # so that attention attends to something
    return model, (ids,), {}


def _images() -> Example:
    image = torch.randn(2, 3, 11, 13, generator=torch.Generator().manual_seed(2))
    return randomise(Images()), (image, torch.tensor([8, 4])), {}


MODELS: dict[str, Callable[[], Example]] = {**TINY, "attention": _attention, "images": _images}


def _inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    _, args, kwargs = MODELS[name]()

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return torch.utils._pytree.tree_map(cast, (args, kwargs))  # type: ignore[no-any-return]


@functools.cache
def base_of(name: str, dtype: torch.dtype = torch.float32) -> Program:
    if name in TINY and dtype is torch.float32:
        return traced(name)
    args, kwargs = _inputs(name, dtype)
    return rewriter.trace(MODELS[name]()[0].to(dtype), args, kwargs)


def outputs(model: Any, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    args, kwargs = _inputs(name, dtype)
    with torch.no_grad():
        return torch.cat([t.double().flatten() for t in verify.outputs(model(*args, **kwargs))])


def linear(r: int, *, alpha: float = ALPHA, merge: bool = False) -> Layer:
    def make(old: nn.Module) -> nn.Module:
        turned = not isinstance(old, nn.Linear)  # transformers' Conv1D
        i, o = old.weight.shape if turned else old.weight.shape[::-1]
        options = {"fan_in_fan_out": turned, "merge_weights": merge, "lora_dropout": 0.1, "bias": old.bias is not None}
        return loralib.Linear(i, o, r=r, lora_alpha=alpha, **options)

    return make


def fused(r: int, enable: list[bool], *, merge: bool = False) -> Layer:
    def make(old: nn.Module) -> nn.Module:
        turned = not isinstance(old, nn.Linear)
        i, o = old.weight.shape if turned else old.weight.shape[::-1]
        options = {"enable_lora": enable, "fan_in_fan_out": turned, "merge_weights": merge}
        return loralib.MergedLinear(i, o, r=r, lora_alpha=ALPHA, **options)

    return make


def embedding(r: int, *, merge: bool = False) -> Layer:
    return lambda old: loralib.Embedding(*old.weight.shape, r=r, lora_alpha=ALPHA, merge_weights=merge)


def convolution(r: int, *, merge: bool = False) -> Layer:
    def make(old: nn.Module) -> nn.Module:
        kind = loralib.Conv2d if isinstance(old, nn.Conv2d) else loralib.Conv1d
        options = {"stride": old.stride, "padding": old.padding, "bias": old.bias is not None, "groups": old.groups}
        sizes = old.in_channels, old.out_channels, old.kernel_size[0]
        return kind(*sizes, r=r, lora_alpha=ALPHA, merge_weights=merge, **options)

    return make


def in_loralib(name: str, layers: Mapping[str, Layer], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with loralib's layers at some paths and random A and B, in eval mode."""
    model = MODELS[name]()[0].to(dtype)
    generator = torch.Generator().manual_seed(11)
    for path, make in layers.items():
        parent, _, leaf = path.rpartition(".")
        old = model.get_submodule(path)
        new = make(old).to(dtype)
        (new.conv if hasattr(new, "conv") else new).load_state_dict(old.state_dict(), strict=False)
        with torch.no_grad():
            for factor in (new.lora_A, new.lora_B):
                factor.copy_(0.3 * torch.randn(factor.shape, generator=generator))
        setattr(model.get_submodule(parent), leaf, new)
    return model.eval()


def trained_biases(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bias" in key:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def saved(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    torch.save(dict(tensors), path)
    return path


def applied(name: str, file: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Program:
    return rewriter.apply(base_of(name, dtype), LoralibAdapter(file=file, alpha=ALPHA, **options)).program


def assert_same(program: Program, other: Program) -> None:
    assert str(text(program)) == str(text(other))
    assert program.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensor(name)) for name, tensor in program.tensors.items())


GPT2 = {f"transformer.h.{n}.attn.c_attn": fused(3, [True, False, True]) for n in (0, 1)}
QV, ALL = ("query", "value"), ("v", "k", "q")  # parts are a set: loralib's order is that of the rows
CASES: dict[str, tuple[str, dict[str, Layer], tuple[str, ...]]] = {
    "linear": ("mlp", {"up": linear(3), "down": linear(4)}, ()),
    "merged q, v of gpt2": ("gpt2", GPT2, QV),
    "merged q, k, v of gpt2, and linear stored [i, o]": (
        "gpt2",
        {"transformer.h.1.attn.c_attn": fused(3, [True] * 3), "transformer.h.0.mlp.c_fc": linear(4)},
        ALL,
    ),
    "merged q": ("attention", {"qkv": fused(3, [True, False, False])}, ("q",)),
    "merged k, v": ("attention", {"qkv": fused(3, [False, True, True]), "words": embedding(2)}, ("value", "key")),
    "merged q, k, v": ("attention", {"qkv": fused(2, [True] * 3), "out": linear(4)}, ALL),
    "embedding": ("attention", {"words": embedding(3)}, ()),
    "convolutions": ("images", {"stem": convolution(2), "body": convolution(1), "signal": convolution(3)}, ()),
    "embedding and attention of llama": (
        "llama",
        {"model.embed_tokens": embedding(3), "model.layers.1.self_attn.q_proj": linear(4)},
        (),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_loralib(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    name, layers, enable = CASES[case]
    model = in_loralib(name, layers, dtype)
    expected = outputs(model, name, dtype)
    file = saved(tmp_path / "lora.pt", loralib.lora_state_dict(model))
    program = applied(name, file, dtype, enable=enable)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-11
    base = base_of(name, dtype)
    assert (outputs(base, name, dtype) - expected).abs().max() > 1e-2
    assert (outputs(program, name, dtype) - expected).abs().max() < tolerance
    merged = rewriter.apply(program, Merge()).program
    assert merged.tensors.keys() == base.tensors.keys()
    assert (outputs(merged, name, dtype) - expected).abs().max() < tolerance
    assert_same(rewriter.undo(program), base)
    if dtype is torch.float32:
        written = write_adapter(program, tmp_path / "peft")
        theirs = PeftModel.from_pretrained(MODELS[name]()[0], written).eval()
        assert (outputs(theirs, name) - expected).abs().max() < tolerance


def test_the_merged_weights_are_those_of_loralib(tmp_path: Path) -> None:
    for case in ("merged q, v of gpt2", "convolutions", "embedding"):
        name, layers, enable = CASES[case]
        model = in_loralib(name, layers, torch.float64)
        file = saved(tmp_path / "lora.pt", loralib.lora_state_dict(model))
        merged = rewriter.apply(applied(name, file, torch.float64, enable=enable), Merge()).program
        for path in layers:
            layer = model.get_submodule(path)
            layer.merge_weights = True
            layer.train()
            layer.eval()
            weight = getattr(layer, "conv", layer).weight
            assert not torch.equal(weight, base_of(name, torch.float64).tensor(f"{path}.weight"))
            assert torch.allclose(merged.tensor(f"{path}.weight"), weight, rtol=0, atol=1e-12)


def test_saved_loaded_exported_and_trained(tmp_path: Path) -> None:
    name, layers, enable = CASES["merged k, v"]
    program = applied(name, saved(tmp_path / "a.pt", loralib.lora_state_dict(in_loralib(name, layers))), enable=enable)
    again = rewriter.load(program.save(tmp_path / "program.pt2"))
    assert_same(again, program)
    assert str(text(rewriter.undo(again))) == str(text(rewriter.undo(program)))
    assert export_onnx(program, tmp_path / "model.onnx").max_abs_error < 1e-4
    factors = {"words.lora_embedding_A.default", "words.lora_embedding_B.default"}
    factors |= {f"qkv.lora_{letter}.default.{part}" for letter in "AB" for part in ("key", "value")}
    assert set(program.trainable) == factors
    module = program.module()
    module(*MODELS[name]()[1]).square().mean().backward()
    assert {key for key, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())} == factors


@pytest.mark.parametrize("case", ["mlp", "gpt2"])
def test_what_it_adds(case: str, tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    layers, enable = ({"up": linear(4)}, ()) if case == "mlp" else (GPT2, QV)
    held = loralib.lora_state_dict(in_loralib(case, dict(list(layers.items())[-1:])))
    plain = {key: (torch.arange(t.numel()) % 7 - 3).reshape(t.shape) / 8 for key, t in held.items()}
    program = applied(case, saved(tmp_path / "lora.pt", plain), enable=enable)
    golden("loralib.diff" if case == "mlp" else "loralib_slices.diff", str(rewriter.diff(traced(case), program)))


# -- what else a file may hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases(bias: str, tmp_path: Path) -> None:
    layers = {"up": linear(3), "down": linear(2)}
    model = in_loralib("mlp", layers)
    loralib.mark_only_lora_as_trainable(model, bias)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained_biases(model)
    if bias == "lora_only":
        model.load_state_dict({key: before[key] for key in before if "bias" in key and key != "up.bias"}, strict=False)
    expected = outputs(model, "mlp")
    program = applied("mlp", saved(tmp_path / "lora.pt", loralib.lora_state_dict(model, bias)))
    assert (outputs(program, "mlp") - expected).abs().max() < 1e-5
    wanted = {"up.bias"} if bias == "lora_only" else {"up.bias", "norm.bias", "head.bias"}
    assert {key for key in program.trainable if "lora_" not in key} == wanted
    assert_same(rewriter.undo(program), base_of("mlp"))
    theirs = PeftModel.from_pretrained(MODELS["mlp"]()[0], write_adapter(program, tmp_path / "peft")).eval()
    assert (outputs(theirs, "mlp") - expected).abs().max() < 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_in_the_names_of_loralib(bias: bool, tmp_path: Path) -> None:
    model = in_loralib("images", {"stem": convolution(2)})
    if bias:
        trained_biases(model)
    expected = outputs(model, "images")
    program = applied("images", saved(tmp_path / "whole.pt", model.state_dict()))  # it holds stem.conv.weight
    assert (outputs(program, "images") - expected).abs().max() < 1e-5
    assert ("stem.bias" in program.trainable) is bias
    args, kwargs = _inputs("images")
    bare = MODELS["images"]()[0]
    bare.stem, old = loralib.Conv2d(3, 8, 3, stride=2, padding=1), bare.stem
    bare.stem.conv.load_state_dict(old.state_dict())
    within = rewriter.trace(bare.eval(), args, kwargs)  # the program itself has the child
    within = rewriter.apply(within, LoralibAdapter(file=tmp_path / "whole.pt", alpha=ALPHA)).program
    assert (outputs(within, "images") - expected).abs().max() < 1e-5


def test_a_whole_state_dict_not_merged_and_merged(tmp_path: Path) -> None:
    layers = {"qkv": fused(3, [True, False, True], merge=True), "words": embedding(2, merge=True)}
    layers["out"] = linear(4, merge=True)
    model = in_loralib("attention", layers).train()
    expected = outputs(model.eval(), "attention")
    merged = saved(tmp_path / "merged.pt", model.state_dict())
    plain = saved(tmp_path / "plain.pt", model.train().state_dict())
    assert not torch.equal(torch.load(merged)["qkv.weight"], torch.load(plain)["qkv.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RewriteWarning)
        program = applied("attention", plain, enable=QV)
    assert (outputs(program, "attention") - expected).abs().max() < 1e-5
    with pytest.warns(RewriteWarning, match=r"saved merged.*already in 3 weights, such as .*; the program's own"):
        program = applied("attention", merged, enable=QV)
    assert (outputs(program, "attention") - expected).abs().max() < 1e-5
    with pytest.raises(RewriteError, match=r"saved merged, and not with alpha 10\n.*0\.5 times.*\n.*; 5 would explain"):
        rewriter.apply(base_of("attention"), LoralibAdapter(file=merged, alpha=10, enable=QV))


def test_many_roundings_of_merging_are_no_other_base(tmp_path: Path) -> None:
    model = in_loralib("mlp", {"up": linear(3, merge=True)})
    for _ in range(40):
        model.train().eval()
    with pytest.warns(RewriteWarning, match="saved merged"):
        applied("mlp", saved(tmp_path / "merged.pt", model.state_dict()))
    applied("mlp", saved(tmp_path / "plain.pt", model.train().state_dict()))


def test_weights_of_another_base(tmp_path: Path) -> None:
    model = in_loralib("mlp", {"up": linear(3)})
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    expected = outputs(model, "mlp")
    file = saved(tmp_path / "head.pt", model.state_dict())
    with pytest.raises(RewriteError, match=r"1 weights are not those of the program\n  head\.weight\n.*--force-base"):
        applied("mlp", file)
    program = applied("mlp", file, force_base=True)
    assert (outputs(program, "mlp") - expected).abs().max() < 1e-5
    assert_same(rewriter.undo(program), base_of("mlp"))
    with torch.no_grad():
        model.up.weight.mul_(1.1)
    file = saved(tmp_path / "up.pt", model.state_dict())
    with pytest.raises(RewriteError, match=r"up\.weight: the weight in the file is not the program's, with the LoRA"):
        applied("mlp", file, force_base=True)


@pytest.mark.parametrize("shared", [False, True])
def test_a_tied_embedding(shared: bool, tmp_path: Path) -> None:
    model = in_loralib("llama_tied", {"model.embed_tokens": embedding(3, merge=shared)})
    held = dict(loralib.lora_state_dict(model))
    if shared:  # loralib merged into the tensor that both names share in the file
        held |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), model.model.embed_tokens.weight.detach())
        with pytest.warns(RewriteWarning, match="already in 2 weights"):
            program = applied("llama_tied", saved(tmp_path / "lora.pt", held))
    else:
        program = applied("llama_tied", saved(tmp_path / "lora.pt", held))
    reference = in_loralib("llama_tied", {"model.embed_tokens": embedding(3)})
    assert (outputs(program, "llama_tied") - outputs(reference, "llama_tied")).abs().max() < 1e-5


def test_wrappers_prefixes_and_safetensors(tmp_path: Path) -> None:
    model = in_loralib("gpt2", GPT2)
    held = {key: value.detach().contiguous() for key, value in loralib.lora_state_dict(model).items()}
    expected = outputs(model, "gpt2")
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.module."):
        file = saved(tmp_path / "lora.pt", {prefix + key: value for key, value in held.items()})
        assert (outputs(applied("gpt2", file, enable=QV), "gpt2") - expected).abs().max() < 1e-5
    save_file(held, tmp_path / "lora.safetensors")
    assert (outputs(applied("gpt2", tmp_path / "lora.safetensors", enable=QV), "gpt2") - expected).abs().max() < 1e-5
    torch.save({"state_dict": held}, tmp_path / "nested.pt", _use_new_zipfile_serialization=False)
    assert (outputs(applied("gpt2", tmp_path / "nested.pt", enable=QV), "gpt2") - expected).abs().max() < 1e-5
    bare = saved(tmp_path / "bare.pt", {key.removeprefix("transformer."): value for key, value in held.items()})
    with pytest.warns(RewriteWarning, match=r"another wrapping: 'transformer\.' was put before"):
        program = applied("gpt2", bare, enable=QV)
    assert (outputs(program, "gpt2") - expected).abs().max() < 1e-5


def test_its_step_is_recorded_and_repeated_only_with_the_same_file(tmp_path: Path) -> None:
    file = saved(tmp_path / "lora.pt", loralib.lora_state_dict(in_loralib("mlp", {"up": linear(3)})))
    program = applied("mlp", file)
    (step,) = program.steps
    assert step.options == {"file": "lora.pt", "alpha": ALPHA, "sha256": LoralibAdapter(file, ALPHA).sha256}
    saved(file, loralib.lora_state_dict(in_loralib("mlp", {"up": linear(2)})))
    with pytest.raises(RewriteError, match="is not the checkpoint that was meant"):
        applied("mlp", file, sha256=step.options["sha256"])


# -- refusals -----------------------------------------------------------------------------------------------------


def _mlp() -> dict[str, Tensor]:
    return {"up.lora_A": torch.ones(3, 10), "up.lora_B": torch.ones(22, 3)}


def _qkv(rank: int = 3, parts: int = 2, width: int = 12) -> dict[str, Tensor]:
    return {"qkv.lora_A": torch.ones(rank * parts, 12), "qkv.lora_B": torch.ones(width * parts, rank)}


def _nan() -> dict[str, Tensor]:
    return {**_mlp(), "up.lora_B": torch.ones(22, 3).index_fill(1, torch.tensor(1), torch.nan)}


STEM = {"stem.lora_A": torch.ones(6, 9), "stem.lora_B": torch.ones(24, 6)}
REFUSED: dict[str, tuple[str, dict[str, Tensor], dict[str, Any], type[RewriteError], str]] = {
    "no A": ("mlp", {"up.lora_B": torch.ones(22, 3)}, {}, RewriteError, "up has no lora_A"),
    "no B": ("mlp", {"up.lora_A": torch.ones(3, 10)}, {}, RewriteError, "up has no lora_B"),
    "nothing": ("mlp", {}, {}, RewriteError, "contains no tensors"),
    "no LoRA": ("mlp", {"up.weight": torch.ones(22, 10)}, {}, RewriteError, "holds no lora_A and no lora_B"),
    "rank 0": (
        "mlp",
        {"up.lora_A": torch.ones(0, 10), "up.lora_B": torch.ones(22, 0)},
        {},
        RewriteError,
        r"matrices with entries\n.*\[0, 10\]",
    ),
    "a vector": ("mlp", {**_mlp(), "up.lora_A": torch.ones(30)}, {}, RewriteError, "must be matrices"),
    "integers": (
        "mlp",
        {**_mlp(), "up.lora_A": torch.ones(3, 10, dtype=torch.int8)},
        {},
        RewriteError,
        r"floating-point\n  lora_A: int8 \[3, 10\]",
    ),
    "NaN": ("mlp", _nan(), {}, LawError, r"NaN or infinity\n  up\.lora_B: 22 of 66 values"),
    "names of PEFT": (
        "mlp",
        {"base_model.model.up.lora_A.weight": torch.ones(3, 10)},
        {},
        RewriteError,
        "(?s)not named as loralib.*--adapter",
    ),
    "names of others": (
        "mlp",
        {**_mlp(), "up.lora_mid": torch.ones(2)},
        {},
        RewriteError,
        r"1 tensors.*\n  up\.lora_mid",
    ),
    "the root": ("mlp", {"lora_A": torch.ones(3, 10), "lora_B": torch.ones(7, 3)}, {}, RewriteError, "not named"),
    "two of one name": (
        "mlp",
        {**_mlp(), "_orig_mod.up.lora_A": torch.zeros(3, 10)},
        {},
        RewriteError,
        r"two different tensors are both up\.lora_A",
    ),
    "no such module": (
        "mlp",
        {**_mlp(), "upp.lora_A": torch.ones(3, 10), "upp.lora_B": torch.ones(22, 3), "top.bias": torch.ones(3)},
        {},
        RewriteError,
        r"2 of 3 modules and tensors have no place in the program\n  upp\n  top\.bias",
    ),
    "a module that is no layer": (
        "mlp",
        {"norm.lora_A": torch.ones(3, 22), "norm.lora_B": torch.ones(22, 3)},
        {},
        RewriteError,
        "norm: a LoRA of loralib does not fit here",
    ),
    "transposed": (
        "mlp",
        {"up.lora_A": torch.ones(10, 3), "up.lora_B": torch.ones(3, 22)},
        {},
        RewriteError,
        "(?s)another layer.*stored transposed",
    ),
    "another width": (
        "mlp",
        {**_mlp(), "up.lora_A": torch.ones(3, 12)},
        {},
        RewriteError,
        r"another layer\n.*A \[3, 12\], B \[22, 3\]\n  program: linear, 10 inputs, 22 outputs",
    ),
    "a bias of another size": (
        "mlp",
        {**_mlp(), "head.bias": torch.ones(9)},
        {},
        RewriteError,
        r"head\.bias has another shape",
    ),
    "a quantised weight": (
        "mlp",
        {**_mlp(), "up.weight": torch.ones(22, 10, dtype=torch.int8)},
        {},
        RewriteError,
        r"up\.weight is of another type\n  file: int8, program: float32",
    ),
    "no enable": (
        "attention",
        _qkv(),
        {},
        UsageError,
        r"qkv: the LoRAs are for 2 of 3 parts of a fused layer, and enable is not given\n  A \[6, 12\], B \[24, 3\]",
    ),
    "too few names": ("attention", _qkv(), {"enable": ("q",)}, UsageError, "enable names 1 parts"),
    "parts of another width": (
        "attention",
        _qkv(width=6),
        {"enable": QV},
        RewriteError,
        "(?s)is no part as loralib divides.*outputs 0 to 12",
    ),
    "no attention": (
        "mlp",
        {"up.lora_A": torch.ones(6, 10), "up.lora_B": torch.ones(22, 3)},
        {"enable": QV},
        UsageError,
        "up has no slice",
    ),
    "nothing to enable": ("mlp", _mlp(), {"enable": QV}, UsageError, "every LoRA in .* is for a whole layer"),
    "a kernel of another size": (
        "images",
        {**STEM, "stem.lora_A": torch.ones(4, 6), "stem.lora_B": torch.ones(16, 4)},
        {},
        RewriteError,
        "stem: the LoRA was made for another layer",
    ),
    "a kernel that is not square": (
        "conv",
        {"stem.lora_A": torch.ones(6, 9), "stem.lora_B": torch.ones(24, 6)},
        {},
        RewriteError,
        "another layer",
    ),
    "a grouped convolution": (
        "images",
        {"grouped.lora_A": torch.ones(2, 10), "grouped.lora_B": torch.ones(2, 2)},
        {},
        RewriteError,
        "(?s)grouped convolution is not supported.*groups: 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    name, tensors, options, kind, said = REFUSED[case]
    file = saved(tmp_path / "lora.pt", tensors)
    with pytest.raises(RewriteError, match=said) as error:
        applied(name, file, **options)
    assert type(error.value) is kind
    assert error.value.fix


def test_options_that_cannot_be_meant(tmp_path: Path) -> None:
    file = saved(tmp_path / "lora.pt", _mlp())
    with pytest.raises(UsageError, match=r"(?s)alpha is not given.*any guess changes.*--alpha"):
        LoralibAdapter(file=file)
    with pytest.raises(UsageError, match="no loralib file given"):
        rewriter.apply(base_of("mlp"), LoralibAdapter())
    for options, said in {
        ("alpha", float("nan")): "alpha is nan",
        ("alpha", True): "alpha is True",
        ("alpha", "5"): "alpha is '5'",
        ("adapter", "a.b"): r"adapter is 'a\.b'",
        ("enable", ("q", "gate")): "enable names 'gate'",
        ("enable", ("q", "query")): "names a part twice",
    }.items():
        with pytest.raises(UsageError, match=said):
            LoralibAdapter(**{"file": file, "alpha": 5, options[0]: options[1]})


def test_what_is_no_file_of_tensors(tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match="does not exist"):
        LoralibAdapter(file=tmp_path / "lost.pt", alpha=5)
    torch.save(Perceptron(), tmp_path / "module.pt")
    with pytest.raises(UnsafeError, match="executes code"):
        applied("mlp", tmp_path / "module.pt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(RewriteError, match="is an empty file"):
        applied("mlp", tmp_path / "empty.pt")


def test_nan_can_be_allowed_and_no_effect_is_said(tmp_path: Path) -> None:
    LoralibAdapter(file=saved(tmp_path / "nan.pt", _nan()), alpha=5, allow_nonfinite=True).find(base_of("mlp"))
    zero = saved(tmp_path / "zero.pt", {**_mlp(), "up.lora_B": torch.zeros(22, 3)})
    with pytest.warns(RewriteWarning, match="every update is zero"):
        program = applied("mlp", zero)
    assert torch.equal(outputs(program, "mlp"), outputs(base_of("mlp"), "mlp"))


# -- command line -------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    base_of("gpt2").save(tmp_path / "model.pt")
    model = in_loralib("gpt2", GPT2)
    saved(tmp_path / "lora.pt", loralib.lora_state_dict(model))
    command = ("apply", "--pass", "loralib", "--file", "lora.pt", "--enable", "query,value")
    assert "alpha is not given" in run(*command, "model.pt", code=2).stderr
    run(*command, "--alpha", str(ALPHA), "model.pt")
    program = rewriter.load(tmp_path / "model.loralib.pt")
    assert (outputs(program, "gpt2") - outputs(model, "gpt2")).abs().max() < 1e-5
    run("export", "model.loralib.pt", "--to", "peft", "-o", "adapter")
    theirs = PeftModel.from_pretrained(MODELS["gpt2"]()[0], tmp_path / "adapter").eval()
    assert (outputs(theirs, "gpt2") - outputs(model, "gpt2")).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["torch", "safetensors", "legacy"])
def test_loading_such_a_file_as_a_model_points_to_the_pass(form: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.pt"
    if form == "safetensors":
        save_file(_mlp(), file)
    else:
        torch.save(_mlp(), file, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(RewriteError, match="apply --pass loralib --file"):
        rewriter.load(file)
