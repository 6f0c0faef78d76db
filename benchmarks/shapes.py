"""The models that suites measure: shapes of decoders, with random weights or with none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

Shape = dict[str, int]

SHAPES: dict[str, Shape] = {
    "tiny": {"hidden": 64, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 128, "vocab": 512},
    "125M": {"hidden": 768, "layers": 12, "heads": 12, "kv_heads": 12, "intermediate": 3072, "vocab": 32000},
    "0.5B": {"hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "intermediate": 4864, "vocab": 151936},
    "7B": {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "intermediate": 11008, "vocab": 32000},
    "70B": {"hidden": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "intermediate": 28672, "vocab": 128256},
}
"""By the number of parameters, roughly."""


def config(shape: Shape, ctx_len: int = 2048) -> LlamaConfig:
    """The configuration of a decoder of a shape."""
    return LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=max(2048, ctx_len),
    )


def random_model(name: str, ctx_len: int) -> PreTrainedModel:
    """A decoder of a shape with the same random weights every time, float32.

    Raises:
        typer.BadParameter: There is no such shape.
    """
    if name not in SHAPES:
        raise typer.BadParameter(f"there is no shape '{name}': it is one of {', '.join(SHAPES)}")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(SHAPES[name], ctx_len), dtype=torch.float32).eval()


def prompts(name: str, batch: int, length: int, seed: int = 1) -> list[list[int]]:
    """Random tokens, the same ones every time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPES[name]["vocab"], (batch, length), generator=generator).tolist()


def probe(folder: Path, target: str, *, opened: bool = False) -> dict[str, dict[str, Any]]:
    """Compile the model of a folder in a fresh process (`benchmarks.probe`); what it printed, by stage.

    Raises:
        SystemExit: The measurement failed.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.probe", str(folder), target]
    done = subprocess.run([*command, *(["--open"] if opened else [])], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the measurement of {folder} for {target} failed:\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["stage"]: row for row in rows}
