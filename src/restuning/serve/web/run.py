"""A server process: bound to an address, and ended without losing an answer."""

from __future__ import annotations

import logging
import socket
import threading
import time
from types import FrameType
from typing import Any

import uvicorn

from restuning._errors import DataError

GRACE = 1.0
"""Seconds for which new requests are refused in words, before connections are closed."""

CONNECTIONS = 1000
"""At once; more are told 503, so that those who ask nothing do not fill the process."""


class Server(uvicorn.Server):
    """uvicorn, which on SIGTERM answers what it has and refuses what comes, and then ends.

    Args:
        application: Of `restuning.serve.app`.
        seconds: To wait for answers at most.
        config: uvicorn's.
    """

    def __init__(self, application: Any, config: uvicorn.Config, seconds: float) -> None:
        super().__init__(config)
        self.service, self.guard = application.state.service, application.state.guard
        self.seconds = seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second signal ends at once."""
        if self.service.closing:
            super().handle_exit(sig, frame)
            return
        # Now and not in the thread: nothing that comes after the signal is taken.
        self.service.close()
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        end = time.monotonic() + self.seconds
        # A proxy sends until it has seen that the server is no longer ready.
        time.sleep(min(GRACE, self.seconds))
        self.service.drain(max(0.0, end - time.monotonic()))
        while self.guard.running and time.monotonic() < end:
            time.sleep(0.01)
        # An end that was asked for is no failure: uvicorn would raise the signal again.
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound, before anything is loaded.

    Raises:
        DataError: The address is taken, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named: asyncio sends at once (TCP_NODELAY) only over sockets that say that they are TCP's,
    # and else the second part of each answer waits 40 ms for the client's kernel to acknowledge the first.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise DataError(
            "the server cannot be bound to its address",
            where=f"{host}:{port}",
            found=error.strerror or str(error),
            fix="give another --port (0 for any that is free) or --host",
        ) from None
    return made


def run(application: Any, listening: socket.socket, *, seconds: float = 30.0) -> None:
    """Serve until a signal ends it.

    Args:
        application: Of `restuning.serve.app`.
        listening: Of `bind`.
        seconds: For answers that are due when it ends.
    """
    config = uvicorn.Config(
        application,
        log_config=None,
        access_log=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(seconds) + 1,
        # Nothing of a request's headers is believed about where it comes from.
        proxy_headers=False,
        server_header=False,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    Server(application, config, seconds).run(sockets=[listening])
