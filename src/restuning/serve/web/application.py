"""`restuning.serve.app`: the server as an ASGI application."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from restuning._errors import require
from restuning.serve.batcher import Pace
from restuning.serve.limits import Limits
from restuning.serve.service import Service


def app(
    tasks: str | Path | Sequence[str | Path] | Mapping[str, str | Path] | Service = (),
    *,
    watch: str | Path | None = None,
    admin_token: str | Path | None = None,
    limits: Limits | None = None,
    pace: Pace | None = None,
    **how: Any,
) -> Any:
    """Tasks as an ASGI application (FastAPI), to be run by any server or mounted in another application.

    `uvicorn.run(restuning.serve.app(["pets.task", "scenes.task"]))`; `restuning serve` does this and ends
    without losing an answer. Opened when it is called, and ready after one forward of each backbone.

    Args:
        tasks: As `Predictor.load` takes them, also of several backbones; or a `Service`.
        watch: A folder whose tasks answer as they are saved, exchanged and removed.
        admin_token: A file with the token that `PUT` and `DELETE /v1/tasks/NAME` ask for; None: they
            are off.
        limits: The largest of everything.
        pace: How questions are gathered.
        how: `device`, `any_backbone`, `backbone`, `weights`, as for `Predictor.load`.

    Raises:
        MissingExtraError: The extra `serve` is not installed.
        RestuningError: As `Predictor.load`, or the token cannot be read.
    """
    for module in ("fastapi", "prometheus_client", "python_multipart"):
        require(module, "serve", "a server")
    from restuning.serve.web.admin import read_token
    from restuning.serve.web.build import build

    token = None if admin_token is None else read_token(admin_token)
    service = (
        tasks if isinstance(tasks, Service) else Service(tasks, limits=limits, pace=pace, **how)
    )
    return build(service, watch=watch, token=token)
