# pyright: reportArgumentType=false, reportReturnType=false, reportInvalidTypeVarUse=false, reportCallIssue=false
# (onnxscript reads these functions as a language of its own; its stubs describe eager tensors)
"""The cache operators whose caches have rows of their own, of which a run names some (AI 100 contract §2).

As in `backends.ai100.operators`: ``R`` rows of the cache, ``B`` rows of a run, ``H`` key/value heads, ``C`` slots,
``S`` tokens of the run, ``N`` slots to read, ``D`` head width. The device skips a row out of range as it does a slot.
"""

from typing import TypeVar, Union

from onnxscript import BFLOAT16, FLOAT, FLOAT16, INT64, script
from onnxscript.onnx_opset import opset18 as op
from onnxscript.values import Opset

from backends.ai100 import row_rules
from qeff_ir.ir import operators

CTX_DOMAIN = row_rules.CTX_DOMAIN

T = TypeVar("T", bound=Union[FLOAT, FLOAT16, BFLOAT16])

_ctx = Opset(CTX_DOMAIN, row_rules.VERSION)


@script(_ctx, default_opset=op)
def CtxScatterCB(data: T, batch_index: INT64, position_ids: INT64, updates: T) -> T:  # noqa: N802
    """Write the tokens of a run into rows of a cache (contract §2.1).

    Args:
        data: Cache before the run, ``[R, H, C, D]``.
        batch_index: Row of the cache of each row of the run, ``[B, 1]``.
        position_ids: Slot of each token, ``[B, S]``.
        updates: Tokens, ``[B, H, S, D]``.

    Returns:
        The cache after the run, ``[R, H, C, D]``.
    """
    zero = op.Constant(value_int=0)
    heads = op.Shape(data, start=1, end=2)
    batch = op.Shape(position_ids, start=0, end=1)
    one = op.Constant(value_ints=[1])
    shape = op.Concat(batch, heads, op.Shape(position_ids, start=1, end=2), one, axis=0)
    row = op.Unsqueeze(batch_index, op.Constant(value_ints=[2, 3]))
    every = op.Range(zero, op.Squeeze(heads), op.Constant(value_int=1))
    head = op.Unsqueeze(every, op.Constant(value_ints=[0, 2, 3]))
    slot = op.Unsqueeze(position_ids, op.Constant(value_ints=[1, 3]))
    index = op.Concat(op.Expand(row, shape), op.Expand(head, shape), op.Expand(slot, shape), axis=3)
    return op.ScatterND(data, index, updates)


@script(_ctx, default_opset=op)
def CtxGatherCB(data: T, batch_index: INT64, ctx_indices: INT64, comp_ctx_len: INT64) -> T:  # noqa: N802
    """Read slots of rows of a cache (contract §2.2).

    Args:
        data: The cache, ``[R, H, C, D]``.
        batch_index: Row of the cache of each row of the run, ``[B, 1]``.
        ctx_indices: Slots to read, ``[B, 1, N]``.
        comp_ctx_len: ``N``, a scalar; the indices tell it too.

    Returns:
        The slots, ``[B, H, N, D]``.
    """
    zero = op.Constant(value_int=0)
    heads = op.Shape(data, start=1, end=2)
    batch = op.Shape(ctx_indices, start=0, end=1)
    one = op.Constant(value_ints=[1])
    shape = op.Concat(batch, heads, op.Shape(ctx_indices, start=2, end=3), one, axis=0)
    row = op.Unsqueeze(batch_index, op.Constant(value_ints=[2, 3]))
    every = op.Range(zero, op.Squeeze(heads), op.Constant(value_int=1))
    head = op.Unsqueeze(every, op.Constant(value_ints=[0, 2, 3]))
    slot = op.Unsqueeze(ctx_indices, op.Constant(value_ints=[-1]))
    index = op.Concat(op.Expand(row, shape), op.Expand(head, shape), op.Expand(slot, shape), axis=3)
    return op.GatherND(data, index)


@script(_ctx, default_opset=op)
def CtxScatterCB3D(data: T, batch_index: INT64, position_ids: INT64, updates: T) -> T:  # noqa: N802
    """Write entries into rows of a state without heads, or of a table of bits (contract §2.1).

    Args:
        data: State before the run, ``[R, C, D]``, or ``[R, C]``; so are the others.
        batch_index: Row of the state of each row of the run, ``[B, 1]``.
        position_ids: Place of each entry, ``[B, S]``.
        updates: Entries, ``[B, S, D]``.

    Returns:
        The state after the run, ``[R, C, D]``.
    """
    last = op.Constant(value_ints=[-1])
    row = op.Expand(batch_index, op.Shape(position_ids))
    index = op.Concat(op.Unsqueeze(row, last), op.Unsqueeze(position_ids, last), axis=2)
    return op.ScatterND(data, index, updates)


@script(_ctx, default_opset=op)
def CtxGatherCB3D(data: T, batch_index: INT64, ctx_indices: INT64) -> T:  # noqa: N802
    """Read entries of rows of a state without heads (contract §2.2).

    Args:
        data: The state, ``[R, C, D]``.
        batch_index: Row of the state of each row of the run, ``[B, 1]``.
        ctx_indices: Entries to read, ``[B, N]``.

    Returns:
        The entries, ``[B, N, D]``.
    """
    last = op.Constant(value_ints=[-1])
    row = op.Expand(batch_index, op.Shape(ctx_indices))
    return op.GatherND(data, op.Concat(op.Unsqueeze(row, last), op.Unsqueeze(ctx_indices, last), axis=2))


operators.define(CtxScatterCB, rule=row_rules.CtxScatterCB)
operators.define(CtxGatherCB, rule=row_rules.CtxGatherCB)
operators.define(CtxScatterCB3D, rule=row_rules.CtxScatterCB3D)
operators.define(CtxGatherCB3D, rule=row_rules.CtxGatherCB3D)
