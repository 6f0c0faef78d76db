"""FP8 checkpoints have the numbers that transformers dequantizes them to, and whatever does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

from qeff_ir.errors import ModelLoadError
from qeff_ir.frontend.providers.folder import Folder
from qeff_ir.frontend.source import Source, open_source
from qeff_ir.ranges import file_range
from tests.formats import Tensors, both_sessions, changed, found, same_numbers, write

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def packed(
    block: Sequence[int] | None,
    *,
    dtype: torch.dtype = E4M3,
    scale: torch.dtype = torch.float32,
    ending: str = "_scale_inv",
    skip: str = "lm_head|embed|gate.weight",
) -> Callable[[str, torch.Tensor], Tensors | None]:
    """Divides each block by a scale, which is a power of two if it is a byte."""

    def pack(key: str, weight: torch.Tensor) -> Tensors | None:
        if any(part in key for part in skip.split("|")):
            return None
        high, wide = block or weight.shape
        rows, columns = weight.shape
        padded = torch.zeros(-(-rows // high) * high, -(-columns // wide) * wide)
        padded[:rows, :columns] = weight
        grid = padded.reshape(-(-rows // high), high, -1, wide)
        scales = grid.abs().amax((1, 3)) / (96 if dtype is E4M3 else 4096)
        if scale is torch.uint8:
            exponents = scales.log2().ceil()
            scales, stored = exponents.exp2(), (exponents + 127).to(torch.uint8)
        else:
            stored = scales.to(scale)
            scales = stored.float()
        codes = (grid / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns].to(dtype)
        return {key: codes, key + ending: stored if block else stored.reshape(())}

    return pack


def settings(block: Sequence[int] | None, **more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block, **more}


FORMS: dict[str, tuple[Sequence[int] | None, dict[str, Any], dict[str, Any]]] = {
    "one scale": (None, {}, {"activation_scheme": "static"}),
    "rows": ([1, 32], {"scale": torch.bfloat16}, {"weight_block_size": None}),
    "exponents": ([8, 16], {"scale": torch.uint8}, {"scale_fmt": "ue8m0"}),
    "wide": ([8, 16], {"dtype": E5M2}, {}),
    "another name": ([16, 32], {"ending": ".x"}, {}),
    "left alone": ([8, 16], {"skip": "lm_head|embed|gate_proj"}, {"modules_to_not_convert": ["gate_proj", "lm_head"]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_have_the_numbers_of_transformers(form: str, tmp_path: Path) -> None:
    block, how, more = FORMS[form]
    folder = write("llama", tmp_path, settings(block, **more), packed(block, **how))
    if form == "another name":
        source = changed(folder, lambda all: [all.update({k.replace("weight.x", "scale"): all.pop(k)}) for k in [*all]])
    else:
        source = open_source(folder)
    same_numbers(source)
    assert len(found(source)) == (12 if form == "left alone" else 14)


def test_scales_of_rows_stay_in_the_file(tmp_path: Path) -> None:
    folder = write("llama", tmp_path, settings(None), packed([1, 32], scale=torch.bfloat16))
    parts = found(open_source(folder))
    assert all(file_range(p.scales) is not None and p.scales.dtype == ir.DataType.BFLOAT16 for p in parts.values())


def test_experts_of_one_tensor(tmp_path: Path) -> None:
    """Numbers of 4 bits, two in a byte, beside FP8: what transformers reads of such a file, and nobody writes here."""
    dense = packed([8, 16])

    def pack(key: str, weight: torch.Tensor) -> Tensors | None:
        if "experts" not in key:
            return dense(key, weight)
        torch.manual_seed(len(key))
        codes = torch.randint(-128, 128, (weight.shape[0], weight.shape[1] // 2), dtype=torch.int8)
        return {key: codes, key + "_scale_inv": torch.randint(118, 122, (weight.shape[0], 1), dtype=torch.uint8)}

    source = open_source(write("mixtral", tmp_path, settings([8, 16], expert_dtype="fp4"), pack))
    same_numbers(source)
    experts = {p.codes.dtype for n, p in found(source).items() if "experts" in n}
    assert experts == {ir.DataType.FLOAT4E2M1}


def test_what_transformers_does_not_take_is_decoded_here(tmp_path: Path) -> None:
    """A shorter last block, which it refuses, and the name of the scale that it does not know."""
    for index, (block, ending) in enumerate([([24, 20], "_scale_inv"), ([8, 16], "_scale")]):
        folder = write("llama", tmp_path / str(index), settings(block), packed(block, ending=ending))
        source = Source(provider := Folder(folder))
        assert source.decoded_here()
        tensors, weights = load_file(folder / "model.safetensors"), source.weights()
        for key in provider.checkpoint.decoded:
            codes, scales = tensors[key].float().numpy(), tensors[key + ending].numpy()
            rows, columns = (np.arange(size) // of for size, of in zip(codes.shape, block, strict=True))
            np.testing.assert_array_equal(weights[key].numpy(), codes * scales[np.ix_(rows, columns)], err_msg=key)
        assert all(torch.isfinite(p).all() for p in source.reference().parameters())


def test_scales_of_activations_are_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = write("llama", tmp_path, settings([8, 16], activation_scheme="static"), packed([8, 16]))

    def add(tensors: Tensors) -> None:
        for module in ("q_proj.activation_scale", "q_proj.input_scale", "k_scale"):
            tensors[f"model.layers.0.self_attn.{module}"] = torch.ones(())

    with pytest.warns(UserWarning, match="has 3 scales of activations or of the cache, the first is 'model"):
        source = changed(folder, add)
    same_numbers(source)


def test_refusals(tmp_path: Path) -> None:
    folder = write("llama", tmp_path, settings([8, 16]), packed([8, 16]))
    key = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ModelLoadError, match=r"up_proj\.weight' of one byte a number and no scale"):
        changed(folder, lambda tensors: tensors.pop(key + "_scale_inv"))
    with pytest.raises(ModelLoadError, match=r"_scale_inv' of FLOAT \[3, 2\], which does not fit .* \[64, 32\]"):
        changed(folder, lambda tensors: tensors.update({key + "_scale_inv": torch.ones(3, 2)}))
    with pytest.raises(ModelLoadError, match=r"_scale_inv' of INT64"):
        changed(folder, lambda tensors: tensors.update({key + "_scale_inv": torch.ones(8, 2, dtype=torch.int64)}))
    with pytest.raises(ModelLoadError, match=r"has the tensor '.*up_proj\.weight_offset', which"):
        changed(
            folder,
            lambda tensors: tensors.update({key + "_scale_inv": torch.ones(8, 2), key + "_offset": torch.ones(8, 2)}),
        ).weights()
    config = json.loads((folder / "config.json").read_text())
    before = open_source(folder).identity()
    config["quantization_config"]["weight_block_size"] = [16, 8]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_source(folder).identity() != before  # a package that was made by the other blocks is not taken for it
    config["quantization_config"]["weight_block_size"] = [0, 16]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"weight_block_size is \[0, 16\]: give two positive numbers"):
        open_source(folder)


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_blocks_answer_as_transformers_does_on_both_targets(name: str, tmp_path: Path) -> None:
    source = open_source(write(name, tmp_path / "model", settings([8, 16]), packed([8, 16])))
    same_numbers(source)
    parts = found(source)
    assert len(parts) == {"llama": 14, "phi3": 8, "mixtral": 12}[name]
    assert all(p.block == 16 and p.codes.dtype == ir.DataType.FLOAT8E4M3FN for p in parts.values())
    if name == "llama":
        assert all(file_range(p.codes) is not None for p in parts.values())
    both_sessions(source, tmp_path)
