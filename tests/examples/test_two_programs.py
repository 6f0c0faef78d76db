"""A source of another distribution gives a package two programs; both run, over weights that are there once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from backends import find_backend
from qeff_ir import sharing
from qeff_ir.compiler import Compiled, Pipelines, compile_model
from qeff_ir.errors import CompileError, PackageError
from qeff_ir.frontend.source import open_source
from qeff_ir.ir.module import Module
from qeff_ir.package import MAIN, MANIFEST, open_package, program_folder
from qeff_ir.passing import Pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.encoder import Encoder
from tests import support
from tests.examples.two_programs import HIDDEN, WithHiddenStates

NAME = "llama"
TARGETS = ["onnxruntime", "ai100"]
OPTIONS = replace(support.OPTIONS, seq_len=(8,))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    support.tiny(NAME)[1].save_pretrained(folder)
    return folder


def made(checkpoint: Path, out: Path, target: str, pipeline: Pipelines = None) -> Compiled:
    return compile_model(
        WithHiddenStates(checkpoint), OPTIONS, target=target, out=out, pipeline=pipeline, emit_only=True
    )


@pytest.mark.parametrize("target", TARGETS)
def test_both_programs_run_over_the_same_weights(
    target: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "_clone", lambda _source, _target: False)  # which would share blocks, not files
    package = made(checkpoint, tmp_path / "package", target)
    assert list(open_package(package.folder).programs) == [MAIN, HIDDEN]
    backend, model = find_backend(target), support.tiny(NAME)[1]
    plain = support.open_decoder(support.canonical(NAME), tmp_path / "plain").prefill(support.PROMPTS)
    decoder = Decoder(backend.open(package.folder, threads=1))
    np.testing.assert_allclose(decoder.prefill(support.PROMPTS), plain, atol=1e-5)
    ids = np.array([[5, 6, 7, 8, 9, 10, 11, 12]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
    encoder = Encoder(backend.open(program_folder(package.folder, HIDDEN), threads=1))
    found = encoder.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    np.testing.assert_allclose(next(iter(found.values())), hidden, atol=1e-5)
    assert [s.name for s in encoder.session.specializations] == ["Embedding"]
    files = list(package.folder.rglob("weights/*.safetensors"))
    assert len(files) == 2 and files[0].samefile(files[1])
    assert package.manifest.programs[HIDDEN].report["passes"] != package.manifest.programs[MAIN].report["passes"]


def test_one_key_is_over_all_programs(checkpoint: Path, tmp_path: Path) -> None:
    own = find_backend("onnxruntime").pipeline
    first = made(checkpoint, tmp_path / "package", "onnxruntime")
    same = made(checkpoint, tmp_path / "package", "onnxruntime", {HIDDEN: own})
    assert same.cached and same.manifest.key == first.manifest.key
    steps = {HIDDEN: Pipeline.parse(f"{own},-fuse-norms")}
    changed = made(checkpoint, tmp_path / "package", "onnxruntime", steps)
    assert not changed.cached and changed.manifest.key != first.manifest.key
    pipelines = {name: program.report["pipeline"] for name, program in changed.manifest.programs.items()}
    assert "fuse-norms" in pipelines[MAIN] and "fuse-norms" not in pipelines[HIDDEN]
    one = compile_model(
        open_source(checkpoint), replace(OPTIONS, seq_len=()), target="onnxruntime", out=tmp_path / "one"
    )
    assert one.manifest.key not in (first.manifest.key, changed.manifest.key)
    with pytest.raises(CompileError, match="a pipeline for the program 'hiden'; did you mean 'hidden'"):
        made(checkpoint, tmp_path / "package", "onnxruntime", {"hiden": own})


def test_what_is_wrong_with_a_program_is_told(checkpoint: Path, tmp_path: Path) -> None:
    package = made(checkpoint, tmp_path / "package", "onnxruntime").folder
    manifest = json.loads((package / MANIFEST).read_text())
    for programs, message in (
        ({HIDDEN: manifest["programs"][HIDDEN]}, "it lists no program 'main'"),
        ({**manifest["programs"], "../up": manifest["programs"][HIDDEN]}, "the name of a program"),
        ({**manifest["programs"], "weights": manifest["programs"][HIDDEN]}, "cannot be called 'weights'"),
        ({MAIN: {"model": 5, "report": {}}}, "wrong type"),
    ):
        (package / MANIFEST).write_text(json.dumps({**manifest, "programs": programs}))
        with pytest.raises(PackageError, match=message):
            open_package(package)
    (package / MANIFEST).write_text(json.dumps(manifest))
    assert list(open_package(package).programs) == [MAIN, HIDDEN]
    (package / HIDDEN / "model.onnx").unlink()
    with pytest.raises(PackageError, match=r"hidden/model\.onnx of the package .* is missing"):
        open_package(package)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([HIDDEN], "has the programs hidden: one of them must be called 'main'"),
        ([MAIN, "model.onnx"], "cannot be called 'model.onnx', as what onnxruntime writes is"),
        ([MAIN, "huggingface"], "cannot be called 'huggingface', as the package has it"),
        ([MAIN, "../up"], "the name of a program"),
    ],
)
def test_programs_that_cannot_lie_in_a_package_are_refused(
    names: list[str], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    class Named(WithHiddenStates):
        def programs(self) -> dict[str, Callable[[], Module]]:
            return dict.fromkeys(names, self.lower)

    with pytest.raises(PackageError, match=message):
        compile_model(Named(checkpoint), OPTIONS, target="onnxruntime", out=tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_copies_are_copies(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEFF_WEIGHTS", "copy")
    package = made(checkpoint, tmp_path / "package", "onnxruntime")
    files = list(package.folder.rglob("weights/*.safetensors"))
    assert len(files) == 2 and all(path.stat().st_nlink == 1 for path in files)


def test_a_program_that_fails_leaves_no_package(checkpoint: Path, tmp_path: Path) -> None:
    class Broken(WithHiddenStates):
        def programs(self) -> dict[str, Callable[[], Module]]:
            def lower() -> Module:
                raise CompileError("the second program fails")

            return {**super().programs(), HIDDEN: lower}

    with pytest.raises(CompileError, match="the second program fails"):
        compile_model(Broken(checkpoint), OPTIONS, target="onnxruntime", out=tmp_path / "package")
    assert not (tmp_path / "package").exists()
