"""Trackers: what a run tells TensorBoard, MLflow, Weights & Biases and others while it goes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from restuning._errors import MissingExtraError, TrainingError, require, warn
from restuning._version import __version__

PROJECT = "restuning"
"""The project, or experiment, that runs lie in."""


@dataclass(frozen=True)
class Opening:
    """What a tracker may need to know of a run before it opens one of its own.

    Attributes:
        folder: Of the run; its name is the run's.
        key: By which the tracker knows the run: drawn for a new one, else what a checkpoint remembers.
        resumed: Whether the tracker has this run already.
        step: That the run goes on from.
        name: What the tracker calls the run: that of its folder, where nobody gave it another.
    """

    folder: Path
    key: str
    resumed: bool
    step: int
    name: str


def _nothing(opening: Opening) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Tracker:
    """A tracker that Accelerate knows by name.

    Attributes:
        module: That must be importable.
        package: What pip installs.
        options: For Accelerate to open it with.
        read_key: The key that the tracker itself gave its run; None where it takes ours, or has none.
        show: Sends a picture: tracker, name, file, step. None where it shows none.
    """

    module: str
    package: str
    options: Callable[[Opening], dict[str, Any]] = _nothing
    read_key: Callable[[Any], str] | None = None
    show: Callable[[Any, str, Path, int], None] | None = None


def read_picture(file: Path) -> Any:
    """A picture as numbers, `h w 3`."""
    import numpy as np
    from PIL import Image

    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def _show_batch(tracker: Any, name: str, file: Path, step: int) -> None:
    tracker.log_images({name: read_picture(file)[None]}, step=step, dataformats="NHWC")


def _show_list(tracker: Any, name: str, file: Path, step: int) -> None:
    tracker.log_images({name: [read_picture(file)]}, step=step)


def _show_one(tracker: Any, name: str, file: Path, step: int) -> None:
    tracker.log_images({name: read_picture(file)}, step=step)


def _show_in_mlflow(tracker: Any, name: str, file: Path, step: int) -> None:
    import mlflow

    mlflow.log_artifact(str(file))


def _show_in_comet(tracker: Any, name: str, file: Path, step: int) -> None:
    tracker.writer.log_image(str(file), name=name, step=step)


def _show_in_dvclive(tracker: Any, name: str, file: Path, step: int) -> None:
    tracker.live.log_image(f"{name}{file.suffix}", str(file))


def _open_mlflow(opening: Opening) -> dict[str, Any]:
    return {"run_id": opening.key} if opening.resumed else {"run_name": opening.name}


def _open_clearml(opening: Opening) -> dict[str, Any]:
    goes_on = {"continue_last_task": opening.key} if opening.resumed else {}
    # Else a task of the same name would be taken up, whatever run it is of.
    return {"task_name": opening.name, "reuse_last_task_id": False, **goes_on}


TRACKERS: dict[str, Tracker] = {
    "tensorboard": Tracker(
        "tensorboard",
        "'restuning[tracking]'",
        # Steps that are made again after a kill are shown once, and none of a run that was started over.
        lambda o: {"purge_step": o.step + 1 if o.resumed else 0},
        show=_show_batch,
    ),
    "wandb": Tracker(
        "wandb",
        "'restuning[tracking]'",
        lambda o: {"name": o.name, "dir": str(o.folder), "id": o.key, "resume": "allow"},
        show=_show_list,
    ),
    "mlflow": Tracker(
        "mlflow",
        "mlflow",
        _open_mlflow,
        lambda tracker: tracker.tracker.info.run_id,
        _show_in_mlflow,
    ),
    "comet_ml": Tracker(
        "comet_ml", "comet-ml", lambda o: {"experiment_key": o.key}, show=_show_in_comet
    ),
    "aim": Tracker(
        "aim",
        "'aim<4'",
        lambda o: {"run_hash": o.key} if o.resumed else {"experiment": o.name},
        lambda tracker: tracker.tracker.hash,
        _show_one,
    ),
    "clearml": Tracker(
        "clearml", "clearml", _open_clearml, lambda tracker: tracker.tracker.id, _show_one
    ),
    "dvclive": Tracker(
        "dvclive",
        "dvclive",
        # Beside the run and nowhere else: its defaults are one folder for all runs, and commits.
        lambda o: {
            "dir": str(o.folder / "dvclive"),
            "resume": o.resumed,
            "save_dvc_exp": False,
            "dvcyaml": False,
        },
        show=_show_in_dvclive,
    ),
    "swanlab": Tracker(
        "swanlab",
        "swanlab",
        lambda o: {"experiment_name": o.name, "id": o.key, "resume": "allow"},
        show=_show_list,
    ),
    # It knows a run by its name, so that two folders of one name must not share it.
    "trackio": Tracker(
        "trackio", "trackio", lambda o: {"name": f"{o.name}-{o.key[:8]}", "resume": "allow"}
    ),
}
"""By the name that Accelerate knows; one line makes another known to us."""


def check_track(track: Any) -> tuple[str | GeneralTracker, ...]:
    """Trackers as a setting holds them: a name, an object, or several of both.

    Raises:
        TrainingError: One is neither a known name nor a `GeneralTracker`.
    """
    # A single one is what a command line gives.
    several = isinstance(track, Sequence) and not isinstance(track, str)
    found: tuple[Any, ...] = tuple(track) if several else (track,)
    for each in found:
        if isinstance(each, GeneralTracker):
            continue
        # Accelerate lets others register a class of their own under a name.
        if not isinstance(each, str) or (each not in TRACKERS and each not in LOGGER_TYPE_TO_CLASS):
            known = ", ".join([*TRACKERS, *sorted(set(LOGGER_TYPE_TO_CLASS) - set(TRACKERS))])
            raise TrainingError(
                "a setting is out of its range",
                where="track",
                found=repr(each)[:200],
                fix=f"choose from {known}, or give a GeneralTracker of accelerate.tracking",
            )
    names = [name_of(each) for each in found]
    if len(set(names)) < len(names):
        raise TrainingError(
            "a tracker is given twice",
            where="track",
            found=", ".join(names),
            fix="give each once; objects are told apart by their `name`",
        )
    return found


def name_of(tracker: str | GeneralTracker) -> str:
    """What a tracker is called."""
    return tracker if isinstance(tracker, str) else str(getattr(tracker, "name", "unnamed"))


def check_installed(track: Sequence[str | GeneralTracker]) -> None:
    """Fail before training, not after its first epoch.

    Raises:
        MissingExtraError: A tracker is not installed, or Accelerate is too old for it.
    """
    for name in track:
        if not isinstance(name, str) or (known := TRACKERS.get(name)) is None:
            continue
        require(known.module, "tracking", f"track={name!r}", package=known.package)
        # Accelerate would leave it out without a word.
        if name not in LOGGER_TYPE_TO_CLASS or name not in map(str, get_available_trackers()):
            raise MissingExtraError(
                f"Accelerate does not work with the {known.module} that is installed",
                where=f"track={name!r}",
                fix=f"pip install -U accelerate {known.package}",
            )


class Tracking:
    """The open trackers of one run, in its main process.

    One that fails while the run goes is left out from there on, with a warning: `log.jsonl` has all that
    it would have shown, and a training is worth more than its picture.

    Args:
        accelerator: That was told of the trackers.
        folder: Of the run.
        keys: By which trackers knew the run before it was interrupted, by their names.
        step: The run goes on from there.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, keys: Mapping[str, str], step: int
    ) -> None:
        self.accelerator, self.folder, self.step = accelerator, folder, step
        self.before = dict(keys)
        self.keys: dict[str, str] = {}
        self.open: list[Any] = []

    def known(self) -> dict[str, str]:
        """The keys of all trackers that were ever told of this run, for its checkpoint."""
        return {**self.before, **self.keys}

    def start(self, config: Mapping[str, Any]) -> None:
        """Open every tracker, and tell those that do not know the run its settings.

        Args:
            config: The settings; `run` among them names it in place of its folder.

        Raises:
            TrainingError: One refuses to start (no account, no network).
        """
        if not self.accelerator.is_main_process or not self.accelerator.log_with:
            return
        options = {}
        name = str(config.get("run", self.folder.resolve().name))
        for each in map(name_of, map(_as_given, self.accelerator.log_with)):
            # A tracker that was added to a run that goes on begins anew.
            key = self.before.get(each) or uuid.uuid4().hex
            opening = Opening(self.folder, key, each in self.before, self.step, name)
            self.keys[each] = key
            if each in TRACKERS:
                options[each] = TRACKERS[each].options(opening)
        try:
            self.accelerator.init_trackers(PROJECT, init_kwargs=options)
            self.open = list(self.accelerator.trackers)
            for tracker in self.open:
                own = name_of(tracker)
                known = TRACKERS.get(own)
                if known is not None and known.read_key is not None:
                    self.keys[own] = str(known.read_key(tracker))
                if own not in self.before:
                    tracker.store_init_configuration(_as_config(config))
        except Exception as error:  # noqa: BLE001
            # Trackers raise classes of their own, which cannot be named without importing them.
            for tracker in self.accelerator.trackers:
                # One that did start must not stand open in this process.
                with suppress(Exception):
                    tracker.finish()
            self.open = []
            raise TrainingError(
                "a tracker did not start",
                where=", ".join(self.keys),
                found=f"{type(error).__name__}: {error}"[:300],
                fix="log in to it (or set WANDB_MODE=offline), or train without --track",
            ) from None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers to every open tracker."""
        if values:
            self._tell(lambda tracker: tracker.log(dict(values), step=step))

    def show(self, name: str, file: Path, step: int) -> None:
        """Send a picture to every open tracker that shows pictures."""

        def send(tracker: Any) -> None:
            known = TRACKERS.get(name_of(tracker))
            if known is not None and known.show is not None:
                known.show(tracker, name, file, step)
            elif known is None and hasattr(tracker, "log_images"):
                _show_list(tracker, name, file, step)

        self._tell(send)

    def finish(self) -> None:
        """Close the trackers; `end_training` would take the caller's process group down, too."""
        self._tell(lambda tracker: tracker.finish())
        self.open = []

    def _tell(self, what: Callable[[Any], None]) -> None:
        for tracker in list(self.open):
            try:
                what(tracker)
            except Exception as error:  # noqa: BLE001 (of whatever class a tracker has)
                self.open.remove(tracker)
                warn(
                    "a tracker failed and is told nothing more of this run",
                    where=name_of(tracker),
                    found=f"{type(error).__name__}: {error}"[:300],
                    fix=f"all figures are in {self.folder / 'log.jsonl'}",
                )


def _as_given(tracker: Any) -> str | GeneralTracker:
    # Accelerate holds names as members of an enumeration.
    return (
        tracker if isinstance(tracker, GeneralTracker) else str(getattr(tracker, "value", tracker))
    )


def _as_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as all trackers take them: numbers, strings and truth values."""
    plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
    return {**plain, "restuning": __version__}


def group_figures(entry: Mapping[str, Any], *, review: bool) -> dict[str, float]:
    """An entry of the log as trackers show it: `train/loss`, `validation/accuracy`.

    Args:
        entry: A line between reviews, or that of a review.
        review: Whose own figures are means over an epoch, `train/epoch_loss`; lines have the mean of some steps.
    """
    found: dict[str, float] = {}
    for name, value in entry.items():
        if name == "step":
            continue
        group, own = "train", name
        if name.startswith("val_"):
            group, own = "validation", name.removeprefix("val_")
        elif review and name not in ("epoch", "lr", "seconds"):
            own = f"epoch_{name}"
        # A denoiser's losses have the names of its tasks.
        for more, number in value.items() if isinstance(value, Mapping) else (("", value),):
            if isinstance(number, int | float) and not isinstance(number, bool):
                found[f"{group}/{own}/{more}" if more else f"{group}/{own}"] = number
    return found
