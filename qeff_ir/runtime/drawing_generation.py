"""Generation as transformers does it, over a session that draws the tokens itself."""

from __future__ import annotations

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedConfig

from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.ir.draw import Draw
from qeff_ir.runtime.drawing_decoder import DrawingDecoder
from qeff_ir.runtime.generation import SessionLM
from qeff_ir.runtime.request import GenerationRequest

_OF_SCORES = (
    *("min_length", "min_new_tokens", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size"),
    *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "bad_words_ids", "forced_bos_token_id"),
    *("forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    *("sequence_bias", "watermarking_config", "output_scores", "output_logits"),
)
"""Fields that transformers applies to scores, or returns scores for; the session has others that it applies itself."""
_OFF: dict[str, float] = {"typical_p": 1.0, "encoder_repetition_penalty": 1.0}
"""Values that ask for nothing, where it is not 0 or nothing at all."""


class DrawingLM(SessionLM):
    """As `SessionLM`; temperature, top-k, top-p, min-p and the repetition penalty of a request are the session's.

    What needs scores is refused by name. Padding of a batch is not penalized as a repetition, other than by
    transformers. Seeds are torch's, and draw other tokens than transformers does.
    """

    decoder: DrawingDecoder

    def __init__(self, decoder: DrawingDecoder, config: PreTrainedConfig, generation_config: GenerationConfig) -> None:
        super().__init__(decoder, config, generation_config)

    def _prepare(self, request: GenerationRequest, config: GenerationConfig) -> None:
        for name in (*_OF_SCORES, "logits_processor", "prefix_allowed_tokens_fn"):
            value = request.callbacks.get(name, getattr(config, name, None))
            if value is None or value == _OFF.get(name, 0) or (isinstance(value, list | tuple) and not value):
                continue
            theirs = "" if name in request.wished | set(request.callbacks) else f" (the model's own: pass {name}=None)"
            raise RuntimeInputError(
                f"{name} needs scores, and the package draws its tokens itself: leave it out, or compile without "
                f"sampling{theirs}"
            )
        self.decoder.draw = self._draw(config)
        self.decoder.random = np.random.default_rng(int(torch.randint(2**62, ())))
        config.temperature = config.top_p = config.repetition_penalty = 1.0
        config.top_k, config.min_p = 0, None

    def _draw(self, config: GenerationConfig) -> Draw:
        def of_rows(value: float | None, default: float, dtype: type[np.generic] = np.float32) -> Array:
            return np.full(self.decoder.batch_size, default if value is None else value, dtype=dtype)

        repetition = of_rows(config.repetition_penalty, 1.0)
        if not config.do_sample:
            return Draw(repetition=repetition)
        top, asked = self.decoder.top, config.top_k or self.decoder.vocabulary
        if min(asked, self.decoder.vocabulary) > top:
            raise RuntimeInputError(
                f"top_k={config.top_k} draws from more than the {top} tokens that the package is compiled for: give "
                f"top_k={top} or less, or compile with sampling{{top={asked}}}"
            )
        return Draw(
            temperature=of_rows(config.temperature, 1.0),
            top_k=of_rows(min(asked, top), top, np.int32),
            top_p=of_rows(config.top_p, 1.0),
            min_p=of_rows(config.min_p, 0.0),
            repetition=repetition,
        )

    def _scores(self, returned: Array) -> Array:
        """Scores of which any choice is the token that was drawn: of all others, they are ``-inf``."""
        scores = np.full((len(returned), self.decoder.vocabulary), -np.inf, dtype=np.float32)
        scores[np.arange(len(returned)), returned] = 0.0
        return scores
