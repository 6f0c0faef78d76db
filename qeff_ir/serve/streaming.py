"""Server-sent events to clients that may be slow, or gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qeff_ir.errors import QeffError
from qeff_ir.serve.errors import answer_of

R = TypeVar("R")

_LOG = logging.getLogger(__name__)


class ClientGoneError(QeffError):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Awaitable[R]) -> R:
    """What some work returns, unless the client goes away before; the work is cancelled then.

    Args:
        receive: Of a request whose body has been read.
        work: The work.

    Raises:
        ClientGoneError: It is gone.
    """
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGoneError("the client has closed the connection before its answer was ready")
        return doing.result()
    finally:
        for task in (doing, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Events, each a JSON object, then ``[DONE]``.

    A client that is slow slows nobody down: what it has not read yet waits here. One that reads nothing for so long
    is left.

    Args:
        events: The events; a failure becomes one.
        ended: Called once, however the stream ends.
        patience: Seconds in which a client must take an event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], ended: Callable[[], None], patience: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._ended, self._patience = events, ended, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; see ASGI."""
        try:
            with contextlib.suppress(ClientGoneError):
                await unless_gone(receive, self._send_all(send))
        finally:
            self._ended()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await self._send(send, json.dumps(event, ensure_ascii=False, separators=(",", ":")))
        except QeffError as error:
            await self._send(send, json.dumps(answer_of(error).body()))
        except TimeoutError:
            raise
        except Exception as error:
            _LOG.exception("a stream has failed")
            await self._send(send, json.dumps(answer_of(error).body()))
        await self._send(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: str) -> None:
        """Send an event.

        Raises:
            TimeoutError: The client does not read.
        """
        async with asyncio.timeout(self._patience):
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
