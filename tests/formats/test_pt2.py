"""A saved program comes back bit for bit, with its history, and plain torch opens the file."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from passes.lora import Lora
from rewriter.diff import diff
from rewriter.edit import Edit
from rewriter.errors import RewriteError
from rewriter.formats.pt2 import HISTORY, RESERVED, load, save
from rewriter.program import Origin, Program, Step
from rewriter.text import text
from rewriter.transform import apply
from rewriter.undo import undo
from tests.models import traced

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"llama_tied": ("q_proj", "down_proj"), "gpt2": ("c_attn",), "mlp": ("up", "down")}


def equal(one: Program, other: Program) -> bool:
    """Graph, tensors, constants, steps, originals and every program before a step."""
    return (
        text(one) == text(other)
        and diff(one, other).same
        and one.metadata == other.metadata
        and len(one.steps) == len(other.steps)
        and all(same_step(a, b) for a, b in zip(one.steps, other.steps, strict=True))
        and {frozenset(group) for group in one.tied()} == {frozenset(group) for group in other.tied()}
        and all(type(one.tensors[name]) is type(other.tensors[name]) for name in one.tensors)
        and all(one.tensors[name].requires_grad == other.tensors[name].requires_grad for name in one.tensors)
    )


def same_step(one: Step, other: Step) -> bool:
    plain = [(s.number, s.name, dict(s.options), s.added, s.trainable, [*s.originals]) for s in (one, other)]
    befores = one.before, other.before
    return (
        plain[0] == plain[1]
        and all(torch.equal(tensor, other.originals[name]) for name, tensor in one.originals.items())
        and (befores == (None, None) or (None not in befores and equal(*befores)))  # type: ignore[arg-type]
    )


def adapted(name: str) -> Program:
    program = apply(traced(name), Lora(rank=3, targets=TARGETS[name], init="both"), check=False).program
    return Program(program.exported, program.steps, {"source": name, "sizes": [1, 2.5, None], "név": {"b": 1, "a": 2}})


def selective(program: Program) -> Program:
    """A step that replaces one tensor and declares another one trainable."""
    clone = program.clone()
    edit = Edit(clone, number=len(program.steps) + 1, name="selective")
    names = list(program.parameters())
    edit.set_value(names[0], program.tensor(names[0]) * 2)
    edit.train(names[1])
    edit.finish()
    step = Step(edit.number, edit.name, {}, (), tuple(edit.trainable), edit.originals)
    return Program(clone.exported, (*program.steps, step), clone.metadata)


def without(program: Program, operation: object) -> Program:
    """A step that removes an operation, as a merge does: the tensors only it read go, and a value is replaced."""
    clone = program.clone()
    edit = Edit(clone, number=len(program.steps) + 1, name="without")
    node = next(node for node in clone.graph.nodes if node.target is operation)
    edit.redirect(node, node.args[0])
    edit.erase([node])
    edit.set_value("head.weight", program.tensor("head.weight") * 0.5)
    edit.finish()
    step = Step(edit.number, edit.name, {"operation": str(operation)}, originals=edit.originals, before=program)
    return Program(clone.exported, (*program.steps, step), clone.metadata)


def removed() -> Program:
    """Two removals with an adapter between them: one program inside the history of the other."""
    once = without(adapted("mlp"), aten.relu.default)
    more = Lora(rank=2, targets=("head",), adapter="more", init="both")
    return without(apply(once, more, check=False).program, aten.layer_norm.default)


PROGRAMS: dict[str, Callable[[], Program]] = {
    "as traced": lambda: traced("conv"),
    "as traced, tied": lambda: traced("llama_tied"),
    "adapted, tied": lambda: adapted("llama_tied"),
    "adapted": lambda: adapted("gpt2"),
    "values replaced": lambda: selective(adapted("mlp")),
    "operations removed twice": removed,
}


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_comes_back_and_is_saved_again_byte_for_byte(name: str, tmp_path: Path) -> None:
    case = PROGRAMS[name]()
    first = save(case, tmp_path / "first.pt2")
    again = load(first)
    assert equal(again, case)
    second = save(again, tmp_path / "under another name.bin")
    assert list(members(first)) == list(members(second))
    assert [name for name, data in members(first).items() if members(second)[name] != data] == []
    args, kwargs = case.exported.example_inputs
    ours, theirs = (torch.utils._pytree.tree_leaves(p(*args, **kwargs)) for p in (case, again))
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True) if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("name", ["adapted, tied", "operations removed twice"])
def test_plain_torch_opens_and_runs_the_file(name: str, tmp_path: Path) -> None:
    case = PROGRAMS[name]()
    exported = torch.export.load(save(case, tmp_path / "program.pt2"))
    args, kwargs = case.exported.example_inputs
    ours, theirs = (torch.utils._pytree.tree_leaves(f(*args, **kwargs)) for f in (case, exported.module()))
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True) if isinstance(x, torch.Tensor))


def test_saving_leaves_the_program_as_it_was(tmp_path: Path) -> None:
    program = adapted("llama_tied")
    shown, names = text(program), list(program.exported.state_dict)
    values = [node.meta.get("val") for node in program.graph.nodes]
    save(program, tmp_path / "program.pt2")
    assert (text(program), list(program.exported.state_dict)) == (shown, names)
    assert all(node.meta.get("val") is value for node, value in zip(program.graph.nodes, values, strict=True))


def test_undo_after_loading_gives_the_program_that_was_saved_before(tmp_path: Path) -> None:
    base = traced("mlp")
    program = load(save(removed(), tmp_path / "removed.pt2"))
    while program.steps:
        program = undo(program)
    assert text(program) == text(base)
    assert diff(program, base).same


def test_placeholders_know_their_step_again(tmp_path: Path) -> None:
    program = load(save(adapted("mlp"), tmp_path / "program.pt2"))
    origins = {program.parameter_name(n): Origin.of(n) for n in program.graph.nodes if n.op == "placeholder"}
    assert {name for name, origin in origins.items() if origin} == {*program.steps[0].added}


def test_tensors_that_are_there_anyway_are_not_written_twice(tmp_path: Path) -> None:
    base, after = traced("mlp"), selective(traced("mlp"))
    paths = [save(base, tmp_path / "base.pt2"), save(after, tmp_path / "after.pt2")]
    weights = [[name for name in members(path) if "/data/weights/weight_" in name] for path in paths]
    assert len(weights[1]) == len(weights[0]) + 1  # the replaced one; the one that only trains is still there
    once = without(adapted("mlp"), aten.layer_norm.default)
    record = json.loads(members(save(once, tmp_path / "once.pt2"))[f"archive/extra/{HISTORY}"])
    held = record["steps"][1]["before"]["tensors"]
    gone = {"norm.weight", "norm.bias", "head.weight"}
    assert {name for name, place in held.items() if place != name} == gone
    assert record["steps"][1]["originals"] == {"head.weight": held["head.weight"]}
    assert len({place for place in held.values() if place.startswith(RESERVED)}) == len(gone)
    tied = members(save(traced("llama_tied"), tmp_path / "tied.pt2"))
    untied = members(save(traced("llama"), tmp_path / "untied.pt2"))
    count = [sum("/data/weights/weight_" in name for name in each) for each in (tied, untied)]
    assert count[0] == count[1] - 1


def test_names_that_were_one_tensor_are_one_tensor_again(tmp_path: Path) -> None:
    program = load(save(traced("llama_tied"), tmp_path / "tied.pt2"))
    assert program.tensor("lm_head.weight") is program.tensor("model.embed_tokens.weight")
    assert not [name for name in program.exported.state_dict if name.startswith(RESERVED)]


def test_the_bytes_are_the_same_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.formats.test_pt2 import removed; from rewriter.formats.pt2 "
        "import save; save(removed(), Path(sys.argv[1]))"
    )
    path = tmp_path / "theirs.pt2"
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True, capture_output=True)
    assert path.read_bytes() == save(removed(), tmp_path / "ours.pt2").read_bytes()


def test_a_file_of_plain_torch_is_a_program_without_history(tmp_path: Path) -> None:
    program = traced("mlp")
    torch.export.save(program.exported, tmp_path / "plain.pt2")
    loaded = load(tmp_path / "plain.pt2")
    assert loaded.steps == ()
    assert equal(loaded, program)


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    path = save(traced("mlp"), tmp_path / "program.pt2")
    before = path.read_bytes()
    with pytest.raises(RewriteError, match="is an input of this run"):
        save(adapted("mlp"), path, inputs=[path])
    with pytest.raises(RewriteError, match="already exists"):
        save(adapted("mlp"), path, overwrite=False)
    assert path.read_bytes() == before
    assert equal(load(save(adapted("mlp"), path)), adapted("mlp"))


def test_what_is_not_plain_data_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    program = Program(traced("mlp").exported, (), {"device": torch.device("cpu")})
    with pytest.raises(RewriteError, match="not plain data"):
        save(program, tmp_path / "program.pt2")
    assert list(tmp_path.iterdir()) == []


def rewritten(program: Program, path: Path, change: Callable[[dict[str, object]], object]) -> Path:
    """A file whose history was changed by hand."""
    record = json.loads(members(save(program, path))[f"archive/extra/{HISTORY}"])
    change(record)
    torch.export.save(program.exported, path, extra_files={HISTORY: json.dumps(record)})
    return path


def test_a_damaged_history_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    program = selective(traced("mlp"))
    path = rewritten(program, tmp_path / "a.pt2", lambda record: record["steps"][0].pop("added"))  # type: ignore[index]
    with pytest.raises(RewriteError, match=r"the history in .* is damaged") as refused:
        load(path)
    assert "torch.export.load" in refused.value.fix
    path = rewritten(program, tmp_path / "b.pt2", lambda record: None)  # names a tensor that is not in the file
    with pytest.raises(RewriteError, match=r"rewriter\.original\.1\.up\.weight"):
        load(path)


def test_a_history_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = rewritten(traced("mlp"), tmp_path / "a.pt2", lambda record: record.update(schema=99, version="9.9"))
    with pytest.raises(RewriteError, match="history of schema 99") as refused:
        load(path)
    assert "9.9" in str(refused.value)


def test_a_reserved_name_in_a_model_is_refused(tmp_path: Path) -> None:
    program = traced("mlp").clone()
    program.exported.state_dict["rewriter.original.1.x"] = torch.ones(2)
    with pytest.raises(RewriteError, match="reserved name"):
        save(program, tmp_path / "program.pt2")
