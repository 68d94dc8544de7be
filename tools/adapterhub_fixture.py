"""Records directories of the `adapters` library with what it computes, and that it reads the ones we write.

The library pins an older transformers, so it has an environment of its own:

    python3.11 -m venv reference && reference/bin/pip install torch==2.13.0 adapters==1.3.0

    PYTHONPATH=. reference/bin/python tools/adapterhub_fixture.py record     # directories and outputs of the library
    PYTHONPATH=. python tools/adapterhub_fixture.py write FOLDER             # the same adapters, and some of ours
    PYTHONPATH=. reference/bin/python tools/adapterhub_fixture.py check FOLDER

`check` has the library load what `write` wrote, and records in `record.json` how far its outputs are from what is
expected, with a fingerprint of each directory: a test holds what is written later against it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tools.adapters_reference import SEED, SHAPES, inputs, noise, randomise

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "adapterhub"
RECORD = FOLDER / "record.json"
OUTPUTS = FOLDER / "outputs.safetensors"
VIT = FOLDER / "vit_base"  # kept whole, since its modules are called differently today
KINDS: dict[str, dict[str, Any]] = {
    **SHAPES,
    "roberta": {**SHAPES["bert"], "pad_token_id": 1},
    "vit": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 52,
        "image_size": 18,
        "patch_size": 6,
        "num_channels": 5,
    },
}
HEADS = {"": AutoModel, "lm": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}
# case -> (kind, head, configuration, changes); a case that ends in _safe is saved as safetensors
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "bert_seq_bn": ("bert", "", "SeqBnConfig", {"reduction_factor": 4}),
    "bert_double_seq_bn": ("bert", "classifier", "DoubleSeqBnConfig", {"reduction_factor": 5}),
    "bert_par_bn_safe": ("bert", "", "ParBnConfig", {"reduction_factor": 3.3, "ln_after": True}),
    "bert_left_out": ("bert", "", "DoubleSeqBnConfig", {"leave_out": [0], "scaling": "learned"}),
    "roberta_seq_bn": ("roberta", "", "SeqBnConfig", {"reduction_factor": 4, "ln_before": True}),
    "gpt2_seq_bn_safe": ("gpt2", "", "SeqBnConfig", {"reduction_factor": 4}),
    "gpt2_double_seq_bn": ("gpt2", "lm", "DoubleSeqBnConfig", {"reduction_factor": 5}),
    "gpt2_par_bn": ("gpt2", "", "ParBnConfig", {"reduction_factor": 6}),
    "llama_double_seq_bn": ("llama", "", "DoubleSeqBnConfig", {"reduction_factor": 5}),
    "t5_cross": ("t5", "", "DoubleSeqBnConfig", {"cross_adapter": True, "reduction_factor": 7}),
    "t5_left_out": ("t5", "", "SeqBnConfig", {"leave_out": [1, 2], "reduction_factor": 4}),
    "vit_double_seq_bn": ("vit", "", "DoubleSeqBnConfig", {"reduction_factor": 5}),
    "vit_plus": ("vit", "", "AdapterPlusConfig", {"reduction_factor": 6, "stochastic_depth": 0.0}),
}
# case of ours -> (kind, options of the pass `adapter`)
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert_houlsby": ("bert", {"bottleneck": 7, "activation": "silu", "bias": False}),
    "bert_parallel": ("bert", {"form": "parallel", "reduction": 5.5, "scale": 3.0, "norm_before": True}),
    "bert_both": ("bert", {"placement": "pfeiffer", "original_norm": "both", "reduction": 6, "layers": (1,)}),
    "gpt2_learned": ("gpt2", {"placement": "attention", "learned_scale": True, "scale_per_channel": True}),
    "gpt2_parallel": ("gpt2", {"form": "parallel", "pre_norm": False, "activation": "tanh", "learned_scale": True}),
    "llama_norms": ("llama", {"norm_after": True, "norm_sum": True, "bottleneck": 11, "activation": "gelu"}),
    "t5_houlsby": ("t5", {"bottleneck": 9, "exclude": r"encoder\.block\.0\..*"}),
    "t5_pfeiffer": ("t5", {"placement": "pfeiffer", "cross_attention": False, "bottleneck": 5}),
    "vit_houlsby": ("vit", {"bottleneck": 7, "dropout": 0.1}),
}


def base(kind: str, head: str = "") -> nn.Module:
    """A tiny model in eval mode, the same in both environments."""
    if kind == "vit" and VIT.exists():
        kept: Any = AutoModel.from_pretrained(VIT, attn_implementation="eager")
        kept.name_or_path = kept.config._name_or_path = ""  # a path would not be the same on every machine
        return kept.eval()  # type: ignore[no-any-return]
    model: nn.Module = HEADS[head].from_config(AutoConfig.for_model(kind, **KINDS[kind], attn_implementation="eager"))
    randomise(model)
    return model.eval()


def given(kind: str) -> dict[str, Any]:
    """The inputs of a kind of model."""
    if kind == "vit":
        return {"pixel_values": noise("pixels", 2, 5, 18, 18)}
    return inputs("bert" if kind == "roberta" else kind)


def first(model: nn.Module, kind: str) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**given(kind))[0]
    return result.clone()


def record() -> None:
    """Save one adapter of the library per case, with its outputs."""
    import adapters  # type: ignore[import-not-found]

    shutil.rmtree(FOLDER, ignore_errors=True)
    base("vit").save_pretrained(VIT)  # type: ignore[operator]
    results: dict[str, Tensor] = {}
    for case, (kind, head, name, changes) in CASES.items():
        model: Any = base(kind, head)
        results[f"{case}/base"] = first(model, kind)
        adapters.init(model)
        model.add_adapter("mine", config=getattr(adapters, name)(**changes))
        model.set_active_adapters("mine")
        model.eval()
        for path, module in model.named_modules():
            if path.endswith(".adapters.mine"):
                randomise(module, f"{case}/{path}/")
        results[f"{case}/output"] = first(model, kind)
        model.save_adapter(str(FOLDER / case), "mine", use_safetensors=case.endswith("_safe"))
        (FOLDER / case / "pytorch_model_head.bin").unlink(missing_ok=True)
    save_file(results, OUTPUTS)
    versions = {package: version(package) for package in ("adapters", "transformers", "torch")}
    _write({"seed": SEED, "versions": versions})


@functools.cache
def traced(kind: str, head: str = "") -> Any:
    """The program of a model."""
    import rewriter

    return rewriter.trace(base(kind, head), (), given(kind))


def written(case: str, folder: Path) -> tuple[Path, Any]:
    """The directory that our writer makes of a case, and the program it was made from."""
    import rewriter
    from passes import Adapter, AdapterHubAdapter
    from passes.adapterhub_write import write_adapterhub

    if case in CASES:
        kind, head, *_ = CASES[case]
        pass_: Any = AdapterHubAdapter(FOLDER / case)
    else:
        (kind, options), head = OURS[case], ""
        pass_ = Adapter(**options)
    program = rewriter.apply(traced(kind, head), pass_, check=False).program
    if case in OURS:
        made = {name: 0.3 * noise(f"{case}/{name}", *program.tensor(name).shape) for name in program.trainable}
        program = program.with_tensors(made)
    return write_adapterhub(program, folder / case, base_model="tiny"), program


def write(folder: Path) -> None:
    """Write every case with our writer, and the outputs of the programs of ours."""
    results = {}
    for case in (*CASES, *OURS):
        program = written(case, folder)[1]
        if case in OURS:
            kind = OURS[case][0]
            found = program(**given(kind))
            results[case] = (found[0] if isinstance(found, tuple) else found.last_hidden_state).detach().clone()
    save_file(results, folder / "outputs.safetensors")


def check(folder: Path) -> None:
    """Let the library load what was written, and record the errors and the fingerprints."""
    import adapters

    expected = {name: tensor for name, tensor in load_file(OUTPUTS).items() if name.endswith("/output")}
    expected |= {f"{name}/output": tensor for name, tensor in load_file(folder / "outputs.safetensors").items()}
    found: dict[str, Any] = {}
    for case in (*CASES, *OURS):
        kind, head = CASES[case][:2] if case in CASES else (OURS[case][0], "")
        model: Any = base(kind, head)
        adapters.init(model)
        info: dict[str, Any] = {}
        name = model.load_adapter(str(folder / case), loading_info=info, set_active=True)
        assert name == "default", name
        assert not info["missing_keys"], info
        assert not info["unexpected_keys"], info
        model.eval()
        error = float((first(model, kind) - expected[f"{case}/output"]).abs().max())
        assert error < 1e-5, (case, error)
        found[case] = {"max_abs_error": error, "sha256": fingerprint(folder / case)}
    _write({**json.loads(RECORD.read_text(encoding="utf-8")), "written": found})


def fingerprint(directory: Path) -> str:
    """The SHA-256 over an adapter's configuration and the bytes of its tensors by name."""
    total = hashlib.sha256((directory / "adapter_config.json").read_bytes())
    for name, tensor in sorted(torch.load(directory / "pytorch_adapter.bin", weights_only=True).items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def _write(content: dict[str, Any]) -> None:
    RECORD.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record"]:
            record()
        case ["write", to]:
            write(Path(to))
        case ["check", there]:
            check(Path(there))
        case _:
            sys.exit(__doc__)
