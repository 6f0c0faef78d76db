"""The tools of a pass author, as typed."""

from __future__ import annotations

import json
import re
import shlex
import sys
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends import find_backend
from qeff_ir.demo import MODEL_FOLDER
from qeff_ir.frontend.source import open_source
from qeff_ir.ir.snapshot import load_module, save_module
from qeff_ir.specialize import specialize
from tests import support
from tests.debug import wrong_passes
from tests.debug.models import write_plain

from .conftest import Outcome, Qeff

PIPELINE = find_backend("onnxruntime").pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as it was lowered."""
    folder = tmp_path_factory.mktemp("saved")
    save_module(open_source(MODEL_FOLDER).lower(), folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers, thus of four residual additions."""
    folder = tmp_path_factory.mktemp("llama")
    module = support.lowered("llama")
    specialize(module, support.OPTIONS)
    save_module(module, folder)
    return folder


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_passes.register_all(monkeypatch)


def test_opt_runs_a_pipeline_over_a_model_and_saves_the_result(qeff: Qeff, tmp_path: Path) -> None:
    said = qeff("opt", MODEL_FOLDER, "-p", "canonicalize,fuse-norms", "-o", tmp_path / "out", "--ctx-len", 64)
    assert (said.code, said.err) == (0, "")
    assert re.search(r"^fuse-norms +RMSNormalization ×7", said.out, re.MULTILINE)
    assert f"Result:  {tmp_path / 'out' / 'model.onnx'}\n" in said.out
    module = load_module(tmp_path / "out" / "model.onnx")
    assert {s.name: s.symbols["ctx_len"] for s in module.specializations} == {"Prefill": 64, "Decode": 64}
    assert sum(n.op_type == "RMSNormalization" for n in module.graph) == 7


def test_opt_checks_the_numbers_of_the_whole_stock_pipeline(qeff: Qeff, saved: Path, tmp_path: Path) -> None:
    """Over a saved module; the trained model rounds more than a bound by depth allows."""
    for name, suffix in (("report.json", ".json"), ("report.html", ".html")):
        report = tmp_path / name
        said = qeff(
            "opt", saved, "-p", PIPELINE, "--check", 4, "--report", report, "--prefill-seq-len", 8, "--batch-size", 2
        )
        assert (said.code, said.err) == (0, "")
        assert f"Report:  {report}\n" in said.out
        text = report.read_text()
        assert re.search(r"^\s*pass +what it did +nodes +error +time$", said.out, re.MULTILINE)
        assert text.startswith("<!doctype html>") if suffix == ".html" else json.loads(text)["version"] == 1


def test_opt_takes_a_plain_onnx_file(qeff: Qeff, tmp_path: Path) -> None:
    path = write_plain(tmp_path / "plain.onnx")
    said = qeff("opt", path, "-p", "canonicalize", "--check", 4, "-o", tmp_path / "small.onnx")
    assert (said.code, said.err) == (0, "")
    assert (tmp_path / "small.onnx").is_file()
    complaint = qeff("opt", path, "-p", "canonicalize", "--ctx-len", 64).complaint
    assert complaint == "qeff: error: plain has no states, so that --ctx-len means nothing: leave it out\n"


def test_opt_prints_and_dumps(qeff: Qeff, saved: Path, tmp_path: Path) -> None:
    options = ("--print-before", "fuse-norms", "--print-after", "canonicalize", "--dump", tmp_path / "dump")
    said = qeff("opt", saved, "-p", "canonicalize,fuse-norms,unflatten", *options)
    headers = re.findall(r"^// (.*)$", said.err, re.MULTILINE)
    assert headers == ["after canonicalize", "before fuse-norms"]
    assert sum(p.suffix == ".txt" for p in (tmp_path / "dump").iterdir()) == 4
    said = qeff("opt", saved, "-p", "canonicalize,fuse-norms,unflatten", "--print-changed")
    assert re.findall(r"^// changed (.*)$", said.err, re.MULTILINE) == ["canonicalize", "fuse-norms"]
    options = ("--print-changed", "--only", "fuse-norms", "--dump", tmp_path / "one")
    said = qeff("opt", saved, "-p", "canonicalize,fuse-norms,unflatten", *options)
    assert re.findall(r"^// changed (.*)$", said.err, re.MULTILINE) == ["fuse-norms"]
    assert sorted(p.name for p in (tmp_path / "one").glob("*.txt")) == ["00-input.txt", "02-fuse-norms.txt"]


def test_a_failure_is_printed_and_reported(qeff: Qeff, llama: Path, tmp_path: Path, wrong: None) -> None:
    report = tmp_path / "report.json"
    said = qeff("opt", llama, "-p", "canonicalize,raises", "--print-failed", "--report", report)
    assert said.code == 2
    assert re.findall(r"^// failed (.*)$", said.err, re.MULTILINE) == ["raises: the third is too much"]
    assert json.loads(report.read_text())["failed"]["message"] == "the third is too much"


def test_a_wrong_pass_is_found_reduced_and_replayed_unattended(
    qeff: Qeff, llama: Path, tmp_path: Path, wrong: None
) -> None:
    """Done-when 4: a sign flipped in the third rewrite of four, among the stock passes."""
    bundle, small = tmp_path / "a bundle; of blanks", tmp_path / "small"
    first, _, rest = PIPELINE.partition(",last-logits")
    words = ("opt", llama, "-p", f"{first},flipped-sign,last-logits{rest}", "--check", 4, "--bundle", bundle)
    complaint = qeff(*words, "--report", tmp_path / "report.html").complaint
    assert f"<code>qeff bisect {escape(shlex.quote(str(bundle)))}</code>" in (tmp_path / "report.html").read_text()
    assert complaint.startswith("qeff: error: pass flipped-sign: [equivalence] it changed behavior: 'logits' of run ")
    assert complaint.endswith(f"; next: qeff bisect '{bundle}'\n")
    said = qeff("bisect", bundle)
    assert (said.code, said.err) == (0, "")
    assert "Guilty: flipped-sign, rewrite 3 (add-to-sub) in model.layers.1: " in said.out
    assert re.search(r"^Value:  %\S+ \(Sub of model\.layers\.1, made by flipped-sign\) differs", said.out, re.MULTILINE)
    assert re.search(r"^    \+ Sub %\S+$", said.out, re.MULTILINE)
    said = qeff("reduce", bundle, "-o", small)
    assert re.search(r"^\d+ → \d+ nodes after \d+ trials; it still fails in the same way\.$", said.out, re.MULTILINE)
    said = qeff("replay", small)
    assert said.code == 0
    assert said.out.startswith("It fails in the same way: pass flipped-sign: [equivalence] ")


def test_an_error_of_any_class_in_a_pass_is_one_line_and_a_bundle(qeff: Qeff, llama: Path, wrong: None) -> None:
    complaint = qeff("opt", llama, "-p", "canonicalize,raises").complaint
    found = re.fullmatch(r"qeff: error: ValueError: the third is too much; next: qeff bisect (\S+)\n", complaint)
    assert found is not None
    assert Path(found[1]).parent.name == "bundles"  # in the cache
    assert "Guilty: raises, rewrite 3 (again): the third is too much" in qeff("bisect", found[1]).out


def test_bisect_by_a_command(qeff: Qeff, llama: Path, tmp_path: Path, wrong: None) -> None:
    script = tmp_path / "check.sh"
    script.write_text('#!/bin/sh\n! grep -q -a Swish "$1/model.onnx"\n')
    script.chmod(0o755)
    pipeline = "canonicalize,fuse-norms,fuse-activations,unflatten,breaks-facts"
    qeff("opt", llama, "-p", pipeline, "--bundle", tmp_path / "bundle")
    said = qeff("bisect", tmp_path / "bundle", "--check", script)
    assert "Guilty: fuse-activations, rewrite 1 (Swish) in model.layers.0" in said.out


def test_replay_exits_1_when_it_does_not_fail(
    qeff: Qeff, llama: Path, tmp_path: Path, wrong: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    qeff("opt", llama, "-p", "canonicalize,raises", "--bundle", tmp_path / "bundle")
    path = tmp_path / "bundle" / "metadata.json"
    data = json.loads(path.read_text())
    here = data["versions"]["numpy"]
    path.write_text(json.dumps({**data, "versions": {"numpy": "0.1"}}))
    monkeypatch.setattr(wrong_passes.Raises, "run", lambda *_: None)
    said = qeff("replay", tmp_path / "bundle")
    assert said.code == 1
    assert said.out == (f"numpy is {here} here, and was 0.1\nIt does not fail any more: raises runs without an error\n")


def test_diff_tells_and_exits_1_only_when_something_differs(qeff: Qeff, saved: Path, tmp_path: Path) -> None:
    qeff("opt", saved, "-p", "canonicalize,fuse-norms", "-o", tmp_path / "a")
    qeff("opt", saved, "-p", "canonicalize", "-o", tmp_path / "b")
    same = qeff("diff", tmp_path / "a", tmp_path / "a" / "model.onnx")
    assert (same.code, same.out) == (0, "no difference\n")
    said = qeff("diff", tmp_path / "b", tmp_path / "a")
    assert said.code == 1
    assert "nodes 196 → 154: 7 added, 49 removed, 0 re-wired\n" in said.out
    assert re.search(r"^  \+ RMSNormalization %mul_\d+$", said.out, re.MULTILINE)
    found = json.loads(qeff("diff", tmp_path / "b", tmp_path / "a", "--json").out)
    assert sum(n["kind"] == "added" for n in found["nodes"]) == 7


def test_view_says_how_to_get_netron_and_else_opens_it(
    qeff: Qeff, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "netron", None)
    assert qeff("view", saved).complaint == (
        f"qeff: error: Netron is not installed, so {saved / 'model.onnx'} cannot be shown: pip install netron\n"
    )
    calls: list[tuple[str, object]] = []
    stand_in = SimpleNamespace(start=lambda path, address: calls.append((path, address)), wait=lambda: None)
    monkeypatch.setitem(sys.modules, "netron", stand_in)
    said = qeff("view", saved, "--port", 8123)
    assert (said.code, calls) == (0, [(str(saved / "model.onnx"), ("localhost", 8123))])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("opt", "SAVED", "-p", "canonicalize", "--report", "r.txt"), "the report r.txt is neither .json nor .html: "),
        (
            ("opt", "SAVED", "-p", "canonicalize", "--print-after", "fuse"),
            "the pipeline has no pass 'fuse' to look at; ",
        ),
        (("opt", "gone.onnx", "-p", "canonicalize"), "there is no file gone.onnx"),
        (("opt", "SAVED", "-p", "canonicalize", "-o", "/proc/none/out"), "/proc/none/out cannot be written ("),
        (
            ("opt", "SAVED", "-p", "canonicalize", "--report", "/none/r.json"),
            "the report /none/r.json cannot be written (",
        ),
        (("diff", "SAVED", "gone"), "gone is no saved module and no ONNX file: "),
        (("bisect", "gone"), "gone is not a bundle (it has no metadata.json): "),
        (("opt", "SAVED", "-p", "canonicalize", "--check", "5"), "'--check'"),
    ],
)
def test_bad_input_is_one_line(qeff: Qeff, saved: Path, words: tuple[str, ...], message: str) -> None:
    complaint = qeff(*(str(saved) if w == "SAVED" else w for w in words)).complaint
    assert message in complaint


def test_shapes_come_before_the_caches_have_theirs(qeff: Qeff, saved: Path, tmp_path: Path) -> None:
    module = load_module(saved / "model.onnx")
    module.rename_dim("ctx_len", "cache_len")
    module.specializations = []
    save_module(module, tmp_path)
    assert qeff("opt", tmp_path, "-p", "", "--ctx-len", 64).complaint == (
        "qeff: error: the caches of LlamaForCausalLM have their sizes already: give the module before kv-retention\n"
    )


def test_cost_counts_a_package_and_says_which_figures_it_lacks(
    qeff: Qeff, compiled: tuple[Path, Outcome], tmp_path: Path
) -> None:
    folder = compiled[0]
    found = json.loads(qeff("cost", folder, "--json").out)
    assert [c["name"] for c in found] == ["Prefill", "Decode"]
    assert found[0]["multiply_adds"] > 8 * found[1]["multiply_adds"] > 0
    said = qeff("cost", folder, "--device", "standard")
    assert said.code == 0 and "FusedMatMul" in said.out
    assert "AI 100 Standard: 0.00 GB of weights and caches fit" in said.out
    device: dict[str, Any] = {"name": "Card", "memory_gb": 1, "bandwidth_gb_s": 100, "sources": {}}
    (tmp_path / "card.json").write_text(json.dumps({**device, "tera_multiply_adds": None}))
    said = qeff("cost", folder, "--device", tmp_path / "card.json")
    assert "Card: no figure with a source for tera_multiply_adds" in said.out and "tokens/s" not in said.out
    device["tera_multiply_adds"] = 1
    (tmp_path / "card.json").write_text(json.dumps(device))
    said = qeff("cost", folder, "--device", tmp_path / "card.json")
    assert "Card: 0.00 GB of weights and caches fit" in said.out and "tokens/s" in said.out
    assert "there is no device 'gone': it is pro, standard, ultra" in qeff("cost", folder, "--device", "gone").complaint
