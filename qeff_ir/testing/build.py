"""A `Recipe` as a module in the form that the frontend makes, with a count of what each pass should find in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qeff_ir import dialect
from qeff_ir.module import LAYER_KEY, SOURCE_KEY, WEIGHT_KEY, Dim, Module, Role, State
from qeff_ir.runtime.session import Array
from qeff_ir.testing.recipe import KEY_SCALE, Layer, Recipe

FLOAT, INT, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
ROWS = ("batch_size", "seq_len")
HIDDEN = -65504.0
"""Score of a key that spelled attention hides."""


@dataclass(frozen=True)
class Built:
    """What was made.

    Attributes:
        recipe: What it was made from.
        module: The module, as lowered.
        planted: Sites by the name that a pass counts them under: how often it must fire.
        missed: Near misses by the name of the pass that must leave them alone, and report them.
    """

    recipe: Recipe
    module: Module
    planted: Counter[str]
    missed: Counter[str]


def build(recipe: Recipe) -> Built:
    """The module of a recipe, with weights in memory, no specializations, and no property."""
    return _Builder(recipe).build()


class _Builder:
    """Appends nodes in the order in which a traced model computes."""

    def __init__(self, recipe: Recipe) -> None:
        self.r = recipe
        self.random = np.random.default_rng([recipe.spelling, 7])
        self.planted: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.source = "model"
        self.ids = ir.val("input_ids", dtype=INT, shape=ir.Shape(ROWS))
        self.positions = ir.val("position_ids", dtype=INT, shape=ir.Shape(ROWS))
        self.graph = ir.Graph([self.ids, self.positions], [], nodes=[], opset_imports={"": dialect.OPSET, "qeff": 1})
        self.kept: dict[int, dict[Role, ir.Value]] = {}
        self.masks: dict[int | None, tuple[ir.Value, bool]] = {}
        self.slots: dict[int | None, ir.Value] = {}
        self.angles: dict[bool, tuple[ir.Value, ir.Value]] = {}
        self.names = 0

    def build(self) -> Built:
        r = self.r
        states = [state for index in range(len(r.layers)) for state in _states(r, index)]
        pasts = [ir.val(s.input, dtype=FLOAT, shape=ir.Shape(s.shape)) for s in states]
        self.graph.inputs.extend(pasts)
        self.pasts = {(s.layer, s.role): p for s, p in zip(states, pasts, strict=True)}
        logits = self.decoder()
        logits.name = "logits"
        self.graph.outputs.append(logits)
        for state in states:
            value = self.kept[state.layer][state.role]
            value.name = state.output
            self.graph.outputs.append(value)
        module = Module(ir.Model(self.graph, ir_version=11), "Drawn", states)
        limit = r.POSITIONS if r.learned_positions else None
        module.dims = {n: Dim(n) for n in ROWS} | {"ctx_len": Dim("ctx_len", limit)}
        dialect.attach(module.model)
        module.write_facts()
        return Built(r, module, self.planted, self.missed)

    # Spelling.

    def pick(self, count: int) -> int:
        """Which of so many equivalent spellings to use here; the first, where the recipe asks for none."""
        return int(self.random.integers(count)) if self.r.spelling else 0

    def node(
        self, op_type: str, *inputs: ir.Value | None, shape: Any = None, dtype: Any = FLOAT, domain: str = "", **kw: Any
    ) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes=kw, domain=domain)
        node.metadata_props[SOURCE_KEY] = self.source
        self.names += 1
        out = node.outputs[0]
        out.name = f"{op_type.lower()}_{self.names}"
        out.dtype = dtype
        if shape is not None:
            out.shape = ir.Shape(shape)
        self.graph.append(node)
        if self.pick(8) == 7:
            return self.node("Identity", out, shape=shape, dtype=dtype)
        return out

    def const(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A constant: an initializer, or a `Constant` node as the exporter makes."""
        array = np.asarray(value, dtype=dtype)
        self.names += 1
        name = f"number_{self.names}"  # not one that onnx_ir gives to values without a name
        if self.pick(2):
            node = ir.node("Constant", [], attributes={"value": ir.tensor(array)})
            node.metadata_props[SOURCE_KEY] = self.source
            node.outputs[0].name = name
            self.graph.append(node)
            return node.outputs[0]
        made = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(made)
        return made

    def number(self, value: float) -> ir.Value:
        return self.const(value, np.float32)

    def weight(self, name: str, *shape: int, numbers: Array | None = None, layer: str = "") -> ir.Value:
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        array = self.r.tensor(name, *shape) if numbers is None else numbers
        made = ir.val(name, const_value=ir.tensor(array, name=name))
        made.metadata_props[WEIGHT_KEY] = name
        if layer:
            made.metadata_props[LAYER_KEY] = layer
        self.graph.register_initializer(made)
        return made

    def pair(self, op_type: str, one: ir.Value, other: ir.Value, **kw: Any) -> ir.Value:
        """A commutative operator, either way round."""
        return self.node(op_type, *((other, one) if self.pick(2) else (one, other)), **kw)

    def target(self, dims: Sequence[int]) -> ir.Value:
        """Target of a reshape of rows: constant, or computed from the shape of the input as exporters do."""
        if not self.pick(2):
            return self.const([0, 0, *dims])
        parts = [self.node("Shape", self.ids, start=i, end=i + 1, shape=[1], dtype=INT) for i in (0, 1)]
        return self.node("Concat", *parts, self.const(list(dims)), axis=0, shape=[2 + len(dims)], dtype=INT)

    # The decoder.

    def decoder(self) -> ir.Value:
        r = self.r
        self.source = "model.embed"
        table = self.weight("embed.weight", r.vocab, r.HIDDEN, layer="embedding")
        x = self.node("Gather", table, self.ids, axis=0, shape=[*ROWS, r.HIDDEN])
        if r.learned_positions:
            places = self.weight("positions.weight", r.POSITIONS, r.HIDDEN)
            x = self.pair("Add", x, self.node("Gather", places, self.positions, axis=0, shape=x.shape), shape=x.shape)
        for index, layer in enumerate(r.layers):
            x = self.layer(index, layer, x)
        self.source = "model"
        x = self.norm("final_norm", x)
        self.source = "model.head"
        if r.tied:
            head = self.node("Transpose", table, perm=[1, 0], shape=[r.HIDDEN, r.vocab])
            self.planted["FusedMatMul"] += 1
        else:
            head = self.stored("head", r.HIDDEN, r.vocab)
        logits = self.node("MatMul", x, head, shape=[*ROWS, r.vocab])
        if r.final_softcap:
            cap = self.number(r.final_softcap)
            inner = self.node("Tanh", self.node("Div", logits, cap, shape=logits.shape), shape=logits.shape)
            logits = self.pair("Mul", inner, cap, shape=logits.shape)
        if logits.producer().op_type == "Identity":  # pyright: ignore[reportOptionalMemberAccess]
            return logits.producer().inputs[0]  # type: ignore[union-attr, return-value]
        return logits

    def layer(self, index: int, layer: Layer, x: ir.Value) -> ir.Value:
        r, prefix, shape = self.r, f"layers.{index}", x.shape
        self.source = f"model.{prefix}"
        normal = self.norm(f"{prefix}.attention_norm", x, odd=index == 0)
        mixed = (
            self.attention(index, prefix, normal) if layer.linear == "none" else self.recurrence(index, prefix, normal)
        )
        if r.parallel:
            return self.pair(
                "Add", self.pair("Add", x, mixed, shape=shape), self.block(layer, prefix, normal), shape=shape
            )
        x = self.pair("Add", x, mixed, shape=shape)
        return self.pair("Add", x, self.block(layer, prefix, self.norm(f"{prefix}.block_norm", x)), shape=shape)

    def norm(self, name: str, x: ir.Value, *, odd: bool = False) -> ir.Value:
        r, shape = self.r, list(x.shape or ())
        width = int(shape[-1])  # pyright: ignore[reportArgumentType]
        scale = self.weight(f"{name}.weight", width)
        if r.norm == "layer" and not name.endswith((".q_norm", ".k_norm")):
            bias = self.weight(f"{name}.bias", width)
            return self.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=r.EPSILON, shape=shape)
        strange = odd and r.odd == "norm-power"
        small = [*shape[:-1], 1]
        power = self.node("Pow", x, self.number(4.0 if strange else 2.0), shape=shape)
        mean = self.node("ReduceMean", power, self.const([-1]), keepdims=1, noop_with_empty_axes=0, shape=small)
        root = self.node("Sqrt", self.node("Add", mean, self.number(r.EPSILON), shape=small), shape=small)
        normal = self.node("Mul", x, self.node("Reciprocal", root, shape=small), shape=shape)
        (self.missed if strange else self.planted)["fuse-norms" if strange else "RMSNormalization"] += 1
        return self.pair("Mul", normal, scale, shape=shape)

    def stored(self, name: str, rows: int, columns: int) -> ir.Value:
        """The weight of a product: stored the other way round as torch does, or as it is."""
        numbers = self.r.product(name, rows, columns)
        if self.pick(3) == 2:
            return self.weight(f"{name}.weight", numbers=numbers, layer="linear")
        self.planted["FusedMatMul"] += 1
        turned = self.weight(f"{name}.weight", numbers=np.ascontiguousarray(numbers.T), layer="linear")
        return self.node("Transpose", turned, perm=[1, 0], shape=[rows, columns])

    def linear(self, name: str, x: ir.Value, columns: int, *, odd: bool = False) -> ir.Value:
        around, self.source = self.source, f"model.{name}"
        out = self.product(name, x, columns, odd=odd)
        self.source = around
        return out

    def product(self, name: str, x: ir.Value, columns: int, *, odd: bool) -> ir.Value:
        r, rows = self.r, int(list(x.shape or ())[-1])  # pyright: ignore[reportArgumentType]
        shape = [*ROWS, columns]
        bias = self.weight(f"{name}.bias", columns) if r.bias else None
        if not r.gemm:
            out = self.node("MatMul", x, self.stored(name, rows, columns), shape=shape)
            return self.pair("Add", out, bias, shape=shape) if bias is not None else out
        flat = self.node("Reshape", x, self.const([-1, rows]), shape=["batch_size*seq_len", rows])
        weight = self.weight(f"{name}.weight", numbers=r.product(name, rows, columns), layer="linear")
        strange = odd and r.odd == "gemm-beta" and bias is not None
        beta = 0.5 if strange else 1.0
        out = self.node(
            "Gemm", flat, weight, *([bias] if bias is not None else []), alpha=1.0, beta=beta, transA=0, transB=0,
            shape=["batch_size*seq_len", columns],
        )  # fmt: skip
        self.missed["unflatten"] += strange
        self.planted["Gemm"] += not strange
        parts = [self.node("Shape", self.ids, start=i, end=i + 1, shape=[1], dtype=INT) for i in (0, 1)]
        back = self.node("Concat", *parts, self.const([columns]), axis=0, shape=[3], dtype=INT)
        return self.node("Reshape", out, back, shape=shape)

    def heads(self, x: ir.Value, count: int, width: int) -> ir.Value:
        split = self.node("Reshape", x, self.target([count, width]), shape=[*ROWS, count, width])
        return self.node("Transpose", split, perm=[0, 2, 1, 3], shape=["batch_size", count, "seq_len", width])

    def attention(self, index: int, prefix: str, x: ir.Value) -> ir.Value:
        r, layer = self.r, self.r.layers[index]
        self.source = f"model.{prefix}.attention"
        q = self.heads(self.linear(f"{prefix}.q", x, r.heads * r.head_dim, odd=index == 0), r.heads, r.head_dim)
        q = self.rotate(self.norm(f"{prefix}.q_norm", q) if r.qk_norm else q, first=index == 0)
        if layer.shares is None:
            k = self.heads(self.linear(f"{prefix}.k", x, r.kv_heads * r.head_dim), r.kv_heads, r.head_dim)
            k = self.rotate(self.norm(f"{prefix}.k_norm", k) if r.qk_norm else k)
            v = self.heads(self.linear(f"{prefix}.v", x, r.kv_heads * r.value_dim), r.kv_heads, r.value_dim)
            self.kept[index] = {"key": self.update(index, "key", k), "value": self.update(index, "value", v)}
        source = index if layer.shares is None else layer.shares
        k, v = self.kept[source]["key"], self.kept[source]["value"]
        scaled = r.odd == "scaled-keys" and index == 0
        if scaled:
            k = self.pair("Mul", k, self.number(KEY_SCALE), shape=k.shape)
        mask, plain = self.mask(r.window(index))
        shape = ["batch_size", r.heads, "seq_len", r.value_dim]
        if layer.spelled:
            mixed = self.spelled(index, q, k, v, mask)
        elif layer.sinks:
            mixed = self.node(
                "SinkAttention", q, k, v, mask, self.weight(f"{prefix}.sinks", r.heads), domain=dialect.DOMAIN,
                scale=r.score_scale, softcap=r.softcap, shape=shape,
            )  # fmt: skip
            self.planted["sinks"] += 1
        else:
            mixed = self.node("Attention", q, k, v, mask, scale=r.score_scale, softcap=r.softcap, shape=shape)
            self.planted["Attention"] += 1
            alone = sum(source in (i, other.shares) for i, other in enumerate(r.layers)) == 1
            fits = r.head_dim == r.value_dim and r.head_dim % 8 == 0 and plain and alone
            self.planted["GroupQueryAttention"] += fits and not scaled
        rows = self.node("Transpose", mixed, perm=[0, 2, 1, 3], shape=[*ROWS, r.heads, r.value_dim])
        width = r.heads * r.value_dim
        return self.linear(
            f"{prefix}.o", self.node("Reshape", rows, self.target([width]), shape=[*ROWS, width]), r.HIDDEN
        )

    def update(self, index: int, role: Role, new: ir.Value) -> ir.Value:
        past = self.pasts[index, role]
        node = ir.node("CacheUpdate", [past, new, self.positions], domain=dialect.DOMAIN)
        node.metadata_props[SOURCE_KEY] = self.source
        node.outputs[0].shape, node.outputs[0].dtype = past.shape, FLOAT
        self.graph.append(node)
        self.planted["write"] += 1
        return node.outputs[0]

    def recurrence(self, index: int, prefix: str, x: ir.Value) -> ir.Value:
        """A convolution over the last tokens, then linear attention from a retained state."""
        r, layer = self.r, self.r.layers[index]
        self.source = f"model.{prefix}.recurrence"
        columns, size = ["batch_size", r.HIDDEN, "seq_len"], layer.kernel
        past, domain = self.pasts[index, "conv"], dialect.DOMAIN
        turned = self.node("Transpose", x, perm=[0, 2, 1], shape=columns)
        seen = self.node(
            "StateWindow", past, turned, self.positions, domain=domain, shape=["batch_size", r.HIDDEN, None]
        )
        taps = self.weight(f"{prefix}.conv.weight", r.HIDDEN, 1, size)
        wide = self.node("Conv", seen, taps, group=r.HIDDEN, shape=["batch_size", r.HIDDEN, None])
        # The first result is of the token before the run, which is in the window too.
        new = self.node(
            "Slice", wide, self.const([1]), self.const([2**63 - 1]), self.const([2]), self.const([1]), shape=columns
        )
        x = self.act(self.node("Transpose", new, perm=[0, 2, 1], shape=x.shape))
        q, k = (self.heads(self.linear(f"{prefix}.{n}", x, r.heads * r.head_dim), r.heads, r.head_dim) for n in "qk")
        q, k = (
            self.pair("Mul", self.node("Tanh", t, shape=t.shape), self.number(r.head_dim**-0.5), shape=t.shape)
            for t in (q, k)
        )
        v = self.heads(self.linear(f"{prefix}.v", x, r.heads * r.value_dim), r.heads, r.value_dim)
        gate = self.node("Softplus", self.linear(f"{prefix}.g", x, r.heads), shape=[*ROWS, r.heads])
        decay = self.by_head(self.node("Neg", gate, shape=gate.shape))
        delta = layer.linear == "delta"
        # Without the rule, nothing may depend on its strength.
        strength = decay
        if delta:
            share = self.linear(f"{prefix}.b", x, r.heads)
            strength = self.by_head(self.node("Sigmoid", share, shape=share.shape))
        state = self.pasts[index, "recurrent"]
        node = ir.node(
            "LinearAttention", [q, k, v, decay, strength, state, self.positions], attributes={"delta": float(delta)},
            domain=domain, num_outputs=2,
        )  # fmt: skip
        node.metadata_props[SOURCE_KEY] = self.source
        shapes = ["batch_size", r.heads, "seq_len", r.value_dim], list(state.shape or ())
        for out, name, shape in zip(node.outputs, ("mixed", "state"), shapes, strict=True):
            out.name, out.dtype, out.shape = f"{prefix}.{name}", FLOAT, ir.Shape(shape)
        self.graph.append(node)
        last = ir.node("StateNext", [seen, self.positions], attributes={"size": size}, domain=domain)
        last.metadata_props[SOURCE_KEY] = self.source
        last.outputs[0].dtype, last.outputs[0].shape = FLOAT, past.shape
        self.graph.append(last)
        self.kept[index] = {"conv": last.outputs[0], "recurrent": node.outputs[1]}
        rows = self.node("Transpose", node.outputs[0], perm=[0, 2, 1, 3], shape=[*ROWS, r.heads, r.value_dim])
        width = r.heads * r.value_dim
        rows = self.node("Reshape", rows, self.target([width]), shape=[*ROWS, width])
        return self.linear(f"{prefix}.o", rows, r.HIDDEN)

    def by_head(self, x: ir.Value) -> ir.Value:
        """``[batch, seq, heads]`` as ``[batch, heads, seq, 1]``."""
        turned = self.node("Transpose", x, perm=[0, 2, 1], shape=["batch_size", self.r.heads, "seq_len"])
        return self.node("Unsqueeze", turned, self.const([3]), shape=["batch_size", self.r.heads, "seq_len", 1])

    def places(self, window: int | None) -> ir.Value:
        """``[batch, ctx]``: the position in each slot of the caches of one window."""
        if window not in self.slots:
            past = next(self.pasts[i, "key"] for i in self.r.owners if self.r.layers[i].window == window)
            shape = ["batch_size", "ctx_len"]
            made = self.node("CachePositions", past, self.positions, domain=dialect.DOMAIN, shape=shape, dtype=INT)
            self.slots[window] = made
            self.planted["CachePositions"] += 1
        return self.slots[window]

    def mask(self, window: int | None) -> tuple[ir.Value, bool]:
        """``[batch, 1, seq, ctx]`` and whether it says ``slot <= position`` in so many words."""
        if window in self.masks:
            return self.masks[window]
        shape = ["batch_size", 1, "seq_len", "ctx_len"]
        kind: dict[str, Any] = {"shape": shape, "dtype": BOOL}
        key = self.node(
            "Unsqueeze", self.places(window), self.const([1, 2]), shape=["batch_size", 1, 1, "ctx_len"], dtype=INT
        )
        query = self.node(
            "Unsqueeze", self.positions, self.const([1, 3]), shape=["batch_size", 1, "seq_len", 1], dtype=INT
        )
        plain = window is None
        if self.pick(3) == 2:
            seen, plain = self.node("Not", self.node("Greater", key, query, **kind), **kind), False
        else:
            seen = self.node("LessOrEqual", key, query, **kind)
        if window is not None:
            size = self.const(window)
            if self.pick(2):
                near = self.node("Less", self.node("Sub", query, key, shape=shape, dtype=INT), size, **kind)
            else:
                low = self.node("Sub", query, size, shape=["batch_size", 1, "seq_len", 1], dtype=INT)
                near = self.node("Greater", key, low, **kind)
            seen = self.pair("And", near, seen, **kind)
        elif self.r.odd == "strided-mask":
            rest = self.node("Mod", key, self.const(2), shape=["batch_size", 1, 1, "ctx_len"], dtype=INT)
            even = self.node("Equal", rest, self.const(0), shape=["batch_size", 1, 1, "ctx_len"], dtype=BOOL)
            some = self.node("Or", even, self.node("Equal", key, query, **kind), **kind)
            seen, plain = self.node("And", seen, some, **kind), False
        self.masks[window] = seen, plain
        return self.masks[window]

    def spelled(self, index: int, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value) -> ir.Value:
        """Attention written out over repeated heads, the mask added to the scores or choosing among them."""
        r = self.r
        shape = ["batch_size", r.heads, "seq_len", "ctx_len"]
        keys, values = self.repeat(k, r.head_dim), self.repeat(v, r.value_dim)
        turned = self.node("Transpose", keys, perm=[0, 1, 3, 2], shape=["batch_size", r.heads, r.head_dim, "ctx_len"])
        scores = self.node("MatMul", q, turned, shape=shape)
        scores = self.pair("Mul", scores, self.number(r.score_scale), shape=shape)
        if r.alibi and r.window(index) is None:
            places = self.node("Cast", self.places(None), to=int(FLOAT), shape=["batch_size", "ctx_len"])
            far = self.node("Unsqueeze", places, self.const([1, 2]), shape=["batch_size", 1, 1, "ctx_len"])
            slopes = self.const(r.slopes()[:, None, None], np.float32)
            bias = self.node("Mul", far, slopes, shape=["batch_size", r.heads, 1, "ctx_len"])
            scores = self.pair("Add", scores, bias, shape=shape)
        if r.softcap:
            cap = self.number(r.softcap)
            scores = self.node(
                "Mul", self.node("Tanh", self.node("Div", scores, cap, shape=shape), shape=shape), cap, shape=shape
            )
        if self.pick(2):
            scores = self.node("Where", mask, scores, self.number(HIDDEN), shape=shape)
        else:
            added = self.node(
                "Where", mask, self.number(0.0), self.number(HIDDEN), shape=["batch_size", 1, "seq_len", "ctx_len"]
            )
            scores = self.pair("Add", scores, added, shape=shape)
        weights = self.node("Softmax", scores, axis=-1, shape=shape)
        return self.node("MatMul", weights, values, shape=["batch_size", r.heads, "seq_len", r.value_dim])

    def repeat(self, cache: ir.Value, width: int) -> ir.Value:
        r = self.r
        if r.group == 1:
            return cache
        wide = self.node("Unsqueeze", cache, self.const([2]), shape=["batch_size", r.kv_heads, 1, "ctx_len", width])
        size = self.const([1, 1, r.group, 1, 1])
        many = self.node("Expand", wide, size, shape=["batch_size", r.kv_heads, r.group, "ctx_len", width])
        return self.node(
            "Reshape", many, self.const([0, r.heads, -1, width]), shape=["batch_size", r.heads, "ctx_len", width]
        )

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
        missed = odd in ("unequal-halves", "same-half", "two-sines", "subtracted", "no-cosine")
        self.missed["fuse-rotary"] += missed
        self.planted["RotaryEmbedding"] += not (missed or backward)
        return self.node("Concat", out, rest, axis=-1, shape=shape) if rest is not None else out

    def slice(self, x: ir.Value, start: int, end: int, shape: Sequence[Any]) -> ir.Value:
        """``x[..., start:end]``; an end at the border may be written as the largest number."""
        width = int(shape[-1])
        stop = 2**63 - 1 if end == width and self.pick(2) == 0 else end
        bounds = self.const([start]), self.const([stop]), self.const([3 if self.pick(2) == 0 else -1]), self.const([1])
        return self.node("Slice", x, *bounds, shape=[*shape[:-1], end - start])

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

    def act(self, x: ir.Value, *, odd: bool = False) -> ir.Value:
        kind, strange = self.r.activation, False
        shape = x.shape
        f = lambda op, *v: self.node(op, *v, shape=shape)  # noqa: E731
        if kind == "relu":
            return f("Relu", x)
        half, one = self.number(0.5), self.number(1.0)
        if kind == "swish":
            strange = odd and self.r.odd == "other-gate"
            out = self.pair("Mul", x, f("Sigmoid", f("Mul", x, half) if strange else x), shape=shape)
            self.planted["Swish"] += not strange
            return out
        if kind == "gelu":
            strange = odd and self.r.odd == "gelu-constant"
            root = self.number(1.5 if strange else math.sqrt(2.0))
            gate = f("Add", f("Erf", f("Div", x, root)), one)
            name = "Gelu"
        else:
            scale, cubic = self.number(math.sqrt(2.0 / math.pi)), self.number(0.044715)
            which = self.pick(3)
            if which == 0:
                inner = f("Mul", scale, f("Add", x, f("Mul", cubic, f("Pow", x, self.number(3.0)))))
                gate = f("Add", f("Tanh", inner), one)
                self.planted["Gelu tanh"] += 1
                return f("Mul", x, f("Mul", half, gate))
            if which == 1:
                inner = f("Mul", f("Add", x, f("Mul", f("Pow", x, self.number(3.0)), cubic)), scale)
            else:
                inner = f("Mul", f("Mul", x, scale), f("Add", f("Mul", f("Mul", x, cubic), x), one))
            gate = f("Add", f("Tanh", inner), one)
            self.planted["Gelu tanh"] += 1
            return f("Mul", f("Mul", x, half), gate)
        self.missed["fuse-activations"] += strange
        self.planted[name] += not strange
        if self.pick(2):
            return f("Mul", f("Mul", x, half), gate)
        return f("Mul", x, f("Mul", half, gate))

    def block(self, layer: Layer, prefix: str, x: ir.Value) -> ir.Value:
        r, odd = self.r, prefix == "layers.0"
        self.source = f"model.{prefix}.block"
        if layer.experts:
            return self.experts(layer, prefix, x, odd=odd)
        inner = self.linear(f"{prefix}.up", x, r.INNER)
        if r.gated:
            gate = self.act(self.linear(f"{prefix}.gate", x, r.INNER), odd=odd)
            inner = self.pair("Mul", gate, inner, shape=inner.shape)
        else:
            inner = self.act(inner, odd=odd)
        return self.linear(f"{prefix}.down", inner, r.HIDDEN)

    def experts(self, layer: Layer, prefix: str, x: ir.Value, *, odd: bool) -> ir.Value:
        """Two experts a token, their weights gathered for each token."""
        r, count = self.r, layer.experts
        router = self.node("MatMul", x, self.weight(f"{prefix}.router.weight", r.HIDDEN, count), shape=[*ROWS, count])
        best = ir.node(
            "TopK", [router, self.const([2])], attributes={"axis": -1, "largest": 1, "sorted": 1}, num_outputs=2
        )
        best.metadata_props[SOURCE_KEY] = self.source
        for out, dtype, name in zip(best.outputs, (FLOAT, INT), ("chosen", "which"), strict=True):
            out.name, out.dtype, out.shape = f"{prefix}.{name}", dtype, ir.Shape([*ROWS, 2])
        self.graph.append(best)
        share = self.node("Softmax", best.outputs[0], axis=-1, shape=[*ROWS, 2])
        up = self.weight(f"{prefix}.experts.up.weight", count, r.HIDDEN, r.INNER)
        down = self.weight(f"{prefix}.experts.down.weight", count, r.INNER, r.HIDDEN)
        ups = self.node("Gather", up, best.outputs[1], axis=0, shape=[*ROWS, 2, r.HIDDEN, r.INNER])
        downs = self.node("Gather", down, best.outputs[1], axis=0, shape=[*ROWS, 2, r.INNER, r.HIDDEN])
        row = self.node("Unsqueeze", x, self.const([2, 3]), shape=[*ROWS, 1, 1, r.HIDDEN])
        inner = self.act(self.node("MatMul", row, ups, shape=[*ROWS, 2, 1, r.INNER]), odd=odd)
        each = self.node("MatMul", inner, downs, shape=[*ROWS, 2, 1, r.HIDDEN])
        each = self.node("Squeeze", each, self.const([3]), shape=[*ROWS, 2, r.HIDDEN])
        weighed = self.pair(
            "Mul", each, self.node("Unsqueeze", share, self.const([-1]), shape=[*ROWS, 2, 1]), shape=each.shape
        )
        return self.node("ReduceSum", weighed, self.const([2]), keepdims=0, shape=[*ROWS, r.HIDDEN])


def _states(r: Recipe, index: int) -> list[State]:
    """What a layer keeps."""
    layer, shapes = r.layers[index], dict[Role, tuple[str | int, ...]]()
    if layer.linear != "none":
        shapes["conv"] = "batch_size", r.HIDDEN, layer.kernel
        shapes["recurrent"] = "batch_size", r.heads, r.head_dim, r.value_dim
    elif layer.shares is None:
        shapes["key"] = "batch_size", r.kv_heads, "ctx_len", r.head_dim
        shapes["value"] = "batch_size", r.kv_heads, "ctx_len", r.value_dim
    return [State(index, role, shape, FLOAT, layer.window) for role, shape in shapes.items()]
