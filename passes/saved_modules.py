"""Training a module of the base model that shares its weight with another one."""

from __future__ import annotations

from rewriter.edit import Edit
from rewriter.errors import RewriteError
from rewriter.view import layers


def untie(edit: Edit, name: str) -> None:
    """Give the layer of the parameter `name` a tensor of its own, apart from the layers it was tied with.

    Nothing happens to a name that is not tied. Raises `RewriteError` when something else than a layer reads it.
    """
    others = [n for group in edit.program.tied() if name in group for n in group if n != name]
    if not others:
        return
    reads = {n: edit.program.placeholder(n) for n in (name, *others)}
    sites = layers(edit.program).values()
    known = {call for site in sites for call in site.calls}
    own = {call for site in sites if site.path == name.rpartition(".")[0] for call in site.calls}
    elsewhere = reads[next((n for n in others if reads[n].users), others[0])]
    for source in reads.values():
        for user in list(source.users):
            if user not in known:
                raise RewriteError(
                    f"{name} is tied to {others[0]} and cannot be trained alone",
                    evidence=[f"{user.name} reads it, which is no layer"],
                    fix="Untie the weights before the model is traced.",
                )
            target = reads[name] if user in own else elsewhere if source is reads[name] else source
            if target is not source:
                edit.rewire(user, source, target)
    edit.set_value(name, edit.program.tensor(name).detach().clone())
