"""Residents: what stays on the device between two runs.

A run writes the states, an encoder the keys and values of a cross-attention; the host writes adapters, rows of pictures
and pixels. A kind of resident is one row of `KINDS`: its names, its order, where its context axis is and who writes it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from qeff_ir.errors import PipelineError

DimValue = str | int

Update = Literal["append", "slide", "replace", "once", "host"]
"""Who writes a resident, and how: a run appends an entry for each token, slides a window of the last ones, or replaces
all of the tensor. ``once``: an encoder makes it before the first run of a request. ``host``: the host writes it. A
decoder's runs only read the last two."""
Part = Literal["a", "b", "bias"]
"""Of a low-rank adapter: the factors, or what is added to what the layer returns."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of resident.

    Attributes:
        name: What the tensor holds, in a word.
        input: Name of the graph input, with the ``{layer}`` or ``{path}`` of a resident in its place (AI 100 contract
            §1.1, §1.3, §1.6 and §6.1); without either, there is one for all layers.
        update: Who writes it.
        context_axis: The axis of the tokens, where there is an entry for each; `None` for what the tokens so far
            amount to.
        part: Of an adapter.
        slots: Whether its first axis counts adapters; that of number 0 is the base model, and stays zero.
        last: Of one for all layers: whether it stands behind those of layers, and its input among those of a run.
    """

    name: str
    input: str
    update: Update
    context_axis: int | None = None
    part: Part | None = None
    slots: bool = False
    last: bool = False

    @property
    def shared(self) -> bool:
        """Whether there is one for all layers."""
        return "{" not in self.input


KINDS: dict[str, Kind] = {}
"""All kinds by name, in the order that they have in a layer; a plug-in adds its own with `define`."""


def define(kind: Kind) -> Kind:
    """Make a kind known, behind those that are.

    Raises:
        PipelineError: Its name or that of its input is taken.
    """
    if any(kind.name == known.name or kind.input == known.input for known in KINDS.values()):
        raise PipelineError(f"two kinds of resident are named '{kind.name}' or '{kind.input}'; rename one")
    KINDS[kind.name] = kind
    return kind


define(Kind("key", "past_key.{layer}", "append", context_axis=2))
define(Kind("value", "past_value.{layer}", "append", context_axis=2))
define(Kind("indexer", "past_indexer.{layer}", "append", context_axis=2))
define(Kind("conv", "conv_state.{layer}", "slide"))
define(Kind("recurrent", "recurrent_state.{layer}", "replace"))
define(Kind("rows", "vision_embeds", "host"))
define(Kind("layer-rows", "deepstack_features", "host"))
define(Kind("pixels", "pixel_values", "host"))
define(Kind("self-key", "past_key_self.{layer}", "append", context_axis=2))
define(Kind("self-value", "past_value_self.{layer}", "append", context_axis=2))
define(Kind("cross-key", "past_key_cross.{layer}", "once"))
define(Kind("cross-value", "past_value_cross.{layer}", "once"))
define(Kind("repetition-buffer", "past_repetition_penalty_buffer", "replace", last=True))
define(Kind("presence-buffer", "past_presence_penalty_buffer", "replace", last=True))
define(Kind("lora-a", "{path}.lora_a_weights", "host", part="a", slots=True))
define(Kind("lora-b", "{path}.lora_b_weights", "host", part="b", slots=True))
define(Kind("lora-bias", "{path}.lora_biases", "host", part="bias", slots=True))
define(Kind("single-lora-a", "base_model.model.{path}.lora_A.weight", "host", part="a"))
define(Kind("single-lora-b", "base_model.model.{path}.lora_B.weight", "host", part="b"))
define(Kind("single-lora-bias", "base_model.model.{path}.lora_bias", "host", part="bias"))
define(Kind("single-lora-embedding-a", "base_model.model.{path}.lora_embedding_A", "host", part="a"))
define(Kind("single-lora-embedding-b", "base_model.model.{path}.lora_embedding_B", "host", part="b"))


@dataclass(frozen=True, slots=True)
class Resident:
    """One tensor that the device keeps between two runs.

    Attributes:
        layer: Index of the decoder layer; 0 for what all layers have together, and for adapters.
        kind: What the tensor holds, a row of `KINDS`: keys or values of tokens, an indexer's keys, the last inputs of a
            convolution, a recurrence's state, rows of an encoder, pixels for one, keys and values that a decoder's
            cross-attention reads (``self-key`` and ``self-value`` are those of its own tokens, beside these), the
            tokens that penalties of a draw are for, or a part of the low-rank adapters.
        shape: Symbols and sizes, for example ``("batch_size", 8, "ctx_len", 64)`` for ``[batch, kv_heads, ctx,
            head_dim]``. Of adapters, as PEFT stores them, ``[rank, in]`` (a), ``[out, rank]`` (b), ``[out]`` (bias);
            with slots ``[slots, in, rank]``, ``[slots, rank, out]``, ``[slots, out]``.
        dtype: Element type in the graph; a backend may store another one.
        window: Tokens that one query sees of this layer, itself included; `None` when it sees all of them.
        ring: Whether slots are reused modulo the length of the context axis (position ``p`` lives in slot ``p mod
            length``) instead of slot ``p`` holding position ``p``.
        index: Number among the residents of its kind in the layer.
        path: Of an adapter: the layer, as PEFT names it: ``model.layers.0.self_attn.q_proj``.
        retained: Whether an output hands it on to the next run. Adapters may have none where a session keeps what was
            written.
        prefix: Letters and digits at the end of its name, by which a host selects caches (AI 100 contract §1.2).
    """

    layer: int
    kind: str
    shape: tuple[DimValue, ...]
    dtype: ir.DataType
    window: int | None = None
    ring: bool = False
    index: int = 0
    path: str | None = None
    retained: bool = True
    prefix: str | None = None

    SUFFIX: ClassVar[str] = "_RetainedState"
    """Ending of an output by which the device pairs it with the input of the same name."""

    @property
    def input(self) -> str:
        """Name of the graph input that takes it (AI 100 naming)."""
        name = KINDS[self.kind].input.format(layer=self.layer, path=self.path)
        name = f"{name}.{self.index}" if self.index else name
        return name if self.prefix is None else f"{name}_{self.prefix}"

    @property
    def output(self) -> str:
        """Name of the graph output that returns it; the device pairs the two by this suffix."""
        return self.input + self.SUFFIX

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its ends: the input, and the output if it has one."""
        return (self.input, self.output) if self.retained else (self.input,)

    @property
    def order(self) -> tuple[int, int, int]:
        """By what the residents of a module are sorted: layer, kind, index.

        What all layers have together comes first, but for kinds that are `last`. Adapters come behind all, in the order
        in which they were made.
        """
        if self.part is not None:
            return sys.maxsize, 0, 0
        layer = sys.maxsize - 1 if self.last else -1 if self.shared else self.layer
        return layer, list(KINDS).index(self.kind), self.index

    @property
    def shared(self) -> bool:
        """Whether there is one for all layers."""
        return KINDS[self.kind].shared

    @property
    def last(self) -> bool:
        """Whether it stands behind those of layers, see `Kind.last`."""
        return KINDS[self.kind].last

    @property
    def update(self) -> Update:
        """Who writes it, and how."""
        return KINDS[self.kind].update

    @property
    def written_by_host(self) -> bool:
        """Whether a decoder's runs only read it; a session keeps it when the other states are forgotten."""
        return self.update in ("once", "host")

    @property
    def part(self) -> Part | None:
        """Of an adapter; `None` for all other residents, which are states."""
        return KINDS[self.kind].part

    @property
    def slots(self) -> int:
        """Adapters that it has room for, each in a slot of the first axis, beside the base model's; 0 without slots."""
        return int(self.shape[0]) - 1 if KINDS[self.kind].slots else 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of an adapter: the shape of one, without the axis of the slots."""
        return tuple(int(size) for size in self.shape[1 if self.slots else 0 :])

    @property
    def has_slots(self) -> bool:
        """Whether it holds one entry a token, on its context axis; others hold what the tokens so far amount to."""
        return KINDS[self.kind].context_axis is not None

    @property
    def rewindable(self) -> bool:
        """Whether a request may go back to an earlier position: every slot still holds what it held then."""
        return self.update == "append" and not self.ring

    @property
    def ctx_dim(self) -> DimValue:
        """Symbol or size of the context axis; of a state without one, see `has_slots` first."""
        axis = KINDS[self.kind].context_axis
        assert axis is not None
        return self.shape[axis]
