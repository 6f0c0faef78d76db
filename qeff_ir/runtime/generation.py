"""Generation as transformers does it, over a compiled session.

The loop, the logits processors, the stopping criteria and the streamers are transformers' own (`GenerationMixin`); this
class only stands in for the model, and turns padded batches into rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from qeff_ir.errors import RuntimeInputError
from qeff_ir.runtime.decoder import Decoder


class SessionLM(GenerationMixin):
    """A causal LM for `GenerationMixin` whose forward pass is a session.

    Args:
        decoder: The session's driver.
        config: Configuration of the Hugging Face model.
        generation_config: Defaults of `generate`.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    _is_stateful = True  # keeps transformers from methods that rewind the cache (beams, assisted decoding)

    def __init__(self, decoder: Decoder, config: PreTrainedConfig, generation_config: GenerationConfig) -> None:
        self.decoder = decoder
        self.config = config
        self.generation_config = generation_config
        self.device = torch.device("cpu")
        self.dtype = torch.float32

    @classmethod
    def can_generate(cls) -> bool:
        """Always."""
        return True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the session keeps the cache

    @contextlib.contextmanager
    def _optimize_model_for_decode(self) -> Generator[None]:
        yield  # nothing to switch: the session is compiled

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """`transformers.generate`, with batches padded on either side.

        Raises:
            RuntimeInputError: The prompt and the new tokens do not fit the compiled context, the batch is of another
                size, an input is malformed, or the request needs another cache (beams, guidance).
        """
        ids = kwargs.pop("input_ids", None)
        ids = inputs if ids is None else ids
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] == 0:
            raise RuntimeInputError("generate needs input_ids of shape [batch, tokens] with at least one token")
        mask = kwargs.pop("attention_mask", None)
        config: GenerationConfig = kwargs.get("generation_config") or self.generation_config
        copies = kwargs.get("num_return_sequences") or config.num_return_sequences or 1
        if (kwargs.get("num_beams") or config.num_beams or 1) > 1:
            raise RuntimeInputError("num_beams > 1 needs a cache that can be rewound: use sampling or greedy search")
        if (kwargs.get("guidance_scale") or config.guidance_scale or 1) != 1:
            raise RuntimeInputError("guidance_scale needs a second cache: leave it out")
        if ids.shape[0] * copies != self.decoder.batch_size:
            raise RuntimeInputError(
                f"the model is compiled for a batch of {self.decoder.batch_size}, but got "
                f"{ids.shape[0] * copies} rows: compile with batch_size={ids.shape[0] * copies}"
            )
        if mask is None:
            pad = kwargs.get("pad_token_id", config.pad_token_id)
            eos = kwargs.get("eos_token_id", config.eos_token_id)
            stops = eos if isinstance(eos, list) else [eos]
            mask = torch.ones_like(ids) if pad is None or pad in stops else (ids != pad).long()
        if mask.shape != ids.shape:
            raise RuntimeInputError(
                f"attention_mask is {list(mask.shape)} and input_ids {list(ids.shape)}: they need one shape"
            )
        if not mask.any(1).all():
            raise RuntimeInputError("a row of attention_mask is all padding: every prompt needs at least one token")
        vocab = self.config.get_text_config(decoder=True).vocab_size
        if int(ids.amax()) >= vocab or int(ids[mask.bool()].amin()) < 0:
            raise RuntimeInputError(
                f"input_ids has a token outside the vocabulary of {vocab}: use the model's tokenizer"
            )
        left, left_mask = _pad_left(ids, mask)
        kwargs.update(self._lengths(left_mask, config, kwargs))
        with torch.no_grad():
            out: Any = GenerationMixin.generate(  # pyright: ignore[reportAttributeAccessIssue]
                self, input_ids=left, attention_mask=left_mask, **kwargs
            )
        if isinstance(out, torch.Tensor):
            return _restore(out, ids, copies)
        out["sequences"] = _restore(out["sequences"], ids, copies)
        return out

    def _lengths(self, mask: torch.Tensor, config: GenerationConfig, kwargs: dict[str, Any]) -> dict[str, int]:
        """Check that the request fits; without a length of the user's own, stop where the context ends."""
        longest, width = int(mask.sum(1).max()), mask.shape[1]
        room = self.decoder.ctx_len - longest
        asked = kwargs.get("max_new_tokens") or config.max_new_tokens
        if asked is None and (total := kwargs.get("max_length") or config.max_length) is not None:
            asked = total - width
        if longest > self.decoder.ctx_len or (asked is not None and asked > room + 1):
            raise RuntimeInputError(
                f"a prompt of {longest} tokens and {asked or 1} new ones do not fit the compiled context of "
                f"{self.decoder.ctx_len}: compile with ctx_len={longest + (asked or 1)} or more, or ask for fewer"
            )
        default = 20  # what transformers takes when nothing is said
        return {} if asked is not None or room >= default else {"max_new_tokens": max(room, 1)}

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: torch.Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        """Pass on what `forward` needs."""
        return {
            "input_ids": input_ids,
            "attention_mask": kwargs.get("attention_mask"),
            "first": kwargs.get("is_first_iteration", False),
        }

    def __call__(self, **kwargs: Any) -> CausalLMOutputWithPast:
        """See `forward`."""
        return self.forward(**kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        first: bool = False,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits of the last token, ``[batch, 1, vocab]``: prefill on the first call of a request, then decode."""
        if first:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            rows = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
            logits = self.decoder.prefill(rows)
        else:
            logits = self.decoder.decode(input_ids[:, -1].numpy())
        return CausalLMOutputWithPast(logits=torch.from_numpy(np.ascontiguousarray(logits))[:, None])


def _pad_left(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the padding of each row to its left, which is how transformers generates."""
    order = torch.argsort(mask.long(), dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def _restore(sequences: torch.Tensor, ids: torch.Tensor, copies: int) -> torch.Tensor:
    """Put the prompts back as they were given, before the new tokens."""
    prompts = ids.repeat_interleave(copies, dim=0)
    return torch.cat([prompts, sequences[:, ids.shape[1] :]], dim=1)
