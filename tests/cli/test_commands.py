"""Every command on the bundled model, as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from backends import find_backend
from qeff_ir import __version__
from qeff_ir.demo import MODEL_FOLDER, problems
from qeff_ir.ir.module import Module
from qeff_ir.passing import base
from qeff_ir.passing.base import Pass, Rewriter, registered_passes
from qeff_ir.passing.pipeline import Pipeline, options
from qeff_ir.passing.properties import FAST

from .conftest import Outcome, Qeff, environment

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "numpy")


def test_compile_says_target_passes_package_and_next_step(compiled: tuple[Path, Outcome]) -> None:
    folder, said = compiled
    assert (said.code, said.err) == (0, "")
    assert "target onnxruntime, as asked" in said.out
    for name in find_backend("onnxruntime").pipeline.split(","):
        assert re.search(rf"^{name.partition('{')[0]} ", said.out, re.MULTILINE)
    assert "RMSNormalization ×7" in said.out
    passes = len(Pipeline.parse(find_backend("onnxruntime").pipeline).passes)
    assert re.search(rf"^{passes} passes +\d+ → \d+ +\d", said.out, re.MULTILINE)
    assert f"Package:  {folder}\n" in said.out
    assert f"qeff run {folder} --prompt" in said.out


def test_tokens_looked_up_by_the_host_need_the_model(qeff: Qeff, tmp_path: Path) -> None:
    common = ("--target", "onnxruntime", "--token-embedding", "host")
    said = qeff("compile", MODEL_FOLDER, "-o", tmp_path / "host", *common)
    assert f"qeff run {MODEL_FOLDER} --token-embedding host --prompt" in said.out
    assert "12+30=42" in qeff("run", MODEL_FOLDER, *common, "--prompt", "12+30=").out
    alone = qeff("run", tmp_path / "host", "--prompt", "12+30=")
    assert alone.code == 2 and "stay in the model's checkpoint" in alone.err


def test_compile_writes_the_report(compiled: tuple[Path, Outcome]) -> None:
    report = json.loads((compiled[0].parent / "report.json").read_text())
    assert report["version"] == 1
    assert report["passes"][0]["id"] == "canonicalize"
    assert report == json.loads((compiled[0] / "package.json").read_text())["programs"]["main"]["report"]


def test_plain_output_has_no_control_codes_and_fits_80_columns(compiled: tuple[Path, Outcome]) -> None:
    said = compiled[1].out
    assert "\x1b" not in said
    prose = [x for x in said.splitlines() if "/" not in x]  # paths are not wrapped, so that they can be copied
    assert len(prose) > 10
    assert max(map(len, prose)) <= 80


def test_an_equal_package_is_not_built_again(qeff: Qeff, compiled: tuple[Path, Outcome]) -> None:
    folder, _ = compiled
    before = (folder / "package.json").stat().st_mtime_ns
    again = qeff("compile", MODEL_FOLDER, "-o", folder, "--target", "onnxruntime")
    assert again.code == 0
    assert "Nothing to do: an equal package was there already." in again.out
    assert " passes " in again.out
    assert (folder / "package.json").stat().st_mtime_ns == before
    other = qeff("compile", MODEL_FOLDER, "-o", folder, "--target", "onnxruntime", "--ctx-len", 64)
    assert "Compiled LlamaForCausalLM" in other.out
    assert json.loads((folder / "package.json").read_text())["options"]["ctx_len"] == 64
    qeff("compile", MODEL_FOLDER, "-o", folder, "--target", "onnxruntime")


def test_auto_says_why(qeff: Qeff) -> None:
    said = qeff("compile", MODEL_FOLDER, "--num-cores=8")
    assert said.code == 0
    assert said.out.startswith("target onnxruntime: there is no AI 100 compiler")


def test_emit_only_keeps_compiler_flags(qeff: Qeff, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = qeff(
        "compile", MODEL_FOLDER, "-o", out, "--target", "ai100", "--emit-only", "--mos", 1, "--aic-enable-depth-first"
    )
    assert (said.code, said.err) == (0, "")
    assert "emitted, not compiled" in said.out
    argv = json.loads((out / "compile_command.json").read_text())["argv"]
    assert {"-mos=1", "-aic-enable-depth-first"} <= set(argv)
    answered = qeff("run", out, "--prompt", "47+38=")
    assert answered.out.startswith("47+38=85\n")


def test_what_other_hosts_ask_of_a_package(qeff: Qeff, tmp_path: Path) -> None:
    words = ("--num-speculative-tokens", 0, "--num-speculative-tokens", 3, "--decode-only", "--kv-cache-prefix", "host")
    said = qeff("compile", MODEL_FOLDER, "-o", tmp_path / "out", "--target", "ai100", "--emit-only", *words)
    assert (said.code, said.err) == (0, "")
    found = json.loads((tmp_path / "out" / "specializations.json").read_text())["specializations"]
    assert [entry["symbols"]["num_logits_to_keep"] for entry in found] == ["1", "4"]
    assert "IOName: past_key.0_host\n" in (tmp_path / "out" / "custom_io.yaml").read_text()
    wrong = qeff("compile", MODEL_FOLDER, "--target", "ai100", "--emit-only", "--full-batch-siz", 4)
    assert "did you mean --full-batch-size?" in wrong.complaint


def test_run_answers_every_prompt_and_times(qeff: Qeff, compiled: tuple[Path, Outcome]) -> None:
    prompts = [word for question, _ in problems() for word in ("--prompt", question)]
    said = qeff("run", compiled[0], *prompts)
    assert (said.code, said.err) == (0, "")
    *answers, empty, timing = said.out.splitlines()
    assert answers == [question + answer for question, answer in problems()]
    assert empty == ""
    assert re.fullmatch(r"time to first token \d.* m?s, \d+ tokens/s", timing)


def test_run_compiles_a_model_into_the_cache(qeff: Qeff) -> None:
    said = qeff("run", MODEL_FOLDER, "--prompt", "3+4=", "--target", "onnxruntime", "--ctx-len", 32)
    assert said.code == 0
    assert "\n3+4=7\n" in said.out


def test_run_streams(qeff: Qeff, compiled: tuple[Path, Outcome]) -> None:
    said = qeff("run", compiled[0], "--prompt", "12+34=46;60+7=", "--stream")
    assert said.code == 0
    assert said.out.startswith("12+34=46;60+7=67\n")


def test_run_limits_and_samples(qeff: Qeff, compiled: tuple[Path, Outcome]) -> None:
    assert qeff("run", compiled[0], "--prompt", "99+99=", "--max-new-tokens", 2).out.startswith("99+99=19\n")
    hot = ("run", compiled[0], "--prompt", "9", "--temperature", 50, "--max-new-tokens", 40)
    first, again, other = (qeff(*hot, "--seed", seed).out.splitlines()[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_seed_alone_asks_for_samples(qeff: Qeff, compiled: tuple[Path, Outcome]) -> None:
    words = ("run", compiled[0], "--prompt", "99", "--max-new-tokens", 12)
    answers = {qeff(*words, "--seed", seed).out.splitlines()[0] for seed in range(6)}
    assert len(answers) > 1


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_verify_agrees(qeff: Qeff, target: str) -> None:
    said = qeff("verify", MODEL_FOLDER, "--target", target, "--emit-only", "--steps", 3)
    assert (said.code, said.err) == (0, "")
    assert f"On {target}, 3 prompts of 126, 10, 32 tokens" in said.out
    assert re.findall(r"^(prefill|decode \d) +\S+e-\d+ +\S+ +3 of 3", said.out, re.MULTILINE) == [
        "prefill",
        "decode 1",
        "decode 2",
    ]
    assert "Agrees with transformers: all tokens" in said.out


def test_verify_takes_prompts(qeff: Qeff) -> None:
    said = qeff(
        "verify", MODEL_FOLDER, "--target", "onnxruntime", "--steps", 1, "--prompt", "3+4=", "--prompt", "50+70="
    )
    assert said.code == 0
    assert "2 prompts of 5, 7 tokens" in said.out


@dataclass(frozen=True, slots=True)
class WrongScale(Pass):
    """Scale the result of the graph's first normalization: a pass with a bug."""

    name: ClassVar[str] = "wrong-scale"
    factor: float = 1.0

    def run(self, module: Module, rewriter: Rewriter) -> None:
        node = next(n for n in module.graph if n.op_type == "RMSNormalization")
        out, b = node.outputs[0], rewriter.at(node)
        attributes: dict[str, Any] = dict(node.attributes)
        copy = b("RMSNormalization", *node.inputs, shape=out.shape, dtype=out.dtype, **attributes)
        scaled = b("Mul", copy, b.const(self.factor, "float32"), shape=out.shape, dtype=out.dtype)
        rewriter.replace(node, scaled)


@pytest.mark.parametrize(
    ("factor", "complaint"), [(1.001, "the tokens agree, but the largest error"), (-9.0, "a token of step 0 differs")]
)
def test_verify_finds_a_wrong_pass(qeff: Qeff, monkeypatch: pytest.MonkeyPatch, factor: float, complaint: str) -> None:
    monkeypatch.setitem(base._REGISTRY, WrongScale.name, WrongScale)
    pipeline = f"{find_backend('onnxruntime').pipeline},wrong-scale{{factor={factor}}}"
    prompt = ("--prompt", "47+38=", "--steps", 3)
    said = qeff("verify", MODEL_FOLDER, "--target", "onnxruntime", "--pipeline", pipeline, *prompt)
    assert (said.code, said.err) == (1, "")
    assert f"MISMATCH: {complaint}" in said.out


@dataclass(frozen=True, slots=True)
class FastScale(WrongScale):
    """The same, said to be fast."""

    name: ClassVar[str] = "fast-scale"
    establishes: ClassVar[frozenset[str]] = frozenset({FAST})


def test_verify_tells_the_drift_of_what_is_fast_and_proves_nothing(
    qeff: Qeff, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(base._REGISTRY, FastScale.name, FastScale)
    words = ("verify", MODEL_FOLDER, "--target", "onnxruntime", "--ctx-len", 32)
    pipeline = ("--pipeline", f"{find_backend('onnxruntime').pipeline},fast-scale{{factor=1.5}}")
    (tmp_path / "sums.txt").write_text("12+34=46 50+70=120 " * 40)
    said = qeff(*words, *pipeline, "--texts", tmp_path / "sums.txt")
    assert (said.code, said.err) == (0, "")
    assert "Fast, not exact: the pass fast-scale. Nothing is proved" in " ".join(said.out.split())
    assert "Agrees" not in said.out and "bound" not in said.out
    agreement = re.search(r"first choice that agrees +([\d.]+)%", said.out)
    divergence = re.search(r"KL divergence, nats +([\d.e+-]+)", said.out)
    assert agreement and divergence and float(agreement[1]) < 100 and float(divergence[1]) > 1e-3
    assert re.search(r"perplexity +[\d.,]+ +[\d.,]+\n", said.out) and "tokens per second" in said.out
    (tmp_path / "short.txt").write_text("1+2=")
    assert "too short for 3 rows" in qeff(*words, *pipeline, "--texts", tmp_path / "short.txt").complaint
    assert "this one is exact" in qeff(*words, "--texts", tmp_path / "sums.txt").complaint


@pytest.mark.nightly
def test_verify_in_16_bits_tells_how_far_both_are_from_float32(qeff: Qeff) -> None:
    prompt = ("--prompt", "47+38=", "--steps", 3)
    said = qeff("verify", MODEL_FOLDER, "--target", "ai100", "--emit-only", "--dtype", "float16", *prompt)
    assert (said.code, said.err) == (0, "")
    assert re.search(r"Both compute in float16\. From float32, the compiled model is \d\.\de-0\d away", said.out)
    assert "Agrees with transformers" in said.out


def test_what_draws_its_tokens_is_not_verified_by_logits(qeff: Qeff) -> None:
    said = qeff("verify", MODEL_FOLDER, "--target", "onnxruntime", "--pipeline", "+sampling")
    assert "returns tokens that it draws, and no logits" in said.complaint


def test_passes_lists_the_registry(qeff: Qeff) -> None:
    said = qeff("passes")
    assert (said.code, said.err) == (0, "")
    for name, cls in registered_passes().items():
        block = re.search(rf"^{name}\n(.*?)\n\n", said.out, re.MULTILINE | re.DOTALL)
        assert block, name
        for option in options(cls).values():
            assert re.search(rf"^  {option.name} +{re.escape(option.values)} ", block[1], re.MULTILINE)
        for name_of_property in cls.requires:
            assert re.search(rf"requires .*{name_of_property}", block[1])


def test_passes_explains_one(qeff: Qeff) -> None:
    said = qeff("passes", "--explain", "kv-retention")
    assert said.code == 0
    assert "ring buffers" in said.out or "reuse their" in said.out
    assert "establishes states-lowered" in said.out
    assert "canonicalize" not in said.out
    assert "did you mean 'attention'?" in qeff("passes", "--explain", "atention").complaint


def test_demo_is_right_on_both_targets(qeff: Qeff, tmp_path: Path) -> None:
    said = qeff("demo", "-o", tmp_path)
    assert (said.code, said.err) == (0, "")
    for _, answer in problems():
        assert re.search(rf" {answer} +{answer} ✓ +{answer} ✓$", said.out, re.MULTILINE)
    for target in ("ai100", "onnxruntime"):
        assert re.search(rf"^{target} +all agree +\S+ +\S+ +✓", said.out, re.MULTILINE)
        assert (tmp_path / target / "package.json").is_file()
    assert "All answers are right, and every token and logit agrees with transformers." in said.out
    assert "Loading weights" not in said.out


def test_demo_fails_when_an_answer_is_wrong(qeff: Qeff, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qeff_ir.demo.problems", lambda: [("2+2=", "5")])
    said = qeff("demo", "--target", "onnxruntime")
    assert said.code == 1
    assert "4 ✗" in said.out
    assert "Something is wrong on onnxruntime" in said.out


def test_version(qeff: Qeff) -> None:
    assert qeff("--version") == Outcome(0, f"qeff-ir {__version__}\n", "")


def test_no_command_is_help(qeff: Qeff) -> None:
    said = qeff()
    assert said.code == 0
    assert all(name in said.out for name in ("compile", "run", "verify", "passes", "demo"))


@pytest.mark.parametrize("words", [["--help"], ["compile", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"import sys; from qeff_ir.cli import main; main({words}); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert len(done.stdout.splitlines()) > (1 if words == ["--version"] else 10)


def test_a_closed_pipe_is_no_error(qeff_process: Qeff) -> None:
    shell = f"{sys.executable} -m qeff_ir.cli passes | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment(), check=True)
    assert (done.stdout, done.stderr) == ("attention\n", "")
