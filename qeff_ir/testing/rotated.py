"""How a drawn module rotates queries and keys: by halves, in part, by neighbors, or nearly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qeff_ir.testing.decomposed import FLOAT, INT, ROWS, Decomposed
from qeff_ir.testing.recipe import Recipe

NEAR_MISSES = frozenset({"unequal-halves", "same-half", "two-sines", "subtracted", "no-cosine"})
"""What looks like a rotation and is none."""


class Rotated(Decomposed):
    """Makes the cosines and sines of a run once, and rotates by them.

    Args:
        recipe: As for `Decomposed`.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.angles: dict[bool, tuple[ir.Value, ir.Value]] = {}

    def cosines(self, *, unequal: bool) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine ``[batch, 1, seq, rotated]``, each of two equal halves as models make them."""
        if unequal not in self.angles:
            r, half = self.r, self.r.rotated // 2
            wide, full = [*ROWS, half], [*ROWS, r.rotated]
            column = self.node("Unsqueeze", self.positions, self.const([2]), shape=[*ROWS, 1], dtype=INT)
            places = self.node("Cast", column, to=int(FLOAT), shape=[*ROWS, 1])
            one = self.node("Mul", places, self.const(r.frequencies(), np.float32), shape=wide)
            other = one
            if unequal:
                slower = self.const(r.frequencies() * np.float32(0.5), np.float32)
                other = self.node("Mul", places, slower, shape=wide)
            angles = self.node("Concat", one, other, axis=-1, shape=full)
            found: list[ir.Value] = []
            for op_type in ("Cos", "Sin"):
                value = self.node(op_type, angles, shape=full)
                if self.pick(2):
                    value = self.node("Mul", value, self.number(1.0), shape=full)
                found.append(
                    self.node("Unsqueeze", value, self.const([1]), shape=["batch_size", 1, "seq_len", r.rotated])
                )
            self.angles[unequal] = found[0], found[1]
        return self.angles[unequal]

    def rotate(self, x: ir.Value, *, first: bool = False) -> ir.Value:
        """Queries or keys ``[batch, heads, seq, head_dim]``, rotated; `first`: where a near miss is made."""
        r = self.r
        if not r.rotated:
            return x
        shape = list(x.shape or ())
        count, width = shape[1], r.rotated
        if r.rotary == "interleaved":
            return self.interleaved(x, shape)
        part, rest = x, None
        if width < r.head_dim:
            part = self.slice(x, 0, width, shape)
            rest = self.slice(x, width, r.head_dim, shape)
        inner, half = ["batch_size", count, "seq_len", width], width // 2
        odd = r.odd if first else "none"
        unequal, backward = odd == "unequal-halves", odd == "other-sign"
        cos, sin = self.cosines(unequal=unequal)
        low, high = self.slice(part, 0, half, inner), self.slice(part, half, width, inner)
        if backward:
            turned = self.node("Concat", high, self.node("Neg", low, shape=low.shape), axis=-1, shape=inner)
        else:
            second = high if odd == "same-half" else low
            turned = self.node("Concat", self.node("Neg", high, shape=high.shape), second, axis=-1, shape=inner)
        plain = part if odd == "no-cosine" else self.pair("Mul", part, cos, shape=inner)
        if odd == "two-sines":
            shares = [self.node("Mul", sin, self.number(share), shape=sin.shape) for share in (0.25, 0.75)]
            parts = [self.pair("Mul", turned, share, shape=inner) for share in shares]
            other = self.pair("Add", *parts, shape=inner)
        else:
            other = self.pair("Mul", turned, sin, shape=inner)
        if odd == "subtracted":
            out = self.node("Sub", plain, other, shape=inner)
        else:
            out = self.pair("Add", plain, other, shape=inner)
        self.missed["fuse-rotary"] += odd in NEAR_MISSES
        self.planted["RotaryEmbedding"] += odd not in NEAR_MISSES and not backward
        return self.node("Concat", out, rest, axis=-1, shape=shape) if rest is not None else out

    def interleaved(self, x: ir.Value, shape: Sequence[Any]) -> ir.Value:
        """Neighbors turned together: a form that no pass fuses."""
        half = self.r.rotated // 2
        inner = [*shape[:-1], half]
        cos, sin = (
            self.node("Slice", v, self.const([0]), self.const([half]), self.const([3]), self.const([1]),
                      shape=["batch_size", 1, "seq_len", half])
            for v in self.cosines(unequal=False)
        )  # fmt: skip
        one, other = (
            self.node("Slice", x, self.const([i]), self.const([2**31]), self.const([3]), self.const([2]), shape=inner)
            for i in (0, 1)
        )
        low = self.node(
            "Sub", self.node("Mul", one, cos, shape=inner), self.node("Mul", other, sin, shape=inner), shape=inner
        )
        high = self.node(
            "Add", self.node("Mul", other, cos, shape=inner), self.node("Mul", one, sin, shape=inner), shape=inner
        )
        parts = [self.node("Unsqueeze", v, self.const([-1]), shape=[*inner, 1]) for v in (low, high)]
        both = self.node("Concat", *parts, axis=-1, shape=[*inner, 2])
        return self.node("Reshape", both, self.const([0, 0, 0, int(shape[-1])]), shape=shape)
