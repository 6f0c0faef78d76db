"""Generation as transformers does it, over a compiled session.

The loop, the logits processors, the stopping criteria and the streamers are transformers' own (`GenerationMixin`); this
class only stands in for the model, and turns padded batches into rows.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedConfig, StoppingCriteriaList
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.frontend.versions import CACHE
from qeff_ir.runtime import private
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.request import GenerationRequest, read, refusals, wish


@dataclass(frozen=True)
class Answer:
    """What transformers' loop made of one batch.

    Attributes:
        result: What ``generate`` returns: token ids, or a dictionary with them.
        lengths: New tokens of each row, its stop token included and what fills it up not.
    """

    result: Any
    lengths: list[int]

    @property
    def sequences(self) -> torch.Tensor:
        """Prompts and new tokens, int64 ``[rows, tokens]``."""
        return self.result if isinstance(self.result, torch.Tensor) else self.result["sequences"]


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
        self.vocabulary: int = config.get_text_config(decoder=True).vocab_size
        self._ends: _Ends | None = None
        self._lora_ids: Array | None = None
        self.running = False
        """Whether a request runs."""

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

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        self._ends = _Ends(private.stopping_criteria(self, *args, **kwargs))
        return self._ends

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """`transformers.generate`, with batches padded on either side; the threads that call it wait for each other.

        Raises:
            RuntimeInputError: The prompt and the new tokens do not fit the compiled context, the batch is of another
                size, an input is malformed, the request asks for what a compiled model does not have, or it comes from
                within a request to the same session.
        """
        with self.decoder.request():
            return self.generate_now(inputs, **kwargs)

    def generate_now(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As `generate`, for a thread that has its turn (`Decoder.request`)."""
        ids, mask = kwargs.pop("input_ids", None), kwargs.pop("attention_mask", None)
        if ids is not None and inputs is not None:
            raise RuntimeInputError("inputs and input_ids are the same thing: give one of them")
        ids = check_ids(inputs if ids is None else ids)
        self._check_rows(len(ids), wish(kwargs, "num_return_sequences"))
        return self.answer(read(self, kwargs), ids, mask).result

    def inferred_mask(self, ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The mask of token ids that come without one, by the pad token of the arguments of `generate`.

        Raises:
            RuntimeInputError: The request asks for what a compiled model does not have.
        """
        given = {name: value for name, value in kwargs.items() if name not in ("input_ids", "attention_mask")}
        return private.infer_mask(self, ids, copy.deepcopy(read(self, given).config))

    def answer(
        self, request: GenerationRequest, ids: torch.Tensor, mask: torch.Tensor | None, *, to_the_end: bool = False
    ) -> Answer:
        """Answer one batch, for a thread that has its turn (`Decoder.request`).

        Args:
            request: The settings.
            ids: Token ids ``[batch, tokens]``.
            mask: 1 for text and 0 for padding, of the same shape; by default the pad token tells.
            to_the_end: Without a length, go on until the context is full.

        Raises:
            RuntimeInputError: See `generate`.
        """
        config = copy.deepcopy(request.config)
        self._prepare(request, config)
        copies: int = config.num_return_sequences or 1
        self._check_rows(len(ids), copies)
        if mask is None:
            mask = private.infer_mask(self, ids, config)
        mask = check_mask(mask, ids)
        if int(ids.amax()) >= self.vocabulary or int(ids[mask.bool()].amin()) < 0:
            raise RuntimeInputError(
                f"input_ids has a token outside the vocabulary of {self.vocabulary}: use the model's tokenizer"
            )
        left, left_mask = _pad_left(ids, mask)
        config.max_new_tokens = self.new_tokens(request, left_mask, to_the_end)
        config.max_length = None
        if config.min_new_tokens is not None:
            config.min_length = None  # as in transformers, which would say so
        # The request is merged: what runs it has no defaults of its own, or transformers would merge them again.
        model = type(self)(self.decoder, self.config, GenerationConfig())
        model._lora_ids = self.decoder.lora_ids.copy()  # its adapters too are those that it begins with
        self.running = True
        try:
            with refusals(), torch.no_grad():
                out: Any = GenerationMixin.generate(  # pyright: ignore[reportAttributeAccessIssue]
                    model, input_ids=left, attention_mask=left_mask, generation_config=config, **request.callbacks
                )
        finally:
            self.running = False
        assert model._ends is not None
        lengths = [end - ids.shape[1] for end in model._ends.lengths]
        if isinstance(out, torch.Tensor):
            return Answer(_restore(out, ids, copies), lengths)
        out["sequences"] = _restore(out["sequences"], ids, copies)
        out[CACHE] = KeptBySession()
        return Answer(out, lengths)

    def _prepare(self, request: GenerationRequest, config: GenerationConfig) -> None:
        """Take from the settings what the session does by itself.

        Raises:
            RuntimeInputError: It does not do what the request asks for.
        """
        self.decoder.check_scores()

    def _scores(self, returned: Array) -> Array:
        """What transformers' loop takes for logits, float32 ``[batch, vocab]``, of what the decoder has returned."""
        return returned

    def _check_rows(self, prompts: int, copies: int | None) -> None:
        rows = prompts * (copies if type(copies) is int else 1)
        if rows != self.decoder.batch_size:
            raise RuntimeInputError(
                f"the model is compiled for a batch of {self.decoder.batch_size}, but got {rows} rows: "
                f"compile with batch_size={rows}"
            )

    def new_tokens(self, request: GenerationRequest, mask: torch.Tensor, to_the_end: bool) -> int:
        """How many new tokens at most: what the caller wants must fit, what the model has as default is cut to fit.

        Args:
            request: The settings.
            mask: Of the prompts, ``[rows, tokens]``.
            to_the_end: See `answer`.

        Raises:
            RuntimeInputError: They do not fit the context.
        """
        config, context = request.config, self.decoder.ctx_len
        longest, width = int(mask.sum(1).max()), mask.shape[1]
        room = context - longest + 1  # the last token is only read out
        wished = "max_new_tokens" in request.wished
        asked: int | None = config.max_new_tokens
        if asked is None and request.own_length and config.max_length is not None:
            wished, asked = "max_length" in request.wished, int(config.max_length - width)
            if asked < 1 and longest <= context:
                raise RuntimeInputError(
                    f"max_length={config.max_length} leaves no new token after a prompt of {width}: give max_new_tokens"
                )
        least = int(config.min_new_tokens or (config.min_length or 0) - width)
        if {"min_new_tokens", "min_length"} & request.wished and least > room:
            wished, asked = True, least
        if longest > context or (wished and asked is not None and asked > room):
            new = (asked if wished else None) or 1
            raise RuntimeInputError(
                f"a prompt of {longest} tokens and {new} new ones do not fit the compiled context of "
                f"{context}: compile with ctx_len={longest + new} or more, or ask for fewer"
            )
        if asked is None and to_the_end:
            asked = context - width
        elif asked is None:  # what transformers takes when nothing is said
            positions: int = getattr(self.config, "max_position_embeddings", None) or context + 20
            asked = min(20, positions - width)
        return max(min(asked, room), 1)

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
        """Logits of the last token, ``[batch, 1, vocab]``: prefill on the first call of a request, then decode.

        Raises:
            RuntimeInputError: The thread does not have its turn: another request might be in the session by now.
        """
        if not self.decoder.turns.mine:
            raise RuntimeInputError(
                "a step of generation outside of generate(): write `with decoder.request():` around the steps"
            )
        if first:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            rows = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
            logits = self.decoder.prefill(rows, self._lora_ids)
        else:
            last = input_ids[:, -1]
            known = (last >= 0) & (last < self.vocabulary)  # rows that have ended are filled with any pad token
            logits = self.decoder.decode(torch.where(known, last, 0).numpy(), self._lora_ids)
        return CausalLMOutputWithPast(logits=torch.from_numpy(np.ascontiguousarray(self._scores(logits)))[:, None])


class KeptBySession:
    """Stands where transformers returns the cache, which stays in the session: whatever is done with it is refused."""

    def __getattr__(self, name: str) -> Any:
        """Refuse.

        Raises:
            RuntimeInputError: Always, names of Python's own protocols apart.
        """
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeInputError(_KEPT)

    def __len__(self) -> int:
        """Refuse, as `__getattr__` does."""
        raise RuntimeInputError(_KEPT)

    def __getitem__(self, index: Any) -> Any:
        """Refuse, as `__getattr__` does."""
        raise RuntimeInputError(_KEPT)

    def __bool__(self) -> bool:
        """There is a cache."""
        return True

    def __repr__(self) -> str:
        return "<kept by the session>"


_KEPT = f"{CACHE} is not returned, the session keeps the cache: give generate the whole prompt"


class _Ends(StoppingCriteriaList):
    """transformers' criteria, and after how many tokens each row has met one of them."""

    lengths: list[int]

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        if not hasattr(self, "lengths"):
            self.lengths = [0] * len(done)
        self.lengths = [old or now * input_ids.shape[1] for old, now in zip(self.lengths, done.tolist(), strict=True)]
        return done


def check_ids(ids: object) -> torch.Tensor:
    """Token ids as int64.

    Raises:
        RuntimeInputError: They are something else than whole numbers ``[batch, tokens]``.
    """
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] == 0 or ids.is_meta:
        kind = "" if ids is None or isinstance(ids, torch.Tensor) else f", not a {type(ids).__name__}"
        raise RuntimeInputError(f"generate needs input_ids of shape [batch, tokens] with at least one token{kind}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise RuntimeInputError(f"input_ids is {str(ids.dtype).removeprefix('torch.')}: give whole numbers (int64)")
    return ids.long()


def check_mask(mask: object, ids: torch.Tensor) -> torch.Tensor:
    """The mask of token ids as int64.

    Raises:
        RuntimeInputError: It is of another shape, has other numbers than 0 and 1, or leaves nothing of a row.
    """
    if not isinstance(mask, torch.Tensor) or mask.is_meta:
        raise RuntimeInputError(f"attention_mask is a {type(mask).__name__}: give a tensor of the shape of input_ids")
    if mask.shape != ids.shape:
        raise RuntimeInputError(
            f"attention_mask is {list(mask.shape)} and input_ids {list(ids.shape)}: they need one shape"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise RuntimeInputError("attention_mask has other numbers than 0 and 1: give 1 for text and 0 for padding")
    if not mask.any(1).all():
        raise RuntimeInputError("a row of attention_mask is all padding: every prompt needs at least one token")
    return mask.long()


def _pad_left(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the padding of each row to its left, which is how transformers generates."""
    order = torch.argsort(mask, dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def _restore(sequences: torch.Tensor, ids: torch.Tensor, copies: int) -> torch.Tensor:
    """Put the prompts back as they were given, before the new tokens."""
    prompts = ids.repeat_interleave(copies, dim=0)
    return torch.cat([prompts, sequences[:, ids.shape[1] :]], dim=1)
