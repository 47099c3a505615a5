"""Test a saved task on pixels with images read in windows, at the full size of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restuning._errors import DataError
from restuning.data import Data
from restuning.data.pixels import ImagesWithTargets
from restuning.problems import OfPixels
from restuning.problems.answers import blend
from restuning.problems.judge import JudgeOfPixels
from restuning.serve import Predictor
from restuning.task import Task
from restuning.training.evaluate_task import JudgedTask, tell_judged


def judge_in_tiles(predictor: Predictor, task: Task, data: Data) -> JudgedTask:
    """As `judge_task`, over all pixels of the test split, each image at its own size; and how large the windows were.

    Beside what is found at the size of the backbone these figures count an image by its pixels. The loss is the mean over images
    of that of their pixels.

    Args:
        predictor: Of this task alone, with `tiles`.
        task: On pixels.
        data: A folder or a column with targets of pixels; see `load_for`.

    Raises:
        DataError: The data are others, or a target cannot be read.

    Cost: as `Predictor` with `tiles`; of an answer some rows are held at a time, and of each image its mask or depth.
    """
    split = data.test
    problem = task.problem
    if not isinstance(split, ImagesWithTargets) or not isinstance(problem, OfPixels):
        raise DataError(
            "windows are tested on targets in their own size",
            where=data.name,
            found=type(split).__name__,
            fix="give a folder of images and masks or depths, or a column of a table, or leave --tiles out",
        )
    assert predictor.tiles is not None
    judge = problem.judge(data.labels, task.temperature)
    assert isinstance(judge, JudgeOfPixels)
    (name,) = predictor.tasks
    answers = predictor.stream(split.image(n) for n in range(len(split)))
    for index, answer in enumerate(answers):
        judge.update_in_rows(_draw(answer[name], split.target(index), problem))
    judged = judge.conclude()
    losses = [row["loss"] for row in judged.rows]
    height, width = predictor.tiles.window
    told = {
        problem.metric: judged.figures[problem.metric],
        "loss": sum(losses) / len(losses),
        "count": len(split),
    }
    result = {**tell_judged(told, judged, data, task), "window": f"{width} x {height}"}
    return JudgedTask(result, judged, data, task, "test", split)


def _draw(said: Any, target: Any, problem: OfPixels) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets of an image, some rows at a time."""
    truth = torch.from_numpy(np.array(target))
    for top, drawn, _ in blend(said.list_windows(), said.drawn_size()):
        yield problem.as_logits(drawn), truth[top : top + len(drawn)]
