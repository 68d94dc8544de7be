"""Program -> transformers model: the architecture the program was traced from, holding the program's tensors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rewriter.errors import RewriteError, closest
from rewriter.program import Program
from rewriter.view import Linear4bit

METADATA = "huggingface"


def model_class(name: str, where: str) -> type[PreTrainedModel]:
    """The model class of transformers with this name; `RewriteError` when there is none."""
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is not None:
        return found
    raise RewriteError(
        f"{where} names the architecture {name!r}, which is no model of transformers {transformers.__version__}",
        evidence=[f"similar: {near}" for near in closest(name, dir(transformers), 3)],
        fix="Use a version of transformers that has it, or name another class: architecture=...",
    )


def filled_model(
    program: Program, dtype: torch.dtype | None, four: Mapping[str, Linear4bit] | None = None
) -> PreTrainedModel:
    """The architecture's own model with the tensors of the program, without a copy of any.

    The weights named in `four`, which the program holds in 4 bits, are stand-ins that take no memory.
    """
    record = program.metadata.get(METADATA)
    if record is None:
        raise RewriteError("the program was not traced from a transformers model", fix="Export it with `--to torch`.")
    kind = model_class(record["architecture"], "the program")
    config = _config(kind, record["config"])
    for leftover in ("quantization_config", "auto_map"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    had_tied = getattr(config, "tie_word_embeddings", None)
    if had_tied is not None:
        config.tie_word_embeddings = True  # so that the model tells which names may be tied
    with torch.device("meta"), quiet():
        model: PreTrainedModel = kind(config)
    tensors = _plain(program, model, four or {})
    _refuse_foreign(program, tensors, model)
    if had_tied is not None:
        pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
        if had_tied:
            _fill_unused(program, tensors, pairs)
        config.tie_word_embeddings = _are_tied(tensors, pairs, had_tied) if pairs else had_tied
    try:
        model.load_state_dict(_cast(tensors, dtype), strict=True, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:9]]
        fix = "Export it with `--to torch`."
        raise RewriteError(f"the program no longer fits {kind.__name__}", evidence=lines, fix=fix) from None
    return model


def _config(kind: type[PreTrainedModel], settings: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration as transformers reads it from a file, which alone understands its spelling of infinity."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        return config_class(kind).from_pretrained(folder, local_files_only=True)


def config_class(kind: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    """The configuration class of a model class that `model_class` gave."""
    assert kind.config_class is not None
    return kind.config_class


def _plain(program: Program, model: PreTrainedModel, four: Mapping[str, Linear4bit]) -> dict[str, torch.Tensor]:
    """The tensors of the program, with a stand-in for every weight that it holds in 4 bits."""
    codes = {name for site in four.values() for name in site.tensors}
    tensors = {name: tensor for name, tensor in program.exported.state_dict.items() if name not in codes}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, site in four.items():
        shape = shapes.get(name, torch.Size([site.out_features, site.in_features]))
        tensors[name] = torch.zeros((), dtype=site.calls[0].meta["val"].dtype).expand(shape)
    return tensors


def _refuse_foreign(program: Program, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> None:
    known = set(model.state_dict())
    foreign = [name for name in tensors if name not in known]
    if foreign:
        steps = {step.name for step in program.steps if set(step.added) & set(foreign)}
        by = f" (added by {', '.join(sorted(steps))})" if steps else ""
        shown = [*foreign[:8], *([f"and {len(foreign) - 8} more"] if len(foreign) > 8 else [])]
        what = f"the program has {len(foreign)} tensors that {type(model).__name__} does not have{by}"
        raise RewriteError(what, evidence=shown, fix="Merge them first, or write them alone with `--to peft`.")


def _fill_unused(program: Program, tensors: dict[str, torch.Tensor], pairs: Mapping[str, str]) -> None:
    """Give a tied name that no operation reads the tensor of its partner: a trace keeps reading one name of a tie."""
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.users]
    used = {program.parameter_name(node) for node in nodes}
    for one, other in pairs.items():
        if other not in used and one in used:
            tensors[other] = tensors[one]
    for one, other in pairs.items():
        if one not in used and other in tensors:
            tensors[one] = tensors[other]


def _are_tied(tensors: Mapping[str, torch.Tensor], pairs: Mapping[str, str], had_tied: bool) -> bool:
    """Whether every pair of names holds one tensor; equal copies count where the configuration already tied them."""
    return all(
        one in tensors
        and other in tensors
        and (_place(tensors[one]) == _place(tensors[other]) or (had_tied and torch.equal(tensors[one], tensors[other])))
        for one, other in pairs.items()
    )


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same view of the same memory."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _cast(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The tensors in `dtype`, tied ones still tied."""
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    for tensor in tensors.values():
        if _place(tensor) not in made:
            floats = dtype is not None and tensor.is_floating_point()
            made[_place(tensor)] = tensor.detach().to(dtype) if floats else tensor
    return {name: made[_place(tensor)] for name, tensor in tensors.items()}


def independent_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors to write; where the configuration ties nothing, every name gets its own."""
    tensors = dict(model.state_dict())
    if getattr(model.config, "tie_word_embeddings", False):
        return tensors
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and tables of transformers off the terminal; what they tell is raised as an error."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
