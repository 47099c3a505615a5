"""Figures of retrieval: each example is a query, and all others that share its class are relevant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

QUERIES = 256
"""That are ranked at a time: memory for so many rows of similarities."""


def recall_at(vectors: Tensor, labels: Tensor, count: int) -> float:
    """The share of queries with a relevant example among the `count` nearest; as metric learning reports it.

    Nearest by cosine, of equally near ones the first in the order of the rows first; a query is not found by itself, and one
    whose class nobody shares does not count. torchmetrics calls it the hit rate (`RetrievalHitRate(top_k=count)`).

    Args:
        vectors: `n d`.
        labels: `n`.
        count: From 1.

    Returns:
        From 0 to 1; NaN where no class has two examples.
    """
    hits = asked = 0
    for cosines, relevant in _queries(vectors, labels):
        # `topk` takes any of equals; this says which, and the average precision below says the same.
        near = cosines.argsort(dim=1, descending=True, stable=True)[:, :count]
        hits += int(relevant.gather(1, near).any(1).sum())
        asked += len(relevant)
    return hits / asked if asked else float("nan")


def mean_average_precision(vectors: Tensor, labels: Tensor) -> float:
    """The mean over queries of the average precision of all others in order (`RetrievalMAP` of torchmetrics).

    Args and Returns: as `recall_at`.
    """
    total, asked = 0.0, 0
    for cosines, relevant in _queries(vectors, labels):
        order = cosines.argsort(dim=1, descending=True, stable=True)
        # The query itself is last, and is not relevant.
        found = relevant.gather(1, order).double()
        places = torch.arange(1, found.shape[1] + 1, device=found.device)
        precision = found.cumsum(1) / places
        total += float(((precision * found).sum(1) / found.sum(1)).sum())
        asked += len(relevant)
    return total / asked if asked else float("nan")


def _queries(vectors: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosines and relevance of all examples for some queries at a time, `q n`; those that nobody answers are left out."""
    unit = F.normalize(vectors.float(), dim=-1)
    for at in torch.arange(len(unit), device=unit.device).split(QUERIES):
        cosines, relevant = unit[at] @ unit.T, labels[at][:, None] == labels
        own = torch.arange(len(at), device=unit.device)
        cosines[own, at], relevant[own, at] = -torch.inf, False
        asked = relevant.any(1)
        yield cosines[asked], relevant[asked]


def make_meters() -> dict[str, Any]:
    """By name a new torchmetrics metric each, which holds the vectors that it is shown."""
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat

    class OfVectors(Metric):
        full_state_update = False

        def __init__(self, figure: Any) -> None:
            super().__init__(sync_on_compute=False)
            self.figure = figure
            self.add_state("vectors", [], dist_reduce_fx="cat")
            self.add_state("labels", [], dist_reduce_fx="cat")

        def update(self, logits: Tensor, targets: Tensor) -> None:
            self.vectors.append(logits.detach().float())  # type: ignore[operator, union-attr]
            self.labels.append(targets)  # type: ignore[operator, union-attr]

        def compute(self) -> Tensor:
            vectors, labels = dim_zero_cat(self.vectors), dim_zero_cat(self.labels)  # type: ignore[arg-type]
            return torch.tensor(self.figure(vectors, labels))

    return {
        "recall_at_1": OfVectors(lambda vectors, labels: recall_at(vectors, labels, 1)),
        "recall_at_5": OfVectors(lambda vectors, labels: recall_at(vectors, labels, 5)),
        "mean_average_precision": OfVectors(mean_average_precision),
    }
