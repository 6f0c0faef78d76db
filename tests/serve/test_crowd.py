"""Two hundred clients at once, some of whom go away: no wrong token, no slot that stays taken, no thread that stays."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from .conftest import Serve
from .servers import NAME, wait_until


@pytest.mark.nightly
def test_two_hundred_streams(serve: Serve, alone: Callable[..., str]) -> None:
    drawn = random.Random(0)
    prompts = [f"{drawn.randrange(100)}+{drawn.randrange(100)}=" for _ in range(2000)]
    expected = {prompt: alone(prompt) for prompt in set(prompts)}
    with serve(queue=400) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)

        def ask(number: int) -> bool:
            """Whether the answer is right; every tenth client goes away instead."""
            prompt: Any = prompts[number]
            stream = client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=12, stream=True)
            text = ""
            for chunk in stream:
                text += chunk.choices[0].text
                if number % 10 == 0:
                    stream.close()
                    return True
            return text == expected[prompt]

        before = threading.active_count()
        with ThreadPoolExecutor(200) as threads:
            assert all(threads.map(ask, range(len(prompts))))
        wait_until(lambda: server.running == 0)
        wait_until(lambda: threading.active_count() <= before + 8)
        assert not server.server.server_state.tasks
