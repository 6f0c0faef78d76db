"""The coverage command: models of the user's own go through it, what fails says why, a stopped run goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.coverage_causal import COVERAGE
from benchmarks.coverage_check import check
from benchmarks.coverage_models import data, small_config
from benchmarks.coverage_row import PASSED, Job, Row
from benchmarks.coverage_table import CoverageTable
from benchmarks.coverage_task import TEXT_GENERATION
from benchmarks.result import versions

RESULTS = TEXT_GENERATION.results
OWN = Path(__file__).parent / "modeling_own.py"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["coverage", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_registered_model_goes_through_the_command(tmp_path: Path) -> None:
    results = tmp_path / "found.json"
    code, text = run("--only", "own-decoder", "--file", str(OWN), "--results", str(results))
    (row,) = json.loads(results.read_text())["rows"]
    assert (code, row["result"]) == (0, PASSED), text + row["reason"]
    assert set(row["error"]) == {"ai100", "onnxruntime"}
    assert 0.0 < max(row["error"].values()) <= row["limit"]
    assert row["states"] == 4
    assert row["transformers"] == versions()["transformers"]
    assert f"| own-decoder | OwnForCausalLM | {row['transformers']} | pass |" in results.with_suffix(".md").read_text()


def test_code_of_a_folder_runs_only_when_allowed(tmp_path: Path) -> None:
    shutil.copyfile(OWN, tmp_path / OWN.name)
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"model_type": "own-folder", "auto_map": classes, "hidden_size": 64, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused = check(Job("own", folder=tmp_path), tmp_path / "a")
    assert refused.result == "fail"
    assert "trust_remote_code" in refused.reason
    allowed = check(Job("own", folder=tmp_path, trust=True), tmp_path / "b")
    assert (allowed.result, allowed.reason) == (PASSED, "")


def test_what_cannot_be_a_decoder_says_why(tmp_path: Path) -> None:
    results = tmp_path / "found.json"
    code, _ = run("--only", "openai-gpt", "--results", str(results))
    (row,) = json.loads(results.read_text())["rows"]
    assert code == 1
    assert (row["result"], row["reason"]) == ("absent", data()["absent"]["openai-gpt"])
    known = results.read_text()
    run("--only", "no-such-model", "--results", str(results))
    rows = json.loads(results.read_text())["rows"]
    assert [r["architecture"] for r in rows] == ["no-such-model", "openai-gpt"]
    assert json.loads(known)["rows"][0] in rows
    assert "no-such-model" in rows[0]["reason"]


def _passed(name: str, version: str) -> Row:
    return Row(name, version, result=PASSED, error={"onnxruntime": 1e-7}, bound=1e-6)


def _versions(results: Path) -> dict[str, dict[str, Row]]:
    return {version: rows for version, rows in CoverageTable(results).by_version.items() if rows}


def test_another_version_is_compared_with(tmp_path: Path) -> None:
    names, results, here = COVERAGE.architectures(), tmp_path / "found.json", versions()["transformers"]
    rows = [_passed(name, here) for name in names]
    rows[0] = Row(names[0], here, reason="it broke")
    rows += [_passed(name, "5.0.1") for name in (*names[:3], *names[4:], "old-model")]
    rows += [Row(names[1], "5.0.1"), Row(names[2], "5.0.0")]
    results.write_text(json.dumps({"rows": [asdict(row) for row in rows]}))
    code, text = run("--against", "5.0", "--results", str(results))
    assert text.splitlines()[-5:] == [
        f"newly failing: {names[0]}: fail, it broke",
        f"newly passing: {names[1]}: pass",
        f"new: {names[3]}: pass",
        "gone: old-model",
        "1 newly failing, 1 newly passing, 1 new, 1 gone",
    ]
    assert code == 1
    found = _versions(results)
    assert {version: len(known) for version, known in found.items()} == {
        "5.0.0": 1, "5.0.1": len(names), here: len(names),
    }  # fmt: skip
    table = results.with_suffix(".md").read_text()
    assert f"| {names[4]} |  | 5.0.1, {here} | pass | 1.0e-07 |" in table
    assert f"| {names[0]} |  | 5.0.1 | pass |" in table and f"| {names[0]} |  | {here} | fail |" in table
    assert f"{len(names) - 1} of {len(names)} causal LMs of transformers {here} answer as" in table
    rows[0] = _passed(names[0], here)
    results.write_text(json.dumps({"rows": [asdict(row) for row in rows]}))
    assert run("--against", "5.0.1", "--results", str(results))[0] == 0


@pytest.mark.parametrize("version", ["4", "5", "5.0", versions()["transformers"]])
def test_a_version_without_rows_is_not_compared_with(version: str, tmp_path: Path) -> None:
    results = tmp_path / "found.json"
    results.write_text(json.dumps({"rows": [asdict(_passed("llama", "5.00.1"))]}))
    code, text = run("--against", version, "--results", str(results), "--only", "openai-gpt")
    known = version == "5"
    assert code == (1 if known else 2)
    assert (f"has rows of no transformers {version} besides" in " ".join(text.replace("│", " ").split())) != known


def test_the_readme_counts_what_the_table_has() -> None:
    readme = " ".join((RESULTS.parent.parent / "README.md").read_text().split())
    for version, rows in _versions(RESULTS).items():
        passed = sum(row.result == PASSED for row in rows.values())
        assert f"{passed} of {len(rows)} of {version.rpartition('.')[0]}" in readme
        assert all(row.reason for row in rows.values() if row.result != PASSED)
        assert version != versions()["transformers"] or set(rows) == set(COVERAGE.architectures())


NEW = {"apertus1p5_text", "dory", "exaone", "inkling2_loop_text", "lara_mini", "sarvam_mla", "sarvam_moe"}
"""What 5.24 has and 5.23 has not."""


def test_small_configurations_have_every_kind_of_layer() -> None:
    names = set(COVERAGE.architectures())
    assert len(names - NEW) == 189 and names & NEW in (set(), NEW)
    assert small_config("qwen3_next").layer_types == ["linear_attention", "full_attention"]
    assert small_config("gpt_oss").layer_types == ["sliding_attention", "full_attention"]
    config = small_config("deepseek_v3")
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers) == (32, 97, 2)
    assert set(data()["absent"]) <= names
    assert set(data()["architectures"]) <= names | NEW
