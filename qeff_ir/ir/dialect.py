# pyright: reportArgumentType=false, reportReturnType=false, reportInvalidTypeVarUse=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportUnknownParameterType=false
# (onnxscript reads these functions as a language of its own; its stubs describe eager tensors)
"""The `qeff` dialect: the few ops that ONNX has no standard form for, each with a body that defines its meaning.

Every op is an ONNX function written with onnxscript, so a snapshot that uses it runs on any ONNX runtime. Passes lower
the ops to a target's physical form. ``B`` batch, ``H`` key/value heads, ``C`` slots of the cache, ``S`` tokens of this
run, ``D`` head width.
"""

from typing import TypeVar, Union

import onnx
import onnxscript
from onnxscript import BFLOAT16, BOOL, FLOAT, FLOAT16, INT64, graph, script, values
from onnxscript.onnx_opset import opset24 as op

from qeff_ir.ir.operators import define

DOMAIN = "qeff"
VERSION = 1
OPSET = 24
"""Version of the standard operators in the IR."""

UNWRITTEN = 2**31 - 1
"""What `CachePositions` says of a slot that holds no token yet: later than any query, so every causal mask hides it."""

T = TypeVar("T", bound=Union[FLOAT, FLOAT16, BFLOAT16])

_qeff = values.Opset(DOMAIN, VERSION)


@script(_qeff, default_opset=op)
def CacheUpdate(past: T, new: T, position_ids: INT64, ring: int = 0) -> T:  # noqa: N802
    """Store the tokens of this run in a cache.

    Args:
        past: Cache before the run, ``[B, H, C, D]``.
        new: Tokens of this run, ``[B, H, S, D]``.
        position_ids: Position of each token, ``[B, S]``; -1 marks padding, which is not stored.
        ring: 1 when position ``p`` lives in slot ``p mod C``, 0 when slot ``p`` holds position ``p`` (a position
            beyond the cache is not stored).

    Returns:
        The cache after the run, ``[B, H, C, D]``.
    """
    length = op.Shape(past, start=2, end=3)
    wraps = op.Cast(op.Constant(value_int=ring), to=9)
    slot = op.Where(wraps, op.Mod(position_ids, length), position_ids)
    stored = op.And(op.GreaterOrEqual(position_ids, op.Constant(value_int=0)), op.Less(slot, length))
    # Tokens that are not stored go to a spare slot behind the cache.
    slot = op.Where(stored, slot, length)
    spare = op.Slice(past, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2]))
    room = op.Concat(past, spare, axis=2)
    index = op.Expand(op.Unsqueeze(slot, op.Constant(value_ints=[1, 3])), op.Shape(new))
    written = op.ScatterElements(room, index, new, axis=2)
    return op.Slice(written, op.Constant(value_ints=[0]), length, op.Constant(value_ints=[2]))


@script(_qeff, default_opset=op)
def CachePositions(past: T, position_ids: INT64, ring: int = 0) -> INT64:  # noqa: N802
    """The position of the token that each slot of a cache holds once this run's tokens are stored.

    Args:
        past: The cache (its length is all that counts), ``[B, H, C, D]``.
        position_ids: Position of each token of this run, ``[B, S]``, -1 for padding.
        ring: As for `CacheUpdate`. A ring knows only the latest token of a slot, and says `UNWRITTEN` of an empty one.

    Returns:
        ``[B, C]`` int64.
    """
    length = op.Shape(past, start=2, end=3)
    wraps = op.Cast(op.Constant(value_int=ring), to=9)
    zero = op.Constant(value_int=0)
    slot = op.Range(zero, op.Squeeze(length), op.Constant(value_int=1))
    last = op.ReduceMax(position_ids, op.Constant(value_ints=[1]), keepdims=1)
    turn = op.Mul(op.Div(last, length), length)
    this_turn = op.Add(slot, turn)
    position = op.Where(op.LessOrEqual(this_turn, last), this_turn, op.Sub(this_turn, length))
    in_ring = op.Where(op.Less(position, zero), op.Constant(value_int=2147483647), position)
    return op.Where(wraps, in_ring, op.Add(slot, op.Mul(last, zero)))


@script(_qeff, default_opset=op)
def SinkAttention(q: T, k: T, v: T, mask: BOOL, sinks: T, scale: float = 1.0, softcap: float = 0.0) -> T:  # noqa: N802
    """Attention whose softmax has one more logit per head, the sink, that takes weight and gives nothing.

    Args:
        q: ``[B, G * H, S, D]``; each group of ``G`` query heads shares a key/value head.
        k: ``[B, H, C, D]``.
        v: ``[B, H, C, Dv]``.
        mask: True where a query sees a key, ``[B or 1, 1, S, C]``.
        sinks: One logit per query head, ``[G * H]``.
        scale: Factor of the scores.
        softcap: ``c > 0`` replaces a score ``s`` by ``c tanh(s / c)``; 0 leaves it.

    Returns:
        ``[B, G * H, S, Dv]``.
    """
    batch = op.Shape(k, start=0, end=1)
    heads = op.Shape(k, start=1, end=2)
    seq = op.Shape(q, start=2, end=3)
    any_ = op.Constant(value_ints=[-1])
    one = op.Constant(value_ints=[1])
    grouped = op.Reshape(q, op.Concat(batch, heads, any_, seq, op.Shape(q, start=3, end=4), axis=0))
    keys = op.Unsqueeze(op.Transpose(k, perm=[0, 1, 3, 2]), op.Constant(value_ints=[2]))
    scores = op.Mul(op.MatMul(grouped, keys), op.CastLike(op.Constant(value_float=scale), q))
    cap = op.CastLike(op.Constant(value_float=softcap), q)
    capped = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    scores = op.Where(op.Greater(cap, op.CastLike(op.Constant(value_float=0.0), q)), capped, scores)
    scores = op.Where(op.Unsqueeze(mask, one), scores, op.CastLike(op.Constant(value_float=-65504.0), q))
    logit = op.Reshape(sinks, op.Concat(one, heads, any_, one, one, axis=0))
    column = op.Expand(logit, op.Concat(op.Shape(scores, start=0, end=4), one, axis=0))
    weights = op.Softmax(op.Concat(scores, column, axis=-1), axis=-1)
    weights = op.Slice(weights, op.Constant(value_ints=[0]), any_, any_)
    out = op.MatMul(weights, op.Unsqueeze(v, op.Constant(value_ints=[2])))
    return op.Reshape(out, op.Concat(op.Shape(q, start=0, end=3), op.Shape(v, start=3, end=4), axis=0))


@script(_qeff, default_opset=op)
def StateWindow(past: T, new: T, position_ids: INT64) -> T:  # noqa: N802
    """What a causal convolution over this run's tokens sees: the last tokens before the run, then the run's.

    Args:
        past: The last ``K`` tokens of each row, ``[B, C, K]``; not read in rows that start at position 0.
        new: Tokens of this run, ``[B, C, S]``.
        position_ids: Position of each token, ``[B, S]``.

    Returns:
        ``[B, C, K + S]``.
    """
    first = op.Slice(
        position_ids, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[1])
    )
    starts = op.Unsqueeze(op.Equal(first, op.Constant(value_int=0)), op.Constant(value_ints=[2]))
    before = op.Where(starts, op.CastLike(op.Constant(value_float=0.0), past), past)
    return op.Concat(before, new, axis=2)


@script(_qeff, default_opset=op)
def StateNext(window: T, position_ids: INT64, size: int = 1) -> T:  # noqa: N802
    """The last tokens of each row once this run's are read; padding, which ends a row, is not among them.

    Args:
        window: Result of `StateWindow`, ``[B, C, K + S]``.
        position_ids: Position of each token of this run, ``[B, S]``, -1 for padding.
        size: ``K``.

    Returns:
        ``[B, C, K]``.
    """
    real = op.Cast(op.GreaterOrEqual(position_ids, op.Constant(value_int=0)), to=7)
    count = op.ReduceSum(real, op.Constant(value_ints=[1]), keepdims=1)
    offset = op.Range(op.Constant(value_int=0), op.Constant(value_int=size), op.Constant(value_int=1))
    index = op.Unsqueeze(op.Add(count, offset), op.Constant(value_ints=[1]))
    index = op.Expand(index, op.Concat(op.Shape(window, start=0, end=2), op.Constant(value_ints=[1]), axis=0))
    return op.GatherElements(window, index, axis=2)


@script(_qeff, default_opset=op)
def LinearAttention(  # noqa: N802
    q: T, k: T, v: T, decay: T, beta: T, past: T, position_ids: INT64, delta: float = 0.0
) -> tuple[T, T]:
    """A recurrence over tokens: linear attention, state-space layers, gated delta rules.

    With ``S`` the state of a head, ``[K, V]``, every token does ``S := exp(decay) S``, then ``S := S + k u`` with ``u =
    v`` (``delta=0``) or ``u = beta (v - k S)`` (``delta=1``), and gives ``q S``.

    Args:
        q: ``[B, H, S, K]``.
        k: ``[B, H, S, K]``.
        v: ``[B, H, S, V]``.
        decay: Logarithm of the decay, ``[B, H, S, K]`` or ``[B, H, S, 1]``.
        beta: ``[B, H, S, 1]``.
        past: State before the run, ``[B, H, K, V]``; taken for zero in rows that start at position 0.
        position_ids: Position of each token, ``[B, S]``; padding, -1, leaves the state as it is.
        delta: Whether the delta rule applies.

    Returns:
        The outputs, ``[B, H, S, V]``, and the state after the run, ``[B, H, K, V]``.
    """
    zero = op.CastLike(op.Constant(value_float=0.0), past)
    one = op.CastLike(op.Constant(value_float=1.0), past)
    rule = op.CastLike(op.Constant(value_float=delta), past)
    first = op.Slice(
        position_ids, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[1])
    )
    starts = op.Unsqueeze(op.Equal(first, op.Constant(value_int=0)), op.Constant(value_ints=[2, 3]))
    padded = op.Unsqueeze(op.Less(position_ids, op.Constant(value_int=0)), op.Constant(value_ints=[1, 3]))
    kept = op.Where(padded, one, op.Exp(decay))
    written = op.Where(padded, zero, k)
    strength = op.Add(op.Mul(rule, beta), op.Sub(one, rule))
    count = op.Squeeze(op.Shape(position_ids, start=1, end=2))

    @graph()
    def token(i: INT64, go: BOOL, state: T):
        key = op.Gather(written, i, axis=2)
        faded = op.Mul(state, op.Unsqueeze(op.Gather(kept, i, axis=2), op.Constant(value_ints=[3])))
        row = op.Unsqueeze(key, op.Constant(value_ints=[2]))
        value = op.Unsqueeze(op.Gather(v, i, axis=2), op.Constant(value_ints=[2]))
        known = op.Mul(op.MatMul(row, faded), rule)
        strong = op.Unsqueeze(op.Gather(strength, i, axis=2), op.Constant(value_ints=[2]))
        change = op.Mul(op.Sub(value, known), strong)
        after = op.Add(faded, op.Mul(op.Unsqueeze(key, op.Constant(value_ints=[3])), change))
        query = op.Unsqueeze(op.Gather(q, i, axis=2), op.Constant(value_ints=[2]))
        return op.Identity(go), after, op.MatMul(query, after)

    last, outputs = op.Loop(count, op.Constant(value=True), op.Where(starts, zero, past), body=token)
    return op.Squeeze(op.Transpose(outputs, perm=[1, 2, 0, 3, 4]), op.Constant(value_ints=[3])), last


@script(_qeff, default_opset=op)
def EveryToken(slots: INT64, position_ids: INT64) -> BOOL:  # noqa: N802
    """A mask that hides nothing, ``[B, 1, S, C]``: what an encoder asks for. The frontend refuses its use."""
    rows = op.Unsqueeze(op.Abs(position_ids), op.Constant(value_ints=[1, 3]))
    columns = op.Unsqueeze(op.Abs(slots), op.Constant(value_ints=[1, 2]))
    return op.GreaterOrEqual(op.Add(rows, columns), op.Constant(value_int=0))


@script(_qeff, default_opset=op)
def SpreadTokens(past: T, values: INT64, position_ids: INT64) -> INT64:  # noqa: N802
    """Numbers of the tokens of this run at their positions in the context; 0 at all others.

    Args:
        past: A cache with a slot for each position (its length is all that counts), ``[B, H, C, D]``.
        values: A number for each token of this run, ``[B, S]``.
        position_ids: Position of each token of this run, ``[B, S]``, -1 for padding.

    Returns:
        ``[B, C]``.
    """
    zero = op.Constant(value_int=0)
    slot = op.Range(zero, op.Squeeze(op.Shape(past, start=2, end=3)), op.Constant(value_int=1))
    one = op.Constant(value_ints=[1])
    here = op.Equal(op.Unsqueeze(position_ids, one), op.Unsqueeze(slot, one))
    return op.ReduceSum(op.Where(here, op.Unsqueeze(values, one), zero), op.Constant(value_ints=[2]), keepdims=0)


@script(_qeff, default_opset=op)
def MergeRows(embeds: T, mask: BOOL, rows: T, first: INT64) -> tuple[T, INT64]:  # noqa: N802
    """Put rows that an encoder made in the place of tokens, in order.

    Args:
        embeds: A vector for each token, ``[B, S, W]``.
        mask: The tokens that stand for a row, ``[B, S]``.
        rows: Rows of each row of the batch, ``[B, V, W]``.
        first: The row that the next such token stands for, ``[B, 1]``. A token beyond the last row stays what it is: a
            model may generate the token that stands for rows.

    Returns:
        The vectors, ``[B, S, W]``, and `first` for the next run, ``[B, 1]``.
    """
    one = op.Constant(value_ints=[1])
    chosen = op.Cast(mask, to=7)
    at = op.Add(op.Sub(op.CumSum(chosen, op.Constant(value_int=1)), one), first)
    count = op.Shape(rows, start=1, end=2)
    there = op.And(mask, op.Less(at, count))
    place = op.Max(op.Min(at, op.Sub(count, one)), op.Constant(value_ints=[0]))
    two = op.Constant(value_ints=[2])
    taken = op.GatherND(rows, op.Unsqueeze(place, two), batch_dims=1)
    merged = op.Where(op.Unsqueeze(there, two), taken, embeds)
    return merged, op.Add(first, op.ReduceSum(chosen, one, keepdims=1))


@script(_qeff, default_opset=op)
def Attention(q: T, k: T, v: T, mask: BOOL, scale: float = 1.0, softcap: float = 0.0) -> T:  # noqa: N802
    """The standard `Attention`, under a name that the exporter takes for opaque; the frontend renames it at once."""
    return op.Attention(q, k, v, mask, scale=scale, softcap=softcap)


@script(_qeff, default_opset=op)
def LayerInput(hidden: T) -> T:  # noqa: N802
    """The hidden states where they enter a layer that is lowered once for many; the frontend takes the mark out."""
    return op.Identity(hidden)


@script(_qeff, default_opset=op)
def LayerOutput(hidden: T) -> T:  # noqa: N802
    """The hidden states where they leave such a layer."""
    return op.Identity(hidden)


OPS = {
    f.name: f
    for f in (
        CacheUpdate,
        CachePositions,
        SinkAttention,
        StateWindow,
        StateNext,
        LinearAttention,
        EveryToken,
        SpreadTokens,
        MergeRows,
        Attention,
        LayerInput,
        LayerOutput,
    )
}
"""The ops of the dialect by name."""


def _schema(function: onnxscript.OnnxFunction[..., object]) -> onnx.defs.OpSchema:
    """The ONNX schema that an op's Python signature declares."""
    signature = function.op_signature
    assert signature is not None
    formal = onnx.defs.OpSchema.FormalParameter
    constraints = {p.type_constraint.name: p.type_constraint for p in (*signature.inputs, *signature.outputs)}
    return onnx.defs.OpSchema(
        function.name,
        DOMAIN,
        VERSION,
        function.__doc__ or "",
        inputs=[formal(p.name, p.type_constraint.name) for p in signature.inputs],
        outputs=[formal(p.name, p.type_constraint.name) for p in signature.outputs],
        type_constraints=[
            (c.name, sorted(f"tensor({t.dtype.name.lower()})" for t in c.allowed_types), "")
            for c in constraints.values()
        ],
        attributes=[
            onnx.defs.OpSchema.Attribute(a.name, onnx.defs.OpSchema.AttrType(int(a.type)), "", required=a.required)
            for a in signature.attributes
        ],
    )


for _op in OPS.values():
    define(_op)
    onnx.defs.register_schema(_schema(_op))
