"""The application: protocols, operation and page around one service."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from restuning._errors import (
    AnswerError,
    BackboneError,
    BusyError,
    DataError,
    EngineError,
    FormatError,
    MissingExtraError,
    RestuningError,
    TooLargeError,
    UnknownNameError,
    WrongBackboneError,
    WrongTaskError,
)
from restuning._version import __version__
from restuning.serve.service import Service
from restuning.serve.watch import Watcher
from restuning.serve.web import (
    admin,
    classify,
    embeddings,
    open_inference,
    operation,
    own,
    page_files,
)
from restuning.serve.web.guard import Guard, path_of
from restuning.serve.web.json_answers import error_to_json
from restuning.serve.web.metrics import Metrics
from restuning.serve.web.schemas import Error

log = logging.getLogger("restuning.serve")

LOOKS = 1.0
"""Seconds between two looks at a watched folder."""

STATUS: dict[type[Exception], int] = {
    BusyError: 429,
    TooLargeError: 413,
    UnknownNameError: 404,
    DataError: 400,
    EngineError: 400,
    # Asked again the answer would be the same, so it is no 5xx, which clients and proxies try again.
    AnswerError: 422,
    WrongTaskError: 422,
    # Of a task that is put in.
    FormatError: 422,
    WrongBackboneError: 422,
    BackboneError: 422,
    MissingExtraError: 422,
}
"""Of an error; the first that it is an instance of."""


def build(
    service: Service, *, watch: str | Path | None = None, token: str | None = None
) -> FastAPI:
    """See `restuning.serve.app`."""
    made = FastAPI(
        title="restuning",
        version=__version__,
        description="Many tasks answered from one forward of a frozen backbone.",
        docs_url=None,
        redoc_url=None,
        # One span a request, where there are any: FastAPI of 0.165 and later has one a step as well.
        telemetry={"operation_spans": False},
        responses={"default": {"model": Error}},
    )
    metrics = Metrics(service)
    warm = threading.Event()
    made.state.service, made.state.metrics, made.state.token = service, metrics, token
    made.state.is_ready = lambda: warm.is_set() and not service.closing
    guard = Guard(lambda *_: None, service.limits, metrics.note, lambda: service.closing)
    made.state.guard = guard
    made.add_middleware(_Middleware, guard=guard)
    for each in (operation, own, admin, embeddings, open_inference, page_files, classify):
        made.include_router(each.router)
    made.add_exception_handler(RestuningError, _tell_ours)
    made.add_exception_handler(RequestValidationError, _tell_invalid)
    made.add_exception_handler(ValidationError, _tell_invalid)
    made.add_exception_handler(HTTPException, _tell_http)
    watcher = None if watch is None else Watcher(service, watch, log.info)
    if watcher is not None:
        watcher.look()
    service.upkeep = threading.Thread(
        target=_look_after, args=(service, watcher, warm), name="restuning-upkeep", daemon=True
    )
    service.upkeep.start()
    return made


class _Middleware:
    """The guard as Starlette makes what stands around an application."""

    def __init__(self, inside: Any, guard: Guard) -> None:
        self.guard = guard
        guard.inside = inside

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.guard(scope, receive, send)


def _look_after(service: Service, watcher: Watcher | None, warm: threading.Event) -> None:
    """Warm up, then look at the watched folder and gather tasks that were added, until the service ends."""
    try:
        service.warm_up()
    except Exception:
        log.exception("the warm-up failed: the server does not become ready")
        return
    warm.set()
    while not service.wait(LOOKS):
        try:
            if watcher is not None:
                watcher.look()
            service.gather()
        except Exception:
            # What is looked after goes on answering.
            log.exception("a look at the tasks failed")


def _tell(request: Request, status: int, error: Exception, **headers: str) -> JSONResponse:
    number = request.state.number
    # Not wherever the letters stand: a task may have them in its name.
    if path_of(request.scope).startswith("/v2/"):
        # The Open Inference Protocol has a sentence there, and its clients read it.
        return JSONResponse({"error": str(error)}, status, headers)
    return JSONResponse(error_to_json(error, number), status, headers)


async def _tell_ours(request: Request, error: Any) -> JSONResponse:
    status = next((s for kind, s in STATUS.items() if isinstance(error, kind)), 500)
    if isinstance(error, BusyError):
        ends = request.app.state.service.closing
        retry = {"Retry-After": str(error.seconds)}
        return _tell(request, 503 if ends else 429, error, **retry)
    if status == 500:
        log.error("request %s failed: %s", request.state.number, error)
    return _tell(request, status, error)


async def _tell_invalid(request: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    told = DataError(
        "the body of a request is malformed",
        where=".".join(map(str, first["loc"]))[:200],
        found=first["msg"][:200],
        fix="see /docs for what is taken",
    )
    return _tell(request, 400, told)


async def _tell_http(request: Request, error: Any) -> JSONResponse:
    headers: dict[str, str] = dict(getattr(error, "headers", None) or {})
    return _tell(request, error.status_code, HTTPError(str(error.detail)), **headers)


class HTTPError(Exception):
    """What HTTP itself says: no such address, not allowed."""
