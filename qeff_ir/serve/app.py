"""The application: paths, limits, and how each failure looks from outside."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from qeff_ir.errors import QeffError
from qeff_ir.serve import chat, completions
from qeff_ir.serve.answer import Answer, jobs_of
from qeff_ir.serve.chat import ChatForm
from qeff_ir.serve.completions import CompletionForm
from qeff_ir.serve.embeddings import embed
from qeff_ir.serve.errors import ApiError, answer_of
from qeff_ir.serve.metrics import Metrics
from qeff_ir.serve.model import Served
from qeff_ir.serve.schema import Body, ChatRequest, CompletionRequest, EmbeddingRequest, Generation, read
from qeff_ir.serve.streaming import ClientGoneError, EventStream, unless_gone

_LOG = logging.getLogger(__name__)
_GONE = 499
"""Status of an answer that nobody waits for, as other servers count it."""

BodyT = TypeVar("BodyT", bound=Body)
GenerationT = TypeVar("GenerationT", bound=Generation)


@dataclass(frozen=True)
class Limits:
    """What the server takes.

    Attributes:
        body_bytes: Of a request.
        body_seconds: In which a request must have come.
        patience: Seconds in which a client must take a piece of its answer.
        embeddings: Requests for embeddings that run at once.
        waiting: Requests for embeddings that wait.
    """

    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    patience: float = 60.0
    embeddings: int = 2
    waiting: int = 256


class Api:
    """The endpoints of one model.

    Args:
        served: The model.
        limits: What the server takes.
    """

    def __init__(self, served: Served, limits: Limits) -> None:
        self.served, self.limits = served, limits
        self.metrics = Metrics(None if served.writer is None else served.writer.engine)
        self._preparing = CapacityLimiter(1)  # a tokenizer keeps its settings in itself: one thread at a time
        self._embedding = CapacityLimiter(limits.embeddings)

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        return await self._write(request, ChatRequest, chat.prompts_of, chat.most_of, ChatForm)

    async def complete(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        return await self._write(
            request, CompletionRequest, completions.prompts_of, completions.most_of, CompletionForm
        )

    async def embed(self, request: Request) -> Response:
        """``POST /v1/embeddings``."""
        asked = await self._read(request, EmbeddingRequest)
        self.served.slot(asked.model)
        model = self.served.to_embed()
        if self._embedding.statistics().tasks_waiting >= self.limits.waiting:
            raise ApiError(429, "too many requests wait already: ask again later", code="rate_limit_exceeded")
        made = await to_thread.run_sync(embed, model, asked, limiter=self._embedding)
        self.metrics.count(made["usage"])
        return JSONResponse(made)

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``, or one of them."""
        wanted = request.path_params.get("model")
        if wanted is not None:
            self.served.slot(wanted)
        made = [
            {"id": name, "object": "model", "created": self.served.created, "owned_by": "qeff-ir"}
            for name in (self.served.name, *self.served.adapters)
            if wanted in (None, name)
        ]
        return JSONResponse(made[0] if wanted is not None else {"object": "list", "data": made})

    async def health(self, _: Request) -> Response:
        """``GET /health``: the server answers."""
        return JSONResponse({"status": "ok"})

    async def read_metrics(self, _: Request) -> Response:
        """``GET /metrics``."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _write(
        self,
        request: Request,
        kind: type[GenerationT],
        prompts_of: Callable[[GenerationT, Any], list[list[int]]],
        most_of: Callable[[GenerationT], int | None],
        form: Callable[[GenerationT, Answer, Any], ChatForm | CompletionForm],
    ) -> Response:
        asked = await self._read(request, kind)
        slot, writer = self.served.slot(asked.model), self.served.to_write()

        def prepare() -> list[Any]:
            return jobs_of(writer, asked, prompts_of(asked, writer.tokenizer), slot, most_of(asked))

        jobs = await to_thread.run_sync(prepare, limiter=self._preparing)
        answer = Answer(writer, jobs, asked.stop, asked.n, self.metrics)
        made = form(asked, answer, writer.tokenizer)
        if asked.stream:
            return EventStream(made.events(), answer.cancel, self.limits.patience)
        try:
            return JSONResponse(await unless_gone(request.receive, made.whole()))
        finally:
            answer.cancel()

    async def _read(self, request: Request, kind: type[BodyT]) -> BodyT:
        """The body of a request.

        Raises:
            ApiError: It is too large or too slow, is no JSON, or a field is wrong.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body is not declared as JSON: send the header content-type: application/json")
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                body = await self._body(request)
        except TimeoutError as error:
            raise ApiError(408, "the body did not come in time: send it at once") from error
        return read(kind, body)

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.limits.body_bytes:
                raise ApiError(413, f"the body has more than {self.limits.body_bytes} bytes: send less at once")
        return bytes(body)


def build_app(served: Served, limits: Limits | None = None) -> ASGIApp:
    """The ASGI application of a model; when it ends, what the engine runs is finished.

    Args:
        served: The model.
        limits: What the server takes.
    """
    api = Api(served, limits or Limits())
    routes = [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.complete, methods=["POST"]),
        Route("/v1/embeddings", api.embed, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.models),
        Route("/health", api.health),
        Route("/metrics", api.read_metrics),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        yield
        if served.writer is not None:
            await to_thread.run_sync(served.writer.engine.close)

    handlers: dict[Any, Any] = {
        ClientGoneError: _gone,
        ClientDisconnect: _gone,
        HTTPException: _wrong_path,
        QeffError: _refused,
        Exception: _failed,  # Starlette raises these once more, and the connection is closed
    }
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    return api.metrics.watch(app, frozenset(route.path for route in routes))


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=_GONE)


async def _wrong_path(request: Request, error: HTTPException) -> Response:
    there = "takes another method" if error.status_code == 405 else "is not there"
    return ApiError(error.status_code, f"{request.url.path[:200]} {there}: see the server's README").response()


async def _refused(request: Request, error: Exception) -> Response:
    told = answer_of(error)
    if told.status >= 500:
        _LOG.error("%s has failed: %s", request.url.path, error)
    return told.response()


async def _failed(_: Request, error: Exception) -> Response:
    return answer_of(error).response()
