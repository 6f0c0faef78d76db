"""Encoder-decoders that hear a recording, and what else transformers opens by the same class."""

from __future__ import annotations

from transformers import AutoModelForSpeechSeq2Seq
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

from benchmarks.coverage_seq2seq import Seq2Seq

COVERAGE = Seq2Seq("speech", AutoModelForSpeechSeq2Seq, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)
