"""Compilation: the cache knows what matters, and options that cannot work are refused before anything is lowered."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from backends.options import CompileOptions
from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.compiler import Compiled, compile_model
from qeff_ir.errors import CompileError, ModelLoadError, PackageError, PipelineError
from qeff_ir.frontend.source import open_source
from qeff_ir.ir.module import Module
from qeff_ir.package import MAIN, SIDE_FOLDER, open_package
from qeff_ir.passing import Pass, Pipeline, Rewriter
from tests import support
from tests.models import build

SHAPES: dict[str, Any] = {"target": "onnxruntime", "batch_size": 2, "prefill_seq_len": 8, "ctx_len": 48}


def model() -> QEFFAutoModelForCausalLM:
    return QEFFAutoModelForCausalLM._opened(support.Lowered("llama"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    support.tiny("llama")[1].save_pretrained(path)
    return path


def test_an_equal_package_is_used_again() -> None:
    one, two = model(), model()
    assert one.compile(**SHAPES) == two.compile(**SHAPES)
    assert (one.package.cached, two.package.cached) == (False, True)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 1}, {"prefill_seq_len": 4}, {"ctx_len": 40}, {"emit_only": True},
        {"pipeline": "canonicalize,last-logits,kv-retention{layout=tensor-scatter},attention{impl=standard}"},
    ],
    ids=str,
)  # fmt: skip
def test_another_request_is_another_package(change: dict[str, Any]) -> None:
    one, two = model(), model()
    assert one.compile(**SHAPES) != two.compile(**{**SHAPES, **change})
    assert not two.package.cached


def test_other_weights_are_another_package() -> None:
    """Of the same graph: only the numbers differ, in one place."""
    _, other = build("llama")
    one, same = (QEFFAutoModelForCausalLM(build("llama")[1]) for _ in range(2))
    assert one.compile(**SHAPES) == same.compile(**SHAPES)
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-6
    two = QEFFAutoModelForCausalLM(other)
    assert two.compile(**SHAPES) != str(one.package.folder)


def test_another_file_of_a_flag_is_another_package(tmp_path: Path) -> None:
    """The file is found by its name, which stays."""
    file, cached = tmp_path / "precision.yaml", list[bool]()
    for names in ("[]", "[]", "[Add]"):
        file.write_text(f"FP32NodeInstanceNames: {names}\n")
        compiled = model()
        compiled.compile(**dict[str, Any](SHAPES, target="ai100"), emit_only=True, node_precision_info=str(file))
        cached.append(compiled.package.cached)
    assert cached == [False, True, False]


def test_other_side_files_are_another_package(folder: Path, tmp_path: Path) -> None:
    """Generation defaults and tokenizers go into the package, and may change while the weights stay."""
    shutil.copytree(folder, tmp_path / "model")
    path, found = tmp_path / "model" / "generation_config.json", list[QEFFAutoModelForCausalLM]()
    for stop in (5, 5, 6):
        path.write_text(json.dumps({"eos_token_id": stop}))
        found.append(QEFFAutoModelForCausalLM.from_pretrained(tmp_path / "model"))
        found[-1].compile(**SHAPES)
    assert [one.package.cached for one in found] == [False, True, False]
    assert found[-1].runner().generation_config.eos_token_id == 6


def test_two_that_compile_the_same_at_once_share_one_package() -> None:
    """The second waits for the first, and finds its package."""
    source, options = support.Lowered("gpt2"), CompileOptions(batch_size=2, prefill_seq_len=4, ctx_len=16)
    source.lower()
    both = threading.Barrier(2)

    def run(_: int) -> Compiled:
        both.wait()
        return compile_model(source, options, target="onnxruntime")

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(run, range(2))
    assert one.folder == two.folder and {one.cached, two.cached} == {True, False}
    open_package(one.folder)
    assert compile_model(source, options, target="onnxruntime").cached


def test_a_damaged_package_is_built_anew() -> None:
    one = model()
    path = Path(one.compile(**SHAPES))
    (path / "model.onnx").write_bytes(b"damaged")
    two = model()
    assert two.compile(**SHAPES) == str(path)
    assert not two.package.cached
    open_package(path)


def test_a_folder_compiles_without_loading_weights(folder: Path, tmp_path: Path) -> None:
    compiled = QEFFAutoModelForCausalLM.from_pretrained(folder)
    out = Path(compiled.compile(**SHAPES, compile_dir=tmp_path / "out"))
    assert (out / "weights" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (out / SIDE_FOLDER / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    again = QEFFAutoModelForCausalLM.from_pretrained(folder)
    again.compile(**SHAPES, compile_dir=tmp_path / "out")
    assert again.package.cached
    (prompt,) = support.prompts([9])
    expected = support.generate(support.tiny("llama")[1], input_ids=torch.tensor([prompt] * 2), max_new_tokens=8)
    assert again.generate(torch.tensor([prompt] * 2), max_new_tokens=8).tolist() == expected.tolist()


def test_the_manifest_tells_what_the_passes_did() -> None:
    one = model()
    one.compile(**SHAPES)
    report = one.package.manifest.programs[MAIN].report
    assert [p["id"] for p in report["passes"]][:2] == ["canonicalize", "unflatten"]
    fired = {p["id"]: p["fired"] for p in report["passes"]}
    assert fired["kv-retention"] == {"CachePositions": 1, "TensorScatter": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctx_len": 4}, "ctx_len=4 is less than prefill_seq_len=8"),
        ({"ctx_len": 257}, "ctx_len=257 is more than the 256 positions"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"prefill_seq_len": 2.5}, "prefill_seq_len must be a whole number of at least 1, not 2.5"),
        ({"batch_size": True}, "batch_size must be a whole number of at least 1, not True"),
        ({"target": "tpu"}, "there is no target 'tpu': use auto, ai100, onnxruntime"),
        ({"pipeline": "canonicalize"}, "the caches have no physical layout: put kv-retention into the pipeline"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CompileError) as error:
        model().compile(**{**SHAPES, **options}, compile_dir=tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_is_read_before_anything_is_lowered(tmp_path: Path) -> None:
    class Untouchable(support.Lowered):
        def lower(self) -> Any:
            raise AssertionError("lowered")

    untouched = QEFFAutoModelForCausalLM._opened(Untouchable("llama"))
    with pytest.raises(PipelineError, match="did you mean 'canonicalize'"):
        untouched.compile(**SHAPES, pipeline="canonicalise")
    with pytest.raises(CompileError, match="is less than prefill_seq_len"):
        untouched.compile(**dict[str, Any](SHAPES, ctx_len=2))


def test_a_folder_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(PackageError, match="exists and is not a qeff package"):
        model().compile(**SHAPES, compile_dir=tmp_path / "out")


@pytest.mark.parametrize("arguments", [{"dtype": "float16"}, {"full_batch_size": 4}, {"load_in_8bit": True}])
def test_what_from_pretrained_cannot_do_is_refused(arguments: dict[str, Any], folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"does not support {next(iter(arguments))}="):
        QEFFAutoModelForCausalLM.from_pretrained(folder, **arguments)


def test_habits_of_its_users_are_taken(folder: Path) -> None:
    QEFFAutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, continuous_batching=False, qaic_config=None
    )


def test_a_pass_that_is_in_no_file_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is written at a prompt: another one would find the same package."""

    @dataclass(frozen=True, slots=True)
    class Prompted(Pass):
        """Does nothing."""

        name: ClassVar[str] = "prompted"

        def run(self, module: Module, rewriter: Rewriter) -> None:
            """Do nothing."""

    prompt = types.ModuleType("of_no_file")
    vars(prompt).update(ClassVar=ClassVar, Module=Module, Rewriter=Rewriter)
    monkeypatch.setitem(sys.modules, prompt.__name__, prompt)
    Prompted.__module__ = prompt.__name__
    own = Pipeline.parse("@onnxruntime").add(Prompted())
    with pytest.raises(CompileError, match=r"the code of .*Prompted is in no file"):
        compile_model(open_source(folder), CompileOptions(), target="onnxruntime", out=tmp_path / "out", pipeline=own)
