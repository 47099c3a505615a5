"""Tasks put in and taken out over HTTP, by whoever has the token; off unless the server was given one."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from starlette.datastructures import UploadFile

from restuning._errors import DataError
from restuning.serve.service import Entry, Service, check_name
from restuning.serve.web.json_answers import entry_to_json
from restuning.serve.web.schemas import WholeTask
from restuning.task import DESCRIPTION, WEIGHTS

router = APIRouter(prefix="/v1/tasks", tags=["admin"])

SHORTEST = 16
"""Characters of a token."""


def read_token(file: str | Path) -> str:
    """The token in a file, without white space around it.

    Raises:
        DataError: It cannot be read, or is too short to be one.
    """
    try:
        token = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "the file of the admin token cannot be read",
            where=str(file),
            found=getattr(error, "strerror", None) or str(error),
            fix="give a file that holds one line",
        ) from None
    if len(token) < SHORTEST:
        raise DataError(
            "an admin token is too short",
            where=str(file),
            found=f"{len(token)} characters",
            fix=f"write {SHORTEST} or more, such as the output of `openssl rand -hex 32`",
        )
    return token


def _require_token(request: Request) -> None:
    token: str | None = request.app.state.token
    if token is None:
        raise HTTPException(403, "tasks are not changed over HTTP here: no --admin-token was given")
    given = request.headers.get("authorization", "")
    # Digests are of one length, so that nothing of the token shows in the time that this takes.
    same = hmac.compare_digest(_digest(given), _digest(f"Bearer {token}"))
    if not same:
        raise HTTPException(401, "not the admin token", {"WWW-Authenticate": "Bearer"})


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


@router.put(
    "/{name}",
    response_model=None,
    responses={200: {"model": WholeTask}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["task", "weights"],
                        "properties": {
                            "task": {"type": "string", "format": "binary"},
                            "weights": {"type": "string", "format": "binary"},
                        },
                    }
                }
            },
        }
    },
)
async def put_task(request: Request, name: str) -> dict[str, Any]:
    """Add a task, or replace the one of this name: `task.json` and `weights.safetensors` of its folder.

    It answers until the server ends; what is to stay belongs in a watched folder.
    """
    _require_token(request)
    check_name(name)
    service: Service = request.app.state.service
    folder = Path(tempfile.mkdtemp(prefix="restuning-task-"))
    handed_over = False
    try:
        async with request.form(max_files=2, max_fields=2) as form:
            for field, file in (("task", DESCRIPTION), ("weights", WEIGHTS)):
                given = form.get(field)
                if not isinstance(given, UploadFile):
                    raise DataError(
                        "a part of the task is missing",
                        where=field,
                        found=", ".join(form) or "nothing",
                        fix="send the files task.json as `task` and weights.safetensors as `weights`",
                    )
                # Under our names: a client's name of a file is nobody's path.
                with (folder / file).open("xb") as out:
                    while block := await given.read(2**20):
                        out.write(block)
        handed_over = True
        # A request that takes too long is given up; a thread that reads the folder goes on.
        entry = await asyncio.shield(asyncio.to_thread(_put, service, name, folder))
    finally:
        if not handed_over:
            shutil.rmtree(folder, ignore_errors=True)
    return entry_to_json(entry, whole=True)


def _put(service: Service, name: str, folder: Path) -> Entry:
    try:
        return service.put(name, folder, known_backbone=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@router.delete("/{name}", status_code=204)
async def remove_task(request: Request, name: str) -> None:
    """Take a task out; who asked before is still answered."""
    _require_token(request)
    await asyncio.to_thread(request.app.state.service.remove, name)
