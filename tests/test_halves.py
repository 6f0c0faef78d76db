"""Weights of 16 bits stay in the checkpoint's bytes, on both targets, and give the numbers of their float32 copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

from qeff_ir import QEFFAutoModelForCausalLM, QEFFAutoModelForImageTextToText
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source, open_source
from qeff_ir.ir.printer import to_text
from qeff_ir.ir.snapshot import load_module, save_module
from qeff_ir.package import program_folder
from qeff_ir.ranges import narrow, stored_in
from qeff_ir.storage import load_model
from tests import multimodal
from tests import test_image_text as image_text
from tests.support import prompts, tiny

TYPES = {"bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16}
FORMS: dict[str, dict[str, Any]] = {
    "onnxruntime": {"target": "onnxruntime"},
    "ai100": {"target": "ai100", "emit_only": True},
    "weight-free": {"target": "ai100", "emit_only": True, "weight_free": True},
}


def checkpoint(name: str, dtype: str, folder: Path) -> Path:
    """A tiny model's folder, in 16 bits; the model itself stays as it is."""
    _, model = tiny(name)
    weights = {key: t.to(getattr(torch, dtype)) for key, t in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    return folder


def answers(model: QEFFAutoModelForCausalLM) -> tuple[Any, list[Any]]:
    """Logits of two prompts, and the tokens that follow."""
    decoder = model.runner().decoder
    logits = decoder.prefill(prompts([11, 5]))
    steps = [decoder.decode(logits.argmax(-1).reshape(-1).tolist())]
    return logits, steps


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "dtype"), [("llama", "bfloat16"), ("gpt2", "float16"), ("mixtral", "bfloat16")])
def test_packages_refer_to_the_checkpoint_and_answer_as_float32_copies(
    name: str, dtype: str, form: str, tmp_path: Path
) -> None:
    folder = checkpoint(name, dtype, tmp_path / "model")
    shapes: dict[str, Any] = {"prefill_seq_len": 8, "ctx_len": 48, "batch_size": 2, **FORMS[form]}
    held, copied = (QEFFAutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    held.compile(**shapes, compile_dir=tmp_path / "held")
    copied.compile(**shapes, materialize=True, compile_dir=tmp_path / "copied")

    (mine, then), (theirs, after) = answers(held), answers(copied)
    assert np.ptp(mine) > 0 and np.array_equal(mine, theirs) and np.array_equal(then, after)
    files = {path.name: path for path in (tmp_path / "held" / "weights").iterdir()}
    assert files.pop("model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    own, twice = (
        sum(p.stat().st_size for p in (tmp_path / n / "weights").iterdir() if p.name != "model.safetensors")
        for n in ("held", "copied")
    )
    assert twice > 10_000
    assert own < 0.55 * twice if name == "mixtral" else own == 0  # experts of one tensor each are stacked


@pytest.mark.parametrize("dtype", TYPES)
def test_a_model_in_memory_is_written_as_it_is(dtype: str, tmp_path: Path) -> None:
    _, model = tiny("llama")
    half = AutoModelForCausalLM.from_config(model.config, dtype=getattr(torch, dtype))
    module = Source(Memory(half)).lower()
    path = save_module(module, tmp_path)
    kept = {i.name: i for i in onnx.load(path, load_external_data=False).graph.initializer}
    for key, parameter in half.state_dict().items():
        if key in kept:
            assert kept[key].data_type == TYPES[dtype]
            found = load_model(path).graph.initializers[key].const_value
            assert found is not None and found.dtype == ir.DataType.FLOAT
            np.testing.assert_array_equal(found.numpy(), parameter.float().numpy())
    assert len(kept.keys() & half.state_dict().keys()) > 10


def test_saving_and_loading_is_the_identity(tmp_path: Path) -> None:
    module = open_source(checkpoint("llama", "bfloat16", tmp_path / "model")).lower()
    once = load_module(save_module(module, tmp_path / "one"))
    assert to_text(once) == to_text(module) and "bf16" not in to_text(module).lower()
    weights = {n: v.const_value for n, v in module.graph.initializers.items()}
    again = {n: v.const_value for n, v in once.graph.initializers.items()}
    assert list(again) == list(weights)
    halves = [n for n, tensor in weights.items() if narrow(tensor) is not None]
    assert len(halves) > 10
    for name in halves:
        mine, theirs = stored_in(weights[name]), stored_in(again[name])
        assert mine is not None and theirs is not None
        assert (mine.offset, mine.length, mine.dtype) == (theirs.offset, theirs.length, theirs.dtype)
    twice = save_module(once, tmp_path / "two")
    assert twice.read_bytes() == (tmp_path / "one" / "model.onnx").read_bytes()


def _other_type(graph: onnx.GraphProto, cast: onnx.NodeProto) -> None:
    cast.attribute[0].i = onnx.TensorProto.DOUBLE


def _no_cast(graph: onnx.GraphProto, cast: onnx.NodeProto) -> None:
    cast.op_type = "Identity"


def _of_a_node(graph: onnx.GraphProto, cast: onnx.NodeProto) -> None:
    cast.input[0] = next(n.output[0] for n in graph.node if n.op_type == "Relu")


def _used_twice(graph: onnx.GraphProto, cast: onnx.NodeProto) -> None:
    next(n for n in graph.node if n.op_type == "Relu").input[0] = cast.input[0]


def _returned(graph: onnx.GraphProto, cast: onnx.NodeProto) -> None:
    graph.output[0].name = cast.input[0]


@pytest.mark.parametrize("damage", [None, _other_type, _no_cast, _of_a_node, _used_twice, _returned])
def test_only_its_own_nodes_are_folded(damage: Any, tmp_path: Path) -> None:
    """Whatever a file says: a node that does something else stays, and the graph means what it meant."""
    half = np.arange(4, dtype=np.float16)
    made = [onnx.helper.make_node("Relu", ["x"], ["y"]), onnx.helper.make_node("Cast", ["w"], ["w.float32"], to=1)]
    mark = made[1].metadata_props.add()
    mark.key, mark.value = "qeff.widened", ""
    made.append(onnx.helper.make_node("Identity", ["w.float32"], ["z"]))
    infos = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4]) for n in "xz"]
    graph = onnx.helper.make_graph(made, "g", infos[:1], infos[1:], [onnx.numpy_helper.from_array(half, "w")])
    if damage is not None:
        damage(graph, graph.node[1])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    kept = [node.op_type for node in load_model(path).graph]
    assert kept == (["Relu", "Identity"] if damage is None else [n.op_type for n in graph.node])


def test_both_programs_of_pictures_and_text_refer_to_one_checkpoint(tmp_path: Path) -> None:
    name, folder = "llava", tmp_path / "model"
    model = multimodal.lively(name)
    weights = {key: t.to(torch.bfloat16) for key, t in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights)
    image_text.processor(name).save_pretrained(folder)
    given = image_text.processed(name, [image_text.pictures(name, [1, 2])], image_text.texts(name)[:1])
    answers: list[Any] = []
    for materialize in (False, True):
        made = QEFFAutoModelForImageTextToText.from_pretrained(folder)
        options: dict[str, Any] = {"target": "ai100", "emit_only": True, **image_text.SHAPES, "batch_size": 1}
        size, out = image_text.PROCESSORS[name].size, tmp_path / str(materialize)
        made.compile(image_size=size, compile_dir=out, materialize=materialize, **options)
        answers.append(image_text.answered(made, **given))
        files = {path for path in out.rglob("weights/*") if path.name != "model.safetensors"}
        assert bool(files) == materialize
        for program in made.package.manifest.programs:
            held = onnx.load(str(next(program_folder(out, program).glob("*.onnx"))), load_external_data=False)
            kinds = {i.data_type for i in held.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL}
            assert kinds == {onnx.TensorProto.FLOAT if materialize else onnx.TensorProto.BFLOAT16}
    assert answers[0] == answers[1] and len(set(answers[0][0])) > 1
