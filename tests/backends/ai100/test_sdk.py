from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from backends.ai100 import operators, row_operators, sdk
from backends.ai100.backend import BACKEND
from backends.ai100.contract_nbits import NATIVE
from qeff_ir.errors import CompileError
from qeff_ir.ir.operators import known


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.19.8", "1.20"), ("1.20.0.5", "1.20"), ("1.21.6", "1.20"), ("1.22", "1.22"), ("2.0", "1.22"),
        ("1.9", "1.20"), ("1.3.99", "1.20"), ("1.100", "1.22"), ("10.0", "1.22"),
    ],
)  # fmt: skip
def test_the_newest_description_that_is_not_newer(version: str, expected: str) -> None:
    assert sdk.description(version).version == expected


@pytest.mark.parametrize("target", sdk.descriptions(), ids=lambda s: s.version)
def test_a_description_holds_together(target: sdk.Sdk) -> None:
    for name in target.ops[""]:
        onnx.defs.get_schema(name, target.opset)
    native = {key for key, operator in known().items() if operator.rule is not None and key[0] in target.ops}
    assert {(d, n) for d, names in target.ops.items() if d not in ("", NATIVE) for n in names} == native
    some = operators.CtxScatter, operators.CtxGather, operators.CustomRMSNorm, row_operators.CtxScatterCB
    assert native >= {(f.domain, f.name) for f in some}
    assert set(target.flags.values()) == {"flag", "int", "string", "input", "output"}
    assert all(a.removeprefix("-") in target.flags for a in target.standing_arguments)


def install(root: Path, apps: str | None, compiler: str | None, card: str | None = None) -> None:
    if apps is not None:
        (root / "versions").mkdir(parents=True)
        (root / "versions" / "apps.xml").write_text(
            f"<versions><ci_build><base_version> {apps} </base_version></ci_build></versions>"
        )
    for folder, name, text in (
        ("exec", compiler, ""),
        ("tools", card and "qaic-util", f"echo 'FW IMAGE_VARIANT : {card}'"),
    ):
        if name:
            (root / folder).mkdir(parents=True)
            (root / folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (root / folder / name).chmod(0o755)


def test_probing_an_old_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sdk.COMPILER_VARIABLE, raising=False)
    install(tmp_path, "1.20.2", "qaic-exec")
    found = sdk.probe(tmp_path)
    assert found == sdk.Installation(tmp_path / "exec" / "qaic-exec", "1.20.2", "ai100")
    assert sdk.choose(found).specializations == "flat"


def test_probing_a_new_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sdk.COMPILER_VARIABLE, raising=False)
    install(tmp_path, "1.23.0", "qaic-compile", "AIC200 release")
    found = sdk.probe(tmp_path)
    assert found == sdk.Installation(tmp_path / "exec" / "qaic-compile", "1.23.0", "ai200")
    assert sdk.choose(found).version == "1.22"


def test_without_a_version_file_the_compiler_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sdk.COMPILER_VARIABLE, raising=False)
    install(tmp_path, None, "qaic-exec")
    assert sdk.choose(sdk.probe(tmp_path)).version == "1.20"
    assert sdk.choose(sdk.probe(tmp_path / "nothing")).version == "1.22"


def test_missing_names_the_places_and_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdk, "_compiler", lambda _root: None)
    message = BACKEND.missing()
    assert message is not None
    for part in ("/opt/qti-aic/exec/qaic-compile", "/opt/qti-aic/exec/qaic-exec", "$QEFF_QAIC_COMPILE", "emulator"):
        assert part in message


def test_an_override_that_cannot_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sdk.COMPILER_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(CompileError, match="not an executable file"):
        sdk.probe()
    assert "not an executable file" in (BACKEND.missing() or "")


def test_importing_the_backend_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'onnxruntime'}"
    code = f"import sys, backends.ai100; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[3]
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
