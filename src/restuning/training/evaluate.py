"""Accuracy and loss of a tuned model on a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from restuning._errors import TrainingError
from restuning.training.batch import IGNORED, bounds, check_labels, move, run, score


def evaluate(
    tuned: nn.Module,
    dataset: Any,
    batch_size: int = 64,
    collate: Callable | None = None,
    *,
    workers: int = 0,
    accelerator: Accelerator | None = None,
    between: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Accuracy, mean cross entropy (without label smoothing) and count, of examples or of tokens.

    The model is left in the mode it was in. Order and batch size do not matter.

    Args:
        tuned: A module with `.task` and `.host`.
        dataset: Map-style, yields `(input, label)`.
        batch_size: Per process.
        collate: Makes a batch of a list of examples.
        workers: Processes that load data.
        accelerator: Of a run in several processes: each takes a share, all get the result.
        between: Called before every batch; may raise to stop.

    Raises:
        TrainingError: The data set is empty or a label is outside the classes.
    """
    if len(dataset) == 0:
        raise TrainingError("there is nothing to evaluate", found="an empty data set")
    world = accelerator.num_processes if accelerator else 1
    rank = accelerator.process_index if accelerator else 0
    own = range(len(dataset) * rank // world, len(dataset) * (rank + 1) // world)
    # The task's: the backbone's may be kept elsewhere until it runs.
    parameter = next(getattr(tuned, "task", tuned).parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    loader = DataLoader(
        dataset,
        batch_sampler=[list(own[i : i + batch_size]) for i in range(0, len(own), batch_size)],
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),
    )
    # Sums of batches meet in double precision: 50,000 losses in float32 lose digits.
    sums = torch.zeros(3, dtype=torch.float64 if device.type != "mps" else torch.float32)
    sums = sums.to(device)
    training = {m: m.training for m in tuned.modules()}
    tuned.eval()
    try:
        with torch.no_grad():
            for inputs, labels in loader:
                if between is not None:
                    between()
                lowest, highest = bounds(labels)
                inputs, labels = move(inputs, labels, device)
                logits = run(tuned, inputs)
                check_labels(lowest, highest, logits.shape[-1])
                if labels.ndim == 2:
                    counted = labels != IGNORED
                    logits, labels = logits[counted], labels[counted]
                loss, hits = score(logits, labels)
                sums += torch.stack([loss, hits.to(loss.dtype), loss.new_tensor(len(labels))])
    finally:
        for module, mode in training.items():
            module.training = mode
    if accelerator is not None and world > 1:
        sums = accelerator.reduce(sums, "sum")
    loss, correct, count = sums.tolist()  # type: ignore[union-attr]
    return {"accuracy": correct / count, "loss": loss / count, "count": int(count)}
