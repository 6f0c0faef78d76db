"""An operator that another distribution defines reaches the file, the checks and the emulator without an edit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from backends import find_backend
from qeff_ir.errors import CompileError, PackageError, PipelineError
from qeff_ir.ir import operators
from qeff_ir.ir.module import Module
from qeff_ir.ir.operators import Operator
from qeff_ir.passing import Pipeline, run_pipeline
from qeff_ir.runtime.decoder import Decoder
from tests import support
from tests.examples.swiglu_operator import DOMAIN, Doubled, FuseSwiGLU, SwiGLU


def emitted(target: str, folder: Path) -> Module:
    module, backend = support.canonical("llama"), find_backend(target)
    # A second canonicalize inlines whatever function has no meaning of its own.
    steps = Pipeline.parse(support.rest_of(target)).insert_after("fuse-activations", FuseSwiGLU())
    run_pipeline(module, steps.insert_before("last-logits", "canonicalize"), check=4)
    backend.check(module, support.OPTIONS)
    backend.emit(module, folder, support.OPTIONS)
    return module


@pytest.mark.parametrize("target", ["ai100", "onnxruntime"])
def test_it_is_in_the_file_and_runs(target: str, tmp_path: Path) -> None:
    plain = support.open_decoder(support.canonical("llama"), tmp_path / "plain").prefill(support.PROMPTS)
    module = emitted(target, tmp_path / "own")
    calls = [node for node in module.graph if (node.domain, node.op_type) == (DOMAIN, "SwiGLU")]
    assert len(calls) == len({s.layer for s in module.states})
    file = onnx.load(find_backend(target).model_file(tmp_path / "own"), load_external_data=False)
    versions = {o.domain: o.version for o in file.opset_import}
    (body,) = (f for f in file.functions if (f.domain, f.name) == (DOMAIN, "SwiGLU"))
    assert {o.domain: o.version for o in body.opset_import}[""] == versions[""] and versions[DOMAIN] == 1
    session = find_backend(target).open(tmp_path / "own", threads=1)
    np.testing.assert_allclose(Decoder(session).prefill(support.PROMPTS), plain, atol=1e-5)


@pytest.mark.parametrize("left", [{}, {(DOMAIN, "SwiGLU"): Operator(SwiGLU)}], ids=["unknown", "without a rule"])
def test_the_emulator_refuses_what_it_has_no_rule_for(
    left: dict[operators.Key, Operator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emitted("ai100", tmp_path)
    others = {key: operator for key, operator in operators.known().items() if key[0] != DOMAIN}
    monkeypatch.setattr(operators, "_OPERATORS", others | left)
    with pytest.raises(PackageError, match=r"calls com\.example\.kernels::SwiGLU, and nothing says how"):
        find_backend("ai100").open(tmp_path)


def test_one_that_has_no_rule_is_refused_before_it_is_emitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = emitted("ai100", tmp_path)
    monkeypatch.setitem(operators._OPERATORS, (DOMAIN, "SwiGLU"), Operator(SwiGLU))
    with pytest.raises(CompileError, match=r"\[op-rule\] nothing says how the device runs com\.example"):
        find_backend("ai100").check(module, support.OPTIONS)


def test_a_rule_may_have_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device does is seen in the results: here, that it doubles them."""
    plain = support.open_decoder(support.canonical("llama"), tmp_path / "plain").prefill(support.PROMPTS)
    emitted("ai100", tmp_path / "own")
    monkeypatch.setitem(operators._OPERATORS, (DOMAIN, "SwiGLU"), Operator(SwiGLU, Doubled))
    answer = Decoder(find_backend("ai100").open(tmp_path / "own", threads=1)).prefill(support.PROMPTS)
    assert np.abs(answer - plain).max() > 1e-3


def test_the_import_of_a_domain_stays_while_something_of_it_is_called(tmp_path: Path) -> None:
    module = emitted("ai100", tmp_path)
    for node in module.graph:
        if node.op_type == "SwiGLU":
            node.op_type = "Other"
    operators.attach(module.model)
    assert DOMAIN in module.model.opset_imports and not any(key[0] == DOMAIN for key in module.model.functions)


def test_an_operator_has_one_meaning() -> None:
    with pytest.raises(PipelineError, match=r"SwiGLU of the domain 'com\.example\.kernels' is defined twice"):
        operators.define(SwiGLU)
    assert operators.known()[DOMAIN, "SwiGLU"].rule is SwiGLU
