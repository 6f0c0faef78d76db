"""A question about a picture beside peers: encoder, prompt and decode, the same model, the same picture."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import typer
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil
from transformers.generation.streamers import BaseStreamer

from benchmarks.options import Json, Peers, Plot, Quick
from benchmarks.race import NewTokens, Rounds, Sizes, Threads
from benchmarks.result import Result, Row, figure, publish
from benchmarks.shapes import SHAPES, config
from qeff_ir import QEFFAutoModelForImageTextToText

_WORDS = 32
"""Tokens of the question, half of them before the picture."""
_TOWERS = {"tiny": (64, 2, 4, 56), "125M": (768, 12, 12, 336)}
"""Width, layers, heads and pixels of an encoder by the shape of its decoder; others take that of 1024."""
_PEERS = {"eager": "transformers, eager", "openvino": "OpenVINO"}
"""Names of the rows of the peers, by the names that `--peers` takes."""
_NEEDS = {"openvino": "openvino"}
"""Modules that a peer needs beyond what qeff-ir itself needs."""


@dataclass
class Laps:
    """What one contender did, one entry for each measured round.

    Attributes:
        encoder: Seconds of the encoder.
        first: Seconds to the first token, encoder included; the prefill is the rest.
        rate: Decoded tokens per second.
        tokens: The answer of the last round.
    """

    encoder: list[float] = field(default_factory=list[float])
    first: list[float] = field(default_factory=list[float])
    rate: list[float] = field(default_factory=list[float])
    tokens: list[int] = field(default_factory=list[int])


def main(
    shape: Sizes = "125M",
    new_tokens: NewTokens = 32,
    threads: Threads = 2,
    rounds: Rounds = 3,
    peers: Peers = "all",
    json: Json = None,
    plot: Plot = None,
    quick: Quick = False,
) -> None:
    """Ask about a picture of five tiles (the form of LLaVA-NeXT), float32, random weights, greedy.

    Each round has another picture, so that nobody finds it in a cache; contenders take turns.
    """
    if quick:
        shape, new_tokens, rounds = "tiny", 8, 1
    torch.set_num_threads(threads)
    model, images = _model(shape)
    size = (2 * images.size["shortest_edge"],) * 2
    with tempfile.TemporaryDirectory() as folder:
        ours = _Ours(model, images, size, Path(folder), threads)
        asked = [_question(images, size, index, ours.rows, SHAPES[shape]["vocab"]) for index in range(rounds + 1)]
        contenders: dict[str, Contender] = {"qeff-ir, onnxruntime": ours}
        missing: list[Row] = []
        for name in _wanted(peers):
            found = _peer(name, model, asked[0], threads)
            if isinstance(found, Row):
                missing.append(found)
            else:
                contenders[_PEERS[name]] = found
        laps = {name: Laps() for name in contenders}
        for index, question in enumerate(asked):
            for name, contender in contenders.items():
                _lap(contender, question, new_tokens, laps[name] if index else Laps())
    right = laps.get(_PEERS["eager"], laps["qeff-ir, onnxruntime"]).tokens
    rows = [
        Row(
            name,
            {
                "encoder ms": figure((s * 1e3 for s in lap.encoder), "lower"),
                "prefill ms": figure((1e3 * (f - e) for f, e in zip(lap.first, lap.encoder, strict=True)), "lower"),
                "first token ms": figure((s * 1e3 for s in lap.first), "lower"),
                "tokens/s": figure(lap.rate, "higher"),
                "equal steps %": figure([100 * float(np.mean(np.equal(lap.tokens, right)))], "neither"),
            },
        )
        for name, lap in laps.items()
    ]
    rows += missing
    settings = {"shape": shape, "pixels": size[0], "rows": ours.rows, "new tokens": new_tokens, "threads": threads}
    publish(Result("vision", quick, {**settings, "rounds": rounds}, rows), json, plot)


class Contender(Protocol):
    """One way to run the model."""

    def encode(self, given: dict[str, Any]) -> object:
        """Encode the picture of a question that was not seen yet."""
        ...

    def answer(self, given: dict[str, Any]) -> torch.Tensor:
        """Question and answer, ``[1, tokens]``; each token is told to ``streamer``."""
        ...


class _Ours:
    """The compiled model."""

    def __init__(
        self,
        model: LlavaNextForConditionalGeneration,
        images: Any,
        size: tuple[int, int],
        folder: Path,
        threads: int,
    ) -> None:
        self.model = QEFFAutoModelForImageTextToText(model, images)
        self.model.compile(image_size=size, target="onnxruntime", prefill_seq_len=128, compile_dir=folder)
        self._runner = self.model.runner(threads)
        self.rows = self._runner.forms.sizes[0].rows

    def encode(self, given: dict[str, Any]) -> None:
        """Encode the picture of a question that was not seen yet."""
        form = self._runner.forms.sizes[0]
        self._runner.encode(form, {name: given[name].numpy() for name in form.inputs})

    def answer(self, given: dict[str, Any]) -> torch.Tensor:
        """Question and answer, ``[1, tokens]``."""
        self._runner.forget()
        return self.model.generate(**given)


class _Transformers:
    """The model as transformers runs it."""

    def __init__(self, model: LlavaNextForConditionalGeneration) -> None:
        self.model = model

    def encode(self, given: dict[str, Any]) -> None:
        """Encode the picture of a question."""
        with torch.inference_mode():
            self.model.model.get_image_features(given["pixel_values"], given["image_sizes"])

    def answer(self, given: dict[str, Any]) -> torch.Tensor:
        """Question and answer, ``[1, tokens]``."""
        with torch.inference_mode():
            model: Any = self.model
            return model.generate(**given)


def _wanted(peers: str) -> list[str]:
    """Names of the peers that were asked for.

    Raises:
        typer.BadParameter: There is no such peer.
    """
    found = list(_PEERS) if peers == "all" else [] if peers == "none" else peers.split(",")
    for name in (name for name in found if name not in _PEERS):
        raise typer.BadParameter(f"there is no peer '{name}': it is one of {', '.join(_PEERS)}")
    return found


def _peer(
    name: str, model: LlavaNextForConditionalGeneration, question: dict[str, Any], threads: int
) -> Contender | Row:
    """A peer that is ready, or the reason why it is missing."""
    if name == "eager":
        return _Transformers(model)
    if importlib.util.find_spec(_NEEDS[name]) is None:
        return Row(_PEERS[name], missing=f"{_NEEDS[name]} is not installed")
    from benchmarks.peers.openvino_pictures import OpenVinoPictures

    return OpenVinoPictures(model, question, threads)


def _lap(contender: Contender, given: dict[str, Any], count: int, laps: Laps) -> None:
    started = time.perf_counter()
    contender.encode(given)
    laps.encoder.append(time.perf_counter() - started)
    times = _Times()
    started = time.perf_counter()
    ids = contender.answer(
        given | {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "streamer": times}
    )
    laps.first.append(times.tokens[0] - started)
    laps.rate.append((count - 1) / (times.tokens[-1] - times.tokens[0]))
    laps.tokens = ids[0, -count:].tolist()


class _Times(BaseStreamer):
    """Takes the time of each token; the prompt, which comes first, is none."""

    def __init__(self) -> None:
        self._begun = False
        self.tokens: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """See `BaseStreamer.put`."""
        if self._begun:
            self.tokens.append(time.perf_counter())
        self._begun = True

    def end(self) -> None:
        """See `BaseStreamer.end`."""


def _model(shape: str) -> tuple[LlavaNextForConditionalGeneration, Any]:
    """A model of a shape with random weights, and its image processor."""
    text = config(SHAPES[shape], 8192)
    width, layers, heads, pixels = _TOWERS.get(shape, (1024, 24, 16, 336))
    tower = {
        "model_type": "clip_vision_model", "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": pixels, "patch_size": 14,
    }  # fmt: skip
    tiles = [[pixels, 2 * pixels], [2 * pixels, pixels], [2 * pixels, 2 * pixels]]
    token = SHAPES[shape]["vocab"] - 1
    whole = LlavaNextConfig(vision_config=tower, text_config=text, image_token_index=token, image_grid_pinpoints=tiles)
    torch.manual_seed(0)
    square = {"height": pixels, "width": pixels}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": pixels}, crop_size=square, image_grid_pinpoints=tiles)
    return LlavaNextForConditionalGeneration(whole).eval(), images


def _question(images: Any, size: tuple[int, int], seed: int, rows: int, vocab: int) -> dict[str, Any]:
    """A picture of noise between random tokens."""
    random = np.random.default_rng(seed)
    words = random.integers(0, vocab - 1, _WORDS)
    half = _WORDS // 2
    ids = torch.from_numpy(np.concatenate([words[:half], np.full(rows, vocab - 1), words[half:]]))[None]
    made = images(images=[[random.integers(0, 256, (*size, 3), dtype=np.uint8)]], return_tensors="pt")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made}
