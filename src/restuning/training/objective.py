"""The interface between the loop and what it trains: batches, losses, reviews, state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from restuning.training.callbacks import Callbacks
from restuning.training.randomness import Order
from restuning.training.settings import LoopSettings


@dataclass(frozen=True)
class RunTotals:
    """What a finished run took.

    Attributes:
        history: What each review gave, in order.
        steps: Optimiser steps.
        seconds: Summed over all resumed parts.
        peak_memory_bytes: Above the start of the run, largest of its parts; None if unmeasurable.
        memory_measure: How that was measured.
        kept: Epoch whose weights are left, where those are not the last.
        ended: Why the run ended before its last step, where it did.
    """

    history: list[dict[str, Any]]
    steps: int
    seconds: float
    peak_memory_bytes: int | None
    memory_measure: str
    kept: int | None = None
    ended: str | None = None

    def left(self) -> dict[str, Any] | None:
        """The entry of the weights that are left; None without reviews."""
        last = self.history[-1] if self.history else None
        return next((e for e in self.history if e.get("epoch") == self.kept), last)


class TrainingObjective(ABC):
    """A task and the data it is trained on. The loop steps, saves and resumes; all else is decided here.

    ```
    for step in range(start, steps):
        batch = next(batches)                       # of this process
        for piece in split(batch):
            loss, figures = losses(piece)           # sums over examples
            loss.backward()
        optimiser.step()
        record(figures of all processes, examples)  # a few steps later: waiting for a GPU is dear
        if reviews_at(step):
            history.append(review(step))            # with the weights that a run would leave now
    finish(); result()
    ```

    A resumed run must see what a whole one sees: everything follows from the step, the seed and what
    `state` gives.

    Attributes:
        settings: Settings of the optimiser, precision and checkpoints.
        task: The module that is trained, averaged and saved.
        order: Which examples make up which step.
        steps: Optimiser steps of the whole run.
        warmup: Steps of warm-up.
        lines: Steps between two lines of progress where there is no terminal.
        model: The module that is called; after `place`, as Accelerate wrapped it.
        accelerator: The run's Accelerator, from `place` on.
        callbacks: Told what the run does.
        metric: The figure that reviews are compared by, in their entries as `val_METRIC`; "" where there is none.
        about: Told to trackers beside the settings.
    """

    settings: LoopSettings
    task: nn.Module
    order: Order
    steps: int
    warmup: int
    lines: int
    model: nn.Module
    accelerator: Accelerator
    callbacks: Callbacks
    metric: str = ""
    about: Mapping[str, Any] = {}

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The values that a resumed run must share with its first half, by the name errors give them."""

    @abstractmethod
    def place(self, accelerator: Accelerator) -> None:
        """Bring the model to its device and have it wrapped."""

    @abstractmethod
    def prepare(self) -> None:
        """Do what needs to see the data before the first step, once placed."""

    def release(self, accelerator: Accelerator) -> None:
        """Unwrap the model and leave it as it is used: without gradients, in eval mode."""
        # Also undoes the autocast that Accelerate puts around the model's own forward.
        self.model = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.zero_grad(set_to_none=True)
        self.model.eval()

    @abstractmethod
    def batches(self, start: int) -> Iterator[Any]:
        """This process's batches from a step on."""

    @abstractmethod
    def split(self, batch: Any) -> Sequence[Any]:
        """A batch in the pieces it is run in."""

    @abstractmethod
    def losses(self, piece: Any) -> tuple[Tensor, Tensor]:
        """The loss to differentiate and the figures to write down, `m`, both summed over examples.

        The first figures are losses: a run ends where one is not finite.
        """

    @abstractmethod
    def record(self, figures: Sequence[float], examples: int) -> None:
        """Take in the figures of one step, sums over all processes."""

    @abstractmethod
    def line(self, step: int) -> dict[str, Any]:
        """The log entry after a step, about the steps since the last entry."""

    @abstractmethod
    def describe(self, step: int) -> str:
        """The words that progress shows after a step."""

    def reviews_at(self, step: int) -> bool:
        """Whether a review is due after a step."""
        return False

    def review(self, step: int, between: Callable[[], None] | None) -> dict[str, Any] | None:
        """Look at the weights; an entry of the log and of the history, or None.

        Made again by a run that was stopped before it ended.

        Args:
            step: Just made.
            between: To be called between batches; may raise to stop.
        """
        return None

    def mean_loss(self, figures: Sequence[float], examples: int) -> float:
        """The loss of one step, mean over its examples, of what `losses` gave."""
        return figures[0] / examples

    def pictures(self) -> dict[str, Path]:
        """Pictures that the run has left by its last review, or its end, by name: trackers show them."""
        return {}

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradients share a norm."""
        return [[p for p in self.task.parameters() if p.requires_grad]]

    def check_data(self) -> None:
        """Refuse data that are no longer what they were when `identity` was asked.

        Called before a checkpoint is written and before the run ends.

        Raises:
            RestuningError: They changed.
        """
        return

    @abstractmethod
    def finish(self, totals: RunTotals) -> dict[str, Any]:
        """Write down what a run leaves, in the main process; the result in plain values."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The plain values that a checkpoint must hold beside the weights."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
