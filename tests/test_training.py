"""Every method learns to read digits, touches only what it declared, and leaves as ONNX with the numbers it learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

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
from rewriter.cli.registry import registry
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from rewriter.transform import Pass
from tests.digits import batches, cross_entropy, digits, loss_of, traced_digits, train

STEPS = 80
PENALTY_WEIGHT = 1e-6
NOT_TRAINED = {  # passes that end, fold, combine or read what others trained
    "adapterhub",
    "bake",
    "binarise",
    "compose",
    "dequantise",
    "loralib",
    "merge",
    "nf4",
    "peft",
    "prune",
}


@dataclass(frozen=True, slots=True)
class Case:
    """A method with its learning rate, the share of the base model's loss it must reach, and what ends its training."""

    pass_: Pass | Callable[[Path], Pass]  # the latter for a pass that reads a file
    rate: float
    reaches: float
    ends: tuple[Pass, ...] = ()
    exports_in_training: bool = True


def _fish_mask(folder: Path) -> Pass:
    program = traced_digits()
    few = [(images[:16], classes[:16]) for images, classes in batches(4)]

    def loss(scores: Tensor, batch: tuple[Tensor]) -> Tensor:
        (classes,) = (classes for images, classes in few if images is batch[0])
        return F.cross_entropy(scores, classes, reduction="none")

    save_file(fisher(program, [(images,) for images, _ in few], loss), folder / "scores.safetensors")
    return Select(method="fish_mask", scores=folder / "scores.safetensors", density=0.05)


SOME = ("@attention.value", "head")
MERGE, BAKE = (Merge(),), (Bake(),)
CASES: dict[str, Case] = {
    "lora": Case(Lora(dropout=0.05), 1e-2, 0.4, MERGE),
    "loftq": Case(Loftq(), 1e-2, 0.4, MERGE),
    "ia3": Case(Ia3(), 5e-2, 0.5, MERGE),
    "ln_tuning": Case(LayerNormTuning(), 2e-2, 0.5),
    "trainable_tokens": Case(TrainableTokens(token_indices=tuple(range(0, 256, 2))), 3e-2, 0.6, MERGE),
    "loha": Case(Loha(), 1e-2, 0.4, MERGE),
    "lokr": Case(Lokr(), 1e-2, 0.5, MERGE),
    "vera": Case(Vera(), 1e-1, 0.4, MERGE),
    "adalora": Case(Adalora(), 1e-2, 0.4, MERGE),
    "adapter, series": Case(Adapter(bottleneck=8), 1e-2, 0.4),
    "adapter, parallel": Case(Adapter(form="parallel", bottleneck=8, learned_scale=True), 1e-2, 0.4),
    "adapter, layer": Case(Adapter(form="layer", targets="all-linear", bottleneck=4), 1e-2, 0.4),
    "intrinsic": Case(Intrinsic(targets=SOME), 2e-2, 0.6, MERGE),
    "intrinsic, one_hot": Case(Intrinsic(targets=SOME, projection="one_hot", layer_scale=True), 2e-2, 0.6, MERGE),
    "select, bitfit": Case(Select(head=True), 1e-2, 0.5),
    "select, last": Case(Select(method="last", last=1), 3e-3, 0.4),
    "select, paths": Case(Select(method="paths", paths=("blocks.0.*", "head.*")), 3e-3, 0.4),
    "select, fish_mask": Case(_fish_mask, 1e-2, 0.4, MERGE),
    # The penalty is a sum over all gates: no fp32 runtime gives a number of that size to an absolute 1e-4.
    "select, diff_pruning": Case(
        Select(method="diff_pruning", structured=True),
        3e-3,
        0.4,
        (Binarise(density=0.3), Merge()),
        exports_in_training=False,
    ),
    "prompt": Case(Prompt(virtual_tokens=8), 3e-2, 0.6),
    "prompt, lstm": Case(Prompt(virtual_tokens=8, encoder="lstm"), 2e-2, 0.6, BAKE),
    "prompt, mlp": Case(Prompt(virtual_tokens=8, encoder="mlp", template="4 input 4"), 2e-2, 0.6, BAKE),
    "prefix": Case(Prefix(virtual_tokens=6), 1e-1, 0.6),
    "prefix, projection": Case(Prefix(virtual_tokens=6, projection=True), 1e-2, 0.6, BAKE),
}


def _first(result: object) -> Tensor:
    """The scores, without the penalty that comes beside them in training."""
    return result[0] if isinstance(result, tuple) else result  # type: ignore[return-value]


def _loss(module: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    result = module(images)
    if isinstance(result, tuple):
        return F.cross_entropy(result[0], classes) + PENALTY_WEIGHT * result[1]
    return F.cross_entropy(result, classes)


def _apply(case: Case, folder: Path) -> Program:
    pass_ = case.pass_ if isinstance(case.pass_, Pass) else case.pass_(folder)
    return rewriter.apply(traced_digits(), pass_).program


def _in_onnx_runtime(program: Program, folder: Path, expected: list[Tensor]) -> None:
    """The exported program gives the expected scores on real images in batches of two sizes."""
    report = export_onnx(program, folder / "digits.onnx", overwrite=True)
    assert report.max_abs_error < 1e-4
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    (name,) = report.inputs
    for images, scores in zip(_probes(), expected, strict=True):
        (found,) = session.run(None, {name: images.numpy()})
        assert np.abs(found - scores.numpy()).max() < 1e-4


def _probes() -> list[Tensor]:
    """Whole images, and the upper halves of some others."""
    return [digits()[0][:33], digits()[0][40:47, :8].contiguous()]


def test_every_pass_is_trained_or_known_not_to_train() -> None:
    trained = {case.partition(",")[0] for case in CASES}
    assert trained | NOT_TRAINED == set(registry())
    assert not trained & NOT_TRAINED


def test_the_base_reads_mirrored_digits_and_the_task_is_another() -> None:
    program = traced_digits()
    images, classes = digits(mirrored=True)
    assert float((program(images).argmax(-1) == classes).float().mean()) > 0.9
    images, classes = digits()
    assert float((program(images).argmax(-1) == classes).float().mean()) < 0.5


@pytest.mark.parametrize("name", CASES)
def test_a_method_trains_and_leaves_as_onnx(name: str, tmp_path: Path) -> None:
    case, base = CASES[name], traced_digits()
    bits = {key: tensor.detach().clone() for key, tensor in base.tensors.items()}
    program = _apply(case, tmp_path)
    start = {key: tensor.detach().clone() for key, tensor in program.tensors.items()}
    module = program.module()

    train(module, steps=STEPS, rate=case.rate, loss=_loss)

    loss, goal = loss_of(lambda images: _first(module(images))), case.reaches * loss_of(base.module())
    assert loss < goal, f"{loss:.3f}, expected below {goal:.3f}"
    tuned = program.with_weights(module)
    assert list(tuned.tensors) == list(start)
    changed = {key for key, tensor in tuned.tensors.items() if not torch.equal(tensor, start[key])}
    assert changed == set(program.trainable)
    for key, value in module.named_parameters():
        assert key in program.trainable or torch.equal(value, start[key])
    assert all(torch.equal(tensor, bits[key]) for key, tensor in base.tensors.items())
    if program.steps[-1].added:
        assert not changed & set(bits)

    expected = [_first(tuned(images)) for images in _probes()]
    if case.exports_in_training:
        _in_onnx_runtime(tuned, tmp_path, expected)
    if case.ends:
        done = rewriter.apply(tuned, *case.ends).program
        if isinstance(case.ends[-1], Merge):
            assert sorted(done.tensors) == sorted(base.tensors)
        if case.ends[0].law.kind == "free":
            expected = [_first(done(images)) for images in _probes()]
            assert loss_of(done) < goal
        _in_onnx_runtime(done, tmp_path, expected)


@pytest.mark.parametrize("pass_", [Prompt(virtual_tokens=5), Prefix(virtual_tokens=3, positions="keep")])
def test_a_mask_reaches_a_prompt_and_a_prefix_in_onnx_runtime(pass_: Pass, tmp_path: Path) -> None:
    """Patches that are hidden stay hidden behind a prompt or a prefix: their values change no score."""
    program = rewriter.apply(traced_digits(masked=True), pass_).program
    report = export_onnx(program, tmp_path / "digits.onnx")
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    for count, length in ((4, 16), (3, 11)):
        images = digits()[0][:count, :length].contiguous()
        visible = torch.arange(length) < length - torch.arange(count)[:, None]
        scores = program(images, visible)
        assert torch.equal(program(images.where(visible, 7), visible), scores)
        (found,) = session.run(None, {"patches": images.numpy(), "visible": visible.numpy()})
        assert np.abs(found - scores.numpy()).max() < 1e-4


def test_the_loss_of_the_task_is_what_is_minimised() -> None:
    module = traced_digits().module()
    images, classes = batches(1)[0]
    assert torch.equal(_loss(module, images, classes), cross_entropy(module, images, classes))
