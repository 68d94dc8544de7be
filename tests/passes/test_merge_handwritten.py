"""Merging what nobody told the compiler about: low-rank updates in every spelling people write, and what must stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewriter
from passes import Merge
from rewriter.errors import RewriteError
from rewriter.program import Program
from tests.oracle import distance, operations

IN, OUT, RANK, SCALE = 18, 24, 4, 1.75
Forward = Callable[["Parts", Tensor], Tensor]


class Parts(nn.Module):
    """Everything a hand-written layer could be made of; the traced graph keeps only what a spelling reads."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) / 3)

        self.linear = nn.Linear(IN, OUT).double()
        self.bare = nn.Linear(IN, OUT, bias=False).double()
        self.W, self.b = parameter(OUT, IN), parameter(OUT)
        self.Wt = parameter(IN, OUT)
        self.A, self.B = parameter(RANK, IN), parameter(OUT, RANK)
        self.At, self.Bt = parameter(IN, RANK), parameter(RANK, OUT)
        self.A2, self.B2 = parameter(RANK + 1, IN), parameter(OUT, RANK + 1)
        self.down = nn.Linear(IN, RANK, bias=False).double()
        self.up = nn.Linear(RANK, OUT).double()
        self.b2, self.gain, self.gate = parameter(OUT), parameter(OUT), parameter(1)
        self.inputs, self.middle = parameter(IN), parameter(RANK)
        self.drop = nn.Dropout(0.3)
        self.spelling = forward
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(self, x)


class Net(nn.Module):
    """A hand-written layer between others."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.fc = Parts(forward)
        self.out = nn.Linear(OUT, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(x)))


def net(forward: Forward) -> Program:
    torch.manual_seed(0)
    return rewriter.trace(Net(forward), (sample(2, 3),))


def sample(*rows: int) -> Tensor:
    return torch.randn(*rows, IN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def low(m: Parts, x: Tensor) -> Tensor:
    return x @ m.A.t() @ m.B.t()


def ba(m: Parts) -> Tensor:
    return SCALE * m.B @ m.A


LINEAR = ["linear.default"]
SPELLINGS: dict[str, tuple[Forward, Callable[[Parts], tuple[Tensor, Tensor]], list[str]]] = {
    # name: (forward, the weight [o, i] and bias it amounts to, the operations that remain)
    "x @ A.t() @ B.t()": (
        lambda m, x: m.linear(x) + x @ m.A.t() @ m.B.t() * SCALE,
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "x @ A.T @ B.T": (
        lambda m, x: m.linear(x) + SCALE * (x @ m.A.T @ m.B.T),
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "x @ A.mT @ B.mT": (
        lambda m, x: m.linear(x) + SCALE * (x @ m.A.mT @ m.B.mT),
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "transpose(0, 1)": (
        lambda m, x: m.linear(x) + SCALE * (x @ m.A.transpose(0, 1) @ m.B.permute(1, 0)),
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "x @ A @ B": (
        lambda m, x: m.linear(x) + SCALE * (x @ m.At @ m.Bt),
        lambda m: (m.linear.weight + SCALE * (m.At @ m.Bt).t(), m.linear.bias),
        LINEAR,
    ),
    "torch.matmul": (
        lambda m, x: torch.add(m.linear(x), torch.matmul(torch.matmul(x, m.At), m.Bt), alpha=SCALE),
        lambda m: (m.linear.weight + SCALE * (m.At @ m.Bt).t(), m.linear.bias),
        LINEAR,
    ),
    "F.linear twice": (
        lambda m, x: m.linear(x) + F.linear(F.linear(x, m.A), m.B) * SCALE,
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "scale before": (
        lambda m, x: m.linear(x) + F.linear(F.linear(x * SCALE, m.A), m.B),
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "scale between": (
        lambda m, x: m.linear(x) + F.linear(SCALE * F.linear(x, m.A), m.B),
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "scale by division": (
        lambda m, x: m.linear(x) + low(m, x) * 7 / 4,
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "scale in a matrix": (
        lambda m, x: m.linear(x) + x @ m.A.t() @ (m.B * SCALE).t(),
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "modules": (
        lambda m, x: m.linear(x) + m.up(m.down(x)) * SCALE,
        lambda m: (m.linear.weight + SCALE * m.up.weight @ m.down.weight, m.linear.bias + SCALE * m.up.bias),
        LINEAR,
    ),
    "dropout": (
        lambda m, x: m.linear(x) + m.up(m.down(m.drop(x))) * SCALE,
        lambda m: (m.linear.weight + SCALE * m.up.weight @ m.down.weight, m.linear.bias + SCALE * m.up.bias),
        LINEAR,
    ),
    "dropout between": (
        lambda m, x: m.linear(x) + m.drop(m.up(m.drop(m.down(x)))) * SCALE,
        lambda m: (m.linear.weight + SCALE * m.up.weight @ m.down.weight, m.linear.bias + SCALE * m.up.bias),
        LINEAR,
    ),
    "raw weight": (
        lambda m, x: F.linear(x, m.W, m.b) + low(m, x) * SCALE,
        lambda m: (m.W + ba(m), m.b),
        LINEAR,
    ),
    "raw weight without bias": (
        lambda m, x: F.linear(x, m.W) + low(m, x) * SCALE,
        lambda m: (m.W + ba(m), torch.zeros(OUT)),
        LINEAR,
    ),
    "raw matmul": (
        lambda m, x: x @ m.Wt + m.b + x @ m.At @ m.Bt,
        lambda m: ((m.Wt + m.At @ m.Bt).t(), m.b),
        ["matmul.default", "add.Tensor"],
    ),
    "raw matmul, bias last": (
        lambda m, x: (x @ m.Wt + x @ m.At @ m.Bt) + m.b,
        lambda m: ((m.Wt + m.At @ m.Bt).t(), m.b),
        ["matmul.default", "add.Tensor"],
    ),
    "raw matmul of a transposed weight": (
        lambda m, x: x @ m.W.t() + low(m, x) * SCALE,
        lambda m: (m.W + ba(m), torch.zeros(OUT)),
        ["t.default", "matmul.default"],
    ),
    "einsum": (
        lambda m, x: m.linear(x) + torch.einsum("btr,or->bto", torch.einsum("bti,ri->btr", x, m.A), m.B) * SCALE,
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "einsum with an ellipsis": (
        lambda m, x: m.linear(x) + SCALE * torch.einsum("...r,ro->...o", torch.einsum("...i,ir->...r", x, m.At), m.Bt),
        lambda m: (m.linear.weight + SCALE * (m.At @ m.Bt).t(), m.linear.bias),
        LINEAR,
    ),
    "einsum of three": (
        lambda m, x: m.linear(x) + SCALE * torch.einsum("bti,ri,or->bto", x, m.A, m.B),
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "einsum, the matrix first": (
        lambda m, x: m.linear(x) + SCALE * torch.einsum("or,ri,bti->bto", m.B, m.A, x),
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "weights added first": (
        lambda m, x: F.linear(x, m.W + SCALE * m.B @ m.A, m.b),
        lambda m: (m.W + ba(m), m.b),
        LINEAR,
    ),
    "weights of modules added first": (
        lambda m, x: F.linear(x, m.linear.weight + SCALE * m.up.weight @ m.down.weight, m.linear.bias),
        lambda m: (m.linear.weight + SCALE * m.up.weight @ m.down.weight, m.linear.bias),
        LINEAR,
    ),
    "product of B and A first": (
        lambda m, x: m.linear(x) + x @ (m.B @ m.A).t() * SCALE,
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "update before the base": (
        lambda m, x: low(m, x) * SCALE + m.linear(x),
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "subtracted": (
        lambda m, x: m.linear(x) - low(m, x) * -SCALE,
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "negated": (
        lambda m, x: -low(m, x) * SCALE + m.linear(x),
        lambda m: (m.linear.weight - ba(m), m.linear.bias),
        LINEAR,
    ),
    "subtracted from the update": (
        lambda m, x: low(m, x) - m.linear(x),
        lambda m: (m.B @ m.A - m.linear.weight, -m.linear.bias),
        LINEAR,
    ),
    "in place": (
        lambda m, x: m.linear(x).add_(low(m, x) * SCALE),
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "in place on the flat rows": (
        lambda m, x: m.linear(x).flatten(0, 1).add_(low(m, x).flatten(0, 1)).unflatten(0, x.shape[:2]),
        lambda m: (m.linear.weight + m.B @ m.A, m.linear.bias),
        ["linear.default", "flatten.using_ints", "unflatten.int"],
    ),
    "augmented assignment": (
        lambda m, x: _augmented(m, x),
        lambda m: (m.linear.weight + ba(m), m.linear.bias),
        LINEAR,
    ),
    "two adapters": (
        lambda m, x: m.linear(x) + m.up(m.down(x)) * SCALE + low(m, x),
        lambda m: (
            m.linear.weight + SCALE * m.up.weight @ m.down.weight + m.B @ m.A,
            m.linear.bias + SCALE * m.up.bias,
        ),
        LINEAR,
    ),
    "two adapters in a loop": (
        lambda m, x: m.linear(x) + sum(x @ a.t() @ b.t() for a, b in ((m.A, m.B), (m.A2, m.B2))),
        lambda m: (m.linear.weight + m.B @ m.A + m.B2 @ m.A2, m.linear.bias),
        LINEAR,
    ),
    "learned gate": (
        lambda m, x: m.linear(x) + m.gate * m.up(m.down(x)),
        lambda m: (m.linear.weight + m.gate * m.up.weight @ m.down.weight, m.linear.bias + m.gate * m.up.bias),
        LINEAR,
    ),
    "gate through tanh": (
        lambda m, x: m.linear(x) + torch.tanh(m.gate) * low(m, x),
        lambda m: (m.linear.weight + torch.tanh(m.gate) * m.B @ m.A, m.linear.bias),
        LINEAR,
    ),
    "diagonal between": (
        lambda m, x: m.linear(x) + F.linear(F.linear(x, m.A) * m.middle, m.B),
        lambda m: (m.linear.weight + m.B @ torch.diag(m.middle) @ m.A, m.linear.bias),
        LINEAR,
    ),
    "diagonals around": (
        lambda m, x: m.linear(x) + m.gain * F.linear(F.linear(x * m.inputs, m.A), m.B),
        lambda m: (m.linear.weight + torch.diag(m.gain) @ m.B @ m.A @ torch.diag(m.inputs), m.linear.bias),
        LINEAR,
    ),
    "gain after the layer": (
        lambda m, x: m.linear(x) * m.gain,
        lambda m: (m.gain[:, None] * m.linear.weight, m.gain * m.linear.bias),
        LINEAR,
    ),
    "gain before the layer": (
        lambda m, x: m.linear(x * m.inputs),
        lambda m: (m.linear.weight * m.inputs, m.linear.bias),
        LINEAR,
    ),
    "gain and low rank": (
        lambda m, x: (m.linear(x) + low(m, x)) * m.gain,
        lambda m: (m.gain[:, None] * (m.linear.weight + m.B @ m.A), m.gain * m.linear.bias),
        LINEAR,
    ),
    "magnitude": (
        lambda m, x: F.linear(x, _magnitude(m), m.linear.bias),
        lambda m: (_magnitude(m), m.linear.bias),
        LINEAR,
    ),
    "addmm on flat rows": (
        lambda m, x: m.linear(x) + torch.addmm(m.b2, torch.mm(x.flatten(0, 1), m.At), m.Bt).view(*x.shape[:2], OUT),
        lambda m: (m.linear.weight + (m.At @ m.Bt).t(), m.linear.bias + m.b2),
        LINEAR,
    ),
    "addmm with the base": (
        lambda m, x: torch.addmm(m.linear(x.flatten(0, 1)), x.flatten(0, 1) @ m.At, m.Bt, alpha=SCALE).unflatten(
            0, x.shape[:2]
        ),
        lambda m: (m.linear.weight + SCALE * (m.At @ m.Bt).t(), m.linear.bias),
        ["flatten.using_ints", "linear.default", "unflatten.int"],
    ),
    "stacked factors": (
        lambda m, x: m.linear(x) + x @ torch.cat([m.A, m.A2]).t() @ torch.cat([m.B, m.B2], 1).t(),
        lambda m: (m.linear.weight + m.B @ m.A + m.B2 @ m.A2, m.linear.bias),
        LINEAR,
    ),
    "results concatenated": (
        lambda m, x: m.linear(x) + torch.cat([x @ m.At, x @ m.A2.t()], -1) @ torch.cat([m.B, m.B2], 1).t(),
        lambda m: (m.linear.weight + (m.At @ m.B.t()).t() + m.B2 @ m.A2, m.linear.bias),
        LINEAR,
    ),
    "half of the outputs": (
        lambda m, x: m.linear(x) + F.pad(low(m, x)[..., :11], (0, OUT - 11)),
        lambda m: (m.linear.weight + torch.cat([(m.B @ m.A)[:11], torch.zeros(OUT - 11, IN)]), m.linear.bias),
        LINEAR,
    ),
    "half of the inputs": (
        lambda m, x: m.linear(x) + F.linear(F.linear(x[..., 5:], m.A[:, 5:]), m.B),
        lambda m: (m.linear.weight + m.B @ torch.cat([torch.zeros(RANK, 5), m.A[:, 5:]], 1), m.linear.bias),
        LINEAR,
    ),
    "heads": (
        lambda m, x: m.linear(x) + (low(m, x).view(*x.shape[:2], 4, 6) * m.gain.view(4, 6)).flatten(2),
        lambda m: (m.linear.weight + m.gain[:, None] * (m.B @ m.A), m.linear.bias),
        LINEAR,
    ),
    "kronecker product": (
        lambda m, x: m.linear(x) + F.linear(x, torch.kron(m.B[:6, :2], m.A[:, :9])),
        lambda m: (m.linear.weight + torch.kron(m.B[:6, :2], m.A[:, :9]), m.linear.bias),
        LINEAR,
    ),
    "hadamard product": (
        lambda m, x: m.linear(x) + F.linear(x, (m.B @ m.A) * (m.B2 @ m.A2)),
        lambda m: (m.linear.weight + (m.B @ m.A) * (m.B2 @ m.A2), m.linear.bias),
        LINEAR,
    ),
    "casts that lose nothing": (
        lambda m, x: m.linear(x) + low(m, x.to(torch.float64)).to(x.dtype),
        lambda m: (m.linear.weight + m.B @ m.A, m.linear.bias),
        LINEAR,
    ),
}


def _augmented(m: Parts, x: Tensor) -> Tensor:
    y = m.linear(x)
    y += low(m, x) * SCALE
    return y


def _magnitude(m: Parts) -> Tensor:
    whole = m.linear.weight + m.B @ m.A
    return m.gain[:, None] * whole / whole.norm(dim=1, keepdim=True)


def short(program: Program) -> list[str]:
    return [name.removeprefix("aten.") for name in operations(program) if "sym_size" not in name]


def read(program: Program) -> list[str]:
    """The tensors that an operation reads; a trace keeps the others, too."""
    return [name for name in program.tensors if program.placeholder(name).users]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_folds(spelling: str) -> None:
    forward, formula, remains = SPELLINGS[spelling]
    program = net(forward)
    merged = rewriter.apply(program, Merge()).program
    x = sample(4, 5)
    assert distance([merged(x)], [program(x)]) < 1e-9
    module = program.module()
    parts = Parts(forward)
    with torch.no_grad():
        for name, value in module.fc.named_parameters():
            owner, _, leaf = name.rpartition(".")
            getattr(parts.get_submodule(owner), leaf).copy_(value)
        weight, bias = formula(parts)
        by_hand = module.out.weight @ torch.tanh(F.linear(x, weight, bias.to(x.dtype)))[..., None]
        assert distance([merged(x)], [by_hand[..., 0] + module.out.bias]) < 1e-9
    assert short(merged) == [*remains, "tanh.default", "linear.default"]
    left = {name for name in read(program) if name.startswith("fc.") and name in merged.tensors}
    assert left <= {"fc.linear.weight", "fc.linear.bias", "fc.W", "fc.Wt", "fc.b"}


# -- what is shared, what stays -----------------------------------------------------------------------------------


class Twice(nn.Module):
    """One hand-written layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = Parts(lambda m, x: m.linear(x) + SCALE * low(m, x))
        self.back = nn.Linear(OUT, IN).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.back(self.fc(x))))


def test_a_layer_called_twice_folds_once() -> None:
    torch.manual_seed(0)
    program = rewriter.trace(Twice(), (sample(2, 3),))
    merged = rewriter.apply(program, Merge()).program
    x = sample(4, 5)
    assert distance([merged(x)], [program(x)]) < 1e-9
    assert short(merged) == ["linear.default", "linear.default", "tanh.default", "linear.default"]
    tensors = program.tensors
    expected = tensors["fc.linear.weight"] + SCALE * tensors["fc.B"] @ tensors["fc.A"]
    assert torch.allclose(merged.tensor("fc.linear.weight"), expected, rtol=0, atol=1e-12)
    assert set(read(merged)) == {"fc.linear.weight", "fc.linear.bias", "back.weight", "back.bias"}


class Gain(nn.Module):
    """`gain · x`: LayerScale."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class RootMeanSquare(nn.Module):
    """RMSNorm as Hugging Face models write it: its last operation is a product with a parameter."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """A norm, a layer, LayerScale and a residual connection around them."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.norm = RootMeanSquare(IN)
        self.fc = Parts(forward)
        self.scale = Gain(OUT)
        self.back = nn.Linear(OUT, IN).double()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(self.scale(self.fc(self.norm(x))))


class SmallBlock(nn.Module):
    """The same with one weight only."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.norm = RootMeanSquare(IN)
        self.fc = Parts(forward)
        self.scale = Gain(OUT)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, OUT - IN)) + self.scale(self.fc(self.norm(x)))


@pytest.mark.parametrize("block", [Block, SmallBlock])
def test_norms_scales_and_residuals_of_the_model_stay(block: Callable[[Forward], nn.Module]) -> None:
    torch.manual_seed(0)
    plain = rewriter.trace(block(lambda m, x: m.linear(x)), (sample(2, 3),))
    program = rewriter.trace(block(lambda m, x: m.linear(x) + SCALE * low(m, x)), (sample(2, 3),))
    merged = rewriter.apply(program, Merge()).program
    x = sample(4, 5)
    assert distance([merged(x)], [program(x)]) < 1e-9
    assert operations(merged) == operations(plain)
    for name in ("norm.weight", "scale.gain"):
        assert torch.equal(merged.tensor(name), program.tensor(name))
    with pytest.raises(RewriteError, match="nothing to merge"):
        rewriter.apply(plain, Merge())


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(RootMeanSquare(IN), nn.Linear(IN, OUT).double()),
        nn.Sequential(nn.Linear(IN, OUT).double(), Gain(OUT)),
        nn.Sequential(nn.Linear(IN, OUT).double(), nn.BatchNorm1d(OUT).double()),
        nn.Sequential(nn.LayerNorm(IN).double(), nn.Linear(IN, OUT).double(), nn.LayerNorm(OUT).double()),
        nn.Sequential(nn.Linear(IN, IN + 1).double(), nn.Linear(IN + 1, OUT).double()),
        nn.Sequential(nn.Dropout(0.3), nn.Linear(IN, OUT).double(), nn.Dropout(0.3)),
    ],
    ids=["norm first", "gain last", "batch norm", "layer norms", "two layers", "dropouts"],
)
def test_small_models_without_an_update_have_nothing_to_merge(model: nn.Module) -> None:
    with pytest.raises(RewriteError, match="nothing to merge"):
        rewriter.apply(rewriter.trace(model.eval(), (sample(2),)), Merge())


def test_batch_norm_behind_a_convolution_stays() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.down = nn.Conv2d(3, 2, 3, padding=1, bias=False)
            self.up = nn.Conv2d(2, 8, 1, bias=False)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x) + 1.5 * self.up(self.down(x)))

    torch.manual_seed(0)
    program = rewriter.trace(Convolution().double().eval(), (torch.randn(2, 3, 9, 11, dtype=torch.float64),))
    merged = rewriter.apply(program, Merge()).program
    assert short(merged) == ["conv2d.default", "batch_norm.default"]
    x = torch.randn(3, 3, 7, 5, dtype=torch.float64)
    assert distance([merged(x)], [program(x)]) < 1e-9


# -- refusals -----------------------------------------------------------------------------------------------------


def _read_before(m: Parts, x: Tensor) -> Tensor:
    y = m.linear(x)
    seen = y[..., :6]
    y.add_(low(m, x))
    return y + F.pad(seen, (0, OUT - 6))


REFUSALS: dict[str, tuple[Forward, str]] = {
    "bottleneck adapter": (
        lambda m, x: m.linear(x) + F.relu(x @ m.A.t()) @ m.B.t(),
        "fc.linear: %relu: relu is not affine",
    ),
    "dropout in training mode": (
        lambda m, x: m.linear(x) + F.dropout(x, 0.1, True) @ m.A.t() @ m.B.t(),
        "fc.linear: %dropout: dropout in training mode is random",
    ),
    "two base weights": (lambda m, x: m.linear(x) + F.linear(x, m.W), ""),
    "lossy casts": (
        lambda m, x: m.linear(x) + (x.float() @ m.A.t().float() @ m.B.t().float()).double(),
        "fc.linear: %to: the cast from torch.float64 to torch.float32 loses precision",
    ),
    "changed in place, a slice reads it": (_read_before, "changed in place"),
    "gate from the input": (
        lambda m, x: m.linear(x) + torch.sigmoid(x[..., :1]) * low(m, x),
        "fc.linear: %sigmoid: sigmoid is not affine",
    ),
    "rows mixed": (lambda m, x: m.linear(x) + low(m, x).flip(1), "fc.linear: %flip: flip is not affine"),
    "rows shifted": (lambda m, x: m.linear(x) + F.pad(low(m, x)[:, 1:], (0, 0, 0, 1)), "selects rows"),
    "another matrix for every row": (lambda m, x: m.linear(x) + low(m, x).mean(1, keepdim=True), ""),
    "a constant that differs from row to row": (
        lambda m, x: m.linear(x[:, :3]) + low(m, x[:, :3]) * m.gain[:3, None],
        "",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_affine_is_refused_by_name(case: str) -> None:
    forward, reason = REFUSALS[case]
    program = net(forward)
    with pytest.raises(RewriteError, match="nothing to merge") as error:
        rewriter.apply(program, Merge())
    assert reason in str(error.value)


def test_an_offset_before_a_convolution_is_no_offset_after_it() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 8, 3, padding=1)
            self.down = nn.Conv1d(3, 2, 3, padding=1, bias=False)
            self.up = nn.Conv1d(2, 8, 1, bias=False)
            self.shift = nn.Parameter(torch.tensor(0.7))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x + self.shift) + self.up(self.down(x))

    torch.manual_seed(0)
    program = rewriter.trace(Shifted().double(), (torch.randn(2, 3, 9, dtype=torch.float64),))
    with pytest.raises(RewriteError, match="nothing to merge"):
        rewriter.apply(program, Merge(), check=False)


def test_a_wide_gain_on_a_single_output_is_refused() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(IN, 1)
            self.gain = nn.Parameter(torch.randn(6))
            self.shift = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.gain + self.shift

    torch.manual_seed(0)
    program = rewriter.trace(Wide().double(), (sample(4),))
    with pytest.raises(RewriteError, match="nothing to merge"):
        rewriter.apply(program, Merge())
