"""Weights that bitsandbytes saved in 4 bits: read without dequantising, and written back byte for byte.

A weight X lies in a checkpoint as several tensors:

    X                                       the codes, uint8 [⌈n / 2⌉, 1], or the same bytes as another type
    X.absmax                                the scales, fp32, or their 8-bit codes
    X.quant_map                             the 16 levels
    X.nested_absmax, X.nested_quant_map     how to read 8-bit scales
    X.quant_state.bitsandbytes__nf4         the rest as JSON in uint8, `__fp4` for FP4
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from rewriter.edit import Edit
from rewriter.errors import RewriteError
from rewriter.formats.json import parse_object
from rewriter.program import Program
from rewriter.quantised import compute_dtype, held, hold
from rewriter.view import Linear, Linear4bit, layers
from runtime.nf4 import BLOCK_SIZES, NESTED_BLOCK, NESTED_CODE, Nested, Quantised, levels

METADATA = "bitsandbytes"
STATE = ".quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORAGE = {"uint8": torch.uint8, **TYPES}
_AGAIN = "Quantise the model again, or give the model it was quantised from."


class _State(BaseModel):
    """What the JSON beside a weight says."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    quant_type: Literal["nf4", "fp4"]
    blocksize: int
    dtype: Literal["float32", "bfloat16", "float16"]
    shape: list[int] = Field(min_length=2, max_length=2)
    nested_blocksize: int | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: float | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """A 4-bit weight of a checkpoint, and the type its bytes are stored as."""

    weight: Quantised
    storage: str


def is_4bit(directory: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a configuration says that bitsandbytes holds its weights in 4 bits; any other quantisation is refused."""
    how = settings.get("quantization_config")
    if not how:
        return False
    if not isinstance(how, dict):
        raise RewriteError(f"{directory} is quantised in an unknown way", evidence=[str(how)[:200]], fix=_AGAIN)
    method = how.get("quant_method", "bitsandbytes" if "load_in_4bit" in how or "load_in_8bit" in how else None)
    if method == "bitsandbytes" and how.get("load_in_4bit") is True:
        return True
    name = "8-bit bitsandbytes" if method == "bitsandbytes" else str(method)
    raise RewriteError(
        f"{directory} is quantised by {name}",
        evidence=[str(how)[:200]],
        fix="4-bit bitsandbytes (NF4, FP4) can be read; for others give the model it was quantised from.",
    )


# -- reading ------------------------------------------------------------------------------------------------------


def split(tensors: Mapping[str, Tensor], directory: Path) -> tuple[dict[str, Tensor], dict[str, Stored]]:
    """The plain tensors of a checkpoint, and its 4-bit weights by name.

    Raises `RewriteError` for a weight whose parts are missing, disagree, or are not of the format.
    """
    rest = dict(tensors)
    found: dict[str, Stored] = {}
    for key in [key for key in tensors if STATE in key]:
        name = key.partition(STATE)[0]
        if name in found or name not in rest:
            raise RewriteError(f"{directory}: {key} belongs to no weight, or to one that has two", fix=_AGAIN)
        parts = {part: rest.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in rest}
        found[name] = _stored(name, rest.pop(name), parts, key, rest.pop(key))
    lost = [key for key in rest if key.rpartition(".")[2] in (*PARTS, "SCB") and key.rpartition(".")[0] in tensors]
    if lost:
        what = f"{directory}: {lost[0]} stands beside a weight without a 4-bit quant_state"
        raise RewriteError(what, evidence=[f"{len(lost)} such tensors"], fix=_AGAIN)
    if not found:
        what = f"{directory} says that its weights are in 4 bits, but none is"
        raise RewriteError(what, evidence=[f"no tensor name has {STATE}"], fix=_AGAIN)
    return rest, found


def _stored(name: str, codes: Tensor, parts: Mapping[str, Tensor], key: str, state: Tensor) -> Stored:
    described = _described(name, key, state)
    kind, size = described.quant_type, described.blocksize
    storage = str(codes.dtype).removeprefix("torch.")
    nested = described.nested_blocksize is not None
    expected = {"absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if nested else ())}
    if set(parts) != expected:
        odd = sorted(expected ^ set(parts))
        raise _wrong(name, f"its parts do not agree with its quant_state: {', '.join(odd)}")
    if storage not in STORAGE:
        raise _wrong(name, f"its codes are stored as {storage}")
    if not key.endswith(kind):
        raise _wrong(name, f"{key} says it is {described.quant_type}")
    if size not in BLOCK_SIZES:
        raise _wrong(name, f"blocks of {size} weights")
    if nested and (described.nested_blocksize != NESTED_BLOCK or described.nested_offset is None):
        raise _wrong(name, f"scales in blocks of {described.nested_blocksize}, offset {described.nested_offset}")
    _check_table(name, "quant_map", parts["quant_map"], levels(kind), kind)
    packed = codes.contiguous().view(torch.uint8).reshape(-1)
    count = described.shape[0] * described.shape[1]
    blocks = -(-count // size)
    sizes = {"codes": (packed, (count + 1) // 2), "absmax": (parts["absmax"], blocks)}
    state_of_scales = None
    if nested:
        _check_table(name, "nested_quant_map", parts["nested_quant_map"], NESTED_CODE, "the dynamic 8-bit type")
        sizes["nested_absmax"] = (parts["nested_absmax"], -(-blocks // NESTED_BLOCK))
        offset = torch.tensor(described.nested_offset, dtype=torch.float32)
        state_of_scales = Nested(parts["nested_absmax"].reshape(-1), offset)
    for part, (tensor, wanted) in sizes.items():
        if tensor.numel() != wanted:
            raise _wrong(name, f"{part} has {tensor.numel()} entries, shape {described.shape} needs {wanted}")
    types = {"absmax": torch.uint8 if nested else torch.float32, "nested_absmax": torch.float32}
    for part, dtype in types.items():
        if part in parts and parts[part].dtype is not dtype:
            raise _wrong(name, f"{part} is {parts[part].dtype}")
    shape = (described.shape[0], described.shape[1])
    absmax = parts["absmax"].reshape(-1)
    return Stored(Quantised(packed, absmax, shape, TYPES[described.dtype], kind, size, state_of_scales), storage)


def _described(name: str, key: str, state: Tensor) -> _State:
    try:
        return _State.model_validate(parse_object(bytes(state.tolist()), key))
    except (ValidationError, ValueError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines()[:4]]
        raise RewriteError(f"{name}: its quant_state is not readable", evidence=lines, fix=_AGAIN) from None


def _check_table(name: str, part: str, table: Tensor, known: Tensor, kind: str) -> None:
    if table.shape != known.shape or not torch.equal(table.float(), known):
        raise _wrong(name, f"{part} is not the table of {kind}")


def _wrong(name: str, reason: str) -> RewriteError:
    return RewriteError(f"{name} is no 4-bit weight that can be read", evidence=[reason], fix=_AGAIN)


def content(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The bytes of the 4-bit weights by name, for a fingerprint."""
    codes = {name: each.weight.packed for name, each in stored.items()}
    return {**codes, **{f"{name}.absmax": each.weight.absmax for name, each in stored.items()}}


def put(program: Program, stored: Mapping[str, Stored], settings: Mapping[str, Any]) -> Program:
    """A freshly traced program with the 4-bit weights in place of those of the same names; no step of its history."""
    clone = program.clone()
    edit = Edit(clone, number=0, name="load")
    sites = {site.weight: site for site in layers(clone).values() if isinstance(site, Linear)}
    for name, each in stored.items():
        site = sites.get(name)
        if site is None:
            raise RewriteError(f"{name} is held in 4 bits, but no linear layer of the model applies it", fix=_AGAIN)
        if each.weight.shape != (site.out_features, site.in_features):
            own = [site.out_features, site.in_features]
            raise _wrong(name, f"it is {list(each.weight.shape)}, the layer of the model {own}")
        hold(edit, site, each.weight)
    edit.finish()
    types = {name: each.weight.dtype for name, each in stored.items()}
    record = {
        "quantization_config": dict(settings["quantization_config"]),
        "storage": {name: each.storage for name, each in stored.items() if each.storage != "uint8"},
        "dtype": {name: str(dtype).removeprefix("torch.") for name, dtype in types.items()},
    }
    return Program(clone.exported, program.steps, {**clone.metadata, METADATA: record})


# -- writing ------------------------------------------------------------------------------------------------------


def stored_names(program: Program) -> dict[str, Linear4bit]:
    """The 4-bit layers of a program by the name of their weight in a checkpoint."""
    found = [site for site in layers(program).values() if isinstance(site, Linear4bit)]
    return {site.weight.removesuffix("_packed"): site for site in found}


def tensors(program: Program) -> dict[str, Tensor]:
    """Every tensor that a checkpoint holds of the 4-bit layers."""
    record = program.metadata.get(METADATA, {})
    made: dict[str, Tensor] = {}
    for name, site in stored_names(program).items():
        weight = held(program, site)
        own = str(compute_dtype(site)).removeprefix("torch.")
        state: dict[str, Any] = {
            "quant_type": weight.kind,
            "blocksize": weight.block_size,
            "dtype": record.get("dtype", {}).get(name, own),
            "shape": list(weight.shape),
        }
        storage = STORAGE[record.get("storage", {}).get(name, "uint8")]
        made[name] = weight.packed.view(storage).reshape(-1, 1)
        made[f"{name}.absmax"] = weight.absmax
        made[f"{name}.quant_map"] = levels(weight.kind) + 0.0  # the second zero of FP4 has no sign there
        if weight.nested is not None:
            made[f"{name}.nested_absmax"] = weight.nested.absmax
            made[f"{name}.nested_quant_map"] = NESTED_CODE.clone()
            state |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": weight.nested.offset.item(),
            }
        made[f"{name}{STATE}{weight.kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return made


def quantization_config(program: Program) -> dict[str, Any]:
    """What config.json says of 4-bit weights, so that transformers builds 4-bit layers, and no others."""
    record = program.metadata.get(METADATA)
    if record is not None:
        return dict(record["quantization_config"])
    sites = layers(program)
    four = [site for site in sites.values() if isinstance(site, Linear4bit)]
    plain = [site.path for site in sites.values() if isinstance(site, Linear) and not isinstance(site, Linear4bit)]
    dtype = str(compute_dtype(four[0])).removeprefix("torch.")
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": four[0].quantisation,
        "bnb_4bit_use_double_quant": len(four[0].tensors) > 2,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": plain or None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
