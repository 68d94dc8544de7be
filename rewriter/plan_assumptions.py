"""What a plan takes for granted, in words and with the numbers of the case at hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewriter.plan import Options
    from rewriter.program import Step

ATTENTION = (
    "activations, attention: a kernel that stores no scores (flash, memory-efficient): queries, keys, values, result "
    "and one fp32 number a row; a mask as what is added to the scores, in each layer"
)
SAVED = (
    "activations: what autograd holds after the forward pass of this graph, every storage once: a linear layer its "
    "input where its weight trains and nothing where it is frozen, a product the factor that the other one's gradient "
    "needs, a norm or an activation its input; nothing before the first trained parameter"
)
NOT_COUNTED = (
    "not counted: the gradient of the activation at hand, workspace and fragmentation of the allocator, the CUDA "
    "context, the data"
)


def assumptions(
    options: Options,
    *,
    types: tuple[str, ...],
    batch: int,
    length: int | None,
    blocks: int,
    has_loss: bool,
    steps: Iterable[Step],
    largest_quantised: int,
    quantised: float | None,
) -> tuple[str, ...]:
    """One sentence for every choice on which the numbers depend."""
    lines = [
        "sizes in powers of 1000: 1 GB is 10^9 bytes; a tied tensor counts once",
        f"one step takes {step_text(batch, length)}; no gradient accumulation, one device",
        f"weights and buffers in the type of the program ({', '.join(types)}): 2 bytes in bf16 and fp16, 4 in fp32",
        "gradients in the type of the weight, for trained parameters only",
        _optimiser(options),
        _master(options),
        "adapters in the type of the weight they stand beside (PEFT holds them in fp32 unless told otherwise)",
    ]
    lines += dict.fromkeys(f"applied: {step.name}({_options(step)})" for step in steps)
    if quantised is not None:
        lines.append(_quantisation(options, quantised, largest_quantised))
    lines += [SAVED, ATTENTION, "activations, dropout: where it acts, one byte for every element", _blocks(blocks)]
    lines.append(
        "loss: the scores over the vocabulary, and the logarithms of their softmax in fp32"
        if has_loss
        else "loss: what the program returns; nothing for a loss behind it"
    )
    lines.append(NOT_COUNTED)
    return tuple(lines)


def step_text(batch: int, length: int | None) -> str:
    """What one step of training takes: `1 row of 512 positions`."""
    return f"{batch:,} row{'s' * (batch != 1)}" + ("" if length is None else f" of {length:,} positions")


def _options(step: Step) -> str:
    given = {k: ",".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in step.options.items()}
    return ", ".join(f"{name}={value}" for name, value in given.items())


def _optimiser(options: Options) -> str:
    if options.optimizer == "adamw8bit":
        return "adamw8bit: two states of one byte for each trained number; its scales (3 % of that) not counted"
    if options.master or options.states == "fp32":
        return "adamw: two states in fp32, 8 bytes for each trained number"
    return (
        "adamw: two states in the type of the weight, as torch keeps them: 4 bytes for each trained number in 16 bit, "
        "8 in fp32 (--states fp32: always 8)"
    )


def _master(options: Options) -> str:
    if options.master:
        return "an fp32 copy of every trained weight of a smaller type: 4 bytes; 16 bytes a parameter in all with adamw"
    return "no fp32 copy of the trained weights (--master adds it)"


def _quantisation(options: Options, bits: float, largest: int) -> str:
    from rewriter.plan import amount

    formula = "4 + 8/64 + 32/(64 * 256)" if options.double_quantise else "4 + 32/64"
    doubled = "with double quantisation" if options.double_quantise else "without double quantisation"
    return (
        f"qlora: linear layers in NF4 {doubled}, {formula} bits a weight, {bits:.3f} here; the rest (embeddings, "
        "output embedding, norms, biases, stacks of experts, adapters) in the type of the program; a weight is "
        f"expanded while it is used, not counted: at most {amount(largest)}"
    )


def _blocks(count: int) -> str:
    if not count:
        return "checkpointing: no repeated blocks were found, so it saves nothing"
    return (
        f"checkpointing: the inputs of the {count} blocks and what lies outside of them stay, one block at a time is "
        "computed again; the largest one counts"
    )
