"""Arms of a sweep trained together: stacked weights, each arm with an optimiser of its own.

Nothing is shared between arms but the features they read: own learning rate, moments, clipping
and schedule. An arm that turns NaN stays alone with it.
"""

from __future__ import annotations

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
from restuning.features.cached import select_tokens
from restuning.host import Extractor
from restuning.task import Task
from restuning.training.optimiser import adamw, lambdas_of, learning_rate, parameter_groups
from restuning.training.prepare import prepare
from restuning.training.randomness import Order
from restuning.training.settings import FitSettings

EVALUATED = 256
"""Inputs of one evaluation batch."""


@dataclass
class ArmResult:
    """What became of one arm.

    Attributes:
        task: With its final weights.
        val_accuracy: After each epoch; empty without validation data.
        train_loss: Mean over the last epoch.
        died_at: Step (from 1) at which its loss was no longer finite, or None.
    """

    task: Task
    val_accuracy: list[float]
    train_loss: float
    died_at: int | None


def train_arms(
    host: Extractor,
    tasks: Sequence[Task],
    settings: Sequence[FitSettings],
    train: StoredFeatures,
    val: StoredFeatures | None,
    *,
    each_epoch: Callable[[int, list[float]], None] = lambda epoch, accuracy: None,
) -> list[ArmResult]:
    """Train tasks of one form at once; each ends as its own `fit` from the store would.

    Args:
        host: Lends its readout.
        tasks: Bypass tasks (or heads alone) whose weights have the same shapes.
        settings: One each; all but `lr`, `lambda_rate`, `weight_decay`, `clip` and `label_smoothing` equal.
        train: Stored features.
        val: Stored features, evaluated after every epoch.
        each_epoch: Told the number of the epoch and the arms' validation accuracies.

    Raises:
        TrainingError: Settings differ where arms must agree.
    """
    first = settings[0]
    for one in settings:
        same = ("epochs", "batch_size", "seed", "warmup", "accumulate", "precision", "ema")
        differs = [n for n in same if getattr(one, n) != getattr(first, n)]
        if differs or one.ema is not None or one.precision != "no":
            raise TrainingError(
                "arms of one bank must share their order of examples and precision",
                found=", ".join(differs) or "ema or mixed precision",
                fix="train them apart",
            )
    train, _ = prepare(tasks, lambda **taps: _read(host, tasks[0], taps), train)
    arms = _Arms(host, tasks, settings)
    order = Order(len(train), first.batch_size, first.epochs, first.seed)
    warmup = round(first.warmup * order.per_epoch)
    history: list[list[float]] = []
    sums = torch.zeros(len(tasks), dtype=torch.float64, device=arms.device)
    for step in range(order.total):
        indices = order.batch(step)
        taps, labels = train.gather(indices, _views(train, first.seed, step, order, indices))
        rate = [
            learning_rate(step, total=order.total, warmup=warmup, peak=one.lr) for one in settings
        ]
        sums += arms.step(taps, labels, rate, step + 1).double() * len(indices)
        if (step + 1) % order.per_epoch == 0:
            accuracy = arms.accuracy(val) if val is not None else []
            history.append(accuracy)
            each_epoch(len(history), accuracy)
            last, sums = sums / len(train), torch.zeros_like(sums)
    died = arms.died()
    return [
        ArmResult(task, [e[k] for e in history if e], float(last[k]), died[k])
        for k, task in enumerate(arms.tasks())
    ]


def _views(
    train: StoredFeatures, seed: int, step: int, order: Order, indices: Sequence[int]
) -> list[int]:
    if train.views == 1:
        return [0] * len(indices)
    from restuning.training.randomness import own_randomness, seed_everything

    views = []
    with own_randomness():
        for index in indices:
            # The draw that `fit` makes for this example in this epoch.
            seed_everything("example", seed, step // order.per_epoch, index, devices=False)
            views.append(train.view())
    return views


def _read(host: Extractor, task: Task, taps: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a task reads of stored taps."""
    if task.side is None:
        taps = {"last": taps[host.sites.taps[-1]]}
    return select_tokens(taps, task.needs(host.readout_rule).tokens)


class _Arms:
    """Stacked weights of K tasks, and an optimiser for each."""

    def __init__(
        self, host: Extractor, tasks: Sequence[Task], settings: Sequence[FitSettings]
    ) -> None:
        self.host, self.members, self.settings = host, list(tasks), settings
        self.device = host.device
        self.template = tasks[0]
        modules: list[nn.Module] = [t.to(self.device).train() for t in tasks]
        weights, self.buffers = stack_module_state(modules)
        self.weights: dict[str, Tensor] = {
            n: w.detach().clone().requires_grad_() for n, w in weights.items()
        }
        self.stacked: dict[Tensor, Tensor] = {
            p: self.weights[n] for n, p in self.template.named_parameters()
        }
        # The slices of one arm share memory with the stack, so one optimiser is told K rates.
        self.slices = [[w.detach()[k] for w in self.weights.values()] for k in range(len(tasks))]
        lambdas = lambdas_of(self.template)
        self.groups = [
            parameter_groups(
                [p.requires_grad_() for p in own],
                one.weight_decay,
                lambdas=[p for n, p in zip(self.weights, own, strict=True) if n in lambdas],
                lambda_rate=one.lambda_rate,
            )
            for own, one in zip(self.slices, settings, strict=True)
        ]
        self.optimiser = adamw([g for own in self.groups for g in own], lr=0.0)
        self.smoothing = torch.tensor(
            [s.label_smoothing for s in settings], device=self.device
        ).unsqueeze(1)
        self.limits = torch.tensor(
            [math.inf if s.clip is None else s.clip for s in settings], device=self.device
        )
        self.died_at = torch.zeros(len(tasks), dtype=torch.long, device=self.device)

    def logits(self, taps: Mapping[str, Tensor]) -> Tensor:
        """`k b c`."""
        near = {name: tap.to(self.device) for name, tap in taps.items()}
        prepared = self.template.take_prepared(near)
        fed = {**_read(self.host, self.template, near), **prepared}
        if self._fuses(fed):
            return self._fused(fed)

        def one(own: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return functional_call(self.template, (own, buffers), (fed, self.host.readout))

        # Random masks differ from arm to arm.
        return vmap(one, randomness="different")(dict(self.weights), dict(self.buffers))

    def _fuses(self, taps: Mapping[str, Tensor]) -> bool:
        side = self.template.side
        return (
            side is not None
            and self.template.head is not None
            and side.fuses([taps[name] for name in side.taps])
        )

    def _fused(self, taps: Mapping[str, Tensor]) -> Tensor:
        side, head = self.template.side, self.template.head
        assert side is not None
        assert head is not None
        state = side.fused(taps, self.stacked.__getitem__)
        feature = self.host.readout(state.flatten(0, 1), pool=self.template.pool)
        feature = feature.unflatten(0, (len(self.members), -1))
        weight, bias = self.stacked[head.weight], self.stacked[head.bias]
        return torch.baddbmm(bias.unsqueeze(1), feature, weight.mT)

    def step(
        self, taps: Mapping[str, Tensor], labels: Tensor, rates: Sequence[float], number: int
    ) -> Tensor:
        """One AdamW step of every arm; their mean losses, `k`."""
        losses = self._losses(self.logits(taps).float(), labels.to(self.device))
        # The sum keeps arms apart: each loss depends on the weights of its own arm alone.
        gradients = torch.autograd.grad(losses.sum(), list(self.weights.values()))
        losses = losses.detach()
        self.died_at += number * ((self.died_at == 0) & ~losses.isfinite())
        self._update([g.contiguous() for g in gradients], rates)
        return losses

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of every arm with its own label smoothing, `k b c -> k`."""
        likelihood = logits.log_softmax(-1)
        right = likelihood.gather(-1, labels.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1)
        smooth = right + self.smoothing * (likelihood.mean(-1) - right)
        return -smooth.mean(1)

    @torch.no_grad()
    def _update(self, gradients: list[Tensor], rates: Sequence[float]) -> None:
        if any(s.clip is not None for s in self.settings):
            norms = reduce(torch.add, (g.flatten(1).square().sum(1) for g in gradients)).sqrt()
            factor = (self.limits / (norms + 1e-6)).clamp(max=1.0)
            gradients = [g * factor.view(-1, *[1] * (g.dim() - 1)) for g in gradients]
        for k, own in enumerate(self.slices):
            for weight, gradient in zip(own, gradients, strict=True):
                weight.grad = gradient[k]
        rate = iter([r for own, r in zip(self.groups, rates, strict=True) for _ in own])
        for group in self.optimiser.param_groups:
            group["lr"] = next(rate) * group["rate"]
        self.optimiser.step()

    def died(self) -> list[int | None]:
        """Steps (from 1) at which arms were lost."""
        return [number or None for number in self.died_at.tolist()]

    @torch.no_grad()
    def accuracy(self, data: StoredFeatures) -> list[float]:
        """Of every arm, on a data set; 0 for an arm that died."""
        self.template.eval()
        right = torch.zeros(len(self.members))
        for start in range(0, len(data), EVALUATED):
            indices = list(range(start, min(start + EVALUATED, len(data))))
            taps, labels = data.gather(indices, [0] * len(indices))
            found = self.logits(taps).argmax(-1).cpu()
            right += (found == labels).sum(1)
        self.template.train()
        alive = [died is None for died in self.died()]
        return [float(r) / len(data) if ok else 0.0 for r, ok in zip(right, alive, strict=True)]

    def tasks(self) -> list[Task]:
        """The tasks with their weights."""
        for k, task in enumerate(self.members):
            own = {n: w[k].detach() for n, w in self.weights.items()}
            task.load_state_dict({**task.state_dict(), **own})
            task.eval()
        return self.members


def form(task: Task) -> Any:
    """Tasks of one form can be arms of one bank."""
    return tuple((n, tuple(w.shape)) for n, w in task.state_dict().items()), repr(task)


def evaluate_arm(host: Extractor, task: Task, data: StoredFeatures) -> float:
    """Accuracy of one task on stored features."""
    arms = _Arms(host, [task], [FitSettings()])
    return arms.accuracy(data)[0]


__all__ = ["ArmResult", "evaluate_arm", "form", "train_arms"]
