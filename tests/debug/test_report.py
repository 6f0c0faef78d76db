"""The report: one data set, as JSON and as a page that needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from qeff_ir.debug.equivalence import Equivalence
from qeff_ir.debug.recorder import Recorder
from qeff_ir.debug.report_html import to_html
from qeff_ir.errors import PassError
from qeff_ir.ir.module import SOURCE_KEY, Module
from qeff_ir.ir.printer import to_text
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from tests import support

from . import wrong_passes

EVIL = '<script>alert("x")</script>&\'"'
VOID = {"meta", "input", "wbr", "rect"}


class Page(HTMLParser):
    """Tags, texts, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def record(module: Module, pipeline: str) -> tuple[dict[str, Any], dict[str, Any]]:
    recorder = Recorder()
    report = run_pipeline(module, Pipeline.parse(pipeline), instruments=[recorder])
    return recorder.data, report.to_json()


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return record(support.canonical("mistral"), support.rest_of("onnxruntime"))[0]


def test_the_data_is_that_of_the_report_and_more() -> None:
    module = support.canonical("mistral")
    data, report = record(module, support.rest_of("onnxruntime"))
    plain = {k: v for k, v in data.items() if k not in ("model", "failed", "origins")}
    plain["passes"] = [{k: v for k, v in p.items() if k != "diff"} for p in plain["passes"]]
    assert plain == report
    assert sum(sum(o["ops"].values()) for o in data["origins"]) == len(module.graph)
    by_id = {p["id"]: p["diff"] for p in data["passes"]}
    assert sum(c["op"] == "Swish" and c["kind"] == "added" for c in by_id["fuse-activations"]["nodes"]) == 2
    swish = [o["pass"] for o in data["origins"] if "mlp.act_fn" in o["source"]]
    assert swish == ["ort-kernels"] * 2  # which made a QuickGelu of what fuse-activations had made
    json.dumps(data)


def test_the_page_is_well_formed_and_needs_nothing_else(data: dict[str, Any]) -> None:
    text = to_html(data)
    page = Page(text)
    assert page.open == []
    assert not re.search(r"(?:https?:)?//\w|@import|url\(", text)
    assert not [a for _, attributes in page.tags for a in attributes if a in ("src", "srcset")]
    ids = {a["id"] for _, a in page.tags if "id" in a}
    links = [(a["href"] or "").removeprefix("#") for tag, a in page.tags if tag == "a"]
    assert links == [f"pass-{p['id']}" for p in data["passes"]]
    assert set(links) <= ids


def test_the_page_shows_passes_counters_misses_diffs_and_origins(data: dict[str, Any]) -> None:
    page = Page(to_html(data))
    shown = " ".join(page.texts)
    assert sum(tag == "svg" for tag, _ in page.tags) == 2 * len(data["passes"])
    (missed,) = [p["missed"] for p in data["passes"] if p["id"] == "ort-attention"]
    assert missed and all(m["reason"] in shown for m in missed)
    assert "TensorScatter ring" in shown
    assert "~ output logits: float[batch_size, seq_len, 97] → float[batch_size, 1, 97]" in shown
    rows = sum(tag == "tr" for tag, _ in page.tags)
    assert rows == 2 + len(data["passes"]) + len(data["origins"])


@pytest.mark.parametrize(("check", "level"), [("flipped-sign", 4), ("breaks-facts", 1)])
def test_a_pipeline_that_fails_has_a_report_too(monkeypatch: pytest.MonkeyPatch, check: str, level: int) -> None:
    wrong_passes.register_all(monkeypatch)
    recorder, module = Recorder(), support.canonical("llama")
    instruments = [Equivalence(), recorder] if level == 4 else [recorder]
    with pytest.raises(PassError) as error:
        run_pipeline(module, Pipeline.parse(f"fuse-norms,{check}"), instruments=instruments, check=level)
    data = recorder.data
    kind = ("EquivalenceError", "equivalence") if level == 4 else ("VerificationError", "state-pair")
    assert data["failed"] == {
        "id": check,
        "error": kind[0],
        "code": kind[1],
        "message": str(error.value),
        "bundle": None,
    }
    assert [p["id"] for p in data["passes"]] == (["fuse-norms", check] if level == 4 else ["fuse-norms"])
    assert sum(sum(o["ops"].values()) for o in data["origins"]) == len(module.graph)  # as it was before the pass
    page = Page(to_html(data))
    assert page.open == []
    assert str(error.value) in page.texts
    assert f"{check} failed, and was undone " in page.texts


def test_the_banner_of_a_failure_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_passes.register_all(monkeypatch)
    recorder = Recorder()
    with pytest.raises(PassError):
        run_pipeline(support.canonical("llama"), Pipeline.parse("breaks-facts"), instruments=[recorder])
    assert "qeff bisect" not in to_html(recorder.data)
    recorder.data["failed"]["bundle"] = "a <bundle>"
    page = Page(to_html(recorder.data))
    assert page.open == [] and {"a <bundle>", "qeff bisect 'a <bundle>'"} <= set(page.texts)


def test_the_page_shows_the_error_of_each_pass() -> None:
    recorder = Recorder()
    pipeline = Pipeline.parse("canonicalize,fuse-norms")
    report = run_pipeline(support.canonical("llama"), pipeline, instruments=[Equivalence(), recorder])
    shown = Page(to_html(recorder.data)).texts
    assert [f"{run.stats.error:.1e}" in shown for run in report.runs] == [True, True]


def test_everything_is_escaped() -> None:
    module = support.canonical("llama")
    module.name = EVIL
    for node in module.graph:
        node.metadata_props[SOURCE_KEY] = EVIL
    text = to_html(record(module, "fuse-norms,ort-kernels")[0])
    page = Page(text)
    assert EVIL not in text
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert EVIL in page.texts


def test_the_page_has_the_ir_before_and_after_each_pass_closed() -> None:
    before = support.canonical("llama")
    after = before.clone()
    data, _ = record(after, "fuse-norms,fuse-rotary")
    texts = [p["diff"]["text"] for p in data["passes"]]
    old, new = to_text(before).splitlines(), to_text(after).splitlines()
    for kind, lines, others in (("-", old, new), ("+", new, old)):
        changed = {line[1:] for text in texts for line in text if line[0] == kind}
        assert set(lines) - set(others) <= changed
    assert sum(line[0] == "+" and "= RMSNormalization(" in line for line in texts[0]) == 5
    page = to_html(data)
    shown = "".join(Page(page).texts)
    assert all(line[:200] in shown for text in texts for line in text)
    assert page.count("<details class=text><summary>") == 2
    assert not re.search(r"<details[^>]* open", page)


def test_a_pass_shows_only_so_many_lines_of_ir(data: dict[str, Any]) -> None:
    (run,) = [p for p in data["passes"] if p["id"] == "kv-retention"]
    long = {**run, "diff": {**run["diff"], "text": [f"+{'<' * 1000}{n}" for n in range(900)]}}
    page = to_html({**data, "passes": [long]})
    assert Page(page).open == []
    assert page.count("…</span>") == 400 and "and 500 more lines: the JSON report has them all" in page


def test_an_empty_pipeline_has_a_page() -> None:
    data, _ = record(support.canonical("llama"), "")
    assert Page(to_html(data)).open == []


def test_very_long_changes_are_cut_and_counted() -> None:
    text = to_html(record(support.lowered("llama"), "canonicalize")[0])
    assert re.search(r"and \d{3} more nodes: the JSON report has them all", text)
