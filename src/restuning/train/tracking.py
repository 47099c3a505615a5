"""TensorBoard and Weights & Biases, through Accelerate; both optional."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from restuning._errors import TrainingError, require
from restuning.train.settings import FitSettings

MODULES = {"tensorboard": "tensorboard", "wandb": "wandb"}
PROJECT = "restuning"


def check_trackers(track: tuple[str, ...]) -> None:
    """Fail before training, not after its first epoch.

    Raises:
        MissingExtraError: A tracker is not installed.
    """
    for name in track:
        require(MODULES[name], "tracking", f"track={name!r}")


def start_trackers(accelerator: Accelerator, settings: FitSettings, out: Path) -> None:
    """Open the trackers of a run.

    Raises:
        TrainingError: One refuses to start (no account, no network).
    """
    if not settings.track:
        return
    plain = {
        k: v if isinstance(v, int | float | str | bool) else str(v)
        for k, v in settings.to_dict().items()
    }
    options = {"wandb": {"name": out.name, "dir": str(out)}} if "wandb" in settings.track else {}
    try:
        accelerator.init_trackers(PROJECT, config=plain, init_kwargs=options)
    except Exception as error:  # noqa: BLE001
        # Trackers raise classes of their own, which cannot be named without importing them.
        raise TrainingError(
            "a tracker did not start", where=", ".join(settings.track), found=str(error)[:300],
            fix="log in to it (or set WANDB_MODE=offline), or train without --track",
        ) from None  # fmt: skip


def track(accelerator: Accelerator, values: Mapping[str, Any], step: int) -> None:
    """Send numbers to every open tracker."""
    if accelerator.trackers:
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        accelerator.log(numbers, step=step)


def finish_trackers(accelerator: Accelerator) -> None:
    """Close the trackers; `end_training` would take the caller's process group down, too."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            tracker.finish()
