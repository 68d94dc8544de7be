"""What must hold for every method that adds an update to a layer's weight; the updates are worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rewriter
from passes import Merge
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from rewriter.transform import Pass
from rewriter.view import Linear
from tests.models import TINY, traced
from tests.oracle import distance, operations, run, traced_double, trained

# the update [o, i] or [o, i / groups, *kernel] of one site, from the tensors of the program
ByHand = Callable[[Any, Mapping[str, Tensor]], Tensor]


def added(program: Program) -> dict[str, Tensor]:
    return {name: program.tensor(name).detach() for step in program.steps for name in step.added}


def filled(program: Program, **options: Any) -> Program:
    """Random values in everything that was added; counts stay what they are."""
    counts = {name: tensor for name, tensor in added(program).items() if "ranknum" in name}
    return trained(program, **options).with_tensors(counts)


def named(site: Any, kind: str, tensors: Mapping[str, Tensor], adapter: str = "default") -> Tensor | None:
    """A parameter of one site; None where the method has no such one there."""
    part = f".{site.part.name}" if isinstance(site, Linear) and site.part else ""
    found = tensors.get(f"{site.path}.{kind}.{adapter}{part}")
    return None if found is None else found.detach()


def check_numbers(name: str, pass_: Pass, by_hand: ByHand) -> None:
    """In fp64: the branch, and its merge, give what the base gives with each weight changed by hand."""
    base = traced_double(name)
    result = rewriter.apply(base, pass_)
    program = filled(result.program)
    weights: dict[str, Tensor] = {}
    for site in result.sites:
        layer = getattr(site, "layer", site)
        change = by_hand(layer, program.tensors)
        if isinstance(layer, Linear) and layer.part is not None:
            whole = change.new_zeros(layer.out_features, layer.in_features)
            whole[layer.part.start : layer.part.stop] = change
            change = whole
        before = weights.get(layer.weight, base.tensor(layer.weight).detach())
        weights[layer.weight] = before + (change.t() if getattr(layer, "transposed", False) else change)
    expected = run(base.with_tensors(weights), name)
    size = max(float(t.abs().max()) for t in expected)
    assert distance(run(base, name), expected) > 1e-3 * size
    assert distance(run(program, name), expected) < 1e-11 * size
    merged = rewriter.apply(program, Merge()).program
    assert operations(merged) == operations(base)
    assert merged.tensors.keys() == base.tensors.keys()
    assert distance(run(merged, name), expected) < 1e-11 * size
    for weight, value in weights.items():
        assert torch.allclose(merged.tensor(weight), value, rtol=0, atol=1e-11 * size)


def check_start(name: str, pass_: Pass) -> None:
    """Every bit of the outputs stays, undoing leaves no difference, and the base's tensors are the same objects."""
    base = traced(name)
    result = rewriter.apply(base, pass_)
    assert pass_.law.kind == "exact"
    assert all(torch.equal(a, b) for a, b in zip(run(base, name), run(result.program, name), strict=True))
    assert all(result.program.tensor(key) is tensor for key, tensor in base.tensors.items())
    back = rewriter.undo(filled(result.program))
    assert str(rewriter.text(back)) == str(rewriter.text(base))
    assert all(back.tensor(key) is tensor for key, tensor in base.tensors.items())
    assert back.tensors.keys() == base.tensors.keys()


def check_files(name: str, pass_: Pass, directory: Path) -> None:
    """A saved program is the same when it is read again, and its ONNX model gives the same numbers."""
    program = filled(rewriter.apply(traced(name), pass_).program)
    again = rewriter.load(program.save(directory / "adapted.pt2"))
    assert str(rewriter.text(again)) == str(rewriter.text(program))
    assert all(torch.equal(a, b) for a, b in zip(run(again, name), run(program, name), strict=True))
    assert [step.name for step in rewriter.undo(again).steps] == []
    assert export_onnx(program, directory / "adapted.onnx").max_abs_error < 1e-4


def check_training(name: str, pass_: Pass, trainable: set[str]) -> None:
    """Gradients reach the declared parameters and nothing else; steps of an optimiser leave the rest as it is."""
    program = rewriter.apply(traced(name), pass_).program
    assert set(program.trainable) == trainable
    module = program.module().eval()  # batch norm counts in training mode
    assert {key for key, p in module.named_parameters() if p.requires_grad} == trainable
    before = {key: value.detach().clone() for key, value in module.state_dict().items()}
    _, args, kwargs = TINY[name]()
    optimiser = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):  # a factor that starts at zero gives the others no gradient at the first step
        optimiser.zero_grad()
        sum(t.square().mean() for t in torch.utils._pytree.tree_leaves(module(*args, **kwargs))).backward()
        optimiser.step()
    assert {key for key, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())} == trainable
    changed = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == trainable
    assert torch.equal(run(program.with_weights(module), name)[0], _first(module.eval()(*args, **kwargs)))


def _first(output: Any) -> Tensor:
    first: Tensor = torch.utils._pytree.tree_leaves(output)[0]
    return first


def check_called_twice(pass_: Pass) -> None:
    """A layer called twice has one set of parameters and two branches, and folds into one weight."""
    torch.manual_seed(0)
    base = rewriter.trace(Twice().eval(), (torch.randn(3, 9),))
    result = rewriter.apply(base, pass_)
    assert len(result.sites) == 1
    program, x = filled(result.program), torch.randn(5, 9)
    merged = rewriter.apply(program, Merge()).program
    assert operations(merged) == operations(base)
    assert distance([program(x)], [base(x)]) > 1e-2
    assert distance([merged(x)], [program(x)]) < 1e-5


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 9)
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(torch.tanh(self.layer(x))))


# -- PEFT ---------------------------------------------------------------------------------------------------------


def check_peft(name: str, config: Any, pass_: Pass, *, plain: bool = False, tolerance: float = 1e-5) -> None:
    """PEFT's model and ours give the same with the same random adapter weights, and have the same parameters.

    With `plain`, PEFT gets GPT-2's projections as `nn.Linear`, the only kind that some of its methods know.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    module, args, kwargs = TINY[name]()
    program = rewriter.apply(traced(name), pass_).program
    theirs = get_peft_model(as_linear(module) if plain else module, config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    prefix = "base_model.model."
    saved = {key.removeprefix(prefix).removeprefix("base_model."): value for key, value in _state(theirs).items()}
    ours = {key: tensor for key, tensor in added(program).items() if "ranknum" not in key}
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: value.shape for key, value in saved.items()}
    assert {f"{prefix}{key.removesuffix('.default')}" for key in program.trainable} <= set(
        get_peft_model_state_dict(theirs)
    )
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(theirs(*args, **kwargs))
    found = run(program.with_tensors(saved), name)
    assert distance(run(traced(name), name), found) > 1e-2
    size = max(1.0, *(float(t.abs().max()) for t in expected))
    assert distance(found, [t for t in expected if isinstance(t, Tensor)]) < tolerance * size


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors of a PEFT model, each once, without what counts or repeats."""
    kinds = ("hada_", "lokr_", "vera_", "lora_")
    repeated = (".vera_A.default", ".vera_B.default")
    return {
        key: value.detach().clone()
        for key, value in model.state_dict().items()
        if any(kind in key for kind in kinds) and (key.count(".") == 2 or not key.endswith(repeated))
    }


def as_linear(module: nn.Module) -> nn.Module:
    """The model with every projection stored as [i, o] turned into an `nn.Linear`."""
    from transformers.pytorch_utils import Conv1D

    for path, child in list(module.named_modules()):
        if isinstance(child, Conv1D):
            inputs, outputs = child.weight.shape
            linear = nn.Linear(inputs, outputs)
            linear.weight, linear.bias = nn.Parameter(child.weight.detach().t().contiguous()), child.bias
            parent, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(parent), leaf, linear)
    return module
