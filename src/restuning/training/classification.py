"""Cross entropy over classes, of examples or of their tokens: what `fit` hands to the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from restuning.data.identity import Watch
from restuning.host import is_offloaded
from restuning.training.batch import (
    check_labels,
    compute_logits,
    label_range,
    move,
    score,
    split_batch,
)
from restuning.training.evaluate import evaluate
from restuning.training.identity import (
    describe_backbone,
    describe_classes,
    describe_data,
    describe_form,
    describe_settings,
)
from restuning.training.log import draw_curves
from restuning.training.objective import RunTotals, TrainingObjective
from restuning.training.prepare import conclude_tuned, is_solved, prepare_tuned, solve_tuned
from restuning.training.randomness import Order, batches
from restuning.training.settings import FitSettings

CURVES = "curves.png"


@dataclass(frozen=True)
class FitResult:
    """The figures of a finished run.

    Args:
        history: One entry an epoch: epoch, step, loss, accuracy, val_loss, val_accuracy, lr and
            seconds; the val figures are None without validation data. Of a task that is solved
            (`Task.solved`) one entry, epoch 0, whose loss and accuracy are those of rows left out.
        seconds: Time of training and evaluation, summed over all resumed parts.
        peak_memory_bytes: Above the start of the run, largest of its parts; None if unmeasurable.
        memory_measure: How that was measured.
        steps: Optimiser steps.
        train_loss: Mean over the last epoch; of a solved task over rows left out.
        train_accuracy: Over the last epoch, counted while it trained; likewise.
        val_accuracy: Accuracy of the final weights; None without validation data.
        val_loss: Cross entropy of the final weights, likewise.
    """

    history: list[dict[str, Any]]
    seconds: float
    peak_memory_bytes: int | None
    memory_measure: str
    steps: int
    train_loss: float
    train_accuracy: float
    val_accuracy: float | None
    val_loss: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON."""
        return asdict(self)


class Classification(TrainingObjective):
    """Trains `tuned.task` to give labels, and evaluates it after every epoch.

    Args:
        tuned: With `.task` and `.host`.
        train: Map-style data set of `(input, label)`.
        val: As `train`, or None.
        settings: Settings of the run.
        collate: Makes a batch of a list of examples.
        out: The run's folder, for the curves.
        stop: As for `fit_until`; None trains to the last step.
    """

    def __init__(
        self,
        tuned: nn.Module,
        train: Any,
        val: Any,
        settings: FitSettings,
        out: Path,
        collate: Callable | None = None,
        stop: Callable[[list[dict[str, Any]]], bool] | None = None,
    ) -> None:
        self.tuned = self.model = tuned
        self.train, self.val = train, val
        self.settings: FitSettings = settings
        self.out, self.collate, self.stop = out, collate, stop
        # The training split's own, which is another one where rows were prepared beside it.
        self.train_collate = collate
        self.order = Order(len(train), settings.batch_size, settings.epochs, settings.seed)
        self.task: nn.Module = tuned.get_submodule("task")
        # Solved by `prepare`: the run ends before its first step.
        self.solved = is_solved(self.task)
        self.steps = 0 if self.solved else self.order.total
        self.lines = self.order.per_epoch
        self.warmup = round(settings.warmup * self.order.per_epoch)
        self.epoch_sums = [0.0, 0.0, 0]
        self.line_sums = [0.0, 0]
        self.watches: list[Watch] = []
        self._description = ""
        self._own_forward = "forward" in vars(tuned)

    def identity(self) -> dict[str, Any]:
        """The settings that matter, data, class names and backbone, and a digest of the task's form."""
        # Before contents are looked at: what is trained on must be what the run is known by.
        self.watches = [Watch(split) for split in (self.train, self.val) if split is not None]
        return {
            **describe_settings(self.settings, self.task),
            "training examples": len(self.train),
            "validation examples": 0 if self.val is None else len(self.val),
            **describe_data(self.train, self.val, self.collate),
            "the backbone": describe_backbone(self.tuned),
            "the method's form": describe_form(self.task),
            # Last, for it may be long.
            "the class names": describe_classes(getattr(self.task, "labels", None)),
        }

    def check_data(self) -> None:
        """Refuse files that changed since the run, or this part of it, began."""
        for watch in self.watches:
            watch.check()

    def place(self, accelerator: Accelerator) -> None:
        """On its device and wrapped; a backbone whose weights are kept elsewhere stays there."""
        self.accelerator = accelerator
        backbone = getattr(getattr(self.tuned, "host", None), "model", None)
        # Its parameters are on `meta` until a module runs; there is nothing there to be moved.
        if isinstance(backbone, nn.Module) and is_offloaded(backbone):
            self.task.to(accelerator.device)
            self.model = accelerator.prepare_model(self.tuned, device_placement=False)
        else:
            self.model = accelerator.prepare_model(self.tuned)

    def prepare(self) -> None:
        """Show the training split to side networks that want to see it first."""
        if self.solved:
            answers, labels = solve_tuned(self.tuned, self.train, self.collate)
            loss, hits = score(answers, labels)
            self.epoch_sums = [loss.item(), hits.item(), len(labels)]
            return
        self.train, self.train_collate = prepare_tuned(self.tuned, self.train, self.collate)

    def release(self, accelerator: Accelerator) -> None:
        """As for every objective; the caller's own forward comes back."""
        super().release(accelerator)
        if not self._own_forward:
            # Accelerate leaves a bound method behind, which a copy of the module would share.
            vars(self.tuned).pop("forward", None)

    def batches(self, start: int) -> Iterator[Any]:
        """Batches of the data set, loaded ahead where `workers` says so."""
        loader = batches(
            self.train,
            self.order,
            start,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.train_collate,
            self.settings.workers,
            pin=self.accelerator.device.type == "cuda",
        )
        return iter(loader)

    def split(self, batch: tuple[Any, Tensor]) -> Sequence[Any]:
        """Pieces, each with the range of the whole batch's labels."""
        inputs, labels = batch
        # Before they are on a GPU, which would have to be waited for.
        lowest_highest = label_range(labels)
        pieces = split_batch(inputs, labels, self.settings.accumulate)
        return [(piece, lowest_highest) for piece in pieces]

    def losses(self, piece: Any) -> tuple[Tensor, Tensor]:
        """Cross entropy and right answers."""
        (inputs, labels), (lowest, highest) = piece
        inputs, labels = move(inputs, labels, self.accelerator.device)
        logits = compute_logits(self.model, inputs)
        check_labels(lowest, highest, logits.shape[-1])
        loss, hits = score(logits, labels, self.settings.label_smoothing)
        return loss, torch.stack([loss.detach(), hits.to(loss.dtype)])

    def record(self, figures: Sequence[float], examples: int) -> None:
        """Add to the sums of the epoch and of the line."""
        loss, hits = figures
        self.epoch_sums = [
            self.epoch_sums[0] + loss,
            self.epoch_sums[1] + hits,
            self.epoch_sums[2] + examples,
        ]
        self.line_sums = [self.line_sums[0] + loss, self.line_sums[1] + examples]

    def line(self, step: int) -> dict[str, Any]:
        """Epoch and mean loss."""
        loss = self.line_sums[0] / self.line_sums[1]
        # Steps count from 1 here, and the last one of an epoch still belongs to it.
        epoch = (step - 1) // self.order.per_epoch + 1
        self.line_sums = [0.0, 0]
        _, hits, count = self.epoch_sums
        self._describe_epoch(epoch, loss, hits / count)
        return {"epoch": epoch, "loss": loss}

    def describe(self, step: int) -> str:
        """Epoch, loss and accuracy."""
        return self._description

    def reviews_at(self, step: int) -> bool:
        """After every epoch; of what is solved, before the first."""
        if self.solved:
            return True
        return step > 0 and step % self.order.per_epoch == 0

    def review(self, step: int, between: Callable[[], None] | None) -> dict[str, Any]:
        """The epoch's means, and the figures of validation."""
        # Also before, where these figures decide whether the run goes on: it may end here.
        if step == self.steps or self.stop is not None:
            conclude_tuned(self.tuned, self.train, self.train_collate)
        loss, hits, count = self.epoch_sums
        entry: dict[str, Any] = {
            "epoch": step // self.order.per_epoch,
            "loss": loss / count,
            "accuracy": hits / count,
            "val_loss": None,
            "val_accuracy": None,
        }
        if self.val is not None:
            scores = evaluate(
                self.tuned,
                self.val,
                self.settings.batch_size,
                self.collate,
                workers=self.settings.workers,
                accelerator=self.accelerator,
                between=between,
            )
            entry |= {"val_loss": scores["loss"], "val_accuracy": scores["accuracy"]}
        # Only now: whoever is interrupted before comes here once more.
        self.epoch_sums = [0.0, 0.0, 0]
        self._describe_epoch(
            entry["epoch"], entry["loss"], entry["accuracy"], entry["val_accuracy"]
        )
        return entry

    def stops(self, history: list[dict[str, Any]]) -> bool:
        """Ask the caller of `fit_until`."""
        return self.stop is not None and self.stop(history)

    def finish(self, totals: RunTotals) -> dict[str, Any]:
        """Draw the curves; a `FitResult` in plain values."""
        last = totals.history[-1]
        if self.accelerator.is_main_process:
            draw_curves(totals.history, self.out / CURVES)
        return {
            **asdict(totals),
            "train_loss": last["loss"],
            "train_accuracy": last["accuracy"],
            "val_accuracy": last["val_accuracy"],
            "val_loss": last["val_loss"],
        }

    def state(self) -> dict[str, Any]:
        """Sums of the epoch and of the line so far."""
        return {"epoch_sums": self.epoch_sums, "line_sums": self.line_sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the sums."""
        self.epoch_sums, self.line_sums = state["epoch_sums"], state["line_sums"]

    def _describe_epoch(
        self, epoch: int, loss: float, accuracy: float, val_accuracy: float | None = None
    ) -> None:
        words = f"epoch {epoch}/{self.settings.epochs}, loss {loss:.4f}"
        if self.solved:
            words = f"solved, loss {loss:.4f} and accuracy {accuracy:.2%} of rows left out"
            shown = "" if val_accuracy is None else f", validation accuracy {val_accuracy:.2%}"
            self._description = words + shown
        elif val_accuracy is None:
            self._description = f"{words}, train accuracy {accuracy:.2%}"
        else:
            self._description = f"{words}, validation accuracy {val_accuracy:.2%}"
