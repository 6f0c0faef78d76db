"""Encoder-decoders that read a text."""

from __future__ import annotations

from transformers import AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from benchmarks.coverage_seq2seq import Seq2Seq

COVERAGE = Seq2Seq("text", AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
