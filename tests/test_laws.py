"""Laws: every pass keeps its own on several models, measured again here; passes that lie are caught."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import rewriter
from passes import Lora, Merge
from rewriter.edit import Edit
from rewriter.errors import LawError, RewriteError
from rewriter.find import Sites, select
from rewriter.program import Program
from rewriter.transform import EXACT, ROUNDING, Law, Pass
from rewriter.verify import TOLERANCE, structure
from rewriter.view import Linear
from tests.models import traced
from tests.oracle import distance, run, trained

aten = torch.ops.aten

TARGETS = {
    "llama": ("q_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "mlp": ("up", "down"),
    "conv": ("stem", "head"),
}
PASSES: dict[str, Callable[[str], tuple[Program, Pass]]] = {
    "lora": lambda name: (traced(name), Lora(targets=TARGETS[name], rank=2)),
    "lora, gaussian": lambda name: (traced(name), Lora(targets=TARGETS[name], rank=2, init="gaussian")),
    "lora, dora": lambda name: (traced(name), Lora(targets=TARGETS[name], rank=2, dora=True)),
    "lora, lora_bias": lambda name: (traced(name), Lora(targets=TARGETS[name], rank=2, lora_bias=True, dropout=0.2)),
    "lora, both": lambda name: (traced(name), Lora(targets=TARGETS[name], rank=2, init="both")),
    "lora, pissa": lambda name: (traced(name), Lora(targets=TARGETS[name][-1:], rank=2, init="pissa")),
    "lora, olora": lambda name: (traced(name), Lora(targets=TARGETS[name][-1:], rank=2, init="olora")),
    "merge": lambda name: (adapted(name), Merge()),
    "merge, dora": lambda name: (adapted(name, dora=True), Merge()),
    "merge, fp64": lambda name: (adapted(name), Merge(precision="fp64")),
}
KINDS = {"lora, both": "free", "lora, pissa": "rounding", "lora, olora": "rounding"}


def adapted(name: str, **options: Any) -> Program:
    return trained(rewriter.apply(traced(name), Lora(targets=TARGETS[name], rank=2, alpha=5, **options)).program)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("case", PASSES)
def test_every_pass_keeps_its_law(case: str, name: str) -> None:
    before, pass_ = PASSES[case](name)
    result = rewriter.apply(before, pass_)
    one, two = run(before, name), run(result.program, name)
    kind = KINDS.get(case, "rounding" if case.startswith("merge") else "exact")
    assert pass_.law.kind == kind
    assert pass_.law.reason
    change = result.applied[0].change
    assert change is not None
    size = max(float(t.abs().max()) for t in one)
    if kind == "exact":
        assert change.equal
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    elif kind == "rounding":
        assert change.allowed == TOLERANCE[torch.float32]
        assert change.relative <= change.allowed
        assert distance(one, two) <= TOLERANCE[torch.float32] * size
    else:
        assert change.allowed is None
        assert 1e-6 * size < distance(one, two)


# -- passes that break their law ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wrong:
    """What the wrong passes share: they find linear layers and change one after the other."""

    source: ClassVar[str] = "made for a test"
    targets: tuple[str, ...] = ("up",)

    def find(self, program: Program) -> Sites[Any]:
        return select(program, self.targets, kinds=(Linear,))


def merge_by_hand(site: Linear, edit: Edit, update: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Fold the adapter of one layer into its weight, by whatever formula is given, and remove the branch."""
    a, b = (edit.program.tensor(f"{site.path}.lora_{letter}.default").detach() for letter in "AB")
    (call,) = site.calls
    total = next(node for node in edit.program.graph.nodes if node.target is aten.add.Tensor and call in node.args)
    edit.set_value(site.weight, edit.program.tensor(site.weight) + update(b, a))
    edit.redirect(total, call)
    edit.erase([total])


@dataclass(frozen=True, slots=True)
class ForgetsScale(Wrong):
    """W + B A in place of W + scale · B A."""

    name: ClassVar[str] = "forgets-scale"
    law: ClassVar[Law] = ROUNDING

    def rewrite(self, site: Any, edit: Edit) -> None:
        merge_by_hand(site, edit, lambda b, a: b @ a)


@dataclass(frozen=True, slots=True)
class SwapsOrientation(Wrong):
    """W + scale · Aᵀ Bᵀ on a square weight: every shape fits."""

    name: ClassVar[str] = "swaps-orientation"
    law: ClassVar[Law] = ROUNDING

    def rewrite(self, site: Any, edit: Edit) -> None:
        merge_by_hand(site, edit, lambda b, a: 2.5 * (b @ a).t())


@dataclass(frozen=True, slots=True)
class AddsTwice(Wrong):
    """Folds the update and leaves its branch in the graph."""

    name: ClassVar[str] = "adds-twice"
    law: ClassVar[Law] = ROUNDING

    def rewrite(self, site: Any, edit: Edit) -> None:
        a, b = (edit.program.tensor(f"{site.path}.lora_{letter}.default").detach() for letter in "AB")
        edit.set_value(site.weight, edit.program.tensor(site.weight) + 2.5 * b @ a)


@dataclass(frozen=True, slots=True)
class DropsBias(Wrong):
    """Writes the layer again and loses its bias."""

    name: ClassVar[str] = "drops-bias"
    law: ClassVar[Law] = EXACT

    def rewrite(self, site: Any, edit: Edit) -> None:
        (call,) = site.calls
        weight = edit.program.placeholder(site.weight)
        edit.replace(call, edit.call(aten.linear.default, site.input(call), weight, like=call, label="again"))


@dataclass(frozen=True, slots=True)
class ClaimsExact(Wrong):
    """Rounds the weight to bf16 and back, and claims that no bit of an output moves."""

    name: ClassVar[str] = "claims-exact"
    law: ClassVar[Law] = EXACT

    def rewrite(self, site: Any, edit: Edit) -> None:
        edit.set_value(site.weight, edit.program.tensor(site.weight).detach().bfloat16().float())


@dataclass(frozen=True, slots=True)
class MakesNaN(Wrong):
    """Divides by zero."""

    name: ClassVar[str] = "makes-nan"
    law: ClassVar[Law] = Law("free")

    def rewrite(self, site: Any, edit: Edit) -> None:
        edit.set_value(site.weight, edit.program.tensor(site.weight).detach() * float("nan"))


@dataclass(frozen=True, slots=True)
class ChangesType(Wrong):
    """Returns a type that the model did not have."""

    name: ClassVar[str] = "changes-type"
    law: ClassVar[Law] = ROUNDING
    targets: tuple[str, ...] = ("head",)

    def rewrite(self, site: Any, edit: Edit) -> None:
        (call,) = site.calls
        edit.replace(call, edit.call(aten.to.dtype, call, torch.float64, like=call, label="wide"))


class Square(torch.nn.Module):
    """A layer as wide as its input, so that nothing but numbers tells a wrong orientation."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(6, 6)
        self.head = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.up(x)))


def square() -> Program:
    torch.manual_seed(0)
    base = rewriter.trace(Square().eval(), (torch.randn(3, 6),))
    return trained(rewriter.apply(base, Lora(targets=("up",), rank=2, alpha=5)).program)


@pytest.mark.parametrize(
    "wrong", [ForgetsScale(), SwapsOrientation(), AddsTwice(), DropsBias(), ClaimsExact(), MakesNaN(), ChangesType()]
)
def test_a_pass_that_breaks_its_law_is_caught(wrong: Pass) -> None:
    program = square()
    before = rewriter.text(program)
    said = "changed their shapes or types" if isinstance(wrong, ChangesType) else wrong.name
    with pytest.raises(LawError, match=said) as error:
        rewriter.apply(program, wrong)
    assert error.value.exit_code == 4
    assert rewriter.text(program) == before


def test_the_same_pass_done_right_is_not_caught() -> None:
    @dataclass(frozen=True, slots=True)
    class Right(Wrong):
        name: ClassVar[str] = "right"
        law: ClassVar[Law] = ROUNDING

        def rewrite(self, site: Any, edit: Edit) -> None:
            merge_by_hand(site, edit, lambda b, a: 2.5 * b @ a)

    result = rewriter.apply(square(), Right())
    merged = rewriter.apply(square(), Merge())
    assert torch.allclose(result.program.tensor("up.weight"), merged.program.tensor("up.weight"), atol=1e-6)


def test_infinite_outputs_that_stay_are_no_change() -> None:
    class Masked(Square):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).masked_fill(torch.tensor([False, True, False, False]), -torch.inf)

    torch.manual_seed(0)
    base = rewriter.trace(Masked().eval(), (torch.randn(3, 6),))
    result = rewriter.apply(base, Lora(targets=("up",), rank=2))
    merged = rewriter.apply(trained(result.program), Merge())
    assert result.applied[0].change is not None
    assert result.applied[0].change.equal
    assert merged.applied[0].change is not None
    assert 0 < merged.applied[0].change.relative < 1e-4


def test_allow_nonfinite_lets_a_broken_model_pass() -> None:
    program = square()
    bad = program.tensor("up.lora_A.default").detach().clone()
    bad[0, 0] = torch.nan
    broken = program.with_tensors({"up.lora_A.default": bad})
    with pytest.raises(LawError, match="non-finite"):
        rewriter.apply(broken, Merge())
    merged = rewriter.apply(broken, Merge(allow_nonfinite=True)).program
    assert merged.tensor("up.weight").isnan().any()


# -- structure ----------------------------------------------------------------------------------------------------


def broken_missing_tensor(program: Program) -> None:
    del program.exported.state_dict["up.weight"]


def broken_shape(program: Program) -> None:
    program.exported.state_dict["up.weight"] = torch.nn.Parameter(torch.zeros(22, 11))


def broken_type(program: Program) -> None:
    program.exported.state_dict["up.bias"] = torch.nn.Parameter(torch.zeros(22, dtype=torch.float64))


def broken_order(program: Program) -> None:
    nodes = list(program.graph.nodes)
    nodes[0].append(nodes[2])


def broken_signature(program: Program) -> None:
    program.exported.graph_signature.input_specs.pop(1)


def broken_use(program: Program) -> None:
    first, second = [node for node in program.graph.nodes if node.op == "call_function"][:2]
    second.append(first)


@pytest.mark.parametrize(
    ("corrupt", "named"),
    [
        (broken_missing_tensor, "up.weight"),
        (broken_shape, r"up\.weight is torch\.float32 \(22, 11\), the graph expects torch\.float32 \(22, 10\)"),
        (broken_type, r"up\.bias is torch\.float64"),
        (broken_order, ""),
        (broken_signature, ""),
        (broken_use, ""),
    ],
)
def test_a_corrupted_program_is_caught(corrupt: Callable[[Program], None], named: str) -> None:
    clone = traced("mlp").clone()
    structure(clone)
    corrupt(clone)
    with pytest.raises(RewriteError) as error:
        structure(clone)
    assert re.search(named, str(error.value))
    with pytest.raises(RewriteError):
        rewriter.apply(clone, Lora(targets=("up",), rank=2))
