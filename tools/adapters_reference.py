"""Records what bottleneck adapters of the `adapters` library compute, for tests to hold ours against.

Run it in an environment of its own, since the library pins an older transformers:

    python3.11 -m venv reference && reference/bin/pip install torch==2.13.0 adapters==1.3.0
    PYTHONPATH=. reference/bin/python tools/adapters_reference.py

It writes `tests/fixtures/adapters_reference.safetensors` (adapter weights, outputs) and `.json` (configurations,
versions, seeds). Base weights and inputs come from `base_model` and `inputs`, which the tests call too.
`passes/adapter_config.py` holds which option of ours each of the library's is.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

FIXTURE = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "adapters_reference"
SEED = 7
SHAPES: dict[str, dict[str, Any]] = {
    "bert": {
        "vocab_size": 37,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 52,
        "max_position_embeddings": 43,
    },
    "gpt2": {"vocab_size": 37, "n_positions": 43, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 52},
    "llama": {
        "vocab_size": 37,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    },
    "t5": {"vocab_size": 37, "d_model": 24, "d_kv": 10, "d_ff": 52, "num_layers": 2, "num_heads": 4},
}
FULL_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "seq_bn": ("SeqBnConfig", {"reduction_factor": 4}),
    "double_seq_bn": ("DoubleSeqBnConfig", {"reduction_factor": 5}),
    "par_bn": ("ParBnConfig", {}),
}
CASES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "bert": {
        **FULL_CASES,
        "seq_bn_norms": ("SeqBnConfig", {"reduction_factor": 3, "ln_before": True, "ln_after": True}),
        "norm_of_the_sum": ("DoubleSeqBnConfig", {"ln_after": True, "adapter_residual_before_ln": True}),
        "attention_only": ("DoubleSeqBnConfig", {"output_adapter": False, "non_linearity": "gelu"}),
        "plus": ("AdapterPlusConfig", {"reduction_factor": 6, "stochastic_depth": 0.0}),
        "learned_scale": ("SeqBnConfig", {"scaling": "learned", "non_linearity": "tanh"}),
        "par_bn_norms": ("ParBnConfig", {"ln_before": True, "ln_after": True, "mh_adapter": True}),
    },
    "gpt2": {**FULL_CASES, "plus": ("AdapterPlusConfig", {"reduction_factor": 6, "stochastic_depth": 0.0})},
    "llama": FULL_CASES,
    "t5": {**FULL_CASES, "cross": ("DoubleSeqBnConfig", {"cross_adapter": True, "reduction_factor": 7})},
}


def noise(name: str, *shape: int, seed: int = SEED) -> Tensor:
    """Standard normal numbers that depend on the name and the seed only."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator)


def base_model(kind: str) -> nn.Module:
    """A tiny model in eval mode whose every parameter is random and follows from its name."""
    config = AutoConfig.for_model(kind, **SHAPES[kind], attn_implementation="eager")
    model: nn.Module = AutoModel.from_config(config)
    randomise(model)
    return model.eval()


def randomise(module: nn.Module, prefix: str = "") -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * noise(prefix + name, *parameter.shape))


def inputs(kind: str) -> dict[str, Any]:
    """Two rows of seven tokens, the second one padded at its end."""
    generator = torch.Generator().manual_seed(SEED)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, -2:] = 0
    given: dict[str, Any] = {"input_ids": torch.randint(3, 37, (2, 7), generator=generator), "attention_mask": mask}
    if kind == "t5":
        given["decoder_input_ids"] = torch.randint(3, 37, (2, 5), generator=generator)
    return given if kind == "bert" else {**given, "use_cache": False}


def record(kind: str, case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of one case; the adapters of one model come in the order of its layers."""
    import adapters  # type: ignore[import-not-found]

    model = base_model(kind)
    adapters.init(model)
    name, changes = CASES[kind][case]
    config = getattr(adapters, name)(**changes)
    model.add_adapter("mine", config=config)  # type: ignore[operator]
    model.set_active_adapters("mine")  # type: ignore[operator]
    model.eval()
    tensors: dict[str, Tensor] = {}
    paths: list[str] = []
    for path, module in model.named_modules():
        if path.endswith(".adapters.mine"):
            randomise(module, f"{case}/{path}/")
            for leaf, parameter in module.named_parameters():
                tensors[f"{kind}/{case}/{len(paths)}/{leaf}"] = parameter.detach().clone()
            paths.append(path.removesuffix(".adapters.mine"))
    with torch.no_grad():
        tensors[f"{kind}/{case}/output"] = model(**inputs(kind)).last_hidden_state.clone()
    return tensors, {"config": asdict(config), "paths": paths}


def main() -> None:
    tensors: dict[str, Tensor] = {}
    cases: dict[str, Any] = {}
    for kind, names in CASES.items():
        with torch.no_grad():
            tensors[f"{kind}/base"] = base_model(kind)(**inputs(kind)).last_hidden_state.clone()
        for case in names:
            found, described = record(kind, case)
            tensors.update(found)
            cases[f"{kind}/{case}"] = described
    versions = {package: version(package) for package in ("adapters", "transformers", "torch")}
    FIXTURE.parent.mkdir(exist_ok=True)
    save_file(tensors, FIXTURE.with_suffix(".safetensors"))
    text = json.dumps({"seed": SEED, "versions": versions, "cases": cases}, indent=1, sort_keys=True)
    FIXTURE.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
