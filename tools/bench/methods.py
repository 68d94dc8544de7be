"""What every method costs on one model: trainable parameters, checkpoint bytes, time of a training step, latency.

Run `python tools/bench/methods.py` for a small Llama made from a configuration and a seed, or name a model:
`python tools/bench/methods.py MODEL`, whatever `rewriter.load` takes. All methods are measured in one run, in turns: a
round times every method once, next to what it is compared with, and the table shows medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor

import rewriter
from passes import (
    Adalora,
    Adapter,
    Bake,
    Binarise,
    Ia3,
    Intrinsic,
    LayerNormTuning,
    Loftq,
    Loha,
    Lokr,
    Lora,
    Merge,
    Prefix,
    Prompt,
    Select,
    TrainableTokens,
    Vera,
)
from passes.fish_mask import fisher
from rewriter.difference_text import size
from rewriter.errors import RewriteError
from rewriter.formats.random_inputs import random_inputs
from rewriter.program import Program
from rewriter.transform import Pass
from rewriter.verify import outputs

SCHEMA = 1
REFERENCE = "lora"  # training steps are compared with its
RATE = 1e-4
NOISE = 0.01  # what training leaves in every trained number, so that nothing is measured at zero
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Method:
    """A pass with its options, and the passes that end its training: a merge, or a bake of what trained it."""

    pass_: Pass | Callable[[Program, Inputs, Path], Pass]
    ends: tuple[Pass, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """What one method costs; times are ratios, the latency after its end is None for a method without one."""

    method: str
    trainable: int
    share: float
    checkpoint_bytes: int
    training_step: float
    latency: float
    latency_ended: float | None
    ended: str  # merged, baked, no, or nothing to merge
    source: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """A method on the model: with random values in what it trains, and what remains of it after its end."""

    program: Program
    ended: Program | None
    how: str
    source: str


def fish_mask(program: Program, inputs: Inputs, folder: Path) -> Pass:
    """The pass with the Fisher information of the timed inputs; their first output is what the loss depends on."""
    args, kwargs = inputs
    given = kwargs or args
    scores = fisher(program, [given], lambda result, _: outputs(result)[0].square().mean())
    save_file({name: score.contiguous() for name, score in scores.items()}, folder / "scores.safetensors")
    return Select(method="fish_mask", scores=folder / "scores.safetensors")


METHODS: dict[str, Method] = {
    "lora": Method(Lora(), (Merge(),)),
    "lora, DoRA": Method(Lora(dora=True), (Merge(),)),
    "loftq": Method(Loftq(targets=Lora().targets), (Merge(),)),
    "adalora": Method(Adalora(), (Merge(),)),
    "loha": Method(Loha(), (Merge(),)),
    "lokr": Method(Lokr(), (Merge(),)),
    "vera": Method(Vera(), (Merge(),)),
    "ia3": Method(Ia3(), (Merge(),)),
    "adapter, series": Method(Adapter()),
    "adapter, parallel": Method(Adapter(form="parallel")),
    "adapter, layer": Method(Adapter(form="layer", targets=("@attention.query", "@attention.value"))),
    "prefix": Method(Prefix()),
    "prefix, projection": Method(Prefix(projection=True), (Bake(),)),
    "prompt": Method(Prompt()),
    "prompt, LSTM": Method(Prompt(encoder="lstm"), (Bake(),)),
    "prompt, MLP": Method(Prompt(encoder="mlp"), (Bake(),)),
    "trainable_tokens, 16": Method(TrainableTokens(token_indices=tuple(range(16))), (Merge(),)),
    "ln_tuning": Method(LayerNormTuning()),
    "select, BitFit": Method(Select()),
    "select, last block": Method(Select(method="last", last=1)),
    "select, FishMask 0.5 %": Method(fish_mask, (Merge(),)),
    "select, diff pruning": Method(Select(method="diff_pruning"), (Binarise(density=0.005), Merge())),
    "intrinsic, fastfood": Method(Intrinsic(), (Merge(),)),
    "intrinsic, one_hot": Method(Intrinsic(projection="one_hot"), (Merge(),)),
    "full fine-tuning": Method(Select(method="paths", paths=("*",))),
}
NOT_TRAINED = {"adapterhub", "bake", "binarise", "compose", "dequantise", "loralib", "merge", "nf4", "peft", "prune"}


# -- the model -------------------------------------------------------------------------------------------------------


def small_llama(options: argparse.Namespace) -> Program:
    """A Llama with random weights, made from a configuration and a seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.mlp,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_value_heads,
        head_dim=options.width // options.heads,
        max_position_embeddings=2 * options.length + 64,  # a prompt or a prefix finds room
    )
    torch.manual_seed(options.seed)
    return rewriter.trace(LlamaForCausalLM(config).eval())


def inputs_of(program: Program, batch: int, length: int, seed: int) -> Inputs:
    """Random inputs whose first varying size is the batch and whose second is the length."""
    wanted: dict[str, int] = {}
    for node in program.inputs():
        shape = node.meta["val"].shape if isinstance(node.meta.get("val"), Tensor) else ()
        for dimension, size_ in zip(shape, (batch, length), strict=False):
            if isinstance(dimension, torch.SymInt) and dimension.node.expr.is_symbol:
                wanted.setdefault(str(dimension.node.expr), size_)
    return random_inputs(program, sizes=wanted, seed=seed)


def prepared(base: Program, method: Method, inputs: Inputs, seed: int) -> Prepared:
    with tempfile.TemporaryDirectory() as folder:
        pass_ = method.pass_ if isinstance(method.pass_, Pass) else method.pass_(base, inputs, Path(folder))
        program = rewriter.apply(base, pass_, check=False).program
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name in program.trainable:
        before = program.tensor(name).detach()
        values[name] = before + NOISE * torch.randn(before.shape, generator=generator).to(before.dtype)
    program = program.with_tensors(values)
    if not method.ends:
        how = "no" if program.steps[-1].added else "nothing to merge"
        return Prepared(program, None, how, pass_.source)
    how = "baked" if isinstance(method.ends[-1], Bake) else "merged"
    return Prepared(program, rewriter.apply(program, *method.ends, check=False).program, how, pass_.source)


def checkpoint_bytes(program: Program) -> int:
    """The size of a safetensors file of what was trained, with the places of sparse numbers among it."""
    tensors = {name: program.tensor(name) for name in program.trainable}
    for name in (name for step in program.steps for name in step.added):
        if name in program.tensors and not program.tensor(name).is_floating_point():
            tensors[name] = program.tensor(name)
    return len(save({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}))


# -- time ------------------------------------------------------------------------------------------------------------


def inference(program: Program, inputs: Inputs) -> Callable[[], None]:
    module = program.module().eval()

    def run() -> None:
        with torch.no_grad():
            module(*inputs[0], **inputs[1])

    return run


def training(program: Program, inputs: Inputs) -> Callable[[], None]:
    """One step: forward, backward, Adam; the loss is the mean square of every output."""
    module = program.module().train()
    optimiser = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=RATE)

    def step() -> None:
        optimiser.zero_grad()
        found = [each for each in outputs(module(*inputs[0], **inputs[1])) if each.requires_grad]
        torch.stack([each.float().square().mean() for each in found]).sum().backward()
        optimiser.step()

    return step


def in_turns(runs: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: list[float], reference: list[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return statistics.median(one / other for one, other in zip(seconds, reference, strict=True))


def measured(base: Program, methods: Mapping[str, Prepared], inputs: Inputs, rounds: int) -> Iterator[Row]:
    steps = in_turns({name: training(each.program, inputs) for name, each in methods.items()}, rounds)
    runs = {"base": inference(base, inputs)}
    for name, each in methods.items():
        runs[name] = inference(each.program, inputs)
        if each.ended is not None:
            runs[f"{name} ended"] = inference(each.ended, inputs)
    latencies = in_turns(runs, rounds)
    for name, each in methods.items():
        amounts = rewriter.report(each.program)
        ended = latencies.get(f"{name} ended")
        yield Row(
            method=name,
            trainable=amounts.parameters.trainable,
            share=amounts.share,
            checkpoint_bytes=checkpoint_bytes(each.program),
            training_step=ratio(steps[name], steps[REFERENCE]),
            latency=ratio(latencies[name], latencies["base"]),
            latency_ended=ratio(ended, latencies["base"]) if ended else None,
            ended=each.how,
            source=each.source,
        )


# -- what is printed -------------------------------------------------------------------------------------------------

HEAD = (
    "method",
    "trainable",
    "share",
    "checkpoint",
    "training step / LoRA's",
    "latency / base's",
    "after merge or bake",
    "merged",
)


def markdown(found: Mapping[str, Any], rows: list[Row], refused: Mapping[str, str]) -> str:
    cells = [
        (
            row.method,
            f"{row.trainable:,}",
            f"{row.share:.3%}",
            size(row.checkpoint_bytes),
            f"{row.training_step:.2f}",
            f"{row.latency:.2f}",
            "" if row.latency_ended is None else f"{row.latency_ended:.2f}",
            row.ended,
        )
        for row in rows
    ]
    lines = [
        f"{found['model']}: {found['parameters']:,} parameters; batch {found['batch']}, length {found['length']}, "
        f"{found['rounds']} rounds, {found['threads']} threads, torch {found['torch']}, {found['machine']}",
        "",
        *(f"| {' | '.join(each)} |" for each in (HEAD, ("---", *["---:"] * 6, "---"), *cells)),
    ]
    lines += ["", *(f"{name}: {reason}" for name, reason in refused.items())] if refused else []
    return "\n".join(lines)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a program, a Hugging Face directory or package.module:factory")
    parser.add_argument("--methods", help="some of them, separated by semicolons; lora is always measured")
    numbers = {"batch": 4, "length": 64, "rounds": 15, "threads": 1, "seed": 0}
    sizes = {"width": 256, "layers": 4, "heads": 8, "key-value-heads": 4, "mlp": 688, "vocabulary": 4096}
    for name, default in (numbers | sizes).items():
        about = "" if name in numbers else "of the Llama; "
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about}default {default}")
    parser.add_argument("--json", action="store_true", help="write JSON (schema 1) in place of the table")
    options = parser.parse_args(arguments)
    chosen = [name.strip() for name in options.methods.split(";")] if options.methods else list(METHODS)
    unknown = [name for name in chosen if name not in METHODS]
    if unknown:
        parser.error(f"there is no method {unknown[0]!r}; known: {'; '.join(METHODS)}")
    options.methods = [name for name in METHODS if name in {*chosen, REFERENCE}]
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure the methods and print the table."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    base = rewriter.load(options.model) if options.model else small_llama(options)
    inputs = inputs_of(base, options.batch, options.length, options.seed)
    methods: dict[str, Prepared] = {}
    refused: dict[str, str] = {}
    for name in options.methods:
        print(f"preparing {name}", file=sys.stderr)
        try:
            methods[name] = prepared(base, METHODS[name], inputs, options.seed)
        except RewriteError as error:
            refused[name] = str(error).splitlines()[0]
    if REFERENCE not in methods:
        sys.exit(f"{REFERENCE}, to which training steps are compared: {refused[REFERENCE]}")
    print(f"measuring {len(methods)} methods in {options.rounds} rounds", file=sys.stderr)
    rows = list(measured(base, methods, inputs, options.rounds))
    found = {
        "model": Path(options.model).name
        if options.model
        else f"Llama, width {options.width}, {options.layers} layers",
        "parameters": rewriter.report(base).parameters.count,
        **{name: getattr(options, name) for name in ("batch", "length", "rounds", "threads", "seed")},
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    if options.json:
        print(json.dumps({"schema": SCHEMA, **found, "rows": [asdict(row) for row in rows], "refused": refused}))
    else:
        print(markdown(found, rows, refused))


if __name__ == "__main__":
    main()
