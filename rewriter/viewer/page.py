"""A difference -> one page that opens from disk: no network, nothing that a name in a file could start.

Positions are computed here (see `layout`); the page's script draws and navigates. Names reach the page as JSON and as
text nodes, and a content security policy allows no script and no style but the page's own, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rewriter.diff import Difference, diff
from rewriter.formats.atomic import write_file
from rewriter.program import Program
from rewriter.quantised import held_numbers, weight_like
from rewriter.report import report
from rewriter.tensor_changes import singular_values
from rewriter.view import layers
from rewriter.viewer.layout import layouts
from rewriter.viewer.tree import Group, Item, tree
from rewriter.viewer.treemap import treemap

FILES = Path(__file__).parent
PLACE = re.compile(r"\{(\w+)\}")
DRAWN = 1500  # parts that are drawn when the page opens, at most
BARS = 32
CHARTS = 400  # changed tensors that get a chart, at most
AREAS = ("area: how many numbers a module holds", "green: added by a pass", "amber: in 4 bits")
LEGEND = (("added", "+ added"), ("removed", "− removed"), ("changed", "~ changed"), ("weights", "≈ weights changed"))


def write_page(difference: Difference, path: Path, *, title: str, overwrite: bool = False) -> Path:
    """Write the page of a difference; the file appears complete or not at all."""
    return _write(path, page(difference, title=title), overwrite)


def write_model_page(program: Program, path: Path, *, title: str, overwrite: bool = False) -> Path:
    """Write the page of one model; the file appears complete or not at all."""
    return _write(path, model_page(program, title=title), overwrite)


def page(difference: Difference, *, title: str) -> str:
    """The page of a difference as HTML."""
    operations = ", ".join(f"{count} {word}" for word, count in difference.operations.items())
    overview = f"<h2>What changed</h2><pre>{html.escape(difference.summary())}</pre>"
    legend = "".join(f'<span class="{kind}-text">{text}</span>' for kind, text in LEGEND)
    return _page(_data(difference), title, f"operations: {operations}", overview, _switches(), legend)


def model_page(program: Program, *, title: str) -> str:
    """The page of one model as HTML: its graph, its layers by view, and its parameters as areas."""
    data = _data(diff(program, program))
    data["sites"] = {
        site.path: f"{site.kind} {list(weight_like(program, site).shape)}" for site in layers(program).values()
    }
    for name, (kind, _) in held_numbers(program).items():
        data["tensors"][name]["held"] = f"part of a weight in 4 bits ({kind})"
    data["treemap"] = [
        [*(round(value, 2) for value in (each.x, each.y, each.width, each.height)), each.path, each.numbers, each.kind]
        for each in treemap(program)
    ]
    overview = (
        f'<h2>Parameters</h2><div id="treemap"></div><pre class="wide">{html.escape(str(report(program)))}</pre>'
        f"<h3>Passes</h3><pre>{html.escape(_steps(program))}</pre>"
    )
    summary = f"{sum(node['operation'] != '' for node in data['nodes']):,} operations"
    return _page(data, title, summary, overview, "", "".join(f"<span>{each}</span>" for each in AREAS))


def _page(data: Mapping[str, Any], title: str, summary: str, overview: str, switches: str, legend: str) -> str:
    style, script = ((FILES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(title),
        "style": style,
        "script": script,
        "summary": html.escape(summary),
        "switches": switches,
        "legend": legend,
        "overview": overview,
        "data": _json(data),
    }
    template = (FILES / "page.html").read_text(encoding="utf-8")
    return PLACE.sub(lambda place: parts[place[1]], template)  # in one pass: what was put in is not looked at again


def _switches() -> str:
    return (
        " ".join(
            f'<button data-side="{side}" aria-pressed="{str(side == "both").lower()}" title="{key}">{side}</button>'
            for side, key in zip(("both", "before", "after"), "xba", strict=True)
        )
        + ' <button data-act="next" title="n">next change</button>'
    )


def _steps(program: Program) -> str:
    lines = []
    for step in program.steps:
        options = ", ".join(f"{name}={value}" for name, value in step.options.items())
        lines.append(f"{step.number} {step.name}: {options or 'defaults'}")
    return "\n".join(lines) or "no pass was applied"


def _write(path: Path, text: str, overwrite: bool) -> Path:
    with write_file(path, overwrite=overwrite) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(data: Mapping[str, Any]) -> str:
    """JSON that ends no script element, whatever it holds."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _data(difference: Difference) -> dict[str, Any]:
    top = tree(difference)
    groups = list(top.groups())
    items = sorted((part for group in groups for part in group.parts if isinstance(part, Item)), key=lambda i: i.number)
    number = {item.line.key: item.number for item in items}
    tensors = _tensors(difference)
    placed, inside = layouts(top), _by_module(tensors)
    return {
        "schema": 1,
        "nodes": [_node(item, number, tensors, difference) for item in items],
        "groups": [
            {
                "id": group.number,
                "name": group.name,
                "path": group.path,
                "kind": group.kind,
                "parent": group.parent.number if group.parent else None,
                "counts": dict(group.counts),
                "parts": [[int(isinstance(part, Group)), part.number] for part in group.parts],
                "places": [[row, round(x, 1)] for row, x in placed[group.number].places],
                "edges": [
                    [a, b, [[row, round(x, 1)] for row, x in points]] for a, b, points in placed[group.number].edges
                ],
                "tensors": inside.get(group.path, []) if group.kind == "module" else [],
            }
            for group in groups
        ],
        "tensors": tensors,
        "open": sorted(_open(top)),
    }


def _by_module(tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """The tensors that are not the same on both sides, by every module that they are in."""
    found: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        path = name
        while path and tensor["status"] != "same":
            path = path.rpartition(".")[0]
            found.setdefault(path, []).append(name)
    return found


def _node(item: Item, number: Mapping[str, int], tensors: Mapping[str, Any], difference: Difference) -> dict[str, Any]:
    line = item.after or item.before
    assert line is not None
    reads = list(dict.fromkeys(name for each in (item.before, item.after) if each for name in each.reads))
    own = [line.key, *reads] if line.key.startswith("@") else reads
    before = item.before.text.strip() if item.before is not None and item.change != "same" else ""
    source = line.node.meta.get("stack_trace", "") if line.node is not None else ""
    return {
        "name": line.key,
        "label": line.key.rpartition("/")[2],
        "operation": line.operation,
        "path": line.path,
        "type": line.type,
        "status": item.status,
        "change": item.change,
        "how": difference.how.get(line.key) if item.before is not None and item.after is not None else None,
        "before": before,
        "after": item.after.text.strip() if item.after is not None else "",
        "origin": line.origin,
        "options": difference.after.passes.get(line.origin) or difference.before.passes.get(line.origin) or "",
        "source": _frame(source),
        "reads": [number[name] for name in reads if name in number and number[name] != item.number],
        "tensors": [name[1:] for name in own if name[1:] in tensors],
    }


def _frame(trace: str) -> str:
    """The innermost line of a stack trace, without the folder it was in: `modeling_llama.py", line 240, in forward`."""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    return frames[-1].replace("\\", "/").rpartition("/")[2].replace('"', "") if frames else ""


def _tensors(difference: Difference) -> dict[str, Any]:
    old, new = difference.before, difference.after
    types = {line.key[1:]: line.type for graph in (old, new) for line in graph.lines if line.key.startswith("@")}
    changed = {tensor.name: tensor for tensor in difference.changed}
    found: dict[str, Any] = {}
    for name, kind in types.items():
        status = "same"
        if name in changed:
            status = "weights"
        elif name not in new.tensors or name not in old.tensors:
            status = "removed" if name in old.tensors else "added"
        found[name] = {"type": kind, "status": status}
    for place, tensor in enumerate(changed.values()):
        entry = found.setdefault(tensor.name, {"status": "weights"})
        entry |= {"type": tensor.after, "before": tensor.before if tensor.before != tensor.after else ""}
        amounts = tensor.to_json()
        entry |= {"largest": amounts["largest_change"], "relative": amounts["relative_change"]}
        entry |= {"share": tensor.share, "rank": tensor.effective_rank}
        if tensor.largest is not None and place < CHARTS:
            entry |= _chart(old.tensors[tensor.name], new.tensors[tensor.name])
    return found


def _chart(one: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    """The largest singular values of the change, or where it is no matrix the histogram of its numbers."""
    values = singular_values(one, other) if one.is_floating_point() else None
    if values is not None:
        return {"bars": [float(f"{value:.3g}") for value in values[:BARS]], "bars_of": "singular values of the change"}
    if one.is_complex() or not one.numel():
        return {}
    change = other.detach().double().reshape(-1) - one.detach().double().reshape(-1)
    change = change[change.isfinite()]
    if not change.numel():
        return {}
    least, most = float(change.min()), float(change.max())
    counts = torch.histc(change.float(), BARS, least, most).tolist()
    return {"bars": counts, "bars_of": f"how often a number changed by {least:.3g} … {most:.3g}"}


def _open(top: Group) -> set[int]:
    """The groups that are open at first: those with changes, of modules that are alike the first."""
    found, drawn, waiting = {top.number}, len(top.parts), deque([top])
    changes = any(kind != "same" for kind in top.counts)
    while waiting:
        group = waiting.popleft()
        inner = [part for part in group.parts if isinstance(part, Group)]
        for part in inner[:1] if group.kind == "fold" else inner:
            wanted = any(kind != "same" for kind in part.counts) if changes else part.path.count(".") < 2
            if wanted and drawn + len(part.parts) <= DRAWN:
                found.add(part.number)
                drawn += len(part.parts)
                waiting.append(part)
    return found
