"""What a user asks of `compile`: the shapes, which every target takes; a target adds options of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


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
        seq_len: Lengths of the inputs of a model without a cache, one specialization for each.
        materialize: Whether weights of 16 bits are written as float32, for what reads no others. They stay references
            into the checkpoint otherwise, and are widened when the package is loaded.
        dtype: What is computed in, by transformers' names: activations, caches and weights have this type. ``auto`` is
            what the model's ``config.json`` says.
    """

    title: ClassVar[str] = ""

    prefill_seq_len: int = 32
    ctx_len: int = 128
    batch_size: int = 1
    seq_len: tuple[int, ...] = ()
    materialize: bool = field(
        default=False, metadata={"help": "Write float32 copies of weights of 16 bits, instead of referring to them."}
    )
    dtype: Literal["float32", "float16", "bfloat16", "auto"] = field(
        default="float32", metadata={"help": "What is computed in; auto is what config.json says."}
    )


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, with ``prefill_seq_len`` where it is not given or `None`: no more than the context has.

    A ``dtype`` of torch's becomes its name, and `None` float32.
    """
    if "dtype" in given:
        named = "float32" if given["dtype"] is None else str(given["dtype"]).removeprefix("torch.")
        given = {**given, "dtype": named}
    if given.get("prefill_seq_len") is not None:
        return dict(given)
    most, ctx_len = CompileOptions.prefill_seq_len, given.get("ctx_len")
    return {**given, "prefill_seq_len": min(most, ctx_len) if type(ctx_len) is int and ctx_len > 0 else most}
