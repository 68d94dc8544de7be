"""The page of a difference: what it holds, where things stand, and that no name can do anything on it."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rewriter
from passes import Lora, Merge, Nf4
from rewriter.diff import Difference
from rewriter.graph import Graph
from rewriter.text import Line, marked
from rewriter.viewer.layout import layouts
from rewriter.viewer.page import model_page, page, write_page
from rewriter.viewer.tree import LARGEST, Group, Item, tree
from rewriter.viewer.treemap import HEIGHT, WIDTH, treemap
from tests.models import traced
from tests.oracle import trained


def adapted(name: str, *targets: str) -> rewriter.Program:
    return trained(rewriter.apply(traced(name), Lora(rank=3, alpha=6, targets=targets)).program)


def changed(name: str = "llama", *targets: str) -> Difference:
    return rewriter.diff(traced(name), adapted(name, *(targets or ("q_proj",))))


def held(text: str) -> dict[str, Any]:
    """What the page's script reads."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    data: dict[str, Any] = json.loads(found)
    return data


def line(key: str, operation: str, *reads: str, path: str = "") -> Line:
    arguments = ", ".join(marked(name) for name in reads)
    return Line(key, path, f"  {marked(key)} = {operation}({arguments})", operation, arguments, "f32[2]")


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_every_operation_is_in_one_place(name: str) -> None:
    targets = {"llama": ("q_proj",), "gpt2": ("c_attn",), "vit": ("all-linear",)}[name]
    difference = changed(name, *targets) if name != "vit" else rewriter.diff(traced(name), traced(name))
    top = tree(difference)
    groups = list(top.groups())
    items = [part for group in groups for part in group.parts if isinstance(part, Item)]
    assert sorted(item.line.key for item in items) == sorted(
        {each.key for side in (difference.before, difference.after) for each in side.lines if each.operation}
    )
    assert len({item.number for item in items}) == len(items)
    assert len({group.number for group in groups}) == len(groups)
    assert all(part.parent is group for group in groups for part in group.parts if isinstance(part, Group))
    assert sum(top.counts.values()) == len(items)
    counts = difference.operations
    assert (top.counts["added"], top.counts["removed"]) == (counts["added"], counts["removed"])
    assert top.counts["changed"] == counts["changed"]


def test_layers_that_are_alike_are_one_fold() -> None:
    top = tree(changed())
    (fold,) = (group for group in top.groups() if group.kind == "fold")
    assert (fold.name, len(fold.parts)) == ("0 … 1", 2)
    one_layer = tree(changed("llama", "model.layers.1.self_attn.q_proj"))
    assert not [group for group in one_layer.groups() if group.kind == "fold"]


def test_a_merge_shows_where_weights_changed() -> None:
    program = adapted("llama", "q_proj")
    data = held(page(rewriter.diff(traced("llama"), rewriter.apply(program, Merge()).program), title="merge"))
    marked_ = [node for node in data["nodes"] if node["status"] != "same"]
    assert [(node["status"], node["operation"]) for node in marked_] == [("weights", "linear")] * 2
    tensor = data["tensors"]["model.layers.0.self_attn.q_proj.weight"]
    assert tensor["status"] == "weights"
    assert 1 < tensor["rank"] <= 3
    bars = torch.tensor(tensor["bars"])
    assert (bars[:3] > 1e-3).all()
    assert (bars[3:] < 1e-5).all()


def test_parts_stand_apart_and_edges_run_downwards() -> None:
    top = tree(changed())
    placed = layouts(top)
    for group in top.groups():
        layout = placed[group.number]
        assert len(layout.places) == len(group.parts)
        for row in {row for row, _ in layout.places}:
            across = sorted(x for r, x in layout.places if r == row)
            assert all(b - a > 170 for a, b in itertools.pairwise(across))
        for a, b, points in layout.edges:
            rows = [layout.places[a][0], *(row for row, _ in points), layout.places[b][0]]
            assert rows == sorted(rows)
            assert rows[0] < rows[-1]
            assert points == [] if rows[-1] - rows[0] == 1 else len(points) == rows[-1] - rows[0] - 1
    assert layouts(tree(changed())) == placed, "the same difference has the same picture"


def test_many_parts_are_chunked() -> None:
    lines = [line(f"%v{i}", "relu", *([f"%v{i - 1}"] if i else [])) for i in range(3 * LARGEST)]
    graph = Graph(tuple(lines), {})
    top = tree(rewriter.diff(graph, graph))
    assert all(len(group.parts) <= LARGEST for group in top.groups())
    assert sum(isinstance(part, Item) for group in top.groups() for part in group.parts) == 3 * LARGEST
    assert [part.name for part in top.parts if isinstance(part, Group)][:2] == ["part 1", "part 2"]


def test_weights_alone_have_a_page_too() -> None:
    one, other = (
        Graph(tuple(each for each in Graph.of(program).lines if each.key.startswith("@")), program.tensors)
        for program in (traced("mlp"), adapted("mlp", "up"))
    )
    data = held(page(rewriter.diff(one, other), title="weights"))
    assert {node["name"] for node in data["nodes"] if node["status"] == "added"} == {
        "@up.lora_A.default",
        "@up.lora_B.default",
    }


def test_the_page_allows_nothing_but_its_own_script_and_style() -> None:
    text = page(changed(), title="a → b")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not re.findall(r"""(src|href)\s*=\s*["']|@import|url\((?!#)|innerHTML|insertAdjacent|eval\(""", text)
    assert len(text) - len(json.dumps(held(text))) < 400_000


HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">{script}\u2028\'"&amp;'


def test_hostile_names_stay_text() -> None:
    old = Graph((line(f"%{HOSTILE}/a", HOSTILE, path=HOSTILE),), {})
    new = Graph((line(f"%{HOSTILE}/b", HOSTILE, path=HOSTILE),), {})
    text = page(rewriter.diff(old, new), title=HOSTILE)
    data = held(text)
    assert {node["operation"] for node in data["nodes"]} == {HOSTILE}
    assert text.count("</script>") == text.count("<script") == 2
    assert "<img" not in text
    assert "alert(1)</" not in text


def test_a_page_is_written_whole_and_never_over_another(tmp_path: Path) -> None:
    path = write_page(changed(), tmp_path / "page.html", title="one")
    first = path.read_bytes()
    with pytest.raises(rewriter.RewriteError, match="already exists"):
        write_page(changed(), path, title="two")
    assert path.read_bytes() == first
    write_page(changed(), path, title="two", overwrite=True)
    assert b"<title>two</title>" in path.read_bytes()


# -- one model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_areas_are_numbers(name: str) -> None:
    program = rewriter.apply(traced(name), Nf4(), Lora(rank=3, targets="all-linear")).program
    found = treemap(program)
    counted = rewriter.report(program).parameters.count
    assert sum(each.numbers for each in found) == counted
    assert sum(each.width * each.height for each in found) == pytest.approx(WIDTH * HEIGHT)
    assert {each.kind for each in found} == {"plain", "adapter", "bits4"}
    for each in found:
        assert each.width * each.height == pytest.approx(WIDTH * HEIGHT * each.numbers / counted)
        assert 0 <= each.x <= each.x + each.width <= WIDTH + 1e-6
        assert 0 <= each.y <= each.y + each.height <= HEIGHT + 1e-6


def test_the_page_of_a_model_knows_its_layers() -> None:
    program = rewriter.apply(traced("llama"), Nf4(), Lora(rank=3, targets="all-linear")).program
    data = held(model_page(program, title="model"))
    assert data["sites"]["model.layers.0.self_attn.k_proj"] == "linear4bit [12, 24]"
    assert data["tensors"]["model.layers.0.mlp.up_proj.weight_packed"]["held"] == "part of a weight in 4 bits (nf4)"
    assert {node["status"] for node in data["nodes"]} == {"same"}
    assert {node["origin"] for node in data["nodes"]} == {"", "lora"}
    assert len(data["treemap"]) > 20
