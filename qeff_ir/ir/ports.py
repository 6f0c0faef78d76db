"""Ports: what goes into a run and what comes out, told by a role instead of a name.

The pass that makes an input or output declares its role, once (`qeff_ir.ir.module.Module.declare`). Checks, sessions
and runners ask for roles; names are the target's and the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.errors import PipelineError, RuntimeInputError
from qeff_ir.ir.draw import Draw

AXES = 3
"""Axes that a token may have a place on: time, height and width."""

FEATURE_LENGTH = "feature_len"
"""Length of what an encoder is given; in a graph that has the decoder too, 1 where nothing is (contract §1.7)."""
ENCODER_CONTEXT = "encoder_ctx_len"
"""Length of what an encoder makes."""
CACHE_ROWS = "full_batch_size"
"""Rows of the caches, where a run names those that it continues (contract §1.1); else they are those of a run."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a decoder, whatever inputs its graph has for it.

    Attributes:
        tokens: Token ids, int64 ``[batch, seq]``; any at padding.
        positions: Position of each token in the context of its row, int64 ``[batch, seq]``; -1 is padding.
        adapters: Slot of each row's adapter, int64 ``[batch]``; 0 and less is the base model. The base model for all
            rows by default.
        cache_rows: Row of the caches that each row of the run continues, all different, int64 ``[batch]``; -1 for a row
            of padding that continues none. Its own by default.
        embed: Looks up the vectors of tokens, float32 ``[batch, seq, hidden]``, where the host has to.
        keep: Tokens of each row, the last ones, whose logits are asked for.
        sizes: Of the specialization that the run is given to, by symbol; none where sizes are free.
        first_rows: Row of an encoder that each row's next placeholder stands for, int64 ``[batch, 1]``. 0 by default.
        planes: Place of each token on three axes, int64 ``[3, batch, seq]``. Its position on each by default.
        types: 1 (of some models another number) for tokens of a picture, int64 ``[batch, seq]``. 0 by default.
        features: What the encoder in a decoder's graph is given, ``[batch, ...]``; of length 1, nothing is encoded.
        seen: 1 for what the encoder of an encoder-decoder has seen and 0 for padding, int64 ``[batch, length]``.
        draw: How a graph that draws tokens is to draw them. The best token of each row by default.
    """

    tokens: Array
    positions: Array
    adapters: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    cache_rows: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    embed: Callable[[Array], Array] | None = None
    keep: int = 1
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    first_rows: Array | None = None
    planes: Array | None = None
    types: Array | None = None
    features: Array = field(default_factory=lambda: np.empty(0))
    seen: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        rows = len(self.tokens)
        if not len(self.adapters):
            object.__setattr__(self, "adapters", np.zeros(rows, dtype=np.int64))
        if not len(self.cache_rows):
            object.__setattr__(self, "cache_rows", np.arange(rows, dtype=np.int64))


Feed = Callable[[Run], Array | None]
"""What an input is given at a run; `None` where the run leaves it to `Role.default`."""


@dataclass(frozen=True, slots=True)
class Role:
    """A meaning that an input or an output has.

    Attributes:
        name: As modules have it.
        meaning: In words, with type and shape.
        feed: What an input of the role is given at a run; `None` for an output, or an input that only callers know.
        is_output: Whether it is the role of an output.
        needs: Of an input whose length alone counts, int64 ``[length]`` or ``[length, 1]``: the least length that is
            enough for a run. Its first axis is a symbol of its own, and the run gets zeros.
        default: What fills an input, ``[batch, ...]``, that a run says nothing of.
    """

    name: str
    meaning: str
    feed: Feed | None = None
    is_output: bool = False
    needs: Callable[[Run], int] | None = None
    default: float | None = None


ROLES: dict[str, Role] = {}
"""All roles by name, in the order that inputs have behind the states; a plug-in adds its own with `define`."""


def define(role: Role) -> Role:
    """Make a role known.

    Raises:
        PipelineError: The name is taken.
    """
    if role.name in ROLES:
        raise PipelineError(f"two roles have the name '{role.name}'; rename one")
    ROLES[role.name] = role
    return role


def _embedded(run: Run) -> Array:
    if run.embed is None:
        raise RuntimeInputError("the graph takes vectors in place of tokens: give the table of the token embeddings")
    return run.embed(run.tokens)


def _first_rows(run: Run) -> Array:
    return np.zeros((len(run.tokens), 1), dtype=np.int64) if run.first_rows is None else run.first_rows


def _planes(run: Run) -> Array:
    return np.repeat(np.maximum(run.positions, 0)[None], AXES, axis=0) if run.planes is None else run.planes


def _all_planes(run: Run) -> Array:
    return np.concatenate([run.positions[None], _planes(run)])


def _each(numbers: Array | None) -> Array | None:
    return None if numbers is None else numbers[:, None]


def _types(run: Run) -> Array:
    return np.zeros_like(run.positions) if run.types is None else run.types


TOKENS = define(Role("tokens", "token ids, int64 [batch, seq]", lambda run: run.tokens))
EMBEDDINGS = define(Role("embeddings", "vectors in place of tokens, float32 [batch, seq, hidden]", _embedded))
POSITIONS = define(Role("positions", "place in the context, -1 is padding, int64 [batch, seq]", lambda r: r.positions))
READ_LENGTH = define(
    Role(
        "read-length", "slots of the caches to read, int64 [slots]", needs=lambda r: int(r.positions.max(initial=0)) + 1
    )
)
CACHE_ROW = define(Role("cache-row", "each row's row of the caches, int64 [batch, 1]", lambda r: r.cache_rows[:, None]))
KEPT_LOGITS = define(Role("kept-logits", "last tokens to return logits of, int64 [tokens, 1]", needs=lambda r: r.keep))
ADAPTER_ROW = define(Role("adapter-row", "slot of each row's adapter, int64 [batch, 1]", lambda r: r.adapters[:, None]))
MASK = define(Role("mask", "1 for tokens and 0 for padding, int64 [batch, seq]"))
TOKEN_TYPES = define(Role("token-types", "segment of each token, int64 [batch, seq]"))
ROWS = define(Role("rows", "what an encoder made for placeholders, float32 [batch, rows, hidden]"))
PIXELS = define(Role("pixels", "what an encoder in a language model's graph is given, float32"))
ROWS_OUTPUT = define(Role("made-rows", "what an encoder makes for placeholders, float32", is_output=True))
FIRST_ROW = define(Role("first-row", "the row that the next placeholder stands for, int64 [batch, 1]", _first_rows))
NEXT_ROW = define(Role("next-row", "the same for the next run, int64 [batch, 1]", is_output=True))
PLANES = define(Role("planes", "place of each token on three axes, int64 [3, batch, seq]", _planes))
PICTURE_TOKENS = define(
    Role("picture-tokens", "other than 0 for tokens of a picture, which see one another, int64 [batch, seq]", _types)
)
PICTURES_TOKENS = define(
    Role("pictures-tokens", "the same where the tokens of all pictures see one another, int64 [batch, seq]", _types)
)
PREFIX_TOKENS = define(
    Role("prefix-tokens", "0 for the tokens of a prompt, which see one another, int64 [batch, seq]", _types)
)
ROUTED_TOKENS = define(
    Role("routed-tokens", "other than 0 for tokens that go to experts of their own, int64 [batch, seq]", _types)
)
TOKEN_KINDS = (PICTURE_TOKENS, PICTURES_TOKENS, PREFIX_TOKENS, ROUTED_TOKENS)
"""Roles of an input that tells what a token is of. Those that see one another must be of one run."""
ALL_PLANES = define(
    Role("all-planes", "positions, -1 is padding, then places on three axes, int64 [4, batch, seq]", _all_planes)
)
FEATURES = define(
    Role("features", "what an encoder is given: features of a recording, or tokens of a text", lambda run: run.features)
)
FEATURES_MASK = define(
    Role("features-mask", "1 for what an encoder sees and 0 for padding, int64 [batch, length]", lambda r: r.seen)
)
CROSSING = define(
    Role("crossing", "keys or values of an encoder's output, float32 [batch, heads, length, width]", is_output=True)
)
ACCEPTED = define(Role("accepted", "tokens that are new to the penalties, int64 [batch, seq]", lambda run: run.tokens))
REPETITION = define(
    Role("repetition", "see Draw.repetition, [batch, 1]", lambda run: _each(run.draw.repetition), default=1)
)
PRESENCE = define(Role("presence", "see Draw.presence, [batch, 1]", lambda run: _each(run.draw.presence), default=0))
TEMPERATURE = define(
    Role("temperature", "see Draw.temperature, [batch, 1]", lambda run: _each(run.draw.temperature), default=0)
)
TOP_K = define(Role("top-k", "see Draw.top_k, [batch, 1]", lambda run: _each(run.draw.top_k), default=0))
TOP_P = define(Role("top-p", "see Draw.top_p, [batch, 1]", lambda run: _each(run.draw.top_p), default=1))
MIN_P = define(Role("min-p", "see Draw.min_p, [batch, 1]", lambda run: _each(run.draw.min_p), default=0))
NUMBERS = define(Role("numbers", "see Draw.numbers", lambda run: run.draw.numbers, default=0.5))
ALLOWED = define(Role("allowed", "see Draw.allowed, [batch, vocab]", lambda run: run.draw.allowed, default=1))
DRAW = (REPETITION, PRESENCE, TEMPERATURE, TOP_K, TOP_P, MIN_P, NUMBERS, ALLOWED)
"""Roles of what tells a graph how to draw tokens."""
NEXT_TOKENS = define(Role("next-tokens", "tokens that were drawn, int64 [batch, tokens, 1]", is_output=True))
PROBABILITIES = define(
    Role("probabilities", "of what tokens were drawn from, float32 [batch, tokens, vocab]", is_output=True)
)
LOGITS = define(
    Role("logits", "scores of the vocabulary, or features, float32 [batch, tokens, vocab or features]", is_output=True)
)
EMBEDDED = "embedding_output"
"""What the AI 100 calls the output of `LOGITS` where it has features of an embedding (contract §1.9)."""

_TRANSFORMERS: dict[str, Role] = {
    "input_ids": TOKENS,
    "inputs_embeds": EMBEDDINGS,
    "position_ids": POSITIONS,
    "attention_mask": MASK,
    "token_type_ids": TOKEN_TYPES,
    "comp_ctx_lengths": READ_LENGTH,
    "batch_index": CACHE_ROW,
    "num_logits_to_keep": KEPT_LOGITS,
    "lora_ids": ADAPTER_ROW,
    "vision_embeds": ROWS,
    "deepstack_features": ROWS,
    "image_idx": FIRST_ROW,
    "image_idx_output": NEXT_ROW,
    "mm_token_type_ids": PICTURE_TOKENS,
    "last_accepted_output_tokens": ACCEPTED,
    "repetition_penalties": REPETITION,
    "presence_penalties": PRESENCE,
    "temperatures": TEMPERATURE,
    "top_ks": TOP_K,
    "top_ps": TOP_P,
    "min_ps": MIN_P,
    "random_numbers": NUMBERS,
    "token_bitmasks": ALLOWED,
    "next_tokens": NEXT_TOKENS,
    "probs": PROBABILITIES,
    "logits": LOGITS,
}
"""Roles by the names that transformers and the AI 100 contract (§1.1 and §1.3) have for them."""


def known(graph: ir.Graph) -> dict[str, str]:
    """Roles of a graph's inputs and outputs by transformers' names, for a model without declared roles."""
    sides = [(str(v.name), False) for v in graph.inputs] + [(str(v.name), True) for v in graph.outputs]
    found = ((name, _TRANSFORMERS.get(name), is_output) for name, is_output in sides)
    return {name: role.name for name, role, is_output in found if role is not None and role.is_output == is_output}


def name_of(role: Role) -> str:
    """What transformers and the AI 100 call an input or output of a role, for a pass that makes one.

    Raises:
        PipelineError: They have no name for it.
    """
    found = next((name for name, other in _TRANSFORMERS.items() if other is role), None)
    if found is None:
        raise PipelineError(f"transformers and the AI 100 contract have no name for the role '{role.name}': choose one")
    return found


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of a compiled graph that a caller sees; retained states are not ports.

    Attributes:
        name: Its name.
        role: Its role; `None` where only its name tells what it is.
        dtype: Its type.
        shape: Symbols and sizes; `None` for a size that the model computes.
        weight: Of an input whose rows the host looks up: the parameter that has them.
        rows: Of an input that selects rows of a table in the graph: how many there are.
    """

    name: str
    role: Role | None
    dtype: np.dtype[Any]
    shape: tuple[str | int | None, ...]
    weight: str | None = None
    rows: int | None = None

    @property
    def is_fed(self) -> bool:
        """Whether a run tells what the input is given."""
        return self.role is not None and (self.role.feed is not None or self.role.needs is not None)

    def feed(self, run: Run) -> Array:
        """What the input is given at a run.

        Raises:
            RuntimeInputError: Its role does not say.
        """
        if self.role is not None and self.role.needs is not None:
            length, *others = self.shape
            wanted = run.sizes.get(str(length), self.role.needs(run))
            return np.zeros((wanted, *(int(size or 1) for size in others)), dtype=self.dtype)
        if self.role is None or self.role.feed is None:
            raise RuntimeInputError(f"no role says what to feed to the input {self.name}")
        given = self.role.feed(run)
        if given is not None:
            return given
        if self.role.default is None:
            raise RuntimeInputError(f"the run says nothing of the input {self.name}: give it")
        sizes = [d if isinstance(d, int) else run.sizes.get(str(d), run.keep) for d in self.shape[1:]]
        return np.full((len(run.tokens), *sizes), self.role.default, dtype=self.dtype)
