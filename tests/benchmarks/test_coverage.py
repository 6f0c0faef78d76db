"""The coverage command: models of the user's own go through it, what fails says why, a stopped run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.coverage import RESULTS
from benchmarks.coverage_check import check
from benchmarks.coverage_models import architectures, data, small_config
from benchmarks.coverage_row import PASSED, Job

OWN = Path(__file__).parent / "modeling_own.py"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["coverage", *arguments])
    return result.exit_code, result.output


def test_a_registered_model_goes_through_the_command(tmp_path: Path) -> None:
    results = tmp_path / "found.json"
    code, text = run("--only", "own-decoder", "--file", str(OWN), "--results", str(results))
    (row,) = json.loads(results.read_text())["rows"]
    assert (code, row["result"]) == (0, PASSED), text + row["reason"]
    assert set(row["error"]) == {"ai100", "onnxruntime"}
    assert 0.0 < max(row["error"].values()) <= row["limit"]
    assert row["states"] == 4
    assert "| own-decoder | OwnForCausalLM | pass |" in results.with_suffix(".md").read_text()


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


def test_the_readme_counts_what_the_table_has() -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    passed = sum(row["result"] == PASSED for row in rows)
    assert {row["architecture"] for row in rows} == set(architectures())
    assert f"{passed} of {len(rows)} pass" in " ".join((RESULTS.parent.parent / "README.md").read_text().split())
    assert all(row["reason"] for row in rows if row["result"] != PASSED)


def test_small_configurations_have_every_kind_of_layer() -> None:
    assert len(architectures()) == 189
    assert small_config("qwen3_next").layer_types == ["linear_attention", "full_attention"]
    assert small_config("gpt_oss").layer_types == ["sliding_attention", "full_attention"]
    config = small_config("deepseek_v3")
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers) == (32, 97, 2)
    assert set(data()["absent"]) <= set(architectures())
    assert set(data()["architectures"]) <= set(architectures())
