"""Instruments: told in stack order, able to fail a pass, and able to show it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from qeff_ir.errors import PassError, VerificationError
from qeff_ir.ir.module import Module
from qeff_ir.ir.printer import to_text
from qeff_ir.ir.snapshot import load_module
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.instrument import Dump, Instrument, Moment, PrintIR
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.report import PassRun, Report
from tests import support


@pytest.fixture
def module() -> Module:
    return support.lowered("llama")


@dataclass(frozen=True, slots=True)
class Failing(Pass):
    """Changes the module, then fails."""

    name: ClassVar[str] = "failing"

    def run(self, module: Module, rewriter: Rewriter) -> None:
        module.residents.clear()
        raise PassError("no")


class Told(Instrument):
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def before_pipeline(self, module: Module, pipeline: Pipeline) -> None:
        self.log.append(f"{self.name} start")

    def before_pass(self, id: str, item: Pass, module: Module) -> None:
        self.log.append(f"{self.name} before {id}")

    def after_pass(self, run: PassRun, module: Module) -> None:
        self.log.append(f"{self.name} after {run.id}")

    def failed(self, id: str, item: Pass, module_before: Module, error: BaseException) -> None:
        self.log.append(f"{self.name} failed {id} with {len(module_before.states)} states: {error}")

    def after_pipeline(self, report: Report, module: Module) -> None:
        self.log.append(f"{self.name} end of {len(report.runs)}")


def test_hooks_nest_as_a_stack(module: Module) -> None:
    log: list[str] = []
    run_pipeline(module, Pipeline.parse("canonicalize"), instruments=[Told("a", log), Told("b", log)])
    assert log == [
        "a start", "b start", "a before canonicalize", "b before canonicalize", "b after canonicalize",
        "a after canonicalize", "b end of 1", "a end of 1",
    ]  # fmt: skip


def test_a_failure_is_told_with_the_module_before(module: Module) -> None:
    log: list[str] = []
    with pytest.raises(PassError):
        run_pipeline(module, Pipeline((Failing(),)), instruments=[Told("a", log)])
    assert log == ["a start", "a before failing", "a failed failing with 4 states: pass failing: no"]


def test_an_instrument_can_fail_a_pass(module: Module) -> None:
    class Strict(Instrument):
        def after_pass(self, run: PassRun, module: Module) -> None:
            raise VerificationError("numbers", "the logits differ by 3")

    before = to_text(module)
    with pytest.raises(PassError) as error:
        run_pipeline(module, Pipeline.parse("canonicalize"), instruments=[Strict()])
    assert str(error.value) == "pass canonicalize: [numbers] the logits differ by 3"
    assert to_text(module) == before


def test_printing_is_filtered_by_pass_and_by_moment(module: Module) -> None:
    def said(*moments: Moment, only: set[str] | None = None) -> list[str]:
        stream = io.StringIO()
        printer = PrintIR(moments, only, stream)
        with pytest.raises(PassError):
            run_pipeline(
                module.clone(), Pipeline((*Pipeline.parse("canonicalize,fp16-clip,fp16-clip").passes, Failing())),
                instruments=[printer],
            )  # fmt: skip
        text = stream.getvalue()
        assert text.count("module LlamaForCausalLM (") == text.count("// ")
        return [line for line in text.splitlines() if line.startswith("// ")]

    assert said("after") == ["// after canonicalize", "// after fp16-clip", "// after fp16-clip#2"]
    assert said("changed") == ["// changed canonicalize", "// changed fp16-clip"]  # the latter adds a property
    assert said("before", only={"fp16-clip#2"}) == ["// before fp16-clip#2"]
    assert said("after", only={"fp16-clip"}) == ["// after fp16-clip", "// after fp16-clip#2"]
    assert said("failed") == ["// failed failing: pass failing: no"]


def test_a_dump_is_numbered_and_opens(module: Module, tmp_path: Path) -> None:
    pipeline = Pipeline((*Pipeline.parse("canonicalize,unflatten").passes, Failing()))
    with pytest.raises(PassError):
        run_pipeline(module, pipeline, instruments=[Dump(tmp_path / "dump", only={"unflatten"})])
    assert sorted(p.name for p in (tmp_path / "dump").iterdir()) == [
        "00-input", "00-input.txt", "02-unflatten", "02-unflatten.txt", "03-failing.failed.txt",
    ]  # fmt: skip
    loaded = load_module(tmp_path / "dump" / "02-unflatten" / "model.onnx")
    assert to_text(loaded) == (tmp_path / "dump" / "02-unflatten.txt").read_text() == to_text(module)
