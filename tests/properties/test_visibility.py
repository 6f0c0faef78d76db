"""Which tokens a query sees, for every prompt length, window and chunk size of small contexts.

The model here is a decoder that tells what it sees: a token's key and value are its position as a one-hot row, queries
are zero, so that attention spreads evenly over what the mask shows, and the logits are one over the number of visible
tokens at each visible position, 0 elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from backends import find_backend
from backends.options import CompileOptions
from qeff_ir.arrays import Array
from qeff_ir.ir import dialect, operators
from qeff_ir.ir.module import Dim, Module
from qeff_ir.ir.ports import LOGITS
from qeff_ir.ir.residents import Resident
from qeff_ir.passing.base import Rewriter
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.specialize import specialize

CTX = 8
FLOAT, INT = ir.DataType.FLOAT, ir.DataType.INT64


def teller(window: int | None, shift: int = 0) -> Module:
    """The model; `shift` is a fault: how much further than the window the mask reaches."""
    shape = ("batch_size", 1, "ctx_len", CTX)
    states = [Resident(0, "key", shape, FLOAT, window), Resident(0, "value", shape, FLOAT, window)]
    ids, positions = (
        ir.val(n, dtype=INT, shape=ir.Shape(["batch_size", "seq_len"])) for n in ("input_ids", "position_ids")
    )
    pasts = [ir.val(s.input, dtype=FLOAT, shape=ir.Shape(s.shape)) for s in states]
    end = ir.node("Identity", [ids])
    graph = ir.Graph([ids, positions, *pasts], [], nodes=[end], opset_imports={"": dialect.OPSET, "qeff": 1})
    module = Module(ir.Model(graph, ir_version=11), "Teller", states, properties={"canonical"})
    module.dims = {n: Dim(n) for n in ("batch_size", "seq_len", "ctx_len")}
    b = Rewriter(module, "").at(end)
    one_hot = b("OneHot", ids, b.const(CTX), b.const([0, 1], np.float32), axis=-1)
    new = b("Unsqueeze", one_hot, b.const([1]), shape=["batch_size", 1, "seq_len", CTX], dtype=FLOAT)
    caches = [b("CacheUpdate", p, new, positions, domain="qeff", shape=shape, dtype=FLOAT) for p in pasts]
    slots = b("CachePositions", pasts[0], positions, domain="qeff", shape=["batch_size", "ctx_len"], dtype=INT)
    key, query = b("Unsqueeze", slots, b.const([1, 2])), b("Unsqueeze", positions, b.const([1, 3]))
    mask = b("LessOrEqual", key, query)
    if window is not None:
        mask = b("And", mask, b("Greater", key, b("Sub", query, b.const(window + shift))))
    zero = b("Mul", new, b.const(0.0, np.float32), shape=new.shape, dtype=FLOAT)
    seen = b("Attention", zero, *caches, mask, scale=1.0, softcap=0.0, shape=new.shape, dtype=FLOAT)
    rows = b("Squeeze", seen, b.const([1]), shape=["batch_size", "seq_len", CTX], dtype=FLOAT)
    head = b.const(np.eye(CTX), np.float32)
    logits = b("MatMul", rows, head, shape=["batch_size", "seq_len", CTX], dtype=FLOAT)
    graph.remove(end, safe=True)
    logits.name = "logits"
    module.declare(logits, LOGITS)
    for state, cache in zip(states, caches, strict=True):
        cache.name = state.output
    graph.outputs.extend([logits, *caches])
    operators.attach(module.model)
    return module


def decoder(module: Module, chunk: int, folder: Path, ring: str = "auto") -> Decoder:
    options = CompileOptions(prefill_seq_len=chunk, ctx_len=CTX, batch_size=2)
    specialize(module, options)
    backend = find_backend("onnxruntime")
    assert "layout=tensor-scatter" in backend.pipeline
    steps = backend.pipeline.replace("layout=tensor-scatter", f"layout=tensor-scatter ring={ring}")
    run_pipeline(module, Pipeline.parse(steps))
    backend.emit(module, folder, options)
    return Decoder(backend.open(folder, threads=1))


def visible(length: int, window: int | None) -> Array:
    """What the last of `length` tokens sees."""
    first = 0 if window is None else max(0, length - window)
    row = np.zeros(CTX, np.float32)
    row[first:length] = 1.0 / (length - first)
    return row


def disagreements(driver: Decoder, window: int | None) -> int:
    """How often a row sees something else than it should, over all pairs of prompts, decoded to the end."""
    wrong = 0
    for one in range(CTX + 1):
        for other in range(one == 0, CTX + 1):
            lengths = [one, other]
            logits = driver.prefill([list(range(n)) for n in lengths])
            while True:
                for row, length in enumerate(lengths):
                    if length:
                        wrong += not np.allclose(logits[row], visible(length, window), rtol=1e-6, atol=1e-6)
                if max(lengths) == CTX:
                    break
                logits = driver.decode(lengths)  # the next token is its position
                lengths = [n + 1 if n else 0 for n in lengths]
    return wrong


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 8])
def test_every_token_sees_just_its_window(window: int | None, chunk: int, tmp_path: Path) -> None:
    module = teller(window)
    driver = decoder(module, chunk, tmp_path)
    kernels = {n.op_type for n in module.graph}
    assert ("GroupQueryAttention" in kernels) == (window is None)
    assert all(s.ring for s in module.states) == (window is not None and window + chunk - 1 < CTX)
    assert disagreements(driver, window) == 0


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("window", [1, 3])
def test_a_ring_can_be_forbidden(window: int, chunk: int, tmp_path: Path) -> None:
    module = teller(window)
    driver = decoder(module, chunk, tmp_path, ring="off")
    assert not any(s.ring for s in module.states)
    assert disagreements(driver, window) == 0


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_window_that_is_off_by_one_is_seen(shift: int, tmp_path: Path) -> None:
    assert disagreements(decoder(teller(3, shift), 2, tmp_path), 3) > 100


def test_a_ring_that_is_one_slot_short_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from passes import kv_retention

    right = kv_retention._ring_length
    monkeypatch.setattr(kv_retention, "_ring_length", lambda module, window: right(module, window) - 1)
    assert disagreements(decoder(teller(3), 3, tmp_path), 3) > 0
