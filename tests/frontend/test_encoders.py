"""The encoder of a multimodal model as a program: rows as transformers makes them, geometry as constants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bart.modeling_bart import eager_attention_forward

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.capture.forward_attention import captured_forward
from qeff_ir.frontend.checkpoint.references import open_checkpoint
from qeff_ir.frontend.checkpoint.skeleton import build_skeleton
from qeff_ir.frontend.checkpoint.weights import checkpoint_weights, memory_weights
from qeff_ir.frontend.export.encoders import find_features, lower_encoder
from qeff_ir.frontend.export.features import encode, read_features
from qeff_ir.frontend.export.lower import convert
from qeff_ir.frontend.export.spelling import drop_idle_squeezes
from qeff_ir.ir.module import SOURCE_KEY, WEIGHT_KEY, Module
from qeff_ir.numerics import bound, depth, error_over_rms
from qeff_ir.ranges import file_range
from tests import multimodal, support
from tests.multimodal import MODELS


def lowered(name: str) -> Module:
    model = multimodal.tiny(name)
    return lower_encoder(model, memory_weights(model), multimodal.picture(name))


def rows_of(model: PreTrainedModel, picture: dict[str, torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    """What transformers makes of a picture in double precision: its rows, then those for layers."""
    exact = copy.deepcopy(model).double()
    given = {n: value.double() if value.is_floating_point() else value for n, value in picture.items()}
    with torch.no_grad():
        _, rows, layers = read_features(exact, encode(exact, "image", given))
    return [found.numpy() for found in (rows, *layers)]


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    module = lowered(name)
    other = multimodal.picture(name, seed=9)  # not the one that was traced
    expected = rows_of(multimodal.tiny(name), other)
    support.apply(module, f"{support.CANONICAL},fuse-norms,fuse-activations")
    feeds = {str(v.name): other[str(v.name)].numpy() for v in module.graph.inputs}
    made = support.run_graph(module, tmp_path, feeds)
    found = [made["vision_embeds"][0], *(one[0] for one in made.get("deepstack_features", []))]
    names = ["vision_embeds"] + ["deepstack_features"] * (len(expected) - 1)
    for one, right, output in zip(found, expected, names, strict=True):
        assert error_over_rms(one, right) <= bound(depth(module, output))
    assert made["vision_embeds"].shape == (1, MODELS[name].rows, 32)


@pytest.mark.parametrize("name", MODELS)
def test_only_floats_are_inputs_and_nothing_has_an_open_size(name: str) -> None:
    module, picture = lowered(name), multimodal.picture(name)
    floats = {key: list(value.shape) for key, value in picture.items() if value.is_floating_point()}
    assert {str(v.name): list(v.shape or []) for v in module.graph.inputs} == floats
    assert module.dims == {} and module.residents == []
    sizes = [v.shape for n in module.graph for v in n.outputs if v.shape is not None]
    assert len(sizes) > 50 and all(shape.is_static() for shape in sizes)
    ops = {node.op_type for node in ir.traversal.RecursiveGraphIterator(module.graph)}
    assert "MatMul" in ops or "Gemm" in ops
    assert not [op for op in ops if "Sequence" in op or op in ("Loop", "NonZero", "If")]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_weights_of_a_folder_are_references(name: str, tmp_path: Path) -> None:
    model = multimodal.tiny(name)
    model.save_pretrained(tmp_path / "model")
    skeleton = build_skeleton(copy.deepcopy(model.config), auto=AutoModelForImageTextToText)
    weights = checkpoint_weights(skeleton, open_checkpoint(tmp_path / "model"))
    module = lower_encoder(skeleton, weights, multimodal.picture(name))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    held = [v for v in module.graph.initializers.values() if WEIGHT_KEY in v.metadata_props]
    assert len(held) > 20 and all(file_range(v.const_value) is not None for v in held)
    text = [v.name for v in held if "language_model" in str(v.name) or "lm_head" in str(v.name)]
    assert text == []
    picture = multimodal.picture(name, seed=9)
    feeds = {str(v.name): picture[str(v.name)].numpy() for v in module.graph.inputs}
    support.apply(module, support.CANONICAL)
    made = support.run_graph(module, tmp_path / "run", feeds)["vision_embeds"][0]
    assert error_over_rms(made, rows_of(model, picture)[0]) <= bound(depth(module, "vision_embeds"))


def test_a_model_is_left_as_it_was() -> None:
    model = multimodal.build("llava")
    picture = multimodal.picture("llava", seed=9)
    with torch.no_grad():
        before = encode(model, "image", picture)
    hooks = {name: list(module._forward_hooks) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    lower_encoder(model, memory_weights(model), multimodal.picture("llava"))
    with torch.no_grad():
        after = encode(model, "image", picture)
    assert all(torch.equal(a, b) for a, b in zip(before.pooler_output, after.pooler_output, strict=True))
    assert {name: list(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_the_form_is_found_without_weights() -> None:
    skeleton = build_skeleton(copy.deepcopy(multimodal.tiny("qwen3_vl").config), auto=AutoModelForImageTextToText)
    form = find_features(skeleton, multimodal.picture("qwen3_vl"))
    assert (form.rows, form.width, form.listed, form.layers) == (8, 32, True, ((None, True), (None, True)))
    made = form.filled(torch.ones(8, 32), [torch.ones(8, 32), torch.zeros(8, 32)], {})
    again, rows, layers = read_features(skeleton, made)
    assert again == form and rows.sum() == 256 and [int(one.sum()) for one in layers] == [256, 0]


def test_a_model_without_an_encoder_is_refused() -> None:
    model = support.tiny("llama")[1]
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no get_image_features, by which"):
        lower_encoder(model, memory_weights(model), multimodal.picture("llava"))


@pytest.mark.parametrize("picked", ["value", "length", "sum"])
def test_what_depends_on_a_weight_is_refused_by_name(picked: str) -> None:
    """Which rows are kept is known of pixels on the example, and never of what a weight makes of them."""
    model = multimodal.build("gemma3")
    projector = model.model.multi_modal_projector
    forward = projector.forward

    def chosen(hidden: torch.Tensor) -> torch.Tensor:
        rows = forward(hidden)[0]
        if picked == "value":
            return rows[rows[:, 0] > 0][None]
        if picked == "sum":
            return (rows + rows[rows[:, 0] > 0].sum(0))[None]
        return torch.cat([rows[:1]] * int((rows > 0).sum()))[None]

    projector.forward = chosen
    said = "makes a NonZero in" if picked == "sum" else "has an image encoder that cannot be traced: it branches on"
    with pytest.raises(UnsupportedModelError, match=said):
        lower_encoder(model, memory_weights(model), multimodal.picture("gemma3"))


@pytest.mark.parametrize("way", ["an item", "a view", "an operator", "a weight", "a weight apart", "a weight by out"])
def test_what_is_written_is_not_what_it_was(way: str) -> None:
    model = multimodal.build("gemma3")
    inner, encode_all = model.model, model.model.get_image_features
    weight = next(model.parameters())

    def choosing(pixel_values: Any, **rest: Any) -> Any:
        kept = pixel_values[0, 0, 0, :4] * 0.0 + 1.0
        if way == "an item":
            kept[3] = -1.0
        elif way == "a view":
            kept[3:].fill_(-1.0)
        elif way == "a weight":
            kept[3:].copy_(weight.flatten()[:1] * 0.0 - 1.0)
        elif way == "a weight apart":
            kept.detach()[3:].copy_(weight.flatten()[:1] * 0.0 - 1.0)
        elif way == "a weight by out":
            torch.sub(torch.tensor([1.0, 1.0, 1.0, -1.0]), weight.flatten()[:4] * 0.0, out=kept)
        else:
            kept -= torch.tensor([0.0, 0.0, 0.0, 2.0])
        out = encode_all(pixel_values=pixel_values, **rest)
        out.pooler_output = out.pooler_output[:, kept > 0]
        return out

    inner.get_image_features = choosing
    example = multimodal.picture("gemma3")
    with torch.no_grad():
        assert choosing(example["pixel_values"], return_dict=True).pooler_output.shape[1] == 3
    if way.startswith("a weight"):  # of which only a run knows what it is
        with pytest.raises(UnsupportedModelError, match="branches on what only a run knows"):
            find_features(model, example)
    else:
        assert find_features(model, example).rows == 3  # not the four from before


def test_numbers_are_those_from_before_they_were_written(tmp_path: Path) -> None:
    """A trace holds known numbers as they are, and not what is written into them later."""
    model = multimodal.build("gemma3")
    inner, encode_all = model.model, model.model.get_image_features

    def chosen(pixel_values: Any, **rest: Any) -> Any:
        out, places = encode_all(pixel_values=pixel_values, **rest), torch.arange(4)
        first = out.pooler_output[:, places]
        places -= 1
        out.pooler_output = first + 2.0 * out.pooler_output[:, places]
        return out

    inner.get_image_features = chosen
    module = lower_encoder(model, memory_weights(model), multimodal.picture("gemma3"))
    other = multimodal.picture("gemma3", seed=9)
    rows = rows_of(multimodal.tiny("gemma3"), other)[0]
    support.apply(module, support.CANONICAL)
    made = support.run_graph(module, tmp_path, {"pixel_values": other["pixel_values"].numpy()})["vision_embeds"][0]
    assert error_over_rms(made, rows + 2.0 * rows[[-1, 0, 1, 2]]) <= bound(depth(module, "vision_embeds"))


@pytest.mark.parametrize("way", ["pixels", "a weight", "out"])
def test_what_a_run_makes_is_not_written_into_known_numbers(way: str) -> None:
    """Its values on the example would stay in the graph, or those from before."""
    model = multimodal.build("gemma3")
    inner, encode_all, weight = model.model, model.model.get_image_features, next(model.parameters())

    def choosing(pixel_values: Any, **rest: Any) -> Any:
        places = torch.zeros(4, dtype=torch.long)
        if way == "pixels":
            places[1:] = (pixel_values[0, 0, 0, :3] > 0).long()
        elif way == "a weight":
            places += (weight.flatten()[:4] > 0).long()
        else:
            torch.add(places, (weight.flatten()[:4] > 0).long(), out=places)
        out = encode_all(pixel_values=pixel_values, **rest)
        out.pooler_output = out.pooler_output[:, places]
        return out

    inner.get_image_features = choosing
    with pytest.raises(UnsupportedModelError, match=r"into a tensor of numbers that are known before \(\w+\): make"):
        lower_encoder(model, memory_weights(model), multimodal.picture("gemma3"))


def test_pieces_of_a_split_are_slices(tmp_path: Path) -> None:
    model = multimodal.build("gemma3")
    projector = model.model.multi_modal_projector
    forward = projector.forward
    projector.forward = lambda hidden: torch.cat(torch.split(forward(hidden), [1, 3], dim=1)[::-1], dim=1)
    module = lower_encoder(model, memory_weights(model), multimodal.picture("gemma3"))
    other = multimodal.picture("gemma3", seed=9)
    expected = rows_of(multimodal.tiny("gemma3"), other)[0][[1, 2, 3, 0]]
    support.apply(module, support.CANONICAL)
    made = support.run_graph(module, tmp_path, {"pixel_values": other["pixel_values"].numpy()})["vision_embeds"][0]
    assert error_over_rms(made, expected) <= bound(depth(module, "vision_embeds"))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_a_layer_has_one_attention_whatever_its_windows(name: str) -> None:
    module = lowered(name)
    layers = [node.metadata_props[SOURCE_KEY] for node in module.graph if node.op_type == "Attention"]
    assert len(layers) == len(set(layers)) > 0


def test_an_axis_that_is_longer_than_one_is_not_squeezed(tmp_path: Path) -> None:
    """Neither one that is known, nor the batch, whatever its size is."""

    class Squeezed(torch.nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            some = rows.squeeze(0).squeeze(1) + rows.squeeze((0, 2))[..., None]
            return some + rows.squeeze()[..., None] + rows.squeeze(-1)[..., None]

    sizes = {"rows": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Squeezed(), (torch.ones(2, 3, 1),), dynamic_shapes=sizes, strict=False)
    drop_idle_squeezes(program)
    module = Module(convert(program, ["rows"], ["out"]).model, "Squeezed")
    assert [node.op_type for node in module.graph].count("Squeeze") == 3
    for batch in (1, 4):
        rows = np.arange(3.0 * batch, dtype=np.float32).reshape(batch, 3, 1)
        assert np.array_equal(support.run_graph(module, tmp_path / str(batch), {"rows": rows})["out"], rows * 4)


@pytest.mark.parametrize("masked", [True, False])
def test_a_mask_of_truths_is_not_added_to_scores(masked: bool) -> None:
    """As sdpa takes it: transformers hands on a mask that a model has made, whoever is to take it."""
    model = copy.deepcopy(multimodal.tiny("llava"))
    drawn = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn((2, 4, 5, 8), generator=drawn) for _ in range(3))
    mask = torch.rand((2, 1, 5, 5), generator=drawn) > 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    right = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask if masked else None)
    with captured_forward(model):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager_attention_forward)
    found, _ = attend(model, query, key, value, mask if masked else None, scaling=8**-0.5)
    assert error_over_rms(found.transpose(1, 2).numpy(), right.numpy()) <= 1e-6


class Halved(torch.nn.Module):
    """Splits tokens as attention does, and is none."""

    def __init__(self, inner: torch.nn.Module, split: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.split = inner, split

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        first, second = self.split(hidden[None, None], [3, len(hidden) - 3], dim=2)
        return self.inner(torch.cat([first * 2.0, second], dim=2)[0, 0], *args, **kwargs)


def by_method(tensor: torch.Tensor, lengths: list[int], dim: int) -> Any:
    return tensor.split(lengths, dim=dim)


@pytest.mark.parametrize("split", [by_method, torch.split])
def test_what_is_split_for_something_else_is_split(split: Callable[..., Any], tmp_path: Path) -> None:
    model, picture = copy.deepcopy(multimodal.tiny("qwen2_5_vl")), multimodal.picture("qwen2_5_vl", seed=9)
    model.model.visual.blocks[1] = Halved(model.model.visual.blocks[1], split)
    module = lower_encoder(model, memory_weights(model), multimodal.picture("qwen2_5_vl"))
    support.apply(module, f"{support.CANONICAL},fuse-norms,fuse-activations")
    feeds = {str(v.name): picture[str(v.name)].numpy() for v in module.graph.inputs}
    found, (right,) = support.run_graph(module, tmp_path, feeds)["vision_embeds"][0], rows_of(model, picture)
    assert error_over_rms(found, right) <= bound(depth(module, "vision_embeds"))
