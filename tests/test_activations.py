"""What a plan says autograd holds is what autograd holds: counted in real runs on the CPU, storage by storage."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from passes.lora import Lora
from rewriter.activations import activations
from rewriter.blocks import block_of
from rewriter.errors import RewriteError
from rewriter.formats.random_inputs import example_sizes, random_inputs
from rewriter.plan import default_targets, in_type
from rewriter.program import Program
from rewriter.trace import trace
from rewriter.transform import apply
from tests.models import traced

NAMES = ("llama", "gpt2", "bert", "vit", "t5", "phi3", "whisper", "mixtral", "mlp")


class Held:
    """A saved tensor, as long as autograd needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Holding:
    """Counts what is saved for backward, every storage once, the tensors of modules and given ones left out."""

    def __init__(self, *modules: nn.Module) -> None:
        self.own = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        self.held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(self, tensor: Tensor) -> Held:
        held = Held(tensor)
        self.held.add(held)
        return held

    def __enter__(self) -> Holding:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        self.hooks.__exit__(*why)

    def size_bytes(self, *without: Tensor) -> int:
        """What is held by now; ask as long as the results of the run are there."""
        own = {tensor.untyped_storage()._cdata for tensor in (*self.own, *without)}
        storages = {s._cdata: s for held in self.held if (s := held.tensor.untyped_storage())._cdata not in own}
        return sum(storage.nbytes() for storage in storages.values())


def really_saved(program: Program, sizes: Mapping[str, int]) -> int:
    """Run the program's module with gradients and count."""
    module = program.module().eval()
    args, kwargs = random_inputs(program, sizes=sizes)
    with Holding(module) as holding:
        results = module(*args, **kwargs)
    size_bytes = holding.size_bytes()
    del results
    return size_bytes


def adapted(name: str) -> Program:
    program = traced(name)
    return apply(program, Lora(rank=3, targets=default_targets(program)), check=False).program


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_saved_is_what_autograd_saves(name: str, method: str) -> None:
    program = traced(name) if method == "full" else adapted(name)
    sizes = example_sizes(program)
    assert activations(program, sizes, train=False).saved == really_saved(program, sizes)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_other_sizes_than_those_of_the_trace(name: str) -> None:
    program = adapted(name)
    sizes = {symbol: 2 if size == 3 else 19 for symbol, size in example_sizes(program).items()}
    assert activations(program, sizes, train=False).saved == really_saved(program, sizes)


def test_convolutions() -> None:
    program = traced("conv")  # a batch norm on a GPU also keeps its statistics
    sizes = example_sizes(program)
    assert activations(program, sizes).saved == pytest.approx(really_saved(program, sizes), rel=0.01)


def test_nothing_before_the_first_trained_parameter() -> None:
    program = traced("mlp")
    held = activations(program, example_sizes(program), trainable=["head.weight"])
    assert held.saved == 4 * 3 * 5 * 10  # what the head reads
    assert held.by_operation == {"linear": held.saved}
    assert activations(program, example_sizes(program), trainable=[]).saved == 0


def test_dropout_keeps_a_byte_for_every_element() -> None:
    program = traced("mlp")
    sizes = example_sizes(program)
    still, acting = activations(program, sizes, train=False), activations(program, sizes)
    assert acting.saved - still.saved == 3 * 5 * 22


def test_the_operations_add_up_and_no_weight_is_read() -> None:
    program = traced("llama")
    held = activations(program, example_sizes(program))
    assert sum(held.by_operation.values()) == held.saved
    assert held.outputs == 4 * 3 * 7 * 31
    bare = in_type(program, torch.float32)
    assert {tensor.device.type for tensor in bare.parameters().values()} == {"meta"}
    assert activations(bare, example_sizes(bare)) == held


def test_attention_stores_no_scores_but_its_mask() -> None:
    program = traced("vit")
    held = activations(program, example_sizes(program)).by_operation["scaled_dot_product_attention"]
    rows, tokens, width, heads, layers = 3, 10, 24, 4, 2
    operands, sums, mask = 4 * rows * tokens * width, rows * heads * tokens, rows * tokens * tokens
    assert held == 4 * layers * (operands + sums + mask)


# -- checkpointing ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Three blocks, the second one the largest; `checkpointed` runs them as training with checkpoints does."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 6)
        self.blocks = nn.ModuleList(Block(6, inner) for inner in (10, 26, 14))
        self.head = nn.Linear(6, 17)
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x).relu()


IDS = torch.arange(3 * 7).view(3, 7) % 17


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointing_is_what_torch_keeps(frozen: bool) -> None:
    program = trace(Stack(), (IDS,))
    trainable = [name for name in program.parameters() if not frozen or name.startswith(("blocks.1", "head"))]
    held = activations(program, example_sizes(program), trainable=trainable)

    model = Stack(checkpointed=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    with Holding(model) as kept:
        result = model(IDS)
    largest = model.blocks[1]
    x = torch.randn(3, 7, 6, requires_grad=not frozen)
    with Holding(largest) as again:
        last = largest(x)
    assert held.blocks == 3
    assert held.block_inputs + held.outside == kept.size_bytes()
    assert held.largest_block == again.size_bytes(x)  # an input stays anyway
    assert held.checkpointed < held.saved
    del result, last


def test_blocks_are_found_by_their_place() -> None:
    assert {*block_of(traced("t5")).values()} == {
        f"{side}.block.{number}" for side in ("encoder", "decoder") for number in range(2)
    }
    assert {*block_of(adapted("gpt2")).values()} == {"transformer.h.0", "transformer.h.1"}
    assert block_of(traced("mlp")) == {}
    held = activations(traced("mlp"), example_sizes(traced("mlp")))
    assert (held.blocks, held.checkpointed) == (0, held.saved)


class Picking(nn.Module):
    """A result whose size depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).relu().nonzero().sum() + x.sum()


def test_a_size_that_depends_on_numbers_is_refused() -> None:
    program = trace(Picking(), (torch.randn(3, 6),))
    with pytest.raises(RewriteError, match="cannot be planned") as caught:
        activations(program, example_sizes(program))
    assert "nonzero" in str(caught.value)
