"""The one training loop: every step of a run, whatever interrupts it and whatever is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from signal import SIGTERM
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, is_initialized
from torch import Tensor

from restuning._errors import DivergedError, RestuningError, TrainingError
from restuning._files import hold_folder, refuse_other
from restuning.runtime.randomness import preserve_randomness, seed_everything
from restuning.training import checkpoint
from restuning.training.interrupts import Interrupts
from restuning.training.log import LogFile, Progress, finish_trackers, start_trackers, track
from restuning.training.memory import PeakMemory
from restuning.training.objective import RunTotals, TrainingObjective
from restuning.training.optimiser import Ema, build_optimiser, learning_rate, set_rates
from restuning.training.settings import LoopSettings
from restuning.training.together import alone

CHECKPOINTS = "checkpoints"
LOG_EVERY = 10
"""Steps between two lines of the log, and between two waits for the device."""


def run_to_end(
    objective: TrainingObjective,
    out: Path,
    *,
    resume: bool,
    progress: bool | Literal["force"],
) -> dict[str, Any]:
    """Make a run, or what is left of it, and return its result.

    Args:
        objective: The task and its data.
        out: The run's folder.
        resume: False starts over and forgets what the folder holds.
        progress: True shows a bar on a terminal and plain lines elsewhere, "force" a bar always.

    Raises:
        DivergedError: A loss or a weight is no finite number.
        TrainingError: The folder holds another run, or another process works there; another thread
            trains; the disk is full, or memory is short.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written first.
        SystemExit: SIGTERM, likewise.
    """
    with alone(), hold_folder(out):
        # Before signals are only noted: much may have to be read for it.
        identity = objective.identity()
        return _run(objective, identity, out, resume=resume, progress=progress)


def _run(
    objective: TrainingObjective,
    identity: dict[str, Any],
    out: Path,
    *,
    resume: bool,
    progress: bool | Literal["force"],
) -> dict[str, Any]:
    settings = objective.settings
    with (
        open_accelerator(settings.precision, out, settings.track) as accelerator,
        preserve_randomness(),
        Interrupts() as interrupts,
    ):
        try:
            # First, because what is prepared is read from taps, which the backbone must be in place
            # for.
            objective.place(accelerator)
            if not (resume and checkpoint.is_finished(out / CHECKPOINTS)):
                # Before the loop takes the first weights for its mean and its first checkpoint.
                objective.prepare()
            loop = Loop(objective, identity, out, accelerator, interrupts)
            result = loop.open(resume)
            if result is None:
                start_trackers(accelerator, settings, out)
                show = progress if accelerator.is_main_process else False
                try:
                    result = loop.run(Progress(objective.steps, objective.lines, show))
                finally:
                    finish_trackers(accelerator)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(error, settings) from None
        finally:
            objective.release(accelerator)
        # A signal that came after the last step must not be swallowed.
        interrupts.stop()
    return result


class Loop:
    """A run's state, and the steps that change it.

    Args:
        objective: The task and its data, placed and prepared.
        identity: What `objective.identity` gave.
        out: The run's folder.
        accelerator: Devices, processes, precision.
        interrupts: Signals noted so far.
    """

    def __init__(
        self,
        objective: TrainingObjective,
        identity: dict[str, Any],
        out: Path,
        accelerator: Accelerator,
        interrupts: Interrupts,
    ) -> None:
        self.objective, self.out = objective, out
        self.accelerator, self.interrupts = accelerator, interrupts
        self.settings, self.order = objective.settings, objective.order
        self.folder = out / CHECKPOINTS
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.main = accelerator.is_main_process
        self.model, self.task = objective.model, objective.task
        raw = build_optimiser(
            self.task,
            lr=self.settings.lr,
            weight_decay=self.settings.weight_decay,
            lambda_rate=self.settings.lambda_rate,
        )
        # Wrapped for fp16, whose scaler skips steps; the schedule is ours (`set_rates`).
        self.optimiser = accelerator.prepare_optimizer(raw)
        self.ema = None if self.settings.ema is None else Ema(self.task, self.settings.ema)
        self.identity = identity
        self.step = 0
        self.history: list[dict[str, Any]] = []
        # Figures of the last steps, still on the device.
        self.waiting: list[tuple[int, Tensor]] = []
        self.log: LogFile | None = None
        self.seconds_before, self.peak_before = 0.0, None
        self.started = time.perf_counter()
        self.memory = PeakMemory(accelerator.device)

    def open(self, resume: bool) -> dict[str, Any] | None:
        """Take up what the folder holds; a finished run's result, or None if there is work."""
        snapshot = checkpoint.read_newest(self.folder, warn=self.main) if resume else None
        # Everyone has read before anyone writes.
        self.accelerator.wait_for_everyone()
        if snapshot is not None:
            check_same_run(snapshot.state["run"], self.identity, self.out)
            self.task.load_state_dict(snapshot.part("task"))
            if snapshot.state["result"] is not None:
                return snapshot.state["result"]
            self._restore(snapshot)
        elif self.main:
            checkpoint.clear(self.folder)
        if self.main:
            position = 0 if snapshot is None else snapshot.state["log"]
            self.log = LogFile(self.out / "log.jsonl", position)
        if snapshot is None:
            # Step 0, too: a restart then has the same first weights, seeded or not.
            self.save()
        return None

    def run(self, progress: Progress) -> dict[str, Any]:
        """Every step and review that is left; the result."""
        batches = self.objective.batches(self.step)
        progress.start(self.step)
        # Once: a review leaves the mode as it was, and a backbone has hundreds of modules.
        self.model.train()
        try:
            while True:
                if self._review_is_due():
                    self._review(progress)
                if self.step == self.objective.steps or self._stops():
                    self._flush()
                    return self._finish()
                self._step(next(batches))
                line = self.step % LOG_EVERY == 0 or self.objective.reviews_at(self.step)
                save = self.step % self.settings.checkpoint_every == 0
                # A checkpoint holds the sums of every step before it, so figures must not wait past
                # it.
                if line or save:
                    self._flush()
                if line:
                    self._write_line(progress)
                # The last step's checkpoint is `_finish`'s, which holds the result.
                if save and self.step < self.objective.steps:
                    self.save()
                if self.world == 1:
                    self.interrupts.stop()
        except (KeyboardInterrupt, SystemExit):
            # A second Ctrl-C may fall inside a step: nothing whole to save then.
            if self.interrupts.stopped:
                self._flush(exchange=False)
                self.save()
            raise
        finally:
            progress.stop()
            if self.log is not None:
                self.log.close()

    def save(self, result: dict[str, Any] | None = None) -> None:
        """Write a checkpoint; with a result, the last one, without the optimiser."""
        if not self.main or self.log is None:
            return
        if self.step and self.world == 1:
            self._check_data()
        scaler = self.accelerator.scaler
        state = {
            **self.objective.state(),
            "step": self.step,
            "run": self.identity,
            "history": self.history,
            "seconds": self._seconds(),
            "peak": self._peak(),
            "log": self.log.position(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "result": result,
        }
        unfinished = result is None
        snapshot = checkpoint.take(
            self.task,
            self.optimiser if unfinished else None,
            self.ema.mean if unfinished and self.ema is not None else None,
            state,
        )
        # A checkpoint with NaN in it would be gone on from; the last good one stays instead.
        for name, tensor in snapshot.tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise self._divergence_error(self.step, f"{name} is not finite after it")
        checkpoint.write(self.folder, snapshot, final=not unfinished)

    def _restore(self, snapshot: checkpoint.Snapshot) -> None:
        state = snapshot.state
        checkpoint.restore_optimiser(self.optimiser, snapshot)
        if self.ema is not None:
            self.ema.load(snapshot.part("ema"))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        self.seconds_before, self.peak_before = state["seconds"], state["peak"]
        self.objective.restore(state)

    def _step(self, batch: Any) -> None:
        counts = self.order.counts(self.step, self.rank, self.world)
        # DDP takes the mean over processes; ours is the sum over examples of all of them.
        weight = self.world * counts / self.order.size(self.step)
        seed_everything("step", self.settings.seed, self.step, self.rank)
        set_rates(self.optimiser.param_groups, self._rate(self.step))
        pieces = self.objective.split(batch)
        sums: Tensor | None = None
        for place, piece in enumerate(pieces):
            last = place == len(pieces) - 1
            # Gradients are exchanged once a step, with the last piece.
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, figures = self.objective.losses(piece)
                self.accelerator.backward(loss * weight)
            # 0 for the example that only fills an empty share (`Order.share`).
            figures = figures.detach() * counts
            sums = figures if sums is None else sums + figures
        if self.settings.clip is not None:
            # Under fp16 gradients still carry the loss scale; their norm would be compared with
            # nothing.
            self.accelerator.unscale_gradients(self.optimiser)
            for group in self.objective.clip_groups():
                torch.nn.utils.clip_grad_norm_(group, self.settings.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        if sums is not None:
            self.waiting.append((self.step, sums))
        if self.ema is not None:
            # In every process: all have the same weights, so the means stay equal without exchange.
            self.ema.update(self.task, self.step)

    def _flush(self, *, exchange: bool = True) -> None:
        """Bring the figures of the last steps to the host and check them; hear other processes.

        Args:
            exchange: False where other processes may not be at the same place.
        """
        if not self.waiting:
            return
        table = torch.stack([figures for _, figures in self.waiting])
        # A row more carries signals: whatever process was sent one, all of them stop.
        signals = table.new_zeros(1, table.shape[1])
        signals[0, 0] = float(self.interrupts.signal or 0)
        table = torch.cat([table, signals])
        if exchange and self.world > 1:
            table = self._sum_over_processes(table)
        *rows, (signal, *_) = table.tolist()
        for (step, _), figures in zip(self.waiting, rows, strict=True):
            size = self.order.size(step - 1)
            if not all(map(math.isfinite, figures)):
                means = ", ".join(f"{figure / size:.4g}" for figure in figures)
                raise self._divergence_error(step, f"a loss that is not finite: {means}")
            self.objective.record(figures, size)
        self.waiting = []
        if exchange and self.world > 1 and signal:
            # The sum of several processes' signals is none: those without one of their own end as by SIGTERM.
            self.interrupts.stop(self.interrupts.signal or SIGTERM)

    def _sum_over_processes(self, table: Tensor) -> Tensor:
        total = self.accelerator.reduce(table, "sum")
        assert isinstance(total, Tensor)
        return total

    def _write_line(self, progress: Progress) -> None:
        entry = {"step": self.step, **self.objective.line(self.step)}
        self._log(entry)
        if not self.objective.reviews_at(self.step):
            progress.update(self.step, self.objective.describe(self.step))

    def _review_is_due(self) -> bool:
        done = bool(self.history) and self.history[-1]["step"] == self.step
        return not done and self.objective.reviews_at(self.step)

    def _review(self, progress: Progress) -> None:
        # Should validation data be random, a resumed run must still see what a whole one saw.
        seed_everything("validation", self.settings.seed, self.step, self.rank)
        between = self.interrupts.stop if self.world == 1 else None
        with self.ema.swap_in(self.task) if self.ema is not None else nullcontext():
            entry = self.objective.review(self.step, between)
        if entry is not None:
            self.history.append(self._log({"step": self.step, **entry}))
        progress.update(self.step, self.objective.describe(self.step))

    def _stops(self) -> bool:
        """Whether the caller has seen enough; asked after a review, where a resumed run is, too."""
        reviewed = bool(self.history) and self.history[-1]["step"] == self.step
        return reviewed and self.objective.stops(self.history)

    def _finish(self) -> dict[str, Any]:
        # In every process, so that all of them end.
        self._check_data()
        if self.ema is not None:
            self.ema.copy_to(self.task)
        totals = RunTotals(self.history, self.step, self._seconds(), self._peak(), self.memory.how)
        result = self.objective.finish(totals)
        self.save(result)
        self.accelerator.wait_for_everyone()
        return result

    def _check_data(self) -> None:
        try:
            self.objective.check_data()
        except RestuningError:
            # What was trained on other data must not be gone on from, should the first come back.
            if self.main:
                checkpoint.clear(self.folder)
            raise

    def _log(self, entry: dict[str, Any]) -> dict[str, Any]:
        entry |= {"lr": self._rate(self.step - 1), "seconds": self._seconds()}
        if self.log is not None:
            self.log.write(entry)
        track(self.accelerator, entry, self.step)
        return entry

    def _rate(self, step: int) -> float:
        return learning_rate(
            step,
            total=self.objective.steps,
            warmup=self.objective.warmup,
            peak=self.settings.lr,
        )

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _peak(self) -> int | None:
        now = self.memory.read()
        return max((p for p in (now, self.peak_before) if p is not None), default=None)

    def _divergence_error(self, step: int, found: str) -> DivergedError:
        settings = self.settings
        ways = [f"lower lr (it is {settings.lr:g})"]
        if settings.clip is None:
            ways.append("set clip=1.0")
        if settings.precision == "fp16":
            ways.append('choose precision="bf16" or "no"')
        return DivergedError(
            "training diverged",
            where=f"step {step}, learning rate {self._rate(max(0, step - 1)):.3g}",
            found=found,
            fix=f"{', '.join(ways)}, or look for NaN in the data; start again with --no-resume or "
            f"another --out. The last good checkpoint is kept in {self.folder}",
        )


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Refuse to go on from a run with other settings, other data, class names or another backbone.

    Raises:
        TrainingError: Names everything that differs, or a run of before these were written down.
    """
    fix = "use what was used then, another --out, or --no-resume to start over"
    unknown = [name for name in now if name.startswith("the ") and name not in before]
    known = {name: value for name, value in now.items() if name not in unknown}
    # The form of a task had another name then.
    then = {name: value for name, value in before.items() if name in known or not unknown}
    what = "this folder holds a run with other settings, data or backbone"
    refuse_other(then, known, out, what=what, fix=fix)
    if unknown:
        raise TrainingError(
            "this folder holds a run that does not say what it was trained on",
            where=str(out),
            found=f"nothing of {', '.join(unknown)}: an earlier version did not write them down",
            fix="give another --out, or --no-resume to start over",
        )


@contextmanager
def open_accelerator(
    precision: str, out: Path, trackers: Sequence[str] = ()
) -> Iterator[Accelerator]:
    """Accelerate for one run; the next one may want another precision."""
    ours = not is_initialized()
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=list(trackers) or None,
            project_dir=str(out),
            # The backbone is frozen, so its buffers are equal already.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except (ValueError, RuntimeError) as error:
        if ours:
            AcceleratorState._reset_state()
        raise TrainingError(
            "Accelerate cannot start",
            where=f"precision={precision!r}",
            found=str(error).splitlines()[0][:300],
            fix='choose precision="no" or "bf16", or another device',
        ) from None
    try:
        if precision == "fp16" and accelerator.device.type == "cpu":
            # torch would run it, but without the scaling that keeps small gradients above zero.
            raise TrainingError(
                "fp16 trains on GPUs only",
                found="device cpu",
                fix='choose precision="bf16" or "no"',
            )
        yield accelerator
    finally:
        # Its precision is one per process for ever; a second run may want another.
        if ours:
            AcceleratorState._reset_state()


def _out_of_memory(error: Exception, settings: LoopSettings) -> TrainingError:
    return TrainingError(
        "the device is out of memory",
        found=str(error).splitlines()[0][:200],
        fix=f"run each batch in more pieces (accumulate={2 * settings.accumulate}; the steps stay "
        'the same), or use precision="bf16" or a bypass method; with --no-resume or another --out',
    )
