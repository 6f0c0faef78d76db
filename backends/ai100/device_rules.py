# pyright: reportArgumentType=false, reportReturnType=false, reportInvalidTypeVarUse=false, reportCallIssue=false
# (onnxscript reads these functions as a language of its own; its stubs describe eager tensors)
"""The cache operators as the device runs them: an index out of range is skipped (AI 100 contract §2).

The bodies in `backends.ai100.operators` are shown to the compiler; ONNX Runtime fails on the indices that the device
skips. The emulator puts these in their place; names and signatures are the same.
"""

from typing import TypeVar, Union

from onnxscript import BFLOAT16, FLOAT, FLOAT16, INT64, script
from onnxscript.onnx_opset import opset18 as op
from onnxscript.values import Opset

CTX_DOMAIN = "com.qualcomm.cloud"
"""Domain of the cache operators."""

VERSION = 1

T = TypeVar("T", bound=Union[FLOAT, FLOAT16, BFLOAT16])

_ctx = Opset(CTX_DOMAIN, VERSION)


@script(_ctx, default_opset=op)
def CtxScatter(data: T, position_ids: INT64, updates: T) -> T:  # noqa: N802
    """Write tokens into a cache; a slot out of range is not written.

    Args:
        data: Cache before the run, ``[B, H, C, D]``.
        position_ids: Slot of each token, ``[B, S]``.
        updates: Tokens, ``[B, H, S, D]``.

    Returns:
        The cache after the run, ``[B, H, C, D]``.
    """
    length = op.Shape(data, start=2, end=3)
    valid = op.And(op.GreaterOrEqual(position_ids, op.Constant(value_int=0)), op.Less(position_ids, length))
    # What is not to be written goes to a spare slot behind the cache.
    slot = op.Where(valid, position_ids, length)
    spare = op.Slice(data, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2]))
    index = op.Expand(op.Unsqueeze(slot, op.Constant(value_ints=[1, 3])), op.Shape(updates))
    written = op.ScatterElements(op.Concat(data, spare, axis=2), index, updates, axis=2)
    return op.Slice(written, op.Constant(value_ints=[0]), length, op.Constant(value_ints=[2]))


@script(_ctx, default_opset=op)
def CtxGather(data: T, ctx_indices: INT64, comp_ctx_len: INT64, unread: float = 0.0) -> T:  # noqa: N802
    """Read slots of a cache; a slot out of range is not read.

    Args:
        data: The cache, ``[B, H, C, D]``.
        ctx_indices: Slots to read, broadcast to ``[B, H, N]``.
        comp_ctx_len: ``N``, a scalar.
        unread: What stands where no slot is read.

    Returns:
        The slots, ``[B, H, N, D]``.
    """
    zero = op.Constant(value_int=0)
    length = op.Shape(data, start=2, end=3)
    valid = op.And(op.GreaterOrEqual(ctx_indices, zero), op.Less(ctx_indices, length))
    count = op.Reshape(comp_ctx_len, op.Constant(value_ints=[1]))
    shape = op.Concat(op.Shape(data, start=0, end=2), count, axis=0)
    last = op.Constant(value_ints=[-1])
    index = op.Unsqueeze(op.Expand(op.Where(valid, ctx_indices, zero), shape), last)
    read = op.GatherND(data, index, batch_dims=2)
    nothing = op.CastLike(op.Constant(value_float=unread), data)
    return op.Where(op.Unsqueeze(op.Expand(valid, shape), last), read, nothing)


@script(_ctx, default_opset=op)
def CtxGatherBlockedKV(data: T, ctx_indices: INT64, unread: float = 0.0) -> T:  # noqa: N802
    """Read a block of slots of a cache; a slot out of range is not read.

    Args:
        data: The cache, ``[B, H, C, D]``.
        ctx_indices: Slots to read, ``[B, H, N]``.
        unread: What stands where no slot is read.

    Returns:
        The slots, ``[B, H, N, D]``.
    """
    zero = op.Constant(value_int=0)
    last = op.Constant(value_ints=[-1])
    valid = op.And(op.GreaterOrEqual(ctx_indices, zero), op.Less(ctx_indices, op.Shape(data, start=2, end=3)))
    read = op.GatherND(data, op.Unsqueeze(op.Where(valid, ctx_indices, zero), last), batch_dims=2)
    return op.Where(op.Unsqueeze(valid, last), read, op.CastLike(op.Constant(value_float=unread), data))


@script(_ctx, default_opset=op)
def CtxGatherBlockedKVCB(data: T, batch_index: INT64, ctx_indices: INT64, unread: float = 0.0) -> T:  # noqa: N802
    """Read a block of slots in some rows of a cache; a row or a slot out of range is not read.

    Args:
        data: The cache, ``[F, H, C, D]``.
        batch_index: Row of the cache that each row of the run reads, ``[B, 1]``.
        ctx_indices: Slots to read, ``[B, 1, N]``.
        unread: What stands where no slot is read.

    Returns:
        The slots, ``[B, H, N, D]``.
    """
    zero = op.Constant(value_int=0)
    last = op.Constant(value_ints=[-1])
    slots = op.And(op.GreaterOrEqual(ctx_indices, zero), op.Less(ctx_indices, op.Shape(data, start=2, end=3)))
    known = op.And(op.GreaterOrEqual(batch_index, zero), op.Less(batch_index, op.Shape(data, start=0, end=1)))
    valid = op.And(slots, op.Unsqueeze(known, last))
    rows = op.Gather(data, op.Squeeze(op.Where(known, batch_index, zero), op.Constant(value_ints=[1])), axis=0)
    shape = op.Concat(op.Shape(rows, start=0, end=2), op.Shape(ctx_indices, start=2, end=3), axis=0)
    index = op.Expand(op.Where(valid, ctx_indices, zero), shape)
    read = op.GatherND(rows, op.Unsqueeze(index, last), batch_dims=2)
    seen = op.Unsqueeze(op.Expand(valid, shape), last)
    return op.Where(seen, read, op.CastLike(op.Constant(value_float=unread), data))
