"""GPTQ checkpoints answer as transformers' models of the numbers that the format gives its codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backends import backend_names
from qeff_ir.arrays import Array
from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.frontend.source import open_source
from qeff_ir.quantized import quantized
from tests.frontend.formats.writing import Grid, Pack, assert_answers_alike, assert_weights_alike, write

SETTINGS: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
V2 = {"checkpoint_format": "gptq_v2"}


def words(codes: Array, bits: int) -> Array:
    """Codes ``[rows, columns]`` in int32 ``[rows, columns * bits / 32]``, the first column in the lowest bits."""
    made = np.zeros((len(codes), codes.shape[1] * bits // 32), np.uint32)
    for place, column in enumerate(codes.T.astype(np.uint64)):
        word, shift = divmod(place * bits, 32)
        made[:, word] |= (column << np.uint64(shift)).astype(np.uint32)  # less what does not fit
        if shift + bits > 32:
            made[:, word + 1] |= (column >> np.uint64(32 - shift)).astype(np.uint32)
    return made.view(np.int32)


def packed(bits: int = 4, *, less: int = 1, index: bool = True) -> Pack:
    """The tensors of a layer; `less` is taken from zeros, from the whole word as GPTQModel 7.7.0 does."""
    ones = np.uint32(less * sum(1 << place for place in range(0, 32, bits)))

    def pack(grid: Grid) -> dict[str, Array]:
        tensors = {
            "qweight": words(grid.codes, bits).T,
            "qzeros": (words(grid.zeros.T, bits).view(np.uint32) - ones).view(np.int32),
            "scales": grid.scales.T,
        }
        return {**tensors, "g_idx": grid.group.astype(np.int32)} if index else tensors

    return pack


def shuffled(inputs: int) -> Array:
    """Groups of 16 whose inputs are not neighbors."""
    return np.random.default_rng(inputs).permutation(inputs) // 16


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "mixtral"])
def test_a_checkpoint_answers_as_transformers(name: str, tmp_path: Path) -> None:
    reference = write(name, tmp_path / "model", SETTINGS, packed())
    assert_answers_alike(tmp_path / "model", reference, *backend_names())


def in_groups_of(size: int) -> Callable[[int], Array]:
    return lambda inputs: np.arange(inputs) // size


GROUPS: dict[str, tuple[dict[str, Any], dict[str, Any], int, Callable[[int], Array]]] = {
    "v1": ({}, {}, 4, in_groups_of(16)),
    "v2": (V2, {"less": 0}, 4, in_groups_of(16)),
    "8 bits": ({"bits": 8}, {"bits": 8}, 8, in_groups_of(16)),
    "no index": ({}, {"index": False}, 4, in_groups_of(16)),
    "one group": ({"group_size": -1}, {}, 4, in_groups_of(64)),
    "a short group": ({"group_size": 24}, {}, 4, in_groups_of(24)),
    "2 bits": ({"bits": 2}, {"bits": 2}, 2, in_groups_of(16)),
    "3 bits": ({"bits": 3, **V2}, {"bits": 3, "less": 0}, 3, in_groups_of(16)),
    "other bits in some layers": ({"dynamic": {"+:.*": {"bits": 8}}}, {"bits": 8}, 8, in_groups_of(8)),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_the_weights_are_those_of_the_definition(kind: str, tmp_path: Path) -> None:
    settings, how, bits, group = GROUPS[kind]
    name = "qwen3" if bits == 3 else "llama"  # of 3 bits, 32 codes fill their words: so many outputs divide
    reference = write(name, tmp_path / "model", {**SETTINGS, **settings}, packed(**how), bits=bits, group=group)
    assert_weights_alike(tmp_path / "model", reference)
    weights = open_source(tmp_path / "model").weights()
    assert {n for n, t in weights.items() if quantized(t) is not None} == {n for n in weights if "proj.weight" in n}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_inputs_of_a_group_need_not_be_neighbors(name: str, tmp_path: Path) -> None:
    reference = write(name, tmp_path / "model", {**SETTINGS, "desc_act": True}, packed(), group=shuffled)
    assert_weights_alike(tmp_path / "model", reference)


def test_a_model_whose_inputs_were_sorted_answers_as_transformers(tmp_path: Path) -> None:
    reference = write("llama", tmp_path / "model", {**SETTINGS, "desc_act": True}, packed(), group=shuffled)
    assert_answers_alike(tmp_path / "model", reference, "onnxruntime")


@pytest.mark.parametrize("settings", [{"checkpoint_format": "marlin"}, {"bits": 5}, {"group_size": 0}])
def test_what_is_not_read_is_refused_by_name(settings: dict[str, Any], tmp_path: Path) -> None:
    write("llama", tmp_path / "model", {**SETTINGS, **settings}, packed())
    with pytest.raises(UnsupportedModelError, match=r"GPTQ .*is not read"):
        open_source(tmp_path / "model")


def test_zeros_that_mean_two_things_are_refused(tmp_path: Path) -> None:
    write("qwen3", tmp_path / "model", {**SETTINGS, "bits": 3}, packed(3), bits=3)
    with pytest.raises(UnsupportedModelError, match=r"codes of 3 bits in format gptq, .* in format gptq_v2"):
        open_source(tmp_path / "model").weights()


def test_layers_that_are_the_other_way_round_are_refused(tmp_path: Path) -> None:
    write("gpt2", tmp_path / "model", SETTINGS, packed(), alone="transformer.w")
    with pytest.raises(UnsupportedModelError, match=r"'transformer\.h\.0\.\w+\.c_\w+' of .* is a Conv1D"):
        open_source(tmp_path / "model").weights()


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "no scales": ("scales", None, "lacks 'model.layers.0.self_attn.q_proj.scales'"),
    "no index": ("g_idx", None, "lacks 'model.layers.0.self_attn.q_proj.g_idx'"),
    "a short index": ("g_idx", np.zeros(16, np.int32), r"g_idx' .* shape \[16\]"),
    "too many groups": ("g_idx", np.full(32, 2, np.int32), "belong to groups 2 to 2"),
    "groups below zero": ("g_idx", np.arange(-1, 31, dtype=np.int32) // 16, "belong to groups -1 to 1"),
    "zeros of another layer": ("qzeros", np.zeros((3, 4), np.int32), r"qzeros' .* shape \[3, 4\]"),
    "zeros of 5 bits": ("qzeros", np.zeros((2, 5), np.int32), "codes of 5 bits"),
    "codes of fewer outputs": ("qweight", np.zeros((4, 24), np.int32), r"qweight' .* shape \[4, 24\]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_fit_are_refused(damage: str, tmp_path: Path) -> None:
    name, tensor, message = DAMAGE[damage]
    write("llama", tmp_path / "model", {**SETTINGS, "desc_act": True}, packed())
    path = tmp_path / "model" / "model.safetensors"
    tensors = {**load_file(path), f"model.layers.0.self_attn.q_proj.{name}": tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, path, metadata={"format": "pt"})
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=message):
        open_source(tmp_path / "model").weights()
