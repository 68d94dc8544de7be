"""Taking a step back, by provenance: what it added goes, what it replaced returns; nothing is computed."""

from __future__ import annotations

from torch.fx import Node

from rewriter.edit import remove_tensors, settle
from rewriter.errors import RewriteError, UsageError, closest
from rewriter.program import Origin, Program, Step
from rewriter.text import line


def undo(program: Program, step: int | str | None = None) -> Program:
    """The program without a step: the last one, the one of a number, or the last one of a pass name.

        undo(apply(program, pass)) -> program, in text and in every bit

    A step that removed operations kept the program before it and can only be undone as the last one; that program
    comes back as it was. Any other step can be undone when no later step builds on it.

    Raises `UsageError` for an unknown step, for one that later steps build on, and for one that kept nothing.
    """
    chosen = _choose(program, step)
    if chosen.final:
        raise UsageError(
            f"{_describe(chosen)} cannot be undone: the weights it replaced were not kept",
            fix="Start again from the model, or keep them when applying, as `--pass nf4 --keep-original` does.",
        )
    _refuse_buried(program, chosen)
    if chosen.before is not None:
        return chosen.before
    return _without(program, chosen)


def _choose(program: Program, step: int | str | None) -> Step:
    if not program.steps:
        raise UsageError("no pass was applied to this program", fix="There is nothing to undo.")
    if step is None:
        return program.steps[-1]
    for each in reversed(program.steps):
        if step in (each.number, each.name):
            return each
    names = [each.name for each in program.steps]
    near = closest(str(step), names, 1)
    raise UsageError(
        f"the program has no step {step!r}",
        evidence=[_describe(each) for each in program.steps],
        fix=f"Did you mean {near[0]!r}?" if near else "Give a number or a name of this list.",
    )


def _describe(step: Step) -> str:
    return f"step {step.number}: {step.name}"


def _refuse_buried(program: Program, chosen: Step) -> None:
    """Refuse a step that a later one may have removed, or whose tensors a later one trains or replaced."""
    later = [step for step in program.steps if step.number > chosen.number]
    touched = {*chosen.added, *chosen.originals}
    evidence = []
    for step in later:
        shared = sorted(touched & {*step.originals, *step.trainable})
        if chosen.before is not None:
            evidence.append(f"{_describe(step)} came after it")
        elif step.before is not None:
            evidence.append(f"{_describe(step)} removed operations")
        elif shared:
            evidence.append(f"{_describe(step)} also changed {', '.join(shared[:5])}")
    if evidence:
        raise _buried(chosen, evidence)


def _buried(chosen: Step, evidence: list[str]) -> UsageError:
    return UsageError(
        f"{_describe(chosen)} cannot be undone before later steps", evidence=evidence, fix="Undo the later steps first."
    )


def _without(program: Program, chosen: Step) -> Program:
    clone = program.clone()
    gone = [node for node in clone.graph.nodes if _step_of(node) == chosen.number and node.op != "placeholder"]
    stands_for = _resolved(clone, gone)
    _refuse_users(clone, chosen, gone, stands_for)
    _restand(clone, {node.name: base.name for node, base in stands_for.items()}, set(gone))
    for node, base in stands_for.items():
        node.replace_all_uses_with(base)
    for node in gone:  # now only nodes of the step read nodes of the step
        node.args, node.kwargs = (), {}
    for node in gone:
        clone.graph.erase_node(node)
    remove_tensors(clone, set(chosen.added))
    for name, tensor in chosen.originals.items():
        home = clone.exported.constants if name in clone.exported.constants else clone.exported.state_dict
        home[name] = tensor
    settle(clone)
    clone.graph.lint()
    clone.exported.validate()
    return Program(clone.exported, tuple(step for step in program.steps if step is not chosen), program.metadata)


def _step_of(node: Node) -> int | None:
    origin = Origin.of(node)
    return origin.step if origin else None


def _resolved(program: Program, gone: list[Node]) -> dict[Node, Node]:
    """For every node of the step that stands for another one: the node that stays in its place."""
    by_name = {node.name: node for node in program.graph.nodes}
    removed = set(gone)
    found: dict[Node, Node] = {}
    for node in gone:
        origin = Origin.of(node)
        base: Node | None = node
        while base in removed and origin is not None and origin.stands_for is not None:
            base = by_name.get(origin.stands_for)
            origin = Origin.of(base) if base is not None else None
        if base is None:
            raise RewriteError(
                f"{line(program, node)} stands for an operation that is not there any more",
                fix="Load the program from before this step.",
            )
        if base not in removed:
            found[node] = _risen(program, base, node, removed)
    return found


def _risen(program: Program, base: Node, end: Node, removed: set[Node]) -> Node:
    """The base, or the last value before `end` that a later step put in the base's place: `end` is made of that."""
    names, last = {base.name}, base
    for node in program.graph.nodes:
        origin = Origin.of(node)
        if node < end and node not in removed and origin is not None and origin.stands_for in names:
            names.add(node.name)
            last = node
    return last


def _refuse_users(program: Program, chosen: Step, gone: list[Node], stands_for: dict[Node, Node]) -> None:
    """Refuse when an operation that stays reads a value of the step that stands for nothing else."""
    removed = set(gone)
    added = [node for node in program.graph.nodes if program.parameter_name(node) in chosen.added]
    evidence = []
    for node in [*gone, *added]:
        for user in node.users:
            if user not in removed and node not in stands_for:
                name = next((_describe(s) for s in program.steps if s.number == _step_of(user)), "the program")
                evidence.append(f"{name} uses it: {line(program, user)}")
    if evidence:
        raise _buried(chosen, evidence[:5])


def _restand(program: Program, renamed: dict[str, str], removed: set[Node]) -> None:
    """Let nodes of later steps stand for the node that stays, not for the one that goes."""
    for node in program.graph.nodes:
        origin = Origin.of(node)
        if origin is not None and origin.stands_for in renamed and node not in removed:
            Origin(origin.step, origin.name, origin.label, renamed[origin.stands_for]).write(node)
