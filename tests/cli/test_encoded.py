"""``qeff compile`` and ``qeff run`` of models of an encoder and a decoder."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, WhisperFeatureExtractor

from qeff_ir.arrays import Array
from qeff_ir.cli.encoded import read_recording
from qeff_ir.errors import RuntimeInputError
from tests import processors, seq2seq

from .conftest import Qeff

RATE = 16000
NEW = ("--max-new-tokens", "4")


def saved(path: Path, samples: Array, rate: int = RATE) -> Path:
    """A WAV file; samples of several channels are ``[samples, channels]``."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1 if samples.ndim == 1 else samples.shape[1], 2, rate, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def noise(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).integers(-9000, 9000, shape)


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reads")
    seq2seq.tiny("bart").save_pretrained(folder)
    processors.tokenizer({}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hears(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hears")
    make: Any = AutoModelForSpeechSeq2Seq.from_config
    torch.manual_seed(0)
    model = make(AutoConfig.for_model("whisper", **{**seq2seq.MODELS["whisper"].config, "max_source_positions": 50}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    processors.tokenizer({}).save_pretrained(folder)
    return folder


def test_texts_are_read(qeff: Qeff, reads: Path, tmp_path: Path) -> None:
    common = ("--target", "onnxruntime", "--ctx-len", "32", "--encoder-ctx-len", "12")
    said = qeff("compile", reads, "-o", tmp_path / "out", *common)
    assert (said.code, said.err) == (0, "") and "encoder" in said.out
    prompts = ("w5 w6 w7", "w8 w9 w10 w11")
    answer = qeff("run", tmp_path / "out", "--prompt", prompts[0], "--prompt", prompts[1], *NEW)
    assert (answer.code, answer.err) == (0, "")
    tokenizer, model = processors.tokenizer({}), seq2seq.tiny("bart")
    right: list[str] = []
    for prompt in prompts:
        given = tokenizer([prompt], return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**given, max_new_tokens=4, do_sample=False)  # pyright: ignore[reportCallIssue]
        right.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    assert right[0] != right[1] and all(right)
    assert [line for line in answer.out.splitlines() if line] == [
        f"{prompt} {text}" for prompt, text in zip(prompts, right, strict=True)
    ]
    streamed = qeff("run", tmp_path / "out", "--prompt", prompts[0], "--stream", *NEW)
    assert right[0] in streamed.out
    assert right[1] in qeff("run", reads, "--target", "onnxruntime", "--prompt", prompts[1], *NEW).out


def test_recordings_are_heard(qeff: Qeff, hears: Path, tmp_path: Path) -> None:
    said = qeff("compile", hears, "-o", tmp_path / "out", "--target", "onnxruntime")
    assert (said.code, said.err) == (0, "")
    tone = 9000 * np.sin(np.arange(RATE // 2) * 0.2)
    clips = [saved(tmp_path / "noise.wav", noise(1, RATE // 2)), saved(tmp_path / "tone.wav", tone)]
    answers = [qeff("run", tmp_path / "out", "--audio", clip, *NEW) for clip in clips]
    assert [answer.code for answer in answers] == [0, 0]
    samples = read_recording(clips[0], RATE)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    given = extractor(samples, sampling_rate=RATE, return_tensors="pt")
    model: Any = AutoModelForSpeechSeq2Seq.from_pretrained(hears)
    ids = model.generate(input_features=given["input_features"], max_new_tokens=4, do_sample=False)
    right = processors.tokenizer({}).decode(ids[0], skip_special_tokens=True)
    assert right and right in answers[0].out and answers[0].out.split()[1:] != answers[1].out.split()[1:]


def test_channels_are_averaged(tmp_path: Path) -> None:
    both = noise(3, 100, 2)
    found = read_recording(saved(tmp_path / "both.wav", both), RATE)
    np.testing.assert_allclose(found, both.mean(axis=1) / 32768, rtol=1e-6)


def test_what_is_no_recording_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    for path, message in (
        (tmp_path / "none.wav", "cannot be read"),
        (tmp_path / "text.wav", "is not a WAV file of plain samples"),
        (
            saved(tmp_path / "fast.wav", noise(1, 50), 44100),
            "has 44100 samples a second, of 16 bits, and the model takes",
        ),
        (saved(tmp_path / "empty.wav", noise(1, 0)), "has no samples"),
    ):
        with pytest.raises(RuntimeInputError, match=message):
            read_recording(path, RATE)


def test_what_cannot_be_done_is_told(qeff: Qeff, reads: Path, hears: Path, tmp_path: Path) -> None:
    clip = saved(tmp_path / "clip.wav", noise(1, 100))
    target = ("--target", "onnxruntime")
    for words, message in (
        (("run", reads, "--audio", clip, *target), "the model reads texts: give --prompt TEXT alone"),
        (("run", hears, "--prompt", "w5", *target), "the model hears recordings: give --audio FILE alone"),
        (("compile", reads, "--encoder-ctx-len", "500", *target), "is more than the 64 positions"),
        (("compile", reads, "--token-embedding", "host", *target), "is not for encoder-decoders"),
    ):
        assert message in qeff(*words).complaint
