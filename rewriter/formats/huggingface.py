"""Hugging Face model directories: traced when read; written back only when `from_pretrained` gives equal outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.exporters.exporter_dynamo import (
    patch_forward_signature,
    register_cache_pytrees_for_model,
    reset_model_state,
)
from transformers.exporters.utils import apply_patches, cast_leaf_tensors, prepare_for_export

from rewriter.errors import LawError, RewriteError, UnsafeError
from rewriter.formats import bitsandbytes, pickle, safetensors
from rewriter.formats.atomic import write_directory
from rewriter.formats.fingerprint import fingerprint
from rewriter.formats.huggingface_inputs import example_inputs, varying_sizes
from rewriter.formats.huggingface_model import (
    METADATA,
    config_class,
    filled_model,
    independent_tensors,
    model_class,
    quiet,
)
from rewriter.formats.json import read_json
from rewriter.program import Program
from rewriter.trace import trace_plainly

Inputs = tuple[Any, ...] | Mapping[str, Any]
CONFIG = "config.json"
PICKLED = "pytorch_model.bin"
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)
# Largest difference of an output that a reload may show, relative to the largest output.
RELOAD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def load(
    directory: Path,
    *,
    architecture: str | None = None,
    dtype: torch.dtype | None = None,
    inputs: Inputs | None = None,
) -> Program:
    """The traced model of a directory with config.json and safetensors (or a `pytorch_model.bin` that holds only data).

    The weights stay mapped from disk, in the checkpoint's type unless `dtype` is given; the inputs of the trace are
    made up from the configuration unless given, as a tuple or by name. Raises `UnsafeError` for a model that needs code
    from the directory, `RewriteError` when weights are missing or left over, or the class cannot be told.
    """
    args, kwargs = split_inputs(inputs)
    settings = read_json(directory / CONFIG)
    if bitsandbytes.is_4bit(directory, settings):
        return _load_4bit(directory, settings, architecture, dtype, (args, kwargs))
    model = load_model(directory, architecture=architecture, dtype=dtype)
    return trace_model(model, args, kwargs, directory=directory.resolve().name)


def _load_4bit(
    directory: Path,
    settings: dict[str, Any],
    architecture: str | None,
    dtype: torch.dtype | None,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
) -> Program:
    """The model of a bitsandbytes checkpoint: traced with stand-ins that take no memory, then given its 4-bit weights.

    It computes in the type of the model; bitsandbytes may multiply in another one (`bnb_4bit_compute_dtype`).
    """
    kind = architecture_of(directory, settings, architecture)
    plain, packed = bitsandbytes.split(stored(directory), directory)
    floats = [tensor.dtype for tensor in plain.values() if tensor.is_floating_point()]
    config = config_class(kind).from_pretrained(directory, local_files_only=True)
    if dtype is None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else (floats or [torch.float32])[0]
    shapes = _shapes(kind, config)
    stand_ins = {
        name: torch.zeros((), dtype=dtype).expand(shapes.get(name, each.weight.shape)) for name, each in packed.items()
    }
    model = load_model(directory, architecture=architecture, dtype=dtype, tensors={**plain, **stand_ins})
    digest = {"weights_sha256": fingerprint({**plain, **bitsandbytes.content(packed)})}
    program = trace_model(model, *inputs, directory=directory.resolve().name, metadata=digest)
    return bitsandbytes.put(program, packed, settings)


def _shapes(kind: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, torch.Size]:
    """The shapes a model has for its tensors: some store a weight as [i, o]."""
    _without_quantisation(config)
    with torch.device("meta"), quiet():
        return {name: tensor.shape for name, tensor in kind(config).state_dict().items()}


def _without_quantisation(config: PreTrainedConfig) -> None:
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def split_inputs(inputs: Inputs | None) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Example inputs given as a tuple or by name, as positional and named ones."""
    if inputs is None:
        return (), {}
    return (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)


def load_model(
    directory: Path,
    *,
    architecture: str | None = None,
    dtype: torch.dtype | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """The transformers model of a directory in evaluation mode, with `tensors` in place of its own weights if given."""
    settings = read_json(directory / CONFIG)
    kind = architecture_of(directory, settings, architecture)
    held = dict(stored(directory) if tensors is None else tensors)
    with quiet():
        try:
            config = config_class(kind).from_pretrained(directory, local_files_only=True)
            _without_quantisation(config)
            # Shapes that differ are reported like missing names instead of raised without a word on which.
            result: Any = kind.from_pretrained(
                None,
                config=config,
                state_dict=held,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
            )
            model, report = result
        except Exception as error:
            raise RewriteError(
                f"transformers cannot build a {kind.__name__} from {directory}",
                evidence=[f"{type(error).__name__}: {line}" for line in str(error).strip().splitlines()[:4]],
                fix="Check that config.json belongs to these weights.",
            ) from error
    _check_report(directory, kind.__name__, report)
    loaded: PreTrainedModel = model.eval()
    return loaded


def trace_model(
    model: PreTrainedModel,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Literal["auto"] | Any = "auto",
    *,
    directory: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Program:
    """Trace a transformers model; without inputs they are made up by `example_inputs`, and passed by name.

    The program takes exactly the inputs of the trace. Caches are off unless the inputs ask for one, so that the
    outputs are tensors. Raises `RewriteError` when the model cannot be traced.
    """
    named = dict(kwargs or {})
    shapes, automatic = dynamic_shapes, isinstance(dynamic_shapes, str)
    if not args and not named:
        named = dict(example_inputs(model))
        shapes = varying_sizes(model, named) if automatic else dynamic_shapes
    settings = json.loads(model.config.to_json_string(use_diff=False))
    settings.pop("_name_or_path", None)  # a path of this machine
    described = {
        METADATA: {
            "config": settings,
            "architecture": type(model).__name__,
            "directory": directory or Path(model.name_or_path or "").name,
        },
        **(metadata or {}),
    }
    tensors = model.state_dict()
    if "weights_sha256" not in described and not any(tensor.device.type == "meta" for tensor in tensors.values()):
        described["weights_sha256"] = fingerprint(tensors)
    with without_cache(model, named):
        try:
            return trace_plainly(model, args, named, shapes, metadata=described)
        except RewriteError as error:
            if args or not automatic:
                raise
            return _trace_patched(model, named, described, error)


def _trace_patched(
    model: PreTrainedModel, named: dict[str, Any], metadata: dict[str, Any], plain: RewriteError
) -> Program:
    """Trace with what transformers replaces for export.

    Only when the plain trace fails: the replacements leave copies in the graph that most models do not need.
    """
    own = "forward" in vars(model)
    try:
        _, prepared, flags = prepare_for_export(model, dict(named))
    except ValueError:  # inputs such as labels, which the replacements do not know
        raise plain from None
    prepared = {**prepared, **flags}
    try:
        with apply_patches("dynamo"), patch_forward_signature(model, prepared):
            return trace_plainly(model, kwargs=prepared, metadata=metadata)
    finally:
        if not own:
            vars(model).pop("forward", None)


def save(
    program: Program,
    directory: Path,
    *,
    source: Path | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> float:
    """Write a directory that `from_pretrained` loads, and return the largest absolute difference of its outputs.

    The tokenizer and the other small files come from `source`. The directory is reloaded and compared with the program
    on its example inputs before it appears. Raises `RewriteError` for a program with parameters that its architecture
    does not have, `LawError` when the outputs of the reloaded model differ.
    """
    four = bitsandbytes.stored_names(program)
    if four and dtype is not None:
        raise RewriteError("4-bit weights have no other type to be written in", fix="Leave the type out.")
    model = filled_model(program, dtype, four)
    with write_directory(directory, inputs=[source] if source else [], overwrite=overwrite) as partial:
        with quiet():
            state = {name: tensor for name, tensor in independent_tensors(model).items() if name not in four}
            model.save_pretrained(partial, state_dict={**state, **bitsandbytes.tensors(program)})
        if four:
            _describe_4bit(partial / CONFIG, program)
        for file in _companions(source):
            shutil.copyfile(file, partial / file.name)
        return _check_reload(program, partial, type(model).__name__)


# -- reading ------------------------------------------------------------------------------------------------------


def architecture_of(directory: Path, settings: dict[str, Any], chosen: str | None) -> type[PreTrainedModel]:
    """The class of transformers that a configuration names; nothing else is ever called."""
    path = directory / CONFIG
    named = [chosen] if chosen else settings.get("architectures")
    if kernels := _kernels(settings):
        raise UnsafeError(f"{path} asks for code from elsewhere", evidence=kernels, fix="Remove the entry.")
    if settings.get("auto_map") and chosen is None:
        fix = "If transformers has the model, name its class: architecture=..."
        raise UnsafeError(f"{path} asks for code of its own (auto_map)", evidence=[str(settings["auto_map"])], fix=fix)
    bitsandbytes.is_4bit(directory, settings)  # refuses every other quantisation
    if not (isinstance(named, list) and len(named) == 1 and isinstance(named[0], str)):
        seen = "has no field 'architectures'" if named is None else f"has 'architectures': {named!r}, one was expected"
        fix = "Name the class of transformers to load: architecture=..., for example architecture='BertModel'."
        raise RewriteError(f"{path} {seen}", evidence=[f"model_type: {settings.get('model_type')!r}"], fix=fix)
    return model_class(named[0], str(path))


def _kernels(value: Any) -> list[str]:
    """Entries such as `attn_implementation` that name a repository of code."""
    if not isinstance(value, dict):
        return []
    own = [f"{k}: {v!r}" for k, v in value.items() if k.endswith("_implementation") and "/" in str(v)]
    return own + [line for item in value.values() for line in _kernels(item)]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a directory under the names they are stored by; shards are put together, nothing is traced."""
    if any((directory / name).exists() for name in (safetensors.SINGLE, safetensors.INDEX)):
        return safetensors.load_sharded(directory)
    if (directory / PICKLED).exists():
        return pickle.load_state_dict(directory / PICKLED)
    present = sorted(entry.name for entry in directory.iterdir())
    raise RewriteError(
        f"{directory} has no weights",
        evidence=[f"expected {safetensors.SINGLE}, {safetensors.INDEX} or {PICKLED}", f"there: {', '.join(present)}"],
        fix="Download the weights too, or convert them to safetensors.",
    )


def _check_report(directory: Path, name: str, report: dict[str, Any]) -> None:
    lines = [f"missing: {key}" for key in sorted(report["missing_keys"])]
    lines += [f"unexpected: {key}" for key in sorted(report["unexpected_keys"])]
    lines += [
        f"another shape: {key}, {list(given)} given, {list(own)} in the model"
        for key, given, own in sorted(report["mismatched_keys"])
    ]
    lines += [str(message) for message in report["error_msgs"]]
    if lines:
        shown = [*lines[:16], *([f"and {len(lines) - 16} more"] if len(lines) > 16 else [])]
        fix = "Give the weights of this architecture, or the class they belong to: architecture=..."
        raise RewriteError(f"the weights in {directory} do not fit {name}", evidence=shown, fix=fix)


@contextmanager
def without_cache(module: torch.nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Switch off the caches of the transformers models in a module, unless the named inputs ask for one.

    `torch.export` can handle the caches either way, and what an earlier run left in the models is put aside.
    """
    for child in module.modules():
        if isinstance(child, PreTrainedModel):
            register_cache_pytrees_for_model(child)
    with reset_model_state(module), _configured_without_cache(module, inputs):
        yield


@contextmanager
def _configured_without_cache(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    configs = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    chosen = {"use_cache", "past_key_values", "cache_params"} & set(inputs)
    before = [] if chosen else [(c, c.use_cache) for c in configs.values() if hasattr(c, "use_cache")]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, value in before:
            config.use_cache = value


# -- writing ------------------------------------------------------------------------------------------------------


def _describe_4bit(path: Path, program: Program) -> None:
    """Let a written config.json say how the weights are held."""
    settings = {**read_json(path), "quantization_config": bitsandbytes.quantization_config(program)}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _companions(source: Path | None) -> list[Path]:
    if source is None:
        return []
    return sorted({file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()})


def _check_reload(program: Program, directory: Path, name: str) -> float:
    if bitsandbytes.stored_names(program):
        return _check_4bit(program, directory, name)
    reloaded = load_model(directory, architecture=name)
    args, kwargs = program.exported.example_inputs or ((), example_inputs(reloaded))
    with torch.no_grad(), _configured_without_cache(reloaded, kwargs):
        typed_args, typed_kwargs = cast_leaf_tensors((args, kwargs), dtype=reloaded.dtype, device=reloaded.device)
        got = reloaded(*typed_args, **typed_kwargs)
    return _compare(name, program(*args, **kwargs), got, reloaded.dtype)


def _check_4bit(program: Program, directory: Path, name: str) -> float:
    example = program.exported.example_inputs
    reloaded = load(directory, architecture=name, inputs=None if example is None else example[1] or example[0])
    args, kwargs = example or reloaded.exported.example_inputs or ((), {})
    kinds = [tensor.dtype for tensor in program.parameters().values() if tensor.is_floating_point()]
    return _compare(name, program(*args, **kwargs), reloaded(*args, **kwargs), (kinds or [torch.float32])[0])


def _compare(name: str, expected: Any, got: Any, dtype: torch.dtype) -> float:
    """The largest difference of the outputs; `LawError` when it is more than rounding."""
    pairs = list(zip(_tensors(expected), _tensors(got), strict=True))
    error = max((float((e.double() - g.double()).abs().max()) for e, g in pairs if e.numel()), default=0.0)
    largest = max((float(e.double().abs().max()) for e, _ in pairs if e.numel()), default=0.0)
    if not error <= RELOAD_TOLERANCE.get(dtype, 1e-4) * max(largest, 1e-30):
        raise LawError(
            f"{name} reloaded from what would be written does not compute what the program computes",
            evidence=[f"largest difference {error:.3g}, largest output {largest:.3g}, type {dtype}"],
            fix="A pass changed the computation, not only weights: export it with `--to torch` or `--to onnx`.",
        )
    return error


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
