"""Hugging Face directories: read strictly, traced with inputs made up for them, written so that they reload equal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from rewriter.errors import LawError, RewriteError, UnsafeError
from rewriter.formats import huggingface
from rewriter.formats.huggingface_inputs import example_inputs
from rewriter.program import Program, Step
from tests.models import TINY, randomise


def qwen3() -> PreTrainedModel:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**DECODER))


def gemma3() -> PreTrainedModel:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**DECODER, sliding_window=7, layer_types=layers))


DECODER = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE: dict[str, Callable[[], PreTrainedModel]] = {"qwen3": qwen3, "gemma3": gemma3}
ARCHITECTURES = [name for name in TINY if name not in ("mlp", "conv")] + list(MORE)


class Store:
    """Every model, directory and traced program is made once; nobody changes them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models: dict[str, PreTrainedModel] = {}
        self.programs: dict[str, Program] = {}

    def model(self, name: str) -> PreTrainedModel:
        if name not in self.models:
            made: Any = randomise(MORE[name]()) if name in MORE else TINY[name]()[0]
            made.save_pretrained(self.root / name)
            self.models[name] = made
        return self.models[name]

    def directory(self, name: str) -> Path:
        self.model(name)
        return self.root / name

    def program(self, name: str) -> Program:
        if name not in self.programs:
            self.programs[name] = huggingface.load(self.directory(name))
        return self.programs[name]

    def copy(self, name: str, to: Path) -> Path:
        shutil.copytree(self.directory(name), to)
        return to


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("huggingface"))


def other_sizes(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of the same kinds with another batch and length, the last row padded."""
    generator = torch.Generator().manual_seed(7)
    made: dict[str, Tensor] = {}
    for name, value in inputs.items():
        batch = value.shape[0] + 1
        length = value.shape[-1] + (6 if name.startswith("decoder") else 4)
        if value.is_floating_point():
            made[name] = torch.randn(batch, *value.shape[1:], generator=generator)
        elif name == "attention_mask":
            made[name] = torch.ones(batch, length, dtype=torch.long)
            made[name][-1, -3:] = 0
        else:
            high = 2 if name == "token_type_ids" else 31
            made[name] = torch.randint(0 if high == 2 else 3, high, (batch, length), generator=generator)
    return made


def outputs(result: Any) -> dict[str, Tensor]:
    return {name: value for name, value in result.items() if isinstance(value, Tensor)}


def settings(directory: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loaded_program_computes_what_the_model_does_at_any_batch_and_length(store: Store, name: str) -> None:
    program, model = store.program(name), store.model(name)
    inputs = other_sizes(example_inputs(model))
    with torch.no_grad():
        expected = outputs(model(**inputs))
    got = program(**inputs)
    compared = [key for key in outputs(got) if key in expected]
    assert compared
    for key in compared:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5)
    assert type(got).__name__ == type(model(**inputs)).__name__


@pytest.mark.parametrize("name", ["llama", "t5", "clip", "whisper"])
def test_sizes_of_made_up_inputs_are_like_no_other_size(store: Store, name: str) -> None:
    model = store.model(name)
    inputs = example_inputs(model)
    free = {value.shape[0] for value in inputs.values()} | {
        value.shape[1] for name, value in inputs.items() if name.endswith("ids")
    }
    taken = {size for parameter in model.parameters() for size in parameter.shape}
    assert min(free) >= 2
    assert not free & taken
    texts = {tuple(value.shape) for name, value in inputs.items() if name.endswith("ids")}
    assert all(batch != length for batch, length in texts)


def test_metadata_names_the_model_and_no_place(store: Store) -> None:
    program = store.program("llama")
    record = program.metadata["huggingface"]
    assert record["architecture"] == "LlamaForCausalLM"
    assert record["directory"] == "llama"
    assert record["config"]["hidden_size"] == 24
    assert str(store.root) not in json.dumps(program.metadata)
    assert len(program.metadata["weights_sha256"]) == 64
    assert program.metadata["weights_sha256"] != store.program("llama_tied").metadata["weights_sha256"]


def test_tracing_leaves_a_model_in_memory_as_it_was(store: Store) -> None:
    model = store.model("gpt2")
    model.config.use_cache = True
    model.train()
    try:
        program = huggingface.trace_model(model)
        assert model.training
        assert model.config.use_cache
        assert "forward" not in vars(model)
    finally:
        model.eval()
    assert program.metadata["weights_sha256"] == store.program("gpt2").metadata["weights_sha256"]


def test_what_transformers_replaces_for_export_serves_when_the_plain_trace_fails(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = store.model("llama"), huggingface.trace_plainly
    calls: list[Any] = []

    def trace(*args: Any, **kwargs: Any) -> Program:
        calls.append(args)
        if len(calls) == 1:
            raise RewriteError("plain tracing fails")
        return plain(*args, **kwargs)

    monkeypatch.setattr(huggingface, "trace_plainly", trace)
    program = huggingface.trace_model(model)
    assert len(calls) == 2
    assert "forward" not in vars(model)
    inputs = other_sizes(example_inputs(model))
    torch.testing.assert_close(program(**inputs).logits, store.program("llama")(**inputs).logits)


def test_sharded_and_pickled_weights_are_the_same_program(store: Store, tmp_path: Path) -> None:
    model = store.model("llama")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    pickled = store.copy("llama", tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    expected = store.program("llama").metadata["weights_sha256"]
    for directory in (tmp_path / "sharded", pickled):
        assert huggingface.load(directory).metadata["weights_sha256"] == expected


def test_weights_stay_mapped_from_disk(store: Store, tmp_path: Path) -> None:
    copy = store.copy("llama", tmp_path / "model")
    program = huggingface.load(copy)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list mapped files")
    assert str(copy / "model.safetensors") in maps.read_text()
    assert program.tensors


def test_dtype_is_that_of_the_checkpoint_unless_given(store: Store) -> None:
    program = huggingface.load(store.directory("bert"), dtype=torch.bfloat16)
    assert {t.dtype for t in program.parameters().values()} == {torch.bfloat16}
    assert {t.dtype for t in store.program("bert").parameters().values()} == {torch.float32}


# -- strictness ---------------------------------------------------------------------------------------------------


def change_weights(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda t: t.update({"model.extra.weight": torch.ones(3)}), "unexpected: model.extra.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(5)}),
            "another shape: model.norm.weight, [5] given, [24] in the model",
        ),
    ],
)
def test_weights_must_fit(store: Store, tmp_path: Path, change: Any, line: str) -> None:
    directory = change_weights(store.copy("llama", tmp_path / "model"), change)
    with pytest.raises(RewriteError, match="do not fit LlamaForCausalLM") as caught:
        huggingface.load(directory)
    assert any(found.startswith(line) for found in caught.value.evidence)


def test_a_missing_tied_name_and_ignored_buffers_are_fine(store: Store, tmp_path: Path) -> None:
    names = load_file(store.directory("llama_tied") / "model.safetensors")
    assert "lm_head.weight" not in names
    assert store.program("llama_tied").tied()
    positions = {"embeddings.position_ids": torch.arange(43)[None]}
    directory = change_weights(store.copy("bert", tmp_path / "model"), lambda t: t.update(positions))
    assert huggingface.load_model(directory).config.model_type == "bert"


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"architectures": None}, RewriteError, "architecture="),
        ({"architectures": ["LlamaModel", "LlamaForCausalLM"]}, RewriteError, "one was expected"),
        ({"architectures": ["LlamaForCausalLMM"]}, RewriteError, "similar: LlamaForCausalLM"),
        ({"architectures": ["AutoModel"]}, RewriteError, "no model of transformers"),
        ({"architectures": [["os"]]}, RewriteError, "one was expected"),
        ({"auto_map": {"AutoModel": "modeling.Evil"}}, UnsafeError, "code of its own"),
        ({"attn_implementation": "someone/kernels"}, UnsafeError, "code from elsewhere"),
        ({"quantization_config": {"quant_method": "gptq"}}, RewriteError, "quantised"),
        ({"hidden_size": "wide"}, RewriteError, "transformers cannot build"),
    ],
)
def test_configurations_that_are_refused(
    store: Store, tmp_path: Path, changes: dict[str, Any], error: type[RewriteError], text: str
) -> None:
    directory = store.copy("llama", tmp_path / "model")
    (directory / "modeling.py").write_text(f"open({str(tmp_path / 'sentinel')!r}, 'w')")
    settings(directory, **changes)
    with pytest.raises(error, match=text) as caught:
        huggingface.load(directory)
    assert type(caught.value) is error
    assert not (tmp_path / "sentinel").exists()


def test_a_named_class_stands_in_for_a_missing_one_and_for_code(store: Store, tmp_path: Path) -> None:
    directory = store.copy("llama", tmp_path / "model")
    settings(directory, architectures=None, auto_map={"AutoModel": "modeling.Evil"})
    program = huggingface.load(directory, architecture="LlamaForCausalLM")
    assert program.metadata["weights_sha256"] == store.program("llama").metadata["weights_sha256"]


def test_a_pickle_that_executes_code_is_refused(store: Store, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'sentinel'}",)

    directory = store.copy("llama", tmp_path / "model")
    (directory / "model.safetensors").unlink()
    torch.save({"weight": Evil()}, directory / "pytorch_model.bin")
    with pytest.raises(UnsafeError):
        huggingface.load(directory)
    assert not (tmp_path / "sentinel").exists()


def test_a_directory_without_weights_is_refused(store: Store, tmp_path: Path) -> None:
    directory = store.copy("llama", tmp_path / "model")
    (directory / "model.safetensors").unlink()
    with pytest.raises(RewriteError, match="has no weights"):
        huggingface.load(directory)


# -- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_what_is_saved_reloads_equal(store: Store, tmp_path: Path, name: str) -> None:
    program, model = store.program(name), store.model(name)
    source = store.copy(name, tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling.py").write_text("raise SystemExit")
    error = huggingface.save(program, tmp_path / "saved", source=source)
    assert error <= 1e-5
    written = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written
    assert "modeling.py" not in written
    reloaded: Any = type(model).from_pretrained(tmp_path / "saved")
    inputs = other_sizes(example_inputs(model))
    with torch.no_grad():
        expected, got = outputs(model(**inputs)), outputs(reloaded.eval()(**inputs))
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value)
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}


def test_saving_in_another_dtype(store: Store, tmp_path: Path) -> None:
    error = huggingface.save(store.program("llama_tied"), tmp_path / "saved", dtype=torch.bfloat16)
    assert 0 < error < 0.5
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


def untied(program: Program) -> Program:
    """The head reads another tensor than the embedding, as a merge into one of two tied weights leaves it."""
    clone = program.clone()
    head = next(n for n in reversed(clone.graph.nodes) if n.target is torch.ops.aten.linear.default)
    read = clone.parameter_name(head.args[1])
    group = next(names for names in clone.tied() if read in names)
    other = clone.placeholder(next(n for n in group if n not in (read, "lm_head.weight")))
    if read == "lm_head.weight":
        clone.placeholder(read).replace_all_uses_with(other, delete_user_cb=lambda user: user is not head)
    else:
        head.args = (head.args[0], clone.placeholder("lm_head.weight"), *head.args[2:])
    clone.exported.graph_module.recompile()
    clone.store("lm_head.weight", program.tensor("lm_head.weight").detach() * 1.5 + 0.1)
    return clone


@pytest.mark.parametrize("name", ["llama_tied", "t5"])
def test_untied_weights_stay_untied(store: Store, tmp_path: Path, name: str) -> None:
    program = untied(store.program(name))
    huggingface.save(program, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    reloaded: Any = type(store.model(name)).from_pretrained(tmp_path / "saved")
    assert torch.equal(reloaded.get_output_embeddings().weight, program.tensor("lm_head.weight"))
    assert torch.equal(
        reloaded.get_input_embeddings().weight,
        store.model(name).get_input_embeddings().weight,  # type: ignore[operator]
    )


def test_tied_weights_stay_tied(store: Store, tmp_path: Path) -> None:
    program = store.program("llama_tied")
    read = next(n for n in program.graph.nodes if n.target is torch.ops.aten.embedding.default).args[0]
    name = program.parameter_name(read)
    assert name is not None
    changed = program.with_tensors({name: program.tensor(name).detach() * 1.5})  # the other name is read by nothing
    huggingface.save(changed, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is True
    reloaded: Any = type(store.model("llama_tied")).from_pretrained(tmp_path / "saved")
    assert torch.equal(reloaded.lm_head.weight, changed.tensor(name))


def test_adapter_parameters_are_refused_by_name(store: Store, tmp_path: Path) -> None:
    clone = store.program("llama").clone()
    clone.exported.state_dict["model.layers.0.self_attn.q_proj.lora_A.default"] = torch.ones(4, 24)
    step = Step(1, "lora", {}, added=("model.layers.0.self_attn.q_proj.lora_A.default",))
    with pytest.raises(RewriteError, match=r"added by lora") as caught:
        huggingface.save(Program(clone.exported, (step,), clone.metadata), tmp_path / "saved")
    assert caught.value.evidence == ("model.layers.0.self_attn.q_proj.lora_A.default",)
    assert "--to peft" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_changed_computation_is_not_written(store: Store, tmp_path: Path) -> None:
    clone = store.program("llama").clone()
    activation = next(n for n in clone.graph.nodes if n.target is torch.ops.aten.silu.default)
    activation.target = torch.ops.aten.relu.default
    clone.exported.graph_module.recompile()
    with pytest.raises(LawError, match="reloaded"):
        huggingface.save(clone, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_program_of_no_transformers_model_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match="not traced from a transformers model"):
        huggingface.save(Program(store.program("llama").exported), tmp_path / "saved")
