"""One model object in several threads: a request has the session from its prefill to its last token."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from backends import find_backend
from qeff_ir.errors import QeffError, RuntimeInputError
from tests import support
from tests.threads.crowd import ASK, COUNT, NAMES, PROMPTS, TARGETS, THREADS, asking, compiled, fresh, theirs, together

EACH = max(COUNT // THREADS, 1)
both = pytest.mark.parametrize("target", TARGETS)


@both
def test_one_model(target: str) -> None:
    model = fresh("llama", target)
    assert together([asking(model, "llama", i, EACH) for i in range(THREADS)]) == []


@both
def test_two_models(target: str) -> None:
    models = {name: fresh(name, target) for name in NAMES}
    jobs = [asking(models[NAMES[i % 2]], NAMES[i % 2], i, EACH) for i in range(THREADS)]
    assert together(jobs) == []


@both
def test_first_use_opens_one_session(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, backend = fresh("llama", target, opened=False), find_backend(target)
    opened: list[Path] = []
    open_session = backend.open

    def counting(folder: Path, **kwargs: Any) -> Any:
        opened.append(folder)
        return open_session(folder, **kwargs)

    monkeypatch.setattr(backend, "open", counting)
    assert together([[lambda: model.runner() and None] for _ in range(THREADS)]) == []
    assert len(opened) == 1


class _Words:
    """A tokenizer of numbers, which says its own name."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


@both
def test_lists_of_texts(target: str) -> None:
    model = fresh("llama", target)

    def asks(order: list[int]) -> Callable[[], Any]:
        texts = [" ".join(map(str, PROMPTS[i][0].tolist())) for i in order]
        wanted = [theirs("llama", i)[0, PROMPTS[i].shape[1] :].tolist() for i in order]

        def job() -> Any:
            return model.generate(prompts=texts, tokenizer=_Words(), **ASK).generated_ids == wanted  # pyright: ignore[reportArgumentType]

        return job

    orders = [[i, (i + 1) % THREADS, (i + 3) % THREADS] for i in range(THREADS)]
    assert together([[asks(order)] * max(EACH // 3, 1) for order in orders]) == []


class _Raises(BaseStreamer, LogitsProcessor):
    """Fails at the third token, as a streamer or as a logits processor."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error, self.count = error, 0

    def put(self, value: torch.Tensor) -> None:
        self.count += 1
        if self.count == 3:
            raise self.error

    def end(self) -> None:
        pass

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.put(input_ids)
        return scores


@both
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RuntimeInputError])
def test_a_request_that_fails_in_the_middle_gives_the_session_back(target: str, error: type[BaseException]) -> None:
    model = compiled("llama", target)

    def fails(**how: Any) -> Callable[[], Any]:
        def job() -> Any:
            with pytest.raises(error):
                model.generate(PROMPTS[0], **how, **ASK)

        return job

    def failing() -> list[Callable[[], Any]]:
        processors = LogitsProcessorList([_Raises(error)])
        return [fails(streamer=_Raises(error)), fails(logits_processor=processors), *asking(model, "llama", 1, 2)]

    assert together([failing() for _ in range(3)] + [asking(model, "llama", i, 2) for i in range(3)]) == []
    assert asking(model, "llama", 2, 1)[0]() is True


class _Calls(BaseStreamer, LogitsProcessor):
    """Does something in the middle of a request."""

    def __init__(self, what: Callable[[], Any]) -> None:
        self.what, self.raised = what, list[QeffError]()

    def put(self, value: torch.Tensor) -> None:
        try:
            self.what()
        except QeffError as error:
            self.raised.append(error)

    def end(self) -> None:
        pass

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.put(input_ids)
        return scores


@both
@pytest.mark.parametrize("place", ["streamer", "logits_processor"])
def test_a_request_within_a_request_is_refused_and_the_outer_one_is_right(target: str, place: str) -> None:
    model = compiled("llama", target)
    calls = _Calls(lambda: model.generate(PROMPTS[1], **ASK))
    how: Any = {place: calls if place == "streamer" else LogitsProcessorList([calls])}
    assert torch.equal(model.generate(PROMPTS[0], **how, **ASK), theirs("llama", 0))
    assert len(calls.raised) >= ASK["max_new_tokens"]
    assert "a request to this model is running in this thread" in str(calls.raised[0])
    assert isinstance(calls.raised[0], RuntimeInputError)


@both
def test_another_model_may_answer_within_a_request(target: str) -> None:
    outer, inner = compiled("llama", target), compiled("qwen2", target)
    found: list[torch.Tensor] = []
    calls = _Calls(lambda: found.append(inner.generate(PROMPTS[1], **ASK)))
    assert torch.equal(outer.generate(PROMPTS[0], streamer=calls, **ASK), theirs("llama", 0))
    assert calls.raised == [] and all(torch.equal(f, theirs("qwen2", 1)) for f in found) and len(found) > 3


def test_a_stream_that_is_read_slowly_lets_others_go_on() -> None:
    model = compiled("llama", "onnxruntime")
    streamer = TextIteratorStreamer(_Words())  # pyright: ignore[reportArgumentType]
    thread = threading.Thread(target=lambda: model.generate(PROMPTS[0], streamer=streamer, **ASK))
    thread.start()
    first = next(iter(streamer))
    assert asking(model, "llama", 1, 1)[0]() is True
    rest = "".join([first, *streamer])
    thread.join()
    assert rest.split() == [str(t) for t in theirs("llama", 0)[0].tolist()]


def test_a_step_outside_of_a_request_is_refused() -> None:
    runner = compiled("llama", "onnxruntime").runner()
    with pytest.raises(RuntimeInputError, match="a step of generation outside of generate"):
        runner(input_ids=PROMPTS[0], first=True)


@both
def test_by_hand_a_thread_goes_on_with_its_own_request_alone(target: str) -> None:
    decoder = fresh("llama", target).runner(threads=1).decoder
    rows = [row.tolist() for row in PROMPTS]

    def steps(index: int, first: np.ndarray[Any, Any], count: int) -> bool:
        tokens = [int(first.argmax())]
        for _ in range(count - 1):
            tokens.append(int(decoder.decode(tokens[-1:]).argmax()))
        return [*rows[index][0], *tokens] == theirs("llama", index)[0].tolist()

    first = decoder.prefill(rows[0])
    other: list[Any] = []
    thread = threading.Thread(target=lambda: other.append(decoder.prefill(rows[1])))
    thread.start()
    thread.join()
    with pytest.raises(
        RuntimeInputError, match=r"another thread's: prefill and decode in one thread, inside `with dec"
    ):
        decoder.decode([int(first.argmax())])

    def request(index: int) -> Callable[[], Any]:
        def job() -> bool:
            with decoder.request():
                return bool(steps(index, decoder.prefill(rows[index]), ASK["max_new_tokens"]))

        return job

    assert together([[request(i)] * 3 for i in range(THREADS)]) == []
    with decoder.request(), pytest.raises(RuntimeInputError, match="running in this thread"):
        decoder.request()


def test_a_thread_that_waits_for_its_turn_takes_nothing_from_the_one_that_has_it() -> None:
    decoder = fresh("llama", "onnxruntime").runner(threads=1).decoder
    rows, waits, join = [row.tolist() for row in PROMPTS], threading.Event(), decoder.turns.join

    def tell() -> AbstractContextManager[object]:
        if not decoder.turns.mine:
            waits.set()
        return join()

    decoder.turns.join = tell
    expected = [decoder.prefill(rows[0]), decoder.decode([7])]
    waits.clear()
    with decoder.request():
        found = [decoder.prefill(rows[0])]
        other = threading.Thread(target=lambda: decoder.prefill(rows[1]))
        other.start()
        assert waits.wait(60)
        found.append(decoder.decode([7]))
    other.join()
    np.testing.assert_array_equal(found, expected)


def test_a_run_that_fails_leaves_nothing_to_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = fresh("llama", "onnxruntime").runner(threads=1).decoder
    decoder.prefill(PROMPTS[0].tolist())
    run = decoder.session.run

    def stops(inputs: Any) -> Any:
        run(inputs)
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder.session, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        decoder.decode([5])
    monkeypatch.undo()
    with pytest.raises(RuntimeInputError, match="nothing to continue"):
        decoder.decode([5])


@both
def test_generating_while_the_model_is_compiled_again(target: str) -> None:
    model = fresh("llama", target)
    model._source = model._checkpoint = support.Lowered("llama")
    contexts = [48, 40]
    runners = []

    def compiles() -> None:
        for ctx_len in contexts * 2:
            model.compile(**TARGETS[target], batch_size=1, prefill_seq_len=8, ctx_len=ctx_len)
            runners.append(model.runner())

    assert together([[compiles]] + [asking(model, "llama", i, EACH) for i in range(4)]) == []
    assert [r.decoder.ctx_len for r in runners] == contexts * 2


def test_a_compiled_model_is_pickled_before_its_first_use() -> None:
    import pickle

    model = fresh("llama", "onnxruntime", opened=False)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.generate(PROMPTS[0], **ASK), theirs("llama", 0))
