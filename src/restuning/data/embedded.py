"""Data of classes as data of embeddings: the same inputs and labels, and another question."""

from __future__ import annotations

from restuning._errors import DataError, warn
from restuning.data.data import Data
from restuning.problems import Embedding, SingleLabel


def as_embedding(data: Data, dimensions: int | None) -> Data:
    """Make data of classes ask for a vector that is near those of its class.

    Args:
        data: Whose problem is changed.
        dimensions: Of the vector; None for `Embedding.of`'s.

    Raises:
        DataError: They are no data of one class an input, or there are no dimensions.

    Warns:
        RestuningWarning: The dimensions that are asked for are fewer than the classes need.
    """
    if type(data.problem) is not SingleLabel:
        raise DataError(
            "an embedding is learned from one class an input",
            where=data.name,
            found=f"problem {data.problem.kind}",
            fix="give data of classes, or leave out --problem",
        )
    if dimensions is not None and dimensions < 1:
        raise DataError("no dimensions", found=f"{dimensions}", fix="give 1 or more")
    classes = len(data.labels)
    if dimensions is not None and dimensions < classes - 1:
        warn(
            "an embedding in fewer dimensions than classes less one finds less",
            where=data.name,
            found=f"{dimensions} dimensions, {classes} classes",
            fix=f"give {classes - 1}, or leave --dimensions out",
        )
    data.problem = Embedding.of(data.labels, dimensions)
    return data
