"""compressed-tensors checkpoints, written by the package's own compressors, have the numbers of its decompressors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file

from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.frontend.checkpoint.formats import Decoded, weight_format
from qeff_ir.frontend.checkpoint.references import read_header
from qeff_ir.frontend.source import open_source
from qeff_ir.quantized import quantized
from qeff_ir.ranges import file_range
from tests.formats import Tensors, both_sessions, changed, found, same_numbers, write

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}),
    "int4 rows": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "int4 zeros": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False},
    ),
    "int8": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32}),
    "int8 zeros": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    "int8 bytes": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 bytes zeros": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    "fp8 rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 16]},
    ),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
}
TOPS = {(4, "int"): 7.0, (8, "int"): 127.0, (8, "float"): 448.0, (4, "float"): 6.0}


def settings(scheme: str, **more: Any) -> dict[str, Any]:
    form, weights = SCHEMES[scheme]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group}, **more,
    }  # fmt: skip


def compressed(scheme: str, weight: torch.Tensor, scale_type: torch.dtype = torch.float32) -> tuple[Tensors, Tensors]:
    """What the package stores of a weight, and what it makes of that again."""
    form, given = SCHEMES[scheme]
    args: Any = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": given, "format": form})
    rows, columns = weight.shape
    wide = given.get("group_size") or (given.get("block_structure") or [0, columns])[1]
    high = {"tensor": rows, "block": 8}.get(given["strategy"], 1)
    blocks = weight.reshape(rows // high, high, columns // wide, wide)
    state: Tensors = {"weight": weight}
    if given.get("symmetric", True):
        scale = blocks.abs().amax((1, 3)) / TOPS[given["num_bits"], given["type"]]
        if scheme == "mxfp4":
            scale = scale.log2().ceil().exp2()
    else:
        low, top = blocks.amin((1, 3)).clamp(max=0), 2 ** given["num_bits"] - 1
        scale = (blocks.amax((1, 3)).clamp(min=0) - low) / top
        state["weight_zero_point"] = (torch.round(-low / scale) - (top + 1) // 2).to(torch.int8)
    if scheme == "nvfp4":
        state["weight_global_scale"] = (448.0 / scale.max()).reshape(1)
        scale = scale * state["weight_global_scale"]
    if given["strategy"] == "tensor":
        scale = scale.reshape(1)
    state["weight_scale"] = scale.to(scale_type)
    packer: Any = BaseCompressor.get_value_from_registry(form)
    made: Tensors = packer.compress(state, args)
    return made, packer.decompress(made, args)


SKIP = "lm_head|embed|mlp.gate.weight|block_sparse_moe.gate"


def packed(scheme: str, **how: Any) -> Callable[[str, torch.Tensor], Tensors | None]:
    def pack(key: str, weight: torch.Tensor) -> Tensors | None:
        if any(part in key for part in SKIP.split("|")):
            return None
        stem = key.removesuffix("weight")
        return {stem + name: tensor for name, tensor in compressed(scheme, weight, **how)[0].items()}

    return pack


def decoded(tensors: Tensors, given: dict[str, Any], folder: Path) -> dict[str, Decoded]:
    save_file({f"m.{name}": t.contiguous() for name, t in tensors.items()}, folder / "one.safetensors")
    return {d.key: d for d in weight_format(given, "config.json").weights(read_header(folder / "one.safetensors"))}


@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_what_the_package_decompresses(scheme: str, scale_type: torch.dtype, tmp_path: Path) -> None:
    """It rounds to the type of the scales (of nvfp4, to bfloat16), and so do we here, after multiplying in float32."""
    torch.manual_seed(5)
    stored, theirs = compressed(scheme, torch.randn(24, 64) + 0.3, scale_type)
    weight = decoded(stored, settings(scheme), tmp_path)["m.weight"]
    rounded = theirs["weight"].dtype
    assert np.ptp(weight.tensor.numpy()) > 1
    torch.testing.assert_close(torch.from_numpy(weight.tensor.numpy()).to(rounded), theirs["weight"], rtol=0, atol=0)
    parts = quantized(weight.tensor)
    assert parts is not None and file_range(parts.codes) is not None and parts.problem() is None
    assert {f"m.{name}" for name in stored} == set(weight.parts)


@pytest.mark.parametrize("scheme", ["int4 zeros", "int8"])
def test_rows_that_do_not_end_with_a_word(scheme: str, tmp_path: Path) -> None:
    SCHEMES["short"] = (SCHEMES[scheme][0], {**SCHEMES[scheme][1], "strategy": "channel", "group_size": None})
    stored, theirs = compressed("short", torch.randn(10, 27))
    weight = decoded(stored, settings("short"), tmp_path)["m.weight"]
    np.testing.assert_array_equal(weight.tensor.numpy(), theirs["weight"].numpy())


def test_inputs_of_a_group_need_not_be_neighbors(tmp_path: Path) -> None:
    stored, _ = compressed("int4 zeros", torch.randn(16, 64))
    codes = (stored["weight_packed"].numpy().view(np.uint32)[..., None] >> np.arange(0, 32, 4) & 15).reshape(16, 64)
    words = stored["weight_zero_point"].numpy().view(np.uint32)
    zeros = (words[:, None] >> np.arange(0, 32, 4)[:, None] & 15).reshape(16, 4)
    groups = torch.arange(64, dtype=torch.int32) * 7 % 64 // 16
    for order in (groups, torch.arange(64, dtype=torch.int32) // 16, torch.full((64,), -1, dtype=torch.int32)):
        weight = decoded({**stored, "weight_g_idx": order}, settings("int4 zeros"), tmp_path)["m.weight"].tensor
        at = order.numpy() if order is groups else np.arange(64) // 16
        expected = (codes - zeros[:, at].astype(np.float32)) * stored["weight_scale"].numpy()[:, at]
        np.testing.assert_array_equal(weight.numpy(), expected.astype(np.float32))
        assert (quantized(weight) is None) == (order is groups)
    with pytest.raises(ModelLoadError, match=r"has groups of \[64\] inputs that are not 4 of 64"):
        decoded({**stored, "weight_g_idx": groups + 1}, settings("int4 zeros"), tmp_path)


MODELS = {
    "llama": ("int4", {"scale_type": torch.bfloat16}),
    "phi3": ("int4 zeros", {}),
    "mixtral": ("int4", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_answer_as_transformers_does_on_both_targets(name: str, tmp_path: Path) -> None:
    scheme, how = MODELS[name]
    source = open_source(write(name, tmp_path / "model", settings(scheme), packed(scheme, **how)))
    same_numbers(source)
    parts = found(source)
    assert len(parts) == {"llama": 14, "phi3": 8, "mixtral": 12}[name]
    assert all(p.block == 16 and p.codes.dtype == ir.DataType.UINT4 for p in parts.values())
    both_sessions(source, tmp_path)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("llama", "int8 zeros"), ("llama", "int8 bytes"), ("llama", "fp8"), ("mixtral", "fp8 rows"), ("mixtral", "int8")],
)
def test_models_have_the_numbers_of_transformers(name: str, scheme: str, tmp_path: Path) -> None:
    source = open_source(write(name, tmp_path, settings(scheme), packed(scheme)))
    same_numbers(source)
    assert len(found(source)) == {"llama": 14, "mixtral": 12}[name]


def test_groups_of_other_bits_are_told_by_the_file(tmp_path: Path) -> None:
    """transformers takes all dense weights for those of one group, so that ours are compared with the package."""
    kept: Tensors = {}

    def pack(key: str, weight: torch.Tensor) -> Tensors | None:
        scheme = "int8" if "mlp" in key else "int4"
        if (made := packed(scheme)(key, weight)) is not None:
            kept[key] = compressed(scheme, weight)[1]["weight"]
        return made

    groups = {str(i): settings(n)["config_groups"]["group_0"] for i, n in enumerate(("int4", "int8"))}
    source = open_source(write("llama", tmp_path, settings("int4", config_groups=groups), pack))
    assert source.decoded_here() and len(kept) == 14
    theirs = source.reference().state_dict()
    for key, weight in kept.items():
        np.testing.assert_array_equal(theirs[key].numpy(), weight.numpy(), err_msg=key)


def test_refusals(tmp_path: Path) -> None:
    for changes, told in (
        ({"format": "marlin-24"}, "the format 'marlin-24' is not read"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "leaves out numbers that are zero"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotates activations while the model runs"),
        ({"config_groups": {}}, "names no groups of weights"),
    ):
        with pytest.raises(UnsupportedModelError, match=told):
            weight_format(settings("int4", **changes), "config.json")
    with pytest.warns(UserWarning, match="only the weights are quantized, kv_cache_scheme have no effect"):
        weight_format(settings("int4", kv_cache_scheme={"num_bits": 8, "type": "float"}), "config.json")
    stored, _ = compressed("int4 zeros", torch.randn(16, 64))
    damage: dict[str, tuple[Callable[[Tensors], object], str]] = {
        "shape": (lambda t: t.pop("weight_shape"), "which are not the codes of 4 bits"),
        "scale": (lambda t: t.pop("weight_scale"), "lacks 'm.weight_scale'"),
        "groups": (lambda t: t.update(weight_scale=torch.ones(16, 3)), r"has scales of FLOAT \[16, 3\]"),
        "zeros": (
            lambda t: t.update(weight_zero_point=torch.ones(1, 4, dtype=torch.int32)),
            "has zero points of INT32",
        ),
        "floats": (lambda t: t.update(weight=t.pop("weight_packed").float()), "is of FLOAT, and has a scale"),
    }
    for change, told in damage.values():
        tensors = dict(stored)
        change(tensors)
        with pytest.raises(ModelLoadError, match=told):
            decoded(tensors, settings("int4 zeros"), tmp_path)
    folder = write("llama", tmp_path / "model", settings("int4"), packed("int4"))
    key = "model.layers.0.self_attn.q_proj.weight_offset"
    source = changed(folder, lambda tensors: tensors.update({key: torch.ones(2)}))
    with pytest.raises(ModelLoadError, match=r"has the tensor '.*q_proj\.weight_offset', which LlamaForCausalLM"):
        source.weights()
