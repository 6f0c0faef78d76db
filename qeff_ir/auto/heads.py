"""Models without a cache that end in a head: classes of a text, of its tokens, or of the moments of a recording."""

from __future__ import annotations

from typing import Any, ClassVar

from qeff_ir.auto.forward import ForwardModel
from qeff_ir.frontend.forward_source import CTC, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, Task


class QEFFAutoModelForSequenceClassification(ForwardModel):
    """Any model that transformers' `AutoModelForSequenceClassification` loads; `generate` returns ``logits``.

    A cross-encoder of pairs needs ``inputs=["input_ids", "attention_mask", "token_type_ids"]`` where its tokenizer
    tells the two texts apart.
    """

    task: ClassVar[Task] = SEQUENCE_CLASSIFICATION


class QEFFAutoModelForTokenClassification(ForwardModel):
    """Any model that transformers' `AutoModelForTokenClassification` loads; `generate` returns ``logits``."""

    task: ClassVar[Task] = TOKEN_CLASSIFICATION


class QEFFAutoModelForCTC(ForwardModel):
    """Any model that transformers' `AutoModelForCTC` loads: speech to text without a decoder.

    The length is in samples: a recording is padded with silence to the smallest ``seq_len`` that fits.
    """

    task: ClassVar[Task] = CTC
    default_length: ClassVar[int] = 480_000
    """30 seconds at 16 kHz (AI 100 contract §4.6)."""

    def transcribe(self, processor: Any, inputs: Any = None, **kwargs: Any) -> list[str]:
        """The text of each recording.

        Args:
            processor: The model's, which turns token ids into texts.
            inputs: What it made of the recordings.
            kwargs: The same, input by input.

        Raises:
            RuntimeInputError: An input does not fit the compiled model.
        """
        logits = self.generate(inputs, **kwargs)["logits"]
        return list(processor.batch_decode(logits.argmax(axis=-1)))
