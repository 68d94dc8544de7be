"""Merging what PEFT built and we only traced: no method of PEFT is known here, every fold is a proof."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import rewriter
from passes import Merge
from rewriter.program import Program
from tests.models import TINY, traced
from tests.oracle import distance, operations, run

TARGETS: dict[str, tuple[list[str], list[str]]] = {
    "llama": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bert": (["query", "value", "output.dense"], ["output.dense"]),
}


def configuration(method: str, model: str) -> peft.PeftConfig:
    targets, feedforward = TARGETS[model]
    lora: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": targets}
    made = {
        "lora": lambda: peft.LoraConfig(**lora, lora_dropout=0.1),
        "rslora": lambda: peft.LoraConfig(**lora, use_rslora=True),
        "lora_bias": lambda: peft.LoraConfig(**lora, lora_bias=True),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=feedforward),
        "loha": lambda: peft.LoHaConfig(r=3, alpha=7, target_modules=targets),
        "lokr": lambda: peft.LoKrConfig(r=3, alpha=7, target_modules=targets),
        "vera": lambda: peft.VeraConfig(r=3, target_modules=targets[:1]),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=targets),
        "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=targets),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=3, target_r=3, lora_alpha=7, target_modules=targets, total_step=10
        ),
    }
    return made[method]()


def shaken(model: torch.nn.Module, *, size: float = 0.2) -> torch.nn.Module:
    """The model in eval mode with noise in every adapter weight."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" not in name and ("lora" in name or parameter.requires_grad):
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def wrapped(name: str, method: str) -> Program:
    torch.manual_seed(0)
    module, args, kwargs = TINY[name]()
    model = peft.get_peft_model(copy.deepcopy(module), configuration(method, name))
    return rewriter.trace(shaken(model), args, kwargs)


def check(program: Program, name: str) -> Program:
    merged = rewriter.apply(program, Merge()).program
    assert distance(run(traced(name), name), run(program, name)) > 1e-2
    assert distance(run(merged, name), run(program, name)) < 1e-5
    assert operations(merged) == operations(traced(name))
    return merged


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(
            ("llama", method)
            for method in (
                *("lora", "rslora", "lora_bias", "dora", "ia3", "loha", "lokr"),
                *("vera", "oft", "boft", "adalora"),
            )
        ),
        *(("gpt2", method) for method in ("lora", "dora", "ia3")),  # what PEFT has for Conv1D
        *(("bert", method) for method in ("lora", "lokr", "oft", "vera")),
    ],
)
def test_a_traced_peft_model_folds(name: str, method: str) -> None:
    check(wrapped(name, method), name)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_active_adapters(name: str) -> None:
    torch.manual_seed(0)
    module, args, kwargs = TINY[name]()
    targets = TARGETS[name][0]
    model = peft.get_peft_model(
        copy.deepcopy(module), peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets), adapter_name="one"
    )
    second = peft.LoraConfig(r=4, lora_alpha=5, use_rslora=True, target_modules=targets[1:])
    model.add_adapter("two", second)
    model.base_model.set_adapter(["one", "two"])
    check(rewriter.trace(shaken(model), args, kwargs), name)


def test_an_inactive_adapter_stays_out() -> None:
    torch.manual_seed(0)
    module, args, kwargs = TINY["llama"]()
    first = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"])
    model = peft.get_peft_model(copy.deepcopy(module), first, adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(r=4, target_modules=["v_proj"]))
    program = rewriter.trace(shaken(model), args, kwargs)
    result = rewriter.apply(program, Merge())
    assert {site.path.split(".")[-2] for site in result.sites} == {"q_proj"}
    assert distance(run(result.program, "llama"), run(program, "llama")) < 1e-5


def test_embedding_and_convolution_adapters_of_peft() -> None:
    torch.manual_seed(0)
    module, args, kwargs = TINY["conv"]()
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=["stem", "classes", "head"])
    model = peft.get_peft_model(copy.deepcopy(module), config)
    program = rewriter.trace(shaken(model), args, kwargs)
    check(program, "conv")
