"""`train_denoiser`: train tasks of a frozen denoiser, to the end, whatever interrupts it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from restuning._errors import DivergedError, TrainingError
from restuning.diffusion.batch import drawn
from restuning.diffusion.encoded import Encoded
from restuning.diffusion.objective import Objective
from restuning.diffusion.predict import Predictions
from restuning.diffusion.settings import DenoiserSettings
from restuning.host import Host
from restuning.task import Task, save
from restuning.training import build_optimiser, checkpoint, learning_rate
from restuning.training.fit import accelerated
from restuning.training.interrupts import Interrupts, short_of_memory
from restuning.training.log import Journal
from restuning.training.optimiser import Ema
from restuning.training.randomness import Order, own_randomness, seed_everything
from restuning.training.settings import check_same_run

LOG_EVERY = 10


@dataclass(frozen=True)
class Run:
    """What is trained on what.

    Attributes:
        host: The frozen denoiser.
        tasks: By name; several bypass tasks share every backbone forward.
        data: Encoded images and captions.
        objective: Noise and target.
        settings: Of the run.
        out: Its folder: `log.jsonl`, `checkpoints/`, `NAME.task`, `samples/`.
        fixed: Further inputs of the denoiser.
        backbone: Name written into the task folders.
        draw: Called with the step where sample grids are due, with the weights that will be left.
    """

    host: Host
    tasks: Mapping[str, Task]
    data: Encoded
    objective: Objective
    settings: DenoiserSettings
    out: Path | str
    fixed: Mapping[str, Any] | None = None
    backbone: str = ""
    draw: Callable[[int], None] | None = None


def train_denoiser(run: Run, *, resume: bool = True) -> dict[str, Any]:
    """Train the tasks and leave them in eval mode with their final weights.

    Order, noise, times and dropped captions are functions of (seed, step), so that a run that was
    killed and started again ends with the same weights, bit for bit, and a run of several processes
    is that of one but for the order of sums.

    Returns:
        `steps`, `loss` (mean over the last tenth, by task), `seconds`.

    Raises:
        DivergedError: The loss is not finite.
        TrainingError: The folder holds another run, or there is no data.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written first.
    """
    if len(run.data) == 0:
        raise TrainingError("there is nothing to train on", found="no images")
    settings = run.settings
    with (
        accelerated(settings.precision, Path(run.out)) as accelerator,
        own_randomness(),
        Interrupts() as interrupts,
    ):
        loop = _Loop(run, accelerator, interrupts)
        try:
            result = loop.run(resume)
        except torch.OutOfMemoryError as error:
            raise short_of_memory(error, settings) from None
        finally:
            accelerator.unwrap_model(loop.model, keep_fp32_wrapper=False)
            for task in run.tasks.values():
                task.zero_grad(set_to_none=True)
                task.eval()
        interrupts.stop()
    return result


class _Loop:
    def __init__(self, run: Run, accelerator: Accelerator, interrupts: Interrupts) -> None:
        self.spec, self.accelerator, self.interrupts = run, accelerator, interrupts
        self.out = Path(run.out)
        settings = run.settings
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.main = accelerator.is_main_process
        self.module = Predictions(run.host, run.tasks, run.fixed).to(accelerator.device)
        self.task = self.module.tasks
        self.model = accelerator.prepare_model(self.module)
        epochs = -(-settings.steps * settings.batch_size // len(run.data)) + 1
        self.order = Order(len(run.data), settings.batch_size, epochs, settings.seed)
        raw = build_optimiser(self.task, lr=settings.lr, weight_decay=settings.weight_decay)
        self.optimiser = accelerator.prepare_optimizer(raw)
        self.parameters = [p for p in self.task.parameters() if p.requires_grad]
        self.ema = None if settings.ema is None else Ema(self.task, settings.ema)
        self.step = 0
        self.losses: list[list[float]] = []
        self.identity = {
            **settings.identity(),
            "data": run.data.key,
            "objective": run.objective.kind,
            "min_snr": run.objective.min_snr,
            "tasks": json.dumps({n: t.spec() for n, t in run.tasks.items()}, sort_keys=True),
        }
        self.seconds_before, self.started = 0.0, time.perf_counter()

    def run(self, resume: bool) -> dict[str, Any]:
        folder = self.out / "checkpoints"
        snapshot = checkpoint.newest(folder, warn=self.main) if resume else None
        self.accelerator.wait_for_everyone()
        position = 0
        if snapshot is not None:
            check_same_run(snapshot.state["run"], self.identity, self.out)
            self.task.load_state_dict(snapshot.part("task"))
            self.step, self.losses = snapshot.state["step"], snapshot.state["losses"]
            self.seconds_before, position = snapshot.state["seconds"], snapshot.state["log"]
            if snapshot.state["result"] is not None:
                return snapshot.state["result"]
            checkpoint.restore_optimiser(self.optimiser, snapshot)
            if self.ema is not None:
                self.ema.load(snapshot.part("ema"))
        elif self.main:
            checkpoint.clear(folder)
        self.journal = Journal(self.out / "log.jsonl", position) if self.main else None
        if snapshot is None:
            # Step 0, too: a restart then has the same first weights, seeded or not.
            self._save(folder)
        self.model.train()
        try:
            return self._steps(folder)
        except (KeyboardInterrupt, SystemExit):
            if self.interrupts.stopped:
                self._save(folder)
            raise
        finally:
            if self.journal is not None:
                self.journal.close()

    def _steps(self, folder: Path) -> dict[str, Any]:
        settings = self.spec.settings
        while self.step < settings.steps:
            self._step()
            if self.main and self.journal is not None and self.step % LOG_EVERY == 0:
                rows = list(zip(*self.losses[-LOG_EVERY:], strict=True))
                named = zip(self.spec.tasks, rows, strict=True)
                loss = {n: sum(r) / len(r) for n, r in named}
                rate = self._rate(self.step - 1)
                self.journal.write(
                    {"step": self.step, "loss": loss, "lr": rate, "seconds": self._seconds()}
                )
            if self.step < settings.steps:
                if self.step % settings.checkpoint_every == 0:
                    self._save(folder)
                if settings.sample_every and self.step % settings.sample_every == 0:
                    with self.ema.applied(self.task) if self.ema else nullcontext():
                        self._leave(f"-{self.step:06d}")
            if self.world == 1:
                self.interrupts.stop()
        if self.ema is not None:
            self.ema.copy_to(self.task)
        last = self.losses[-max(1, settings.steps // 10) :]
        loss = {n: sum(row[i] for row in last) / len(last) for i, n in enumerate(self.spec.tasks)}
        result = {"steps": self.step, "loss": loss, "seconds": self._seconds()}
        self._leave("")
        self._save(folder, result)
        self.accelerator.wait_for_everyone()
        return result

    def _step(self) -> None:
        run, settings, device = self.spec, self.spec.settings, self.accelerator.device
        noised, conditions = drawn(
            run.data, run.objective, settings, self.order, self.step, self.rank, self.world
        )
        rows = len(noised.time)
        counts = self.order.counts(self.step, self.rank, self.world)
        seed_everything("step", settings.seed, self.step, self.rank)
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(self.step)
        pieces = list(torch.arange(rows).chunk(settings.accumulate))
        total = torch.zeros(len(run.tasks), device=device)
        for place, piece in enumerate(pieces):
            fed = {k: v[piece].to(device) for k, v in conditions.items()}
            sample, time_, target, weight = (part[piece].to(device) for part in noised)
            exchange = place == len(pieces) - 1
            with nullcontext() if exchange else self.accelerator.no_sync(self.model):
                answer = self.model(sample, time_, fed)
                loss = _errors(answer, target, weight).sum(1) / rows
                # The sum over tasks: each has the gradient it would have alone.
                share = self.world * counts * rows / self.order.size(self.step)
                self.accelerator.backward(loss.sum() * share)
            total += loss.detach()
        if settings.clip is not None:
            # Each by itself, so that tasks that train together do not meet in a common norm.
            for task in self.task:
                own = [p for p in task.parameters() if p.requires_grad]
                self.accelerator.clip_grad_norm_(own, settings.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(total.tolist())
        if not all(map(math.isfinite, self.losses[-1])):
            raise DivergedError(
                "the loss is no longer finite",
                where=f"step {self.step}",
                found=f"{self.losses[-1]} at a learning rate of {self._rate(self.step - 1):.2g}",
                fix="lower --lr, or start again from an earlier checkpoint with --clip",
            )
        if self.ema is not None:
            self.ema.update(self.task, self.step)

    def _leave(self, suffix: str) -> None:
        """Task folders and a sample grid."""
        if not self.main:
            return
        self.task.eval()
        for name, task in self.spec.tasks.items():
            save(
                task, self.spec.host, self.out / f"{name}{suffix}.task", backbone=self.spec.backbone
            )
        if self.spec.draw is not None:
            with own_randomness():
                self.spec.draw(self.step)
        self.model.train()

    def _save(self, folder: Path, result: dict[str, Any] | None = None) -> None:
        if not self.main or self.journal is None:
            return
        state = {
            "step": self.step,
            "run": self.identity,
            "losses": self.losses,
            "result": result,
            "seconds": self._seconds(),
            "log": self.journal.position(),
        }
        unfinished = result is None
        mean = self.ema.mean if unfinished and self.ema is not None else None
        snapshot = checkpoint.take(self.task, self.optimiser if unfinished else None, mean, state)
        checkpoint.write(folder, snapshot, final=not unfinished)

    def _rate(self, step: int) -> float:
        settings = self.spec.settings
        return learning_rate(step, total=settings.steps, warmup=settings.warmup, peak=settings.lr)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started


def _errors(answer: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared error of every sample, `k b`."""
    return (answer.float() - target.float()).square().flatten(2).mean(2) * weight
