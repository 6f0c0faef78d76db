"""Adapters of the language model of pictures and text, beside PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel

from qeff_ir import QEffAutoPeftModelForImageTextToText
from qeff_ir.errors import AdapterError, RuntimeInputError
from qeff_ir.numerics import error_over_rms
from qeff_ir.runtime.read_out import shares
from tests import multimodal, support
from tests.adapters.random_adapters import make
from tests.processors import PROCESSORS
from tests.test_image_text import LOOSE, SHAPES, logits, pictures, processed, processor, texts

NAME = "llava"
TOKENS = [7, 33]
TEXT = r".*language_model.*\.(q_proj|down_proj)"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PeftModel]]:
    """Two adapters of the language model, the second of another rank, and one of the encoder too."""
    folder, model = tmp_path_factory.mktemp("adapters"), multimodal.lively(NAME)
    model.save_pretrained(folder / "model")
    processor(NAME).save_pretrained(folder / "model")
    found: dict[str, tuple[Path, PeftModel]] = {}
    for seed, (name, targets, rank) in enumerate([("one", TEXT, 4), ("two", TEXT, 2), ("both", ["q_proj"], 2)]):
        config: dict[str, Any] = {"target_modules": targets, "r": rank, "lora_alpha": 16}
        found[name] = folder / name, make(model, folder / name, seed, **config)
    return found


@pytest.mark.parametrize(("target", "kv_offload"), [("ai100", True), ("onnxruntime", False)])
def test_each_row_has_its_adapter(
    target: str, kv_offload: bool, adapters: dict[str, tuple[Path, PeftModel]], tmp_path: Path
) -> None:
    folder, one = adapters["one"]
    model = QEffAutoPeftModelForImageTextToText.from_pretrained(
        folder, "one", base_model=folder.parent / "model", kv_offload=kv_offload
    )
    model.compile(
        target=target, image_size=PROCESSORS[NAME].size, compile_dir=tmp_path, emit_only=True, **SHAPES,
        adapter_slots=2, lora_targets="q_proj,down_proj", lora_bias="all",
    )  # fmt: skip
    branches = {str(r.path) for r in model.runner().decoder.session.interface.residents if r.part is not None}
    assert len(branches) == 6 and all("language_model" in layer for layer in branches)
    model.load_adapter(adapters["two"][0], "two", check_base_model=False)
    text, images = texts(NAME), [pictures(NAME, [1, 2]), pictures(NAME, [3])]
    by_name: dict[str | None, Any] = {"one": one, "two": adapters["two"][1], None: multimodal.lively(NAME)}

    def right(names: Sequence[str | None]) -> list[Any]:
        rows = zip(names, images, text, strict=True)
        return [logits(by_name[name], **processed(NAME, [own], [said]))[0] for name, own, said in rows]

    wholes: list[Any] = []
    for names in (["one", None], ["two", "one"], [None, "two"]):
        found = logits(model, **processed(NAME, images, text), adapters=names)
        assert all(error_over_rms(row, wanted) <= LOOSE for row, wanted in zip(found, right(names), strict=True))
        wholes.append(found)
    assert np.abs(wholes[0] - wholes[1]).max() > 0.1  # adapters change answers
    said = model.generate(
        prompts=text, images=[[np.asarray(one) for one in own] for own in images], processor=processor(NAME),
        adapters=["two", None], max_new_tokens=4, min_new_tokens=4,
    )  # fmt: skip
    for row, (name, own, prompt) in enumerate(zip(["two", None], images, text, strict=True)):
        given = processed(NAME, [own], [prompt])
        out = support.generate(by_name[name], **given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert said.generated_ids[row] == out[0, -4:].tolist()
    active, mixed = (shares(np.stack(right(names)), TOKENS) for names in (["one", "one"], [None, "one"]))
    for found, wanted in (
        (model.score(tokens=TOKENS, **processed(NAME, images, text)), active),
        (model.score(tokens=TOKENS, **processed(NAME, images, text), adapters=[None, "one"]), mixed),
        (model.score(tokens=TOKENS, prompts=text, images=images, processor=processor(NAME)), active),
    ):
        assert error_over_rms(found, wanted) <= LOOSE
    with pytest.raises(RuntimeInputError, match="there are 1 adapters for 2 rows: name one for each"):
        model.generate(**processed(NAME, images, text), adapters=["one"])
    with pytest.raises(AdapterError, match=r"changes model\.vision_tower"):
        model.load_adapter(adapters["both"][0], "both", check_base_model=False)


def test_an_adapter_of_the_encoder_is_told(adapters: dict[str, tuple[Path, PeftModel]], tmp_path: Path) -> None:
    folder, _ = adapters["both"]
    model = QEffAutoPeftModelForImageTextToText.from_pretrained(folder, "both", base_model=folder.parent / "model")
    with pytest.raises(AdapterError, match=r"'both' changes model\.vision_tower\..* a layer of the encoder: only"):
        model.compile(
            target="onnxruntime", image_size=PROCESSORS[NAME].size, compile_dir=tmp_path, emit_only=True, **SHAPES
        )
