"""``qeff serve``: a process that says where it listens, answers, and ends with a signal."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from qeff_ir.demo import MODEL_FOLDER

from .conftest import Outcome, Qeff, command, environment


@contextlib.contextmanager
def served(*words: object) -> Generator[openai.OpenAI]:
    """A client of a server in a process of its own, which must end well with a signal."""
    with subprocess.Popen(
        command("serve", *words, "--port", 0, "--name", "adds"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if said == "target onnxruntime, as asked\n":  # of a model that is compiled first
                said = process.stdout.readline()
            found = re.fullmatch(r"Serving adds at (http://127\.0\.0\.1:\d+/v1)\n", said)
            assert found is not None, said
            yield openai.OpenAI(base_url=found[1], api_key="none", max_retries=0)
        finally:
            process.send_signal(signal.SIGTERM)
        _, complaints = process.communicate(timeout=30)
    assert (process.returncode, complaints) == (0, "")


def sums(client: openai.OpenAI, numbers: Sequence[int]) -> list[str]:
    """Answers to so many questions at once."""
    with ThreadPoolExecutor(len(numbers)) as pool:
        asked = [
            pool.submit(client.completions.create, model="adds", prompt=f"47+{number}=", temperature=0)
            for number in numbers
        ]
        return [answer.result().choices[0].text for answer in asked]


def test_a_package_is_served_until_a_signal_comes(compiled: tuple[Path, Outcome]) -> None:
    with served(compiled[0]) as client:
        assert sums(client, [38]) == ["85"]


def test_a_model_is_compiled_with_a_slot_for_each_of_eight_requests() -> None:
    with served(MODEL_FOLDER, "--target", "onnxruntime") as client:
        assert sums(client, range(31, 43)) == [str(47 + number) for number in range(31, 43)]
        with urllib.request.urlopen(str(client.base_url).replace("/v1/", "/metrics"), timeout=20) as answer:
            slots = answer.read().decode()
    assert re.search(r"^qeff_slots 8\.0$", slots, re.MULTILINE), slots


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "x"], "--adapter x does not say what it is called: give NAME=FOLDER"),
        (["--ctx-len", "64"], "is compiled already: leave out --ctx-len"),
        (["--embed"], "is compiled already: leave out --embed"),
        (["--adapter", "x=nowhere"], "nowhere"),
        (["--host", "203.0.113.1"], "cannot be listened on"),
    ],
)
def test_what_does_not_fit_a_package_is_refused(
    words: list[str], message: str, compiled: tuple[Path, Outcome], qeff: Qeff
) -> None:
    assert message in qeff("serve", compiled[0], "--port", 0, *words).complaint


def test_a_port_that_is_taken_and_options_that_are_not_for_embeddings(qeff: Qeff) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        complaint = qeff("serve", MODEL_FOLDER, "--port", taken.getsockname()[1]).complaint
    assert "cannot be listened on" in complaint and "choose another --port" in complaint
    assert (
        "--ctx-len is not for embeddings"
        in qeff("serve", MODEL_FOLDER, "--port", 0, "--embed", "--ctx-len", 9).complaint
    )
