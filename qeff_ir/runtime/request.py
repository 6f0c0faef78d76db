"""What a caller asks of ``generate``: one merged configuration, and an answer to every field and argument.

Each field of a `GenerationConfig` and each argument of transformers' ``generate`` is in one of three lists: it is
honored, it changes no answer here, or it is refused by name. A field that a newer transformers brings is in none of
them, and is refused when it is set.
"""

from __future__ import annotations

import contextlib
import difflib
import operator
import sys
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from qeff_ir.errors import QeffError, RuntimeInputError
from qeff_ir.runtime import private


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


HONORED = _names(
    "max_length max_new_tokens min_length min_new_tokens max_time stop_strings do_sample temperature top_k top_p min_p "
    "top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids renormalize_logits forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias "
    "watermarking_config num_return_sequences output_scores output_logits return_dict_in_generate pad_token_id "
    "bos_token_id eos_token_id"
)
"""Fields that transformers' own loop applies."""

HARMLESS = _names(
    # how transformers keeps and compiles what the session keeps and was compiled for
    "use_cache cache_config max_cache_len compile_config disable_compile low_memory prefill_chunk_size "
    "continuous_batching_config "
    # of beams, of assistants and of encoders, which are refused themselves
    "early_stopping length_penalty diversity_penalty num_beam_groups num_assistant_tokens "
    "num_assistant_tokens_schedule assistant_confidence_threshold max_matching_ngram_size assistant_lookbehind "
    "target_lookbehind assistant_ensemble_weight speculation_type decoder_start_token_id transformers_version"
)
"""Fields that change no answer of a compiled decoder."""

_REWINDS = "needs a cache that can be rewound: use sampling or greedy search"
_DRAFTS = "guesses tokens and takes some back, which needs a cache that can be rewound: leave it out"
_SECOND = "needs a second cache: leave it out"
_LOGITS = "is not there, a compiled model gives logits only: leave it out"

_CACHES = (
    *("dynamic", "offloaded", "static", "offloaded_static", "sliding_window"),
    *("hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),  # the names of old
)
"""Caches of transformers that hold the same numbers; a quantized one does not."""

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), f"> 1 {_REWINDS}"),
    "penalty_alpha": ((0.0,), _REWINDS),
    "dola_layers": ((), "needs the hidden states of the layers, and a compiled model gives logits only: leave it out"),
    "constraints": ((), _REWINDS),
    "force_words_ids": ((), _REWINDS),
    "guidance_scale": ((1, 1.0), _SECOND),
    "output_attentions": ((False,), _LOGITS),
    "output_hidden_states": ((False,), _LOGITS),
    "token_healing": ((False,), "runs the model on prompts that it shortens: shorten them before generate"),
    "use_mtp": ((False,), _DRAFTS),
    "prompt_lookup_num_tokens": ((), _DRAFTS),
    "assistant_early_exit": ((), _DRAFTS),
    "is_assistant": ((False,), _DRAFTS),
    "cache_implementation": (
        _CACHES,
        "asks for another cache than the compiled one, with other numbers in it: leave it out",
    ),
}
"""Fields that ask for what a compiled model does not have, with the values, besides `None`, that ask for nothing."""

CALLBACKS = _names("logits_processor stopping_criteria prefix_allowed_tokens_fn streamer tokenizer generation_config")
"""Arguments of ``generate``, besides the inputs, that are honored."""

HARMLESS_ARGUMENTS = frozenset({"trust_remote_code", "logits_to_keep"})
"""Arguments that change no answer: code that may come with ``custom_generate``, and logits that nobody would see."""

REFUSED_ARGUMENTS = {
    "synced_gpus": "is for models that are spread over processes: leave it out",
    "assistant_model": _DRAFTS,
    "assistant_tokenizer": _DRAFTS,
    "custom_generate": "replaces the loop that drives the compiled model: leave it out",
    "negative_prompt_ids": _SECOND,
    "negative_prompt_attention_mask": _SECOND,
    "past_key_values": "is not taken, the session keeps the cache: give the whole prompt",
    "cache": "is not taken, the session keeps the cache: give the whole prompt",
    "inputs_embeds": "is not taken: give input_ids",
    "position_ids": "is not taken, tokens are counted from the first that is no padding: leave it out",
    "return_token_timestamps": "needs the decoder's attention, a compiled model gives logits only: leave it out",
    "token_type_ids": "is not taken by the compiled model: leave it out (the tokenizer's return_token_type_ids=False)",
}
"""Arguments that ask for what a compiled model does not have."""

_NUMBERS = {
    "max_new_tokens": 1,
    "max_length": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "num_return_sequences": 1,
    "num_beams": 1,
}
"""Fields that are whole numbers, and the least each may be."""

_LIBRARIES = sys.stdlib_module_names | {"transformers", "torch", "numpy", "tokenizers"}
_OURS = ("qeff_ir.runtime.request", "qeff_ir.runtime.generation", "qeff_ir.runtime.encoded_generation")
_LOOP = (*_OURS, "qeff_ir.runtime.private")


@dataclass(frozen=True)
class GenerationRequest:
    """A request, merged and checked.

    Attributes:
        config: All settings, a copy that belongs to the request.
        callbacks: What goes to transformers' loop beside them: processors, criteria, a streamer, a tokenizer.
        wished: Fields that the caller has set; the others are defaults of the model or of transformers.
        own_length: Whether the model or the caller has a length, transformers' default apart.
        pad: Token that fills rows up.
        stops: Tokens that end a row.
    """

    config: GenerationConfig
    callbacks: dict[str, Any]
    wished: frozenset[str]
    own_length: bool
    pad: int | None
    stops: list[int]


def read(model: GenerationMixin, arguments: dict[str, Any], *, ids_only: bool = False) -> GenerationRequest:
    """Merge the arguments of a call with the defaults of the model, by transformers' own rules.

    Args:
        model: Has the defaults as ``generation_config``.
        arguments: Everything that was given to ``generate``, its inputs apart.
        ids_only: Whether token ids are wanted, not a dictionary, whatever the settings say.

    Raises:
        RuntimeInputError: An argument is unknown or of the wrong type, or asks for what a compiled model does not have.
    """
    given: Any = arguments.get("generation_config")
    if not isinstance(given, GenerationConfig | None):
        raise RuntimeInputError(
            f"generation_config is a {type(given).__name__}: give a GenerationConfig, or its fields as arguments"
        )
    callbacks = {name: arguments[name] for name in CALLBACKS - {"generation_config"} if name in arguments}
    _check_callbacks(callbacks)
    rest = {name: value for name, value in arguments.items() if name not in CALLBACKS | HARMLESS_ARGUMENTS}
    for name, why in REFUSED_ARGUMENTS.items():
        if (value := rest.pop(name, None)) is not None and value is not False:
            raise RuntimeInputError(f"{name} {why}")
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    wished = frozenset(name for name in fields if wish(arguments, name) is not None)
    for name, least in _NUMBERS.items():
        _check_number(name, wish(arguments, name), least)
    for name in sorted(wished):
        if not name.endswith("_token_id"):  # several of these may be a tensor
            _check_plain(name, wish(arguments, name))
    with refusals():
        config, unknown = private.merge(model, given, rest)
        for name, least in _NUMBERS.items():  # the model's own
            _check_number(name, getattr(config, name), least)
        config.return_dict_in_generate = config.return_dict_in_generate and not ids_only
        _check_unknown({k: v for k, v in unknown.items() if k not in fields}, fields)
        _check_fields(config, fields, wished)
        if (mode := config.get_generation_mode().value) not in ("greedy_search", "sample"):
            raise RuntimeInputError(f"{mode.replace('_', ' ')} {_REWINDS}")
        pad, stops = private.set_special_tokens(model, config)
    _leave_to_the_session(config)
    own_length = "max_length" in wished or model.generation_config.max_length is not None
    return GenerationRequest(config, callbacks, wished, own_length, pad, stops)


def wish(arguments: dict[str, Any], name: str) -> Any:
    """What the caller wants a field to be, by name or in an object; `None` where nothing is said."""
    value = arguments.get(name)
    return getattr(arguments.get("generation_config"), name, None) if value is None else value


@contextlib.contextmanager
def refusals() -> Generator[None]:
    """Turn what transformers objects to a request into one sentence; what a caller's own function raises stays.

    Raises:
        RuntimeInputError: transformers does not take the request.
    """
    try:
        yield
    except QeffError:
        raise
    except Exception as error:  # transformers raises whatever its many options raise
        names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        if names[-1] in _OURS or not all(n in _LOOP or n.partition(".")[0] in _LIBRARIES for n in names):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        reason = reason.replace(type(error).__name__ + ":", "").replace("SessionLM", "a compiled model")
        raise RuntimeInputError(f"transformers refuses the request: {reason}") from error


def _check_plain(name: str, value: object) -> None:
    """An array of several numbers is neither true nor false, and no setting takes one.

    Raises:
        RuntimeInputError: It is one.
    """
    try:
        bool(value)
    except Exception as error:  # torch and NumPy each have their own
        raise RuntimeInputError(f"{name} is a {type(value).__name__}: give a plain value") from error


def _check_callbacks(callbacks: dict[str, Any]) -> None:
    for name in ("logits_processor", "stopping_criteria"):
        value = callbacks.get(name)
        if value is not None and not (isinstance(value, list | tuple) and all(map(callable, value))):
            raise RuntimeInputError(f"{name} is a {type(value).__name__}: give a list of functions")
    for name, methods in (("streamer", ("put", "end")), ("tokenizer", ("__call__", "decode"))):
        value = callbacks.get(name)
        if value is not None and not all(callable(getattr(value, method, None)) for method in methods):
            raise RuntimeInputError(f"{name} is a {type(value).__name__}: give a {name} as transformers has them")
    allowed = callbacks.get("prefix_allowed_tokens_fn")
    if allowed is not None and not callable(allowed):
        raise RuntimeInputError(f"prefix_allowed_tokens_fn is a {type(allowed).__name__}: give a function")


def _check_number(name: str, value: object, least: int) -> None:
    try:
        fits = value is None or (not isinstance(value, bool) and operator.index(value) >= least)  # pyright: ignore[reportArgumentType]
    except TypeError:
        fits = False
    if not fits:
        raise RuntimeInputError(f"{name} is {value!r}: give a whole number of at least {least}")


def _check_unknown(unknown: dict[str, Any], fields: set[str]) -> None:
    for name, value in unknown.items():
        if value is None or value is False:
            continue
        known = [*fields, *CALLBACKS, "input_ids", "attention_mask"]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        raise RuntimeInputError(f"generate of a compiled model does not take {name}: {hint}")


def _check_fields(config: GenerationConfig, fields: set[str], wished: frozenset[str]) -> None:
    returns = bool(config.return_dict_in_generate)
    for name in sorted(fields - HONORED - HARMLESS):
        value = getattr(config, name)
        nothing, why = REFUSED.get(name, ((False,), "is not known to this qeff-ir: leave it out"))
        if value is None or any(type(value) is type(item) and value == item for item in nothing):
            continue
        if name == "penalty_alpha" and config.do_sample:  # as in transformers, it asks for nothing then
            continue
        if name.startswith("output_") and name not in wished and not returns:
            continue  # a default of the model for a result that the caller does not see
        theirs = "" if name in wished else f" (the model's own default: pass {name}={nothing[0] if nothing else None})"
        raise RuntimeInputError(f"{name} {why}{theirs}")


def _leave_to_the_session(config: GenerationConfig) -> None:
    """Keep transformers from making a cache, or chunks of the prompt: the session has both."""
    config.use_cache = True
    for name in ("cache_implementation", "cache_config", "max_cache_len", "compile_config", "prefill_chunk_size"):
        setattr(config, name, None)
