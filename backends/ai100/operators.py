# pyright: reportArgumentType=false, reportReturnType=false, reportInvalidTypeVarUse=false, reportCallIssue=false
# (onnxscript reads these functions as a language of its own; its stubs describe eager tensors)
"""The operators that the AI 100 compiler takes natively, each with a body that defines its meaning.

The compiler knows them by domain and name and replaces them by its own implementation; the bodies make every snapshot a
valid ONNX model (AI 100 contract §2). They hold in any standard opset from 18 on. ``B`` batch, ``H`` key/value heads,
``C`` slots of the cache, ``F`` rows of a cache, ``S`` tokens of this run, ``N`` slots to read, ``D`` head width.

The bodies are plain ONNX: an index out of range is an error there, while the device skips it (`device_rules`).
"""

from typing import TypeVar, Union

from onnxscript import BFLOAT16, FLOAT, FLOAT16, INT64, script
from onnxscript.onnx_opset import opset18 as op
from onnxscript.values import Opset

from backends.ai100 import device_rules
from qeff_ir.ir import operators

CTX_DOMAIN = device_rules.CTX_DOMAIN
"""Domain of the cache operators."""

QTI_DOMAIN = "com.qti.aisw.onnx"
"""Domain of the normalization."""

T = TypeVar("T", bound=Union[FLOAT, FLOAT16, BFLOAT16])

_ctx = Opset(CTX_DOMAIN, device_rules.VERSION)
_qti = Opset(QTI_DOMAIN, 1)


@script(_ctx, default_opset=op)
def CtxScatter(data: T, position_ids: INT64, updates: T) -> T:  # noqa: N802
    """Write the tokens of a run into a cache (contract §2.1).

    Args:
        data: Cache before the run, ``[B, H, C, D]``.
        position_ids: Slot of each token, ``[B, S]``; the device does not write a slot out of range.
        updates: Tokens, ``[B, H, S, D]``.

    Returns:
        The cache after the run, ``[B, H, C, D]``.
    """
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    batch = op.Shape(data, start=0, end=1)
    heads = op.Shape(data, start=1, end=2)
    shape = op.Concat(batch, heads, op.Shape(position_ids, start=1, end=2), one, axis=0)
    row = op.Unsqueeze(op.Range(zero, op.Squeeze(batch), step), op.Constant(value_ints=[1, 2, 3]))
    head = op.Unsqueeze(op.Range(zero, op.Squeeze(heads), step), op.Constant(value_ints=[0, 2, 3]))
    slot = op.Unsqueeze(position_ids, op.Constant(value_ints=[1, 3]))
    index = op.Concat(op.Expand(row, shape), op.Expand(head, shape), op.Expand(slot, shape), axis=3)
    return op.ScatterND(data, index, updates)


@script(_ctx, default_opset=op)
def CtxGather(data: T, ctx_indices: INT64, comp_ctx_len: INT64) -> T:  # noqa: N802
    """Read slots of a cache (contract §2.2).

    Args:
        data: The cache, ``[B, H, C, D]``.
        ctx_indices: Slots to read, broadcast to ``[B, H, N]``; the device does not read a slot out of range.
        comp_ctx_len: ``N``, a scalar.

    Returns:
        The slots, ``[B, H, N, D]``.
    """
    count = op.Reshape(comp_ctx_len, op.Constant(value_ints=[1]))
    index = op.Expand(ctx_indices, op.Concat(op.Shape(data, start=0, end=2), count, axis=0))
    return op.GatherND(data, op.Unsqueeze(index, op.Constant(value_ints=[-1])), batch_dims=2)


@script(_ctx, default_opset=op)
def CtxGatherBlockedKV(data: T, ctx_indices: INT64) -> T:  # noqa: N802
    """Read a block of slots of a cache (contract §2.2).

    Args:
        data: The cache, ``[B, H, C, D]``.
        ctx_indices: Slots to read, ``[B, H, N]``; the device does not read a slot out of range.

    Returns:
        The slots, ``[B, H, N, D]``.
    """
    return op.GatherND(data, op.Unsqueeze(ctx_indices, op.Constant(value_ints=[-1])), batch_dims=2)


@script(_ctx, default_opset=op)
def CtxGatherBlockedKVCB(data: T, batch_index: INT64, ctx_indices: INT64) -> T:  # noqa: N802
    """Read a block of slots in some rows of a cache (contract §2.2).

    Args:
        data: The cache, ``[F, H, C, D]``.
        batch_index: Row of the cache that each row of the run reads, ``[B, 1]``.
        ctx_indices: Slots to read, ``[B, 1, N]``; the device does not read a slot out of range.

    Returns:
        The slots, ``[B, H, N, D]``.
    """
    one = op.Constant(value_ints=[1])
    heads = op.Shape(data, start=1, end=2)
    shape = op.Concat(op.Shape(batch_index, start=0, end=1), heads, op.Shape(ctx_indices, start=2, end=3), one, axis=0)
    row = op.Unsqueeze(batch_index, op.Constant(value_ints=[2, 3]))
    counted = op.Range(op.Constant(value_int=0), op.Squeeze(heads), op.Constant(value_int=1))
    head = op.Unsqueeze(counted, op.Constant(value_ints=[0, 2, 3]))
    slot = op.Unsqueeze(ctx_indices, op.Constant(value_ints=[3]))
    index = op.Concat(op.Expand(row, shape), op.Expand(head, shape), op.Expand(slot, shape), axis=3)
    return op.GatherND(data, index)


@script(_qti, default_opset=op)
def CustomRMSNorm(hidden_states: T, weight: T, epsilon: float = 1e-6) -> T:  # noqa: N802
    """Root-mean-square normalization over the last axis (contract §2.3).

    Args:
        hidden_states: ``[..., D]``.
        weight: ``[D]``; multiplied in single precision.
        epsilon: Added to the mean of the squares.

    Returns:
        ``[..., D]``.
    """
    scale = op.Cast(weight, to=1)
    mean = op.ReduceMean(op.Mul(hidden_states, hidden_states), op.Constant(value_ints=[-1]), keepdims=1)
    small = op.Expand(op.CastLike(op.Constant(value_float=epsilon), hidden_states), op.Shape(mean))
    normal = op.Mul(hidden_states, op.Reciprocal(op.Sqrt(op.Add(mean, small))))
    return op.CastLike(op.Mul(scale, op.Cast(normal, to=1)), hidden_states)


operators.define(CtxScatter, rule=device_rules.CtxScatter)
operators.define(CtxGather, rule=device_rules.CtxGather)
operators.define(CtxGatherBlockedKV, rule=device_rules.CtxGatherBlockedKV)
operators.define(CtxGatherBlockedKVCB, rule=device_rules.CtxGatherBlockedKVCB)
operators.define(CustomRMSNorm, rule=CustomRMSNorm)
