"""The process: a socket, and an end that lets running requests finish."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Generator

import uvicorn
from starlette.types import ASGIApp

from qeff_ir.errors import RuntimeInputError
from qeff_ir.serve.app import Limits, build_app
from qeff_ir.serve.model import Served

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """A server that ends at the first SIGINT or SIGTERM with what it runs, and at once at the second SIGINT.

    Args:
        app: The application.
        drain: Seconds in which running requests may finish.
    """

    def __init__(self, app: ASGIApp, drain: int) -> None:
        config = uvicorn.Config(
            app,  # pyright: ignore[reportArgumentType]  # two libraries' types of one interface
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=drain,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """As uvicorn does it, but a signal that was obeyed does not end the process a second time.

        Outside the main thread, signals are left to whoever has them.
        """
        try:
            before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        except ValueError:  # another thread than the main one
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes any that is free.

    Raises:
        RuntimeInputError: The address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise RuntimeInputError(
            f"{host}:{port} cannot be listened on ({error.strerror}): choose another --port"
        ) from error
    return made


def serve(served: Served, listening: socket.socket, drain: int, limits: Limits | None = None) -> None:
    """Answer requests until a signal comes, and then finish what runs.

    Args:
        served: The model.
        listening: Where requests come in.
        drain: Seconds in which running requests may finish.
        limits: What the server takes.
    """
    try:
        Server(build_app(served, limits), drain).run([listening])
    finally:
        if served.writer is not None:
            served.writer.engine.close(drain=False)
