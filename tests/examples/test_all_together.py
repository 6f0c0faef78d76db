"""A pass from outside and five of ours in one package, which verifies drafts in any rows of its caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backends import find_backend
from passes.blocked_attention import BlockedAttention
from passes.compute_context_length import ComputeContextLength
from passes.fuse_products import FuseProducts
from passes.replicate_kv_heads import ReplicateKvHeads
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import Run
from qeff_ir.passing import Pipeline, Report, run_pipeline
from qeff_ir.runtime.runs import logits_of
from qeff_ir.runtime.session import Session
from qeff_ir.testing.kit import hold_package
from tests import support
from tests.examples.cache_rows import CacheRows

K, ROWS = 3, 5
UNDRAWN = 6
"""More tokens than the chunks of drawn requests have."""
BLOCKED = BlockedAttention(num_kv_blocks=7)


def all_six(lengths: ComputeContextLength, blocked: BlockedAttention, k: int = K) -> Pipeline:
    adapted = Pipeline.parse(find_backend("ai100").pipeline).with_options("last-logits", keep=k)
    copied = adapted.insert_before("last-logits", ReplicateKvHeads(devices=4))
    heads = copied.insert_before("last-logits", FuseProducts())
    lowered = heads.insert_after("kv-retention", lengths).insert_after("compute-context-length", CacheRows(ROWS))
    return lowered.insert_before("attention", blocked)


def opened(name: str, folder: Path, *, check: int = 1) -> tuple[Module, Report, Session]:
    module, backend = support.canonical(name), find_backend("ai100")
    report = run_pipeline(module, all_six(ComputeContextLength("16,48", "12,24,48"), BLOCKED), check=check)
    backend.check(module, support.OPTIONS)
    backend.emit(module, folder, support.OPTIONS)
    return module, report, backend.open(folder, threads=1)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt-oss"])
def test_they_compose(name: str, tmp_path: Path) -> None:
    """Two requests in rows 4 and 1, whose drafts are partly rejected, while others come and go in rows 0 to 3."""
    module, report, session = opened(name, tmp_path, check=2)
    for run in report.runs:
        ours = run.id in (
            "replicate-kv-heads",
            "fuse-products",
            "last-logits",
            "cache-rows",
            "blocked-attention",
            "gather-blocks",
        )
        assert not ours or sum(run.stats.fired.values()) > 0, run.id
    lengths = {s.symbols.get("comp_ctx_lengths") for s in module.specializations}
    assert lengths == ({None} if all(s.ring for s in module.states) else {12, 16, 24, 48})
    random, end = np.random.default_rng(0), 44
    rows = random.integers(1, 97, (2, end)).tolist()
    expected = [np.stack([support.forward(name, row[: i + 1]) for i in range(end)]) for row in rows]
    own, start = np.array([4, 1]), np.tile(np.arange(8), (2, 1))
    found = logits_of(session, Run(np.array([r[:8] for r in rows]), start, cache_rows=own))[:, 0]
    np.testing.assert_allclose(found, [e[7] for e in expected], atol=1e-4)
    done, rejected, tokens = np.array([8, 8]), 0, np.zeros((2, K), np.int64)
    while (done + K <= end).all():
        strangers = Run(random.integers(1, 97, (2, 8)), start, cache_rows=np.array([0, 3]))
        logits_of(session, strangers)
        accepted = random.integers(0, K, 2)
        tokens = np.array([r[d : d + K] for r, d in zip(rows, done, strict=True)])
        for row, count in enumerate(accepted):
            tokens[row, 1 + count :] = (tokens[row, 1 + count :] + 1) % 97
        rejected += int((K - 1 - accepted).sum())
        turned = slice(None, None, -1)  # the rows of a run are in another order than before
        positions = done[:, None] + np.arange(K)
        run = Run(tokens[turned].copy(), positions[turned].copy(), cache_rows=own[turned].copy(), keep=K)
        found = logits_of(session, run)[turned]
        for row, count in enumerate(accepted):
            at = int(done[row])
            np.testing.assert_allclose(found[row, : count + 1], expected[row][at : at + count + 1], atol=1e-4)
        done = done + 1 + accepted
    assert rejected > 5
    wrong = logits_of(session, Run(tokens, done[:, None] + np.arange(K) - K, cache_rows=np.array([1, 4]), keep=K))
    assert np.abs(wrong - found).max() > 1e-3  # each has the other's caches


def test_the_contract_has_their_inputs_in_its_order(tmp_path: Path) -> None:
    module, _, session = opened("llama", tmp_path, check=4)
    names = [str(value.name) for value in module.graph.inputs]
    assert names[-3:] == ["comp_ctx_lengths", "batch_index", "num_logits_to_keep"]
    found = [(s.name, s.phase, s.symbols["comp_ctx_lengths"]) for s in session.specializations]
    assert found == [
        ("Prefill_0", "prefill", 16),
        ("Prefill_1", "prefill", 48),
        ("Decode_0", "decode", 12),
        ("Decode_1", "decode", 24),
        ("Decode_2", "decode", 48),
    ]


def test_they_hold_on_drawn_decoders() -> None:
    lengths, blocked = ComputeContextLength("5,99", "4,8,99"), BlockedAttention(num_kv_blocks=3)
    held = hold_package(blocked, target="ai100", pipeline=all_six(lengths, blocked, UNDRAWN), examples=20)
    assert held.changed > 0 and "no specialization bounds the number of queries or keys" not in held.missed
