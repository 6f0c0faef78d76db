"""Bad input ends in exit code 2 and one clear line that says what was wrong and what to do."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qeff_ir.cli.app as app
from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.cli.request import Request
from qeff_ir.cli.verify import random_prompts
from qeff_ir.demo import MODEL_FOLDER
from qeff_ir.errors import RuntimeInputError
from qeff_ir.package import read_manifest, seal

from .conftest import Outcome, Qeff, command, environment


def compile_words(model: object, out: Path, *more: object) -> list[object]:
    return ["compile", model, "-o", out, "--target", "onnxruntime", *more]


def test_unknown_hub_model(qeff_process: Qeff, tmp_path: Path) -> None:
    said = qeff_process(*compile_words("nobody/no-such-model", tmp_path / "out"))
    assert (
        "'nobody/no-such-model' is neither a local folder nor a model that the hub or its cache has" in said.complaint
    )
    assert said.out == ""


def test_no_folder(qeff: Qeff, tmp_path: Path) -> None:
    assert "is not a model folder" in qeff(*compile_words(tmp_path / "none", tmp_path / "out")).complaint


def test_folder_without_configuration(qeff: Qeff, tmp_path: Path) -> None:
    assert "has no config.json" in qeff(*compile_words(tmp_path, tmp_path / "out")).complaint


def test_configuration_that_is_no_json(qeff: Qeff, model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text("{")
    assert "is not a configuration that transformers reads" in qeff(*compile_words(model, tmp_path / "out")).complaint


def test_folder_without_safetensors(qeff: Qeff, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    complaint = qeff(*compile_words(model, tmp_path / "out")).complaint
    assert "has no model.safetensors (only pytorch_model.bin): save the model with save_pretrained" in complaint


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_truncated_safetensors(qeff: Qeff, model: Path, tmp_path: Path, size: int) -> None:
    os.truncate(model / "model.safetensors", size)
    complaint = qeff(*compile_words(model, tmp_path / "out")).complaint
    assert "model.safetensors is not a whole safetensors file" in complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("junk", [b"\xff" * 8, b"junkjunk{junk"])
def test_corrupt_header(qeff: Qeff, model: Path, tmp_path: Path, junk: bytes) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.write(junk)
    assert "is not a whole safetensors file" in qeff(*compile_words(model, tmp_path / "out")).complaint


def test_weights_of_another_configuration(qeff: Qeff, model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    complaint = qeff(*compile_words(model, tmp_path / "out")).complaint
    assert "lacks 18 tensors" in complaint
    assert list(tmp_path.glob("*out*partial*")) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--ctx-len 16 --prefill-seq-len 32", "ctx_len=16 is less than prefill_seq_len=32"),
        ("--ctx-len 9999", "use ctx_len=256 or less"),
        ("--ctx-len 0", "--ctx-len"),
        ("--ctx-len many", "(see qeff compile --help)"),
        ("--ctx-lenn 64", "did you mean --ctx-len?"),
        ("--target cloud", "there is no target 'cloud'"),
        ("--pipeline attention", "put canonicalize before attention"),
        ("--report /no/such/folder/r.json", "choose another --report"),
        ("-o {file}", "exists and is not a qeff package"),
        ("-o {file}/x", "cannot be written (File exists): choose another -o"),
        ("-o {folder}", "exists and is not a qeff package"),
        ("--target ai100", "there is no AI 100 compiler at /opt/qti-aic/exec/qaic-compile"),
        ("--target ai100 --emit-only --mosx 1", "has no flag mosx: the nearest is mos;"),
        ("--target ai100 --emit-only --mos x", "the flag mos takes a whole number, not 'x'"),
        ("--target ai100 --emit-only --num-cores 99", "[cores] num_cores is 99"),
        ("--target ai100 --emit-only --pipeline canonicalize", "put kv-retention into the pipeline"),
    ],
)
def test_compile_refuses(qeff: Qeff, tmp_path: Path, words: str, complaint: str) -> None:
    (tmp_path / "folder").mkdir()
    for place in ("file", "folder/file"):
        (tmp_path / place).touch()
    places = {"file": tmp_path / "file", "folder": tmp_path / "folder"}
    said = qeff(*compile_words(MODEL_FOLDER, tmp_path / "out"), *words.format(**places).split())
    assert complaint in said.complaint


def test_missing_sdk_names_the_way_out(qeff: Qeff, tmp_path: Path) -> None:
    assert "--emit-only" in qeff("compile", MODEL_FOLDER, "-o", tmp_path / "out", "--target", "ai100").complaint
    assert not (tmp_path / "out").exists()


def test_pipeline_error_points_at_the_place(qeff: Qeff) -> None:
    said = qeff("compile", MODEL_FOLDER, "--target", "onnxruntime", "--pipeline", "canonicalize,atention")
    assert said.code == 2
    assert said.err == (
        "qeff: error: there is no pass 'atention'; did you mean 'attention'?\n"
        "  canonicalize,atention\n"
        "               ^\n"
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--prompt 3+4= --max-new-tokens 300", "do not fit the compiled context of 128: compile with ctx_len=305"),
        ("--prompt " + "1" * 200, "do not fit the compiled context of 128"),
        ("--prompt 1+1= --temperature 0", "--temperature must be above 0"),
        ("--prompt 1+1= --prompt 2+2= --stream", "--stream shows one prompt"),
        ("--prompt 1+1= --ctx-len 64", "is compiled already: leave out --ctx-len"),
        ("--prompt 1+1= --aic-enable-depth-first", "is compiled already: leave out --aic-enable-depth-first, or give"),
        ("", "missing option '--prompt'"),
    ],
)
def test_run_refuses(qeff: Qeff, compiled: tuple[Path, Outcome], words: str, complaint: str) -> None:
    assert complaint in qeff("run", compiled[0], *words.split()).complaint


def test_verify_refuses(qeff: Qeff, compiled: tuple[Path, Outcome]) -> None:
    assert "is a compiled package: give the model" in qeff("verify", compiled[0]).complaint
    assert "200 steps do not fit ctx_len=128" in qeff("verify", MODEL_FOLDER, "--steps", 200).complaint
    assert "1 prompt for a batch of 2" in qeff("verify", MODEL_FOLDER, "--prompt", "1", "--batch-size", 2).complaint


def test_batch_of_the_wrong_size(compiled: tuple[Path, Outcome]) -> None:
    model = QEFFAutoModelForCausalLM.from_package(compiled[0])
    with pytest.raises(RuntimeInputError, match="compiled for a batch of 1, but got 2 rows: compile with batch_size=2"):
        model.generate(torch.ones(2, 3, dtype=torch.long))


def test_package_of_another_version(qeff: Qeff, package: Path) -> None:
    manifest = json.loads((package / "package.json").read_text())
    (package / "package.json").write_text(json.dumps({**manifest, "version": 99}))
    assert "format version 99, this qeff-ir reads version 5: compile the model again" in run(qeff, package)


def test_damaged_manifest(qeff: Qeff, package: Path) -> None:
    os.truncate(package / "package.json", 100)
    assert "package.json is damaged" in run(qeff, package)


@pytest.mark.parametrize("name", ["model.onnx", "huggingface/config.json", "huggingface/tokenizer.json"])
def test_missing_file(qeff: Qeff, package: Path, name: str) -> None:
    (package / name).unlink()
    assert f"{name} of the package {package} is missing: compile the model again" in run(qeff, package)


def test_missing_manifest(qeff: Qeff, package: Path) -> None:
    (package / "package.json").unlink()
    assert "is not a qeff package (it has no package.json)" in run(qeff, package)


@pytest.mark.parametrize("name", ["model.onnx", "huggingface/config.json", "weights/model.safetensors"])
def test_altered_file(qeff: Qeff, package: Path, name: str) -> None:
    data = bytearray((package / name).read_bytes())
    data[len(data) // 2] ^= 1
    (package / name).write_bytes(data)
    assert f"{name} of the package {package} was altered after it was compiled" in run(qeff, package)


def run(qeff: Qeff, package: Path) -> str:
    return qeff("run", package, "--prompt", "3+4=").complaint


def test_a_damaged_package_is_built_anew(qeff: Qeff, package: Path) -> None:
    (package / "model.onnx").unlink()
    assert "Compiled LlamaForCausalLM" in qeff(*compile_words(MODEL_FOLDER, package)).out
    assert qeff("run", package, "--prompt", "3+4=").out.startswith("3+4=7\n")


def test_a_killed_compile_leaves_no_package(qeff: Qeff, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(command(*compile_words(MODEL_FOLDER, out)), env=environment())
    try:
        while not (partial := list(tmp_path.glob(".out.partial-*"))):
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert partial
    assert not out.exists()
    assert "Compiled" in qeff(*compile_words(MODEL_FOLDER, out)).out
    assert qeff("run", out, "--prompt", "3+4=").out.startswith("3+4=7\n")
    assert list(tmp_path.glob(".out.partial-*")) == []


@pytest.fixture
def heeding() -> Iterator[None]:
    """Interrupts as Python has them, in a background job too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding")
def test_an_interrupt_in_a_finalizer_is_heeded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ends:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    def answer(*_: object, **__: object) -> int:
        Ends()  # Python ignores what a finalizer raises
        time.sleep(10)
        return 0

    monkeypatch.setattr(app, "app", answer)
    assert app.main(["demo"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("heeding")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (0, 70)])
def test_an_interrupt_that_a_library_turns_into_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sent: int, code: int
) -> None:
    def answer(*_: object, **__: object) -> int:
        try:
            os.kill(os.getpid(), sent)
            time.sleep(0.1)
        except KeyboardInterrupt:
            pass
        raise SystemError("a call returned a result with an exception set")

    monkeypatch.setattr(app, "app", answer)
    assert app.main(["demo"]) == code
    assert bool(capsys.readouterr().err) == (code == 70)


def heed_interrupts() -> None:
    """Undo what a shell does to jobs in the background, whose children would ignore an interrupt too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupted_compile_ends_quietly(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = command(*compile_words(MODEL_FOLDER, out))
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    while not list(tmp_path.glob(".out.partial-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    # An interrupt inside an exec() of a string makes Python end by the signal itself, which a shell reports as 130 too.
    assert process.returncode in (130, -signal.SIGINT)
    assert err == ""
    assert not out.exists()
    assert list(tmp_path.glob(".out.partial-*")) == []


def limits() -> list[str]:
    """Ways to make a write fail for want of room that this machine allows; a limit on file sizes always works."""
    namespaced = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    return ["file size", *(["disk of 20k", "disk of 500k"] if namespaced else [])]


@pytest.mark.parametrize("limit", limits())
def test_a_full_disk_leaves_no_package(qeff: Qeff, tmp_path: Path, limit: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = shlex.join(command(*compile_words(MODEL_FOLDER, disk / "out")))
    if limit == "file size":
        script = f"(ulimit -f 20; {words}); code=$?; ls -A {disk}; exit $code"
        shell, reason = ["bash", "-c", script], "cannot be written (File too large)"
    else:
        script = f"mount -t tmpfs -o size={limit.split()[-1]} none {disk} && {words}; code=$?; ls -A {disk}; exit $code"
        shell, reason = ["unshare", "-rm", "bash", "-c", script], "the disk is full while writing"
    done = subprocess.run(shell, capture_output=True, text=True, env=environment(), check=False)
    assert reason in Outcome(done.returncode, done.stdout, done.stderr).complaint
    assert [line for line in done.stdout.splitlines() if line.startswith((".", "out"))] == []  # not even the lock
    assert "Compiled" in qeff(*compile_words(MODEL_FOLDER, disk / "out")).out


def test_debug_shows_the_traceback(qeff: Qeff, tmp_path: Path) -> None:
    said = qeff("compile", tmp_path / "none", "--debug")
    assert said.code == 2
    assert "Traceback (most recent call last)" in said.err
    assert said.err.splitlines()[-1].startswith("qeff: error: ")


def test_unknown_command(qeff: Qeff) -> None:
    assert "no such command 'compil'" in qeff("compil").complaint


def test_the_module_exits_with_the_code(qeff_process: Qeff) -> None:
    assert qeff_process("compil").complaint
    assert qeff_process("--version").code == 0


def test_a_package_that_brings_code_is_opened_without_it(qeff_process: Qeff, package: Path) -> None:
    """Not even with a yes on stdin: a package is data."""
    marker, side = package.parent / "ran", package / "huggingface"
    config = json.loads((side / "config.json").read_text())
    own = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (side / "config.json").write_text(json.dumps({**config, **own}))
    (side / "evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    seal(package, read_manifest(package))
    for answer in ("yes\n" * 9, ""):
        said = qeff_process("run", package, "--prompt", "3+4=", input=answer)
        assert "is not a configuration that transformers reads" in said.complaint
        assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "[" * 5000),
        ("generation_config.json", '{"max_new_tokens": "2"}'),
        ("generation_config.json", "[]"),
        ("tokenizer.json", "{}"),
        ("config.json", '{"model_type": "llama", "vocab_size": null}'),
        ("config.json", '{"model_type": "whale"}'),
    ],
)
def test_damaged_side_files(qeff: Qeff, package: Path, name: str, text: str) -> None:
    (package / "huggingface" / name).write_text(text)
    seal(package, read_manifest(package))
    assert str(package) in run(qeff, package)


@pytest.mark.parametrize("command_of", ["run", "compile", "verify", "cost"])
@pytest.mark.parametrize("name", ["a" * 300, "~nobody-at-all/x", "/dev/null/x"], ids=["long", "user", "device"])
def test_names_that_no_file_can_have(qeff: Qeff, command_of: str, name: str) -> None:
    more = ("--prompt", "1") if command_of == "run" else ()
    assert qeff(command_of, name, *more).complaint


@pytest.mark.parametrize("home", ["/proc/nope", "/dev/null/x", "a" * 300])
def test_a_cache_that_cannot_be_made(qeff: Qeff, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("QEFF_HOME", home)
    assert qeff("compile", MODEL_FOLDER, "--target", "onnxruntime").complaint


@pytest.mark.parametrize("seed", [-1, 2**40])
def test_seeds_that_numpy_does_not_take(qeff: Qeff, compiled: tuple[Path, Outcome], seed: int) -> None:
    assert "--seed" in qeff("run", compiled[0], "--prompt", "1+1=", f"--seed={seed}").complaint


def test_a_prompt_that_is_not_unicode(qeff: Qeff, compiled: tuple[Path, Outcome]) -> None:
    assert "prompt 0 cannot be read as Unicode" in qeff("run", compiled[0], "--prompt", "1\udcff").complaint


def test_what_the_machine_answers_is_no_defect(qeff: Qeff, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk or a permission may fail anywhere."""
    for error in (OSError(5, "Input/output error", "/x/y"), OSError(12, "Cannot allocate memory"), MemoryError()):
        monkeypatch.setattr("qeff_ir.cli.models.path_of", lambda *_, error=error: (_ for _ in ()).throw(error))
        said = qeff("compile", MODEL_FOLDER)
        assert any(part in said.complaint for part in ("/x/y cannot be used (Input/output error)", "memory"))


def test_a_context_that_a_prompt_just_fills(qeff: Qeff, compiled: tuple[Path, Outcome]) -> None:
    """14 tokens and 3 steps need 16 slots, for the last token is compared and never fed."""
    words = ("verify", MODEL_FOLDER, "--target", "onnxruntime", "--ctx-len", 16, "--prompt", "1" * 13)
    assert "Agrees with transformers" in qeff(*words, "--steps", 3).out
    complaint = qeff(*words, "--steps", 4).complaint
    assert "a prompt of 14 tokens and 4 steps do not fit ctx_len=16: pass --ctx-len 17" in complaint


def test_verify_fills_the_context_by_itself() -> None:
    request = Request(ctx_len=40, batch_size=3)
    assert [len(row) for row in random_prompts(request, 3, 17)] == [38, 10, 32]
    assert [len(row) for row in random_prompts(Request(ctx_len=8, batch_size=4), 8, 17)] == [1, 1, 1, 1]


def test_commands_to_copy_quote_their_paths(qeff: Qeff, tmp_path: Path) -> None:
    out = tmp_path / "a package; with blanks"
    said = qeff("compile", MODEL_FOLDER, "-o", out, "--target", "onnxruntime", "--ctx-len", 16).out
    command = next(line for line in said.splitlines() if line.startswith("Next:"))
    words = shlex.split(command.partition(":")[2])
    assert words[:3] == ["qeff", "run", str(out)]
    assert qeff("run", words[2], "--prompt", "3+4=").out.startswith("3+4=7\n")
