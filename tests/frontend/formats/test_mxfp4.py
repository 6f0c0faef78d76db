"""MXFP4 checkpoints have the numbers of transformers, whose models of such experts are of one architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from qeff_ir.errors import ModelLoadError
from qeff_ir.frontend.source import open_source
from tests.formats import Tensors, both_sessions, changed, found, same_numbers, write

SETTINGS: dict[str, Any] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}


def packed(key: str, weight: torch.Tensor) -> Tensors | None:
    """Codes and exponents by chance: rounding is no part of the format."""
    if "experts" not in key or weight.ndim != 3:
        return None
    generator = torch.Generator().manual_seed(weight.shape[1])
    experts, columns, rows = weight.shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(119, 124, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
    return {f"{key}_blocks": blocks, f"{key}_scales": scales}


def test_experts_answer_as_transformers_does_on_both_targets(tmp_path: Path) -> None:
    source = open_source(write("gpt-oss", tmp_path / "model", SETTINGS, packed))
    same_numbers(source)
    parts = found(source)
    assert len(parts) == 4
    assert all(p.block == 32 and p.axis == 1 and p.codes.dtype == ir.DataType.FLOAT4E2M1 for p in parts.values())
    both_sessions(source, tmp_path)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write("gpt-oss", tmp_path, SETTINGS, packed)
    key = "model.layers.0.mlp.experts.down_proj_scales"
    with pytest.raises(ModelLoadError, match=r"down_proj' in blocks of UINT8 \[4, 32, 2, 16\], and no scales"):
        changed(folder, lambda tensors: tensors.pop(key))
    for wrong in (torch.zeros(4, 32, 2), torch.zeros(4, 32, 3, dtype=torch.uint8)):
        with pytest.raises(ModelLoadError, match=r"and scales of \w+ \[4, 32, [23]\]: download"):
            changed(folder, lambda tensors, wrong=wrong: tensors.update({key: wrong}))
