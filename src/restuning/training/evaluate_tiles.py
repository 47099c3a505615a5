"""Test a saved task on pixels with images read in windows, at the full size of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from restuning._errors import DataError
from restuning.data import Data
from restuning.data.pixels import ImagesWithTargets
from restuning.problems import OfPixels
from restuning.problems.answers import blend
from restuning.problems.meters import read_meters
from restuning.serve import Predictor


def evaluate_in_tiles(predictor: Predictor, data: Data) -> dict[str, Any]:
    """Figures of a predictor's only task, over all pixels of the test split, and how large its windows were.

    Beside those at the size of the backbone (`evaluate`) these count an image by its pixels, and there is no loss.

    Args:
        predictor: Of one task on pixels, with `tiles`.
        data: A folder or a column with targets of pixels.

    Raises:
        DataError: The data are others, or a target cannot be read.

    Cost: as `Predictor` with `tiles`; of an answer some rows are held at a time.
    """
    split = data.test
    ((name, task),) = predictor.tasks.items()
    problem = task.problem
    if not isinstance(split, ImagesWithTargets) or not isinstance(problem, OfPixels):
        raise DataError(
            "windows are tested on targets in their own size",
            where=data.name,
            found=type(split).__name__,
            fix="give a folder of images and masks or depths, or a column of a table, or leave --tiles out",
        )
    assert predictor.tiles is not None
    meters = problem.metrics(len(predictor.labels[name]))
    answers = predictor.stream(split.image(n) for n in range(len(split)))
    for index, answer in enumerate(answers):
        target = torch.from_numpy(np.array(split.target(index)))
        said = answer[name]
        for top, drawn, _ in blend(said.list_windows(), said.drawn_size()):
            logits = problem.as_logits(drawn)
            meters.update(logits[None], target[None, top : top + len(drawn)])
    height, width = predictor.tiles.window
    window = f"{width} x {height}"
    return {**read_meters(meters), "count": len(split), "window": window}
