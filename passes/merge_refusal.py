"""Why a merge is refused: what stands in the way, which pass put it there, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from passes.diff_pruning import KINDS
from rewriter.errors import RewriteError
from rewriter.find import Miss
from rewriter.program import Origin, Program, Step, module_path
from rewriter.region import Fold
from rewriter.text import line

Left = tuple[str, Node, str]  # a parameter that no region folds, the operation that breaks the proof, and why
SHOWN, LONGEST = 5, 160  # lines of evidence, and characters of an operation's line


def stuck(
    program: Program,
    rest: Sequence[Left],
    kept: Iterable[str],
    folded: Sequence[frozenset[str]],
    keep: Sequence[str] = (),
) -> RewriteError:
    """The error for parameters that cannot be folded, apart from the `kept` ones of the passes that `keep` names.

    `folded` are the parameters of those that can, site by site.
    """
    owners = {name: step for step in program.steps for name in step.added}
    names = [*(name for name, _, _ in rest), *kept]
    numbers = {owners[name].number for name in names if name in owners}
    below = {name: under for name, _, _ in rest if (under := _below(program, owners[name], name, numbers))}
    gates = [name for name in names if name.rpartition(".")[0].endswith(tuple(f".{kind}" for kind in KINDS))]
    open_gates = [owners[name] for name in gates if name not in kept or owners[name] in below.values()]
    if open_gates:
        return _open(open_gates[0])
    name, node, reason = next((each for each in rest if each[0] not in below), rest[0])
    made, under = owners[name], below.get(name)
    if under is not None:
        return RewriteError(
            f"{name} cannot be merged: {_named(made)} acts on a sum with {_named(under)}, which does not fold",
            evidence=capped([f"also {other}" for other in below if other != name]),
            fix=f"Apply {made.name} before {under.name} (undo both first), or add {_keep([*keep, made.name])}.",
        )
    culprits = {owners[other].number: owners[other] for other, _, _ in rest if other not in below}.values()
    above = sorted({owners[other].number: owners[other].name for other in below}.items())
    places = {module_path(at): other for other, at, _ in reversed(rest) if other not in below}
    others = [f"also {other}" for path, other in reversed(places.items()) if path != module_path(node)]
    left = frozenset(name for step in culprits for name in step.added)
    kept_names = _keep([*keep, *(step.name for step in culprits)])
    fix = "Nothing else is there to merge: export the program with its branch, or undo it before merging."
    if above:
        fix = f"Apply {above[0][1]} before {made.name} (undo both first), and merge with {kept_names}."
    elif any(reads and reads.isdisjoint(left) for reads in folded):
        fix = f"Merge the rest with {kept_names}, export the program with its branch, or undo it before merging."
    return RewriteError(
        f"{name} cannot be merged: {reason}",
        evidence=[
            _short(line(program, node)),
            *(f"{_named(owners[n])} acts on a sum with it: {n}" for n in list(below)[:1]),
            *capped(others),
        ],
        fix=fix,
    )


def nothing(program: Program, kept: Iterable[str], missed: Sequence[Miss]) -> RewriteError:
    """The error for a program in which no update stands beside a weight."""
    added = {name for step in program.steps for name in step.added}
    trained = {name: step for step in program.steps for name in step.trainable if name not in added}
    merged = [step.number for step in program.steps if step.name == "merge"]
    left = {step.name for step in program.steps if not set(kept).isdisjoint(step.added)}
    evidence = [f"merged already by step {merged[-1]}"] if merged else []
    if left:
        return RewriteError(
            f"nothing to merge beside {', '.join(sorted(left))}, which keep leaves in the graph",
            evidence=evidence,
            fix="Export the program with its branch, or undo it.",
        )
    if trained:
        made = ", ".join(dict.fromkeys(step.name for step in trained.values()))
        return RewriteError(
            f"nothing to merge: what {made} trains are weights of the model itself, and they hold the trained values",
            evidence=[*evidence, *capped(list(trained))],
            fix="There is nothing to fold: use or export the program as it is.",
        )
    return RewriteError(
        "nothing to merge",
        evidence=[*evidence, *capped([f"{miss.path}: {miss.reason}" for miss in missed])],
        fix="A merge needs an update beside a base weight; `rewriter inspect MODEL` lists the steps.",
    )


def nothing_but_4bit(beside: Sequence[Fold]) -> RewriteError:
    """The error for a program whose updates all lie beside 4-bit weights, when those stay as they are."""
    return RewriteError(
        "nothing to merge: every update lies beside a weight held in 4 bits, which `keep` leaves as it is",
        evidence=capped([fold.path for fold in beside]),
        fix="Merge with --nf4 dequantise or --nf4 requantise, or export the program with its branches.",
    )


def capped(lines: list[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"… and {more} more"] if more > 0 else [])]


def _below(program: Program, made: Step, name: str, numbers: set[int]) -> Step | None:
    """The lowest of the steps `numbers` whose values the sum with a parameter's update is made of."""
    by_name = {node.name: node for node in program.graph.nodes}
    steps = {step.number: step for step in program.steps}
    found: Step | None = None
    node = _sum(made, program.placeholder(name))
    origin = Origin.of(node) if node is not None else None
    while origin is not None and origin.stands_for in by_name:
        node = by_name[origin.stands_for]
        origin = Origin.of(node)
        reached = [origin] if origin else [Origin.of(n) for n in node.all_input_nodes if n.op != "placeholder"]
        for each in reached:  # what stands below, and the computed weight of the layer at the bottom
            if each is not None and each.step in numbers - {made.number}:
                found = steps.get(each.step, found)
    return found


def _sum(made: Step, start: Node) -> Node | None:
    """The value with a parameter's update that a step put in the place of what was there."""
    todo, seen = [start], {start}
    while todo:
        node = todo.pop(0)
        origin = Origin.of(node)
        if origin is not None and origin.stands_for is not None:
            return node
        for user in node.users:
            own = Origin.of(user)
            if own is not None and own.step == made.number and user not in seen:
                seen.add(user)
                todo.append(user)
    return None


def _open(step: Step) -> RewriteError:
    adapter = step.options.get("adapter", "default")
    named = "" if adapter == "default" else f" --adapter-name {adapter}"
    return RewriteError(
        f"diff pruning's gates are open, so what {_named(step)} added cannot be merged",
        fix=f"Close them with `--pass binarise{named}` first; what it keeps merges.",
    )


def _named(step: Step) -> str:
    return f"{step.name} (step {step.number})"


def _keep(names: Iterable[str]) -> str:
    return f"--keep {','.join(dict.fromkeys(names))}"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
