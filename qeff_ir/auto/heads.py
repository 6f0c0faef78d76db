"""Models without a cache that end in a head: classes of a text, of its tokens, or of the moments of a recording."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from qeff_ir.auto.forward import ForwardModel
from qeff_ir.frontend.tasks import CTC, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, Task


class QEFFAutoModelForSequenceClassification(ForwardModel):
    """Any model that transformers' `AutoModelForSequenceClassification` loads; `generate` returns ``logits``.

    A cross-encoder of pairs needs ``inputs=["input_ids", "attention_mask", "token_type_ids"]`` where its tokenizer
    tells the two texts apart. What sentence-transformers' `CrossEncoder.predict` makes of the logits is left to the
    caller: a sigmoid where there is one class, or the function that its folder names (``activation_fn``).
    """

    task: ClassVar[Task] = SEQUENCE_CLASSIFICATION


class QEFFAutoModelForTokenClassification(ForwardModel):
    """Any model that transformers' `AutoModelForTokenClassification` loads; `generate` returns ``logits``."""

    task: ClassVar[Task] = TOKEN_CLASSIFICATION


class QEFFAutoModelForCTC(ForwardModel):
    """Any model that transformers' `AutoModelForCTC` loads: speech to text without a decoder.

    The length is in samples. On a target of fixed lengths, a recording is filled up to the smallest ``seq_len`` that
    fits where that changes none of its letters: an attention mask is compiled in for it, ones by default. A model that
    normalizes over the whole recording takes the compiled lengths only.
    """

    task: ClassVar[Task] = CTC
    default_length: ClassVar[int] = 480_000
    """30 seconds at 16 kHz (AI 100 contract §4.6)."""

    def transcribe(self, processor: Any, inputs: Any = None, **kwargs: Any) -> list[str]:
        """The text of each recording, of its own samples: those that an ``attention_mask`` leaves out are not read.

        Args:
            processor: The model's, which turns token ids into texts.
            inputs: What it made of the recordings.
            kwargs: The same, input by input.

        Raises:
            RuntimeInputError: An input does not fit the compiled model.
        """
        logits = self.generate(inputs, **kwargs)["logits"]
        given: dict[str, Any] = {**(inputs or {}), **kwargs}
        rows = logits.argmax(axis=-1).tolist()
        if given.get("attention_mask") is not None:
            lengths = np.asarray(given["attention_mask"]).sum(axis=1).tolist()
            counts = [self.encoder().frames("logits", int(length)) for length in lengths]
            rows = [row[:count] for row, count in zip(rows, counts, strict=True)]
        return list(processor.batch_decode(rows))
