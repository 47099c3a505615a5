"""The one training loop: every step of a run, whatever interrupts it and whatever is trained."""

from __future__ import annotations

import logging
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

from restuning._errors import CallbackError, DivergedError, RestuningError, TrainingError
from restuning._files import hold_folder, refuse_other
from restuning.runtime.randomness import preserve_randomness, seed_everything
from restuning.training import checkpoint
from restuning.training.callbacks import Record
from restuning.training.interrupts import Interrupts
from restuning.training.log import LogFile, Progress
from restuning.training.memory import PeakMemory
from restuning.training.objective import RunTotals, TrainingObjective
from restuning.training.optimiser import Ema, build_optimiser, learning_rate, set_rates
from restuning.training.settings import LoopSettings
from restuning.training.together import alone, from_main
from restuning.training.trackers import Tracking, group_figures

logger = logging.getLogger(__name__)

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
                show = progress if accelerator.is_main_process else False
                try:
                    loop.begin()
                    result = loop.run(Progress(objective.steps, objective.lines, show))
                finally:
                    loop.close()
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
        self.callbacks = objective.callbacks
        # Set where a callback failed: what is saved then is what all of them knew before it.
        self.remembered: list[tuple[str, dict[str, Any]]] | None = None
        self.ended: str | None = None
        self.tracking = Tracking(accelerator, out, {}, 0)
        self.fresh = True
        # Whether the task carries the weights that a run would leave now.
        self.reviewing = False
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
            logger.debug(
                "%s: goes on from step %d of %d", self.out, self.step, self.objective.steps
            )
        elif self.main:
            checkpoint.clear(self.folder)
        if self.main:
            position = 0 if snapshot is None else snapshot.state["log"]
            self.log = LogFile(self.out / "log.jsonl", position)
        self.fresh = snapshot is None
        states = [] if snapshot is None else checkpoint.read_callbacks(snapshot)
        # Callbacks are the main process's; the others hear what came of it.
        from_main(lambda: self.callbacks.restore(states, self.step))
        keys = {} if snapshot is None else snapshot.state.get("trackers", {})
        self.tracking = Tracking(self.accelerator, self.out, keys, self.step)
        return None

    def begin(self) -> None:
        """Open the trackers, and write the first checkpoint, which knows by what they call the run."""
        about = {**self.settings.to_dict(), **self.objective.about, "folder": str(self.out)}
        self.tracking.start(about)
        if self.fresh:
            # Step 0, too: a restart then has the same first weights, seeded or not.
            self.save()

    def close(self) -> None:
        """Close trackers and log."""
        self.tracking.finish()
        if self.log is not None:
            self.log.close()

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
                if self.step == self.objective.steps or self.ended is not None:
                    self._flush()
                    return self._finish()
                self._step(next(batches))
                line = self.step % LOG_EVERY == 0 or self.objective.reviews_at(self.step)
                save = self.step % self.settings.checkpoint_every == 0
                # A checkpoint holds the sums of every step before it, so figures must not wait past
                # it.
                if line or save or self.callbacks.follow_steps:
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
        except CallbackError:
            self._flush(exchange=False)
            self.save()
            raise
        finally:
            progress.stop()

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
            **({} if self.ended is None else {"ended": self.ended}),
            **({"trackers": known} if (known := self.tracking.known()) else {}),
        }
        unfinished = result is None
        remembered = self.remembered
        if remembered is None and unfinished:
            remembered = self.callbacks.states(self.step)
        snapshot = checkpoint.take(
            self.task,
            self.optimiser if unfinished else None,
            self.ema.mean if unfinished and self.ema is not None else None,
            state,
            remembered or (),
        )
        # A checkpoint with NaN in it would be gone on from; the last good one stays instead.
        for name, tensor in snapshot.tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise self._divergence_error(self.step, f"{name} is not finite after it")
        path = checkpoint.write(self.folder, snapshot, final=not unfinished)
        logger.debug("step %d: wrote %s", self.step, path)

    def _restore(self, snapshot: checkpoint.Snapshot) -> None:
        state = snapshot.state
        checkpoint.restore_optimiser(self.optimiser, snapshot)
        if self.ema is not None:
            self.ema.load(snapshot.part("ema"))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        self.seconds_before, self.peak_before = state["seconds"], state["peak"]
        self.ended = state.get("ended")
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
            # Elsewhere than between steps other processes may be at another place.
            if exchange and self.callbacks.follow_steps:
                self.waiting = [each for each in self.waiting if each[0] > step]
                self._tell("on_step", self._record(step, self.objective.mean_loss(figures, size)))
        self.waiting = []
        if exchange and self.world > 1 and signal:
            # The sum of several processes' signals is none: those without one of their own end as by SIGTERM.
            self.interrupts.stop(self.interrupts.signal or SIGTERM)

    def _sum_over_processes(self, table: Tensor) -> Tensor:
        total = self.accelerator.reduce(table, "sum")
        assert isinstance(total, Tensor)
        return total

    def _write_line(self, progress: Progress) -> None:
        self._log(self._complete({"step": self.step, **self.objective.line(self.step)}))
        if not self.objective.reviews_at(self.step):
            progress.update(self.step, self.objective.describe(self.step))

    def _review_is_due(self) -> bool:
        done = bool(self.history) and self.history[-1]["step"] == self.step
        return not done and self.objective.reviews_at(self.step)

    def _review(self, progress: Progress) -> None:
        # Should validation data be random, a resumed run must still see what a whole one saw.
        seed_everything("validation", self.settings.seed, self.step, self.rank)
        between = self.interrupts.stop if self.world == 1 else None
        before = self.objective.state()
        self.reviewing = True
        with self.ema.swap_in(self.task) if self.ema is not None else nullcontext():
            entry = self.objective.review(self.step, between)
            if entry is not None:
                entry = self._complete({"step": self.step, **entry})
                self._judge(entry, before)
        self.reviewing = False
        if entry is not None:
            self.history.append(entry)
            logger.debug("step %d: %s", self.step, self.objective.describe(self.step))
            self._log(entry, review=True)
        progress.update(self.step, self.objective.describe(self.step))
        self._show_pictures()

    def _judge(self, entry: dict[str, Any], before: Mapping[str, Any]) -> None:
        """Show a review to callbacks; should one fail, it is made again by the run that goes on."""
        if not self.callbacks.all:
            return
        record = self._record_review(entry)

        def ask() -> str | None:
            self.remembered = self.callbacks.states(self.step)
            ended = self.callbacks.tell("on_epoch", record)
            self.remembered = None
            return ended

        try:
            self.ended = from_main(ask)
        except TrainingError:
            self.objective.restore(before)
            raise

    def _tell(self, event: str, record: Record) -> str | None:
        """Call the callbacks, in the main process; why the run shall end, in all of them."""
        return from_main(lambda: self.callbacks.tell(event, record))

    def _record(self, step: int, loss: float | None, **more: Any) -> Record:
        rate = self._rate(max(0, step - 1))
        rates = {"lr": rate}
        if self.settings.lambda_rate != 1:
            rates["lambda"] = rate * self.settings.lambda_rate
        values = {
            "epoch": (step - 1) // self.order.per_epoch + 1 if step else 0,
            "metric": self.objective.metric,
            "history": tuple(self.history),
            **more,
        }
        return Record(
            step,
            self.objective.steps,
            loss=loss,
            rates=rates,
            seconds=self._seconds(),
            weights=self._copy_weights,
            **values,
        )

    def _record_review(self, entry: Mapping[str, Any], **more: Any) -> Record:
        """What a review found, for callbacks."""
        found = {n.removeprefix("val_"): v for n, v in entry.items() if n.startswith("val_")}
        # Without validation data an entry has their names all the same.
        metrics = {} if found.get("loss") is None else found
        values = {"history": (*self.history, entry), **more}
        return self._record(
            self.step, entry["loss"], epoch=entry["epoch"], metrics=metrics, **values
        )

    def _copy_weights(self) -> dict[str, Tensor]:
        """What the run would leave now: in a review and at the end the task carries it, else a mean may be it."""
        between = self.ema is not None and not self.reviewing
        weights = self.ema.mean if self.ema is not None and between else self.task.state_dict()
        return {n: t.detach().to("cpu", copy=True) for n, t in weights.items()}

    def _show_pictures(self) -> None:
        for name, file in self.objective.pictures().items():
            if self.tracking.open and file.exists():
                self.tracking.show(name, file, self.step)

    def _finish(self) -> dict[str, Any]:
        # In every process, so that all of them end.
        self._check_data()
        if self.ema is not None:
            self.ema.copy_to(self.task)
        self.reviewing = True
        kept = self._take_best()
        totals = RunTotals(
            self.history,
            self.step,
            self._seconds(),
            self._peak(),
            self.memory.how,
            kept,
            self.ended,
        )
        result = self.objective.finish(totals)
        self._show_pictures()
        if self.callbacks.all:
            entry = totals.left()
            more = {"kept": kept, "history": tuple(self.history)}
            last = self._record(self.step, None, **more)
            self._tell("on_end", last if entry is None else self._record_review(entry, **more))
        self.save(result)
        self.accelerator.wait_for_everyone()
        return result

    def _take_best(self) -> int | None:
        """Put the best weights in the place of the last where that was asked for; their epoch."""
        best = self.callbacks.find_best()
        if best is None:
            return None
        epoch, weights = from_main(lambda: (best.best_epoch, best.weights))
        if weights:
            self.task.load_state_dict(weights)
        return epoch

    def _check_data(self) -> None:
        try:
            self.objective.check_data()
        except RestuningError:
            # What was trained on other data must not be gone on from, should the first come back.
            if self.main:
                checkpoint.clear(self.folder)
            raise

    def _complete(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {**entry, "lr": self._rate(self.step - 1), "seconds": self._seconds()}

    def _log(self, entry: Mapping[str, Any], *, review: bool = False) -> None:
        if self.log is not None:
            self.log.write(entry)
        self.tracking.log(group_figures(entry, review=review), self.step)

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
    precision: str, out: Path, trackers: Sequence[Any] = ()
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
            fix='choose precision="no" or "bf16", or another device'
            if ours
            # Such as transformers' Trainer, which leaves its own behind.
            else "give the precision that Accelerate was started with in this process, or train in another process",
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
