"""What those ask who run the server: whether it lives, whether it answers, what it has done."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

router = APIRouter(tags=["operation"])


@router.get("/livez")
@router.get("/health", include_in_schema=False)
async def live() -> dict[str, bool]:
    """Whether the process answers at all."""
    return {"live": True}


@router.get("/readyz")
async def ready(request: Request) -> JSONResponse:
    """Whether every backbone has answered once, and the server is not about to end."""
    state: bool = request.app.state.is_ready()
    return JSONResponse({"ready": state}, 200 if state else 503)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    told = generate_latest(request.app.state.metrics.registry)
    return Response(told, headers={"content-type": CONTENT_TYPE_LATEST})
