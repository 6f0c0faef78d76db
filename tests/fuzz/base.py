"""Sound inputs, made once before the processes part: what the families damage."""

from __future__ import annotations

import functools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM
from qeff_ir.demo import ADAPTERS_FOLDER, MODEL_FOLDER

PROMPT = [[5, 6, 7, 8, 9]]
"""What every package is asked."""
NEW_TOKENS = 3


@dataclass(frozen=True)
class Base:
    """The sound inputs.

    Attributes:
        model: A model folder.
        packages: A package for each target, by target.
        answers: What each answers to `PROMPT`.
        adapters: Folders of adapters of the model.
        bundles: Failure bundles.
        onnx: ONNX files with what others put into theirs: external data, subgraphs, functions, open sizes.
    """

    model: Path
    packages: dict[str, Path]
    answers: dict[str, list[int]]
    adapters: list[Path]
    bundles: list[Path]
    onnx: list[Path]


@functools.cache
def base() -> Base:
    """Make them, below the folder that `QEFF_FUZZ` names."""
    root = Path(os.environ["QEFF_FUZZ"])
    model = _small_model(root / "model")
    packages, answers = {}, {}
    for target in ("onnxruntime", "ai100"):
        packages[target] = root / target
        compiled = QEFFAutoModelForCausalLM.from_pretrained(model)
        compiled.compile(
            target=target, emit_only=target == "ai100", prefill_seq_len=4, ctx_len=16, compile_dir=packages[target]
        )
        answers[target] = answer(packages[target])
    corpus = Path(__file__).parents[1] / "corpus"
    bundles = sorted(path.parent for path in corpus.glob("*/metadata.json"))
    return Base(
        model, packages, answers, sorted(p for p in ADAPTERS_FOLDER.iterdir() if p.is_dir()), bundles, _onnx_files(root)
    )


def _small_model(folder: Path) -> Path:
    """The demo's model, cut to its first layer: most families open it thousands of times."""
    shutil.copytree(MODEL_FOLDER, folder)
    (folder / "config.json").write_text(json.dumps(read(MODEL_FOLDER / "config.json") | {"num_hidden_layers": 1}))
    weights = load_file(MODEL_FOLDER / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers." not in name or ".layers.0." in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def answer(package: Path) -> list[int]:
    """The tokens that a package answers to `PROMPT` with."""
    import torch

    model = QEFFAutoModelForCausalLM.from_package(package)
    made = model.generate(torch.tensor(PROMPT), max_new_tokens=NEW_TOKENS, do_sample=False)
    return [int(t) for t in made[0]]


def copied(source: Path, folder: Path) -> Path:
    """A copy of a folder that may be damaged."""
    return Path(shutil.copytree(source, folder, copy_function=shutil.copy2))


def read(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text())


def _onnx_files(root: Path) -> list[Path]:
    folder = root / "onnx"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    def value(name: str, *shape: str | int | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape or None)

    node, graph = helper.make_node, helper.make_graph
    x, y, opset = value("x", "n", 8), value("y", "n", None), helper.make_opsetid("", 24)
    layers = graph(
        [
            node("MatMul", ["x", "w"], ["h"], name="product"),
            node("Add", ["h", "b"], ["s"]),
            node("Sigmoid", ["s"], ["g"]),
            node("Mul", ["s", "g"], ["y"]),
        ],
        "layers",
        [x],
        [y],
        [weight("w", 8, 300), weight("b", 300)],
    )
    then = graph([node("MatMul", ["x", "wt"], ["yt"])], "then", [], [value("yt")], [weight("wt", 8, 8)])
    other = graph([node("Neg", ["x"], ["ye"])], "else", [], [value("ye")])
    choice = graph(
        [
            node("ReduceSum", ["x"], ["total"], keepdims=0),
            node("Greater", ["total", "zero"], ["c"]),
            node("If", ["c"], ["y"], then_branch=then, else_branch=other),
        ],
        "choice",
        [x],
        [y],
        [numpy_helper.from_array(np.zeros((), np.float32), "zero")],
    )
    gate = [node("Sigmoid", ["a"], ["s"]), node("Mul", ["a", "s"], ["o"])]
    called = graph([node("Gate", ["x"], ["y"], domain="own")], "called", [x], [y])
    functions = {"called": [helper.make_function("own", "Gate", ["a"], ["o"], gate, [opset])]}
    found: list[Path] = []
    for made in (layers, choice, called):
        imports = [opset, helper.make_opsetid("own", 1)]
        model = helper.make_model(made, opset_imports=imports, ir_version=11, functions=functions.get(made.name, []))
        path = folder / made.name / "model.onnx"
        path.parent.mkdir()
        onnx.save(model, str(path), save_as_external_data=made is not called, location="w.data", size_threshold=64)
        found.append(path)
    return found
