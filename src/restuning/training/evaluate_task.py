"""Test a saved task on a data set: what `restuning eval` calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from restuning._errors import DataError
from restuning.data import Data, DataOptions, load_data, say_left_out
from restuning.data.tables import find_table
from restuning.problems import Embedding
from restuning.problems.judged import Judged
from restuning.serve import Predictor
from restuning.serve.inputs import AudioInputs, ImageInputs, TextInputs
from restuning.task import Task, Tuned
from restuning.training.evaluate import evaluate


@dataclass(frozen=True)
class JudgedTask:
    """A saved task on a test split.

    Attributes:
        result: What `evaluate_task` gives.
        judged: Figures, figures by output, pictures, mistakes and rows.
        data: Whose test split it is.
        task: That answered.
        on: Name of the split: "test", or "validation" where that was asked for without one.
        split: Its inputs.
    """

    result: dict[str, Any]
    judged: Judged = field(repr=False)
    data: Data = field(repr=False)
    task: Task = field(repr=False)
    on: str = "test"
    split: Any = field(default=None, repr=False)


def evaluate_task(
    predictor: Predictor,
    data: str | Path,
    options: DataOptions | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """How a predictor's only task answers to the test split, and what was left out.

    Beside accuracy, loss (mean cross-entropy of the logits as they are) and count all figures of `Problem.judge`, of
    one class of several these: `balanced_accuracy`, `f1_macro`, `auroc`, `ece`, the expected
    calibration error of the probabilities that a predictor gives (`training.calibration_error`), `nll`,
    their mean `-log` at the right class, and `ece_uncalibrated`, without the `temperature`. Of numbers nothing about
    probabilities.

    Args:
        predictor: Of one task, as `Predictor.load` opens it.
        data: A name or path, as `load_data` takes it.
        options: How the data are read; None for the defaults. Texts are read to the length that the
            task was trained on.
        batch_size: Inputs of one forward.

    Raises:
        DataError: The predictor holds several tasks, there is no test split, or the classes of the
            data are not those of the task.

    Cost: one backbone forward a batch.
    """
    return judge_task(predictor, data, options, batch_size).result


def judge_task(
    predictor: Predictor,
    data: str | Path,
    options: DataOptions | None = None,
    batch_size: int = 64,
    *,
    or_validation: bool = False,
) -> JudgedTask:
    """As `evaluate_task`, and with all that the judge of the problem tells.

    Args:
        predictor, data, options, batch_size: As of `evaluate_task`.
        or_validation: Judge on the validation split where there is no test split.
    """
    task, loaded = load_for(predictor, data, options)
    return judge_loaded(predictor, task, loaded, batch_size, or_validation=or_validation)


def judge_loaded(
    predictor: Predictor,
    task: Task,
    loaded: Data,
    batch_size: int = 64,
    *,
    or_validation: bool = False,
) -> JudgedTask:
    """As `judge_task`, on what `load_for` gave."""
    split, on = loaded.test, "test"
    if split is None and or_validation:
        split, on = loaded.val, "validation"
    if split is None:
        raise DataError("there is no test split", where=loaded.name, fix="give a data set with one")
    tuned = Tuned(predictor.host, task).eval()
    judge = task.problem.judge(loaded.labels, task.temperature)
    told = evaluate(tuned, split, batch_size, loaded.collate, watch=judge.update)
    judged = judge.conclude()
    return JudgedTask(tell_judged(told, judged, loaded, task), judged, loaded, task, on, split)


def tell_judged(
    told: Mapping[str, Any], judged: Judged, loaded: Data, task: Task
) -> dict[str, Any]:
    """What is told of a task that was judged: its data and method, then all figures, and what was left out.

    Args:
        told: Metric, loss and count.
        judged: All figures; those of `told` go before.
        loaded: Data that it was judged on.
        task: That was judged.
    """
    figures = {name: value for name, value in judged.figures.items() if name not in told}
    # Of answers that no temperature was fitted to it would say nothing.
    temperature = {"temperature": task.temperature} if "ece" in figures else {}
    said = say_left_out(loaded.left_out)
    # Named only where there is something: a program reads the same keys as ever.
    left_out = {"left out": said} if said else {}
    return {
        "data": loaded.name,
        "method": task.method,
        **told,
        **figures,
        **temperature,
        **left_out,
    }


def load_for(
    predictor: Predictor, data: str | Path, options: DataOptions | None = None
) -> tuple[Task, Data]:
    """The only task of a predictor, and data read as it was trained, whose answers are of its kind and names.

    Args:
        predictor, data, options: As of `evaluate_task`.

    Raises:
        DataError: As `evaluate_task`.
    """
    if len(predictor.tasks) != 1:
        raise DataError(
            "one task is tested at a time",
            found=", ".join(predictor.tasks),
            fix="give the folder of one of them (NAME.task), and of a table its column (--label NAME)",
        )
    (task,) = predictor.tasks.values()
    options = DataOptions() if options is None else options
    if isinstance(predictor.inputs, AudioInputs) and predictor.inputs.audio.has_mask:
        # As much of a sound as the task was trained on.
        options = replace(options, seconds=predictor.inputs.audio.seconds)
    if isinstance(predictor.inputs, TextInputs):
        # As many tokens as the task was trained on.
        options = replace(options, max_tokens=predictor.inputs.collate.longest)
        if predictor.inputs.collate.table:
            # Read as it was then: a csv of one class a row has other splits.
            options = replace(options, problem=task.problem.kind)
        else:
            _refuse_columns(options)
    elif options.problem is None and find_table(data, predictor.backbone, options):
        # Cells may look like answers of another kind: codes of classes like numbers.
        options = replace(options, problem=task.problem.kind)
    if isinstance(task.problem, Embedding) and options.problem in (None, Embedding.kind):
        # Data of classes say nothing of it.
        dimensions = task.problem.dimensions
        options = replace(options, problem=task.problem.kind, dimensions=dimensions)
    backbone = predictor.backbone
    if isinstance(predictor.inputs, ImageInputs):
        # As the task was trained: a column of classes beside one of masks saw its images whole.
        backbone = replace(backbone, preprocessing=predictor.inputs.preprocessing)
    loaded = load_data(data, backbone, options)
    # The same classes in another order would be scored, and wrongly, without an error.
    if task.labels and task.labels != loaded.labels:
        raise DataError(
            "the classes of the data are not those of the task",
            where=loaded.name,
            found=f"{loaded.num_classes} classes {loaded.labels[:4]}; the task has "
            f"{len(task.labels)}: {task.labels[:4]}",
            fix="evaluate on the data it was trained for",
        )
    # Tasks on tagged words of before say nothing of a problem.
    if not isinstance(loaded.problem, type(task.problem)):
        raise DataError(
            "the data ask for another kind of answer than the task gives",
            where=loaded.name,
            found=f"{loaded.problem.kind}; the task: {task.problem.kind}",
            fix="evaluate on the data it was trained for",
        )
    return task, loaded


def _refuse_columns(options: DataOptions) -> None:
    """Refuse options that read a csv as a table: its splits are others, and would test on rows of training."""
    several = not isinstance(options.label, str) or "," in options.label
    asked = {
        "--problem": options.problem is not None,
        "--image": options.image is not None,
        "--audio": options.audio is not None,
        "--label": several,
    }
    if any(asked.values()):
        raise DataError(
            "the task was trained on texts of one class a row",
            where=", ".join(option for option, given in asked.items() if given),
            found="an option for columns of a table, whose rows are split in another way",
            fix="leave it out: the test split is then that of training",
        )
