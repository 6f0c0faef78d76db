"""What a user asks of `compile`: the shapes, which every target takes; a target adds options of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

DECODER = "decoder"
"""Key of a field's metadata: set for what only a model with a cache can be asked for."""


def _of_decoder(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, DECODER: True, **metadata})


@dataclass(frozen=True)
class CompileOptions:
    """The options of every target. A target's own are the fields of a subclass (`backends.base.Backend.Options`).

    Fields are read as the options of a pass are (`qeff_ir.passing.options`): ``help`` in the metadata is the line of
    the command line's help (shapes have theirs there), ``path`` marks the path of a file, ``least`` is the least number
    that is taken (1 by default). A field ``flags`` of a subclass takes whatever else a user gives, by name.

    Attributes:
        title: Heading of a target's own options in the command line's help.
        prefill_seq_len: Tokens of a prompt that one prefill run takes.
        ctx_len: Slots of the KV cache: prompt and generated tokens together.
        batch_size: Rows of a run.
        full_batch_size: Requests at once, for continuous batching: a prefill run is of one request, a decode run of
            all. 0 is a batch that begins and ends together.
        kv_cache_batch_size: Rows of the caches then, as many as requests or more; as many where it is 0.
        seq_len: Lengths of the inputs of a model without a cache, one specialization for each.
        materialize: Whether weights of 16 bits are written as float32, for what reads no others. They stay references
            into the checkpoint otherwise, and are widened when the package is loaded.
        mxint8_kv_cache: Whether caches are kept as MXINT8, a quarter of their float32 size.
        dtype: What is computed in, by transformers' names: activations, caches and weights have this type. ``auto`` is
            what the model's ``config.json`` says.
        ccl_enabled: Of a decoder, as all that follow: runs read as much of the caches as they need, in one of several
            lengths (`qeff_ir.read_lengths`), even where no lengths are given.
        comp_ctx_lengths_prefill: The lengths of prefill runs.
        comp_ctx_lengths_decode: The lengths of decode runs.
        num_speculative_tokens: Tokens of a draft that a decode run verifies; several for runs of several lengths, 0
            among them for runs without a draft.
        prefill_only: `True`: a package of prefill runs alone; `False`: of decode runs alone. Two packages that differ
            in this alone have the same caches.
        retain_full_kv: Whether layers with a sliding window keep all tokens too.
        kv_cache_prefix: Letters and digits that the names of caches get at their end.
    """

    title: ClassVar[str] = ""

    prefill_seq_len: int = 32
    ctx_len: int = 128
    batch_size: int = 1
    full_batch_size: int = field(default=0, metadata={"least": 0})
    kv_cache_batch_size: int = field(default=0, metadata={"least": 0})
    seq_len: tuple[int, ...] = ()
    materialize: bool = field(
        default=False, metadata={"help": "Write float32 copies of weights of 16 bits, instead of referring to them."}
    )
    mxint8_kv_cache: bool = field(
        default=False, metadata={"help": "Keep the KV cache in 8 bits: fast and not exact.", "fast": "always"}
    )
    dtype: Literal["float32", "float16", "bfloat16", "auto"] = field(
        default="float32", metadata={"help": "What is computed in; auto is what config.json says."}
    )
    ccl_enabled: bool = _of_decoder(False, "Read the caches in one of several lengths, chosen by the context.")
    comp_ctx_lengths_prefill: tuple[int, ...] = _of_decoder((), "A length in which prefill reads the caches.")
    comp_ctx_lengths_decode: tuple[int, ...] = _of_decoder((), "A length in which decode runs read the caches.")
    num_speculative_tokens: tuple[int, ...] = _of_decoder((), "Tokens of a draft that a decode run verifies.", least=0)
    prefill_only: bool | None = _of_decoder(
        None, "Prefill runs alone, or decode runs alone.", flag="--prefill-only/--decode-only"
    )
    retain_full_kv: bool = _of_decoder(False, "Keep all tokens of layers with a sliding window.")
    kv_cache_prefix: str = _of_decoder("", "Letters and digits in the names of the caches.")


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, with ``prefill_seq_len`` where it is not given or `None`: no more than the context has.

    A ``dtype`` of torch's becomes its name, and `None` float32. What is asked of a decoder alone may be `None`, one
    number in the place of several, or several as a text (``"[1024, 4096]"``), as the incumbent takes it.
    """
    given = {name: value for name, value in given.items() if value is not None or name not in _DECODERS}
    given |= {name: _several(given[name]) for name in _DECODERS if name in given and _DECODERS[name] == ()}
    if "dtype" in given:
        named = "float32" if given["dtype"] is None else str(given["dtype"]).removeprefix("torch.")
        given = {**given, "dtype": named}
    if given.get("prefill_seq_len") is not None:
        return dict(given)
    most, ctx_len = CompileOptions.prefill_seq_len, given.get("ctx_len")
    return {**given, "prefill_seq_len": min(most, ctx_len) if type(ctx_len) is int and ctx_len > 0 else most}


_DECODERS = {item.name: item.default for item in fields(CompileOptions) if DECODER in item.metadata}
_WORDS = re.compile(r"\s*[\[(]?\s*(\d{1,9}(?:\s*,\s*\d{1,9})*)\s*,?\s*[\])]?\s*")


def _several(value: Any) -> Any:
    """One number, or a text of numbers, as several; anything else as it is."""
    found = _WORDS.fullmatch(value) if isinstance(value, str) else None
    if found is not None:
        return tuple(int(word) for word in found[1].split(","))
    return (value,) if type(value) is int else value
