"""The driver of a session: chunks, idle rows, and what it refuses."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qeff_ir import numerics
from qeff_ir.errors import RuntimeInputError
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.engine import Engine
from qeff_ir.runtime.jobs import Job
from qeff_ir.runtime.token_table import TokenTable
from tests import support


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder: Path = tmp_path_factory.mktemp("decoder")
    return support.open_decoder(support.canonical("llama"), folder)


@pytest.mark.parametrize("lengths", [(1, 1), (8, 8), (9, 16), (17, 1), (48, 3), (0, 12), (23, 0)])
def test_prefill_answers_every_row(lengths: tuple[int, int], decoder: Decoder) -> None:
    rows = support.prompts(lengths, seed=5)
    logits = decoder.prefill(rows)
    assert decoder.positions.tolist() == [n or -1 for n in lengths]
    limit = numerics.bound(numerics.depth(support.lowered("llama")))
    for row, tokens in enumerate(rows):
        if tokens:
            expected = support.forward("llama", tokens)
            assert numerics.error_over_rms(logits[row], expected) <= limit


@pytest.mark.parametrize("nothing", [3, -1, 10**6])
def test_an_idle_row_stays_idle(nothing: int, decoder: Decoder) -> None:
    """Whatever is given for it, if it is a token or not."""
    (row,) = support.prompts([5])
    decoder.prefill([[], row])
    for token in (7, 8):
        logits = decoder.decode([nothing, token])
    assert decoder.positions.tolist() == [-1, 7]
    assert decoder.timings.tokens == 2
    error = numerics.error_over_rms(logits[1], support.forward("llama", [*row, 7, 8]))
    assert error <= numerics.bound(numerics.depth(support.lowered("llama")))


def test_a_decoder_that_nobody_holds_is_gone_at_once_with_its_session(tmp_path: Path) -> None:
    """Its caches and weights may be most of the memory: they do not wait for a garbage collection."""
    made = support.open_decoder(support.canonical("llama"), tmp_path)
    made.prefill(support.prompts([3, 4]))
    engine = Engine(made.session, turns=made.turns)
    assert len(list(engine.submit(Job([5, 6], 2)))) == 2
    engine.close()
    gone = [weakref.ref(thing) for thing in (made, made.session, engine)]
    gc.collect()
    gc.disable()
    try:
        del made, engine
        assert [thing() for thing in gone] == [None] * 3
    finally:
        gc.enable()


def test_rows_do_not_see_each_other(decoder: Decoder) -> None:
    one, other = support.prompts([10, 20], seed=9)
    first = decoder.prefill([one, other])[0]
    second = decoder.prefill([one, support.prompts([20], seed=10)[0]])[0]
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[5]], "compiled for a batch of 2, but got 1 rows: compile with batch_size=1, or pass 2"),
        ([[5]] * 3, "but got 3 rows"),
        ([[], []], "every prompt is empty"),
        ([[5] * 49, [5]], "a prompt has 49 tokens, the model is compiled for a context of 48"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(rows: list[list[int]], message: str, decoder: Decoder) -> None:
    with pytest.raises(RuntimeInputError) as error:
        decoder.prefill(rows)
    assert message in str(error.value)


def test_a_full_context_is_told(decoder: Decoder) -> None:
    decoder.prefill([[5] * 47, [5]])
    decoder.decode([6, 6])
    with pytest.raises(RuntimeInputError, match="the context of 48 tokens is full"):
        decoder.decode([6, 6])


@pytest.mark.parametrize("tokens", [[6], [6, 6, 6], []])
def test_a_step_has_a_token_for_each_row(tokens: list[int], decoder: Decoder) -> None:
    """One token is not said to every row in silence; the request goes on."""
    first = decoder.prefill([[5], [7]])
    with pytest.raises(RuntimeInputError, match=rf"there are {len(tokens)} tokens for the 2 rows of the batch"):
        decoder.decode(tokens)
    assert np.isfinite(decoder.decode([6, 6])).all() and np.isfinite(first).all()


def test_decode_needs_a_prefill(decoder: Decoder) -> None:
    with pytest.raises(RuntimeInputError, match="call prefill first"):
        Decoder(decoder.session).decode([1, 1])


def test_a_slot_without_an_adapter_is_refused(tmp_path: Path) -> None:
    step = 'lora{mode=slots n=2 rank=2 targets="q_proj"}'
    pipeline = Pipeline.parse(support.rest_of("onnxruntime")).insert_after("last-logits", step)
    decoder = support.open_decoder(support.canonical("llama"), tmp_path, str(pipeline))
    decoder.lora_ids[1] = 2
    decoder.prefill([[5], [6]])
    decoder.lora_ids[1] = 3
    with pytest.raises(RuntimeInputError, match=r"lora_ids is \[0, 3\]: give 2 numbers of at most 2"):
        decoder.prefill([[5], [6]])


@pytest.mark.parametrize("token", [-1, 3])
def test_a_token_outside_the_table_of_the_host_is_refused(token: int) -> None:
    table = TokenTable(ir.tensor(np.arange(6, dtype=np.float32).reshape(3, 2)))
    with pytest.raises(RuntimeInputError, match="a token is outside the table of 3: use the model's tokenizer"):
        table.vectors(np.array([[0, token]]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": (2, 5), "position_ids": (2, 5)}, r"are not of a compiled shape: \[2, 8\] or \[2, 1\]"),
        ({"input_ids": (2, 8), "position_ids": (2, 1)}, "are not of a compiled shape"),
        ({"input_ids": (2, 8)}, "the inputs are input_ids and position_ids, not input_ids"),
        ({"input_ids": (2, 1), "position_ids": (2, 1), "mask": (2, 1)}, "not input_ids, mask, position_ids"),
    ],
)
def test_a_session_takes_only_its_shapes(inputs: dict[str, tuple[int, int]], message: str, decoder: Decoder) -> None:
    with pytest.raises(RuntimeInputError, match=message):
        decoder.session.run({name: np.zeros(shape, np.int64) for name, shape in inputs.items()})
