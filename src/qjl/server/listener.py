"""Listening, and an end that lets running answers be written."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from qjl.errors import QJLError

if TYPE_CHECKING:
    from qjl.server.engine import Engine

SLOW_READERS = 5  # seconds that clients have to fetch what was written for them, when the server ends


def listen(host: str, port: int) -> socket.socket:
    """A socket bound there; port 0 is any that is free.

    Raises:
        QJLError: if the port is taken, or the address is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise QJLError(f"{host} is no address to listen on ({error.strerror}): give one of this machine.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise QJLError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --host or --port."
        ) from error
    return listener


def is_public(host: str) -> bool:
    """Whether others than this machine may reach it."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Ends at SIGTERM or SIGINT when running answers are written, at the latest after ``grace`` seconds; the second
    signal ends it at once. ``on_start`` is called when it listens."""

    def __init__(
        self, app: ASGIApp, engine: Engine, *, grace: float = 30.0, on_start: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=SLOW_READERS
            )
        )
        self.engine, self.grace, self.on_start = engine, grace, on_start
        self._ending: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would end the process by the signal that it has just obeyed."""
        loop = asyncio.get_running_loop()
        is_main = threading.current_thread() is threading.main_thread()  # others hear no signals
        signals = (signal.SIGTERM, signal.SIGINT) if is_main else ()
        for number in signals:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_start()

    def stop(self) -> None:
        """Take no more requests; to be called in the event loop."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        else:
            self.grace = 0

    async def _end(self) -> None:
        self.engine.drain()
        loop = asyncio.get_running_loop()
        start = loop.time()
        while not self.engine.is_idle and loop.time() - start < self.grace:
            await asyncio.sleep(0.05)
        await loop.run_in_executor(None, self.engine.close)
        self.should_exit = True
