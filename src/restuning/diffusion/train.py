"""`train_denoiser`: train tasks of a frozen denoiser, to the end, whatever interrupts it."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from restuning._errors import TrainingError, warn
from restuning.diffusion.batch import draw_batch
from restuning.diffusion.encode import EncodedPairs
from restuning.diffusion.objective import NoisyBatch, Objective
from restuning.diffusion.settings import DenoiserSettings
from restuning.diffusion.tuned_denoiser import TunedDenoiser
from restuning.host import Host
from restuning.runtime.randomness import preserve_randomness
from restuning.task import Task, check_savable, save
from restuning.training.callbacks import Callback, Callbacks
from restuning.training.identity import describe_host
from restuning.training.loop import LOG_EVERY, run_to_end
from restuning.training.objective import RunTotals, TrainingObjective
from restuning.training.prepare import prepare_without_rows
from restuning.training.randomness import Order
from restuning.training.trackers import check_installed

Piece = tuple[NoisyBatch, Mapping[str, Tensor]]
"""Noised samples and their conditions."""


@dataclass(frozen=True)
class DenoiserTraining:
    """Which tasks are trained on which images, and where that is written down.

    Attributes:
        host: The frozen denoiser.
        tasks: By name; several bypass tasks share every backbone forward.
        data: Encoded images and captions.
        objective: Noise and target.
        settings: Settings of the run.
        out: Folder of the run: `log.jsonl`, `checkpoints/`, `NAME.task`, `samples/`.
        fixed: Further inputs of the denoiser.
        backbone: Name written into the task folders.
        draw: Called with the step where sample grids are due, with the weights that would be left now; may give the
            file of a picture, which trackers show.
        callbacks: Told what the run does: `on_step` and `on_end`, since there are no epochs and no validation.
    """

    host: Host
    tasks: Mapping[str, Task]
    data: EncodedPairs
    objective: Objective
    settings: DenoiserSettings
    out: Path | str
    fixed: Mapping[str, Any] | None = None
    backbone: str = ""
    draw: Callable[[int], Path | None] | None = None
    callbacks: Sequence[Callback] = ()


def train_denoiser(
    training: DenoiserTraining,
    *,
    resume: bool = True,
    progress: bool | Literal["force"] = True,
) -> dict[str, Any]:
    """Train the tasks and leave them in eval mode with their final weights.

    Order, noise, times and dropped captions are functions of (seed, step), so that a run that was
    killed and started again ends with the same weights, bit for bit, and a run of several processes
    is that of one but for the order of sums.

    Args:
        training: Tasks, data and settings.
        resume: False starts over and forgets what the folder holds.
        progress: True shows a bar on a terminal and ten lines elsewhere, "force" a bar always, False
            nothing.

    Returns:
        `steps`, `loss` (mean over the last tenth, by task), `seconds`.

    Raises:
        DivergedError: A loss or a weight became NaN or infinite.
        TrainingError: The folder holds another run, there is no data, or a side network has to be
            prepared from it.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written first.
        SystemExit: SIGTERM, likewise.
    """
    if len(training.data) == 0:
        raise TrainingError("there is nothing to train on", found="no images")
    check_installed(training.settings.track)
    if blind := [type(each).__name__ for each in training.callbacks if each.needs_validation]:
        raise TrainingError(
            "a denoiser has no validation that could be followed",
            where=", ".join(blind),
            fix="leave it out, and judge samples: `sample_every`",
        )
    if Callbacks(training.callbacks).may_end:
        warn(
            "a denoiser has steps and no epochs",
            where="callbacks",
            found="a callback with `on_epoch`, which is never called",
            fix="write `on_step`, which is given `record.epoch` as well",
        )
    objective = Denoising(training)
    return run_to_end(objective, Path(training.out), resume=resume, progress=progress)


class Denoising(TrainingObjective):
    """Trains tasks to predict what a noised sample is made of, several of them on one forward.

    Args:
        training: Tasks, data and settings.
    """

    def __init__(self, training: DenoiserTraining) -> None:
        self.training = training
        self.callbacks = Callbacks(training.callbacks)
        self.about = {"backbone": training.backbone, "tasks": ", ".join(training.tasks)}
        self.drawn: Path | None = None
        self.settings: DenoiserSettings = training.settings
        settings = training.settings
        self.out, self.steps, self.warmup = Path(training.out), settings.steps, settings.warmup
        training.host.check_unchanged()
        for name, task in training.tasks.items():
            check_savable(
                task, training.host, self.out / f"{name}.task", backbone=training.backbone
            )
        # The order is drawn a pass at a time; a run of so many steps may end within one.
        passes = -(-settings.steps * settings.batch_size // len(training.data)) + 1
        self.order = Order(len(training.data), settings.batch_size, passes, settings.seed)
        self.lines = max(LOG_EVERY, settings.steps // 10)
        tuned = TunedDenoiser(training.host, training.tasks, training.fixed)
        self.model, self.task, self.tasks = tuned, tuned.tasks, list(training.tasks.values())
        # Mean losses of the last steps, by task: what the log and the result are taken from.
        self.losses_so_far: deque[list[float]] = deque(maxlen=max(LOG_EVERY, self._tenth()))

    def identity(self) -> dict[str, Any]:
        """Settings, data, target and the form of the tasks."""
        training = self.training
        specs = {name: task.spec() for name, task in training.tasks.items()}
        return {
            **self.settings.identity(),
            # The key stands for images, captions and the encoder that made latents of them.
            "data": training.data.key or training.data.digest(),
            "the backbone": describe_host(training.host),
            "objective": training.objective.kind,
            "min_snr": training.objective.min_snr,
            "tasks": json.dumps(specs, sort_keys=True),
            **self.callbacks.identity(),
        }

    def place(self, accelerator: Accelerator) -> None:
        """The denoiser with its tasks on the device, wrapped."""
        self.accelerator = accelerator
        self.model = accelerator.prepare_model(self.model.to(accelerator.device))

    def prepare(self) -> None:
        """Let side networks prepare themselves; one that has to see the data first is refused."""
        prepare_without_rows(self.tasks)

    def batches(self, start: int) -> Iterator[Piece]:
        """Drawn as they are needed: latents lie in memory."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        training = self.training
        for step in range(start, self.steps):
            yield draw_batch(
                training.data, training.objective, self.settings, self.order, step, rank, world
            )

    def mean_loss(self, figures: Sequence[float], examples: int) -> float:
        """The mean over tasks as well."""
        return sum(figures) / len(figures) / examples

    def pictures(self) -> dict[str, Path]:
        """The newest grid of samples."""
        return {} if self.drawn is None else {"samples": self.drawn}

    def split(self, batch: Piece) -> Sequence[Piece]:
        """Rows of a batch, in as many pieces as `accumulate` says."""
        noised, conditions = batch
        rows = torch.arange(len(noised.time)).chunk(self.settings.accumulate)
        return [
            (
                NoisyBatch(*(part[own] for part in noised)),
                {k: v[own] for k, v in conditions.items()},
            )
            for own in rows
        ]

    def losses(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Weighted squared errors, by task; their sum gives each the gradient it would have alone."""
        device = self.accelerator.device
        sample, time, target, weight = (part.to(device) for part in piece[0])
        answer = self.model(sample, time, {k: v.to(device) for k, v in piece[1].items()})
        # `k b ...` to `k b`; the weights, `b`, are the same for all tasks.
        error = (answer.float() - target.float()).square().flatten(2).mean(2) * weight
        by_task = error.sum(1)
        return by_task.sum(), by_task

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Each task by itself, so that tasks that train together do not meet in a common norm."""
        return [[p for p in task.parameters() if p.requires_grad] for task in self.tasks]

    def record(self, figures: Sequence[float], examples: int) -> None:
        """Keep the means of a step."""
        self.losses_so_far.append([figure / examples for figure in figures])

    def line(self, step: int) -> dict[str, Any]:
        """Mean losses of the last steps."""
        return {"loss": self._mean(LOG_EVERY)}

    def describe(self, step: int) -> str:
        """Step and mean losses of the last steps."""
        losses = ", ".join(f"{n} {loss:.4f}" for n, loss in self._mean(LOG_EVERY).items())
        return f"step {step}/{self.steps}, loss {losses}"

    def reviews_at(self, step: int) -> bool:
        """Where samples are due, but for the last step: `finish` leaves those."""
        every = self.settings.sample_every
        return bool(every) and 0 < step < self.steps and step % every == 0

    def review(self, step: int, between: Callable[[], None] | None) -> None:
        """Write task folders and draw samples."""
        self._save_tasks(step, f"-{step:06d}")
        # `_save_tasks` leaves the tasks in eval mode.
        self.model.train()

    def finish(self, totals: RunTotals) -> dict[str, Any]:
        """Write the tasks and draw samples; steps, losses by task and seconds."""
        self._save_tasks(totals.steps, "")
        loss = self._mean(self._tenth())
        return {"steps": totals.steps, "loss": loss, "seconds": totals.seconds}

    def state(self) -> dict[str, Any]:
        """The last losses, which the result is taken from."""
        return {"losses": list(self.losses_so_far)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the last losses."""
        self.losses_so_far.extend(state["losses"])

    def _tenth(self) -> int:
        return max(1, self.steps // 10)

    def _mean(self, count: int) -> dict[str, float]:
        rows = list(self.losses_so_far)[-count:]
        columns = zip(self.training.tasks, zip(*rows, strict=True), strict=True)
        return {name: sum(column) / len(column) for name, column in columns}

    def _save_tasks(self, step: int, suffix: str) -> None:
        if not self.accelerator.is_main_process:
            return
        training = self.training
        self.task.eval()
        for name, task in training.tasks.items():
            folder = self.out / f"{name}{suffix}.task"
            save(task, training.host, folder, backbone=training.backbone)
        if training.draw is not None:
            # A caller's sampler may draw; training must not depend on whether it does.
            with preserve_randomness():
                self.drawn = training.draw(step)
