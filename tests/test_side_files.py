"""What a package brings of its model is data: nothing of it runs, and every damage is one sentence."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from qeff_ir.demo import MODEL_FOLDER
from qeff_ir.errors import PackageError
from qeff_ir.side_files import read_generation_config, read_model_config, read_tokenizer

EVIL = "from pathlib import Path\nPath({marker!r}).touch()\nclass Evil: pass\n"


@pytest.fixture
def side(tmp_path: Path) -> Path:
    """The side files of the demo model, to be damaged."""
    folder = tmp_path / "huggingface"
    folder.mkdir()
    for path in MODEL_FOLDER.glob("*.json"):
        shutil.copy(path, folder)
    return folder


def change(path: Path, **fields: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **fields}))


def read_all(folder: Path) -> None:
    read_model_config(folder)
    read_generation_config(folder)
    read_tokenizer(folder)


def test_whole_files_are_read(side: Path) -> None:
    assert read_model_config(side).model_type == "llama"
    assert read_generation_config(side).eos_token_id == 2
    assert read_tokenizer(side)("1+1=")["input_ids"]


@pytest.mark.parametrize("answer", ["yes\n", ""])
@pytest.mark.parametrize(
    ("name", "fields", "read"),
    [
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}, read_model_config),
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "a/b--evil.Evil"}}, read_model_config),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
            read_tokenizer,
        ),
    ],
    ids=["config", "hub", "tokenizer"],
)
def test_code_is_neither_run_nor_asked_for(
    side: Path,
    name: str,
    fields: dict[str, Any],
    read: Callable[[Path], Any],
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    marker = side / "ran"
    (side / "evil.py").write_text(EVIL.format(marker=str(marker)))
    change(side / name, **fields)
    asked = io.StringIO(answer)
    monkeypatch.setattr(sys, "stdin", asked)
    if name == "config.json":
        with pytest.raises(PackageError) as error:
            read(side)
        assert "\n" not in str(error.value)
    else:  # a tokenizer of a known form needs no class of its own
        with contextlib.suppress(PackageError):
            read(side)
    assert not marker.exists()
    assert asked.tell() == 0
    assert "y/N" not in capfd.readouterr().out


CONFIGS: list[tuple[str, dict[str, Any] | bytes]] = [
    ("config.json", b""),
    ("config.json", b"{"),
    ("config.json", b"[]"),
    ("config.json", b"\xff\xfe\x00"),
    ("config.json", b'{"a":' * 2000 + b"1" + b"}" * 2000),
    ("config.json", {"model_type": "no-such-type"}),
    ("config.json", {"model_type": 5}),
    ("config.json", {"model_type": ["llama"]}),
    ("config.json", {"hidden_size": "many"}),
    ("config.json", {"vocab_size": [17]}),
    ("config.json", {"rope_parameters": 5}),
    ("generation_config.json", b""),
    ("generation_config.json", b"5"),
    ("generation_config.json", b"null"),
    ("generation_config.json", b"[1]"),
    ("generation_config.json", {"max_new_tokens": "2"}),
    ("generation_config.json", {"max_new_tokens": -1}),
    ("generation_config.json", {"early_stopping": "late"}),
    ("generation_config.json", {"pad_token_id": "x"}),
    ("generation_config.json", {"cache_implementation": "none"}),
    ("generation_config.json", {"compile_config": 5}),
    ("generation_config.json", {"watermarking_config": {"x": 1}}),
    ("generation_config.json", {"num_return_sequences": "many"}),
    ("generation_config.json", {"streamer": 5}),
    ("tokenizer.json", b""),
    ("tokenizer.json", b"{}"),
    ("tokenizer.json", {"model": {"type": "None"}}),
    ("tokenizer.json", {"model": 5}),
    ("tokenizer.json", {"added_tokens": 5}),
    ("tokenizer.json", {"decoder": {"type": "none"}}),
    ("tokenizer_config.json", b"[]"),
    ("tokenizer_config.json", b"{"),
]


@pytest.mark.parametrize(("name", "damage"), CONFIGS, ids=[f"{n} {str(d)[:40]}" for n, d in CONFIGS])
def test_damage_is_one_sentence(side: Path, name: str, damage: dict[str, Any] | bytes) -> None:
    if isinstance(damage, bytes):
        (side / name).write_bytes(damage)
    else:
        change(side / name, **damage)
    with pytest.raises(PackageError) as error:
        read_all(side)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "outside", "zero"])
def test_what_is_not_a_file_is_not_read(side: Path, name: str, kind: str) -> None:
    path = side / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "zero" else MODEL_FOLDER / name)
    with pytest.raises(PackageError) as error:
        read_all(side)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there(side: Path, tmp_path: Path) -> None:
    (side / "tokenizer.json").unlink()
    (side / "tokenizer_config.json").unlink()
    with pytest.raises(PackageError, match="has no tokenizer that can be read"):
        read_tokenizer(side)
    with pytest.raises(PackageError, match="there is no such folder"):
        read_tokenizer(tmp_path / "none")
    (side / "config.json").unlink()
    with pytest.raises(PackageError, match=r"config.json\' cannot be read \(No such file"):
        read_model_config(side)


TABLE: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
    (None, {}),
    (None, {"eos_token_id": [2, 5]}),
    (None, {"eos_token_id": 7, "pad_token_id": None}),
    (None, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 30}),
    (None, {"num_beams": 4, "repetition_penalty": 1.3, "output_hidden_states": True}),
    ({}, {"eos_token_id": [2, 5]}),
    ({"eos_token_id": 3}, {"eos_token_id": [2, 5], "max_length": 30}),
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 7, "own": {"a": 1}}, {"pad_token_id": 9}),
    ({"temperature": 0.6}, {}),
    ({"max_new_tokens": 7, "max_length": 4096, "min_new_tokens": 2}, {"max_length": 5}),
]


@pytest.mark.parametrize(("generation", "config"), TABLE, ids=str)
def test_defaults_are_those_of_the_model_in_transformers(
    generation: dict[str, Any] | None, config: dict[str, Any], side: Path
) -> None:
    shutil.copy(MODEL_FOLDER / "model.safetensors", side)
    change(side / "config.json", **config)
    if generation is None:
        (side / "generation_config.json").unlink()
    else:
        (side / "generation_config.json").write_text(json.dumps(generation))
    expected = AutoModelForCausalLM.from_pretrained(side).generation_config.to_dict()
    assert read_generation_config(side).to_dict() == expected
