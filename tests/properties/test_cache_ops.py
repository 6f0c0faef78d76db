"""The slot arithmetic of `CacheUpdate` and `CachePositions`, for every cache of at most eight slots."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qeff_ir.arrays import Array
from qeff_ir.ir import dialect

LONGEST = 8


def session(name: str, ring: bool) -> ort.InferenceSession:
    helper, proto = onnx.helper, dialect.OPS[name].to_function_proto()
    inputs = ["past", "new", "position_ids"] if name == "CacheUpdate" else ["past", "position_ids"]
    kinds = {"past": onnx.TensorProto.FLOAT, "new": onnx.TensorProto.FLOAT, "position_ids": onnx.TensorProto.INT64}
    kind = onnx.TensorProto.FLOAT if name == "CacheUpdate" else onnx.TensorProto.INT64
    graph = helper.make_graph(
        [helper.make_node(name, inputs, ["out"], domain=dialect.DOMAIN, ring=int(ring))],
        "call",
        [helper.make_tensor_value_info(n, kinds[n], None) for n in inputs],
        [helper.make_tensor_value_info("out", kind, None)],
    )
    imports = [helper.make_opsetid("", dialect.OPSET), helper.make_opsetid(dialect.DOMAIN, dialect.VERSION)]
    model = helper.make_model(graph, opset_imports=imports, functions=[proto], ir_version=11)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


UPDATE = {ring: session("CacheUpdate", ring) for ring in (False, True)}
POSITIONS = {ring: session("CachePositions", ring) for ring in (False, True)}


def stored(past: Array, new: Array, positions: Array, ring: bool) -> Array:
    """The meaning of `CacheUpdate`, token by token."""
    cache = past.copy()
    length = past.shape[2]
    for row, column in np.ndindex(positions.shape):
        position = int(positions[row, column])
        slot = position % length if ring else position
        if position >= 0 and slot < length:
            cache[row, :, slot] = new[row, :, column]
    return cache


def held(positions: Array, length: int, ring: bool) -> Array:
    """The meaning of `CachePositions`: the positions that a cache filled from 0 on holds."""
    result = np.tile(np.arange(length), (positions.shape[0], 1))
    if ring:
        result[:] = dialect.UNWRITTEN
        for row, last in enumerate(positions.max(axis=1)):
            for position in range(int(last) + 1):
                result[row, position % length] = position
    return result


def runs(length: int, ring: bool) -> list[Array]:
    """Position ids of every run: any chunk size, any padding at its end, any first position (one a row)."""
    furthest = 2 * length + 1 if ring else length + 2
    found = []
    for seq in range(1, length + 1):
        for tokens in range(seq + 1):
            first = np.arange(furthest)[:, None]
            positions = first + np.arange(seq)
            positions[:, tokens:] = -1
            found.append(positions.astype(np.int64))
    return found


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("length", range(1, LONGEST + 1))
def test_every_run_is_stored_where_it_belongs(length: int, ring: bool) -> None:
    rng = np.random.default_rng(length)
    for positions in runs(length, ring):
        rows, seq = positions.shape
        past = rng.standard_normal((rows, 2, length, 3)).astype(np.float32)
        new = rng.standard_normal((rows, 2, seq, 3)).astype(np.float32)
        out = UPDATE[ring].run(None, {"past": past, "new": new, "position_ids": positions})[0]
        np.testing.assert_array_equal(out, stored(past, new, positions, ring))


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("length", range(1, LONGEST + 1))
def test_every_slot_tells_its_position(length: int, ring: bool) -> None:
    for positions in runs(length, ring):
        past = np.zeros((positions.shape[0], 1, length, 1), np.float32)
        out = POSITIONS[ring].run(None, {"past": past, "position_ids": positions})[0]
        np.testing.assert_array_equal(out, held(positions, length, ring))


def compositions(total: int) -> list[list[int]]:
    """All ways to cut `total` tokens into chunks."""
    cuts = itertools.product([False, True], repeat=total - 1)
    found = []
    for cut in cuts:
        edges = [0, *(i + 1 for i, c in enumerate(cut) if c), total]
        found.append([b - a for a, b in itertools.pairwise(edges)])
    return found


@pytest.mark.parametrize(("length", "ring"), [(8, False), (5, True), (8, True)])
def test_the_cut_into_chunks_does_not_matter(length: int, ring: bool) -> None:
    """However eight tokens are cut (no chunk longer than the ring), the cache is the same."""
    total = 8
    tokens = np.random.default_rng(0).standard_normal((1, 1, total, 2)).astype(np.float32)
    expected = stored(np.zeros((1, 1, length, 2), np.float32), tokens, np.arange(total)[None], ring)
    cuts = [c for c in compositions(total) if max(c) <= length]
    assert len(cuts) > 100
    for chunks in cuts:
        cache, at = np.zeros((1, 1, length, 2), np.float32), 0
        for size in chunks:
            feeds = {"past": cache, "new": tokens[:, :, at : at + size]}
            cache = UPDATE[ring].run(None, feeds | {"position_ids": np.arange(at, at + size)[None]})[0]
            at += size
        np.testing.assert_array_equal(cache, expected)


def test_the_check_sees_one_slot_off() -> None:
    """The kill test: a cache written one slot further is not what the reference says."""
    past, new = np.zeros((1, 1, 4, 1), np.float32), np.ones((1, 1, 2, 1), np.float32)
    right, wrong = (stored(past, new, np.array([[p, p + 1]]), ring=True) for p in (3, 4))
    assert not np.array_equal(right, wrong)
