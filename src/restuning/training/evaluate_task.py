"""Test a saved task on a data set: what `restuning eval` calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import DataError
from restuning.data import DataOptions, load_data, say_left_out
from restuning.serve import Predictor
from restuning.serve.inputs import TextInputs
from restuning.task import Tuned
from restuning.task.task import to_probabilities
from restuning.training.batch import score
from restuning.training.calibrate import calibration_error
from restuning.training.evaluate import evaluate


def evaluate_task(
    predictor: Predictor,
    data: str | Path,
    options: DataOptions | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """How a predictor's only task answers to the test split, and what was left out.

    Beside accuracy, loss (mean cross-entropy of the logits as they are) and count: `ece`, the expected
    calibration error of the probabilities that a predictor gives (`training.calibration_error`), `nll`,
    their mean `-log` at the right class, `temperature`, and `ece_uncalibrated`, without it.

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
    if len(predictor.tasks) != 1:
        raise DataError(
            "one task is tested at a time",
            found=", ".join(predictor.tasks),
            fix="load each with Predictor.load(folder) and test it alone",
        )
    (task,) = predictor.tasks.values()
    options = DataOptions() if options is None else options
    if isinstance(predictor.inputs, TextInputs):
        # As many tokens as the task was trained on.
        options = replace(options, max_tokens=predictor.inputs.collate.longest)
    loaded = load_data(data, predictor.backbone, options)
    if loaded.test is None:
        raise DataError("there is no test split", where=loaded.name, fix="give a data set with one")
    # The same classes in another order would be scored, and wrongly, without an error.
    if task.labels and task.labels != loaded.labels:
        raise DataError(
            "the classes of the data are not those of the task",
            where=loaded.name,
            found=f"{loaded.num_classes} classes {loaded.labels[:4]}; the task has "
            f"{len(task.labels)}: {task.labels[:4]}",
            fix="evaluate on the data it was trained for",
        )
    tuned = Tuned(predictor.host, task).eval()
    result = _evaluate(tuned, loaded.test, task.temperature, batch_size, loaded.collate)
    said = say_left_out(loaded.left_out)
    # Named only where there is something: a program reads the same keys as ever.
    left_out = {"left out": said} if said else {}
    return {"data": loaded.name, "method": task.method, **result, **left_out}


def _evaluate(
    tuned: nn.Module, dataset: Any, temperature: float, batch_size: int, collate: Callable | None
) -> dict[str, float]:
    """As `evaluate`, and beside it what the probabilities are worth."""
    # Numbers for every example, and none for every class: logits of a large split fill a memory.
    losses, hits, before, after = [], [], [], []

    def watch(logits: Tensor, labels: Tensor) -> None:
        losses.append(score(logits / temperature, labels)[0].item())
        hits.append((logits.argmax(1) == labels).cpu())
        before.append(to_probabilities(logits, 1.0).amax(1).cpu())
        after.append(to_probabilities(logits, temperature).amax(1).cpu())

    result = evaluate(tuned, dataset, batch_size, collate, watch=watch)
    right = torch.cat(hits)
    return {
        **result,
        "nll": sum(losses) / len(right),
        "ece": calibration_error(torch.cat(after), right),
        "ece_uncalibrated": calibration_error(torch.cat(before), right),
        "temperature": temperature,
    }
