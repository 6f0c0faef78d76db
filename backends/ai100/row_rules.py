# pyright: reportArgumentType=false, reportReturnType=false, reportInvalidTypeVarUse=false, reportCallIssue=false
# (onnxscript reads these functions as a language of its own; its stubs describe eager tensors)
"""The operators of `backends.ai100.row_operators` as the device runs them: a row or a slot out of range is skipped."""

from typing import TypeVar, Union

from onnxscript import BFLOAT16, FLOAT, FLOAT16, INT64, script
from onnxscript.onnx_opset import opset18 as op
from onnxscript.values import Opset

from backends.ai100.device_rules import CTX_DOMAIN, VERSION

T = TypeVar("T", bound=Union[FLOAT, FLOAT16, BFLOAT16])

_ctx = Opset(CTX_DOMAIN, VERSION)


@script(_ctx, default_opset=op)
def CtxScatterCB(data: T, batch_index: INT64, position_ids: INT64, updates: T) -> T:  # noqa: N802
    """Write tokens into rows of a cache; a row or a slot out of range is not written.

    Args:
        data: Cache before the run, ``[R, H, C, D]``.
        batch_index: Row of the cache of each row of the run, ``[B, 1]``.
        position_ids: Slot of each token, ``[B, S]``.
        updates: Tokens, ``[B, H, S, D]``.

    Returns:
        The cache after the run, ``[R, H, C, D]``.
    """
    zero = op.Constant(value_int=0)
    length = op.Shape(data, start=2, end=3)
    known = op.And(op.GreaterOrEqual(batch_index, zero), op.Less(batch_index, op.Shape(data, start=0, end=1)))
    inside = op.And(op.GreaterOrEqual(position_ids, zero), op.Less(position_ids, length))
    # What is not to be written goes to a spare slot behind the cache.
    slots = op.Where(op.And(known, inside), position_ids, length)
    spare = op.Slice(data, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2]))
    shape = op.Slice(op.Shape(updates), op.Constant(value_ints=[0]), op.Constant(value_ints=[3]))
    row = op.Expand(op.Unsqueeze(op.Where(known, batch_index, zero), op.Constant(value_ints=[2])), shape)
    every = op.Range(zero, op.Squeeze(op.Shape(data, start=1, end=2)), op.Constant(value_int=1))
    head = op.Expand(op.Unsqueeze(every, op.Constant(value_ints=[0, 2])), shape)
    slot = op.Expand(op.Unsqueeze(slots, op.Constant(value_ints=[1])), shape)
    last = op.Constant(value_ints=[-1])
    index = op.Concat(op.Unsqueeze(row, last), op.Unsqueeze(head, last), op.Unsqueeze(slot, last), axis=3)
    written = op.ScatterND(op.Concat(data, spare, axis=2), index, updates)
    return op.Slice(written, op.Constant(value_ints=[0]), length, op.Constant(value_ints=[2]))


@script(_ctx, default_opset=op)
def CtxGatherCB(  # noqa: N802
    data: T, batch_index: INT64, ctx_indices: INT64, comp_ctx_len: INT64, unread: float = 0.0
) -> T:
    """Read slots of rows of a cache; a row or a slot out of range is not read.

    Args:
        data: The cache, ``[R, H, C, D]``.
        batch_index: Row of the cache of each row of the run, ``[B, 1]``.
        ctx_indices: Slots to read, ``[B, 1, N]``.
        comp_ctx_len: ``N``, a scalar.
        unread: What stands where no slot is read.

    Returns:
        The slots, ``[B, H, N, D]``.
    """
    zero = op.Constant(value_int=0)
    heads = op.Shape(data, start=1, end=2)
    known = op.And(op.GreaterOrEqual(batch_index, zero), op.Less(batch_index, op.Shape(data, start=0, end=1)))
    inside = op.And(op.GreaterOrEqual(ctx_indices, zero), op.Less(ctx_indices, op.Shape(data, start=2, end=3)))
    second = op.Constant(value_ints=[2])
    valid = op.And(op.Unsqueeze(known, second), inside)
    shape = op.Concat(op.Shape(batch_index, start=0, end=1), heads, op.Reshape(comp_ctx_len, [1]), axis=0)
    row = op.Expand(op.Unsqueeze(op.Where(known, batch_index, zero), second), shape)
    every = op.Range(zero, op.Squeeze(heads), op.Constant(value_int=1))
    head = op.Expand(op.Unsqueeze(every, op.Constant(value_ints=[0, 2])), shape)
    slot = op.Expand(op.Where(valid, ctx_indices, zero), shape)
    last = op.Constant(value_ints=[-1])
    index = op.Concat(op.Unsqueeze(row, last), op.Unsqueeze(head, last), op.Unsqueeze(slot, last), axis=3)
    nothing = op.CastLike(op.Constant(value_float=unread), data)
    return op.Where(op.Unsqueeze(valid, last), op.GatherND(data, index), nothing)


@script(_ctx, default_opset=op)
def CtxScatterCB3D(data: T, batch_index: INT64, position_ids: INT64, updates: T) -> T:  # noqa: N802
    """Write entries into rows of a state; a row or a place out of range is not written.

    Args:
        data: State before the run, ``[R, C, D]``.
        batch_index: Row of the state of each row of the run, ``[B, 1]``.
        position_ids: Place of each entry, ``[B, S]``.
        updates: Entries, ``[B, S, D]``.

    Returns:
        The state after the run, ``[R, C, D]``.
    """
    zero = op.Constant(value_int=0)
    length = op.Shape(data, start=1, end=2)
    known = op.And(op.GreaterOrEqual(batch_index, zero), op.Less(batch_index, op.Shape(data, start=0, end=1)))
    inside = op.And(op.GreaterOrEqual(position_ids, zero), op.Less(position_ids, length))
    # What is not to be written goes to a spare entry behind the others.
    place = op.Where(op.And(known, inside), position_ids, length)
    row = op.Expand(op.Where(known, batch_index, zero), op.Shape(position_ids))
    last, one = op.Constant(value_ints=[-1]), op.Constant(value_ints=[1])
    index = op.Concat(op.Unsqueeze(row, last), op.Unsqueeze(place, last), axis=2)
    first = op.Constant(value_ints=[0])
    written = op.ScatterND(op.Concat(data, op.Slice(data, first, one, one), axis=1), index, updates)
    return op.Slice(written, first, length, one)


@script(_ctx, default_opset=op)
def CtxGatherCB3D(data: T, batch_index: INT64, ctx_indices: INT64, unread: float = 0.0) -> T:  # noqa: N802
    """Read entries of rows of a state; a row or a place out of range is not read.

    Args:
        data: The state, ``[R, C, D]``.
        batch_index: Row of the state of each row of the run, ``[B, 1]``.
        ctx_indices: Entries to read, ``[B, N]``.
        unread: What stands where no entry is read.

    Returns:
        The entries, ``[B, N, D]``.
    """
    zero = op.Constant(value_int=0)
    known = op.And(op.GreaterOrEqual(batch_index, zero), op.Less(batch_index, op.Shape(data, start=0, end=1)))
    inside = op.And(op.GreaterOrEqual(ctx_indices, zero), op.Less(ctx_indices, op.Shape(data, start=1, end=2)))
    valid, last = op.And(known, inside), op.Constant(value_ints=[-1])
    row = op.Expand(op.Where(known, batch_index, zero), op.Shape(ctx_indices))
    place = op.Where(valid, ctx_indices, zero)
    read = op.GatherND(data, op.Concat(op.Unsqueeze(row, last), op.Unsqueeze(place, last), axis=2))
    nothing = op.CastLike(op.Constant(value_float=unread), data)
    return op.Where(op.Unsqueeze(valid, last), read, nothing)
