"""What the tests of selective methods share: trained values, and every promise that holds for any program."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from safetensors.torch import save_file
from torch import Tensor

import rewriter
from passes.select import Select
from passes.sparse import own_parameters
from rewriter.formats.onnx import export_onnx
from rewriter.program import Program
from tests.oracle import distance, example, run


def random_scores(program: Program, path: Path, seed: int = 1) -> dict[str, Tensor]:
    """Scores for every parameter, written to a file."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(program.tensor(name).shape, generator=generator) for name in own_parameters(program)}
    save_file(scores, path)
    return scores


def masked(program: Program, folder: Path, **options: object) -> Program:
    """The program with trained changes at random places of every parameter."""
    path = folder / "scores.safetensors"
    random_scores(program, path)
    pass_ = Select(method="fish_mask", scores=path, **options)  # type: ignore[arg-type]
    return moved(rewriter.apply(program, pass_).program)


def moved(program: Program, size: float = 0.3, seed: int = 3) -> Program:
    """The program with random numbers in everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name in program.trainable:
        like = program.tensor(name)
        values[name] = size * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)
    return program.with_tensors(values)


def parameters_sum(program: Program) -> dict[str, Tensor]:
    """Every parameter with its sparse change added number by number, in fp64."""
    result = {}
    for name in own_parameters(program):
        value = program.tensor(name).detach().double().clone()
        home = f"{name}_adapter"
        if f"{home}.delta_values.default" in program.tensors:
            indices = program.tensor(f"{home}.delta_indices.default").tolist()
            for index, change in zip(indices, program.tensor(f"{home}.delta_values.default").tolist(), strict=True):
                value.view(-1)[index] += change
        result[name] = value
    return result


def holds_after_saving(program: Program, name: str, folder: Path) -> None:
    loaded = rewriter.load(program.save(folder / "program.pt2"))
    assert rewriter.text(loaded) == rewriter.text(program)
    assert distance(run(loaded, name), run(program, name)) == 0


def same_in_onnx(program: Program, name: str, folder: Path) -> None:
    path = folder / "model.onnx"
    report = export_onnx(program, path)
    assert report.max_abs_error < 1e-4
    args, kwargs = example(name)
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    feeds = {key: value.numpy() for key, value in zip(report.inputs, given, strict=True)}
    got = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)
    want = run(program, name)
    assert distance([torch.as_tensor(each) for each in got], want) < 1e-4


def undone(before: Program, after: Program) -> None:
    back = rewriter.undo(after)
    assert rewriter.text(back) == rewriter.text(before)
    assert rewriter.diff(back, before).same
