"""``qeff serve``: a process that says where it listens, answers, and ends with a signal."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from pathlib import Path

import openai
import pytest

from qeff_ir.demo import MODEL_FOLDER

from .conftest import Outcome, Qeff, command, environment


def test_a_package_is_served_until_a_signal_comes(compiled: tuple[Path, Outcome]) -> None:
    words = command("serve", compiled[0], "--port", 0, "--name", "adds")
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            found = re.fullmatch(r"Serving adds at (http://127\.0\.0\.1:\d+/v1)\n", said)
            assert found is not None, said
            client = openai.OpenAI(base_url=found[1], api_key="none", max_retries=0)
            assert client.completions.create(model="adds", prompt="47+38=", temperature=0).choices[0].text == "85"
        finally:
            process.send_signal(signal.SIGTERM)
        _, complaints = process.communicate(timeout=30)
    assert (process.returncode, complaints) == (0, "")


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
