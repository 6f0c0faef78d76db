"""Models of an encoder and a decoder on the command line: texts that are read, and recordings that are heard."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.cli.models import compiling, open_model, open_tokenizer, refuse_options
from qeff_ir.cli.request import Request
from qeff_ir.cli.terminal import line, quiet_transformers, working
from qeff_ir.errors import CompileError, RuntimeInputError, first_line
from qeff_ir.reading import path_of, regular_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from qeff_ir.arrays import Array
    from qeff_ir.auto.seq2seq import QEFFAutoModelForSeq2SeqLM
    from qeff_ir.frontend.source import Source

_SCALE = 1 << 15
"""Of samples of 16 bits."""


def is_encoded(source: Source) -> bool:
    """Whether a model has an encoder beside its decoder."""
    return bool(getattr(source.config, "is_encoder_decoder", False))


def compile_encoded(
    source: Source, request: Request, lengths: Sequence[int] | None = None, out: Path | None = None
) -> QEFFAutoModelForSeq2SeqLM:
    """Compile a model of an encoder and a decoder.

    Args:
        source: The model.
        request: The shared options.
        lengths: Tokens of a text, or positions that the encoder makes of a recording; the model's own by default.
        out: Folder of the package; in the cache by default.

    Raises:
        QeffError: See `qeff_ir.auto.seq2seq.QEFFAutoModelForSeq2SeqLM.compile`.
    """
    if request.token_embedding != "graph":
        raise CompileError("--token-embedding host is not for encoder-decoders: leave it out")
    from qeff_ir.frontend.providers.stored import Stored

    if not isinstance(source.provider, Stored):
        raise CompileError("adapters of a model with an encoder are not supported: give the model itself")
    found = _kind(source.config).from_pretrained(source.provider.folder, trust_remote_code=request.trust_remote_code)
    options = {**request.options(), "prefill_seq_len": request.prefill_seq_len}
    options |= {name: value for name, value in (("prefill_seq_len", 1), ("ctx_len", None)) if name not in request.given}
    with compiling(request) as rest:
        found.compile_with(options, encoder_ctx_len=lengths, compile_dir=out, **rest)
    return found


def open_encoded(name: str, request: Request) -> QEFFAutoModelForSeq2SeqLM | None:
    """A package as it is, or a model, compiled into the cache; `None` for a model without an encoder.

    Raises:
        PackageError: The package is damaged, or an option asks for something that it was not compiled for.
        QeffError: The model cannot be opened or compiled.
    """
    from qeff_ir.package import SIDE_FOLDER, is_package, open_package
    from qeff_ir.side_files import read_model_config

    folder = path_of(name, "the model")
    if not is_package(folder):
        if (folder / SIDE_FOLDER).is_dir():
            return None  # a damaged package
        source = open_model(name, request)
        return compile_encoded(source, request) if is_encoded(source) else None
    open_package(folder)
    config = read_model_config(folder / SIDE_FOLDER)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    refuse_options(name, request.given)
    return _kind(config).from_package(folder)


def answer_encoded(
    model: QEFFAutoModelForSeq2SeqLM, prompts: Sequence[str], audio: Sequence[Path], settings: dict[str, Any]
) -> None:
    """Print what the model writes for each text, or for each recording.

    Raises:
        RuntimeInputError: The model does not read texts, or hear recordings, or one of them cannot be read.
    """
    from qeff_ir.auto.seq2seq import QEFFAutoModelForSpeechSeq2Seq
    from qeff_ir.package import SIDE_FOLDER

    hears, stream = isinstance(model, QEFFAutoModelForSpeechSeq2Seq), settings.pop("stream")
    if bool(prompts) == hears or bool(audio) != hears:
        takes = "hears recordings: give --audio FILE alone" if hears else "reads texts: give --prompt TEXT alone"
        raise RuntimeInputError(f"the model {takes}")
    side = model.package.folder / SIDE_FOLDER
    with working("Opening the session"):
        quiet_transformers()
        tokenizer = open_tokenizer(side)
        model.runner()
    if stream:
        from transformers import TextStreamer

        settings["streamer"] = TextStreamer(tokenizer, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
    asked = (
        [(str(path), _heard(path, side)) for path in audio] if hears else [(p, _read(tokenizer, p)) for p in prompts]
    )
    for name, inputs in asked:
        ids = model.generate(**inputs, **settings)
        if not stream:
            line((name, "cyan"), " ", str(tokenizer.decode(ids[0], skip_special_tokens=True)).strip())


def _kind(config: PreTrainedConfig) -> type[QEFFAutoModelForSeq2SeqLM]:
    """The class for a configuration."""
    from transformers import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING

    from qeff_ir.auto.seq2seq import QEFFAutoModelForSeq2SeqLM, QEFFAutoModelForSpeechSeq2Seq

    heard: Any = MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
    return QEFFAutoModelForSpeechSeq2Seq if type(config) in heard else QEFFAutoModelForSeq2SeqLM


def _read(tokenizer: Any, text: str) -> dict[str, Any]:
    from qeff_ir.runtime.texts import as_texts, tokenizing

    with tokenizing(f"the prompt {text[:40]!r}"):
        made = tokenizer(as_texts(text), return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask") if name in made}


def _heard(path: Path, side: Path) -> dict[str, Any]:
    """What the feature extractor makes of a recording."""
    from qeff_ir.frontend.checkpoint.processors import read_part

    extractor = read_part("AutoFeatureExtractor", side, trust_remote_code=False)
    samples = read_recording(path, int(extractor.sampling_rate))
    try:
        return dict(extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt"))
    except Exception as error:  # extractors raise whatever their many steps raise
        raise RuntimeInputError(f"the feature extractor does not take {path} ({first_line(error)})") from error


def read_recording(path: Path, rate: int) -> Array:
    """The samples of a WAV file, float32 ``[samples]`` from -1 to 1; channels are averaged.

    Args:
        path: The file, of 16 bits a sample.
        rate: Samples per second that the model takes.

    Raises:
        RuntimeInputError: It cannot be read, or has another form.
    """
    import numpy as np

    file = regular_file(path_of(path, "--audio", RuntimeInputError), error=RuntimeInputError)
    try:
        with wave.open(str(file)) as found:
            form = (found.getframerate(), 8 * found.getsampwidth())
            channels, data = found.getnchannels(), found.readframes(found.getnframes())
    except (wave.Error, EOFError) as error:
        raise RuntimeInputError(f"{path} is not a WAV file of plain samples ({error}): convert it to one") from error
    if form != (rate, 16):
        raise RuntimeInputError(
            f"{path} has {form[0]} samples a second, of {form[1]} bits, and the model takes {rate} of 16: convert it"
        )
    samples = np.frombuffer(data[: len(data) // (2 * channels) * 2 * channels], dtype="<i2").reshape(-1, channels)
    if not len(samples):
        raise RuntimeInputError(f"{path} has no samples: give a recording")
    return (samples.mean(axis=1) / _SCALE).astype(np.float32)
