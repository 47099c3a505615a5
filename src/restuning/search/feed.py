"""What a choice is fed with: inputs, and features of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from restuning.backbones import Backbone
from restuning.data import Data
from restuning.features import default_root
from restuning.features.stored import BY_ITSELF, Stored, open_or_build
from restuning.host import Extractor
from restuning.task import Task


@dataclass(frozen=True)
class Inputs:
    """What a choice is fed with.

    Attributes:
        data: Inputs with a training and a validation split.
        features: A task's features of these splits, built if it is told to, else only found; None
            where there are none, or where they cannot be stored.
        tested: Inputs of the test split, for the time of the final run.
        options: Of every method, such as `pool`.
    """

    data: Data
    features: Callable[[Task, bool], Stored | None]
    tested: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


def open_inputs(
    host: Extractor,
    backbone: Backbone,
    data: Data,
    *,
    plain: Data | None = None,
    root: str | Path | None = None,
    views: int = 1,
    dtype: str = "fp32",
    precision: str = "fp32",
    workers: int = 0,
    limit: int = BY_ITSELF,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Inputs:
    """Inputs of a data set, and stores of its training and validation features.

    The test split is counted and left out: its features are computed for the method that is taken,
    not for all that are tried.

    Args:
        host: The frozen backbone.
        backbone: What it was made of.
        data: With a training and a validation split (`with_validation`).
        plain: The same without augmentation; None if there is none.
        root: Where stores lie; None for the usual place.
        views, dtype, precision, workers: As for `train.stored.stored`.
        limit: Bytes of a store above which none is built.
        options: Of every method, such as `pool`.
        say: Receives a line for each store that is built.
    """
    apart = replace(plain or data, test=None)
    place = Path(root or default_root())

    def features(task: Task, build: bool) -> Stored | None:
        return open_or_build(
            host,
            backbone,
            apart,
            task.needs(host.readout_rule),
            root=place,
            views=views,
            dtype=dtype,
            precision=precision,
            workers=workers,
            limit=limit if build else 0,
            say=say if build else lambda line: None,
        )

    tested = 0 if data.test is None else len(data.test)
    return Inputs(replace(data, test=None), features, tested, dict(options or {}))
