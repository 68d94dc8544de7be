"""Programs for plain torch: device, type, dynamic sizes, and a file that is whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from rewriter.errors import LawError, UsageError
from rewriter.formats.random_inputs import different_sizes, random_inputs
from rewriter.formats.torch_program import export_torch
from tests.models import traced


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", None), ("llama", torch.bfloat16), ("conv", None), ("conv", torch.float64), ("t5", torch.bfloat16)],
)
def test_plain_torch_loads_it_in_other_sizes_too(name: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    program = traced(name)
    report = export_torch(program, tmp_path / "model.pt2", dtype=dtype)
    assert report.dtype == str(dtype or torch.float32).removeprefix("torch.")
    assert report.max_relative_error < {None: 1e-6, torch.float64: 1e-4, torch.bfloat16: 0.2}[dtype]
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    args, kwargs = random_inputs(program, sizes=different_sizes(program, 0), seed=3)
    turned = pytree.tree_map(
        lambda t: t.to(dtype) if dtype and torch.is_tensor(t) and t.dtype.is_floating_point else t, (args, kwargs)
    )
    got = pytree.tree_leaves(loaded(*turned[0], **turned[1]))
    for one, other in zip(pytree.tree_leaves(program(*args, **kwargs)), got, strict=True):
        assert other.dtype == (dtype or one.dtype)
        assert float((one - other).detach().abs().max()) < 0.1 * float(one.abs().max())


def test_an_overflow_is_refused_and_nothing_appears(tmp_path: Path) -> None:
    program = traced("mlp")
    large = program.with_tensors({"head.weight": program.tensor("head.weight").detach() * 1e7})
    with pytest.raises(LawError, match="would not compute") as error:
        export_torch(large, tmp_path / "model.pt2", dtype=torch.float16)
    assert "bfloat16" in error.value.fix
    assert list(tmp_path.iterdir()) == []


def test_types_and_devices_that_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no floating-point type"):
        export_torch(traced("mlp"), tmp_path / "a.pt2", dtype=torch.int8)
    with pytest.raises(UsageError, match="no device"):
        export_torch(traced("mlp"), tmp_path / "a.pt2", device="nowhere")
