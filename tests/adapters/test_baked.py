"""Adapters that are weights of a package: numbers in the order of loading, answers of PEFT, and no swap."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from backends.ai100 import contract
from backends.ai100.contract_adapters import NUMBERS
from qeff_ir import QEffAutoLoraModelForCausalLM, QEFFAutoModelForCausalLM, QEffAutoPeftModelForCausalLM
from qeff_ir.cli.app import app
from qeff_ir.errors import AdapterError, PackageError, PassError
from qeff_ir.ir.baked import FILE, read_names
from qeff_ir.ir.ports import ADAPTER_ROW
from tests import support
from tests.adapters.random_adapters import base, make

NAME = "llama"
COMPILE: dict[str, Any] = {"batch_size": 3, "prefill_seq_len": 8, "ctx_len": 48, "emit_only": True}
IDS = torch.tensor(support.prompts([6, 6, 6], seed=2))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PeftModel]]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("sub", "mul")}
    return {
        "sub": (folders["sub"], make(base(NAME), folders["sub"], 0, r=4, target_modules=["q_proj", "v_proj"])),
        "mul": (folders["mul"], make(base(NAME), folders["mul"], 1, r=2, target_modules=["down_proj", "lm_head"])),
    }


def opened(pair: dict[str, tuple[Path, PeftModel]], cls: Any = QEffAutoPeftModelForCausalLM) -> Any:
    model = cls._opened(support.Lowered(NAME))
    for name, (folder, _) in pair.items():
        model.load_adapter(folder, name)
    return model


@pytest.fixture(scope="module")
def packages(pair: dict[str, tuple[Path, PeftModel]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for target in ("onnxruntime", "ai100"):
        found[target] = tmp_path_factory.mktemp("baked") / target
        opened(pair).compile(**COMPILE, target=target, bake_adapters=True, compile_dir=found[target])
    return found


def theirs(model: Any, row: torch.Tensor) -> list[int]:
    with torch.no_grad():
        return model.generate(input_ids=row[None], max_new_tokens=6, do_sample=False)[0].tolist()


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_each_number_is_its_adapter(
    target: str, packages: dict[str, Path], pair: dict[str, tuple[Path, PeftModel]]
) -> None:
    assert json.loads((packages[target] / FILE).read_text()) == {"sub": 1, "mul": 2}
    model = QEffAutoLoraModelForCausalLM.from_package(packages[target])
    assert model.adapters == ["sub", "mul"] and model.active_adapter_to_id == {"sub": 1, "mul": 2}
    expected = [theirs(pair["mul"][1], IDS[0]), theirs(base(NAME), IDS[1]), theirs(pair["sub"][1], IDS[2])]
    plain = [theirs(base(NAME), row) for row in IDS]
    assert expected[0] != plain[0] and expected[2] != plain[2]
    ours = model.generate(IDS, prompt_to_adapter_mapping=["mul", "base", "sub"], max_new_tokens=6, do_sample=False)
    assert ours.tolist() == expected
    assert model.generate(IDS, max_new_tokens=6, do_sample=False).tolist() == plain


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_a_host_that_only_knows_lora_ids_gets_the_adapters(
    target: str, packages: dict[str, Path], pair: dict[str, tuple[Path, PeftModel]]
) -> None:
    """No adapter is an input, and -1 and 0 are the base model."""
    decoder = QEFFAutoModelForCausalLM.from_package(packages[target]).runner(threads=1).decoder
    interface = decoder.session.interface
    assert not [resident for resident in interface.residents if resident.part is not None]
    ids = interface.input(ADAPTER_ROW)
    assert ids is not None and (ids.name, ids.rows) == ("lora_ids", 3)
    decoder.lora_ids[:] = [-1, 2, 1]
    found = decoder.prefill(IDS.tolist())
    with torch.no_grad():
        models = [base(NAME), pair["mul"][1], pair["sub"][1]]
        right = [m(input_ids=row[None]).logits[0, -1].numpy() for m, row in zip(models, IDS, strict=True)]
    np.testing.assert_allclose(found, right, atol=1e-4)
    decoder.lora_ids[:] = 3
    with pytest.raises(Exception, match="numbers of at most 2"):
        decoder.prefill(IDS.tolist())


def test_a_swap_is_refused(packages: dict[str, Path], pair: dict[str, tuple[Path, PeftModel]]) -> None:
    model = QEffAutoPeftModelForCausalLM.from_package(packages["onnxruntime"])
    for _ in range(2):  # before the session is open, and after
        with pytest.raises(AdapterError, match="'third' can neither be loaded nor deleted"):
            model.load_adapter(pair["sub"][0], "third")
        with pytest.raises(AdapterError, match="'sub' can neither be loaded nor deleted"):
            model.delete_adapter("sub")
        model.runner(threads=1)
    model.set_adapter("mul")
    assert model.generate(IDS, max_new_tokens=6, do_sample=False).tolist() == [theirs(pair["mul"][1], r) for r in IDS]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [({"adapter_slots": 4}, "adapter_slots=4 asks for"), ({"lora_mode": "single"}, "lora_mode='single' asks for")],
)
def test_room_for_others_is_refused(
    pair: dict[str, tuple[Path, PeftModel]], asked: dict[str, Any], reason: str
) -> None:
    with pytest.raises(AdapterError, match=reason):
        opened(pair).compile(**COMPILE, target="onnxruntime", bake_adapters=True, **asked)
    with pytest.raises(AdapterError, match="no adapter is loaded that could be baked"):
        opened({}).compile(**COMPILE, target="onnxruntime", bake_adapters=True)


def test_the_pass_refuses_what_it_cannot_write(pair: dict[str, tuple[Path, PeftModel]]) -> None:
    folder = pair["sub"][0]
    one = f'bake-lora{{adapter="{folder}" called=sub}}'
    for text, reason in (
        (one, "put lora{mode=slots} before"),
        ("lora{n=1 rank=4},bake-lora{called=sub}", "no adapter is named"),
        (f'lora{{n=1 rank=4}},bake-lora{{adapter="{folder}" digest=00}}', "has changed since"),
        (f"lora{{n=1 rank=4}},{one},{one.replace('sub}', 'two}')}", "all 1 are taken"),
        (f"lora{{n=2 rank=4}},{one},{one}", "there is an adapter 'sub' already"),
    ):
        with pytest.raises(PassError, match=reason):
            support.apply(support.canonical(NAME), text)
    with pytest.raises(PassError, match="rank 4"):
        support.apply(support.canonical(NAME), f"lora{{n=1 rank=2}},{one}")


def test_the_command_line_bakes(
    pair: dict[str, tuple[Path, PeftModel]], packages: dict[str, Path], tmp_path: Path
) -> None:
    support.tiny(NAME)[1].save_pretrained(str(tmp_path / "model"))
    words = [f"--bake-adapters={name}={folder}" for name, (folder, _) in pair.items()]
    target, out = ["--target", "ai100", "--emit-only"], ["--out", str(tmp_path / "package")]
    result = CliRunner().invoke(app, ["compile", str(tmp_path / "model"), *words, *target, *out])
    assert result.exit_code == 0, result.output
    assert read_names(tmp_path / "package") == read_names(packages["ai100"]) == {"sub": 1, "mul": 2}
    wrong = CliRunner().invoke(app, ["compile", str(tmp_path / "model"), "--bake-adapters", "sub"])
    assert isinstance(wrong.exception, AdapterError) and "write NAME=FOLDER" in str(wrong.exception)


def edit(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    (file,) = folder.glob("*.onnx")
    model = onnx.load(str(file), load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())


def _first_slot(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name.endswith(".lora_a_weights"))
    values = np.ones(list(tensor.dims), dtype=np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _fewer_slots(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name.endswith(".lora_a_weights"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros([2, *tensor.dims[1:]], dtype=np.float32), tensor.name))


def _no_ids(model: onnx.ModelProto) -> None:
    found = next(value for value in model.graph.input if value.name == "lora_ids")
    model.graph.input.remove(found)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / NUMBERS).unlink(),
        lambda folder: (folder / NUMBERS).write_text('{"sub": 1, "mul": 3}'),
        lambda folder: (folder / NUMBERS).write_text('{"sub": 2, "mul": 1}'),
        lambda folder: (folder / NUMBERS).write_text('{"sub": true}'),
        lambda folder: (folder / NUMBERS).write_text("[]"),
        lambda folder: (folder / NUMBERS).write_text("{"),
        lambda folder: edit(folder, _first_slot),
        lambda folder: edit(folder, _fewer_slots),
        lambda folder: edit(folder, _no_ids),
    ],
)
def test_the_contract_tells_of_wrong_numbers(
    change: Callable[[Path], Any], packages: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packages["ai100"], tmp_path / "package"))
    assert list(contract.violations(folder)) == []
    change(folder)
    assert {violation.code for violation in contract.violations(folder)} == {"adapters"}


@pytest.mark.parametrize("text", ["[]", "{}", '{"sub": 2}', '{"sub": true}', "{"])
def test_damaged_numbers_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(PackageError):
        read_names(tmp_path)
