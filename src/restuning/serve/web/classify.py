"""`/classify` as Hugging Face and text-embeddings-inference have it, and routers of language models ask it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from restuning._errors import DataError
from restuning.serve.service import Service, asked_as
from restuning.serve.web.json_answers import scores
from restuning.serve.web.questions import as_inputs, gather, note
from restuning.serve.web.schemas import ClassifyQuestion, Score

router = APIRouter(tags=["classify"])

SHAPE: dict[int | str, dict[str, Any]] = {200: {"model": list[Score] | list[list[Score]]}}


@router.post("/{task}/classify", response_model=None, responses=SHAPE)
async def classify(request: Request, task: str, question: ClassifyQuestion) -> JSONResponse:
    """Every label of a task with its score, best first; a list of these for a list of inputs."""
    service: Service = request.app.state.service
    kind = asked_as(service.entry(task).batcher.kind)
    single = isinstance(question.inputs, str)
    given = [question.inputs] if isinstance(question.inputs, str) else question.inputs
    if question.raw_scores or question.parameters.get("function_to_apply") is not None:
        raise DataError(
            "scores of another kind",
            where="raw_scores" if question.raw_scores else "function_to_apply",
            fix="leave it out: scores are calibrated probabilities, and nothing else is told",
        )
    top = question.parameters.get("top_k")
    if top is not None and (not isinstance(top, int) or isinstance(top, bool) or top < 1):
        raise DataError(
            "not a number of classes", where="top_k", found=repr(top)[:40], fix="give 1 or more"
        )
    replies = await gather(service.ask(kind, as_inputs(kind, given), [task]))
    found = [scores(each[0], task, top) for each in replies]
    note(request, len(found), [task])
    return JSONResponse(found[0] if single else found)


@router.post("/classify", response_model=None, responses=SHAPE)
async def classify_only(request: Request, question: ClassifyQuestion) -> JSONResponse:
    """The same of the only task, for clients that can be given no path."""
    names = [*request.app.state.service.entries]
    if len(names) != 1:
        raise DataError(
            "which task?",
            where="/classify",
            found=f"{len(names)} tasks: {', '.join(names[:8])}",
            fix="ask /TASK/classify",
        )
    return await classify(request, names[0], question)
