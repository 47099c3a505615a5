"""Callbacks: code that is told what a training does and may end it; early stopping and best weights are two."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from restuning._errors import CallbackError, TrainingError
from restuning.runtime.randomness import preserve_randomness

METRIC, LOSS = "metric", "loss"
MONITORS = (METRIC, LOSS)
"""What validation is followed by: the figure of the task's problem, higher is better, or the loss."""


@dataclass(frozen=True)
class Record:
    """Where a training is: plain values, and the weights for who asks.

    Attributes:
        step: Optimiser steps made.
        steps: Of the whole run.
        epoch: Of that step, from 1; 0 of what takes no steps.
        loss: Of that step, mean over its examples; in `on_epoch` and `on_end` over the epoch.
        rates: Learning rates of that step, by name: "lr", and "lambda" where a bypass's own differs.
        metrics: Of validation, by name ("loss", "accuracy"); empty in `on_step` and without validation data. None of
            one that is not defined there.
        metric: The figure of the task's problem, by which it is compared; "" of a denoiser.
        seconds: Of training so far, summed over all resumed parts.
        history: One entry an epoch so far, as `FitResult.history`.
        kept: Epoch whose weights the run leaves; told to `on_end`, else None.
        weights: Copies the weights that the run would leave now, by name, to the CPU.
    """

    step: int
    steps: int
    epoch: int
    loss: float | None
    rates: Mapping[str, float]
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    metric: str = ""
    seconds: float = 0.0
    history: Sequence[Mapping[str, Any]] = ()
    kept: int | None = None
    weights: Callable[[], dict[str, Tensor]] = field(default=dict, repr=False, compare=False)

    @property
    def score(self) -> float | None:
        """The `metric` on validation data; None without such data, and where it is not defined."""
        return self.metrics.get(self.metric)


class Callback:
    """Is told what a training does; subclass it and write the methods that you need.

    They are called in the main process alone, in the order in which callbacks are given. One that raises stops the run with
    a `CallbackError`, after a checkpoint. Random numbers that are drawn inside are not missed by the training.

    A callback that counts must give what it counts in `state`, or a run that was killed goes on with another count.
    It follows one run at a time; at the start of each `restore({})` is called.
    """

    needs_validation = False
    """Whether it means nothing without validation data: it is then refused."""

    def on_step(self, record: Record) -> None:
        """After each step. Costs a wait for the device at each, in place of one in ten."""

    def on_epoch(self, record: Record) -> bool | None:
        """After each epoch, with the figures of validation. True ends the run here."""

    def on_end(self, record: Record) -> None:
        """Once, when all is trained and before the last checkpoint."""

    def state(self) -> dict[str, Any]:
        """What the callback must remember: plain values, or tensors. It is part of every checkpoint."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave; forget all where that is empty."""

    def identity(self) -> dict[str, Any] | None:
        """Plain values that the resulting weights depend on, and None of a callback that only looks on.

        A run does not go on with others than it was begun with.
        """
        return None

    def ending(self) -> str:
        """Why it ended the run, in words that complete "ended after epoch 7: ..."."""
        return f"asked for by {type(self).__name__}"


class Follower(Callback):
    """Follows a figure of validation to its best epoch.

    Args:
        monitor: "metric", the figure of the task's problem, or "loss".

    Attributes:
        best: The best value so far; None before the first.
        best_epoch: Its epoch; of equal values the first.
        since: Epochs since then.
    """

    needs_validation = True

    def __init__(self, monitor: str = METRIC) -> None:
        check_monitor(monitor)
        self.monitor = monitor
        self.restore({})

    def follow(self, record: Record) -> bool:
        """Take in an epoch; whether it is the best so far."""
        value = record.metrics.get(LOSS) if self.monitor == LOSS else record.score
        sign = -1 if self.monitor == LOSS else 1
        # A figure that is not defined is no better than another.
        better = value is not None and (self.best is None or sign * value > sign * self.best)
        if better:
            self.best, self.best_epoch, self.since = value, record.epoch, 0
        else:
            self.since += 1
        return better

    def state(self) -> dict[str, Any]:
        """The best so far, and how long ago that is."""
        return {"best": self.best, "best_epoch": self.best_epoch, "since": self.since}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take them up."""
        self.best: float | None = state.get("best")
        self.best_epoch: int | None = state.get("best_epoch")
        self.since: int = state.get("since", 0)


class EarlyStopping(Follower):
    """Ends a run when validation has been no better than its best for so many epochs.

    Warm-up and cosine are those of the whole run, so an early end leaves the rate above zero.

    Args:
        patience: Epochs without a new best.
        monitor: "metric", the figure of the task's problem, or "loss".

    Raises:
        TrainingError: `patience` is no whole number from 1, or there is no such figure.
    """

    def __init__(self, patience: int, monitor: str = METRIC) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise TrainingError(
                "early stopping waits for some epochs",
                where="early_stopping",
                found=repr(patience),
                fix="give a whole number from 1",
            )
        super().__init__(monitor)
        self.patience = patience

    def on_epoch(self, record: Record) -> bool:
        """True when patience is at its end."""
        self.follow(record)
        return self.since >= self.patience

    def identity(self) -> dict[str, Any]:
        """Patience and figure."""
        return {"early_stopping": self.patience, "monitor": self.monitor}

    def ending(self) -> str:
        """The best epoch, and how long ago that is."""
        figure = "validation loss" if self.monitor == LOSS else "validation"
        if self.best_epoch is None:
            return f"{figure} was defined after none of {self.since} epochs"
        return f"{figure} was best after epoch {self.best_epoch} and no better for {self.since}"


class BestCheckpoint(Follower):
    """Leaves the weights of the epoch that was best on validation, in place of the last.

    The validation figure of the run is then that of its best epoch, which is flattered by the choice; a test split
    is not.

    Args:
        monitor: "metric", the figure of the task's problem, or "loss".
    """

    def on_epoch(self, record: Record) -> None:
        """Keep a copy of the weights where they are the best so far."""
        if self.follow(record):
            self.weights = record.weights()

    def state(self) -> dict[str, Any]:
        """The best so far, with its weights."""
        return {**super().state(), **{f"weights.{n}": t for n, t in self.weights.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take them up."""
        super().restore(state)
        start = "weights."
        self.weights: dict[str, Tensor] = {
            n.removeprefix(start): t for n, t in state.items() if n.startswith(start)
        }

    def identity(self) -> dict[str, Any]:
        """The figure."""
        return {"keep_best": True, "monitor": self.monitor}


def check_monitor(monitor: Any) -> None:
    """Refuse a figure that nothing follows.

    Raises:
        TrainingError: It is neither "metric" nor "loss".
    """
    if monitor not in MONITORS:
        raise TrainingError(
            "a setting is out of its range",
            where="monitor",
            found=repr(monitor)[:200],
            fix=f"choose one of {', '.join(MONITORS)}",
        )


EVENTS = ("on_step", "on_epoch", "on_end")


class Callbacks:
    """The callbacks of one run.

    Args:
        callbacks: In the order in which they are told.

    Raises:
        TrainingError: One is no callback, has a method that nothing calls, or is given twice.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self.all = list(callbacks)
        for each in self.all:
            _check(each)
        if len({id(each) for each in self.all}) < len(self.all):
            raise TrainingError("a callback is given twice", fix="give each once")
        self.follow_steps = any(_writes(each, "on_step") for each in self.all)
        self.may_end = any(_writes(each, "on_epoch") for each in self.all)

    def __iter__(self) -> Iterator[Callback]:
        return iter(self.all)

    def identity(self) -> dict[str, Any]:
        """What the weights of a run depend on; empty without such callbacks."""
        own = [(type(each).__name__, each.identity()) for each in self.all]
        found = [[name, values] for name, values in own if values is not None]
        return {"callbacks": found} if found else {}

    def find_best(self) -> BestCheckpoint | None:
        """The callback that says which weights are left."""
        return next((each for each in self.all if isinstance(each, BestCheckpoint)), None)

    def tell(self, event: str, record: Record) -> str | None:
        """Call a method of every callback that has written it; why the run shall end, or None.

        Raises:
            CallbackError: One raised.
        """
        why = None
        for each in self.all:
            if not _writes(each, event):
                continue
            try:
                with preserve_randomness():
                    ends = getattr(each, event)(record)
                if ends and event == "on_epoch" and why is None:
                    why = each.ending()
            except Exception as error:
                raise _failure(each, event, record.step, error) from error
        return why

    def states(self, step: int) -> list[tuple[str, dict[str, Any]]]:
        """The class of each and what it remembers, in their order.

        Raises:
            CallbackError: One cannot be asked, or remembers what a checkpoint cannot hold.
        """
        found = []
        for each in self.all:
            try:
                state = dict(each.state())
                json.dumps({n: v for n, v in state.items() if not isinstance(v, Tensor)})
            except Exception as error:
                raise _failure(each, "state", step, error) from error
            found.append((type(each).__name__, state))
        return found

    def restore(self, states: Sequence[tuple[str, Mapping[str, Any]]], step: int) -> None:
        """Give each what it remembered; those that are new to a run that goes on begin with nothing.

        Raises:
            CallbackError: One cannot take it.
        """
        left = list(states)
        for each in self.all:
            # By class: between two halves of a run callbacks that only look on may come and go.
            place = next((i for i, (n, _) in enumerate(left) if n == type(each).__name__), None)
            try:
                each.restore({} if place is None else left.pop(place)[1])
            except Exception as error:
                raise _failure(each, "restore", step, error) from error


def _writes(callback: Callback, name: str) -> bool:
    """Whether a class has written a method that `Callback` leaves empty."""
    return getattr(type(callback), name) is not getattr(Callback, name)


def _check(callback: Any) -> None:
    if not isinstance(callback, Callback):
        raise TrainingError(
            "a callback is an object of a class of its own",
            where="callbacks",
            found=f"{callback!r}"[:200],
            fix="write `class Mine(restuning.Callback)` with `def on_epoch(self, record)`, and give Mine()",
        )
    names = [name for name, _ in inspect.getmembers(type(callback), callable)]
    if unknown := [name for name in names if name.startswith("on_") and name not in EVENTS]:
        raise TrainingError(
            "a callback has a method that nothing calls",
            where=type(callback).__name__,
            found=", ".join(unknown),
            fix=f"name it one of {', '.join(EVENTS)}",
        )


def _failure(callback: Callback, method: str, step: int, error: Exception) -> CallbackError:
    return CallbackError(
        "a callback stopped the run",
        where=f"{type(callback).__name__}.{method}, step {step}",
        found=f"{type(error).__name__}: {error}"[:500],
        fix="mend it and run the same again, which goes on from a checkpoint, or leave the callback out",
    )
