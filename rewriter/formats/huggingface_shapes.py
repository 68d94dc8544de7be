"""Hugging Face configuration -> Program without weights: traced on the meta device, whatever the size of the model."""

from __future__ import annotations

from pathlib import Path

import torch

from rewriter.errors import RewriteError
from rewriter.formats.huggingface import CONFIG, architecture_of, trace_model
from rewriter.formats.huggingface_model import config_class, quiet
from rewriter.formats.json import read_json
from rewriter.program import Program


def load_shapes(
    path: Path, *, architecture: str | None = None, dtype: torch.dtype | None = None, name: str | None = None
) -> Program:
    """The program of a directory with a config.json, or of a configuration file, with tensors that are shapes only.

    No weight is read, and none has to be there. `name` is what the program calls its origin. Without `dtype` the
    weights are fp32.

    Raises `UnsafeError` for a configuration that asks for code, `RewriteError` when its model cannot be built.
    """
    file = path / CONFIG if path.is_dir() else path
    kind = architecture_of(file.parent, read_json(file), architecture)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or torch.float32)
        with quiet(), torch.device("meta"):
            model = kind(config_class(kind).from_pretrained(file, local_files_only=True)).eval()
    except Exception as error:
        raise RewriteError(
            f"transformers cannot build a {kind.__name__} from {file}",
            evidence=[f"{type(error).__name__}: {line}" for line in str(error).strip().splitlines()[:4]],
            fix="Check the configuration.",
        ) from error
    finally:
        torch.set_default_dtype(before)
    return trace_model(model, directory=name or file.parent.resolve().name)
