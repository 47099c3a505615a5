"""`/v1/embeddings` in OpenAI's shape: the frozen backbone's own feature, of the forward that tasks share."""

from __future__ import annotations

import base64
from concurrent.futures import Future
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from restuning._errors import DataError, UnknownNameError
from restuning.serve.batcher import Batcher, Reply
from restuning.serve.service import Service
from restuning.serve.web.questions import as_inputs, gather, note
from restuning.serve.web.schemas import EmbeddingQuestion, Embeddings

router = APIRouter(prefix="/v1", tags=["embeddings"])


@router.post("/embeddings", response_model=None, responses={200: {"model": Embeddings}})
async def embed(request: Request, question: EmbeddingQuestion) -> JSONResponse:
    """Features of texts or images."""
    service: Service = request.app.state.service
    given = [question.input] if isinstance(question.input, str) else question.input
    if not given:
        raise DataError("nothing to embed", fix="send texts or images")
    service.limits.check_count(len(given))

    def ask() -> tuple[Batcher, list[Future[Reply]]]:
        found = _find_backbone(service, question.model)
        inputs = as_inputs(found.kind, given)
        return found, found.ask(inputs, [], embed=True, seconds=service.limits.seconds)

    batcher, futures = service.ask_settled(ask)
    replies = [each[0] for each in await gather([[future] for future in futures])]
    width = len(replies[0].embedding)  # type: ignore[arg-type]
    if question.dimensions not in (None, width):
        raise DataError(
            "the backbone's feature has another width",
            where="dimensions",
            found=f"{question.dimensions}, and it has {width}",
            fix="leave it out: a feature that is cut is not the backbone's",
        )
    read = sum(reply.tokens for reply in replies)
    note(request, len(replies))
    told = {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _encode(reply.embedding, question.encoding_format),
            }
            for index, reply in enumerate(replies)
        ],
        "model": batcher.live.predictor.backbone.name,
        "usage": {"prompt_tokens": read, "total_tokens": read},
    }
    return JSONResponse(told)


def _encode(feature: Any, how: str) -> list[float] | str:
    # OpenAI's clients ask for base64 of little-endian floats, and unpack it themselves.
    if how == "base64":
        return base64.b64encode(feature.numpy().astype("<f4").tobytes()).decode()
    return feature.tolist()


def _find_backbone(service: Service, model: str | None) -> Batcher:
    """The backbone of this name or of the task of this name; the only one where nothing is named."""
    # Of tagged words there is no feature of a whole sentence.
    batchers = [b for b in service.batchers if b.kind != "words"]
    names = [b.live.predictor.backbone.name for b in batchers]
    fitting = [b for b, name in zip(batchers, names, strict=True) if model in (None, name)]
    if len(fitting) == 1:
        return fitting[0]
    entry = service.entries.get(model or "")
    if entry is not None and entry.batcher in batchers:
        return entry.batcher
    found = ", ".join(dict.fromkeys(names))[:300] or "none that embeds"
    if len(fitting) > 1 and len({*names}) == 1:
        # One name, and features that differ.
        found += f", which is served {len(fitting)} ways"
    raise UnknownNameError(
        "which backbone?" if fitting or not model else "no such backbone",
        where=model or "model",
        found=found,
        fix="name a task for its backbone" if fitting else "name one of these, or a task",
    )
