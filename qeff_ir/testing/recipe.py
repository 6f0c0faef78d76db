"""A small decoder as data: what it is made of, its weights, and what it answers, in double precision, by NumPy alone.

A `Recipe` is drawn by `qeff_ir.testing.strategies`, becomes a module in `qeff_ir.testing.build`, and answers here. The
answer is one pass over all tokens without a cache: nothing of states, chunks, masks over slots or positions in a cache
is shared with what is tested.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from qeff_ir.arrays import Array

Rotary = Literal["none", "half", "partial", "interleaved"]
Activation = Literal["swish", "gelu", "gelu-tanh", "relu"]
Linear = Literal["none", "decay", "delta"]
Odd = Literal[
    "none",
    "norm-power",
    "gelu-constant",
    "unequal-halves",
    "other-sign",
    "gemm-beta",
    "strided-mask",
    "other-gate",
    "same-half",
    "two-sines",
    "subtracted",
    "no-cosine",
    "scaled-keys",
]
"""One near miss of what a pass matches: a norm over another power, a GELU with another divisor, cosines whose halves
differ, a rotation the other way round, a Gemm that scales its bias, a mask that skips keys, a gate of its own; of a
rotation, one half in the place of both, the sine in two parts, the rotated part subtracted, no cosine; keys that are
scaled as they come out of their cache."""

KEY_SCALE = 0.75
"""Of the keys that a cache gives, where they are scaled."""

WEIGHT_SCALE = 1.0
"""Standard deviation of a weight, over the square root of the number of features that it sums."""

BLOCK_SCALE = 0.25
"""The same of what is added to the stream: small beside the embedding, whose exact numbers are what makes the sum
well-conditioned. At 0.5, one decoder of four layers in fifty loses more than `tolerance.bound` before any pass."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        window: Tokens that a query sees, itself included; `None` for all.
        shares: Layer whose keys and values it reads instead of making its own.
        sinks: Whether each head has one more logit that takes weight and gives nothing.
        experts: Number of experts, two of which each token goes to; 0 for one dense block.
        decomposed: Whether attention is written out instead of being one op.
        linear: A recurrence in the place of attention: its state fades and takes in keys times values (``decay``), or
            what of a value the state does not know yet (``delta``).
        kernel: Tokens that a convolution before the recurrence sees.
    """

    window: int | None = None
    shares: int | None = None
    sinks: bool = False
    experts: int = 0
    decomposed: bool = False
    linear: Linear = "none"
    kernel: int = 2


@dataclass(frozen=True)
class Recipe:
    """A decoder.

    Attributes:
        layers: The layers.
        kv_heads: Key/value heads.
        group: Query heads for each of them.
        head_dim: Width of queries and keys, even.
        value_dim: Width of values.
        vocab: Number of tokens.
        rotary: How positions turn queries and keys; ``partial`` turns the first half of each head.
        learned_positions: Whether a table of positions is added to the embedding.
        alibi: Whether decomposed attention adds a slope for each head times the position of the key.
        norm: Root-mean-square or layer normalization.
        activation: Between the products of a block.
        gated: Whether a second product gates the first.
        bias: Whether products add one.
        gemm: Whether products are written as `Gemm` on flattened rows.
        tied: Whether the head is the embedding.
        parallel: Whether attention and block read the same normalized stream.
        qk_norm: Whether queries and keys are normalized.
        scale: Of the scores; the usual ``1 / sqrt(head_dim)`` for `None`.
        softcap: Of the scores; 0 for none.
        final_softcap: Of the logits; 0 for none.
        odd: A near miss of what passes match, in the first place where it fits.
        spelling: Number that chooses among equivalent spellings; 0 is the plain one everywhere.
        seed: Of the weights.
    """

    layers: tuple[Layer, ...] = (Layer(),)
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 4
    value_dim: int = 4
    vocab: int = 11
    rotary: Rotary = "none"
    learned_positions: bool = False
    alibi: bool = False
    norm: Literal["rms", "layer"] = "rms"
    activation: Activation = "swish"
    gated: bool = False
    bias: bool = False
    gemm: bool = False
    tied: bool = False
    parallel: bool = False
    qk_norm: bool = False
    scale: float | None = None
    softcap: float = 0.0
    final_softcap: float = 0.0
    odd: Odd = "none"
    spelling: int = 0
    seed: int = 0

    HIDDEN: ClassVar[int] = 8
    INNER: ClassVar[int] = 12
    POSITIONS: ClassVar[int] = 64
    EPSILON: ClassVar[float] = 1e-5

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def rotated(self) -> int:
        """Features of a head that positions turn."""
        return {"none": 0, "partial": self.head_dim // 2}.get(self.rotary, self.head_dim)

    @property
    def score_scale(self) -> float:
        """Factor of the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def owners(self) -> list[int]:
        """Layers that have a cache of their own."""
        return [i for i, layer in enumerate(self.layers) if layer.shares is None and layer.linear == "none"]

    def window(self, index: int) -> int | None:
        """Window of a layer; one that shares a cache has that of the cache."""
        source = self.layers[index].shares
        return self.layers[index if source is None else source].window

    def frequencies(self) -> Array:
        """Of the rotation, float32 ``[rotated / 2]``."""
        count = self.rotated // 2
        return np.asarray(1.0 / 100.0 ** (np.arange(count) / max(count, 1)), dtype=np.float32)

    def slopes(self) -> Array:
        """Of the position bias, float32 ``[heads]``."""
        return np.asarray(2.0 ** -(1.0 + np.arange(self.heads)), dtype=np.float32)

    def tensor(self, name: str, *shape: int) -> Array:
        """A weight by name, float32: the same whatever else the decoder is made of.

        A table or a product is scaled by what it sums (its last axis but one), a vector lies around 1 for scales and
        around 0 for everything else.
        """
        random = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        numbers = random.standard_normal(shape)
        if name.endswith("norm.weight"):
            numbers = 1.0 + 0.2 * numbers
        elif len(shape) > 1 and not name.startswith(("embed", "positions")):
            last = name.endswith((".o.weight", "down.weight"))
            numbers *= (BLOCK_SCALE if last else WEIGHT_SCALE) / math.sqrt(shape[-2])
        elif len(shape) == 1:
            numbers *= 0.3
        return numbers.astype(np.float32)

    def product(self, name: str, rows: int, columns: int) -> Array:
        """The weight of a product ``[rows, columns]``, applied as ``x @ w``."""
        return self.tensor(f"{name}.weight", rows, columns)


def answer(recipe: Recipe, tokens: Sequence[int], added: Mapping[str, Array] | None = None) -> Array:
    """Logits of every token of one row, float64 ``[len(tokens), vocab]``.

    Args:
        recipe: The decoder.
        tokens: The row.
        added: What an adapter adds to the weights of products, ``[rows, columns]`` by the product's name.
    """
    return _Reference(recipe, added or {}).run(np.asarray(tokens, dtype=np.int64))


class _Reference:
    """One row through a decoder, all tokens at once."""

    def __init__(self, recipe: Recipe, added: Mapping[str, Array]) -> None:
        self.r = recipe
        self.added = added

    def run(self, tokens: Array) -> Array:
        """See `answer`."""
        r = self.r
        table = self.weight("embed.weight", r.vocab, r.HIDDEN)
        x = table[tokens]
        if r.learned_positions:
            x = x + self.weight("positions.weight", r.POSITIONS, r.HIDDEN)[: len(tokens)]
        kept: dict[int, tuple[Array, Array]] = {}
        for index, layer in enumerate(r.layers):
            prefix = f"layers.{index}"
            normal = self.norm(f"{prefix}.attention_norm", x, odd=index == 0)
            if layer.linear != "none":
                mixed = self.recurrence(layer, prefix, normal)
            else:
                mixed = self.attention(index, prefix, normal, kept)
            if r.parallel:
                x = x + mixed + self.block(layer, prefix, normal)
            else:
                x = x + mixed
                x = x + self.block(layer, prefix, self.norm(f"{prefix}.block_norm", x))
        x = self.norm("final_norm", x)
        logits = x @ (table.T if r.tied else self.weight("head.weight", r.HIDDEN, r.vocab))
        return r.final_softcap * np.tanh(logits / r.final_softcap) if r.final_softcap else logits

    def weight(self, name: str, *shape: int) -> Array:
        return self.r.tensor(name, *shape).astype(np.float64)

    def norm(self, name: str, x: Array, *, odd: bool = False) -> Array:
        width = x.shape[-1]
        scale = self.weight(f"{name}.weight", width)
        if self.r.norm == "layer" and not name.endswith((".q_norm", ".k_norm")):
            centered = x - x.mean(-1, keepdims=True)
            normal = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + self.r.EPSILON)
            return normal * scale + self.weight(f"{name}.bias", width)
        power = 4.0 if odd and self.r.odd == "norm-power" else 2.0
        return x / np.sqrt((x**power).mean(-1, keepdims=True) + np.float32(self.r.EPSILON)) * scale

    def linear(self, name: str, x: Array, columns: int, *, odd: bool = False) -> Array:
        out = x @ (self.r.product(name, x.shape[-1], columns).astype(np.float64) + self.added.get(name, 0.0))
        beta = 0.5 if odd and self.r.odd == "gemm-beta" else 1.0
        return out + beta * self.weight(f"{name}.bias", columns) if self.r.bias else out

    def heads(self, x: Array, count: int) -> Array:
        """``[heads, tokens, width]``."""
        return x.reshape(len(x), count, -1).transpose(1, 0, 2)

    def attention(self, index: int, prefix: str, x: Array, kept: dict[int, tuple[Array, Array]]) -> Array:
        r, layer = self.r, self.r.layers[index]
        q = self.heads(self.linear(f"{prefix}.q", x, r.heads * r.head_dim, odd=index == 0), r.heads)
        q = self.rotate(self.norm(f"{prefix}.q_norm", q) if r.qk_norm else q, first=index == 0)
        if layer.shares is None:
            k = self.heads(self.linear(f"{prefix}.k", x, r.kv_heads * r.head_dim), r.kv_heads)
            k = self.rotate(self.norm(f"{prefix}.k_norm", k) if r.qk_norm else k)
            v = self.heads(self.linear(f"{prefix}.v", x, r.kv_heads * r.value_dim), r.kv_heads)
            kept[index] = k, v
        k, v = (np.repeat(t, r.group, axis=0) for t in kept[index if layer.shares is None else layer.shares])
        k = KEY_SCALE * k if r.odd == "scaled-keys" and index == 0 else k
        scores = np.einsum("hqd,hkd->hqk", q, k) * r.score_scale
        at = np.arange(len(x))
        query, key = at[:, None], at[None, :]
        if layer.decomposed and r.alibi and r.window(index) is None:
            scores = scores + r.slopes().astype(np.float64)[:, None, None] * key
        if r.softcap:
            scores = r.softcap * np.tanh(scores / r.softcap)
        seen = key <= query
        window = r.window(index)
        if window is not None:
            seen &= key > query - window
        elif r.odd == "strided-mask":
            seen &= (key % 2 == 0) | (key == query)
        scores = np.where(seen, scores, -np.inf)
        top = scores.max(-1, keepdims=True)
        sinks = self.weight(f"{prefix}.sinks", r.heads)[:, None, None] if layer.sinks else np.full((1, 1, 1), -np.inf)
        top = np.maximum(top, sinks)
        parts = np.exp(scores - top)
        weights = parts / (parts.sum(-1, keepdims=True) + np.exp(sinks - top))
        mixed = np.einsum("hqk,hkd->hqd", weights, v).transpose(1, 0, 2).reshape(len(x), -1)
        return self.linear(f"{prefix}.o", mixed, r.HIDDEN)

    def recurrence(self, layer: Layer, prefix: str, x: Array) -> Array:
        """Token by token from an empty state; a convolution sees zeros before the first token.

        Queries and keys are no longer than 1, as models see to in one way or another, so that the state stays bounded.
        """
        r, size = self.r, layer.kernel
        taps = self.weight(f"{prefix}.conv.weight", r.HIDDEN, 1, size)[:, 0].T
        padded = np.concatenate([np.zeros((size - 1, r.HIDDEN)), x])
        x = self.act(np.stack([(padded[at : at + size] * taps).sum(0) for at in range(len(x))]))
        q, k = (self.heads(self.linear(f"{prefix}.{n}", x, r.heads * r.head_dim), r.heads) for n in "qk")
        q, k = (np.tanh(t) * np.float32(r.head_dim**-0.5) for t in (q, k))
        v = self.heads(self.linear(f"{prefix}.v", x, r.heads * r.value_dim), r.heads)
        decay = np.exp(-np.logaddexp(0.0, self.linear(f"{prefix}.g", x, r.heads)))
        share = 1.0 / (1.0 + np.exp(-self.linear(f"{prefix}.b", x, r.heads))) if layer.linear == "delta" else None
        state, mixed = np.zeros((r.heads, r.head_dim, r.value_dim)), np.zeros((len(x), r.heads, r.value_dim))
        for at in range(len(x)):
            state = decay[at][:, None, None] * state
            change = v[:, at]
            if share is not None:
                change = share[at][:, None] * (change - np.einsum("hk,hkv->hv", k[:, at], state))
            state = state + k[:, at, :, None] * change[:, None, :]
            mixed[at] = np.einsum("hk,hkv->hv", q[:, at], state)
        return self.linear(f"{prefix}.o", mixed.reshape(len(x), -1), r.HIDDEN)

    def rotate(self, x: Array, *, first: bool = False) -> Array:
        """``x`` is ``[heads, tokens, head_dim]``."""
        r = self.r
        if not r.rotated:
            return x
        # The angle is a product in single precision, as every model computes it.
        angles = (np.arange(x.shape[1], dtype=np.float32)[:, None] * r.frequencies()).astype(np.float64)
        cos, sin = np.cos(angles), np.sin(angles)
        turned, rest = x[..., : r.rotated], x[..., r.rotated :]
        if r.rotary == "interleaved":
            one, other = turned[..., ::2], turned[..., 1::2]
            both = np.stack([one * cos - other * sin, other * cos + one * sin], axis=-1)
            return np.concatenate([both.reshape(turned.shape), rest], axis=-1)
        one, other = np.split(turned, 2, axis=-1)
        if r.odd == "unequal-halves" and first:
            second = (np.arange(x.shape[1], dtype=np.float32)[:, None] * (r.frequencies() * np.float32(0.5))).astype(
                float
            )
            parts = [one * cos - other * sin, other * np.cos(second) + one * np.sin(second)]
        elif r.odd in ("other-sign", "subtracted") and first:
            parts = [one * cos + other * sin, other * cos - one * sin]
        elif r.odd == "same-half" and first:
            parts = [one * cos - other * sin, other * cos + other * sin]
        elif r.odd == "no-cosine" and first:
            parts = [one - other * sin, other + one * sin]
        else:
            parts = [one * cos - other * sin, other * cos + one * sin]
        return np.concatenate([*parts, rest], axis=-1)

    def act(self, x: Array, *, odd: bool = False) -> Array:
        kind = self.r.activation
        if kind == "swish":
            gate = 0.5 * x if odd and self.r.odd == "other-gate" else x
            return x / (1.0 + np.exp(-gate))
        if kind == "gelu":
            divisor = 1.5 if odd and self.r.odd == "gelu-constant" else math.sqrt(2.0)
            return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / divisor))
        if kind == "gelu-tanh":
            return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
        return np.maximum(x, 0.0)

    def block(self, layer: Layer, prefix: str, x: Array) -> Array:
        r = self.r
        odd = prefix == "layers.0"
        if not layer.experts:
            inner = self.linear(f"{prefix}.up", x, r.INNER)
            act: Any = self.act(self.linear(f"{prefix}.gate", x, r.INNER), odd=odd) if r.gated else 1.0
            inner = inner * act if r.gated else self.act(inner, odd=odd)
            return self.linear(f"{prefix}.down", inner, r.HIDDEN)
        router = x @ self.weight(f"{prefix}.router.weight", r.HIDDEN, layer.experts)
        best = np.argsort(-router, axis=-1, kind="stable")[:, :2]
        chosen = np.take_along_axis(router, best, axis=-1)
        share = np.exp(chosen - chosen.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        up = self.weight(f"{prefix}.experts.up.weight", layer.experts, r.HIDDEN, r.INNER)
        down = self.weight(f"{prefix}.experts.down.weight", layer.experts, r.INNER, r.HIDDEN)
        each = np.einsum("tki,tkih->tkh", self.act(np.einsum("th,tkhi->tki", x, up[best]), odd=odd), down[best])
        return (each * share[..., None]).sum(1)
