"""Residents: what stays on the device between two runs.

A run writes the states; the host writes rows of pictures, their pixels, and adapters.

A kind of state is one row of `KINDS`: its names, its order, where its context axis is and how a run writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from qeff_ir.errors import PipelineError

DimValue = str | int


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of retained state.

    Attributes:
        name: What the tensor holds, in a word.
        stem: Of the graph input, before the number of the layer (AI 100 contract §1.1 and §1.6).
        update: What a run does: it appends an entry for each token, slides a window of the last ones, or replaces all
            of the tensor. ``host``: it only reads it, and the host writes it before the first run of a request.
        context_axis: The axis of the tokens, where there is an entry for each; `None` for what the tokens so far
            amount to.
        shared: Whether there is one for all layers, whose name has no number.
    """

    name: str
    stem: str
    update: Literal["append", "slide", "replace", "host"]
    context_axis: int | None = None
    shared: bool = False


KINDS: dict[str, Kind] = {}
"""All kinds by name, in the order that their states have in a layer; a plug-in adds its own with `define`."""


def define(kind: Kind) -> Kind:
    """Make a kind known, behind those that are.

    Raises:
        PipelineError: Its name or its stem is taken.
    """
    if any(kind.name == known.name or kind.stem == known.stem for known in KINDS.values()):
        raise PipelineError(f"two kinds of state are named '{kind.name}' or '{kind.stem}'; rename one")
    KINDS[kind.name] = kind
    return kind


define(Kind("key", "past_key", "append", context_axis=2))
define(Kind("value", "past_value", "append", context_axis=2))
define(Kind("indexer", "past_indexer", "append", context_axis=2))
define(Kind("conv", "conv_state", "slide"))
define(Kind("recurrent", "recurrent_state", "replace"))
define(Kind("rows", "vision_embeds", "host", shared=True))
define(Kind("layer-rows", "deepstack_features", "host", shared=True))
define(Kind("pixels", "pixel_values", "host", shared=True))
define(Kind("self-key", "past_key_self", "append", context_axis=2))
define(Kind("self-value", "past_value_self", "append", context_axis=2))
define(Kind("cross-key", "past_key_cross", "host"))
define(Kind("cross-value", "past_value_cross", "host"))


@dataclass(frozen=True, slots=True)
class State:
    """One tensor that the device keeps between two runs.

    Attributes:
        layer: Index of the decoder layer; 0 for what all layers have together.
        kind: What the tensor holds, a row of `KINDS`: keys or values of tokens, an indexer's keys, the last inputs of a
            convolution, a recurrence's state, rows of an encoder, pixels for one, or keys and values that a decoder's
            cross-attention reads (``self-key`` and ``self-value`` are those of its own tokens, beside these).
        shape: Symbols and sizes, for example ``("batch_size", 8, "ctx_len", 64)`` for ``[batch, kv_heads, ctx,
            head_dim]``.
        dtype: Element type in the graph; a backend may store another one.
        window: Tokens that one query sees of this layer, itself included; `None` when it sees all of them.
        ring: Whether slots are reused modulo the length of the context axis (position ``p`` lives in slot ``p mod
            length``) instead of slot ``p`` holding position ``p``.
        index: Number among the states of its kind in the layer.
    """

    layer: int
    kind: str
    shape: tuple[DimValue, ...]
    dtype: ir.DataType
    window: int | None = None
    ring: bool = False
    index: int = 0

    SUFFIX: ClassVar[str] = "_RetainedState"
    """Ending of an output by which the device pairs it with the input of the same name."""

    @property
    def input(self) -> str:
        """Name of the graph input that takes the state (AI 100 naming)."""
        layer = "" if self.shared else f".{self.layer}"
        return KINDS[self.kind].stem + layer + (f".{self.index}" if self.index else "")

    @property
    def output(self) -> str:
        """Name of the graph output that returns it; the device pairs the two by this suffix."""
        return self.input + self.SUFFIX

    @property
    def order(self) -> tuple[int, int, int]:
        """By what the states of a module are sorted: layer, kind, index; what all layers have together comes first."""
        return (-1 if self.shared else self.layer), list(KINDS).index(self.kind), self.index

    @property
    def shared(self) -> bool:
        """Whether there is one for all layers."""
        return KINDS[self.kind].shared

    @property
    def written_by_host(self) -> bool:
        """Whether runs only read it; a session keeps it when the other states are forgotten."""
        return KINDS[self.kind].update == "host"

    @property
    def has_slots(self) -> bool:
        """Whether it holds one entry a token, on its context axis; others hold what the tokens so far amount to."""
        return KINDS[self.kind].context_axis is not None

    @property
    def rewindable(self) -> bool:
        """Whether a request may go back to an earlier position: every slot still holds what it held then."""
        return KINDS[self.kind].update == "append" and not self.ring

    @property
    def ctx_dim(self) -> DimValue:
        """Symbol or size of the context axis; of a state without one, see `has_slots` first."""
        axis = KINDS[self.kind].context_axis
        assert axis is not None
        return self.shape[axis]


@dataclass(frozen=True, slots=True)
class AdapterInput:
    """One graph input that holds a part of the low-rank adapters; a session keeps it until it is written anew.

    With slots, the first axis counts them; slot 0 is the base model and stays zero.

    Attributes:
        name: Of the graph input.
        layer: Path of the adapted layer, as PEFT names it: ``model.layers.0.self_attn.q_proj``.
        part: ``a`` and ``b`` are the factors, ``bias`` is added to what the layer returns.
        shape: Sizes. Without slots ``[rank, in]`` (a), ``[out, rank]`` (b), ``[out]`` (bias), as PEFT stores them; with
            slots ``[slots, in, rank]``, ``[slots, rank, out]``, ``[slots, out]``.
        slots: Whether the first axis counts slots.
        retained: Whether an output of the same name and `State.SUFFIX` hands it on to the next run.
    """

    name: str
    layer: str
    part: Literal["a", "b", "bias"]
    shape: tuple[int, ...]
    slots: bool
    retained: bool

    @property
    def output(self) -> str:
        """Name of the output that returns it, where it is `retained`."""
        return self.name + State.SUFFIX
