"""Models of pictures or sounds and text: an encoder's rows go to a language model, beside a prompt of words alone."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from backends import backend_names
from backends.options import CompileOptions
from benchmarks.coverage_causal import check_causal
from benchmarks.coverage_models import build, data, read_data, small_config
from benchmarks.coverage_row import Job, Row
from benchmarks.coverage_session import compiled
from benchmarks.coverage_task import Coverage
from qeff_ir import numerics
from qeff_ir.arrays import Array
from qeff_ir.frontend import private
from qeff_ir.frontend.checkpoint.weights import memory_weights
from qeff_ir.frontend.export.encoders import find_features, lower_encoder
from qeff_ir.frontend.export.features import encoder_of
from qeff_ir.frontend.export.pictures import lower_language
from qeff_ir.frontend.parts import answering_part
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.tasks import IMAGE_TEXT_TO_TEXT
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import AXES, PICTURES_TOKENS, PLANES, PREFIX_TOKENS
from qeff_ir.runtime.picture_decoder import Pictured, PictureDecoder
from qeff_ir.runtime.session import Session
from qeff_ir.testing.trace import Trace, compare, session_trace

CHUNK = 8
STEPS = 6
WORDS = (5, 3, 4, 7)
"""Before, between and behind two pictures or sounds, and of the prompt without any."""
_FORBIDDEN = -1e30
"""Below this are the logits of tokens that a model never answers."""
_LOWEST = -65504.0
"""And this is what they are where only float16 has to hold them."""
_SEEN = 100.0
"""How many times the limit the answer changes at least where the rows of the encoder are lost."""

Inputs = dict[str, torch.Tensor]
"""What a processor would make of pictures or sounds, by name."""


class Multimodal(Coverage):
    """See `Coverage`.

    Args:
        modality: ``image``, ``video`` or ``audio``, unless the data says another of an architecture.
        auto: transformers' class that opens the models.
        types: Their model types.
        file: Their configurations.
    """

    def __init__(self, modality: str, auto: Any, types: Iterable[str], file: str) -> None:
        self.modality, self.auto, self._types, self._file = modality, auto, sorted(types), file

    @functools.cached_property
    def data(self) -> dict[str, Any]:
        """What the file says, over what is said of causal LMs."""
        causal, own = data(), read_data(self._file)
        parts = {**causal["architectures"], **own.get("parts", {})}
        return {**own, "sizes": {**causal["sizes"], **own["sizes"]}, "relative": causal["relative"], "parts": parts}

    def architectures(self) -> list[str]:
        """See `Coverage.architectures`."""
        return list(self._types)

    def absent(self) -> Mapping[str, str]:
        """See `Coverage.absent`."""
        return self.data["absent"]

    def tiny(self, name: str) -> PreTrainedModel:
        """The small model of one architecture, which answers as long as it is asked."""
        model = build(small_config(name, self.data), auto=self.auto)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and not (parameter.isfinite().all() and parameter.any()):
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
        generation: Any = model.generation_config
        generation.eos_token_id, generation.pad_token_id = None, 0
        return model

    def request(self, name: str, model: PreTrainedModel) -> Request:
        """What one architecture is asked, with what a processor would make of two pictures or sounds of one size."""
        modality = self.data.get("modalities", {}).get(name, self.modality)
        said: Mapping[str, Any] = self.data["inputs"].get(name) or _by_encoder(model, modality)
        inputs = [{key: _drawn(value, seed) for key, value in said.items()} for seed in (5, 9)]
        beside = {key: _drawn(value, 9) for key, value in self.data.get("second", {}).get(name, {}).items()}
        joined, kind = self.data["joined"].get(name, {}), self.data.get("types", {}).get(name, 1)
        return Request(model, modality, inputs, beside, joined=joined, kind=kind)

    def check(self, job: Job, row: Row, folder: Path) -> None:
        """See `Coverage.check`."""
        model = self.tiny(job.name)
        row.model = type(model).__name__
        model = answering_part(Memory(model), IMAGE_TEXT_TO_TEXT.auto_class()).model
        if model.input_modalities in ("text", ("text",)):
            check_causal(model, row, folder)
            return
        request = self.request(job.name, model)
        weights, example, modality = memory_weights(model), request.inputs[0], request.modality
        features = find_features(model, example, modality)
        language = lower_language(model, weights, features, modality, count=2, example=example)
        encoder = lower_encoder(model, weights, example, modality)
        row.nodes, row.states = len(encoder.graph) + len(language.graph), len(language.states)
        row.bound = numerics.bound(_depth(encoder) + numerics.depth(language))
        reference = request.answer(model)
        kept = np.asarray((reference.logits > _FORBIDDEN).all((0, 1)))
        reference = _of_tokens(reference, kept)
        row.allow(request.rounding(model, reference, kept))
        for target in backend_names():
            options = request.options(cut=not any(language.find(role) for role in (PICTURES_TOKENS, PREFIX_TOKENS)))
            session = compiled(encoder, target, folder / target / "encoder", options, "Vision")
            decoder = PictureDecoder(compiled(language, target, folder / target, options))
            given = request.given(session, planes=language.find(PLANES) is not None)
            decoder.prompts = [given, Pictured()]
            found = session_trace(decoder, request.prompts, reference.tokens)
            row.hold(target, compare(_of_tokens(found, kept), reference))
            if (found.logits[..., ~kept] > _LOWEST).any():
                row.fail(f"{target} allows tokens that transformers does not")
            decoder.prompts = [replace(given, rows={n: 0 * rows for n, rows in given.rows.items()}), Pictured()]
            lost = numerics.error_over_rms(decoder.prefill(request.prompts)[0, kept], reference.logits[0, 0])
            if lost < _SEEN * row.limit:
                row.fail(f"what the encoder makes changes the answer by {lost:.1e} alone")
        row.conclude()


class Request:
    """Two prompts, one with two pictures or sounds between its words, and what transformers answers.

    Args:
        model: The small model.
        modality: What they are.
        inputs: What a processor would make of each.
        beside: What it would make of the second where it stands beside the first, if that is something else.
        joined: By input, the axis along which both lie one after the other in a processor's output; 0 by default.
        kind: The type of their tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modality: str,
        inputs: list[Inputs],
        beside: Inputs,
        *,
        joined: Mapping[str, int],
        kind: int = 1,
    ) -> None:
        self.modality, self.inputs = modality, inputs
        together = [inputs[0], {**inputs[1], **beside}]
        self._both = {key: _joined([one[key] for one in together], joined.get(key, 0)) for key in inputs[0]}
        self._model = model
        token, count = getattr(model.config, f"{modality}_token_id"), find_features(model, inputs[0], modality).rows
        rng = np.random.default_rng(3)
        words = [rng.integers(4, 60, length).tolist() for length in WORDS]
        place = [token] * count
        self.prompts: list[list[int]] = [[*words[0], *place, *words[1], *place, *words[2]], words[3]]
        self._types = kind * (torch.tensor(self.prompts[0]) == token).long()
        accepted = inspect.signature(model.forward).parameters
        self._typed = [name for name in accepted if name.endswith("token_type_ids")]

    def options(self, *, cut: bool) -> CompileOptions:
        """Shapes with room for both prompts and their answers, in chunks if they may be cut."""
        longest = max(map(len, self.prompts))
        chunk = CHUNK if cut else longest
        return CompileOptions(prefill_seq_len=chunk, ctx_len=-(-(longest + STEPS) // 16) * 16, batch_size=2)

    def answer(self, model: PreTrainedModel) -> Trace:
        """The greedy answer of a model to both, each alone."""
        return _trace([_generated(model, ids, self._arguments(row, model)) for row, ids in enumerate(self.prompts)])

    def _arguments(self, row: int, model: PreTrainedModel) -> Inputs:
        types = self._types if row == 0 else torch.zeros(len(self.prompts[row]), dtype=torch.long)
        needed = _needed(model.generate, "pixel_values")  # then a picture without placeholders says nothing
        own = self._both if row == 0 else self.inputs[0] if needed else {}
        found = {key: v.to(model.dtype) if v.is_floating_point() else v for key, v in own.items()}
        return {**found, **dict.fromkeys(self._typed, types[None])}

    def rounding(self, model: PreTrainedModel, reference: Trace, kept: Array) -> float:
        """``max|error| / rms`` of transformers' own answer: the larger of what float64 and what its cache changes.

        A computation that the model cannot do counts nothing; the cache is that of the prompt of words alone.
        """
        double = copy.deepcopy(model).double()
        if private.has_experts(double):
            double.set_experts_implementation("eager")  # the one that computes in float64
        found = [0.0]
        with contextlib.suppress(Exception):
            found.append(compare(reference, _of_tokens(self.answer(double), kept)).error)
        with contextlib.suppress(Exception), torch.no_grad():
            words = torch.tensor([self.prompts[1] + reference.tokens[:-1, 1].tolist()])
            types = self._types_of_answer(model, words.shape[1])
            whole = model(input_ids=words, use_cache=False, **types).logits[0, -STEPS:].numpy()[:, kept]
            found += [numerics.error_over_rms(reference.logits[at, 1], whole[at]) for at in range(STEPS)]
        return max(found)

    def _types_of_answer(self, model: PreTrainedModel, length: int) -> Inputs:
        """Types of the prompt of words alone and of what follows it."""
        words = len(self.prompts[1])
        types = dict.fromkeys(self._typed, torch.zeros(1, words, dtype=torch.long))
        return private.with_new_tokens(model, types, length - words)

    def given(self, vision: Session, *, planes: bool) -> Pictured:
        """What a host gives beside the tokens of the first prompt, rows of the encoder's session among it."""
        made: list[dict[str, Array]] = []
        for example in self.inputs:
            feeds = {port.name: example[port.name].numpy().astype(port.dtype) for port in vision.interface.inputs}
            made.append(
                {name: np.squeeze(rows, axis=-3).astype(np.float32) for name, rows in vision.run(feeds).items()}
            )
        rows = {name: np.concatenate([one[name] for one in made], axis=-2) for name in made[0]}
        places = self._places() if planes else None
        return Pictured(rows, places, self._types.numpy() if self._typed else None)

    def _places(self) -> Array:
        whole = {name: value for name, value in self._both.items() if not value.is_floating_point()}
        ids, types = torch.tensor([self.prompts[0]]), {"mm_token_type_ids": self._types[None]}
        return private.places(self._model, ids, {**whole, **types})[-AXES:, 0].numpy()


def _generated(model: PreTrainedModel, ids: list[int], given: Inputs) -> tuple[Array, Array]:
    """New tokens ``[steps]`` and the logits that they were chosen from, ``[steps, vocab]``."""
    asked = torch.tensor([ids])
    generate: Any = model.generate
    with torch.no_grad():
        out = generate(
            input_ids=asked, attention_mask=torch.ones_like(asked), **given, max_new_tokens=STEPS, min_new_tokens=STEPS,
            do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return out.sequences[0, -STEPS:].numpy(), torch.cat(out.logits).float().numpy()


def _needed(function: Any, name: str) -> bool:
    found = inspect.signature(function).parameters.get(name)
    return found is not None and found.default is inspect.Parameter.empty


def _trace(rows: list[tuple[Array, Array]]) -> Trace:
    return Trace(np.stack([tokens for tokens, _ in rows], axis=1), np.stack([logits for _, logits in rows], axis=1))


def _of_tokens(trace: Trace, kept: Array) -> Trace:
    return Trace(trace.tokens, trace.logits[..., kept])


def _depth(vision: Module) -> int:
    return max(numerics.depth(vision, str(output.name)) for output in vision.graph.outputs)


def _joined(parts: list[torch.Tensor], axis: int) -> torch.Tensor:
    return torch.cat(parts, dim=axis) if parts[0].dim() else parts[0]


def _drawn(said: Any, seed: int) -> torch.Tensor:
    """A tensor as the data says it: a shape of floats, or whole numbers, or how many ones."""
    if isinstance(said, list):
        return torch.randn(said, generator=torch.Generator().manual_seed(seed))
    if "numbers" in said:
        return torch.tensor(said["numbers"])
    return torch.ones(said["ones"], dtype=torch.long) if "ones" in said else torch.ones(said["true"]).bool()


def _by_encoder(model: PreTrainedModel, modality: str) -> dict[str, Any]:
    """What an encoder takes that has no data of its own: a square picture, or patches of a grid."""
    takes, vision = inspect.signature(encoder_of(model, modality)).parameters, model.config.vision_config
    if "image_grid_thw" in takes:
        merged = getattr(vision, "spatial_merge_size", 2)
        width = 3 * vision.patch_size**2 * getattr(vision, "temporal_patch_size", 1)
        return {"pixel_values": [6 * merged**2, width], "image_grid_thw": {"numbers": [[1, 3 * merged, 2 * merged]]}}
    size = vision.image_size
    return {"pixel_values": [1, 3, *(size if isinstance(size, list | tuple) else (size, size))]}
