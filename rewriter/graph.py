"""What can be compared: a text line by line and the tensors that it names, wherever they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from rewriter.program import Program
from rewriter.text import Line, lines


@dataclass(frozen=True, slots=True)
class Graph:
    """A model as it is compared.

    `tensors` go by the names in the text, without the `@`. `stable_names` says that an operation keeps its name when
    others are added or removed. `facts` is what the source says about itself, `passes` the options of the passes that
    made it, by their names.
    """

    lines: tuple[Line, ...]
    tensors: Mapping[str, torch.Tensor]
    stable_names: bool = True
    facts: Mapping[str, str] = field(default_factory=dict)
    passes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program) -> Graph:
        facts = {str(key): str(value) for key, value in program.metadata.items()}
        passes = {
            step.name: ", ".join(f"{name}={value}" for name, value in step.options.items()) for step in program.steps
        }
        return cls(tuple(lines(program)), program.tensors, facts=facts, passes=passes)
