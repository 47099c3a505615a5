"""`fit` and `fit_until`: train a task, in one process or several, whatever interrupts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from torch import nn

from restuning._errors import TrainingError, warn
from restuning.host import Extractor
from restuning.runtime.processes import count_processes
from restuning.task import Task
from restuning.training.callbacks import Callback, Record
from restuning.training.log import draw_curves
from restuning.training.loop import run_to_end
from restuning.training.settings import FitSettings
from restuning.training.supervised import CURVES, FitResult, Supervised
from restuning.training.trackers import check_installed


def fit(
    tuned: nn.Module,
    train: Any,
    val: Any = None,
    *,
    settings: FitSettings | None = None,
    out: str | Path,
    collate: Callable | None = None,
    resume: bool = True,
    progress: bool | Literal["force"] = True,
    callbacks: Sequence[Callback] = (),
    about: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train `tuned.task` and leave it in eval mode with its final weights, and temperature 1.

    Killed at any moment and started again with the same arguments, it goes on from its last
    checkpoint and ends with the same weights as if it had not been; a finished run returns its
    result at once. A side network that wants to see the split before the first step
    (`SideNetwork.prepare`) is shown it; `ridge` is solved from it, and takes no step after that
    (`Task.solved`): `epochs`, `lr` and what else is about steps mean nothing then. Under `accelerate launch` every
    process takes its share of each batch.

    `out` receives `log.jsonl`, `curves.png` (of a task that is solved none) and `checkpoints/`, the last holding one small file
    once the run is finished.

    Args:
        tuned: A module with `.task` (what is trained) and `.host`.
        train: Map-style data set of `(input, label)`; a dict input is called by keyword.
        val: As `train`; evaluated after every epoch and never used to choose a checkpoint.
        settings: None for the defaults.
        out: The run's folder.
        collate: Makes a batch of a list of examples.
        resume: False starts over and forgets what the folder holds.
        progress: True shows a bar on a terminal and one line an epoch elsewhere, "force" a bar
            always, False nothing.
        callbacks: Told what the run does, in this order; those that the settings ask for come after them. One that
            is given again for another run begins anew.
        about: Plain values that trackers are told beside the settings; `run` names it there in place of its folder.

    Raises:
        CallbackError: A callback raised; a checkpoint was written first.
        BackboneChangedError: The backbone is not what it was when its host was built.
        DivergedError: A loss or a weight became NaN or infinite.
        TrainingError: A side network has to be prepared, and the inputs change each time they are
            read (random augmentation); the folder belongs to a run with other settings, another process
            works there or another thread of this one trains, the disk is full, memory is short, or
            there is nothing to train.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written first.
        SystemExit: SIGTERM, likewise.
    """
    settings = FitSettings() if settings is None else settings
    _check(tuned, train, val, settings)
    objective = Supervised(tuned, train, val, settings, Path(out), collate, callbacks, about)
    _check_callbacks(objective)
    return _run(objective, resume=resume, progress=progress)


def fit_until(
    stop: Callable[[list[dict[str, Any]]], bool],
    tuned: nn.Module,
    train: Any,
    val: Any = None,
    *,
    settings: FitSettings | None = None,
    out: str | Path,
    collate: Callable | None = None,
    resume: bool = True,
) -> FitResult:
    """Train as `fit` does, but end after the first epoch that `stop` is satisfied with.

    Warm-up and cosine are those of the whole run, so an early end leaves the rate above zero. No
    progress is shown: this is for callers that make many runs and report on them themselves.

    Args:
        stop: Shown `FitResult.history` after each epoch; true ends the run there. It must follow from
            the history alone, or a resumed run may end elsewhere.
        tuned: As for `fit`, like all that follows.
        train: The training data.
        val: The validation data, or None.
        settings: None for the defaults.
        out: The run's folder.
        collate: Makes a batch of a list of examples.
        resume: False starts over and forgets what the folder holds.

    Raises:
        RestuningError: As `fit`.
    """
    settings = FitSettings() if settings is None else settings
    _check(tuned, train, val, settings)
    objective = Supervised(tuned, train, val, settings, Path(out), collate, [_Until(stop)])
    return _run(objective, resume=resume, progress=False)


class _Until(Callback):
    """Ends a run when a function has seen enough of its history."""

    def __init__(self, stop: Callable[[list[dict[str, Any]]], bool]) -> None:
        self.stop = stop

    def on_epoch(self, record: Record) -> bool:
        return self.stop([dict(entry) for entry in record.history])


def _check_callbacks(objective: Supervised) -> None:
    """Refuse callbacks that nothing would come of, or say so."""
    blind = [type(each).__name__ for each in objective.callbacks if each.needs_validation]
    if blind and objective.val is None:
        raise TrainingError(
            "there is nothing to follow without validation data",
            where=", ".join(blind),
            found="a run that evaluates after no epoch",
            fix="give validation data (not --final), or leave early stopping and best weights out",
        )
    if objective.solved and objective.callbacks.all:
        warn(
            "callbacks have nothing to follow in a task that is solved in closed form",
            where=", ".join(type(each).__name__ for each in objective.callbacks),
            found="no steps and one review",
            fix="`on_epoch` and `on_end` are called once; leave them out, or name a method that takes steps",
        )


def _run(objective: Supervised, *, resume: bool, progress: bool | Literal["force"]) -> FitResult:
    out = objective.out
    if isinstance(objective.task, Task):
        # One that it has was fitted to answers of other weights.
        objective.task.temperature = 1.0
        objective.task.problem = objective.problem = objective.problem.without_errors()
    result = FitResult(**run_to_end(objective, out, resume=resume, progress=progress))
    # A finished run whose picture was deleted gets it back: the history has all that it shows.
    curves = out / CURVES
    if result.steps and not curves.exists() and PartialState().is_main_process:
        draw_curves(result.history, curves, objective.problem)
    return result


def refuse_in_several(task: nn.Module) -> None:
    """Refuse a task of which several processes of a launcher would train another one than one does.

    Raises:
        TrainingError: Its side network deals the rows of a batch out, in each process those of its own part.
    """
    if count_processes() > 1 and getattr(getattr(task, "side", None), "deals", False):
        raise TrainingError(
            "an ensemble is trained in one process: it deals the rows of a batch out among its networks, and of several "
            "processes each would deal its own part, so that they would train another one",
            where=getattr(task, "method", "") or type(task).__name__,
            found=f"{count_processes()} processes of a launcher",
            fix="store features with the launcher (`restuning cache`) and train from them without it, or name another method, "
            "such as ridge or mixing-bypass",
        )


def _check(tuned: nn.Module, train: Any, val: Any, settings: FitSettings) -> None:
    check_installed(settings.track)
    task = getattr(tuned, "task", None)
    if not isinstance(task, nn.Module):
        raise TrainingError(
            "fit trains a module with a task",
            found=type(tuned).__name__,
            fix="give it Tuned(host, task)",
        )
    refuse_in_several(task)
    if isinstance(host := getattr(tuned, "host", None), Extractor):
        host.check_unchanged()
    for name, data in (("training", train), ("validation", val)):
        if data is not None and not hasattr(data, "__len__"):
            raise TrainingError(
                f"the {name} data must be map-style",
                found=f"{type(data).__name__} has no length",
                fix="give a data set with __len__ and __getitem__",
            )
    if len(train) == 0:
        raise TrainingError("there is nothing to train on", found="an empty data set")
    if val is not None and len(val) == 0:
        raise TrainingError(
            "the validation data are empty", fix="give some, or none at all (val=None)"
        )
