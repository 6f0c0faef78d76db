"""What Prometheus reads: requests, times and tokens, and how full the engine is."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qeff_ir.runtime.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _Engine(Collector):
    """The engine's own counts, at the time they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("qeff_slots", "Requests that can run at once.", value=self._engine.slots)
        for name, value in asdict(self._engine.stats()).items():
            yield GaugeMetricFamily(f"qeff_engine_{name}", f"The engine's count '{name}'.", value=float(value))


class Metrics:
    """The figures of one server.

    Args:
        engine: Of a model that writes.

    Attributes:
        first_token: Seconds from a request to the first token of its answer.
    """

    def __init__(self, engine: Engine | None) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("qeff_requests", "Answers by path and status.", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            "qeff_request_seconds", "To the end of an answer.", ["path"], registry=registry, buckets=_SECONDS
        )
        self._tokens = Counter("qeff_tokens", "Tokens: of prompts, reused ones, new ones.", ["kind"], registry=registry)
        self.first_token = Histogram(
            "qeff_first_token_seconds", "To the first token.", registry=registry, buckets=_SECONDS
        )
        if engine is not None:
            registry.register(_Engine(engine))

    def count(self, usage: Mapping[str, Any]) -> None:
        """Count the tokens of a request, by its ``usage``."""
        self._tokens.labels("prompt").inc(usage["prompt_tokens"])
        self._tokens.labels("cached").inc(usage.get("prompt_tokens_details", {}).get("cached_tokens", 0))
        self._tokens.labels("new").inc(usage.get("completion_tokens", 0))

    def text(self) -> bytes:
        """The figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def watch(self, app: ASGIApp, paths: frozenset[str]) -> ASGIApp:
        """An application whose answers are counted.

        Args:
            app: The application.
            paths: Those it has; all others count as one.
        """

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            status, started = 499, time.perf_counter()  # the client is gone before there is a status
            path = scope["path"] if scope["path"] in paths else "other"

            async def note(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, note)
            finally:
                self._requests.labels(path, str(status)).inc()
                self._seconds.labels(path).observe(time.perf_counter() - started)

        return watched
