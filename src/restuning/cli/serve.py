"""`restuning serve`: tasks that answer over HTTP."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from restuning.cli.common import (
    OUTPUT,
    AnyBackbone,
    Device,
    Weights,
    command,
    count,
    group,
    messages,
    option,
)
from restuning.cli.common import TaskBackbone as Backbone

app = group("Serve tasks.")

LIMITS = "Limits"


@command(
    app,
    "restuning serve pets.task scenes.task",
    "restuning serve --watch tasks/ --port 8080 --admin-token token.txt",
    "restuning serve pets.task --host 0.0.0.0 --max-waiting 1000",
)
def serve(
    tasks: Annotated[
        list[Path] | None,
        typer.Argument(help="Task folders, run folders or names on the hub, of any backbones"),
    ] = None,
    watch: Annotated[
        Path | None,
        typer.Option(help="A folder of tasks: saved there they answer, removed they do not"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address; 0.0.0.0 lets other machines in")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any that is free", min=0, max=65535)] = 8000,
    admin_token: Annotated[
        Path | None,
        typer.Option(
            help="File with the token that PUT and DELETE ask for; without it they are off"
        ),
    ] = None,
    backbone: Backbone = None,
    weights: Weights = None,
    any_backbone: AnyBackbone = False,
    device: Device = None,
    batch_size: Annotated[int, option(LIMITS, "Inputs of one forward", min=1)] = 32,
    delay: Annotated[
        float,
        option(
            LIMITS,
            "Milliseconds a batch waits for inputs that are being decoded, or come back",
            min=0,
        ),
    ] = 5.0,
    cache: Annotated[int, option(LIMITS, "MiB of features that are kept", min=0)] = 256,
    max_waiting: Annotated[
        int, option(LIMITS, "Inputs that wait; more are refused with 429", min=1)
    ] = 256,
    max_body: Annotated[int, option(LIMITS, "MiB of a request", min=1)] = 32,
    max_inputs: Annotated[int, option(LIMITS, "Images, sounds or texts of a request", min=1)] = 64,
    max_pixels: Annotated[int, option(LIMITS, "Of an image", min=1)] = 40_000_000,
    max_windows: Annotated[
        int, option(LIMITS, "Of an image that is read in windows", min=1)
    ] = 1024,
    max_sound: Annotated[float, option(LIMITS, "Seconds of a sound", min=0.1)] = 600.0,
    max_text: Annotated[int, option(LIMITS, "Characters of a text", min=1)] = 100_000,
    timeout: Annotated[
        float, option(LIMITS, "Seconds for a request, and for all that are due at the end", min=0.1)
    ] = 30.0,
    quiet: Annotated[bool, option(OUTPUT, "No line for each request", "--quiet")] = False,
) -> None:
    """Serve tasks over HTTP: a page at /, its OpenAPI at /docs, metrics at /metrics."""
    if not tasks and watch is None:
        raise typer.BadParameter("give TASK folders, or --watch DIR")
    from restuning._errors import require
    from restuning.serve import Limits, Pace
    from restuning.serve import app as make_app

    require("uvicorn", "serve", "a server")
    from restuning.serve.web.run import bind, run

    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    if quiet:
        logging.getLogger("restuning.serve").setLevel(logging.WARNING)
    listening = bind(host, port)
    application = make_app(
        tasks or [],
        watch=watch,
        admin_token=admin_token,
        pace=Pace(batch_size, delay / 1000, cache * 2**20),
        limits=Limits(
            body=max_body * 2**20,
            inputs=max_inputs,
            pixels=max_pixels,
            windows=max_windows,
            sound=max_sound,
            text=max_text,
            seconds=timeout,
            waiting=max_waiting,
        ),
        backbone=backbone,
        weights=weights,
        any_backbone=any_backbone,
        device=device,
    )
    service = application.state.service
    backbones = {b.live.predictor.backbone.name for b in service.batchers}
    shown = f"[{host}]" if ":" in host else host
    messages(False).print(
        f"{count(len(service.entries), 'task')} on {', '.join(backbones) or 'no backbone yet'} at "
        f"http://{shown}:{listening.getsockname()[1]}",
        soft_wrap=True,
    )
    run(application, listening, seconds=timeout)
