"""The device operators whose caches have rows of their own: the bodies, and the rules of the device, against NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.ai100 import row_operators, row_rules
from qeff_ir.ir.operators import give_rules
from tests.backends.ai100.test_device_rules import DROPPED, model, numbers, opened, session

R, B, H, C, S, D = 4, 2, 3, 5, 4, 2
SCATTER_INPUTS = {"data": "f", "batch_index": "i", "position_ids": "i", "updates": "f"}
GATHER_INPUTS = {"data": "f", "batch_index": "i", "ctx_indices": "i", "comp_ctx_len": "i"}
FLAT_INPUTS = {"data": "f", "batch_index": "i", "ctx_indices": "i"}
MODULES = (row_operators, row_rules)
SCATTER = {m: session(m.CtxScatterCB, SCATTER_INPUTS) for m in MODULES}
GATHER = {m: session(m.CtxGatherCB, GATHER_INPUTS) for m in MODULES}
SCATTER_3D = {m: session(m.CtxScatterCB3D, SCATTER_INPUTS) for m in MODULES}
GATHER_3D = {m: session(m.CtxGatherCB3D, FLAT_INPUTS) for m in MODULES}
PLACE = st.one_of(st.integers(-2, C + 2), st.sampled_from([DROPPED, -DROPPED]))
ROW = st.sampled_from([-1, *range(R), R, DROPPED])
ROWS = st.lists(ROW, min_size=B, max_size=B, unique=True)
PLACES = st.lists(st.lists(PLACE, min_size=S, max_size=S, unique=True), min_size=B, max_size=B)


def unread(function: Any, inputs: dict[str, str]) -> Any:
    """A read whose rule came from the emulator, as in the emulator."""
    proto = model(function, inputs)
    give_rules(proto, unread=math.nan)
    return opened(proto)


UNREAD = unread(row_operators.CtxGatherCB, GATHER_INPUTS)
UNREAD_3D = unread(row_operators.CtxGatherCB3D, FLAT_INPUTS)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(ROWS, PLACES)
def test_a_row_or_a_slot_out_of_range_is_not_written(rows: list[int], places: list[list[int]]) -> None:
    data, updates = numbers(R, H, C, D), numbers(B, H, S, D)
    whole, flat = data.copy(), data[:, 0].copy()
    for b, row in enumerate(rows):
        for s, place in enumerate(places[b]):
            if 0 <= row < R and 0 <= place < C:
                whole[row, :, place] = updates[b, :, s]
                flat[row, place] = updates[b, 0, s]
    at = {"batch_index": np.array(rows)[:, None], "position_ids": np.array(places)}
    found = SCATTER[row_rules].run(None, {"data": data, "updates": updates, **at})[0]
    np.testing.assert_array_equal(found, whole)
    found = SCATTER_3D[row_rules].run(None, {"data": data[:, 0], "updates": updates[:, 0], **at})[0]
    np.testing.assert_array_equal(found, flat)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(ROWS, PLACES)
def test_a_row_or_a_slot_out_of_range_is_not_read(rows: list[int], places: list[list[int]]) -> None:
    data = numbers(R, H, C, D)
    whole = np.zeros((B, H, S, D), np.float32)
    for b, row in enumerate(rows):
        for s, place in enumerate(places[b]):
            if 0 <= row < R and 0 <= place < C:
                whole[b, :, s] = data[row, :, place]
    where, index = np.array(places), np.array(rows)[:, None]
    feed = {"data": data, "batch_index": index, "ctx_indices": where[:, None], "comp_ctx_len": np.array(S)}
    flat = {"data": data[:, 0], "batch_index": index, "ctx_indices": where}
    np.testing.assert_array_equal(GATHER[row_rules].run(None, feed)[0], whole)
    np.testing.assert_array_equal(GATHER_3D[row_rules].run(None, flat)[0], whole[:, 0])
    unseen = np.where(whole == 0, np.float32(np.nan), whole)
    np.testing.assert_array_equal(UNREAD.run(None, feed)[0], unseen)
    np.testing.assert_array_equal(UNREAD_3D.run(None, flat)[0], unseen[:, 0])


def test_in_range_both_bodies_agree() -> None:
    data, updates = numbers(R, H, C, D), numbers(B, H, S, D)
    at = {"batch_index": np.array([[3], [1]]), "position_ids": np.array([[4, 0, 2, 1], [1, 2, 3, 4]])}
    for sessions, part in ((SCATTER, slice(None)), (SCATTER_3D, 0)):
        written = [
            s.run(None, {"data": data[:, part], "updates": updates[:, part], **at})[0] for s in sessions.values()
        ]
        assert not np.array_equal(written[0], data[:, part])
        np.testing.assert_array_equal(*written)
    slots = np.array([[4, 0], [1, 1]])
    feed = {"data": data, "batch_index": at["batch_index"], "ctx_indices": slots[:, None], "comp_ctx_len": np.array(2)}
    read = [s.run(None, feed)[0] for s in GATHER.values()]
    np.testing.assert_array_equal(read[0][0], data[3][:, [4, 0]])
    np.testing.assert_array_equal(*read)
    flat = {"data": data[:, 0], "batch_index": at["batch_index"], "ctx_indices": slots}
    np.testing.assert_array_equal(*[s.run(None, flat)[0] for s in GATHER_3D.values()])


def test_the_shown_body_fails_out_of_range() -> None:
    feed = {"data": numbers(R, H, C, D), "batch_index": np.full((B, 1), R), "updates": numbers(B, H, S, D)}
    with pytest.raises(Exception, match="invalid indice"):
        SCATTER[row_operators].run(None, {**feed, "position_ids": np.zeros((B, S), np.int64)})
