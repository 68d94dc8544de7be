"""Configurations of well-known models, to plan for them without having them."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def examples() -> dict[str, Path]:
    """Name -> configuration file, as a Hugging Face directory has it; no weights."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.json"), key=lambda file: (len(file.stem), file.stem))}
