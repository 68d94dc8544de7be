"""The demo on the real models: its numbers are the project's promise."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.real


def test_the_demo_keeps_its_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import demo

    monkeypatch.chdir(tmp_path)
    numbers = demo.main()
    assert numbers["|base + adapter - base|"] > 1, "the adapter changes nothing"
    assert numbers["|merged - base + adapter|"] < 1e-4
    assert numbers["|merged, ONNX Runtime - merged|"] < 1e-4
    assert numbers["cosine"] >= 0.98
    assert (tmp_path / "demo-output" / "merged.onnx").stat().st_size > 80e6
