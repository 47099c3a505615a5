"""Runs of a sweep made in parallel: stacked weights, each run with a rate and moments of its own.

Nothing is shared between the runs but the features they read, so that one that diverges does so alone.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from restuning._errors import TrainingError
from restuning.features import StoredFeatures
from restuning.features.cached import select_taps
from restuning.host import Extractor
from restuning.runtime.randomness import preserve_randomness, seed_everything
from restuning.sites import Features
from restuning.task import Task
from restuning.training.optimiser import (
    adamw,
    find_lambdas,
    learning_rate,
    parameter_groups,
    set_rates,
)
from restuning.training.prepare import conclude, prepare, solve_rows
from restuning.training.randomness import Order, Portions
from restuning.training.settings import FitSettings
from restuning.training.together import alone

EVALUATED = 256
"""Inputs of one evaluation batch."""


@dataclass
class ParallelRun:
    """One finished run of several made in parallel.

    Attributes:
        task: With its final weights.
        val_accuracy: After each epoch, or the metric of another problem than one class of several; empty
            without validation data, and None where it is not defined.
        train_loss: Mean over the last epoch.
        diverged_at: Step (from 1) at which its loss was no longer finite, or None.
    """

    task: Task
    val_accuracy: list[float | None]
    train_loss: float
    diverged_at: int | None


@alone()
def train_in_parallel(
    host: Extractor,
    tasks: Sequence[Task],
    settings: Sequence[FitSettings],
    train: StoredFeatures,
    val: StoredFeatures | None,
    *,
    each_epoch: Callable[[int, Sequence[float | None]], None] = lambda epoch, accuracy: None,
) -> list[ParallelRun]:
    """Train tasks of one form at once; each ends as its own `fit` from the store would.

    Args:
        host: Lends its readout.
        tasks: Bypass tasks (or heads alone) whose weights have the same shapes.
        settings: One each; all but `lr`, `lambda_rate`, `weight_decay`, `clip` and `label_smoothing` equal.
        train: Stored features.
        val: Stored features, evaluated after every epoch.
        each_epoch: Called with the number of the epoch and every run's validation accuracy.

    Raises:
        TrainingError: Settings differ where the runs must agree.
    """
    first = settings[0]
    for one in settings:
        same = ("epochs", "batch_size", "seed", "warmup", "accumulate", "precision", "ema")
        differs = [n for n in same if getattr(one, n) != getattr(first, n)]
        if differs or one.ema is not None or one.precision != "no":
            raise TrainingError(
                "parallel runs must share their order of examples and precision",
                found=", ".join(differs) or "ema or mixed precision",
                fix="train them apart",
            )
    for one in settings:
        if one.class_weights is not None or one.balanced_sampling:
            raise TrainingError(
                "runs that are made in parallel weigh all examples alike",
                where="class_weights, balanced_sampling",
                fix="train them apart with `restuning.fit`, or leave these settings out",
            )
        if one.early_stopping is not None or one.keep_best:
            raise TrainingError(
                "runs that are made in parallel all go to their end",
                where="early_stopping, keep_best",
                fix="train them apart with `restuning.fit`, or leave these settings out",
            )
    if all(task.solved for task in tasks):
        return _solve_in_parallel(host, tasks, train, val, each_epoch)
    train, _ = prepare(tasks, lambda **taps: _select_taps(host, tasks[0], taps), train)
    runs = _StackedRuns(host, tasks, settings)
    order = Order(
        len(train),
        first.batch_size,
        first.epochs,
        first.seed,
        portions=Portions.of(train, first.batch_size, 1),
    )
    warmup = round(first.warmup * order.per_epoch)
    history: list[list[float | None]] = []
    sums = torch.zeros(len(tasks), dtype=torch.float64, device=runs.device)
    held = 0
    for step in range(order.total):
        if order.portions is not None and step == held:
            train.hold(order.rest_of_portion(step, 0, 1))
            held = order.end_of_portion(step)
        indices = order.batch(step)
        taps, labels = train.gather(indices, _draw_views(train, first.seed, step, order, indices))
        rate = [
            learning_rate(step, total=order.total, warmup=warmup, peak=one.lr) for one in settings
        ]
        sums += runs.step(taps, labels, rate, step + 1).double() * len(indices)
        if (step + 1) % order.per_epoch == 0:
            accuracy = runs.accuracy(val) if val is not None else []
            history.append(accuracy)
            each_epoch(len(history), accuracy)
            last, sums = sums / len(train), torch.zeros_like(sums)
    if order.portions is not None:
        train.hold(torch.empty(0, dtype=torch.long))
    diverged = runs.divergence_steps()
    finished = runs.tasks()
    for number, task in enumerate(finished):
        if diverged[number] is not None:
            continue
        if conclude(task, host, lambda **taps: _select_taps(host, tasks[0], taps), train) and val:
            # The last figure is of what the run leaves, as that of `fit` is.
            history[-1][number] = evaluate_stored(host, task, val)
            task.eval()
    return [
        ParallelRun(task, [e[k] for e in history if e], float(last[k]), diverged[k])
        for k, task in enumerate(finished)
    ]


def _solve_in_parallel(
    host: Extractor,
    tasks: Sequence[Task],
    train: StoredFeatures,
    val: StoredFeatures | None,
    each_epoch: Callable[[int, Sequence[float | None]], None],
) -> list[ParallelRun]:
    """What is solved is solved once for all of them: rates and epochs change nothing."""
    for task in tasks:
        task.to(host.device)
    answers, labels = solve_rows(tasks, lambda **taps: _select_taps(host, tasks[0], taps), train)
    loss = tasks[0].problem.loss(answers, labels).item() / len(labels)
    accuracy = [] if val is None else [evaluate_stored(host, tasks[0], val)] * len(tasks)
    each_epoch(1, accuracy)
    return [
        ParallelRun(task.eval(), accuracy[k : k + 1], loss, None) for k, task in enumerate(tasks)
    ]


def _draw_views(
    train: StoredFeatures, seed: int, step: int, order: Order, indices: Sequence[int]
) -> list[int]:
    if train.views == 1:
        return [0] * len(indices)
    views = []
    with preserve_randomness():
        for index in indices:
            # The draw that `fit` makes for this example in this epoch.
            seed_everything("example", seed, step // order.per_epoch, index, devices=False)
            views.append(train.view())
    return views


def _select_taps(host: Extractor, task: Task, taps: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The taps, and of them the tokens, that a task reads."""
    found = select_taps(taps, task.needs(host.readout_rule), host.sites.taps[-1])
    return Features(found, host.readout)


class _StackedRuns:
    """Stacked weights of K tasks, and an optimiser for each."""

    def __init__(
        self, host: Extractor, tasks: Sequence[Task], settings: Sequence[FitSettings]
    ) -> None:
        self.host, self.members, self.settings = host, list(tasks), settings
        self.device = host.device
        self.template = tasks[0]
        modules: list[nn.Module] = [t.to(self.device).train() for t in tasks]
        # First, for stacking forgets which of them are not trained: a fixed lambda, a head that passes on.
        trained = {n for n, p in self.template.named_parameters() if p.requires_grad}
        weights, self.buffers = stack_module_state(modules)
        whole = {n: w.detach().clone() for n, w in weights.items()}
        self.weights: dict[str, Tensor] = {
            n: whole[n].requires_grad_() for n in whole if n in trained
        }
        self.buffers = {**self.buffers, **{n: whole[n] for n in whole if n not in trained}}
        self.stacked: dict[Tensor, Tensor] = {
            p: whole[n] for n, p in self.template.named_parameters()
        }
        # The slices of one run share memory with the stack, so one optimiser serves all rates.
        self.slices = [[w.detach()[k] for w in self.weights.values()] for k in range(len(tasks))]
        lambdas = find_lambdas(self.template)
        self.groups = [
            parameter_groups(
                [p.requires_grad_() for p in own],
                one.weight_decay,
                lambdas=[p for n, p in zip(self.weights, own, strict=True) if n in lambdas],
                lambda_rate=one.lambda_rate,
            )
            for own, one in zip(self.slices, settings, strict=True)
        ]
        # One optimiser for all; every run's rate is set before each of its steps.
        self.optimiser = adamw([g for own in self.groups for g in own], lr=0.0)
        self.smoothing = torch.tensor(
            [s.label_smoothing for s in settings], device=self.device
        ).unsqueeze(1)
        self.limits = torch.tensor(
            [math.inf if s.clip is None else s.clip for s in settings], device=self.device
        )
        self.diverged_at = torch.zeros(len(tasks), dtype=torch.long, device=self.device)

    def logits(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Logits of every run on one batch, `k b c`."""
        on_device = {name: tap.to(self.device) for name, tap in taps.items()}
        prepared = self.template.take_prepared(on_device)
        inputs = {**_select_taps(self.host, self.template, on_device), **prepared}
        if self._can_fuse(inputs):
            return self._run_fused(inputs)

        def one(own: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return functional_call(self.template, (own, buffers), (inputs, self.host.readout))

        # Random masks differ from run to run.
        return vmap(one, randomness="different")(dict(self.weights), dict(self.buffers))

    def _can_fuse(self, taps: Mapping[str, Tensor]) -> bool:
        side = self.template.side
        return (
            side is not None
            and self.template.head is not None
            # Of a tap of which parts alone are read there is no stream.
            and all(name in taps for name in side.taps)
            and side.can_fuse([taps[name] for name in side.taps])
        )

    def _run_fused(self, taps: Mapping[str, Tensor]) -> Tensor:
        side, head = self.template.side, self.template.head
        assert side is not None
        assert head is not None
        state = side.run_fused(taps, self.stacked.__getitem__)
        feature = self.host.readout(state.flatten(0, 1), pool=self.template.pool)
        feature = feature.unflatten(0, (len(self.members), -1))
        # `k b d` times the heads' `k c d`, in one product for all runs; tokens and places count as inputs.
        weight, bias = self.stacked[head.weight], self.stacked[head.bias]
        logits = torch.baddbmm(bias.unsqueeze(1), feature.flatten(1, -2), weight.mT)
        return logits.unflatten(1, feature.shape[1:-1])

    def step(
        self, taps: Mapping[str, Tensor], labels: Tensor, rates: Sequence[float], number: int
    ) -> Tensor:
        """One AdamW step of every run; their mean losses, `k`."""
        losses = self.template.problem.losses_of_several(
            self.logits(taps).float(), labels.to(self.device), self.smoothing
        )
        # The sum keeps runs apart: each loss depends on the weights of its own run alone.
        gradients = torch.autograd.grad(losses.sum(), list(self.weights.values()))
        losses = losses.detach()
        # On the device, so that no step waits; once set it is only added 0 to.
        self.diverged_at += number * ((self.diverged_at == 0) & ~losses.isfinite())
        self._update([g.contiguous() for g in gradients], rates)
        return losses

    @torch.no_grad()
    def _update(self, gradients: list[Tensor], rates: Sequence[float]) -> None:
        if any(s.clip is not None for s in self.settings):
            # As `clip_grad_norm_`, which knows one norm and one limit where here are K of each.
            norms = reduce(torch.add, (g.flatten(1).square().sum(1) for g in gradients)).sqrt()
            factor = (self.limits / (norms + 1e-6)).clamp(max=1.0)
            gradients = [g * factor.view(-1, *[1] * (g.dim() - 1)) for g in gradients]
        for k, own in enumerate(self.slices):
            for weight, gradient in zip(own, gradients, strict=True):
                weight.grad = gradient[k]
        groups = iter(self.optimiser.param_groups)
        for own, rate in zip(self.groups, rates, strict=True):
            set_rates(itertools.islice(groups, len(own)), rate)
        self.optimiser.step()

    def divergence_steps(self) -> list[int | None]:
        """For each run the step (from 1) at which its loss was no longer finite, or None."""
        return [number or None for number in self.diverged_at.tolist()]

    @torch.no_grad()
    def accuracy(self, data: StoredFeatures) -> list[float | None]:
        """The problem's metric of every run on a data set; 0 for a run that diverged."""
        # All runs go through the template's modules, so its mode is that of all.
        self.template.eval()
        problem = self.template.problem
        if not problem.counted:
            return self._measure(data)
        right = torch.zeros(len(self.members))
        for start in range(0, len(data), EVALUATED):
            indices = list(range(start, min(start + EVALUATED, len(data))))
            taps, labels = data.gather(indices, [0] * len(indices))
            answers = self.logits(taps).argmax(-1).cpu()
            right += (answers == labels).sum(1)
        self.template.train()
        alive = [step is None for step in self.divergence_steps()]
        return [float(r) / len(data) if ok else 0.0 for r, ok in zip(right, alive, strict=True)]

    def _measure(self, data: StoredFeatures) -> list[float | None]:
        """A metric that is no mean over examples, of every run."""
        answers, targets = [], []
        for start in range(0, len(data), EVALUATED):
            indices = list(range(start, min(start + EVALUATED, len(data))))
            taps, labels = data.gather(indices, [0] * len(indices))
            answers.append(self.logits(taps).float().cpu())
            targets.append(labels)
        self.template.train()
        logits, truth = torch.cat(answers, 1), torch.cat(targets)
        alive = [step is None for step in self.divergence_steps()]
        measure = self.template.problem.measure
        return [measure(z, truth) if ok else 0.0 for z, ok in zip(logits, alive, strict=True)]

    def tasks(self) -> list[Task]:
        """The tasks with their weights."""
        for k, task in enumerate(self.members):
            trained = {n: w[k].detach() for n, w in self.weights.items()}
            # Only parameters were trained; buffers are still each task's own.
            task.load_state_dict({**task.state_dict(), **trained})
            task.eval()
        return self.members


def stack_signature(task: Task) -> Any:
    """Tasks with equal signatures can be trained in parallel."""
    shapes = tuple((n, tuple(w.shape)) for n, w in task.state_dict().items())
    # What one trains and another keeps as it is cannot be one stack, and all run through the modules of one: with
    # its readout, taps and chances.
    trained = tuple(n for n, p in task.named_parameters() if p.requires_grad)
    return shapes, trained, repr(task), json.dumps(task.spec(), sort_keys=True, default=str)


def evaluate_stored(host: Extractor, task: Task, data: StoredFeatures) -> float | None:
    """Accuracy of one task on stored features, or the metric of its problem."""
    return _StackedRuns(host, [task], [FitSettings()]).accuracy(data)[0]
