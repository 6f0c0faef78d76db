"""The coverage of models of pictures or sounds and text: a row for each way in which models differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import coverage_multimodal
from benchmarks.__main__ import app
from benchmarks.coverage_check import check
from benchmarks.coverage_multimodal import Multimodal, Request
from benchmarks.coverage_pictures import COVERAGE
from benchmarks.coverage_row import PASSED, Job
from benchmarks.coverage_table import CoverageTable
from benchmarks.coverage_task import AUDIO_TEXT, IMAGE_TEXT_TO_TEXT, TASKS, CoverageTask
from benchmarks.result import versions

WAYS = {
    "blip-2": "its forward pass wants pixels, rows or not",
    "chameleon": "it never answers with tokens of pictures",
    "cosmos3_edge": "tokens have places on three axes, and no position beside them",
    "ernie4_5_vl_moe": "types of tokens say whose experts they go to",
    "glm4v": "its tower samples a grid",
    "granite_docling": "a mask that is known chooses pictures",
    "hunyuan_vl": "its tower resizes to sizes that are tensors; as many placeholders as rows are asked for",
    "kimi_k25": "its tower sums weighted rows; experts are those of a model within it",
    "minicpmv4_7": "tokens have places on axes only beside pictures",
    "lighton_ocr": "its tower cuts pictures by sizes that are tensors, and chunks what it knows of them",
    "ovis2": "vectors that are weights stand for the tokens around its pictures",
    "smolvlm": "its tower writes into what it knows of pixels",
}
SOUNDS = {
    "granite_speech": "its forward pass takes no rows; queries that are learned are those of each row",
    "vibevoice_asr": "its encoder has no attention that could be another",
}


@pytest.mark.parametrize(
    ("task", "name"), [("image-text-to-text", name) for name in WAYS] + [("audio-text", name) for name in SOUNDS]
)
def test_a_model_answers_as_transformers(task: str, name: str, tmp_path: Path) -> None:
    row = check(Job(name, task=task), tmp_path)
    assert (row.result, row.reason) == (PASSED, "")
    assert set(row.error) == {"ai100", "onnxruntime"} and 0.0 < max(row.error.values()) <= row.limit


def test_pictures_that_are_lost_do_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Request.given

    def blank(self: Request, *arguments: Any, **rest: Any) -> Any:
        found = given(self, *arguments, **rest)
        return replace(found, rows={name: 0 * rows for name, rows in found.rows.items()})

    monkeypatch.setattr(Request, "given", blank)
    row = check(Job("fuyu", task="image-text-to-text"), tmp_path / "lost")
    assert row.result == "fail" and "ai100 differs by" in row.reason and "onnxruntime differs by" in row.reason
    answer = Request.answer

    def unseen(self: Request, model: Any) -> Any:
        self._both = {name: 0 * value for name, value in self._both.items()}
        self.inputs = [{name: 0 * value for name, value in one.items()} for one in self.inputs]
        return answer(self, model)

    monkeypatch.undo()
    monkeypatch.setattr(Request, "answer", unseen)
    monkeypatch.setattr(coverage_multimodal, "_SEEN", 1e9)
    row = check(Job("fuyu", task="image-text-to-text"), tmp_path / "unseen")
    assert row.result == "fail" and "what the encoder makes changes the answer by" in row.reason


def test_the_pictures_of_a_request_differ_and_span_runs() -> None:
    model = COVERAGE.tiny("fuyu")
    request = COVERAGE.request("fuyu", model)
    first, second = (one["pixel_values"] for one in request.inputs)
    assert not torch.equal(first, second)
    ids, words = request.prompts
    places = np.flatnonzero(np.array(ids) == model.config.image_token_id)
    assert len(places) == 24 and model.config.image_token_id not in words
    assert len(set(places[:12] // 8)) > 1 and request.options(cut=True).ctx_len >= len(ids) + 6


def test_a_task_that_is_not_known_is_told() -> None:
    result = CliRunner().invoke(app, ["coverage", "--task", "no-such-task"])
    assert result.exit_code == 2
    assert all(name in result.output for name in TASKS)


@pytest.mark.parametrize("task", [IMAGE_TEXT_TO_TEXT, AUDIO_TEXT])
def test_every_type_has_a_verdict(task: CoverageTask) -> None:
    coverage, here = task.coverage(), versions()["transformers"]
    assert isinstance(coverage, Multimodal)
    names, table = set(coverage.architectures()), CoverageTable(task.results, task)
    for version, rows in table.by_version.items():
        assert version != here or set(rows) == names
        assert all(row.reason for row in rows.values() if row.result != PASSED)
        assert not [row.architecture for row in rows.values() if row.result == "fail"]
    for key in ("absent", "architectures", "inputs", "joined", "modalities", "second", "types"):
        assert set(coverage.data.get(key, {})) <= names, key


def test_the_readme_counts_what_the_tables_have() -> None:
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    for task in (IMAGE_TEXT_TO_TEXT, AUDIO_TEXT):
        rows = CoverageTable(task.results, task).by_version["5.23.0"]
        passed = sum(row.result == PASSED for row in rows.values())
        assert f"{passed} of {len(rows)} {task.subject}" in readme
