"""Requests that are wrong, too many, slow or gone: each has one sentence, and none keeps a slot."""

from __future__ import annotations

import http.client
import json
import select
import socket
import threading
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import openai
import pytest

from qeff_ir.arrays import Array
from qeff_ir.runtime.jobs import Job
from qeff_ir.serve.app import Limits

from .conftest import Serve
from .servers import NAME, Running, seen, wait_until

LONG = {"model": NAME, "prompt": "1", "temperature": 2, "seed": 1, "max_tokens": 120, "ignore_eos": True}
"""A request that fills the context."""


def post(
    server: Running, body: bytes, kind: str = "application/json", path: str = "completions"
) -> tuple[int, Any, Any]:
    """Status, JSON and headers of an answer."""
    request = urllib.request.Request(f"{server.url}/v1/{path}", body, {"content-type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def connect(server: Running, body: dict[str, Any], declared: int | None = None) -> socket.socket:
    """A client that has asked, perhaps with less than it declares, and reads nothing."""
    port = int(server.url.rpartition(":")[2])
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"content-length: {declared or len(data)}\r\n\r\n"
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect(("127.0.0.1", port))
    made.sendall(head.encode() + data)
    return made


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"model": "x"}, 404, "model", "there is no model 'x' here: ask for one of adds"),
        ({"prompt": None}, 400, "prompt", "the field prompt is missing: give it"),
        ({"prompt": ["1", 2]}, 400, "prompt", "prompt: give a text, token ids, or a list of either"),
        ({"prompt": []}, 400, "prompt", "a prompt has no token: give at least one"),
        ({"prompt": [99]}, 400, None, "prompt or stop_token_ids has the token 99: they are numbers from 0 to "),
        (
            {"top_p": 3},
            400,
            "top_p",
            "the field top_p does not fit (input should be less than or equal to 1): correct it",
        ),
        (
            {"temperature": "1"},
            400,
            "temperature",
            "the field temperature does not fit (input should be a valid number)",
        ),
        ({"tools": [{}]}, 400, "tools", "the field tools is not supported here: leave it out"),
        ({"echo": True}, 400, "echo", "the field echo is not supported here: leave it out"),
        ({"logit_bias": {"one": 1}}, 400, None, "logit_bias has the token 'one'"),
        (
            {"max_tokens": 128},
            400,
            None,
            "2 tokens of the prompt and 128 new ones do not fit the context of 128: shorten",
        ),
        ({"stop": [""]}, 400, "stop.0", "the field stop.0 does not fit (string should have at least 1 character)"),
    ],
)
def test_a_wrong_field_is_told_by_its_name(
    change: dict[str, Any], status: int, param: str | None, message: str, server: Running
) -> None:
    code, answer, _ = post(server, json.dumps({"model": NAME, "prompt": "1", **change}).encode())
    assert (code, answer["error"]["param"]) == (status, param)
    assert answer["error"]["message"].startswith(message)
    assert answer["error"]["type"] == "invalid_request_error"


def test_fields_that_change_nothing_are_taken(server: Running) -> None:
    nothing = {"user": "me", "echo": False, "best_of": 1, "suffix": "", "seed": None, "store": False, "metadata": {}}
    body = {"model": NAME, "prompt": "47+38=", "temperature": 0, **nothing}
    code, answer, _ = post(server, json.dumps(body).encode())
    assert code == 200 and answer["choices"][0]["text"] == "85"


def test_bodies_that_are_none(serve: Serve) -> None:
    with serve(limits=Limits(body_bytes=1000, body_seconds=0.2)) as server:
        assert post(server, b"{")[1]["error"]["message"].startswith("the body is not JSON (EOF")
        assert post(server, b"[]")[0] == 400
        assert post(server, b"[" * 900)[0] == 400
        assert post(server, b"{}", kind="text/plain")[0] == 415
        assert post(server, b" " * 2000)[0] == 413
        assert post(server, b"{}", path="images")[1]["error"]["message"].startswith("/v1/images is not there")
        with connect(server, {}, declared=9) as late:
            late.settimeout(20)
            assert late.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_chat_without_text_or_template_is_refused(server: Running) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}
    code, answer, _ = post(server, json.dumps(body).encode(), path="chat/completions")
    assert (code, answer["error"]["param"]) == (400, "messages.0.content")
    assert "pictures and sounds are not served" in answer["error"]["message"]
    code, answer, _ = post(server, json.dumps({"model": NAME, "input": "1"}).encode(), path="embeddings")
    assert (code, answer["error"]["message"]) == (400, "adds writes texts and embeds none: ask /v1/completions")


def test_a_full_queue_is_answered_429_and_takes_all_or_none(serve: Serve) -> None:
    with serve(queue=2) as server:
        many = server.client
        with pytest.raises(openai.RateLimitError, match="wait") as told, seen(server.engine) as tickets:
            many.completions.create(model=NAME, prompt="1", n=64, max_tokens=120, extra_body={"ignore_eos": True})
        assert told.value.response.headers["retry-after"] == "1"
        assert told.value.code == "rate_limit_exceeded"
        wait_until(lambda: server.running == 0)
        assert len(tickets) >= 2 and all(ticket.cancelled for ticket in tickets)  # those of the 64 that were taken
        assert many.completions.create(model=NAME, prompt="47+38=", temperature=0).choices[0].text == "85"


def test_a_connection_outlives_an_error(server: Running) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    for body, status in (({}, 400), ({"model": NAME, "prompt": "5+8=", "max_tokens": 1}, 200)):
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == status and answer.read()
        assert not answer.will_close and connection.sock is not None
        kept = connection.sock
        assert select.select([kept], [], [], 0.2)[0] == []  # it would be readable if the server had closed it
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_frees_its_slot(stream: bool, server: Running) -> None:
    before = server.running
    client = connect(server, {**LONG, "n": 40, "stream": stream})
    wait_until(lambda: server.running > before)
    client.close()
    wait_until(lambda: server.running == before, seconds=60)
    assert server.client.completions.create(model=NAME, prompt="5+8=", temperature=0).choices[0].text == "13"


def test_a_client_that_reads_nothing_holds_nobody_up_and_is_left(serve: Serve) -> None:
    with (
        serve(queue=200, limits=Limits(patience=0.5)) as server,
        connect(server, {**LONG, "n": 48, "stream": True, "logprobs": 20}),  # more than sockets hold
    ):
        wait_until(lambda: server.running > 0)
        assert server.client.completions.create(model=NAME, prompt="47+38=", temperature=0).choices[0].text == "85"
        wait_until(lambda: server.running == 0)
        wait_until(lambda: not server.server.server_state.tasks)


class Held:
    """A constraint that lets the engine's thread wait, and allows everything."""

    def __init__(self, vocabulary: int) -> None:
        self.there, self.go = threading.Event(), threading.Event()
        self._vocabulary = vocabulary

    def mask(self) -> Array:
        self.there.set()
        assert self.go.wait(60)
        return np.ones(self._vocabulary, dtype=bool)

    def advance(self, token: int) -> None:
        pass


def test_shutting_down_finishes_what_runs(serve: Serve) -> None:
    kept: dict[str, Any] = {"model": NAME, "prompt": "12+34=", "temperature": 0, "max_tokens": 60}
    more = {"ignore_eos": True}
    texts: list[str] = []
    with serve() as server:

        def ask() -> None:
            stream = server.client.completions.create(**kept, stream=True, extra_body=more)
            texts.append("".join(chunk.choices[0].text for chunk in stream))

        expected = server.client.completions.create(**kept, extra_body=more).choices[0].text
        threads = [threading.Thread(target=ask) for _ in range(6)]
        held = Held(server.engine.vocabulary)
        server.engine.submit(Job([1], 1, constraint=held))
        assert held.there.wait(60)
        before = server.running
        for thread in threads:
            thread.start()
        wait_until(lambda: server.running == before + 6)
        server.server.should_exit = True
        wait_until(lambda: not server.server.servers[0].is_serving())
        with pytest.raises(openai.APIConnectionError):
            server.client.models.list()
        held.go.set()
    for thread in threads:
        thread.join(20)
    assert texts == [expected] * 6 and len(expected) > 20
