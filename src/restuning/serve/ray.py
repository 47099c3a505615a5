"""The server as an application of Ray Serve: replicas on many machines, by hand or by load, and tasks that roll."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from restuning._errors import RestuningError, TrainingError, require
from restuning.serve.batcher import Pace
from restuning.serve.limits import Limits
from restuning.serve.predictor import find_folders
from restuning.serve.service import Service
from restuning.serve.web.application import app

log = logging.getLogger("restuning.serve")

DRAIN = 30.0
"""Seconds that a replica which is to end waits for answers that are due."""


class _Replica:
    """One process that answers: a service of its own, with its own backbone and features that are kept."""

    def __init__(self, how: Mapping[str, Any], pace: Pace | None, limits: Limits | None) -> None:
        self.service = Service((), pace=pace, limits=limits, **how)

    def __serve_build_asgi_app__(self) -> Any:  # noqa: PLW3201 (Ray's name)
        return app(self.service)

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Serve these tasks, `{"tasks": {name: folder}}`: called at the start, and whenever they change.

        A task that is refused leaves what answered under its name, and the listing says why.
        """
        wanted: Mapping[str, str] = config["tasks"]
        refused = []
        for name, folder in wanted.items():
            # Also one that lies where it lay: it may have been saved again.
            try:
                self.service.put(name, folder)
            except RestuningError as error:
                refused.append(error)
                self.service.note_refused(name, error)
                log.warning("%s is refused: %s", name, error)
        # Last: the last task of a backbone takes it along, and those that came need it.
        for name in [n for n in self.service.entries if n not in wanted]:
            self.service.remove(name)
        if refused and not self.service.entries:
            # Nothing answers: better no replica than one that has nothing to say.
            raise refused[0]
        self.service.gather()
        self.service.warm_up()

    def check_health(self) -> None:
        """Raise where it does not answer any more, so that another takes its place."""
        if self.service.closing:
            raise TrainingError("this replica is about to end", fix="ask another")

    def __del__(self) -> None:
        self.service.drain(DRAIN)


def application(
    tasks: Mapping[str, str | Path] | Sequence[str | Path] | str | Path,
    *,
    replicas: int | str | None = None,
    autoscaling: Mapping[str, Any] | None = None,
    resources: Mapping[str, Any] | None = None,
    pace: Pace | None = None,
    limits: Limits | None = None,
    **how: Any,
) -> Any:
    """Tasks as an application of Ray Serve: `ray.serve.run(restuning.serve.ray.application(tasks))`.

    Every replica holds the backbone once and answers all tasks, with the protocols of `restuning serve`. Run again under the
    same name with other tasks and the same rest, replicas stay and exchange their tasks one after the other: who asked
    before is answered by what answered then. A replica that dies is replaced; what it was
    being asked is an error to who asked.

    Args:
        tasks: By name, or as `Predictor.load` takes them: folders that every machine sees under one path.
        replicas: How many, or "auto" for as many as the load asks for by Ray's own rule; default 1.
        autoscaling: `min_replicas`, `max_replicas`, `target_ongoing_requests` and so on, in place of `replicas`.
        resources: Of a replica, such as `{"num_cpus": 4}` or `{"num_gpus": 0.25}`; Ray's default is one CPU.
        pace: How questions are gathered.
        limits: The largest of everything.
        how: `device`, `any_backbone`, `backbone` (a name), `weights`, as for `Predictor.load`.

    Raises:
        MissingExtraError: The extras `ray` and `serve` are not installed.
        DataError, FormatError: A folder holds no task, or two have one name.
        TrainingError: Both `replicas` and `autoscaling`.
    """
    require("fastapi", "serve", "a server")
    serve = require("ray.serve", "ray", "an application of Ray Serve")
    # Here and not on the replicas: what is mistyped is told to who typed it.
    folders = {name: str(Path(f).resolve()) for name, f in find_folders(tasks).items()}
    options: dict[str, Any] = {"num_replicas": replicas or 1}
    if autoscaling is not None:
        if replicas is not None:
            raise TrainingError(
                "the load decides how many replicas there are, or you do",
                found=f"replicas={replicas!r}, autoscaling={dict(autoscaling)}",
                fix="give one of them",
            )
        options = {"autoscaling_config": {**autoscaling}}
    deployment = serve.deployment(
        name="tasks",
        user_config={"tasks": folders},
        ray_actor_options={**(resources or {})},
        # A question waits in the replica's own queue, where it becomes part of a batch.
        max_ongoing_requests=(limits or Limits()).waiting,
        graceful_shutdown_timeout_s=DRAIN,
        **options,
    )(serve.ingress()(_Replica))
    return deployment.bind(dict(how), pace, limits)
