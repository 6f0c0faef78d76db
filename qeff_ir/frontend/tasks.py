"""What a model is for: which class of transformers opens it, and which shapes its package is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """What a model is for.

    Attributes:
        auto: Name of transformers' auto class.
        shapes: The options of `compile` that say its shapes; of a source with several programs, those of all.
        graph_name: What the AI 100 contract calls the specializations of a program without a cache (§4.2).
        retains: Whether a run leaves states for the next one.
        encodes: Whether it is for models of an encoder and a decoder.
    """

    auto: str
    shapes: tuple[str, ...] = ("seq_len", "batch_size")
    graph_name: str = "Embedding"
    retains: bool = False
    encodes: bool = False

    def auto_class(self) -> Any:
        """transformers' auto class."""
        import transformers

        return getattr(transformers, self.auto)


_RETAINING = ("prefill_seq_len", "ctx_len", "batch_size")
CAUSAL_LM = Task("AutoModelForCausalLM", (*_RETAINING, "full_batch_size", "kv_cache_batch_size"), retains=True)
IMAGE_TEXT_TO_TEXT = Task("AutoModelForImageTextToText", _RETAINING, graph_name="Vision", retains=True)
EMBEDDING = Task("AutoModel")
SEQUENCE_CLASSIFICATION = Task("AutoModelForSequenceClassification", graph_name="SeqClassification")
TOKEN_CLASSIFICATION = Task("AutoModelForTokenClassification", graph_name="TokenClassification")
CTC = Task("AutoModelForCTC", graph_name="CTC")
SEQ2SEQ = Task("AutoModelForSeq2SeqLM", _RETAINING, graph_name="Encoder", retains=True, encodes=True)
SPEECH_SEQ2SEQ = Task("AutoModelForSpeechSeq2Seq", _RETAINING, graph_name="Encoder", retains=True, encodes=True)
