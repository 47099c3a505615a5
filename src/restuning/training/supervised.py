"""A task's problem, on examples or on their tokens: what `fit` hands to the loop."""

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
from restuning.problems import find_problem
from restuning.training.balance import find_groups, find_weights
from restuning.training.batch import compute_logits, move, split_batch
from restuning.training.callbacks import Callback, Callbacks
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
from restuning.training.randomness import Order, Portions, batches, tell_other_portions
from restuning.training.settings import FitSettings
from restuning.training.together import from_main

CURVES = "curves.png"


@dataclass(frozen=True)
class FitResult:
    """The figures of a finished run.

    Args:
        history: One entry an epoch: epoch, step, loss, accuracy, val_loss, val_accuracy, lr and
            seconds; the val figures are None without validation data. Of a task that is solved
            (`Task.solved`) one entry, epoch 0, whose loss and accuracy are those of rows left out. Of a problem
            whose metric is another one this stands in the place of accuracy: `r2` and `val_r2`.
        seconds: Time of training and evaluation, summed over all resumed parts.
        peak_memory_bytes: Above the start of the run, largest of its parts; None if unmeasurable.
        memory_measure: How that was measured.
        steps: Optimiser steps.
        train_loss: Mean over the epoch of these weights, the last; of a solved task over rows left out.
        train_accuracy: Over the last epoch, counted while it trained; likewise. None of a problem whose
            metric is no mean over examples.
        val_accuracy: Accuracy of the final weights; None without validation data, or of such a problem.
        val_loss: Loss of the final weights, likewise.
        metric: The figure of the task's problem.
        kept: Epoch whose weights are left, where the best were asked for (`FitSettings.keep_best`): all figures above are
            of that epoch then. None: the last.
        ended: Why the run ended before its last epoch; None of one that did not.
    """

    history: list[dict[str, Any]]
    seconds: float
    peak_memory_bytes: int | None
    memory_measure: str
    steps: int
    train_loss: float
    train_accuracy: float | None
    val_accuracy: float | None
    val_loss: float | None
    metric: str = "accuracy"
    kept: int | None = None
    ended: str | None = None

    @property
    def left(self) -> dict[str, Any]:
        """The entry of `history` of the weights that are left."""
        return next((e for e in self.history if e["epoch"] == self.kept), self.history[-1])

    @property
    def val_score(self) -> float | None:
        """The metric of the final weights on validation data."""
        return self.left[f"val_{self.metric}"]

    def describe_end(self) -> str:
        """Why the run ended early and which weights it left, in words; empty where there is nothing to say."""
        return tell_end(self.history[-1]["epoch"], self.ended, self.kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON."""
        return asdict(self)


def tell_end(last: int | None, ended: str | None, kept: int | None) -> str:
    """Why a run ended early and which weights it left, in words; empty where there is nothing to say.

    Args:
        last: Epoch after which it ended; None where nobody knows.
        ended, kept: As of `FitResult`.
    """
    after = "before its last epoch" if last is None else f"after epoch {last}"
    early = f"ended {after}: {ended}" if ended else ""
    if kept is not None:
        weights = f"the weights of epoch {kept} are left, the best on validation"
    else:
        weights = "the last weights are left" if ended else ""
    return "; ".join(filter(None, (early, weights)))


class Supervised(TrainingObjective):
    """Trains `tuned.task` to give the answers of its problem, and evaluates it after every epoch.

    Args:
        tuned: With `.task` and `.host`.
        train: Map-style data set of `(input, label)`.
        val: As `train`, or None.
        settings: Settings of the run.
        collate: Makes a batch of a list of examples.
        out: The run's folder, for the curves.
        callbacks: Told what the run does, before those of the settings.
        about: Told to trackers beside the settings.
    """

    def __init__(
        self,
        tuned: nn.Module,
        train: Any,
        val: Any,
        settings: FitSettings,
        out: Path,
        collate: Callable | None = None,
        callbacks: Sequence[Callback] = (),
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.tuned = self.model = tuned
        self.train, self.val = train, val
        self.settings: FitSettings = settings
        self.out, self.collate, self.about = out, collate, dict(about or {})
        self.given = Callbacks(callbacks)
        self.callbacks = Callbacks([*callbacks, *settings.callbacks()])
        # The training split's own, which is another one where rows were prepared beside it.
        self.train_collate = collate
        self.task: nn.Module = tuned.get_submodule("task")
        self.problem = find_problem(self.task)
        self.metric = self.problem.metric
        self.weights = find_weights(self.task, train, settings)
        self.order = Order(
            len(train),
            settings.batch_size,
            settings.epochs,
            settings.seed,
            find_groups(self.task, train, settings),
        )
        # Solved by `prepare`: the run ends before its first step.
        self.solved = is_solved(self.task)
        self.steps = 0 if self.solved else self.order.total
        self.lines = self.order.per_epoch
        self.warmup = round(settings.warmup * self.order.per_epoch)
        self.epoch_sums = [0.0, 0.0, 0]
        self.line_sums = [0.0, 0]
        self.watches: list[Watch] = []
        # Of what is solved or weighed on them: answers to rows left out, and their targets.
        self.left_out: tuple[Tensor, Tensor] | None = None
        self._description = ""
        # The file of the curves, once there is one.
        self.drawn: Path | None = None
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
            **self.given.identity(),
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
        if not self.solved:
            # Alike in all processes, whatever memory each of them has; a run that goes on has its own (`restore`).
            self.order.portions = from_main(self._find_portions)
        backbone = getattr(getattr(self.tuned, "host", None), "model", None)
        # Its parameters are on `meta` until a module runs; there is nothing there to be moved.
        if isinstance(backbone, nn.Module) and is_offloaded(backbone):
            self.task.to(accelerator.device)
            self.model = accelerator.prepare_model(self.tuned, device_placement=False)
        else:
            self.model = accelerator.prepare_model(self.tuned)

    def _find_portions(self) -> Portions | None:
        return Portions.of(self.train, self.settings.batch_size, self.accelerator.num_processes)

    def prepare(self) -> None:
        """Show the training split to side networks that want to see it first."""
        if self.solved:
            answers, labels = solve_tuned(self.tuned, self.train, self.collate)
            loss, hits = self.problem.score(answers, labels)
            self.epoch_sums = [loss.item(), hits.item(), len(labels)]
            self.left_out = answers, labels
            return
        self.train, self.train_collate = prepare_tuned(self.tuned, self.train, self.collate)

    def release(self, accelerator: Accelerator) -> None:
        """As for every objective; the caller's own forward comes back."""
        super().release(accelerator)
        if self.order.portions is not None:
            self.train.hold(torch.empty(0, dtype=torch.long))
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
        """Pieces of a batch whose targets may be trained on."""
        inputs, labels = batch
        self.problem.check_targets(labels)
        return list(split_batch(inputs, labels, self.settings.accumulate))

    def losses(self, piece: Any) -> tuple[Tensor, Tensor]:
        """The problem's loss, weighed where that was asked for, and right answers where it counts them."""
        inputs, labels = piece
        given, (inputs, labels) = labels, move(inputs, labels, self.accelerator.device)
        logits = compute_logits(self.model, inputs)
        # As they were given, which a GPU need not be waited for.
        self.problem.check_targets(given, logits.shape[-1])
        smoothing = self.settings.label_smoothing
        loss, hits = self.problem.score(logits, labels, smoothing)
        if self.weights is not None:
            loss = self.problem.weighted_loss(logits, labels, self.weights, smoothing)
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
        self._describe_epoch(epoch, loss, self._counted())
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
        if step == self.steps or self.callbacks.may_end:
            conclude_tuned(self.tuned, self.train, self.train_collate)
            if not self.solved:
                side = getattr(self.task, "side", None)
                self.left_out = getattr(side, "left_out", None)
        loss, _, count = self.epoch_sums
        metric = self.problem.metric
        entry: dict[str, Any] = {
            "epoch": step // self.order.per_epoch,
            "loss": loss / count,
            metric: self._counted(),
            "val_loss": None,
            f"val_{metric}": None,
        }
        if self.left_out is not None:
            if self.solved and not self.problem.counted:
                entry[metric] = self.problem.measure(*self.left_out)
            told = self.problem.with_errors(*self.left_out)
            # Where it is read after a run that was interrupted later on.
            if told != self.problem:
                entry["left_out"] = told.spec()
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
            entry |= {"val_loss": scores["loss"], f"val_{metric}": scores[metric]}
        # Only now: whoever is interrupted before comes here once more.
        self.epoch_sums = [0.0, 0.0, 0]
        self._describe_epoch(entry["epoch"], entry["loss"], entry[metric], entry[f"val_{metric}"])
        return entry

    def pictures(self) -> dict[str, Path]:
        """The curves, once they are drawn."""
        return {} if self.drawn is None else {"curves": self.drawn}

    def finish(self, totals: RunTotals) -> dict[str, Any]:
        """Draw the curves, where there are steps; a `FitResult` in plain values."""
        left, metric = totals.left(), self.problem.metric
        assert left is not None
        # Of what is solved there is one point and no curve.
        if self.accelerator.is_main_process and not self.solved:
            self.drawn = draw_curves(totals.history, self.out / CURVES, self.problem)
        # Likewise said only where there is something to say.
        unsaid = [name for name in ("kept", "ended") if getattr(totals, name) is None]
        return {
            **{name: value for name, value in asdict(totals).items() if name not in unsaid},
            "train_loss": left["loss"],
            "train_accuracy": left.get("accuracy"),
            "val_accuracy": left.get("val_accuracy"),
            "val_loss": left["val_loss"],
            # What runs of before are read with says nothing of it.
            **({"metric": metric} if metric != "accuracy" else {}),
        }

    def state(self) -> dict[str, Any]:
        """Sums of the epoch and of the line so far, and the portions that epochs go through."""
        portions = self.order.portions
        return {
            "epoch_sums": self.epoch_sums,
            "line_sums": self.line_sums,
            **({} if portions is None else {"portions": asdict(portions)}),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the sums, and the order that the run was begun in."""
        self.epoch_sums, self.line_sums = state["epoch_sums"], state["line_sums"]
        begun, now = state.get("portions"), self.order.portions
        self.order.portions = None if begun is None else Portions(**begun)
        # Rows are at hand that were not then: its portions fit all the more. Fewer processes hold more each.
        if now is not None and self.order.portions != now:
            tell_other_portions(self.order.portions, now)

    def _counted(self) -> float | None:
        """The metric of the epoch so far, where it is counted."""
        _, hits, count = self.epoch_sums
        return hits / count if self.problem.counted else None

    def _describe_epoch(
        self, epoch: int, loss: float, score: float | None, val_score: float | None = None
    ) -> None:
        tell = self.problem.tell
        words = f"epoch {epoch}/{self.settings.epochs}, loss {loss:.4f}"
        if self.solved:
            words = f"solved, loss {loss:.4f} and {tell(score)} of rows left out"
        if val_score is not None:
            words = f"{words}, validation {tell(val_score)}"
        elif score is not None and not self.solved:
            words = f"{words}, train {tell(score)}"
        self._description = words
