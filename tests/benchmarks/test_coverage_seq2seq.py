"""The coverage of encoder-decoders: a row of each kind, and what does not pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import coverage_seq2seq
from benchmarks.coverage_check import check
from benchmarks.coverage_row import PASSED, Job
from benchmarks.coverage_table import CoverageTable
from benchmarks.coverage_task import SPEECH, TEXT_TO_TEXT, CoverageTask
from benchmarks.result import versions


@pytest.mark.parametrize(("task", "name"), [(TEXT_TO_TEXT, "t5"), (SPEECH, "speech_to_text")])
def test_a_model_answers_as_transformers(task: CoverageTask, name: str, tmp_path: Path) -> None:
    row = check(Job(name, task=task.name), tmp_path)
    assert (row.result, row.reason) == (PASSED, "")
    assert set(row.error) == {"ai100", "onnxruntime"} and 0.0 < max(row.error.values()) <= row.limit


def test_what_is_read_has_to_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = coverage_seq2seq._given
    monkeypatch.setattr(coverage_seq2seq, "_given", lambda model, extractor, seed: given(model, extractor, 1))
    row = check(Job("bart", task=TEXT_TO_TEXT.name), tmp_path)
    assert row.result == "fail" and row.reason.count("what is encoded changes the answer of") == 2


def test_another_answer_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = coverage_seq2seq._answered

    def other(model: object, given: dict[str, torch.Tensor]) -> object:
        seen = {**given, "attention_mask": torch.ones_like(given["attention_mask"])}
        return answered(model, seen if isinstance(model, torch.nn.Module) else given)

    monkeypatch.setattr(coverage_seq2seq, "_answered", other)
    row = check(Job("bart", task=TEXT_TO_TEXT.name), tmp_path)
    assert row.result == "fail" and "onnxruntime differs by" in row.reason and "ai100 differs by" in row.reason


@pytest.mark.parametrize("task", [TEXT_TO_TEXT, SPEECH])
def test_every_type_has_a_verdict(task: CoverageTask) -> None:
    names, table = set(task.coverage().architectures()), CoverageTable(task.results, task)
    for version, rows in table.by_version.items():
        assert version != versions()["transformers"] or set(rows) == names
        assert all(row.reason for row in rows.values() if row.result != PASSED)
        assert sum(row.result == PASSED for row in rows.values()) >= 5
