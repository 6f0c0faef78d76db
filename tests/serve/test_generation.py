"""Completions and chats as OpenAI's client asks for them, alone, streamed, and many at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from .servers import NAME, Running, seen

Ask = Callable[..., str]
SUMS = ["47+38=", "5+8=", "99+99=", "12+34=46;60+7=", "3+4=", "81+9="]


def told(client: openai.OpenAI, prompt: str, **more: Any) -> tuple[str, str | None, Any]:
    """The text of a stream, how it ended, and its usage."""
    text, finish, usage = "", None, None
    options: Any = {"include_usage": True}
    stream = client.completions.create(
        model=NAME, prompt=prompt, stream=True, stream_options=options, temperature=0, **more
    )
    for chunk in stream:
        for choice in chunk.choices:
            text, finish = text + choice.text, choice.finish_reason
        usage = chunk.usage or usage
    return text, finish, usage


def test_an_answer_is_that_of_the_package_alone_streamed_or_not(server: Running, alone: Ask) -> None:
    client = server.client
    whole = client.completions.create(model=NAME, prompt=SUMS, temperature=0, max_tokens=12)
    assert [c.text for c in whole.choices] == [alone(p) for p in SUMS]
    assert whole.choices[0].text == "85" and whole.choices[0].finish_reason == "stop"
    text, finish, usage = told(client, SUMS[0], max_tokens=12)
    assert (text, finish) == ("85", "stop")
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(SUMS[0]) + 1, 3, len(SUMS[0]) + 4)
    cut = client.completions.create(model=NAME, prompt=SUMS[2], temperature=0, max_tokens=2)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("19", "length")


def test_many_streams_at_once_answer_as_alone(server: Running, alone: Ask) -> None:
    prompts = [f"{a}+{b}=" for a in range(10, 90, 11) for b in (1, 25, 68, 99)]
    client = server.client
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(lambda p: told(client, p, max_tokens=12)[0], prompts))
    assert answers == [alone(p) for p in prompts]
    assert len(set(answers)) > 20
    assert server.running == 0


def test_a_chat_is_the_template_of_its_messages(server: Running, alone: Ask) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "12+34=46"},
        {"role": "user", "content": [{"type": "text", "text": "60"}, {"type": "text", "text": "+7="}]},
    ]
    expected = alone("12+34=46;60+7=", 6)
    kept: dict[str, Any] = {"model": NAME, "messages": messages, "temperature": 0, "max_completion_tokens": 6}
    whole = server.client.chat.completions.create(**kept)
    assert whole.choices[0].message.content == expected == "67"
    chunks = list(server.client.chat.completions.create(**kept, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    assert {c.id for c in chunks} == {chunks[0].id}
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_answers_end_at_stop_strings_and_stop_tokens(server: Running) -> None:
    client = server.client
    for stop in ("8", ["x", "98"]):
        found = client.completions.create(model=NAME, prompt="99+99=", temperature=0, stop=stop)
        assert (found.choices[0].text, found.choices[0].finish_reason) == ({"8": "19"}.get(str(stop), "1"), "stop")
        assert told(client, "99+99=", stop=stop)[:2] == (found.choices[0].text, "stop")
    ignore = {"ignore_eos": True}
    with seen(server.engine) as tickets:
        client.completions.create(
            model=NAME, prompt="99+99=", temperature=0, stop="8", max_tokens=100, extra_body=ignore
        )
    assert [ticket.cancelled for ticket in tickets] == [True]  # it does not go on behind it
    nine = 13  # the token of "9"
    found = client.completions.create(model=NAME, prompt="99+99=", temperature=0, extra_body={"stop_token_ids": [nine]})
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("1", "stop")
    on = client.completions.create(model=NAME, prompt="99+99=", temperature=0, max_tokens=9, extra_body=ignore)
    assert on.usage is not None and on.usage.completion_tokens == 9
    assert on.choices[0].finish_reason == "length"


def test_samples_repeat_by_their_seed_and_differ_from_each_other(server: Running) -> None:
    kept: dict[str, Any] = {"model": NAME, "prompt": "4", "temperature": 2, "n": 3, "max_tokens": 12}
    first = server.client.completions.create(**kept, seed=5)
    again = server.client.completions.create(**kept, seed=5)
    texts = [c.text for c in first.choices]
    assert texts == [c.text for c in again.choices]
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1


def test_a_bias_forbids_a_token_and_log_probabilities_are_of_the_model(server: Running) -> None:
    one, nine = 5, 13
    client = server.client
    kept: dict[str, Any] = {"model": NAME, "prompt": "99+99=", "temperature": 0, "max_tokens": 3}
    plain = client.completions.create(**kept, logprobs=2).choices[0]
    assert plain.logprobs is not None and plain.logprobs.tokens == ["1", "9", "8"]
    assert plain.logprobs.text_offset == [0, 1, 2]
    assert plain.logprobs.top_logprobs is not None and plain.logprobs.token_logprobs is not None
    for text, value, top in zip("198", plain.logprobs.token_logprobs, plain.logprobs.top_logprobs, strict=True):
        assert len(top) == 2 and max(top.values()) == top[text] == value <= 0
    bent = client.completions.create(**kept, logit_bias={str(one): -100, str(nine): -100}).choices[0].text
    assert not set("19") & set(bent)
    chat = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "1"}],
        max_tokens=2,
        logprobs=True,
        top_logprobs=1,
        temperature=0,
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    assert len(chat.choices[0].logprobs.content) == 2
    assert chat.choices[0].logprobs.content[0].logprob == chat.choices[0].logprobs.content[0].top_logprobs[0].logprob


def test_a_prompt_that_was_there_is_reused_and_said_to_be(server: Running) -> None:
    long = "12+34=46;8+19=27;75+75=150;3+4=7;64+58="
    first, second = (told(server.client, long, max_tokens=4) for _ in range(2))
    assert first[0] == second[0] == "122"
    assert 0 < second[2].prompt_tokens_details.cached_tokens < second[2].prompt_tokens


def test_models_health_and_metrics(server: Running) -> None:
    import urllib.request

    assert [m.id for m in server.client.models.list()] == [NAME]
    assert server.client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="ask for one of adds"):
        server.client.models.retrieve("other")
    assert urllib.request.urlopen(f"{server.url}/health").read() == b'{"status":"ok"}'
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures['qeff_tokens_total{kind="new"}']) > 3
    assert float(figures["qeff_first_token_seconds_count"]) > 1
    assert float(figures['qeff_requests_total{path="/v1/completions",status="200"}']) > 1
    assert float(figures["qeff_slots"]) >= 1 and float(figures["qeff_engine_running"]) == 0
