"""AWQ checkpoints answer as transformers' models of the numbers that the format gives its codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backends import backend_names
from qeff_ir.arrays import Array
from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.frontend.checkpoint.formats.words import paired
from qeff_ir.frontend.source import open_source
from qeff_ir.quantized import quantized
from tests.frontend.formats.writing import Grid, assert_answers_alike, assert_weights_alike, write

SETTINGS: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: Array, order: tuple[int, ...]) -> Array:
    """Codes ``[rows, columns]`` in int32 ``[rows, columns / 8]``, the first column of `order` in the lowest bits."""
    made = np.zeros((len(codes), codes.shape[1] // 8), np.uint64)
    for place, column in enumerate(order):
        made |= codes[:, column::8].astype(np.uint64) << np.uint64(4 * place)
    return made.astype(np.uint32).view(np.int32)


def gemm(grid: Grid) -> dict[str, Array]:
    return {"qweight": words(grid.codes.T, ORDER), "qzeros": words(grid.zeros.T, ORDER), "scales": grid.scales.T}


def gemv(grid: Grid) -> dict[str, Array]:
    more = [(0, 0), (0, -grid.zeros.shape[1] % 8)]
    zeros, scales = np.pad(grid.zeros, more), np.pad(grid.scales, more)
    return {"qweight": words(grid.codes, tuple(range(8))), "qzeros": words(zeros, tuple(range(8))), "scales": scales}


def test_words_are_as_the_packer_of_the_format_writes_them() -> None:
    """What AutoAWQ 0.2.9 makes of the codes 0 to 15 in two rows."""
    assert words(np.arange(16).reshape(2, 8), ORDER).view(np.uint32).ravel().tolist() == [0x75316420, 0xFDB9ECA8]


@pytest.mark.parametrize("name", ["qwen2", "phi3", "mixtral"])
def test_a_checkpoint_answers_as_transformers(name: str, tmp_path: Path) -> None:
    reference = write(name, tmp_path / "model", SETTINGS, gemm)
    assert_answers_alike(tmp_path / "model", reference, *backend_names())


GROUPS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "gemm": ({"zero_point": False}, gemm, 16),
    "gemm of one group": ({"group_size": -1, "modules_to_not_convert": ["down_proj"]}, gemm, 64),
    "gemv": ({"version": "GEMV"}, gemv, 16),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_the_weights_are_those_of_the_definition(kind: str, tmp_path: Path) -> None:
    settings, pack, group = GROUPS[kind]
    alone = "down_proj" if "modules_to_not_convert" in settings else "none"
    reference = write(
        "llama", tmp_path / "model", {**SETTINGS, **settings}, pack, group=lambda n: np.arange(n) // group, alone=alone
    )
    assert_weights_alike(tmp_path / "model", reference)
    weights = open_source(tmp_path / "model").weights()
    parts = {name: quantized(tensor) for name, tensor in weights.items()}
    found = {name for name, part in parts.items() if part is not None}
    assert found == {n for n in weights if n.endswith("proj.weight") and alone not in n}


def test_experts_are_stacked_as_codes(tmp_path: Path) -> None:
    reference = write("mixtral", tmp_path / "model", SETTINGS, gemm)
    assert_weights_alike(tmp_path / "model", reference)
    parts = [p for t in open_source(tmp_path / "model").weights().values() if (p := quantized(t)) and len(p.shape) == 3]
    assert len(parts) == 4 and all(len(p.codes.tobytes()) == p.codes.size // 2 for p in parts)


def test_codes_of_large_matrices_are_moved_in_blocks() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (2056, 1032))
    packed = paired(words(codes, ORDER).view(np.uint32), ORDER)
    np.testing.assert_array_equal(packed & 15, codes.T[:, 0::2])
    np.testing.assert_array_equal(packed >> 4, codes.T[:, 1::2])


@pytest.mark.parametrize(
    "settings", [{"version": "gemv_fast"}, {"bits": 8}, {"group_size": 0}, {"backend": "llm-awq"}, {"version": "ipex"}]
)
def test_what_is_not_read_is_refused_by_name(settings: dict[str, Any], tmp_path: Path) -> None:
    write("llama", tmp_path / "model", {**SETTINGS, **settings}, gemm)
    with pytest.raises(UnsupportedModelError, match=r"AWQ .*is not read"):
        open_source(tmp_path / "model")


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "no zeros": ("self_attn.q_proj.qzeros", None, "lacks 'model.layers.0.self_attn.q_proj.qzeros'"),
    "more zeros": ("self_attn.q_proj.qzeros", np.zeros((3, 4), np.int32), r"qzeros' .* shape \[3, 4\]"),
    "fewer scales": ("self_attn.q_proj.scales", np.ones((1, 32), np.float16), r"scales' .* shape \[1, 32\]"),
    "codes of 16 bits": ("self_attn.q_proj.qweight", np.zeros((32, 8), np.int16), "INT16"),
    "scales of whole numbers": ("self_attn.q_proj.scales", np.ones((2, 32), np.int32), "not BFLOAT16 or"),
    "odd groups": ("self_attn.q_proj.qweight", np.zeros((24, 4), np.int32), "24 inputs: groups of 16"),
    "a tensor more": ("mlp.act.scales", np.ones(64, np.float16), "does not take"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_fit_are_refused(damage: str, tmp_path: Path) -> None:
    name, tensor, message = DAMAGE[damage]
    write("llama", tmp_path / "model", SETTINGS, gemm)
    path = tmp_path / "model" / "model.safetensors"
    tensors = {**load_file(path), f"model.layers.0.{name}": tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=message):
        open_source(tmp_path / "model").weights()
