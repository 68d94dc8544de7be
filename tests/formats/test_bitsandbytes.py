"""Checkpoints of bitsandbytes: the same bytes in the program, on the way out again, and in what they compute."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rewriter
from passes import Lora, Merge, Nf4
from rewriter.errors import RewriteError
from rewriter.formats.huggingface import save
from rewriter.formats.onnx import export_onnx
from rewriter.formats.peft import PREFIX
from rewriter.program import Program
from rewriter.quantised import held
from rewriter.view import Linear4bit, layers
from runtime.nf4 import dequantize
from tests.oracle import trained

WEIGHTS = "model.safetensors"
PACKED = "model.layers.1.mlp.up_proj.weight"


def llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=64,  # bitsandbytes 0.50 misreads rows on the CPU whose length is no multiple of the block
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantise(source: Path, folder: Path, **options: Any) -> Path:
    """A directory as transformers and bitsandbytes write it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    chosen = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=chosen, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


KINDS = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "stored as bf16": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bitsandbytes")
    base = llama(folder / "base")
    return {"base": base, **{kind: quantise(base, folder / kind, **options) for kind, options in KINDS.items()}}


def raw(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    return {
        name: (tensor.dtype, list(tensor.shape), tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(0, 31, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def theirs(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    return run(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def run(model: torch.nn.Module) -> Tensor:
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # a kernel that multiplies fp32 inputs in bf16
    with torch.no_grad():
        logits: Tensor = model.eval()(**inputs()).logits
    return logits


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_comes_and_goes_byte_for_byte(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    program = rewriter.load(checkpoints[kind])
    sites = [site for site in layers(program).values() if isinstance(site, Linear4bit)]
    assert len(sites) == 14
    assert not program.steps
    given = load_file(checkpoints[kind] / WEIGHTS)
    for site in sites:
        codes = given[f"{site.path}.weight"].view(torch.uint8).reshape(-1)
        assert torch.equal(program.tensor(site.weight), codes)
    save(program, tmp_path / "again")
    assert raw(load_file(tmp_path / "again" / WEIGHTS)) == raw(given)
    before, after = (json.loads((f / "config.json").read_text()) for f in (checkpoints[kind], tmp_path / "again"))
    assert before == after


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_bitsandbytes_does(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    program = rewriter.load(checkpoints[kind])
    want = theirs(checkpoints[kind])
    assert relative(program(**inputs()).logits, want) < 1e-3
    assert relative(theirs(checkpoints["base"]), want) > 1e-2  # what four bits do to the model
    if kind == "nf4, double":
        export_onnx(program, tmp_path / "model.onnx")
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        feed = {name: value.numpy() for name, value in inputs().items()}
        got = session.run(None, feed)[0]
        assert relative(torch.from_numpy(got), want) < 1e-3


def test_a_weight_may_lie_in_several_shards(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(checkpoints["nf4, double"], folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    placed = {name: f"model-0000{1 + index % 3}-of-00003.safetensors" for index, name in enumerate(names)}
    for shard in set(placed.values()):
        save_file({name: tensors[name] for name in names if placed[name] == shard}, folder / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save(rewriter.load(folder), tmp_path / "again")
    assert raw(load_file(tmp_path / "again" / WEIGHTS)) == raw(tensors)


@pytest.mark.parametrize(
    "options", [{}, {"double_quantise": True}, {"kind": "fp4", "block_size": 32}, {"skip": ("k_proj",)}]
)
def test_what_our_pass_quantised_loads_with_bitsandbytes(
    options: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    program = rewriter.apply(rewriter.load(checkpoints["base"]), Nf4(**options)).program
    save(program, tmp_path / "ours")
    assert relative(theirs(tmp_path / "ours"), program(**inputs()).logits) < 1e-3
    assert relative(theirs(checkpoints["base"]), program(**inputs()).logits) > 1e-2


def test_gpt2_stores_its_weights_the_other_way_round(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=31, n_embd=64, n_layer=2, n_head=4, n_positions=41, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    folder = quantise(tmp_path / "base", tmp_path / "quantised", bnb_4bit_quant_type="nf4")
    program = rewriter.load(folder)
    assert relative(program(**inputs()).logits, theirs(folder)) < 1e-3
    save(program, tmp_path / "again")
    assert raw(load_file(tmp_path / "again" / WEIGHTS)) == raw(load_file(folder / WEIGHTS))


def test_an_adapter_beside_it_leaves_for_peft(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    from passes.peft_write import write_adapter

    base = rewriter.load(checkpoints["nf4"])
    program = trained(rewriter.apply(base, Lora(targets=("q_proj", "down_proj"), rank=3)).program)
    write_adapter(program, tmp_path / "adapter")
    assert all(name.startswith(PREFIX) for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(checkpoints["nf4"], dtype=torch.float32)
    want = run(peft.PeftModel.from_pretrained(model, tmp_path / "adapter"))
    assert relative(program(**inputs()).logits, want) < 1e-3
    assert relative(base(**inputs()).logits, want) > 1e-2
    with pytest.raises(RewriteError, match=r"tensors that LlamaForCausalLM does not have"):
        save(program, tmp_path / "whole")
    merged = rewriter.apply(program, Merge()).program  # the layers without an update stay in 4 bits
    assert sum(isinstance(site, Linear4bit) for site in layers(merged).values()) == 10
    assert relative(merged(**inputs()).logits, want) < 1e-3


def _without(part: str) -> Any:
    def change(tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        del tensors[f"{PACKED}.{part}"]

    return change


def _state(**changed: Any) -> Any:
    def change(tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        name = f"{PACKED}.quant_state.bitsandbytes__nf4"
        state = {**json.loads(bytes(tensors[name].tolist())), **changed}
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _tensor(part: str, value: Any) -> Any:
    def change(tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        tensors[f"{PACKED}{part}"] = value(tensors[f"{PACKED}{part}"])

    return change


def _relabelled(tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    name = f"{PACKED}.quant_state.bitsandbytes__"
    tensors[f"{name}fp4"] = tensors.pop(f"{name}nf4")


def _method(**config: Any) -> Any:
    def change(tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        settings["quantization_config"] = config

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_without("absmax"), "its parts do not agree with its quant_state: absmax"),
        (_without("nested_absmax"), "nested_absmax"),
        (_without("quant_state.bitsandbytes__nf4"), r"stands beside a weight without a 4-bit quant_state"),
        (_state(blocksize=48), "blocks of 48 weights"),
        (_state(shape=[128, 63]), r"codes has 4096 entries, shape \[128, 63\] needs 4032"),
        (_state(shape=[64, 128]), r"it is \[64, 128\], the layer of the model \[128, 64\]"),
        (_state(quant_type="fp4"), "says it is fp4"),
        (_state(quant_type="int4"), "quant_state is not readable"),
        (_state(nested_blocksize=128), "scales in blocks of 128"),
        (_state(surprise=1), "quant_state is not readable"),
        (_tensor(".quant_map", lambda table: table * 1.01), "quant_map is not the table of nf4"),
        (_tensor(".nested_quant_map", lambda table: table.flip(0)), "nested_quant_map is not the table"),
        (_tensor(".absmax", lambda scales: scales[:-1]), "absmax has 127 entries"),
        (_tensor(".absmax", lambda scales: scales.float()), "absmax is torch.float32"),
        (_tensor("", lambda codes: codes[:-1]), "codes has 4095 entries"),
        (_tensor("", lambda codes: codes.to(torch.int32)), "its codes are stored as int32"),
        (_relabelled, "says it is nf4"),
        (_method(quant_method="gptq", bits=4), "is quantised by gptq"),
        (_method(quant_method="bitsandbytes", load_in_8bit=True), "is quantised by 8-bit bitsandbytes"),
    ],
)
def test_what_is_no_4bit_weight_is_refused(
    change: Any, told: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(checkpoints["nf4, double"], folder)
    tensors, settings = load_file(folder / WEIGHTS), json.loads((folder / "config.json").read_text())
    change(tensors, settings)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(RewriteError) as error:
        rewriter.load(folder)
    assert re.search(told, " ".join([str(error.value), *error.value.evidence]))


def test_a_block_of_zeros_stays_zero(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "zeros"
    shutil.copytree(checkpoints["base"], folder)
    tensors = load_file(folder / WEIGHTS)
    tensors[PACKED][:2] = 0.0
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    program = rewriter.load(quantise(folder, tmp_path / "quantised", bnb_4bit_quant_type="nf4"))
    site: Any = layers(program)[PACKED.removesuffix(".weight")]
    assert not dequantize(held(program, site))[:2].any()
    assert isinstance(program, Program)
