"""The one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from restuning._errors import DivergedError
from restuning.training import checkpoint
from restuning.training.batch import bounds, check_labels, move, pieces, run, score
from restuning.training.evaluate import evaluate
from restuning.training.interrupts import Interrupts, diverged
from restuning.training.log import Bar, Journal, draw_curves, track
from restuning.training.memory import PeakMemory
from restuning.training.optimiser import Ema, build_optimiser, learning_rate
from restuning.training.randomness import Order, batches, seed_everything
from restuning.training.settings import FitResult, FitSettings, check_same_run, run_identity

LOG_EVERY = 10
"""Steps between two lines of the log, and between two waits for the device."""


class Loop:
    """A run's state, and the steps that change it.

    Args:
        tuned: With `.task`; `train`, `val`, `settings`, `out` and `collate` as for `fit`.
        model: `tuned` as Accelerate prepared it.
        accelerator: Devices, processes, precision.
        interrupts: Signals noted so far.
        stop: As for `fit`.
    """

    def __init__(
        self,
        tuned: nn.Module,
        model: nn.Module,
        train: Any,
        val: Any,
        settings: FitSettings,
        out: Path,
        collate: Callable | None,
        accelerator: Accelerator,
        interrupts: Interrupts,
        stop: Callable[[list[dict[str, Any]]], bool] | None = None,
    ) -> None:
        self.tuned, self.model, self.train, self.val = tuned, model, train, val
        self.settings, self.out, self.collate = settings, out, collate
        self.accelerator, self.interrupts, self.stop = accelerator, interrupts, stop
        self.folder = out / "checkpoints"
        self.task: nn.Module = tuned.task  # type: ignore[assignment]
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.main = accelerator.is_main_process
        self.order = Order(len(train), settings.batch_size, settings.epochs, settings.seed)
        self.warmup = round(settings.warmup * self.order.per_epoch)
        raw = build_optimiser(
            self.task,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            lambda_rate=settings.lambda_rate,
        )
        self.optimiser = accelerator.prepare_optimizer(raw)
        self.parameters = [p for p in self.task.parameters() if p.requires_grad]
        self.ema = None if settings.ema is None else Ema(self.task, settings.ema)
        self.identity = run_identity(self.task, settings, train, val)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.epoch_sums = [0.0, 0.0, 0]
        self.line_sums = [0.0, 0]
        self.waiting: list[tuple[int, Tensor]] = []
        self.seconds_before, self.peak_before = 0.0, None
        self.journal: Journal | None = None
        self.started = time.perf_counter()
        self.memory = PeakMemory(accelerator.device)

    def open(self, resume: bool) -> FitResult | None:
        """Take up what the folder holds; a finished run's result, or None if there is work."""
        snapshot = checkpoint.newest(self.folder, warn=self.main) if resume else None
        # Everyone has read before anyone writes.
        self.accelerator.wait_for_everyone()
        if snapshot is not None:
            check_same_run(snapshot.state["run"], self.identity, self.out)
            self.task.load_state_dict(snapshot.part("task"))
            if snapshot.state["result"] is not None:
                result = FitResult(**snapshot.state["result"])
                if self.main and not (self.out / "curves.png").exists():
                    draw_curves(result.history, self.out / "curves.png")
                return result
            self._restore(snapshot)
        elif self.main:
            checkpoint.clear(self.folder)
        if self.main:
            position = 0 if snapshot is None else snapshot.state["log"]
            self.journal = Journal(self.out / "log.jsonl", position)
        if snapshot is None:
            # Step 0, too: a restart then has the same first weights, seeded or not.
            self.save()
        return None

    def run(self, bar: Bar) -> FitResult:
        """Every step and evaluation that is left."""
        loader = iter(
            batches(
                self.train,
                self.order,
                self.step,
                self.rank,
                self.world,
                self.collate,
                self.settings.workers,
                pin=self.accelerator.device.type == "cuda",
            )
        )
        bar.start()
        # Once: an evaluation leaves the mode as it was, and a backbone has hundreds of modules.
        self.model.train()
        try:
            while True:
                if self.step == (len(self.history) + 1) * self.order.per_epoch:
                    self._end_epoch(bar)
                if self.step == self.order.total or self._stops():
                    return self._finish()
                self._step(next(loader))
                last = self.step % self.order.per_epoch == 0
                save = self.step % self.settings.checkpoint_every == 0
                if last or save or self.step % LOG_EVERY == 0:
                    self._flush(bar, line=last or self.step % LOG_EVERY == 0)
                if save and self.step < self.order.total:
                    self.save()
                if self.world == 1:
                    self.interrupts.stop()
        except (KeyboardInterrupt, SystemExit):
            # A second Ctrl-C may fall inside a step: nothing whole to save then.
            if self.interrupts.stopped:
                self._flush(bar, line=False, exchange=False)
                self.save()
            raise
        finally:
            bar.stop()
            if self.journal is not None:
                self.journal.close()

    def save(self, result: FitResult | None = None) -> None:
        """Write a checkpoint; with a result, the last one, without the optimiser."""
        if not self.main or self.journal is None:
            return
        state = {
            "step": self.step,
            "run": self.identity,
            "history": self.history,
            "epoch_sums": self.epoch_sums,
            "line_sums": self.line_sums,
            "seconds": self._seconds(),
            "peak": self._peak(),
            "log": self.journal.position(),
            "scaler": None if (s := self.accelerator.scaler) is None else s.state_dict(),
            "result": None if result is None else result.to_dict(),
        }
        more = result is None
        snapshot = checkpoint.take(
            self.task,
            self.optimiser if more else None,
            self.ema.mean if more and self.ema is not None else None,
            state,
        )
        for name, tensor in snapshot.tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise self._diverged(self.step, f"{name} is not finite after it")
        checkpoint.write(self.folder, snapshot, final=result is not None)

    def _step(self, batch: tuple[Any, Tensor]) -> None:
        inputs, labels = batch
        lowest, highest = bounds(labels)
        size = self.order.size(self.step)
        counts = self.order.counts(self.step, self.rank, self.world)
        # DDP takes the mean over processes; ours is the sum over examples of all of them.
        weight = self.world * counts / size
        seed_everything("step", self.settings.seed, self.step, self.rank)
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(self.step) * group["rate"]
        sums = torch.zeros(2, device=self.accelerator.device)
        parts = list(pieces(inputs, labels, self.settings.accumulate))
        for place, part in enumerate(parts):
            x, y = move(*part, self.accelerator.device)
            exchange = place == len(parts) - 1
            with nullcontext() if exchange else self.accelerator.no_sync(self.model):
                logits = run(self.model, x)
                check_labels(lowest, highest, logits.shape[-1])
                loss, hits = score(logits, y, self.settings.label_smoothing)
                self.accelerator.backward(loss * weight)
            sums += torch.stack([loss.detach(), hits.to(loss.dtype)]) * counts
        if self.settings.clip is not None:
            self.accelerator.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.waiting.append((self.step, sums))
        if self.ema is not None:
            self.ema.update(self.task, self.step)

    def _flush(self, bar: Bar, *, line: bool, exchange: bool = True) -> None:
        """Bring the sums of the last steps to the host, check them and write the log."""
        if self.waiting:
            asked = torch.tensor([[float(self.interrupts.asked or 0), 0.0]])
            table = torch.stack([s for _, s in self.waiting])
            table = torch.cat([table, asked.to(table)])
            if exchange and self.world > 1:
                table = self.accelerator.reduce(table, "sum")
            rows = table.tolist()  # type: ignore[union-attr]
            asked_of_all = rows.pop()[0]
            for (step, _), (loss, hits) in zip(self.waiting, rows, strict=True):
                size = self.order.size(step - 1)
                if not math.isfinite(loss):
                    raise self._diverged(step, f"loss {loss / size}")
                self.epoch_sums = [
                    self.epoch_sums[0] + loss,
                    self.epoch_sums[1] + hits,
                    self.epoch_sums[2] + size,
                ]
                self.line_sums = [self.line_sums[0] + loss, self.line_sums[1] + size]
            self.waiting = []
        else:
            asked_of_all = 0.0
        if line and self.line_sums[1]:
            loss = self.line_sums[0] / self.line_sums[1]
            epoch = (self.step - 1) // self.order.per_epoch + 1
            entry = {
                "step": self.step,
                "epoch": epoch,
                "loss": loss,
                "lr": self._rate(self.step - 1),
                "seconds": self._seconds(),
            }
            self._log(entry)
            self.line_sums = [0.0, 0]
            bar.at(self.step, epoch, loss, self.epoch_sums[1] / self.epoch_sums[2])
        if exchange and self.world > 1 and asked_of_all:
            self.interrupts.stop(self.interrupts.asked or 15)

    def _end_epoch(self, bar: Bar) -> None:
        loss, hits, count = self.epoch_sums
        entry: dict[str, Any] = {
            "epoch": len(self.history) + 1,
            "step": self.step,
            "loss": loss / count,
            "accuracy": hits / count,
            "val_loss": None,
            "val_accuracy": None,
            "lr": self._rate(self.step - 1),
        }
        if self.val is not None:
            # Should validation data be random, a resumed run must still see what a whole one saw.
            seed_everything("validation", self.settings.seed, self.step, self.rank)
            with self.ema.applied(self.task) if self.ema is not None else nullcontext():
                found = evaluate(
                    self.tuned,
                    self.val,
                    self.settings.batch_size,
                    self.collate,
                    workers=self.settings.workers,
                    accelerator=self.accelerator,
                    between=self.interrupts.stop if self.world == 1 else None,
                )
            entry |= {"val_loss": found["loss"], "val_accuracy": found["accuracy"]}
        entry["seconds"] = self._seconds()
        self._log(entry)
        self.history.append(entry)
        self.epoch_sums = [0.0, 0.0, 0]
        bar.at(self.step, entry["epoch"], entry["loss"], entry["val_accuracy"], validation=True)

    def _stops(self) -> bool:
        """Whether the caller has seen enough; asked between two epochs, where a resumed run is, too."""
        ended = self.step > 0 and self.step == len(self.history) * self.order.per_epoch
        return ended and self.stop is not None and self.stop(self.history)

    def _finish(self) -> FitResult:
        if self.ema is not None:
            self.ema.copy_to(self.task)
        last = self.history[-1]
        result = FitResult(
            self.history,
            self._seconds(),
            self._peak(),
            self.memory.how,
            self.step,
            last["loss"],
            last["accuracy"],
            last["val_accuracy"],
            last["val_loss"],
        )
        if self.main:
            self.save(result)
            draw_curves(self.history, self.out / "curves.png")
        self.accelerator.wait_for_everyone()
        return result

    def _restore(self, snapshot: checkpoint.Snapshot) -> None:
        state = snapshot.state
        checkpoint.restore_optimiser(self.optimiser, snapshot)
        if self.ema is not None:
            self.ema.load(snapshot.part("ema"))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        self.epoch_sums, self.line_sums = state["epoch_sums"], state["line_sums"]
        self.seconds_before, self.peak_before = state["seconds"], state["peak"]

    def _log(self, entry: dict[str, Any]) -> None:
        if self.journal is not None:
            self.journal.write(entry)
        track(self.accelerator, entry, self.step)

    def _rate(self, step: int) -> float:
        return learning_rate(
            step, total=self.order.total, warmup=self.warmup, peak=self.settings.lr
        )

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _peak(self) -> int | None:
        now = self.memory.read()
        return max((p for p in (now, self.peak_before) if p is not None), default=None)

    def _diverged(self, step: int, found: str) -> DivergedError:
        return diverged(step, self._rate(max(0, step - 1)), found, self.settings, self.folder)
