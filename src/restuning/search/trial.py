"""One candidate: whether the budget allows it, and its score on validation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from restuning import methods
from restuning._errors import DivergedError, EngineError, RestuningError
from restuning.data import Data
from restuning.features import Cached
from restuning.features.stored import Stored, can_be_stored
from restuning.forecast import StepForecast, storable
from restuning.problems import Problem
from restuning.search import rule
from restuning.search.budget import Budget, keep_taps_if_memory_is_free
from restuning.search.candidates import Candidate
from restuning.search.choice_folder import ChoiceFolder
from restuning.search.costs import Costs
from restuning.sites import Needs
from restuning.task import Task
from restuning.training import FitSettings
from restuning.training.calibrate import Calibration, calibrated_loss, judge
from restuning.training.defaults import with_own_lambda_rate
from restuning.training.evaluate import collect_logits
from restuning.training.parallel_runs import train_in_parallel
from restuning.training.run import Inputs, Log, Recipe, Setup

Row = dict[str, Any]
RESAMPLED = 50
"""Draws of the validation split, of which the noise of a figure that is no share is known to a tenth."""


class LeftOutError(Exception):
    """A candidate is not tried; the message is why."""


class Trials:
    """Tries one candidate after the other.

    Args:
        inputs: Data and features, without a test split.
        tested: Inputs of the test split, for the time of the final run.
        settings: Base of all trials; `epochs` are those of a final run inside the backbone.
        budget: Limits of the whole choice.
        folder: Keeps the rows that are decided.
        log: Receives a line for each trial.
        candidates: That will be tried, in order: features are stored in one pass for all of them.
        beside: Other answers to the same inputs, whose candidates it serves as well.
    """

    def __init__(
        self,
        inputs: Inputs,
        tested: int,
        settings: FitSettings,
        budget: Budget,
        folder: ChoiceFolder,
        log: Log,
        candidates: Sequence[Candidate],
        beside: Sequence[Inputs] = (),
    ) -> None:
        self.candidates, self.beside = candidates, beside
        self.problem = inputs.data.problem
        self.key = f"val_{self.problem.metric}"
        self.inputs, self.host, self.settings = inputs, inputs.host, settings
        self.budget, self.folder, self.log = budget, folder, log
        self.costs = Costs(inputs.host, inputs.data, tested, settings)

    def row(self, candidate: Candidate, before: Sequence[Row]) -> Row:
        """Try a candidate, or say why not; a row that the folder holds is taken as it is."""
        earlier = self.folder.read(candidate.method)
        if earlier is not None and earlier["status"] != "begun":
            return earlier
        wall, processor = time.perf_counter(), time.process_time()
        # From rows and not from a clock: a choice that goes on must count what it counted before.
        spent = sum(row["seconds"] for row in before)
        row: Row = {
            "method": candidate.method,
            "status": "left out",
            "why": "",
            "epochs": candidate.epochs(self.settings.epochs),
            "goes_on": candidate.warm_start,
            "trial_epochs": candidate.trial_epochs(self.settings.epochs),
        }
        try:
            row |= self._try(candidate, before, earlier, lambda: spent + time.perf_counter() - wall)
        except LeftOutError as reason:
            row["why"] = str(reason)
        row["seconds"] = time.perf_counter() - wall
        row["cpu_seconds"] = time.process_time() - processor
        self.folder.write(row)
        self.log(_describe(row))
        return row

    def _try(
        self,
        candidate: Candidate,
        before: Sequence[Row],
        earlier: Row | None,
        spent: Callable[[], float],
    ) -> Row:
        try:
            task = self._build(candidate)
            needs = task.needs(self.host.readout_rule)
        except RestuningError as error:
            raise LeftOutError(error.what) from None
        # Memory first: it is counted from shapes, while time is measured and features take a pass
        # over the data.
        forward = self.costs.forward() if self.budget.memory is not None else None
        _refuse(self.budget.refuses_memory(forward and forward.total_bytes))
        # Detached methods are tried from a store, all others through the backbone.
        detached = storable(task)
        settings = self._settings(candidate, detached)
        stored = self._features(task, needs, earlier is not None, spent) if detached else None
        setup = Setup.on(self.inputs, task, stored)
        step, pieces = self.costs.step(
            setup.tuned, setup.data, settings, self.budget, split=not detached
        )
        _refuse(self.budget.refuses_memory(step and step.total_bytes))
        settings = replace(settings, accumulate=pieces)
        row: Row = {
            "form": "stored" if detached else "live",
            "accumulate": pieces,
            "memory_bytes": step and step.total_bytes,
            "step_bytes": step and step.above_bytes,
            "final_seconds": earlier and earlier["final_seconds"],
        }
        # Once begun a candidate is not asked for time again: it has passed since (`STATUS`).
        if earlier is None:
            if self.budget.seconds is not None:
                trial, final = self.costs.run_seconds(
                    setup.tuned, setup.data, settings, candidate, detached
                )
                # Should this one lose, the final run is that of the best before it.
                other = (rule.choose(before) or {}).get("final_seconds") or 0.0
                _refuse(self.budget.refuses_time(spent() + trial + max(final, other)))
                row["final_seconds"] = final
            self.folder.write(
                {"method": candidate.method, "status": "begun", "seconds": 0.0, **row}
            )
        if detached and len(candidate.rates) > 1 and not candidate.warm_start:
            results, status = self._parallel(candidate, setup, settings, step), "tried"
        else:
            # A bank of one would gain nothing, cannot be ended early and leaves no weights.
            results, status = self._one_by_one(candidate, setup, settings, before)
        return row | self._score(results, status)

    def _build(self, candidate: Candidate, inputs: Inputs | None = None) -> Task:
        """The candidate's task, with the first weights of the seed; for other inputs than these where they are given."""
        free = partial(keep_taps_if_memory_is_free, budget=self.budget)
        return Recipe(candidate.method, self.settings, begin=free).build(inputs or self.inputs)

    def _settings(self, candidate: Candidate, detached: bool) -> FitSettings:
        epochs, warmup = candidate.trial_epochs(self.settings.epochs), self.settings.warmup_epochs
        settings = replace(
            self.settings,
            epochs=epochs,
            # Trials are no runs that anybody follows; a running mean is not kept for stacked ones.
            track=(),
            ema=None,
            warmup_epochs=None if warmup is None else min(warmup, epochs),
        )
        settings = with_own_lambda_rate(settings, candidate.method)
        # Products of a side network are small: casting them costs more than it saves.
        return replace(settings, precision="no", accumulate=1) if detached else settings

    def _features(
        self, task: Task, needs: Needs, decided: bool, spent: Callable[[], float]
    ) -> Stored:
        """Stored features, built if the budget allows it."""
        inputs = self.inputs
        try:
            stored = inputs.open_store(task, build=False)
            if stored is None and self.budget.seconds is not None and not decided:
                needed = spent() + self.costs.features_seconds()
                _refuse(self.budget.refuses_time(needed))
            if stored is None:
                # The first that lacks features pays for a pass that serves all others.
                detached = [c for c in self.candidates if not methods.runs_inside(c.method)]
                others = [
                    partial(self._build, each)
                    for each in detached
                    if self.folder.read(each.method) is None and each.method != task.method
                ]
                # What is decided for them is not known here, and what is stored already is not read again.
                others += [partial(self._build, c, each) for each in self.beside for c in detached]
                inputs.store_once([lambda: task, *others])
                stored = inputs.open_store(task)
        except EngineError as error:
            raise LeftOutError(error.what) from None
        if stored is None:
            kind = "sounds" if inputs.data.kind == "audio" else "texts"
            raise LeftOutError(
                f"all tokens of {kind} cannot be stored"
                if not can_be_stored(inputs.data, needs)
                else "its features are too large to store (`restuning cache` builds them)"
            )
        return stored

    def _parallel(
        self, candidate: Candidate, setup: Setup, settings: FitSettings, step: StepForecast | None
    ) -> list[dict[str, Any]]:
        """All rates from the store, as many at once as memory allows."""
        rates, results, data = candidate.rates, [], setup.data
        together = len(rates)
        if self.budget.memory is not None and step is not None:
            # What one run more adds: activations, moments and weights. The backbone is there once.
            each = step.above_bytes + step.optimiser_bytes + step.trained_bytes
            together = min(together, 1 + (self.budget.memory - step.total_bytes) // max(1, each))
        for start in range(0, len(rates), together):
            part = [replace(settings, lr=rate) for rate in rates[start : start + together]]
            # From the same first weights all of them: rates are compared here, not seeds.
            tasks = [self._build(candidate) for _ in part]
            runs = train_in_parallel(self.host, tasks, part, data.train, data.val)
            for one, run in zip(part, runs, strict=True):
                if run.diverged_at is not None:
                    results.append({"lr": one.lr, self.key: None})
                    continue
                cached = Cached(self.host, run.task, data.val.store)
                score = {"lr": one.lr, self.key: run.val_accuracy[-1]}
                results.append(score | self._fit_of_answers(cached, data))
        return results

    def _one_by_one(
        self,
        candidate: Candidate,
        setup: Setup,
        settings: FitSettings,
        before: Sequence[Row],
    ) -> tuple[list[dict[str, Any]], str]:
        """One rate after the other, each ended early where it clearly loses."""
        to_beat = rule.score_of(rule.find_highest(before) or {}) or 0.0
        results, status = [], "tried"

        def stop(history: list[dict[str, Any]]) -> bool:
            if not self.problem.counted:
                # Only of a share of right answers it is known how far it may go and how noisy it is.
                return False
            curve = [epoch[self.key] for epoch in history]
            return rule.is_lost(curve, settings.epochs, to_beat, len(setup.data.val))

        for rate in candidate.rates:
            if results:
                # A trained task cannot begin again: every rate gets a new one.
                setup = Setup.on(self.inputs, self._build(candidate), setup.stored)
            folder = self.folder.run_folder(candidate.method, rate)
            at_rate = replace(settings, lr=rate)
            try:
                result = setup.fit_until(stop, at_rate, folder)
            except DivergedError:
                results.append({"lr": rate, self.key: None})
                continue
            curve = [epoch[self.key] for epoch in result.history]
            score = {"lr": rate, self.key: curve[-1], "curve": curve}
            results.append(score | self._fit_of_answers(setup.tuned, setup.data))
            # What is solved has one review and is whole.
            early = len(curve) < settings.epochs and not setup.task.solved
            status = "stopped" if early else status
        return results, status

    def _fit_of_answers(self, tuned: nn.Module, data: Data) -> dict[str, Any]:
        """How well a trained model's probabilities fit the validation split, and at which temperature."""
        logits, labels = collect_logits(tuned, data.val, self.settings.batch_size, data.collate)
        calibration = judge(tuned.get_submodule("task"), logits, labels)
        fit = calibrated_loss(logits, labels, self.problem)
        found = {"cross_entropy": fit, **calibration.to_dict()}
        if not self.problem.counted:
            found["standard_error"] = _bootstrap(self.problem, logits, labels)
            found["problem"] = self.problem.with_errors(logits, labels).spec()
        return found

    def _score(self, results: list[dict[str, Any]], status: str) -> Row:
        alive = [t for t in results if t[self.key] is not None]
        if not alive:
            raise LeftOutError("its loss became NaN at every rate")
        top: Any = max(alive, key=lambda t: t[self.key])
        other: dict[str, Any] = {}
        if self.problem.counted:
            noise = rule.standard_error(top[self.key], len(self.inputs.data.val))
        else:
            noise = top["standard_error"]
            other = {"metric": self.problem.metric, "problem": top["problem"]}
        return {
            "status": status,
            **other,
            self.key: top[self.key],
            "lr": top["lr"],
            "cross_entropy": top["cross_entropy"],
            **Calibration.from_dict(top).to_dict(),
            "standard_error": noise,
            "trials": results,
        }


def _bootstrap(problem: Problem, logits: Tensor, targets: Tensor) -> float:
    """Standard error of a metric over examples: its deviation over `RESAMPLED` draws of as many, with replacement."""
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(RESAMPLED):
        at = torch.randint(len(targets), (len(targets),), generator=draw)
        if (score := problem.measure(logits[at], targets[at])) is not None:
            found.append(score)
    return statistics.stdev(found) if len(found) > 1 else 0.0


def _refuse(why: str) -> None:
    if why:
        raise LeftOutError(why)


def _describe(row: Row) -> str:
    if row["status"] == "left out":
        return f"{row['method']}: left out, {row['why']}"
    early = ", ended early" if row["status"] == "stopped" else ""
    score, metric = rule.score_of(row) or 0.0, row.get("metric")
    told = f"{score:.1%}" if metric is None else f"{metric.replace('_', ' ')} {score:.3f}"
    return f"{row['method']}: {told} on validation{early}, {row['seconds']:.1f} s"
