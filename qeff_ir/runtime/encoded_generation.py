"""Generation of an encoder-decoder as its own class in transformers does it, over compiled sessions.

The model is a skeleton without weights, of the very class that transformers has for it, whose forward pass and encoder
are sessions. So whatever ``generate`` of that class does (a start token, tokens for a language or a task, tokens that
are suppressed) is done, and only what touches numbers is compiled.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.runtime import private
from qeff_ir.runtime.encoded_decoder import EncodedDecoder
from qeff_ir.runtime.generation import check_ids, check_mask
from qeff_ir.runtime.request import read, refusals, wish

_OURS = frozenset({"decoder_input_ids", "decoder_attention_mask"})
"""Arguments of ``generate`` that are given to the decoder."""


def generate(
    model: Any, decoder: EncodedDecoder, inputs: torch.Tensor | Mapping[str, Any] | None, kwargs: dict[str, Any]
) -> Any:
    """Answer one batch, for a thread that has its turn (`Decoder.request`).

    Args:
        model: From `on_session`.
        decoder: The decoder that it was made for.
        inputs: What is encoded; also by its name, alone or with its mask in a dictionary.
        kwargs: Everything else that ``generate`` of the model's class takes.

    Raises:
        RuntimeInputError: The request does not fit the compiled model, or asks for what it does not have.
    """
    name, mask = decoder.feature_names
    given = dict(inputs) if isinstance(inputs, Mapping) else {} if inputs is None else {name: inputs}
    if twice := sorted(given.keys() & kwargs):
        raise RuntimeInputError(f"inputs and {twice[0]} are the same thing: give one of them")
    kwargs = {**given, **kwargs}
    if kwargs.get(name) is None:
        raise RuntimeInputError(f"there is nothing to encode: give {name}, as the processor returns it")
    kwargs |= _checked(model, name, mask, kwargs)
    _check_prompts(kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask"))
    own = inspect.signature(type(model).generate).parameters
    # What the model's own class takes, it knows; the rest are settings, which are checked as for any model.
    settings = {k: v for k, v in kwargs.items() if k not in {name, mask, *_OURS} and (k not in own or k in _SETTINGS)}
    read(model, settings)
    wished = wish(kwargs, "max_new_tokens") is not None or wish(kwargs, "max_length") is not None
    decoder.given, vars(model)["_wished_length"] = {}, wished
    with refusals(), torch.no_grad():
        return model.generate(**kwargs)


def _checked(model: Any, name: str, mask: str, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What is read, once it is known to be what the encoder takes."""
    value = given[name]
    if name != "input_ids":
        if not isinstance(value, torch.Tensor) or value.is_meta:
            raise RuntimeInputError(
                f'{name} is a {type(value).__name__}: give a tensor, as the processor returns it (return_tensors="pt")'
            )
        return {}
    ids = check_ids(value)
    if ids.numel() and not 0 <= int(ids.amin()) <= int(ids.amax()) < model._words:
        raise RuntimeInputError(
            f"input_ids has a token outside the vocabulary of {model._words}: use the model's tokenizer"
        )
    return {name: ids} if given.get(mask) is None else {name: ids, mask: check_mask(given[mask], ids)}


def _check_prompts(ids: Any, mask: Any) -> None:
    """Refuse padding behind a prompt of the decoder: transformers goes on behind the padding.

    Rows of unequal length answer as each of them alone, wherever transformers' class counts the padding before a row.
    """
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or not isinstance(ids, torch.Tensor) or mask.shape != ids.shape:
        raise RuntimeInputError("decoder_attention_mask and decoder_input_ids have two shapes: give one of each token")
    if (mask.long().diff(dim=1) < 0).any():
        raise RuntimeInputError(
            "decoder_attention_mask leaves out tokens behind others of their row: pad the decoder's prompts on the left"
        )


_SETTINGS = frozenset({"generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"}) | {
    "assistant_model", "streamer", "synced_gpus", "custom_generate", "return_token_timestamps",
}  # fmt: skip
"""Parameters of ``generate`` that `read` checks, also where the model's own class has them."""


def on_session(skeleton: PreTrainedModel, decoder: EncodedDecoder, defaults: GenerationConfig) -> PreTrainedModel:
    """Let a model without weights be run by sessions; it is changed for good.

    Args:
        skeleton: The model, on the meta device.
        decoder: The sessions' driver.
        defaults: Defaults of ``generate``.
    """
    kind = type(skeleton)
    signature = inspect.signature(kind.forward)

    def forward(self: Any, **kwargs: Any) -> Seq2SeqLMOutput:
        return _forward(decoder, **kwargs)

    forward.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]  # transformers looks at it
    encoder = _Encoder(decoder, inspect.signature(skeleton.get_encoder().forward))
    members: dict[str, Any] = {"forward": forward, "get_encoder": lambda _self: encoder, "_decoder": decoder}
    if decoder.feature_names[0] == "input_ids":
        members["_words"] = len(skeleton.get_encoder().get_input_embeddings().weight)  # pyright: ignore[reportArgumentType]
    skeleton.__class__ = type(kind.__name__, (_OnSession, kind), members)
    skeleton.generation_config = defaults
    return skeleton


class _OnSession:
    """What a session does otherwise than a model; comes before the model's own class."""

    _is_stateful = True  # keeps transformers from methods that rewind the cache
    _decoder: EncodedDecoder
    _words: int
    """Tokens that an encoder of texts knows."""

    @property
    def device(self) -> torch.device:
        """Where inputs are."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of logits."""
        return torch.float32

    @contextlib.contextmanager
    def _optimize_model_for_decode(self) -> Generator[None]:
        yield

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """The session keeps the cache."""

    def _prepare_generated_length(self, *args: Any, input_ids_length: int, **kwargs: Any) -> GenerationConfig:
        config = private.generated_length(self, *args, input_ids_length=input_ids_length, **kwargs)
        room = self._decoder.ctx_len + 1  # the last token is only read out
        if input_ids_length >= room:
            raise RuntimeInputError(
                f"the decoder is given a prompt of {input_ids_length} tokens, and the compiled context has {room - 1}: "
                f"compile with ctx_len={input_ids_length} or more"
            )
        length = int(config.max_length)
        if length > room and vars(self)["_wished_length"]:
            raise RuntimeInputError(
                f"{length} tokens do not fit the compiled context of {room - 1}: compile with ctx_len={length - 1} or "
                "more, or ask for fewer"
            )
        config.max_length = min(length, room)
        return config

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Pass on what `_forward` needs."""
        kept = ("attention_mask", "decoder_attention_mask")
        first = bool(kwargs.get("is_first_iteration", False))
        return {"decoder_input_ids": input_ids, "first": first, **{n: kwargs.get(n) for n in kept}}


class _Encoder(torch.nn.Module):
    """Stands where transformers asks for the encoder: notes what is to be encoded, once the decoder runs."""

    main_input_name = "input_ids"

    def __init__(self, decoder: EncodedDecoder, signature: inspect.Signature) -> None:
        super().__init__()

        def forward(**kwargs: Any) -> BaseModelOutput:
            decoder.given = _arrays(decoder, kwargs)
            rows = len(decoder.given.get(decoder.feature_names[0], ()))
            return BaseModelOutput(last_hidden_state=torch.zeros((rows, 1, 1)))  # pyright: ignore[reportArgumentType]

        forward.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]  # transformers looks at it
        self.forward = forward


def _arrays(decoder: EncodedDecoder, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is encoded, out of the arguments of a forward pass."""
    return {n: given[n].detach().cpu().numpy() for n in decoder.feature_names if given.get(n) is not None}


def _forward(
    decoder: EncodedDecoder,
    decoder_input_ids: torch.Tensor,
    first: bool = True,
    decoder_attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Seq2SeqLMOutput:
    """Logits of the last token, ``[batch, 1, vocab]``: prefill on the first call of a request, then decode.

    The loop of ``generate`` gives what is encoded to the encoder alone. So a call that has it is made beside the loop
    (a language is told, or whether anybody speaks), and gets the logits of all its tokens, ``[batch, seq, vocab]``.
    """
    arrays = _arrays(decoder, kwargs)
    if not first and decoder.feature_names[0] not in arrays:
        last = np.zeros(decoder.batch_size, dtype=np.int64)
        last[: len(decoder_input_ids)] = decoder_input_ids[:, -1]
        known = (last >= 0) & (last < decoder.vocabulary)  # rows that have ended are filled with any pad token
        logits = decoder.decode(np.where(known, last, 0))
        return _output(logits[: len(decoder_input_ids), None])
    keep = torch.ones_like(decoder_input_ids) if decoder_attention_mask is None else decoder_attention_mask
    keep = keep.bool().numpy()
    rows = [row[real].tolist() for row, real in zip(decoder_input_ids.numpy(), keep, strict=True)]
    # A class may give fewer rows than it was given: those of a batch that have ended, or that are not tried again.
    batch = [*rows, *[list[int]()] * (decoder.batch_size - len(rows))]
    if decoder.feature_names[0] not in arrays:
        decoder.given = {**arrays, **decoder.given}  # copies of rows are made of what was encoded
        return _output(decoder.prefill(batch)[: len(rows), None])
    found = decoder.beside(batch, arrays)[: len(rows)]
    logits = np.zeros((*keep.shape, found.shape[-1]), dtype=found.dtype)
    logits[keep] = found[np.arange(found.shape[1]) < keep.sum(axis=1, keepdims=True)]
    return _output(logits)


def _output(logits: Array) -> Seq2SeqLMOutput:
    return Seq2SeqLMOutput(logits=torch.from_numpy(np.ascontiguousarray(logits)))  # pyright: ignore[reportArgumentType]
