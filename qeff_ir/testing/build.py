"""A `Recipe` as a module in the form that the frontend makes, with a count of what each pass should find in it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qeff_ir.ir import dialect, operators
from qeff_ir.ir.module import SOURCE_KEY, Dim, Module
from qeff_ir.ir.ports import LOGITS, name_of
from qeff_ir.ir.residents import Resident
from qeff_ir.testing.decomposed import BOOL, FLOAT, INT, ROWS
from qeff_ir.testing.recipe import KEY_SCALE, Layer, Recipe
from qeff_ir.testing.rotated import NEAR_MISSES, Rotated

HIDDEN = -65504.0
"""Score of a key that decomposed attention hides."""


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


class _Builder(Rotated):
    """Appends nodes in the order in which a traced model computes."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.kept: dict[int, dict[str, ir.Value]] = {}
        self.masks: dict[int | None, tuple[ir.Value, bool]] = {}
        self.slots: dict[int | None, ir.Value] = {}

    def build(self) -> Built:
        r = self.r
        states = [state for index in range(len(r.layers)) for state in _states(r, index)]
        pasts = [ir.val(s.input, dtype=FLOAT, shape=ir.Shape(s.shape)) for s in states]
        self.graph.inputs.extend(pasts)
        self.pasts = {(s.layer, s.kind): p for s, p in zip(states, pasts, strict=True)}
        logits = self.decoder()
        logits.name = name_of(LOGITS)
        self.graph.outputs.append(logits)
        for state in states:
            value = self.kept[state.layer][state.kind]
            value.name = state.output
            self.graph.outputs.append(value)
        module = Module(ir.Model(self.graph, ir_version=11), "Drawn", states)
        limit = r.POSITIONS if r.learned_positions else None
        module.dims = {n: Dim(n) for n in ROWS} | {"ctx_len": Dim("ctx_len", limit)}
        operators.attach(module.model)
        module.write_facts()
        return Built(r, module, self.planted, self.missed)

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
            return logits.producer().inputs[0]  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]
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
        if layer.decomposed:
            mixed = self.decomposed(index, q, k, v, mask)
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
            fits = r.head_dim == r.value_dim and r.head_dim % 8 == 0 and plain and alone and not scaled
            self.planted["GroupQueryAttention"] += fits
            if fits and r.rotary == "half" and r.head_dim % 16 == 0:
                strange = index == 0 and r.odd in {*NEAR_MISSES, "other-sign"}  # its queries
                (self.missed if strange else self.planted)["ort-rotary"] += 1
        rows = self.node("Transpose", mixed, perm=[0, 2, 1, 3], shape=[*ROWS, r.heads, r.value_dim])
        width = r.heads * r.value_dim
        return self.linear(
            f"{prefix}.o", self.node("Reshape", rows, self.target([width]), shape=[*ROWS, width]), r.HIDDEN
        )

    def update(self, index: int, kind: str, new: ir.Value) -> ir.Value:
        past = self.pasts[index, kind]
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

    def decomposed(self, index: int, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value) -> ir.Value:
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


def _states(r: Recipe, index: int) -> list[Resident]:
    """What a layer keeps."""
    layer, shapes = r.layers[index], dict[str, tuple[str | int, ...]]()
    if layer.linear != "none":
        shapes["conv"] = "batch_size", r.HIDDEN, layer.kernel
        shapes["recurrent"] = "batch_size", r.heads, r.head_dim, r.value_dim
    elif layer.shares is None:
        shapes["key"] = "batch_size", r.kv_heads, "ctx_len", r.head_dim
        shapes["value"] = "batch_size", r.kv_heads, "ctx_len", r.value_dim
    return [Resident(index, kind, shape, FLOAT, layer.window) for kind, shape in shapes.items()]
