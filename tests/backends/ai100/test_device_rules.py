"""The device ops: the bodies that the compiler is shown, and the rules of the device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.ai100 import device_rules, operators
from qeff_ir.ir.operators import give_rules

B, H, C, S, D = 2, 3, 5, 4, 2
DROPPED = 2**31 - 1


def model(function: Any, inputs: dict[str, str], **attributes: Any) -> onnx.ModelProto:
    """A model of one call."""
    helper = onnx.helper
    kinds = {"f": onnx.TensorProto.FLOAT, "i": onnx.TensorProto.INT64}
    proto = function.to_function_proto()
    graph = helper.make_graph(
        [helper.make_node(proto.name, list(inputs), ["out"], domain=proto.domain, **attributes)],
        "call",
        [helper.make_tensor_value_info(n, kinds[k], None) for n, k in inputs.items()],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(proto.domain, 1)]
    return helper.make_model(graph, opset_imports=imports, functions=[proto], ir_version=8)


def opened(proto: onnx.ModelProto) -> Any:
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def session(function: Any, inputs: dict[str, str], **attributes: Any) -> Any:
    return opened(model(function, inputs, **attributes))


def unread(function: Any, inputs: dict[str, str]) -> Any:
    """A read whose rule came from the emulator, as in the emulator."""
    proto = model(function, inputs)
    give_rules(proto, unread=math.nan)
    return opened(proto)


SCATTER_INPUTS = {"data": "f", "position_ids": "i", "updates": "f"}
GATHER_INPUTS = {"data": "f", "ctx_indices": "i", "comp_ctx_len": "i"}
SCATTER = {m: session(m.CtxScatter, SCATTER_INPUTS) for m in (operators, device_rules)}
GATHER = {m: session(m.CtxGather, GATHER_INPUTS) for m in (operators, device_rules)}
UNREAD = unread(operators.CtxGather, GATHER_INPUTS)
BLOCK_INPUTS, BLOCK_OF_ROWS = {"data": "f", "ctx_indices": "i"}, {"data": "f", "batch_index": "i", "ctx_indices": "i"}
BLOCKED = {
    "shown": session(operators.CtxGatherBlockedKV, BLOCK_INPUTS),
    "device": unread(operators.CtxGatherBlockedKV, BLOCK_INPUTS),
}
BLOCKED_ROWS = {
    "shown": session(operators.CtxGatherBlockedKVCB, BLOCK_OF_ROWS),
    "device": unread(operators.CtxGatherBlockedKVCB, BLOCK_OF_ROWS),
}
INDEX = st.one_of(st.integers(-3, C + 3), st.sampled_from([DROPPED, -DROPPED]))


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.lists(INDEX, min_size=S, max_size=S, unique=True), min_size=B, max_size=B))
def test_a_write_out_of_range_is_dropped(positions: list[list[int]]) -> None:
    data, updates = numbers(B, H, C, D), numbers(B, H, S, D)
    expected = data.copy()
    for b, row in enumerate(positions):
        for s, slot in enumerate(row):
            if 0 <= slot < C:
                expected[b, :, slot] = updates[b, :, s]
    feed = {"data": data, "position_ids": np.array(positions), "updates": updates}
    np.testing.assert_array_equal(SCATTER[device_rules].run(None, feed)[0], expected)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.lists(INDEX, min_size=4, max_size=4), min_size=1, max_size=B).filter(lambda x: len(x) in (1, B)))
def test_a_read_out_of_range_gives_zeros_or_what_it_is_told_to(slots: list[list[int]]) -> None:
    data = numbers(B, H, C, D)
    expected = np.zeros((B, H, 4, D), np.float32)
    for b in range(B):
        for n, slot in enumerate(slots[b % len(slots)]):
            if 0 <= slot < C:
                expected[b, :, n] = data[b, :, slot]
    feed = {"data": data, "ctx_indices": np.array(slots)[:, None], "comp_ctx_len": np.array(4)}
    np.testing.assert_array_equal(GATHER[device_rules].run(None, feed)[0], expected)
    np.testing.assert_array_equal(UNREAD.run(None, feed)[0], np.where(expected == 0, np.float32(np.nan), expected))


def test_in_range_both_bodies_agree() -> None:
    data, updates = numbers(B, H, C, D), numbers(B, H, S, D)
    feed = {"data": data, "position_ids": np.array([[4, 0, 2, 1], [1, 2, 3, 4]]), "updates": updates}
    written = [s.run(None, feed)[0] for s in SCATTER.values()]
    assert not np.array_equal(written[0], data)
    np.testing.assert_array_equal(*written)
    feed = {"data": data, "ctx_indices": np.array([[[4, 0]], [[1, 1]]]), "comp_ctx_len": np.array(2)}
    read = [s.run(None, feed)[0] for s in GATHER.values()]
    np.testing.assert_array_equal(read[0][0], data[0][:, [4, 0]])
    np.testing.assert_array_equal(*read)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    st.lists(st.lists(INDEX, min_size=4, max_size=4), min_size=B, max_size=B),
    st.permutations([0, 1, 2, -1, DROPPED]),
)
def test_a_block_is_read_in_the_rows_that_are_named(slots: list[list[int]], rows: list[int]) -> None:
    """Without rows, in those of the run; a row or a slot out of range gives what the rule is told to."""
    data, named = numbers(3, H, C, D), rows[:B]
    for indices, owners in ((np.array(slots), named), (np.clip(slots, 0, C - 1), [2, 0])):
        expected = np.full((B, H, 4, D), np.nan, np.float32)
        for b, n in np.ndindex(B, 4):
            if 0 <= owners[b] < 3 and 0 <= indices[b][n] < C:
                expected[b, :, n] = data[owners[b], :, indices[b][n]]
        feed = {"data": data, "batch_index": np.array(owners)[:, None], "ctx_indices": indices[:, None]}
        bodies = [BLOCKED_ROWS["device"], *([BLOCKED_ROWS["shown"]] if owners == [2, 0] else [])]
        for body in bodies:
            np.testing.assert_array_equal(body.run(None, feed)[0], expected)
        if owners == [2, 0]:
            own = {"data": data[owners], "ctx_indices": np.repeat(indices[:, None], H, axis=1)}
            for body in BLOCKED.values():
                np.testing.assert_array_equal(body.run(None, own)[0], expected)


def test_the_shown_body_fails_out_of_range() -> None:
    """So the exchange of the bodies is needed, and a test that ran without it would notice."""
    feed = {"data": numbers(B, H, C, D), "position_ids": np.full((B, S), DROPPED), "updates": numbers(B, H, S, D)}
    with pytest.raises(Exception, match="invalid indice"):
        SCATTER[operators].run(None, feed)


def test_rms_norm() -> None:
    x, weight = numbers(2, 3, 8), np.linspace(-1, 2, 8, dtype=np.float32)
    norm = session(operators.CustomRMSNorm, {"hidden_states": "f", "weight": "f"}, epsilon=0.25)
    exact = x.astype(np.float64)
    exact = weight * exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 0.25)
    np.testing.assert_allclose(norm.run(None, {"hidden_states": x, "weight": weight})[0], exact, rtol=1e-6, atol=1e-7)
