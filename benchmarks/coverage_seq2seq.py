"""Encoder-decoders, of texts and of speech: two rows of unequal lengths are encoded, and answered greedily."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel

from backends import backend_names
from benchmarks.coverage_models import read_data
from benchmarks.coverage_row import Job, Row
from benchmarks.coverage_task import Coverage
from qeff_ir import numerics
from qeff_ir.auto.seq2seq import QEFFAutoModelForSeq2SeqLM, QEFFAutoModelForSpeechSeq2Seq
from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.encoded_source import EncodedSource
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.testing.trace import Trace, compare

STEPS = 6
LENGTH = 24
"""Tokens that the encoder of a text is compiled for."""
TEXT = 16
"""Tokens of the longer text."""
_CONTEXT = 32
_SEEN = 100.0
"""How many times the limit the answer changes at least where something else is encoded."""
_NO_ENCODER = "is no encoder-decoder: what it hears takes the place of tokens of a decoder"

Inputs = dict[str, torch.Tensor]


class Seq2Seq(Coverage):
    """See `Coverage`.

    Args:
        kind: ``text`` or ``speech``, a table of `coverage_seq2seq.toml`.
        auto: transformers' class that opens the models.
        types: Their model types.
    """

    def __init__(self, kind: str, auto: Any, types: Iterable[str]) -> None:
        self._kind, self._auto, self._types = kind, auto, sorted(types)
        self._data = read_data("coverage_seq2seq.toml")

    def architectures(self) -> list[str]:
        """See `Coverage.architectures`."""
        return list(self._types)

    def absent(self) -> Mapping[str, str]:
        """See `Coverage.absent`."""
        without = (name for name in self._types if name not in self._data[self._kind])
        return {**dict.fromkeys(without, _NO_ENCODER), **self._data["absent"].get(self._kind, {})}

    def check(self, job: Job, row: Row, folder: Path) -> None:
        """See `Coverage.check`."""
        said = self._data[self._kind].get(job.name)
        if said is None:
            raise UnsupportedModelError(_NO_ENCODER)
        said = dict(said)
        heard = said.pop("_heard", None)
        model = self._tiny(job.name, said)
        row.model = type(model).__name__
        extractor = None if heard is None else _Extractor(model.get_encoder().main_input_name, **heard)
        opened = _opened(model, extractor)
        source = EncodedSource(Memory(model, extractor), opened.task).for_length(LENGTH if extractor is None else None)
        decoder, encoder = source.lower(), source.lower_encoder()
        row.nodes, row.states = len(decoder.graph) + len(encoder.graph), len(decoder.states)
        depths = (numerics.depth(encoder, str(output.name)) for output in encoder.graph.outputs)
        row.bound = numerics.bound(numerics.depth(decoder) + max(depths))
        given, other = (_given(model, extractor, seed) for seed in (1, 2))
        reference = _answered(model, given)
        row.allow(compare(reference, _answered(copy.deepcopy(model).double(), given)).error)
        for target in backend_names():
            opened.compile(
                batch_size=2, target=target, ctx_len=_CONTEXT, encoder_ctx_len=LENGTH if extractor is None else None,
                emit_only=True, compile_dir=folder / target,
            )  # fmt: skip
            row.hold(target, compare(_answered(opened, given), reference))
            lost = numerics.error_over_rms(_answered(opened, other).logits[0], reference.logits[0])
            if lost < _SEEN * row.limit:
                row.fail(f"what is encoded changes the answer of {target} by {lost:.1e} alone")
        row.conclude()

    def _tiny(self, name: str, said: Mapping[str, Any]) -> PreTrainedModel:
        """The small model of one architecture, with weights that show a fault."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **self._fields(said))
        model = self._auto.from_config(config, dtype=torch.float32).eval()
        drawn = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=drawn) * 0.2)
        model.generation_config.forced_eos_token_id = None
        return model

    def _fields(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a configuration, with those that it starts from."""
        own = {k: self._fields(v) if isinstance(v, dict) else v for k, v in said.items() if k != "like"}
        return {**self._data["like"].get(said.get("like"), {}), **own}


@dataclass(frozen=True)
class _Extractor:
    """Stands for a feature extractor: features of silence, in their longest form."""

    name: str
    features: tuple[int, ...]
    length: int
    masked: bool = True
    sampling_rate: int = 100
    chunk_length: int = 1

    def __call__(self, recording: Any, **kwargs: Any) -> Inputs:
        return self.made(torch.zeros(1, *self.features))

    def made(self, features: torch.Tensor) -> Inputs:
        """Features with their mask, where there is one."""
        mask = torch.ones((len(features), self.features[self.length]), dtype=torch.long)
        return {self.name: features, **({"attention_mask": mask} if self.masked else {})}

    def save_pretrained(self, folder: Path) -> None:
        """Nothing is saved of it."""


def _opened(model: PreTrainedModel, extractor: _Extractor | None) -> QEFFAutoModelForSeq2SeqLM:
    if extractor is None:
        return QEFFAutoModelForSeq2SeqLM(model)
    return QEFFAutoModelForSpeechSeq2Seq(model, extractor)


def _given(model: PreTrainedModel, extractor: _Extractor | None, seed: int) -> Inputs:
    """What two rows read or hear, the second one less."""
    drawn = torch.Generator().manual_seed(seed)
    if extractor is None:
        config = model.config.get_text_config(decoder=True)
        ids = torch.randint(5, 90, (2, TEXT), generator=drawn)
        mask = torch.ones_like(ids)
        mask[1, TEXT // 2 :] = 0
        ids[1, TEXT // 2 :] = config.pad_token_id or 0
        return {"input_ids": ids, "attention_mask": mask}
    made = extractor.made(torch.randn((2, *extractor.features), generator=drawn))
    if extractor.masked:
        made["attention_mask"][1, extractor.features[extractor.length] * 3 // 4 :] = 0
    return made


def _answered(model: Any, given: Inputs) -> Trace:
    """The greedy answer; of a model in double precision, in that."""
    dtype = getattr(model, "dtype", torch.float32)
    asked = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    with torch.no_grad():
        out = model.generate(
            **asked, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, num_beams=1, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    logits = np.stack([one.double().numpy() for one in out.logits[-STEPS:]])
    return Trace(out.sequences[:, -STEPS:].numpy().T, logits)
