"""What stands before every request: its number, its limits, its line in the log and in the metrics.

An ASGI application around another. It knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from restuning._errors import BusyError, TooLargeError
from restuning.serve.limits import Limits
from restuning.serve.web.json_answers import error_to_json

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logging.getLogger("restuning.serve")

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
"""A number that a proxy gave is kept, if it is one: it is written into logs."""

POLICY = (
    b"default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""The page may load nothing from elsewhere, and nobody may frame it."""

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", POLICY),
]
"""Of every answer."""


OPERATION = (
    "/livez",
    "/readyz",
    "/metrics",
    "/health",
    "/v2/health/live",
    "/v2/health/ready",
)

DISCARD, DISCARD_SECONDS = 64 * 2**20, 2.0
"""Bytes and seconds for which a body is read on that is refused."""


class _Refused(Exception):
    """The answer is given; whatever the application still says is not sent."""


class Guard:
    """An application that keeps `Limits`, numbers its requests and tells of them.

    Args:
        inside: The application.
        limits: Of bytes and seconds.
        note: Called with the route, the method, the status and the seconds of every request.
        closing: Whether no more requests are taken.

    Attributes:
        running: Requests that are being answered.
        held: Bytes of their bodies.
    """

    def __init__(
        self,
        inside: Any,
        limits: Limits,
        note: Callable[[str, str, int, float], None],
        closing: Callable[[], bool],
    ) -> None:
        self.inside, self.limits, self.note, self.closing = inside, limits, note, closing
        self.running = self.held = 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.inside(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._most_bytes(scope), self)
        self.running += 1
        try:
            await self._answer(exchange)
        finally:
            self.running -= 1
            self.held -= exchange.read
            self._tell(exchange)

    def _most_bytes(self, scope: Any) -> int:
        puts = scope["method"] == "PUT" and path_of(scope).startswith("/v1/tasks/")
        return self.limits.task if puts else self.limits.body

    async def _answer(self, exchange: _Exchange) -> None:
        if self.closing() and not _is_of_operation(exchange.scope):
            busy = BusyError("the server is about to end", fix="ask another, or again later")
            await exchange.discard()
            await exchange.refuse(503, busy, retry=1, close=True)
            return
        length = exchange.header(b"content-length")
        if length.isdigit() and int(length) > exchange.most:
            await exchange.discard()
            await exchange.refuse(413, exchange.too_large(int(length)))
            return
        try:
            run = self.inside(exchange.scope, exchange.receive, exchange.send)
            await asyncio.wait_for(run, self.limits.seconds)
        except _Refused:
            pass
        except asyncio.TimeoutError:
            late = BusyError(
                f"no answer within {self.limits.seconds:g} s",
                fix="ask again later, or for less at once",
            )
            await exchange.refuse(503, late, retry=1)
        except Exception:
            # The traceback is for whoever runs the server; who asks gets its number.
            log.exception("request %s failed", exchange.number)
            failed = RuntimeError("the server failed; its log has more under this number")
            await exchange.refuse(500, failed)

    def _tell(self, exchange: _Exchange) -> None:
        seconds = time.perf_counter() - exchange.began
        route = getattr(exchange.scope.get("route"), "path", "other")
        method = exchange.scope["method"]
        self.note(route, method, exchange.status, seconds)
        if _is_of_operation(exchange.scope):
            return
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request": exchange.number,
            "method": method,
            "path": exchange.scope["path"],
            "status": exchange.status,
            "seconds": round(seconds, 6),
            "bytes": exchange.read,
            **exchange.scope["state"].get("told", {}),
        }
        log.info(json.dumps(told))


class _Exchange:
    """One request and its answer, counted as they pass."""

    def __init__(self, scope: Any, receive: Receive, send: Send, most: int, guard: Guard) -> None:
        self.scope, self._receive, self._send, self.most = scope, receive, send, most
        self.guard = guard
        self.began = time.perf_counter()
        self.status = 499
        self.read = 0
        self._started = self._refused = self._ended = False
        given = self.header(b"x-request-id")
        self.number = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["number"] = self.number

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.scope["headers"] if key == name), b"")

    def too_large(self, found: int) -> TooLargeError:
        return TooLargeError(
            "the request is too large",
            found=f"{found:,} bytes, and {self.most:,} are taken",
            fix="send less at once, or smaller images",
        )

    async def receive(self) -> Message:
        """A piece of the body: a length that a client said need not be true, or was not said."""
        message = await self._receive()
        length = len(message.get("body", b""))
        self.read += length
        self.guard.held += length
        self._ended = not message.get("more_body", False)
        if self.read > self.most:
            found = self.read
            await self.discard()
            await self.refuse(413, self.too_large(found))
            raise _Refused
        # One alone is never refused for it.
        if self.guard.held > max(self.guard.limits.held, self.read):
            await self.discard()
            full = BusyError("too much is being sent at once", fix="ask again later")
            await self.refuse(429, full, retry=1)
            raise _Refused
        return message

    async def discard(self) -> None:
        """Read on for a while and keep nothing: who is hung up on while writing does not read why."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._read_on(), DISCARD_SECONDS)

    async def _read_on(self) -> None:
        read = 0
        while not self._ended and read < DISCARD:
            message = await self._receive()
            read += len(message.get("body", b""))
            self._ended = not message.get("more_body", False)

    async def send(self, message: Message) -> None:
        if self._refused:
            return
        if message["type"] == "http.response.start":
            self._started, self.status = True, message["status"]
            # Before it is sent: with the last byte of an answer its span is over.
            _note_on_span(self.scope["state"])
            more = [*HEADERS, (b"x-request-id", self.number.encode())]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await self._send(message)

    async def refuse(
        self, status: int, error: Exception, retry: int = 0, close: bool = False
    ) -> None:
        """Answer with an error, unless an answer has begun."""
        if self._started or self._refused:
            return
        body = json.dumps(error_to_json(error, self.number)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            # What is left of a body is not read.
            *([(b"connection", b"close")] if close or not self._ended else []),
            *([(b"retry-after", str(retry).encode())] if retry else []),
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
        self._refused = True


def _note_on_span(state: MutableMapping[str, Any]) -> None:
    """The request's number and tasks on the span that a trace has of it, where there is one."""
    # Not imported: without the package there is no span.
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or not (span := trace.get_current_span()).is_recording():
        return
    span.set_attribute("restuning.request", state["number"])
    if "told" in state:
        span.set_attribute("restuning.inputs", state["told"]["inputs"])
        span.set_attribute("restuning.tasks", state["tasks"])


def path_of(scope: Any) -> str:
    """Of a request, as the application has it, wherever it is mounted."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _is_of_operation(scope: Any) -> bool:
    """Asked every few seconds by machines, also while the server ends."""
    return path_of(scope) in OPERATION
