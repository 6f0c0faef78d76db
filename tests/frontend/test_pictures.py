"""The language model of a multimodal one, given rows: as transformers answers, however the prompt is cut."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.masking_utils import create_causal_mask

from backends import find_backend
from backends.options import CompileOptions
from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError, UnsupportedModelError
from qeff_ir.frontend.capture.merging import Sizes
from qeff_ir.frontend.checkpoint.weights import memory_weights
from qeff_ir.frontend.export.blocks import find_blocks
from qeff_ir.frontend.export.encoders import find_features
from qeff_ir.frontend.export.features import encode, read_features
from qeff_ir.frontend.export.pictures import Pictures, lower_language
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import PICTURE_TOKENS, PICTURES_TOKENS, PREFIX_TOKENS, ROUTED_TOKENS, Role
from qeff_ir.numerics import bound, depth, error_over_rms
from qeff_ir.passing import Pipeline, run_pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.picture_decoder import Pictured, PictureDecoder
from qeff_ir.specialize import specialize
from tests import multimodal, support
from tests.multimodal import IMAGE, MODELS

TARGETS = ["onnxruntime", "ai100"]
STEPS, CHUNK = 4, 8
OPTIONS = CompileOptions(prefill_seq_len=CHUNK, ctx_len=192, batch_size=2)
WHOLE = dataclasses.replace(OPTIONS, prefill_seq_len=48)
"""Room for a prompt whose tokens all see one another."""


@functools.cache
def _lowered(name: str) -> Module:
    model = multimodal.tiny(name)
    form = find_features(model, multimodal.picture(name))
    return lower_language(model, memory_weights(model), form, count=2)


def opened(name: str, target: str, folder: Path) -> tuple[PictureDecoder, int]:
    """A decoder over a tiny model's language program, and the program's depth."""
    module, options = _lowered(name).clone(), WHOLE if MODELS[name].whole else OPTIONS
    specialize(module, options)
    backend = find_backend(target)
    run_pipeline(module, Pipeline.parse(backend.pipeline))
    backend.check(module, options)
    backend.emit(module, folder, options)
    return PictureDecoder(backend.open(folder, threads=1)), depth(module)


@functools.cache
def prompts(name: str) -> list[tuple[list[int], list[dict[str, torch.Tensor]]]]:
    """Two prompts: one with two pictures between words, one of words alone that is shorter."""
    rng, count = np.random.default_rng(3), MODELS[name].rows
    words = [rng.integers(4, 60, n).tolist() for n in (5, 3, 4, 7)]
    ids = [*words[0], *[IMAGE] * count, *words[1], *[IMAGE] * count, *words[2]]
    return [(ids, [multimodal.picture(name, seed) for seed in (5, 9)]), (words[3], [])]


def pictured(name: str, ids: list[int], pictures: list[dict[str, torch.Tensor]]) -> Pictured:
    """What the host would give beside the tokens."""
    model, case = multimodal.tiny(name), MODELS[name]
    if not pictures:
        return Pictured()
    with torch.no_grad():
        found = [read_features(model, encode(model, "image", one)) for one in pictures]
    rows = {"vision_embeds": torch.cat([rows for _, rows, _ in found]).numpy()}
    if found[0][2]:
        layers = [torch.cat(parts) for parts in zip(*(deep for _, _, deep in found), strict=True)]
        rows["deepstack_features"] = torch.stack(layers).numpy()
    types = case.kind * (torch.tensor([ids]) == IMAGE).long()
    planes = None
    if case.planes:
        grids = torch.cat([one["image_grid_thw"] for one in pictures])
        places, _ = model.model.get_rope_index(torch.tensor([ids]), types, image_grid_thw=grids)
        planes = places[:, 0].numpy()
    return Pictured(rows, planes, types[0].numpy() if case.types else None)


@functools.cache
def reference(name: str) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Of each prompt transformers' logits of each step in double precision, ``[steps, vocab]``, and its new tokens."""
    model: Any = copy.deepcopy(multimodal.tiny(name)).double()
    case = MODELS[name]
    found = []
    for ids, pictures in prompts(name):
        given: dict[str, Any] = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        for key in case.picture if pictures else ():
            joined = torch.cat([one[key] for one in pictures], dim=1 if name == "idefics3" else 0)
            given[key] = joined.double() if joined.is_floating_point() else joined
        types = case.kind * (given["input_ids"] == IMAGE).long()
        given |= {case.types: types} if case.types else {"mm_token_type_ids": types} if case.planes else {}
        with torch.no_grad():
            out = model.generate(
                **given, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        found.append((torch.cat(out.logits).numpy(), out.sequences[0, -STEPS:].numpy()))
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_prompts_with_and_without_pictures_answer_as_in_transformers(name: str, target: str, tmp_path: Path) -> None:
    decoder, products = opened(name, target, tmp_path)
    asked, logits = prompts(name), list[Array]()
    for _ in range(2):  # the second time over what the first has left
        decoder.prompts = [pictured(name, *prompt) for prompt in asked]
        logits = [decoder.prefill([ids for ids, _ in asked])]
        for step in range(STEPS - 1):
            logits.append(decoder.decode([int(new[step]) for _, new in reference(name)]))
    for row, (right, tokens) in enumerate(reference(name)):
        found = np.stack([one[row] for one in logits])
        assert error_over_rms(found, right) <= bound(products), row
        assert found.argmax(axis=1).tolist() == tokens.tolist()
    seen, words = (pictured(name, *prompt) for prompt in asked)
    decoder.prompts = [dataclasses.replace(seen, rows={n: 0 * rows for n, rows in seen.rows.items()}), words]
    other = decoder.prefill([ids for ids, _ in asked])
    assert error_over_rms(other[0], reference(name)[0][0][0]) > 0.1  # the pictures are seen
    assert error_over_rms(other[1], reference(name)[1][0][0]) <= bound(products)


def test_a_placeholder_that_is_generated_is_a_token(tmp_path: Path) -> None:
    decoder, products = opened("llava", "onnxruntime", tmp_path)
    (ids, pictures), (words, _) = prompts("llava")
    decoder.prompts = [pictured("llava", ids, pictures), Pictured()]
    decoder.prefill([ids, words])
    logits = decoder.decode([IMAGE, IMAGE])[1]
    model = multimodal.tiny("llava")
    with torch.no_grad():
        right = model(input_ids=torch.tensor([[*words, IMAGE]])).logits[0, -1].numpy()
    assert error_over_rms(logits, right) <= bound(products)
    decoder.prompts = [pictured("llava", ids, pictures), Pictured()]
    assert error_over_rms(decoder.prefill([ids, [*words, IMAGE]])[1], right) <= bound(products)  # or beside words


def test_a_picture_whose_tokens_see_one_another_is_not_cut(tmp_path: Path) -> None:
    decoder, _ = opened("gemma3", "onnxruntime", tmp_path)
    ids, pictures = prompts("gemma3")[0]
    decoder.prompts = [pictured("gemma3", ids, pictures), Pictured()]
    decoder.prefill([ids, [5]])
    assert decoder.whole is PICTURE_TOKENS and decoder._cut(0, len(ids)) == [(0, 5), (5, 12), (12, 20)]
    assert decoder._cut(1, 20) == [(0, 8), (8, 16), (16, 20)]
    long = np.ones(9, dtype=np.int64)
    decoder.prompts = [Pictured({}, None, long), Pictured()]
    with pytest.raises(RuntimeInputError, match=r"takes 9 tokens.* and those have 8: compile with prefill_seq_len=9"):
        decoder.prefill([[5] * 9, [5]])


def test_pictures_whose_tokens_see_one_another_lie_in_one_run(tmp_path: Path) -> None:
    decoder, _ = opened("gemma3", "onnxruntime", tmp_path)
    decoder.whole = PICTURES_TOKENS
    decoder._asked = [Pictured(types=np.array([0] * 5 + [1, 1, 0, 0, 1, 1] + [0] * 9))] * 2
    assert decoder._cut(0, 20) == [(0, 5), (5, 13), (13, 20)]
    decoder._asked = [Pictured(types=np.array([0, 1, 1] + [0] * 7 + [1]))] * 2
    with pytest.raises(RuntimeInputError, match="from the first picture to the last takes 10 tokens"):
        decoder._cut(0, 11)


def test_a_prompt_whose_tokens_see_one_another_lies_in_one_run(tmp_path: Path) -> None:
    decoder, products = opened("paligemma", "onnxruntime", tmp_path)
    words, model = prompts("paligemma")[1][0], multimodal.tiny("paligemma")
    ids, logits = torch.tensor([words]), list[Array]()
    for types in (None, np.ones(len(words), dtype=np.int64)):  # of none, transformers takes 0
        decoder.prompts = [Pictured(types=types)]
        logits.append(decoder.prefill([words, words])[0])
        given = {} if types is None else {"token_type_ids": torch.from_numpy(types)[None]}
        with torch.no_grad():
            right = model(input_ids=ids, **given).logits[0, -1].numpy()
        assert error_over_rms(logits[-1], right) <= bound(products)
    assert error_over_rms(*logits) > 0.01
    with pytest.raises(RuntimeInputError, match="the prompt takes 49 tokens, which must lie in one prefill run"):
        decoder.prefill([[5] * 49, [5]])


def test_a_prompt_that_is_refused_leaves_the_request_before(tmp_path: Path) -> None:
    decoder, _ = opened("llava", "onnxruntime", tmp_path)
    (ids, pictures), (words, _) = prompts("llava")
    given = [pictured("llava", ids, pictures), Pictured()]

    def begun() -> None:
        decoder.prompts = given
        decoder.prefill([ids, words])

    begun()
    decoder.decode([5, 6])
    right = decoder.decode([7, 8])
    begun()
    decoder.decode([5, 6])
    few = given[0].rows["vision_embeds"]
    for wrong, prompt, message in (
        (Pictured(), [5] * 193, "a context of 192"),
        (Pictured({"vision_embeds": np.concatenate([few, few])}), [5], r"has 64 rows, and a prompt may have 32"),
        (Pictured({}, None, np.ones(2, dtype=np.int64)), [5], r"the types are \[2\] for a prompt of 1 tokens"),
    ):
        decoder.prompts = [wrong, Pictured()]
        with pytest.raises(RuntimeInputError, match=message):
            decoder.prefill([prompt, [5]])
    np.testing.assert_array_equal(decoder.decode([7, 8]), right)


def test_pictures_are_those_of_one_prefill(tmp_path: Path) -> None:
    decoder, _ = opened("llava", "onnxruntime", tmp_path)
    (ids, pictures), (words, _) = prompts("llava")
    blank = decoder.prefill([ids, words])
    decoder.prompts = [pictured("llava", ids, pictures), Pictured()]
    assert error_over_rms(decoder.prefill([ids, words])[0], blank[0]) > 0.1
    np.testing.assert_array_equal(decoder.prefill([ids, words]), blank)


def test_a_package_of_pictures_is_not_a_causal_lm(tmp_path: Path) -> None:
    decoder, _ = opened("llava", "onnxruntime", tmp_path)
    with pytest.raises(PackageError, match="open it with QEFFAutoModelForImageTextToText"):
        Decoder(decoder.session)


def test_a_model_without_a_way_in_is_refused() -> None:
    form = find_features(multimodal.tiny("llava"), multimodal.picture("llava"))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM takes no mm_encoder_outputs, by which"):
        Pictures(support.tiny("llama")[1], "image", form, 1, {})


@pytest.mark.parametrize(
    ("groups", "role"),
    [
        (lambda types: torch.where(types == 1, types.ne(types.roll(1)).cumsum(1), -1), PICTURE_TOKENS),
        (lambda types: torch.where(types == 1, 0, -1), PICTURES_TOKENS),
        (lambda types: torch.where(types == 0, 0, -1), PREFIX_TOKENS),
        (torch.zeros_like, "lets words see later tokens of a picture"),
        (lambda types: types, "lets words see later words"),
    ],
)
def test_who_sees_later_tokens_is_found_or_refused(groups: Any, role: Role | str) -> None:
    def masks(
        config: Any, inputs_embeds: Any, attention_mask: Any, past_key_values: Any, position_ids: Any,
        token_type_ids: Any, is_first_iteration: bool = False,
    ) -> Any:  # fmt: skip
        return create_causal_mask(
            config.get_text_config(), inputs_embeds, attention_mask, past_key_values, position_ids,
            block_sequence_ids=groups(token_type_ids),
        )  # fmt: skip

    model: Any = multimodal.build("gemma3")
    model.create_masks_for_generate = masks
    if isinstance(role, Role):
        assert find_blocks(model, "token_type_ids") is role
        return
    form = find_features(model, multimodal.picture("gemma3"))
    with pytest.raises(UnsupportedModelError, match=role):
        lower_language(model, memory_weights(model), form)


def test_sounds_of_a_model_of_pictures_are_given_to_its_encoder() -> None:
    model, sound = multimodal.speaking().thinker, {"input_features": torch.randn(1, 128, 8)}
    sound["feature_attention_mask"] = torch.ones(1, 8, dtype=torch.long)
    form = find_features(model, sound, "audio")
    assert form.rows == 2 and form.also == ("last_hidden_state",)
    module = lower_language(model, memory_weights(model), form, "audio", count=2, example=sound)
    assert [node.op_type for node in module.graph].count("MergeRows") == 1


def test_a_product_of_sizes_fixes_none() -> None:
    sizes = Sizes((2, 3, 4))
    assert (sizes.numel(), sizes[:-1].numel(), sizes[-1], list(sizes)) == (24, 6, 4, [2, 3, 4])


def test_types_of_tokens_for_experts_are_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward = multimodal.build("llava"), multimodal.build("llava").forward

    def routed(mm_encoder_outputs: Any = None, moe_mm_token_type_ids: Any = None, **rest: Any) -> Any:
        return forward(mm_encoder_outputs=mm_encoder_outputs, **rest)

    monkeypatch.setattr(model, "forward", routed)
    form = find_features(model, multimodal.picture("llava"))
    pictures = Pictures(model, "image", form, 1, {})
    assert pictures.routes == "moe_mm_token_type_ids" and pictures.inputs[-1].role is ROUTED_TOKENS
    model = multimodal.build("gemma3")

    def both(
        token_type_ids: Any = None, mm_encoder_outputs: Any = None, other_token_type_ids: Any = None, **r: Any
    ) -> Any:
        return type(model).forward(model, token_type_ids=token_type_ids, mm_encoder_outputs=mm_encoder_outputs, **r)

    monkeypatch.setattr(model, "forward", both)
    form = find_features(model, multimodal.picture("gemma3"))
    with pytest.raises(UnsupportedModelError, match="takes other_token_type_ids beside token_type_ids, by which"):
        lower_language(model, memory_weights(model), form)


@pytest.mark.parametrize("asked", ["placeholders", "vectors"])
def test_only_a_branch_on_placeholders_is_taken(asked: str) -> None:
    model = multimodal.build("llava")
    inner, forward = model.model, model.model.forward

    def branching(input_ids: Any = None, **rest: Any) -> Any:
        kept = inner.get_input_embeddings()(input_ids)
        if ((input_ids == IMAGE).unsqueeze(-1) if asked == "placeholders" else kept > 1e6).any():
            return forward(input_ids=input_ids, **rest)
        return forward(input_ids=input_ids * 0, **rest)

    inner.forward = branching
    form = find_features(model, multimodal.picture("llava"))
    if asked == "vectors":
        with pytest.raises(UnsupportedModelError, match="branches on what only a run knows"):
            lower_language(model, memory_weights(model), form)
    else:
        module = lower_language(model, memory_weights(model), form)
        assert [n.op_type for n in module.graph].count("MergeRows") == 1


def test_inputs_are_those_that_the_model_reads() -> None:
    names = {name: [str(v.name) for v in _lowered(name).graph.inputs if "past" not in str(v.name)] for name in MODELS}
    common = {"input_ids", "position_ids", "vision_embeds", "image_idx"}
    assert {name: set(found) - common for name, found in names.items()} == {
        "llava": set(),
        "llava_next": set(),
        "gemma3": {"mm_token_type_ids"},
        "paligemma": {"mm_token_type_ids"},
        "qwen2_5_vl": {"rope_position_ids"},
        "qwen3_vl": {"rope_position_ids", "deepstack_features"},
        "idefics3": set(),
    }
