"""4-bit layers in ONNX: every form against torch in ONNX Runtime, the bytes in the file, and what a form refuses."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import passes
import rewriter
from rewriter.cli import main
from rewriter.errors import LawError, RewriteError, UsageError
from rewriter.formats.onnx import OnnxReport, export_onnx, read_onnx
from rewriter.formats.onnx_nf4 import EightBit
from rewriter.program import Program
from runtime.nf4 import quantize
from tests.models import traced

FORMS = ("bnb4", "codebook", "int8")
WIDTHS = (48, 80, 20)


class Layer(nn.Module):
    """A layer of random 4-bit weights, made without any pass."""

    def __init__(self, inputs: int, outputs: int, *, block_size: int, kind: str, double: bool, bias: bool) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs) / inputs**0.5
        self.made = it = quantize(weight, block_size=block_size, kind=kind, double_quantise=double)
        self.register_buffer("packed", it.packed)
        self.register_buffer("absmax", it.absmax)
        if it.nested is not None:
            self.register_buffer("nested_absmax", it.nested.absmax)
            self.register_buffer("nested_offset", it.nested.offset)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.made.shape[0], self.made.block_size, self.made.kind
        if self.made.nested is None:
            return torch.ops.rewriter.nf4_linear(x, self.packed, self.absmax, self.bias, *sizes)
        nested = self.nested_absmax, self.nested_offset
        return torch.ops.rewriter.nf4_linear_double(x, self.packed, self.absmax, *nested, self.bias, *sizes)


class Pair(nn.Module):
    """A layer, an activation, and a layer that is used twice when it can be."""

    def __init__(
        self, widths: tuple[int, int, int] = WIDTHS, *, block_size: int = 32, kind: str = "nf4", double: bool = False
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"block_size": block_size, "kind": kind, "double": double}
        self.up = Layer(widths[0], widths[1], bias=True, **options)
        self.down = Layer(widths[1], widths[2], bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        up = torch.relu(self.up(x))
        return self.down(up) + self.down(-up.flip(-1))


@functools.cache
def program(
    widths: tuple[int, int, int] = WIDTHS, block_size: int = 32, kind: str = "nf4", double: bool = False
) -> Program:
    torch.manual_seed(0)
    model = Pair(widths, block_size=block_size, kind=kind, double=double)
    return rewriter.trace(model, (torch.randn(3, 5, widths[0]),))


def run(path: Path, inputs: dict[str, Tensor], *disabled: str) -> Any:
    session = onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def export(source: Program, path: Path, **options: Any) -> tuple[OnnxReport, dict[str, Any]]:
    """What was exported: the report, and the numbers in the file by name."""
    report = export_onnx(source, path / "model.onnx", **options)
    model = read_onnx(path / "model.onnx")
    onnx.checker.check_model(str(path / "model.onnx"))
    return report, {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def operators(path: Path) -> list[str]:
    return [node.op_type for node in read_onnx(path / "model.onnx").graph.node]


# -- numbers --------------------------------------------------------------------------------------------------------


ODD = (33, 19, 7)


@pytest.mark.parametrize("form", ["bnb4", "codebook"])
@pytest.mark.parametrize(
    ("widths", "block_size", "kind", "scales"),
    [
        (WIDTHS, 32, "nf4", "plain"),
        (WIDTHS, 32, "fp4", "double"),
        (WIDTHS, 64, "nf4", "kept"),  # blocks across rows
        (ODD, 64, "fp4", "plain"),  # odd numbers of weights, last blocks that are not full
        (ODD, 32, "nf4", "kept"),
        (ODD, 512, "nf4", "kept"),  # larger blocks than ONNX Runtime has
        (WIDTHS, 4096, "nf4", "plain"),  # larger than a weight
    ],
)
def test_numbers_and_bytes(
    form: str, kind: str, widths: tuple[int, int, int], block_size: int, scales: str, tmp_path: Path
) -> None:
    source = program(widths, block_size, kind, scales != "plain")
    report, written = export(source, tmp_path, nf4=form, keep_double_quant=scales == "kept")
    assert report.max_abs_error < 1e-5
    assert report.nf4 is not None
    assert (report.nf4.form, report.nf4.layers, report.nf4.weight_error) == (form, 3, 0)
    for layer in ("up", "down"):
        packed = source.tensor(f"{layer}.packed").numpy()
        assert written[f"{layer}.packed"].tobytes() == packed.tobytes()
        if scales == "kept":
            assert written[f"{layer}.absmax"].tobytes() == source.tensor(f"{layer}.absmax").numpy().tobytes()
            assert written[f"{layer}.nested_absmax"].dtype == np.float32
    assert (scales == "kept") == any("nested" in name for name in written)
    x = torch.randn(6, 2, widths[0])
    disabled = ["ConstantFolding"] if form == "codebook" else []
    found = run(tmp_path / "model.onnx", {"x": x}, *disabled)
    np.testing.assert_allclose(found, source(x).numpy(), atol=1e-5)
    assert set(operators(tmp_path)) >= ({"MatMulBnb4"} if form == "bnb4" else {"Gather", "MatMul"})


@pytest.mark.parametrize(("kind", "double", "block_size"), [("nf4", False, 32), ("fp4", True, 32), ("nf4", True, 4096)])
def test_levels_in_8_bits(kind: str, double: bool, block_size: int, tmp_path: Path) -> None:
    source = program(WIDTHS, block_size, kind, double)
    report, written = export(source, tmp_path, nf4="int8", tolerance=1e-5)
    assert report.nf4 is not None
    assert 1e-4 < report.nf4.weight_error < 0.01
    assert {"up.packed.levels_int8", "down.packed.levels_int8", "up.bias"} <= set(written)
    assert not {"up.packed", "up.absmax"} & set(written)
    assert operators(tmp_path).count("MatMulNBits") == 3
    x = torch.randn(6, 2, 48)
    expected = source(x)
    found = torch.from_numpy(run(tmp_path / "model.onnx", {"x": x}))
    # with the weights, activations are rounded to 8 bits: together about 1 % of what comes out
    assert (found - expected).norm() / expected.norm() < 0.03
    with EightBit():
        rounded = source(x)
    assert 0 < (rounded - expected).norm() / expected.norm() < 0.02


def test_8_bit_levels_hold_the_4_bit_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 512)
    layer = Layer(512, 96, block_size=64, kind="nf4", double=False, bias=False)
    it = quantize(weight, block_size=64)
    layer.packed, layer.absmax = it.packed, it.absmax
    source = rewriter.trace(layer, (torch.randn(3, 512),))
    report, written = export(source, tmp_path, nf4="int8")
    levels = written["packed.levels_int8"].astype(np.float64) - 128
    found = (levels * written["packed.scales_int8"][..., None]).reshape(96, 512)
    from_weight = np.linalg.norm(found - weight.numpy()) / np.linalg.norm(weight.numpy())
    assert 0.0915 < from_weight < 0.0935
    assert report.nf4 is not None
    four_bit = source(torch.eye(512)).T.double().numpy()
    assert report.nf4.weight_error == pytest.approx(
        np.linalg.norm(found - four_bit) / np.linalg.norm(four_bit), rel=0.01
    )


def test_weights_that_do_not_agree_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))

    monkeypatch.setattr(EightBit, "__torch_dispatch__", plain)
    with pytest.raises(LawError, match="differs"):
        export_onnx(program(), tmp_path / "model.onnx", nf4="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["bnb4", "codebook"])
def test_half_precision(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Pair().half()
    model.up.absmax, model.down.absmax = model.up.made.absmax, model.down.made.absmax  # scales stay fp32
    source = rewriter.trace(model, (torch.randn(3, 5, 48).half(),))
    report = export_onnx(source, tmp_path / "model.onnx", nf4=form, tolerance=0.03)
    assert report.max_abs_error < 0.2


def test_constant_folding_would_unpack_the_weights(tmp_path: Path) -> None:
    report, _ = export(program(), tmp_path, nf4="codebook")
    assert "disabled_optimizers" in report.nf4.summary  # type: ignore[union-attr]
    sizes = []
    for disabled in ([], ["ConstantFolding"]):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 4
        onnxruntime.InferenceSession(
            str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
        tensors = onnx.load(tmp_path / "optimized.onnx").graph.initializer
        sizes.append(sum(np.prod(tensor.dims) >= 48 * 80 and tensor.data_type == 1 for tensor in tensors))
    assert sizes == [1, 0]


# -- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "double"), [("bnb4", True), ("codebook", False)])
def test_lora_beside_4_bit_weights(form: str, double: bool, tmp_path: Path) -> None:
    base = rewriter.apply(traced("llama"), passes.Nf4(block_size=32, double_quantise=double)).program
    lora = passes.Lora(targets="all-linear", rank=3, alpha=5, init="both", sigma=0.3)
    source = rewriter.apply(base, lora).program
    report, written = export(source, tmp_path, nf4=form, keep_double_quant=double)
    assert report.nf4 is not None
    assert report.nf4.layers == 14
    names = [name for name in source.tensors if name.endswith("_packed")]
    assert len(names) == 14
    for name in names:
        assert written[name].tobytes() == source.tensor(name).numpy().tobytes()
    assert {name for name in source.parameters() if "lora_" in name} <= set(written)
    metadata = {prop.key: prop.value for prop in read_onnx(tmp_path / "model.onnx").metadata_props}
    assert [step["name"] for step in json.loads(metadata["rewriter.recipe"])] == ["nf4", "lora"]
    ids = torch.randint(3, 31, (4, 9))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    disabled = ["ConstantFolding"] if form == "codebook" else []
    found = run(tmp_path / "model.onnx", given, *disabled)
    np.testing.assert_allclose(found, source(**given, use_cache=False).logits.numpy(), atol=1e-4)
    assert np.abs(found - base(**given, use_cache=False).logits.numpy()).max() > 0.1


def test_nodes_are_named_by_module_path(tmp_path: Path) -> None:
    source = rewriter.apply(traced("llama"), passes.Nf4()).program
    export_onnx(source, tmp_path / "model.onnx")
    nodes = [node for node in read_onnx(tmp_path / "model.onnx").graph.node if node.op_type == "MatMulBnb4"]
    modules = {name.removesuffix(".weight_packed") for name in source.tensors if name.endswith("_packed")}
    assert {node.name for node in nodes} == {f"{module}/MatMulBnb4" for module in modules}
    for node in nodes:
        assert node.input[1] == node.name.removesuffix("/MatMulBnb4") + ".weight_packed"


def test_other_models_have_no_trace_of_it(tmp_path: Path) -> None:
    report = export_onnx(traced("mlp"), tmp_path / "model.onnx")
    assert report.nf4 is None
    assert report.to_json()["nf4"] is None
    assert [entry.domain for entry in read_onnx(tmp_path / "model.onnx").opset_import] == [""]


def test_external_data(tmp_path: Path) -> None:
    report = export_onnx(program(), tmp_path / "model.onnx", nf4="bnb4", external_data=True)
    assert report.max_abs_error < 1e-5
    assert (tmp_path / "model.onnx.data").stat().st_size >= 48 * 80 // 2
    export_onnx(program(), tmp_path / "other.onnx", nf4="int8", external_data=True)
    assert read_onnx(tmp_path / "other.onnx")
    run(tmp_path / "other.onnx", {"x": torch.randn(1, 2, 48)})


# -- refusals -------------------------------------------------------------------------------------------------------


def test_a_layer_that_8_bit_blocks_do_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match=r"down cannot .* 20 inputs .* block size 32.*") as caught:
        export_onnx(program((48, 20, 7)), tmp_path / "model.onnx", nf4="int8")
    assert "--nf4 bnb4 or --nf4 codebook" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "form", "advice"),
    [
        (torch.float64, "bnb4", "--nf4 codebook"),
        (torch.float64, "int8", "--nf4 codebook"),
        (torch.float16, "int8", "--nf4 codebook"),
        (torch.bfloat16, "bnb4", "float32"),
    ],
)
def test_activations_that_onnx_runtime_does_not_take(
    dtype: torch.dtype, form: str, advice: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(Layer(48, 20, block_size=32, kind="nf4", double=False, bias=False))
    source = rewriter.trace(layer, (torch.randn(3, 48, dtype=dtype),))
    with pytest.raises(RewriteError, match=r"^0 cannot be .* its activations are") as caught:
        export_onnx(source, tmp_path / "model.onnx", nf4=form)
    assert advice in str(caught.value)
    if dtype == torch.float64 and form == "bnb4":
        assert export_onnx(source, tmp_path / "model.onnx", nf4="codebook").max_abs_error < 1e-9


def test_a_weight_that_is_computed_is_refused(tmp_path: Path) -> None:
    class Shifted(Layer):
        def forward(self, x: Tensor) -> Tensor:
            sizes = self.made.shape[0], self.made.block_size, self.made.kind
            return torch.ops.rewriter.nf4_linear(x, self.packed, self.absmax * x.abs().max(), None, *sizes)

    layer = Shifted(48, 20, block_size=32, kind="nf4", double=False, bias=False)
    source = rewriter.trace(nn.Sequential(layer), (torch.randn(3, 48),))
    with pytest.raises(RewriteError, match=r"^0: its 4-bit weight is computed"):
        export_onnx(source, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("mlp", {"nf4": "bnb4"}, "no 4-bit weights"),
        ("mlp", {"keep_double_quant": True}, "no 4-bit weights"),
        ("plain", {"keep_double_quant": True}, "not quantised"),
        ("double", {"keep_double_quant": True, "nf4": "int8"}, "int8 has other scales"),
        ("plain", {"nf4": "int4"}, "no form 'int4'"),
    ],
)
def test_options_without_a_meaning(source: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = traced("mlp") if source == "mlp" else program(double=source == "double")
    with pytest.raises(UsageError, match=message):
        export_onnx(given, tmp_path / "model.onnx", **options)
    assert list(tmp_path.iterdir()) == []


# -- command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_command_says_what_it_wrote(form: str, tmp_path: Path) -> None:
    program().save(tmp_path / "model.pt2")
    command = ["export", str(tmp_path / "model.pt2"), "--to", "onnx", "--nf4", form]
    done = CliRunner().invoke(main, [*command, "--output", str(tmp_path / "out.onnx")])
    assert done.exit_code == 0, done.output
    said = {
        "bnb4": "3 4-bit layers as com.microsoft.MatMulBnb4",
        "codebook": "optimization.disable_specified_optimizers",
        "int8": "% more",
    }
    assert said[form] in done.output
    done = CliRunner().invoke(main, [*command, "--output", str(tmp_path / "again.onnx"), "--json"])
    report = json.loads(done.stdout)["nf4"]
    assert (report["form"], report["layers"]) == (form, 3)


def test_the_command_refuses_flags_without_4_bit_weights(tmp_path: Path) -> None:
    traced("mlp").save(tmp_path / "model.pt2")
    for flags in (["--nf4", "codebook"], ["--keep-double-quant"]):
        done = CliRunner().invoke(main, ["export", str(tmp_path / "model.pt2"), "--to", "onnx", *flags])
        assert isinstance(done.exception, UsageError) or done.exit_code == 2
    done = CliRunner().invoke(main, ["export", str(tmp_path / "model.pt2"), "--to", "torch", "--nf4", "bnb4"])
    assert done.exit_code == 2
    assert "--nf4 is for onnx" in done.output
