"""What an ONNX Runtime session keeps between runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backends.onnxruntime.session import OrtSession
from qeff_ir.errors import RuntimeInputError
from tests import support


def test_a_reset_zeroes_the_states_where_they_are(tmp_path: Path) -> None:
    session = support.open_decoder(support.canonical("llama"), tmp_path).session
    assert isinstance(session, OrtSession)
    shape = support.OPTIONS.batch_size, support.OPTIONS.prefill_seq_len
    positions = np.broadcast_to(np.arange(shape[1]), shape).copy()
    session.run({"input_ids": np.ones(shape, np.int64), "position_ids": positions})
    states = list(session._residents.values())
    places = [value.data_ptr() for value in states]
    assert all(value.numpy().any() for value in states)
    session.reset()
    assert not any(value.numpy().any() for value in states)
    assert [value.data_ptr() for value in states] == places


def test_logits_stay_when_the_session_goes_on(tmp_path: Path) -> None:
    """They are the caller's, not the buffer that the next run writes to."""
    decoder = support.open_decoder(support.canonical("llama"), tmp_path)
    decoder.prefill(support.PROMPTS)
    first = decoder.decode([5, 9])
    kept = first.copy()
    assert not np.array_equal(decoder.decode([6, 7]), kept)
    np.testing.assert_array_equal(first, kept)


def test_tokens_of_another_type_are_refused(tmp_path: Path) -> None:
    """Their bytes would be read as numbers of the declared type."""
    session = support.open_decoder(support.canonical("llama"), tmp_path).session
    shape = support.OPTIONS.batch_size, support.OPTIONS.prefill_seq_len
    positions = np.broadcast_to(np.arange(shape[1]), shape).copy()
    with pytest.raises(RuntimeInputError, match="input_ids is int32: give int64"):
        session.run({"input_ids": np.ones(shape, np.int32), "position_ids": positions})
