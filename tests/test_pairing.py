"""Which operation of one graph is which of another: measured against cases whose truth is known."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

import rewriter
from passes import Lora, Merge
from rewriter.formats import onnx_text
from rewriter.formats.onnx import export_onnx
from rewriter.formats.onnx_graph import convert
from rewriter.graph import Graph
from rewriter.pairing import Pair, counts, pairs
from rewriter.text import Line, marked
from tests.models import TINY, traced
from tests.oracle import trained


def adapted(name: str, *targets: str) -> rewriter.Program:
    return trained(rewriter.apply(traced(name), Lora(rank=3, alpha=6, targets=targets)).program)


def scrambled(graph: Graph, seed: int = 0) -> tuple[Graph, dict[str, str]]:
    """The same graph without module paths, its operations under meaningless names and in another order that works."""
    dice = random.Random(seed)
    operations = [line for line in graph.lines if line.operation]
    names = [f"%v{i}" for i in range(len(operations))]
    dice.shuffle(names)
    truth = {line.key: name for line, name in zip(operations, names, strict=True)}
    waiting, done, ordered = list(operations), {line.key for line in graph.lines} - set(truth), []
    while waiting:
        ready = [line for line in waiting if all(name.split(".")[0] in done or name in done for name in line.reads)]
        chosen = dice.choice(ready[:5])
        waiting.remove(chosen)
        done.add(chosen.key)
        ordered.append(chosen)
    heads = [line for line in graph.lines if not line.operation and line.key != "return"]
    tails = [line for line in graph.lines if line.key == "return"]
    lines = [replace(line.renamed(truth), path="") for line in [*heads, *ordered, *tails]]
    return Graph(tuple(lines), graph.tensors, stable_names=False), truth


def right(found: list[Pair], truth: dict[str, str]) -> float:
    """The share of the operations with a counterpart that are paired with it."""
    made = {pair.before.key: pair.after.key for pair in found}
    return sum(made.get(old) == new for old, new in truth.items()) / len(truth)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_a_graph_finds_itself_under_other_names(name: str) -> None:
    graph = Graph.of(traced(name))
    other, truth = scrambled(graph)
    found = pairs(graph.lines, other.lines, stable_names=False)
    # operations that nothing tells apart (two casts of one value) may be exchanged
    assert right(found, truth) > 0.97
    assert len(found) == len(graph.lines)
    assert rewriter.diff(graph, other).operations["added"] == 0


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_insertions_do_not_hide_what_stays(name: str) -> None:
    base, targets = Graph.of(traced(name)), {"llama": ("q_proj", "down_proj"), "bert": ("query", "dense")}[name]
    after = Graph.of(adapted(name, *targets))
    other, names = scrambled(after)
    truth = {line.key: names[line.key] for line in base.lines if line.operation}
    found = pairs(base.lines, other.lines, stable_names=False)
    assert right(found, truth) > 0.95
    inserted = {names[line.key] for line in after.lines if line.operation and line.key not in truth}
    assert sum(pair.after.key in inserted for pair in found) <= 0.05 * len(truth)


def test_two_exporters_of_one_model(tmp_path: Path) -> None:
    """Our file and the one of transformers; the truth is the module and the kind of an operation, hidden from both."""
    import onnx_ir as ir
    from transformers.exporters import OnnxConfig, OnnxExporter

    module, args, inputs = TINY["llama"]()
    export_onnx(rewriter.trace(module, args, inputs), tmp_path / "ours.onnx")
    exported = OnnxExporter().export(module.eval(), dict(inputs), OnnxConfig(dynamic=True))
    ir.save(exported.program, tmp_path / "theirs.onnx")
    ours, theirs = (onnx_text.read_graph(tmp_path / f"{name}.onnx") for name in ("ours", "theirs"))
    truth = _in_modules(ours, theirs)
    assert len(truth) > 120
    hidden = [[replace(line, path="") for line in graph.lines] for graph in (ours, theirs)]
    assert right(pairs(*hidden, stable_names=False), truth) >= 0.95
    assert right(pairs(ours.lines, theirs.lines, stable_names=False), truth) >= 0.98


def _in_modules(one: Graph, other: Graph) -> dict[str, str]:
    """The operations of which a module has as many in either graph, in order."""

    def groups(graph: Graph) -> dict[tuple[str, str], list[str]]:
        found: dict[tuple[str, str], list[str]] = {}
        for line in graph.lines:
            if line.operation:
                found.setdefault((line.path, line.operation), []).append(line.key)
        return found

    mine, yours = groups(one), groups(other)
    both = [(mine[key], yours[key]) for key in mine if len(mine[key]) == len(yours.get(key, ()))]
    return {old: new for olds, news in both for old, new in zip(olds, news, strict=True)}


def test_names_of_programs_are_enough() -> None:
    found = pairs(Graph.of(traced("llama")).lines, Graph.of(adapted("llama", "q_proj")).lines)
    assert {pair.how for pair in found} == {"name"}
    assert all(pair.before.key == pair.after.key for pair in found)


def test_what_has_a_pair_has_one() -> None:
    ours = onnx_text.graph(convert(traced("llama"))[0])
    other, _ = scrambled(onnx_text.graph(convert(adapted("llama", "q_proj", "v_proj"))[0]), seed=3)
    found = pairs(ours.lines, other.lines, stable_names=False)
    assert len({pair.before.key for pair in found}) == len({pair.after.key for pair in found}) == len(found)
    assert all(pair.before.operation == pair.after.operation for pair in found)
    assert sum(counts(found).values()) == sum(bool(pair.after.operation) for pair in found)
    assert set(counts(found)) <= {"name", "parameter", "structure", "neighbour", "path"}


def test_a_long_chain_needs_no_recursion() -> None:
    def chain(count: int, added: int) -> list[Line]:
        lines, last = [Line("%x", "", f"input {marked('%x')}", type="f32[2]")], "%x"
        for i in range(count):
            key, kind = f"%{added}v{i}", "relu" if i == added else ("add", "mul", "exp")[i * i % 3]
            lines.append(Line(key, "", f"  {marked(key)} = {kind}({marked(last)})", kind, marked(last), "f32[2]"))
            last = key
        return lines

    found = pairs(chain(3000, 0), chain(3000, 1500), stable_names=False)
    assert len(found) > 2990


# -- ONNX -------------------------------------------------------------------------------------------------------------


def test_a_merge_changes_weights_and_no_structure() -> None:
    base, program = traced("llama"), adapted("llama", "q_proj", "v_proj")
    merged = rewriter.apply(program, Merge()).program
    one, other, unmerged = (onnx_text.graph(convert(each)[0]) for each in (base, merged, program))
    difference = rewriter.diff(one, other)
    assert difference.operations == {"added": 0, "removed": 0, "changed": 0}
    assert [each.name for each in difference.changed] == [
        f"model.layers.{i}.self_attn.{name}.weight" for i in range(2) for name in ("q_proj", "v_proj")
    ]
    inserted = rewriter.diff(one, unmerged)
    # for each of the four: transpose A, multiply, transpose B, multiply, scale, add
    assert inserted.operations == {"added": 24, "removed": 0, "changed": 4}
    assert all("lora_" in name for name in inserted.added.names)
    assert not inserted.removed.names
    assert not inserted.changed
    back = rewriter.diff(unmerged, one)
    assert back.operations == {"added": 0, "removed": 24, "changed": 4}
    assert back.removed.names == inserted.added.names


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_an_export_does_not_differ_from_its_program(name: str, tmp_path: Path) -> None:
    export_onnx(traced(name), tmp_path / "model.onnx", external_data=name == "gpt2")
    graph = onnx_text.read_graph(tmp_path / "model.onnx")
    assert rewriter.diff(graph, graph).same
    assert rewriter.diff(onnx_text.graph(convert(traced(name))[0]), graph).same
    paths = {line.path for line in Graph.of(traced(name)).lines if line.path}
    assert {line.path for line in graph.lines if line.operation and line.path} <= paths
