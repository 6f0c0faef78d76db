"""What a package of text can have, each program of one of pictures and text has too."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from backends import find_backend
from backends.ai100 import weight_free
from backends.options import CompileOptions
from qeff_ir import QEFFAutoModelForImageTextToText
from qeff_ir.adapters.fit import package_weights
from qeff_ir.cost import cost
from qeff_ir.frontend.picture_source import PictureSource
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.ir.module import Module
from qeff_ir.package import MAIN, program_folder
from qeff_ir.passing import Pipeline, run_pipeline
from qeff_ir.specialize import specialize
from tests import multimodal
from tests.processors import PROCESSORS
from tests.test_image_text import SHAPES, answered, expected, pictures, processed, processor, texts

NAME = "llava"


def compiled(out: Path, model: Any = None, *, kv_offload: bool = True, **more: Any) -> QEFFAutoModelForImageTextToText:
    made = QEFFAutoModelForImageTextToText(model or multimodal.lively(NAME), processor(NAME), kv_offload=kv_offload)
    options: dict[str, Any] = {"target": "ai100", "image_size": PROCESSORS[NAME].size, "emit_only": True, **SHAPES}
    made.compile(compile_dir=out, **options, **more)
    return made


def model_of(package: Path, program: str) -> Path:
    return find_backend("ai100").model_file(program_folder(package, program))


@pytest.mark.parametrize(("kv_offload", "more"), [(True, {"weight_free": True}), (False, {"sub_functions": True})])
def test_other_forms_of_the_files_answer_alike(kv_offload: bool, more: dict[str, Any], tmp_path: Path) -> None:
    model = compiled(tmp_path, kv_offload=kv_offload, **more)
    text, images = texts(NAME), [pictures(NAME, [1, 2]), pictures(NAME, [3])]
    right = [expected(NAME, own, said) for own, said in zip(images, text, strict=True)]
    assert answered(model, **processed(NAME, images, text)) == right
    for program in model.package.manifest.programs:
        proto = onnx.load(str(model_of(tmp_path, program)), load_external_data=False)
        if kv_offload:
            assert weight_free.specification(proto) is not None
            assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer)
        else:  # a function for all layers of the language model
            assert any(len([n for n in proto.graph.node if n.op_type == f.name]) == 3 for f in proto.functions)


@pytest.mark.parametrize(("prefill_only", "phase"), [(True, "Prefill"), (False, "Decode")])
def test_a_language_model_of_one_phase_is_called_by_it(prefill_only: bool, phase: str, tmp_path: Path) -> None:
    model = QEFFAutoModelForImageTextToText(multimodal.lively(NAME), processor(NAME))
    options: dict[str, Any] = {"target": "ai100", "image_size": PROCESSORS[NAME].size, "emit_only": True, **SHAPES}
    paths = model.compile(compile_dir=tmp_path, prefill_only=prefill_only, **options)
    name = f"lang_{phase.lower()}_qpc_path"
    assert paths == {name: str(tmp_path), "vision_qpc_path": str(tmp_path / "vision")}
    found = json.loads((tmp_path / "specializations.json").read_text())["specializations"]
    assert [entry["name"] for entry in found] == [phase]


def test_drafts_in_a_package_for_pictures_change_no_answer(tmp_path: Path) -> None:
    model = compiled(tmp_path, num_speculative_tokens=2)
    text, images = texts(NAME), [pictures(NAME, [1, 2]), pictures(NAME, [3])]
    right = [expected(NAME, own, said) for own, said in zip(images, text, strict=True)]
    assert answered(model, **processed(NAME, images, text)) == right


def test_weights_are_clipped_in_each_program(tmp_path: Path) -> None:
    model: Any = multimodal.build(NAME)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.bias[0] = -1e5
        model.model.language_model.embed_tokens.weight[40, 0] = 1e5
    compiled(tmp_path, model, pipeline="-fp16-clip,+fp16-clip{weights=true}<join-planes")
    bias = package_weights(model_of(tmp_path, "vision"))("model.multi_modal_projector.linear_1.bias")
    table = package_weights(model_of(tmp_path, MAIN))("model.language_model.embed_tokens.weight")
    assert bias is not None and table is not None
    assert (float(bias[0]), float(table[40, 0])) == (-65504.0, 65504.0)
    assert np.abs(bias[1:]).max() < 10


def modules(*, single: bool) -> dict[str, Module]:
    """The programs of the model as they are lowered."""
    return {program: module.clone() for program, module in lowered(single=single).items()}


@functools.cache
def lowered(*, single: bool) -> dict[str, Module]:
    source = PictureSource(Memory(multimodal.lively(NAME), processor(NAME)))
    source.single_program = single
    known = source.for_pictures([PROCESSORS[NAME].size], 1, 2)
    found = {program: lower() for program, lower in known.programs().items()}
    for module in found.values():
        specialize(module, CompileOptions(prefill_seq_len=8, ctx_len=32, batch_size=2), "Vision")
    return found


@pytest.mark.parametrize("single", [False, True])
def test_each_program_is_driven_after_every_pass(single: bool) -> None:
    for name, module in modules(single=single).items():
        report = run_pipeline(module, Pipeline.parse(find_backend("ai100").pipeline), check=4)
        assert any(run.modified for run in report.runs), name


def test_the_cost_of_an_encoder_is_counted() -> None:
    module = modules(single=False)["vision"]
    (item,) = module.specializations
    found = cost(module, item)
    patches, hidden = 16, 32
    convolution = patches * hidden * 3 * 4 * 4
    assert (found.name, found.tokens, found.state_bytes) == ("Vision", 0, 0)
    assert found.ops["Conv"].multiply_adds == convolution and found.multiply_adds > 10 * convolution
