"""The own protocol: any inputs, any tasks, all that is known of an answer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from restuning.serve.service import Service
from restuning.serve.web.json_answers import entry_to_json, put_in_order, replies_to_json
from restuning.serve.web.questions import gather, note, read_question, write_out
from restuning.serve.web.schemas import Answers, Question, Tasks, WholeTask
from restuning.serve.web.windows import ask_windows

router = APIRouter(prefix="/v1", tags=["restuning"])

FORM = {
    "type": "object",
    "properties": {
        "images": {"type": "array", "items": {"type": "string", "format": "binary"}},
        "sounds": {"type": "array", "items": {"type": "string", "format": "binary"}},
        "texts": {"type": "array", "items": {"type": "string"}},
        "tasks": {"type": "string", "description": "Names, with commas or a field each."},
        "top": {"type": "integer", "default": 5},
        "probabilities": {"type": "boolean", "default": False},
        "tiles": {"type": "boolean", "default": False},
        "window": {"type": "integer"},
    },
}


@router.post(
    "/predict",
    response_model=None,
    responses={200: {"model": Answers}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": FORM},
                "application/json": {"schema": Question.model_json_schema()},
                "image/*": {"schema": {"type": "string", "format": "binary"}},
                "audio/*": {"schema": {"type": "string", "format": "binary"}},
            },
        }
    },
)
async def predict(request: Request) -> JSONResponse:
    """Label images, sounds or texts with all tasks that answer such inputs, or with some."""
    service: Service = request.app.state.service
    asked = await read_question(request, service)
    if asked.tiles is False:
        replies = await gather(service.ask_several(asked.inputs, asked.tasks))
    else:
        replies = [
            await ask_windows(service, each, asked.tasks, asked.tiles) for each in asked.images
        ]
    versions: dict[str, str] = {}
    problems: dict[str, str] = {}
    for each in replies:
        for reply in each:
            versions |= reply.versions
            problems |= reply.problems
    # Of several backbones each replies by itself.
    order = [*service.entries] if asked.tasks is None else asked.tasks
    versions, problems = put_in_order(versions, order), put_in_order(problems, order)
    cached = sum(all(r.cached for r in each) for each in replies)
    note(request, len(replies), versions, cached=cached)

    def tell() -> list[dict[str, Any]]:
        return [
            {"input": name, **replies_to_json(each, order, asked.top, asked.every)}
            for name, each in zip(asked.names, replies, strict=True)
        ]

    answers = await write_out(tell, {*problems.values()})
    # As it is: FastAPI would look through every value first.
    return JSONResponse(
        {
            "request": request.state.number,
            "versions": versions,
            "problems": problems,
            "answers": answers,
        }
    )


@router.get("/tasks", response_model=None, responses={200: {"model": Tasks}})
async def list_tasks(request: Request) -> dict[str, Any]:
    """All tasks that answer."""
    service: Service = request.app.state.service
    entries = [*service.entries.values()]
    return {"tasks": [entry_to_json(e) for e in entries], "refused": service.failed}


@router.get("/tasks/{name}", response_model=None, responses={200: {"model": WholeTask}})
async def show_task(request: Request, name: str) -> dict[str, Any]:
    """One task, with its labels."""
    return entry_to_json(request.app.state.service.entry(name), whole=True)
